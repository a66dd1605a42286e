"""Who the server has to be: pins, authorities, the local socket's owner. Both clients, real sockets, real TLS."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from errno import EPERM, EPROTO, ETIMEDOUT
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL

import srpc_client
from srpc_client import PinMismatch, SrpcError, Unreachable, UntrustedServer, blocking, owner, pin_of
from srpc_client.tls import checked_pins, names_host

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, MakeRemote

    Connect = Callable[..., Awaitable[Any]]

OTHER_PIN = "sha256:" + "A" * 43 + "="


async def _blocking(*arguments: Any, **options: Any) -> Any:
    return blocking.connect(*arguments, **options)


@pytest.fixture(params=["asyncio", "blocking"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Connects, one way and the other."""
    return srpc_client.connect if request.param == "asyncio" else _blocking


async def close(connection: Any) -> None:
    if isinstance(connection, srpc_client.Connection):
        await connection.close()
    else:
        connection.close()


def test_a_pin_is_what_openssl_computes(make_certificate: Any, tmp_path: Path) -> None:
    certificate, _ = make_certificate()
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = subprocess.run(["sha256sum"], input=key, capture_output=True, check=True).stdout.split()[0]
    coded = subprocess.run(["base64"], input=bytes.fromhex(digest.decode()), capture_output=True, check=True).stdout
    assert pin_of(certificate) == f"sha256:{coded.decode().strip()}"


@pytest.mark.parametrize("pins", [(), "", "sha256:", "md5:" + "A" * 43 + "=", OTHER_PIN[:-2], [OTHER_PIN, "x"]])
def test_what_is_no_pin_is_refused_before_anything_is_done(pins: Any) -> None:
    with pytest.raises(ValueError, match="pin"):
        checked_pins(pins)


@pytest.mark.parametrize(
    "proof", [{"pins": OTHER_PIN}, {"pins": ["garbage"]}, {"pins": ()}, {"ca": True}, {"ca": "no-file"}]
)
async def test_a_proof_that_a_local_socket_can_not_give_is_not_asked_of_it(
    local: FakeDaemon, connect: Connect, proof: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="is a local socket, whose server has no key"):
        await connect(local.address, **proof)
    assert local.peers == []


async def test_the_pinned_server_is_talked_to(remote: FakeDaemon, connect: Connect) -> None:
    connection = await connect(remote.address, pins=remote.pin)
    assert connection.pin == remote.pin
    await close(connection)


async def test_one_of_several_pins_is_enough(remote: FakeDaemon, connect: Connect) -> None:
    await close(await connect(remote.address, pins=[OTHER_PIN, remote.pin]))


async def test_nothing_is_sent_to_a_server_with_another_key(remote: FakeDaemon, connect: Connect) -> None:
    with pytest.raises(PinMismatch) as caught:
        await connect(remote.address, pins=[OTHER_PIN])
    assert caught.value.found == remote.pin
    assert remote.pin in caught.value.message
    assert caught.value.errno == EPERM
    remote.stop()
    assert remote.bytes_received == 0
    assert remote.received == []


