"""`srpcd --check` says beforehand what a start, or the first login, would say."""

import os
import pwd
from pathlib import Path

import pytest

from srpcd import __main__ as daemon

ACCOUNTS = {
    "gate": ("gate", "x", 900, 900, "", "/nonexistent", "/usr/sbin/nologin"),
    "local": ("local", "x", 901, 901, "", "/nonexistent", "/usr/sbin/nologin"),
    "alice": ("alice", "x", 1000, 1000, "", "/home/alice", "/bin/bash"),
    "toor": ("toor", "x", 0, 0, "", "/root", "/bin/bash"),
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree, on a system with the accounts above and one PAM service, `srpcd`."""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: pwd.struct_passwd(ACCOUNTS[name]))
    monkeypatch.setattr(daemon, "DIRECTORIES", (str(tmp_path / "etc"), str(tmp_path / "usr")))
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/srpcd").touch()
    made = tmp_path / "tree"
    made.mkdir(mode=0o755)
    return made


def check(tree: Path, capsys: pytest.CaptureFixture[str], *lines: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a check of these lines."""
    file = tree.parent / "srpcd.toml"
    users = [] if any("gate_user" in line for line in lines) else ["gate_user = 'gate'", "local_gate_user = 'local'"]
    file.write_text("\n".join([*users, *lines, f"[paths]\ntree = '{tree}'"]))
    status = daemon.main(["--config", str(file), "--check"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_what_is_good_is_said_to_be_good(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tree, capsys) == (0, "srpcd: the configuration is good\n", "")


@pytest.mark.parametrize(
    ("user", "words"), [("nobody-there", "the account 'nobody-there'"), ("toor", "local_gate_user: 'toor' is root")]
)
@pytest.mark.parametrize("other", ["gate_user", "local_gate_user"])
def test_gates_that_can_not_start_are_an_error(
    tree: Path, capsys: pytest.CaptureFixture[str], user: str, words: str, other: str
) -> None:
    users = {"gate_user": "gate", "local_gate_user": "local"} | {other: user}
    status, out, err = check(tree, capsys, *(f"{key} = '{name}'" for key, name in users.items()))
    assert (status, out) == (2, "")
    assert words in err


def test_a_person_as_a_gates_account_is_warned_of(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = check(tree, capsys, "gate_user = 'alice'", "local_gate_user = 'local'")
    assert (status, out) == (0, "srpcd: the configuration can be used\n")
    assert err.startswith("srpcd: warning: gate_user, local_gate_user: 'alice' is an account that people use")


def test_a_pam_service_without_a_file_is_warned_of(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _out, err = check(tree, capsys, "authentication.pam_service = 'nosuch'")
    assert status == 0
    assert "warning: authentication.pam_service: no file 'nosuch' in " in err
    assert check(tree, capsys, "authentication.pam_service = 'SRPCD'")[2] == "", "libpam looks for small letters"


def test_a_tree_in_which_everybody_may_write_is_warned_of(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree.chmod(0o1777)
    status, _out, err = check(tree, capsys)
    assert status == 0
    assert f"warning: paths.tree: everybody may write in {tree}" in err
    tree.rmdir()
    assert check(tree, capsys)[2] == "", "it is made at the start"
