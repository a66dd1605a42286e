"""Addresses, and the store of known servers."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

import pytest

from srpc_client import SrpcError, Unreachable, UntrustedServer
from srpc_client import address as addresses
from srpc_client.address import Local, Remote
from srpc_client.known_hosts import KnownHosts, default_path

PIN, OTHER = "sha256:" + "A" * 43 + "=", "sha256:" + "B" * 42 + "A="


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("calc.example", Remote("calc.example", 7443)),
        ("calc.example:1", Remote("calc.example", 1)),
        ("srpc://calc.example:65535", Remote("calc.example", 65535)),
        ("srpc://calc.example/", Remote("calc.example", 7443)),
        ("192.0.2.1:80", Remote("192.0.2.1", 80)),
        ("[::1]", Remote("::1", 7443)),
        ("[2001:db8::1]:80", Remote("2001:db8::1", 80)),
        ("unix:/run/x.sock", Local("/run/x.sock")),
        ("unix:///run/x.sock", Local("/run/x.sock")),
    ],
)
def test_an_address_is_read_and_written_back(text: str, address: addresses.Address) -> None:
    assert addresses.parse(text) == address
    assert addresses.parse(str(address)) == address
    assert addresses.parse(address) is address


@pytest.mark.parametrize(
    "text", ["host:0", "host:65536", "host:port", "http://host", "::1", "a b", "host/path", "unix:x", "user@host", "[host"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|port|path"):
        addresses.parse(text)


def test_your_name_is_your_accounts_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    for said in ("nobody", "an-account-that-is-none"):
        monkeypatch.setenv("LOGNAME", said)
        assert addresses.own_name(Local("/run/x.sock")) == own
        assert addresses.own_name(Remote("calc.example", 7443)) == said
    monkeypatch.setenv("LOGNAME", own)
    assert addresses.own_name(Local("/run/x.sock")) == own


def test_a_uid_without_an_account_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for call in ("getuid", "geteuid"):
        monkeypatch.setattr(os, call, lambda: 3_999_999_999)
    for where in (Local("/run/x.sock"), Remote("calc.example", 7443)):
        with pytest.raises(SrpcError, match=r"uid 3999999999 has no account.*--user"):
            addresses.own_name(where)
    monkeypatch.setenv("LOGNAME", "alice")  # where the host's socket is mounted in a container, the daemon may know her
    assert addresses.own_name(Local("/run/x.sock")) == "alice"


def test_a_host_without_an_address_has_an_errno_of_linux() -> None:
    fault = addresses.from_os_error(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Remote("x.invalid", 1))
    assert (fault.code, fault.message) == ("EHOSTUNREACH", "can't connect to x.invalid:1: Name or service not known")


def test_the_default_is_the_environments_then_the_systems_then_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SRPC_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(addresses, "SYSTEM_SOCKET", str(tmp_path / "system.sock"))
    with pytest.raises(Unreachable, match="start srpcd"):
        addresses.parse(None)
    (tmp_path / "srpc").mkdir()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(tmp_path / "srpc/srpc.sock"))
        assert addresses.parse("") == Local(str(tmp_path / "srpc/srpc.sock"))
    (tmp_path / "system.sock").touch()
    assert addresses.parse() == Local(str(tmp_path / "system.sock"))
    monkeypatch.setenv("SRPC_ADDRESS", "calc.example")
    assert addresses.parse(None) == Remote("calc.example", 7443)


# --- known hosts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path: Path) -> KnownHosts:
    return KnownHosts(str(tmp_path / "config/known_hosts"))


def test_a_missing_file_knows_nobody(known: KnownHosts) -> None:
    assert known.pins(Remote("calc.example", 7443)) == frozenset()


def test_a_pin_that_is_trusted_is_found_again_for_that_server_only(known: KnownHosts) -> None:
    known.trust(Remote("calc.example", 7443), PIN)
    assert known.pins(Remote("CALC.example", 7443)) == {PIN}
    assert known.pins(Remote("calc.example", 7444)) == frozenset()
    mode = os.stat(known.path).st_mode & 0o777
    assert mode == 0o600


def test_trusting_replaces_that_servers_pins_and_leaves_the_rest(known: KnownHosts) -> None:
    os.makedirs(os.path.dirname(known.path))
    Path(known.path).write_text(f"# mine\na:1 {PIN}\na:1 {OTHER}  # old\n\nb:1 {OTHER}\n")
    assert known.pins(Remote("a", 1)) == {PIN, OTHER}
    known.trust(Remote("a", 1), PIN)
    assert Path(known.path).read_text() == f"# mine\n\nb:1 {OTHER}\na:1 {PIN}\n"
    assert sorted(os.listdir(os.path.dirname(known.path))) == ["known_hosts"]


def test_trusting_replaces_a_pin_however_the_name_was_written(known: KnownHosts) -> None:
    known.trust(Remote("Calc.Example", 7443), OTHER)
    known.trust(Remote("calc.example", 7443), PIN)
    assert known.pins(Remote("Calc.Example", 7443)) == {PIN}


@pytest.mark.parametrize("line", ["calc.example", "calc.example:7443 sha256:short", "a b c", "calc.example:7443 md5:abc"])
def test_a_line_that_can_not_be_understood_is_named(known: KnownHosts, line: str) -> None:
    os.makedirs(os.path.dirname(known.path))
    Path(known.path).write_text(f"\n{line}\n")
    with pytest.raises(UntrustedServer, match="line 2"):
        known.pins(Remote("a", 1))


def test_a_file_that_is_not_text_is_no_empty_file(known: KnownHosts) -> None:
    os.makedirs(os.path.dirname(known.path))
    Path(known.path).write_bytes(b"\xff\xfe")
    with pytest.raises(UntrustedServer, match="can't be read"):
        known.pins(Remote("a", 1))


def test_the_store_is_where_configuration_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert default_path() == "/x/srpc/known_hosts"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/a")
    assert default_path() == "/home/a/.config/srpc/known_hosts"