async def test_no_callback_is_made_for_the_handshake(
    remote: FakeDaemon, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would need memory that is written and then executed, which SELinux and MemoryDenyWriteExecute= refuse."""

    def refuse(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(SSL, "_VerifyHelper", refuse)
    await close(await connect(remote.address, pins=remote.pin))


async def test_there_is_no_way_to_trust_just_anybody(remote: FakeDaemon, connect: Connect) -> None:
    with pytest.raises(ValueError, match="pins= or ca="):
        await connect(remote.address)
    with pytest.raises(ValueError, match="pins= or ca="):
        await connect(remote.address, pins=remote.pin, ca=True)
    assert remote.bytes_received == 0


# --- authorities -------------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(make_certificate: Any, tmp_path: Path) -> Any:
    """(certificate and key, path of the certificate)."""
    pair = make_certificate("An authority")
    path = tmp_path / "authority.pem"
    path.write_bytes(pair[0].public_bytes(Encoding.PEM))
    return pair, str(path)


async def test_a_server_that_an_authority_vouches_for_is_talked_to(
    make_remote: MakeRemote, make_certificate: Any, authority: Any, connect: Connect
) -> None:
    remote = make_remote(make_certificate("localhost", authority[0]))
    await close(await connect(remote.address, ca=authority[1]))


@pytest.mark.parametrize("case", ["another name", "another authority", "the system's authorities"])
async def test_a_server_that_no_authority_vouches_for_gets_nothing(
    make_remote: MakeRemote, make_certificate: Any, authority: Any, connect: Connect, case: str
) -> None:
    issuer = make_certificate("Another authority") if case == "another authority" else authority[0]
    remote = make_remote(make_certificate("calc.example" if case == "another name" else "localhost", issuer))
    reason = "is not for 'localhost'" if case == "another name" else "authority vouches"
    with pytest.raises(UntrustedServer, match=reason) as caught:
        await connect(remote.address, ca=True if case == "the system's authorities" else authority[1])
    assert not isinstance(caught.value, PinMismatch)
    remote.stop()
    assert remote.bytes_received == 0


async def test_a_file_without_authorities_is_refused(remote: FakeDaemon, tmp_path: Path, connect: Connect) -> None:
    (tmp_path / "empty.pem").touch()
    with pytest.raises(ValueError, match="authorities"):
        await connect(remote.address, ca=str(tmp_path / "empty.pem"))


@pytest.mark.parametrize(
    ("names", "host", "matches"),
    [
        (["calc.example"], "calc.example", True),
        (["calc.example"], "CALC.example.", True),
        (["*.example.org"], "calc.example.org", True),
        (["*.example.org"], "a.calc.example.org", False),
        (["*.example.org"], "example.org", False),
        (["*.org"], "example.org", False),
        (["c*.example.org"], "calc.example.org", False),
        (["calc.example"], "calc.example.org", False),
        (["192.0.2.1"], "192.0.2.1", False),  # an address is not a name
        ([], "calc.example", False),
    ],
)
def test_a_host_is_matched_by_the_names_of_its_certificate(
    make_certificate: Any, names: list[str], host: str, matches: bool
) -> None:
    certificate, key = make_certificate("x")
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)]))
        .issuer_name(certificate.issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    assert names_host(builder.sign(key, hashes.SHA256()), host) is matches


# --- other servers -------------------------------------------------------------------------------------------------------


async def test_a_server_without_our_protocol_is_named_as_such(make_remote: MakeRemote, connect: Connect) -> None:
    remote = make_remote(alpn=b"h2")
    with pytest.raises(SrpcError, match=r"srpc/1") as caught:
        await connect(remote.address, pins=remote.pin)
    assert caught.value.errno == EPROTO
    remote.stop()
    assert remote.bytes_received == 0


async def test_a_server_that_stops_at_tls_1_2_is_refused(make_remote: MakeRemote, connect: Connect) -> None:
    remote = make_remote()
    assert remote.context is not None
    remote.context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with pytest.raises(SrpcError, match=r"TLS 1\.3"):
        await connect(remote.address, pins=remote.pin)


async def test_a_server_that_hangs_up_during_the_handshake_is_said_to(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(SrpcError, match="handshake"):
            await connect(f"127.0.0.1:{listener.getsockname()[1]}", pins=OTHER_PIN)
        thread.join(5)


async def test_a_server_that_says_nothing_is_given_up(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(Unreachable) as caught:
            await connect(f"127.0.0.1:{listener.getsockname()[1]}", pins=OTHER_PIN, timeout=0.1)
        assert caught.value.errno == ETIMEDOUT


async def test_where_nobody_listens_is_unreachable(connect: Connect, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address, options in [
        (f"127.0.0.1:{port}", {"pins": OTHER_PIN}),
        (f"unix:{tmp_path}/nothing", {}),
        ("nothing.invalid", {"pins": OTHER_PIN}),
    ]:
        with pytest.raises(Unreachable, match="can't connect to"):
            await connect(address, **options)


# --- the local socket ----------------------------------------------------------------------------------------------------

_SQUAT = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
listener.listen()
print("ready", flush=True)
connected = listener.accept()[0]
print(len(connected.recv(100)), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
async def test_a_local_server_of_another_user_gets_nothing(tmp_path: Path, connect: Connect) -> None:
    path = str(tmp_path / "squat.sock")
    with subprocess.Popen([sys.executable, "-c", _SQUAT, path], stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"ready\n"
        with pytest.raises(UntrustedServer, match="uid 12345"):
            await connect(f"unix:{path}")
        assert squatter.stdout.readline() == b"0\n"


_CLIENT = """
import asyncio, ctypes, os, sys
import srpc_client, srpc_client.blocking.connection, srpc_client.connection  # before another user may not read them
path, mapping, library = sys.argv[1:]
os.setgroups([])
os.setresgid(12346, 12346, 12346)
os.setresuid(12346, 12346, 12346)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: else its files in /proc are root's
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("no user namespaces")
if mapping == "root":
    for name, text in [("setgroups", "deny"), ("uid_map", "0 12346 1"), ("gid_map", "0 12346 1")]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
try:
    if library == "blocking":
        srpc_client.blocking.dial(path, user="alice", password="secret", timeout=10)
    else:
        asyncio.run(srpc_client.dial(path, user="alice", password="secret", timeout=10))
except srpc_client.UntrustedServer as fault:
    print(os.geteuid(), fault.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("library", ["asyncio", "blocking"])
@pytest.mark.parametrize(("mapping", "own"), [("none", "65534"), ("root", "0")])
def test_in_a_user_namespace_a_server_that_is_not_mapped_gets_nothing(
    open_directory: Path, library: str, mapping: str, own: str
) -> None:
    """Every uid that is not mapped looks like the overflow uid there, and the client itself may look so too."""
    path = str(open_directory / "squat.sock")
    with subprocess.Popen([sys.executable, "-c", _SQUAT, path], stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"ready\n"
        command = [sys.executable, "-c", _CLIENT, f"unix:{path}", mapping, library]
        client = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if "no user namespaces" in client.stderr:
            squatter.kill()
            pytest.skip("this kernel makes no user namespaces for ordinary users")
        assert squatter.stdout.readline() == b"0\n"
    assert client.stderr == ""
    assert client.stdout.startswith(f"{own} the server behind the socket has uid 65534")
    assert "does not map the server's uid" in client.stdout


@pytest.mark.parametrize(("text", "uid"), [("4711\n", 4711), ("nonsense", 65534), (None, 65534)])
def test_the_overflow_uid_is_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, uid: int
) -> None:
    if text is not None:
        (tmp_path / "overflowuid").write_text(text)
    monkeypatch.setattr(owner, "_SETTING", str(tmp_path / "overflowuid"))
    assert owner.overflow_uid() == uid
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert "stands for every uid" in owner.distrust(uid)
    assert owner.distrust(0) == ""
