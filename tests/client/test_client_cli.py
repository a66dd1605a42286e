"""The `srpc` command, as real processes."""

from __future__ import annotations

import json
import os
import pty
import pwd
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpc_client.cli.access import Access
from srpcd.wire import frames

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, MakeRemote

    Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "srpc_client.cli"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
        "LOGNAME": "alice",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Runs `srpc` with arguments; `input` is its standard input."""

    def run(*arguments: str, input: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            input=input,
            capture_output=True,
            text=True,
            env=environment | more,
            timeout=30,
            check=False,
        )

    return run


@pytest.fixture
def password(tmp_path: Path) -> str:
    (tmp_path / "password").write_text("secret\n")
    return str(tmp_path / "password")


# --- calls -------------------------------------------------------------------------------------------------------------


def test_a_call_gives_the_reply_as_it_is(local: FakeDaemon, run: Run) -> None:
    done = run("-a", local.address, "call", "/calc/add", "1 2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3", "")
    assert run("call", "/calc/add", input="3 4", SRPC_ADDRESS=local.address).stdout == "7"
    assert run("-a", local.address, "call", "/calc/add", "-", input="5 6").stdout == "11"
    run("-a", local.address, "call", "/echo", "x", "--metadata", '{"trace": 1}')
    assert local.calls[-1] == ("echo", b"x", b'{"trace": 1}')


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["call", "/missing", "x"], 1, "no such endpoint or directory (ENOENT)"),
        (["--timeout", "0.2", "call", "/calc/never", "x"], 1, "(ETIMEDOUT)"),
        (["ls", "/missing"], 1, "(ENOENT)"),
        (["call"], 2, "Missing argument 'PATH'"),
        (["nonsense"], 2, "No such command"),
        (["--timeout", "0", "ls"], 2, "timeout"),
        (["--timeout", "nan", "ls"], 2, "nan is no number of seconds"),
        (["pin"], 2, "local socket and has no key"),
        (["--pin", "x", "--ca", "y", "ls"], 2, "give one"),
        (["--pin", "garbage", "ls"], 2, "is a local socket, whose server has no key"),
        (["--ca", "no-such-file", "ls"], 2, "is a local socket, whose server has no key"),
        (["--password-file", "-", "call", "/echo"], 2, "either the password or the payload"),
        (["-u", "mallory", "--password-file", "/nonexistent", "ls"], 3, "/nonexistent: No such file"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_a_status(
    local: FakeDaemon, run: Run, arguments: list[str], status: int, says: str
) -> None:
    done = run("-a", local.address, *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("redirection", "says"),
    [
        ("<&-", "standard input is closed"),
        ("</dev/null >&-", "the call was not made"),
        ("</dev/null >/dev/full", "No space left on device"),
    ],
)
def test_what_is_wrong_with_its_own_streams_is_one_sentence(
    local: FakeDaemon, environment: dict[str, str], redirection: str, says: str
) -> None:
    line = f"{' '.join(COMMAND)} -a {local.address} call /calc/add {redirection}"
    done = subprocess.run(
        ["/bin/sh", "-c", line], stderr=subprocess.PIPE, text=True, env=environment, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("srpc: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_login_that_takes_too_long_is_no_login(local: FakeDaemon, run: Run) -> None:
    local.on[frames.AUTH] = lambda *_: True
    done = run("-a", local.address, "--timeout", "0.3", "call", "/calc/add", "x")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "srpc: the time given to connecting and logging in was over before it was done (ETIMEDOUT)\n"


def test_a_payload_that_is_too_large_is_told_with_the_bound(local: FakeDaemon, run: Run, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(17_000_000)
    line = f"{' '.join(COMMAND)} -a {local.address} call /calc/add <{tmp_path}/large"
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "srpc: 17000000 bytes of payload: a call carries at most 16 MiB; send less at once (EMSGSIZE)\n"


def test_interrupted_while_it_loads_it_ends_without_a_word(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    environment["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    done = subprocess.run([*COMMAND, "ls"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_authority_that_does_not_vouch_is_told_in_the_commands_words(remote: FakeDaemon, run: Run) -> None:
    done = run("-a", remote.address, "--ca", "system", "ls")
    assert done.returncode == 3
    assert "srpc --ca" in done.stderr


def test_metadata_is_bytes_as_the_payload_is(local: FakeDaemon, run: Run) -> None:
    run("-a", local.address, "call", "/echo", "x", "--metadata", os.fsdecode(b"\xff"))
    assert local.calls[-1] == ("echo", b"x", b"\xff")


@pytest.mark.parametrize(
    ("address", "status", "says"),
    [
        ("unix:/nonexistent/srpc.sock", 3, "can't connect to unix:/nonexistent/srpc.sock"),
        ("http://x", 2, "is no address"),
    ],
)
def test_a_server_that_can_not_be_reached_is_named(run: Run, address: str, status: int, says: str) -> None:
    done = run("-a", address, "ls")
    assert done.returncode == status
    assert says in done.stderr


def test_what_a_server_says_can_not_command_the_terminal(local: FakeDaemon, run: Run) -> None:
    local.endpoints["evil\x1b]0;title\x07\n"] = lambda *_: b""
    for arguments in (["ls"], ["ls", "-l"], ["tree"]):
        done = run("-a", local.address, *arguments)
        assert done.returncode == 0
        assert "\x1b]0" not in done.stdout
        assert r"evil\x1b]0;title\x07\n" in done.stdout


# --- looking around ----------------------------------------------------------------------------------------------------


def test_ls_lists_names(local: FakeDaemon, run: Run) -> None:
    assert run("-a", local.address, "ls").stdout == "calc\necho\n"
    assert run("-a", local.address, "ls", "/calc").stdout == "add\nnever\n"
    assert run("-a", local.address, "ls", "/calc/add").stdout == "add\n"
    assert json.loads(run("-a", local.address, "ls", "--json").stdout) == ["calc", "echo"]
    long = run("-a", local.address, "ls", "-l").stdout.splitlines()
    assert long[0].startswith("drwxr-xr-x  root  calc")
    assert long[1].startswith("prw--w----  root  calc")
    assert long[1].endswith("echo  (service)")
    described = json.loads(run("-a", local.address, "ls", "-l", "--json").stdout)
    assert [(each["name"], each["kind"], each["mode"]) for each in described] == [
        ("calc", "directory", 0o755),
        ("echo", "service", 0o620),
    ]


def test_stat_tells_everything(local: FakeDaemon, run: Run) -> None:
    found = json.loads(run("-a", local.address, "stat", "--json", "/calc/add").stdout)
    assert (found["name"], found["kind"], found["group"], found["live"]) == ("add", "service", "calc", True)
    text = run("-a", local.address, "stat", "/calc/add").stdout
    assert "prw--w---- (0620)" in text
    assert "live" in text
    assert "2 and more" not in run("-a", local.address, "stat", "/calc").stdout


def test_tree_draws_what_may_be_seen(local: FakeDaemon, run: Run) -> None:
    local.unreadable.add("private")
    local.endpoints["private/x"] = lambda *_: b""
    drawn = run("-a", local.address, "tree").stdout
    assert "├── calc" in drawn
    assert "prw--w---- root:calc" in drawn
    assert "names may not be read" in drawn
    assert "add" not in run("-a", local.address, "tree", "--depth", "1").stdout
    found = json.loads(run("-a", local.address, "tree", "--json").stdout)
    names = {each["name"]: each for each in found["children"]}
    assert [each["name"] for each in names["calc"]["children"]] == ["add", "never"]
    assert names["private"]["children"] is None


def test_who_makes_no_calls_is_not_told_about_a_password(local: FakeDaemon, run: Run) -> None:
    local.local_users.clear()
    done = run("-a", local.address, "whoami")
    assert done.returncode == 3
    assert "root and the daemon's own do not" in done.stderr


def test_whoami_says_who_where_and_how(local: FakeDaemon, run: Run) -> None:
    found = json.loads(run("-a", local.address, "whoami", "--json").stdout)
    own = pwd.getpwuid(os.geteuid()).pw_name  # and not what LOGNAME says, which the daemon would refuse
    assert found == {"user": own, "server": local.address, "pin": None, "mechanism": "peer"}
    assert "mechanism  peer" in run("-a", local.address, "whoami").stdout


def test_a_uid_without_an_account_logs_in_as_whom_it_says(
    remote: FakeDaemon, local: FakeDaemon, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the sentence about a uid without an account tells to do; many containers have such a one."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for call in ("getuid", "geteuid"):
        monkeypatch.setattr(os, call, lambda: 3_999_999_999)
    with Access(remote.address, "alice", [remote.pin], None, password, None).dial() as connection:
        assert connection.call("/calc/add", b"1 2") == b"3"
    access = Access(local.address, "alice", [], None, None, None)
    assert not access._is_own("alice")


# --- trust -------------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_known_is_refused_without_a_terminal(remote: FakeDaemon, run: Run, password: str) -> None:
    done = run("-a", remote.address, "--password-file", password, "ls")
    assert done.returncode == 3
    assert remote.pin in done.stderr
    assert "pin --trust" in done.stderr
    assert remote.bytes_received == 0


def test_a_pin_is_printed_and_trusted(remote: FakeDaemon, run: Run, password: str, tmp_path: Path) -> None:
    assert run("-a", remote.address, "pin").stdout == f"{remote.pin}\n"
    assert json.loads(run("-a", remote.address, "pin", "--json").stdout) == {"pin": remote.pin, "trusted": False}
    done = run("-a", remote.address, "pin", "--trust")
    assert (done.returncode, done.stdout) == (0, f"{remote.pin}\n")
    assert (tmp_path / "config/srpc/known_hosts").read_text() == f"{remote.address} {remote.pin}\n"
    assert remote.bytes_received == 0
    found = json.loads(run("-a", remote.address, "--password-file", password, "whoami", "--json").stdout)
    assert found == {"user": "alice", "server": remote.address, "pin": remote.pin, "mechanism": "pam"}
    assert run("-a", remote.address, "--password-file", "-", "call", "/calc/add", "1 2", input="secret\n").stdout == "3"


def test_trusting_takes_the_place_of_other_keys_though_this_one_was_known_too(
    remote: FakeDaemon, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "config/srpc").mkdir(parents=True)
    store = tmp_path / "config/srpc/known_hosts"
    store.write_text(f"{remote.address} {remote.pin}\n{remote.address} sha256:{'A' * 43}=\n")
    assert run("-a", remote.address, "pin", "--trust").returncode == 0
    assert store.read_text() == f"{remote.address} {remote.pin}\n"


def test_no_other_key_is_trusted_than_the_one_on_the_command_line(remote: FakeDaemon, run: Run, tmp_path: Path) -> None:
    """Between the look at a key and the word that it is right somebody may have come in between."""
    done = run("-a", remote.address, "--pin", "sha256:" + "A" * 43 + "=", "pin", "--trust")
    assert (done.returncode, "not pinned" in done.stderr) == (3, True)
    assert not (tmp_path / "config/srpc/known_hosts").exists()
    assert run("-a", remote.address, "--pin", remote.pin, "pin", "--trust").returncode == 0
    assert (tmp_path / "config/srpc/known_hosts").read_text() == f"{remote.address} {remote.pin}\n"


def test_a_key_that_has_changed_is_refused(make_remote: MakeRemote, run: Run, password: str, tmp_path: Path) -> None:
    remote = make_remote()
    other = "sha256:" + "A" * 43 + "="
    (tmp_path / "config/srpc").mkdir(parents=True)
    (tmp_path / "config/srpc/known_hosts").write_text(f"{remote.address} {other}\n")
    done = run("-a", remote.address, "--password-file", password, "ls")
    assert done.returncode == 3
    assert "has changed" in done.stderr
    assert remote.pin in done.stderr
    assert other in done.stderr
    assert remote.bytes_received == 0


def test_pins_on_the_command_line_come_before_the_store(remote: FakeDaemon, run: Run, password: str) -> None:
    assert run("-a", remote.address, "--pin", remote.pin, "--password-file", password, "ls").stdout == "calc\necho\n"
    done = run("-a", remote.address, "--pin", "sha256:" + "A" * 43 + "=", "--password-file", password, "ls")
    assert (done.returncode, "not pinned" in done.stderr) == (3, True)
    assert run("-a", remote.address, "--pin", "nonsense", "ls").returncode == 2


def test_a_wrong_password_is_no_access(remote: FakeDaemon, run: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong\n")
    done = run("-a", remote.address, "--pin", remote.pin, "--password-file", str(tmp_path / "wrong"), "ls")
    assert done.returncode == 3
    assert "did not accept 'alice'" in done.stderr
    assert "wrong" not in done.stderr


def test_at_a_terminal_the_key_is_asked_about_and_the_password_hidden(
    remote: FakeDaemon, environment: dict[str, str], tmp_path: Path
) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, "-a", remote.address, "call", "/calc/add", "1 2"], environment)
    seen = b""

    def expect(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 10
        while text not in seen:
            assert time.monotonic() < deadline, seen
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                raise AssertionError(seen) from None

    try:
        expect(b"[y/N]")
        assert remote.pin.encode() in seen
        assert remote.bytes_received == 0
        os.write(terminal, b"y\n")
        expect(b"Password: ")
        os.write(terminal, b"secret\n")
        expect(b"3\r\n")
        assert b"secret" not in seen
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert status == 0
    assert remote.pin in (tmp_path / "config/srpc/known_hosts").read_text()


def test_without_a_terminal_a_password_is_not_waited_for(remote: FakeDaemon, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*COMMAND, "-a", remote.address, "--pin", remote.pin, "ls"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=30,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 3
    assert "--password-file" in done.stderr
