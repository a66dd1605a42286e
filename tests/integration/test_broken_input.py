"""Whatever is sent to the sockets, it is answered as the design says, and calls on other connections go on meanwhile.

The bystanders are two connections of bob's, one over TLS and one on the local socket, that call all the time from a
thread of this process: after each test they must have gone on, without a single error.
"""

import contextlib
import errno as errnos
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    EBADMSG,
    EEXIST,
    EINVAL,
    EISDIR,
    EMSGSIZE,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    ENXIO,
    EPROTO,
)
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import realm
from tests.integration.raw import (
    ANNOUNCE,
    APPEND,
    ATTACH,
    AUTH,
    CALL,
    CLUNK,
    ERROR,
    FLUSH,
    LISTEN,
    PING,
    STAT,
    WALK,
    Ended,
    Frame,
    Raw,
    call_body,
    client_hello,
    exchange,
    frame,
    memory,
    several,
    tcp,
)
from tests.realm import mounts

pytestmark = pytest.mark.needs_root

MIB = 1 << 20
KINDS = (AUTH, ATTACH, WALK, STAT, APPEND, CLUNK, CALL, FLUSH, PING, ANNOUNCE, LISTEN)

_addresses = realm.addresses()

SERVICE = """
import asyncio, sys
from srpc_client import serve
asyncio.run(serve({
    "/svc/echo": lambda request: request.payload,
    "/svc/big": lambda request: bytes(int(request.payload)),
}, address=sys.argv[1], mode=0o622))
"""


# --- the stage ---------------------------------------------------------------------------------------------------------


def furnish(tree: Path) -> None:
    """All kinds of files."""
    realm.install(tree / "tools/cat", "#!/bin/sh\nexec cat\n", 0o755)
    realm.install(tree / "odd/data", "not a program\n", 0o644)
    odd = tree / "odd"
    os.mkfifo(tree / "silent")
    (tree / "silent").chmod(0o666)
    (odd / "to-file").symlink_to("../tools/cat")
    (odd / "to-directory").symlink_to("../tools")
    (odd / "to-outside").symlink_to("/etc")
    (odd / "absolute").symlink_to(tree / "tools/cat")
    (odd / "dangling").symlink_to("nowhere")
    (odd / "itself").symlink_to("itself")
    (odd / "to-proc").symlink_to("/proc/self/root")
    os.mknod(odd / "character", 0o020666, os.makedev(1, 3))
    os.mknod(odd / "block", 0o060666, os.makedev(7, 0))
    sock = socket.socket(socket.AF_UNIX)
    with sock:
        sock.bind(str(odd / "socket"))
    (odd / ".hidden").mkdir()
    realm.install(odd / ".hidden/cat", "#!/bin/sh\nexec cat\n", 0o755)
    (odd / "mount").mkdir()
    mounts.tmpfs(odd / "mount")
    realm.install(odd / "mount/cat", "#!/bin/sh\nexec cat\n", 0o755)
    (odd / "bound").write_text("")
    mounts.bind(tree / "tools/cat", odd / "bound")
    (odd / ("n" * 255)).mkdir()
    (odd / os.fsdecode(b"not-utf-8-\xff")).mkdir()
    directory = tree / "svc"
    directory.mkdir(mode=0o755)
    os.chown(directory, realm.account("svc").uid, realm.account("svc").gid)


@contextlib.contextmanager
def serving(daemon: realm.Daemon) -> Iterator[None]:
    """A service that answers /svc/echo and /svc/big."""
    process = realm.popen_as("svc", realm.python(SERVICE, f"unix:{daemon.local}"))
    try:
        daemon.wait_event("announce", 10, count=2, outcome="granted")
        yield
    finally:
        realm.finish(process)


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with the usual limits, a service, and odd files in its tree."""
    made = realm.Daemon({"authentication": {"refusal": 0.1}})
    furnish(made.tree)
    try:
        with made as running, serving(running):
            yield running
    finally:
        for name in ("mount", "bound"):
            mounts.unmount(made.tree / "odd" / name)


TIMES = min(realm.PACE, 4.0)
"""How many times longer the short times of `hurried` are: a slow machine is to get through a log-in meanwhile."""


@pytest.fixture(scope="module")
def hurried(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with short times and small numbers."""
    limits = {
        "handshake_timeout": 0.6 * TIMES,
        "idle_timeout": 0.7 * TIMES,
        "stall": 1.0 * TIMES,
        "buffer": MIB,
        "connections_per_address": 4,
        "strangers_per_address": 4,
    }
    made = realm.Daemon({"limits": limits})
    directory = made.tree / "svc"
    directory.mkdir()
    directory.chmod(0o755)
    os.chown(directory, realm.account("svc").uid, realm.account("svc").gid)
    with made as running, serving(running):
        yield running


class Bystander(threading.Thread):
    """Calls /svc/echo again and again. calls: how many were answered. fault: what went wrong."""

    def __init__(self, connection: Raw) -> None:
        super().__init__(daemon=True)
        self.calls = 0
        self.fault = ""
        self._connection = connection
        self._over = threading.Event()

    def run(self) -> None:
        try:
            while not self._over.wait(0.02):
                payload = b"%d" % self.calls
                reply = self._connection.call(2, payload)
                if reply.kind != CALL + 1 or reply.payload != payload:
                    raise AssertionError(f"call {self.calls}: {reply}")
                self.calls += 1
        except Exception as fault:
            self.fault = repr(fault)

    def gone_on(self, calls: int) -> bool:
        """Whether it has made more than these, or has failed."""
        return self.calls > calls or bool(self.fault)

    def end(self) -> None:
        """Stop it."""
        self._over.set()
        self.join(20)


@pytest.fixture(scope="module")
def bystanders(daemon: realm.Daemon) -> Iterator[list[Bystander]]:
    """One over TLS, one on the local socket."""
    with several([Raw.tls(daemon.tcp, next(_addresses)), Raw.local(daemon.local, "bob")]) as connections:
        for each in connections:
            each.login("bob")
            assert each.walk("svc/echo", 2).kind == WALK + 1
        threads = [Bystander(each) for each in connections]
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            for thread in threads:
                thread.end()


@pytest.fixture(autouse=True)
def others_go_on(bystanders: list[Bystander]) -> Iterator[None]:
    """During each test, and after it, other connections' calls are answered."""
    yield
    for each in bystanders:
        assert realm.until(partial(each.gone_on, each.calls)), "other calls do not go on"
        assert each.fault == ""


@pytest.fixture(params=["tls", "local"])
def connect(request: pytest.FixtureRequest, daemon: realm.Daemon) -> Callable[[], Raw]:
    """`connect()` makes a stranger's connection, over TLS and on the local socket. (Its user is root, who gets nothing.)"""
    if request.param == "tls":
        return lambda: Raw.tls(daemon.tcp, next(_addresses))
    return lambda: Raw.local(daemon.local)


@pytest.fixture
def client(connect: Callable[[], Raw]) -> Iterator[Raw]:
    """One such connection."""
    with connect() as made:
        yield made


@pytest.fixture(params=["tls", "local"])
def alice(request: pytest.FixtureRequest, daemon: realm.Daemon) -> Iterator[Raw]:
    """A connection on which alice is logged in: fid 1 is the tree's root, 1000 the afid."""
    made = Raw.tls(daemon.tcp, next(_addresses)) if request.param == "tls" else Raw.local(daemon.local, "alice")
    with made:
        made.login("alice")
        yield made


Outcome = list[tuple[int, int, int]]
"""Of all messages until the connection's end: type, errno, seq."""


def outcome(client: Raw) -> Outcome:
    """What still comes, until the server ends the connection; an error has its code, and a sentence."""
    try:
        found = client.rest()
    except TimeoutError:
        return [(0, 0, 0)]
    for each in found:
        if each.kind == ERROR:
            assert each.json["code"] == errnos.errorcode[each.errno]
            assert each.json["message"]
    return [(each.kind, each.errno, each.seq) for each in found]


def rejected(client: Raw, errno: int, seq: int = 0) -> None:
    """The connection gets this one error, and ends."""
    assert outcome(client) == [(ERROR, errno, seq)]


def outcomes(connect: Callable[[], Raw], cases: dict[Any, bytes]) -> dict[Any, Outcome]:
    """What became of each of these beginnings of a connection, all of which are open at the same time."""
    found = {}
    with several([connect() for _ in cases]) as connections:
        for each, data in zip(connections, cases.values(), strict=True):
            each.send(data)
        for each, case in zip(connections, cases, strict=True):
            each.sock.settimeout(3)
            found[case] = outcome(each)
    return found


# --- frames that break the protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 2**32, 17 * MIB])
def test_a_length_that_nobody_means_is_refused_at_the_header(connect: Callable[[], Raw], length: int) -> None:
    found = outcomes(connect, {kind: frame(kind, 77, length=length) for kind in KINDS})
    assert found == {kind: [(ERROR, EMSGSIZE, 77)] for kind in KINDS}


def test_a_type_that_is_no_request_is_refused(connect: Callable[[], Raw]) -> None:
    kinds = [0, 23, -1, -2, 2**31 - 1, -(2**31), *(kind + 1 for kind in KINDS)]
    found = outcomes(connect, {kind: frame(kind, 2**64 - 1, b"{}") for kind in kinds})
    assert found == {kind: [(ERROR, EPROTO, 2**64 - 1)] for kind in kinds}


def test_a_reply_s_type_is_refused_on_an_open_session_too(alice: Raw) -> None:
    """What was asked before is answered, or not; what comes after is not even looked at."""
    alice.send(frame(CALL + 1, 500, bytes(4)) + frame(PING, 501))
    rejected(alice, EPROTO, 500)


BAD_JSON: list[tuple[str, int, bytes]] = [
    ("empty", AUTH, b""),
    ("blank", AUTH, b"  \n"),
    ("cut", AUTH, b'{"afid": 1, "uname": "ali'),
    ("more-behind-it", AUTH, b'{"afid": 1, "uname": "alice"} {}'),
    ("null", CLUNK, b"null"),
    ("array", CLUNK, b"[1]"),
    ("number", CLUNK, b"1"),
    ("field-missing", WALK, b'{"fid": 1, "path": ""}'),
    ("text-for-a-number", CLUNK, b'{"fid": "1"}'),
    ("fraction", CLUNK, b'{"fid": 1.5}'),
    ("true", CLUNK, b'{"fid": true}'),
    ("null-for-a-number", CLUNK, b'{"fid": null}'),
    ("negative", CLUNK, b'{"fid": -1}'),
    ("65-bits", CLUNK, b'{"fid": 18446744073709551616}'),
    ("4000-digits", CLUNK, b'{"fid": ' + b"9" * 4000 + b"}"),
    ("huge-exponent", CLUNK, b'{"fid": 1e999999}'),
    ("nan", CLUNK, b'{"fid": NaN}'),
    ("number-for-a-text", AUTH, b'{"afid": 1, "uname": 0}'),
    ("array-for-a-text", WALK, b'{"fid": 1, "newfid": 2, "path": ["a"]}'),
    ("unknown-mechanism", AUTH, b'{"afid": 1, "uname": "alice", "mechanism": "none"}'),
    ("limit-of-0", STAT, b'{"fid": 1, "limit": 0}'),
    ("limit-of-millions", STAT, b'{"fid": 1, "limit": 10000000}'),
    ("not-utf-8", AUTH, b'{"afid": 1, "uname": "\xff\xfe"}'),
    ("not-utf-8-in-a-known-key", AUTH, b'{"afid": 1, "uname\xff": "alice"}'),
    ("overlong-slash", WALK, b'{"fid": 1, "newfid": 2, "path": "a\xc0\xafb"}'),
    ("surrogate-in-utf-8", WALK, b'{"fid": 1, "newfid": 2, "path": "\xed\xa0\x80"}'),
    ("lone-surrogate", WALK, b'{"fid": 1, "newfid": 2, "path": "\\ud800"}'),
    ("lone-low-surrogate", WALK, b'{"fid": 1, "newfid": 2, "path": "\\udc00x"}'),
    ("surrogate-in-a-user", AUTH, b'{"afid": 1, "uname": "\\ud800"}'),
    ("surrogate-in-a-password", APPEND, b'{"fid": 1, "data": "\\ud800"}'),
    ("control-character", WALK, b'{"fid": 1, "newfid": 2, "path": "\n"}'),
    ("byte-order-mark", CLUNK, b'\xef\xbb\xbf{"fid": 1}'),
    ("utf-16", CLUNK, '{"fid": 1}'.encode("utf-16")),
    ("deep", CLUNK, b"[" * 60_000),
    ("deep-100k", APPEND, b"[" * 100_000),
    ("deep-objects-100k", APPEND, b'{"a":' * 100_000),
    ("deep-in-an-unknown-field", APPEND, b'{"fid": 1, "data": "", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep-for-a-text", APPEND, b'{"fid": 1, "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("announce-number", ANNOUNCE, b'{"fid": 1, "path": 1}'),
    ("listen-nothing", LISTEN, b"{}"),
]


def test_a_body_that_is_not_the_json_wanted_is_refused(connect: Callable[[], Raw]) -> None:
    found = outcomes(connect, {case: frame(kind, 9, body) for case, kind, body in BAD_JSON})
    assert found == {case: [(ERROR, EBADMSG, 9)] for case, _kind, _body in BAD_JSON}


def test_bytes_that_are_not_utf_8_are_refused_in_fields_that_nobody_knows_too(connect: Callable[[], Raw]) -> None:
    bodies = (b'{"fid": 1, "\xff": 1}', b'{"fid": 1, "more": "\xff"}', b'{"fid": 1, "more": ["\xed\xa0\x80"]}')
    # A second message that is refused in any case, so that nobody has to wait for an end that does not come.
    found = outcomes(connect, {body: frame(CLUNK, 9, body) + frame(0, 10) for body in bodies})
    assert found == {body: [(ERROR, EBADMSG, 9)] for body in bodies}


def test_huge_json_is_refused_at_the_header_and_a_stranger_s_sooner(client: Raw) -> None:
    client.send(frame(APPEND, 1, length=2 * MIB))
    rejected(client, EMSGSIZE, 1)


def test_huge_json_of_somebody_known_is_read_and_refused(alice: Raw) -> None:
    """16 MiB of text in one JSON string are a call; that many brackets are not."""
    alice.post(APPEND, b'{"fid": 1, "data": "", "more": ' + b"[" * (15 * MIB), 9)
    rejected(alice, EBADMSG, 9)


BAD_BODIES = {
    (CALL, b""): EBADMSG,
    (CALL, bytes(11)): EBADMSG,
    (CALL, struct.pack("!QI", 1, 1)): EBADMSG,
    (CALL, struct.pack("!QI", 1, 2**32 - 1)): EMSGSIZE,
    (CALL, struct.pack("!QI", 1, 65537) + bytes(65537)): EMSGSIZE,
    (FLUSH, b""): EBADMSG,
    (FLUSH, bytes(7)): EBADMSG,
    (FLUSH, bytes(9)): EMSGSIZE,
    (PING, b"x"): EMSGSIZE,
}


def test_a_binary_body_of_the_wrong_shape_is_refused(connect: Callable[[], Raw]) -> None:
    found = outcomes(connect, {(kind, body): frame(kind, 9, body) for kind, body in BAD_BODIES})
    assert found == {case: [(ERROR, errno, 9)] for case, errno in BAD_BODIES.items()}


def test_http_to_either_socket_is_refused(daemon: realm.Daemon) -> None:
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with Raw.local(daemon.local, "alice") as client:
        client.send(request)
        (answer,) = client.rest()
        assert answer.errno == EPROTO
    with Raw(tcp(daemon.tcp, next(_addresses))) as client:
        client.send(request)
        client.sock.settimeout(10)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.sock.recv(4096):
                found += data
        assert b"HTTP" not in found
        assert len(found) < 100  # a TLS alert at most


# --- bodies that come late, or not at all ------------------------------------------------------------------------------


def test_a_body_shorter_than_said_and_then_a_hang_up_is_forgotten(client: Raw) -> None:
    client.send(frame(AUTH, 1, b'{"afid": 1', length=100))
    client.hang_up()


def test_half_a_header_and_then_half_a_close_ends_the_connection(client: Raw) -> None:
    client.send(frame(PING, 1)[:11])
    client.half_close()
    assert client.over()


def test_bytes_that_come_one_at_a_time_are_put_together(client: Raw) -> None:
    for byte in frame(PING, 5) + frame(CLUNK, 6, {"fid": 99}) + frame(PING, 7):
        client.send(bytes([byte]))
    found = [client.next() for _ in range(3)]
    assert [(each.kind, each.seq) for each in found] == [(PING + 1, 5), (ERROR, 6), (PING + 1, 7)]


def test_a_call_whose_payload_drips_in_is_made_when_it_is_whole(alice: Raw) -> None:
    assert alice.walk("svc/echo", 2).kind == WALK + 1
    payload = bytes(range(256)) * 4
    whole = frame(CALL, 900, call_body(2, payload)) + frame(PING, 901)
    for at in range(0, len(whole), 97):
        alice.send(whole[at : at + 97])
    assert alice.answer(900).payload == payload
    assert alice.answer(901).kind == PING + 1


# --- numbers that are in use -------------------------------------------------------------------------------------------


def test_a_seq_that_is_still_outstanding_ends_the_connection(alice: Raw) -> None:
    assert alice.walk("silent", 2).kind == WALK + 1
    alice.send(frame(CALL, 500, call_body(2)))
    alice.send(frame(PING, 500))
    rejected(alice, EPROTO, 500)


def test_a_seq_may_be_used_again_once_it_is_answered(alice: Raw) -> None:
    assert alice.walk("svc/echo", 2).kind == WALK + 1
    for _ in range(3):
        alice.send(frame(CALL, 500, call_body(2, b"x")))
        assert alice.next().payload == b"x"


def test_numbers_of_64_bits_are_as_good_as_others(alice: Raw) -> None:
    for number in (0, 2**63, 2**64 - 1):
        assert alice.walk("svc/echo", number).kind == WALK + 1
        alice.send(frame(CALL, number, call_body(number, b"x")))
        assert alice.next().payload == b"x"


def test_a_number_in_use_is_refused_and_stands_for_what_it_did(alice: Raw) -> None:
    assert alice.walk("svc/echo", 2).kind == WALK + 1
    for taken in (1, 2, 1000):
        assert alice.walk("tools/cat", taken).errno == EEXIST
        assert alice.ask(ATTACH, afid=1000, fid=taken, uname="alice").errno == EEXIST
        assert alice.ask(AUTH, afid=taken, uname="alice").errno == EEXIST
    assert alice.call(2, b"still").payload == b"still"
    # Also while the first is not yet answered.
    one, other = (
        alice.post(WALK, {"fid": 1, "newfid": 3, "path": "tools"}),
        alice.post(WALK, {"fid": 1, "newfid": 3, "path": "svc"}),
    )
    assert (alice.answer(one).kind, alice.answer(other).errno) == (WALK + 1, EEXIST)
    # A walk that fails leaves no number taken.
    assert alice.walk("nowhere", 4).errno == ENOENT
    assert alice.walk("tools/cat", 4).kind == WALK + 1


def test_numbers_that_stand_for_nothing_are_refused(alice: Raw) -> None:
    assert alice.call(99).errno == EBADF
    assert alice.walk("", 5, fid=99).errno == EBADF
    for kind, body in ((STAT, {"fid": 99}), (CLUNK, {"fid": 99}), (APPEND, {"fid": 99, "data": "x"})):
        assert alice.ask(kind, **body).errno == EBADF
    assert alice.call(1000).errno == EBADF  # an afid is not a place
    assert alice.ask(ATTACH, afid=1, fid=5, uname="alice").errno == EACCES  # nor a place an afid
    assert alice.ask(ATTACH, afid=99, fid=5, uname="alice").errno == EACCES


def test_a_stranger_can_do_nothing_but_authenticate(client: Raw) -> None:
    assert client.call(1).errno == EBADF
    assert client.walk("", 2).errno == EBADF
    assert client.ask(STAT, fid=1).errno == EBADF
    assert client.ask(APPEND, fid=1, data="x").errno == EBADF
    assert client.ask(ATTACH, afid=1, fid=2, uname="alice").errno == EACCES
    assert client.answer(client.post(FLUSH, struct.pack("!Q", 12345))).kind == FLUSH + 1
    assert client.authenticate(1, "alice").data == "1"


def test_a_directory_can_not_be_called(alice: Raw) -> None:
    assert alice.walk("tools", 2).kind == WALK + 1
    for fid in (1, 2):
        assert alice.call(fid).errno == EISDIR
        assert alice.ask(APPEND, fid=fid, data="x").errno == EISDIR


# --- paths -------------------------------------------------------------------------------------------------------------

PATHS: list[tuple[str, int]] = [
    ("..", EINVAL),
    ("../etc", EINVAL),
    ("tools/..", EINVAL),
    ("tools/../../etc/passwd", EINVAL),
    (".", EINVAL),
    ("./tools", EINVAL),
    ("tools/.", EINVAL),
    ("...", EINVAL),
    ("odd/.hidden", EINVAL),
    ("odd/.hidden/cat", EINVAL),
    ("/", EINVAL),
    ("/tools", EINVAL),
    ("/etc/passwd", EINVAL),
    ("//tools", EINVAL),
    ("tools//cat", EINVAL),
    ("tools/", EINVAL),
    ("tools/cat/", EINVAL),
    ("tools/cat\0", EINVAL),
    ("tools\0/cat", EINVAL),
    ("\0", EINVAL),
    ("n" * 256, ENAMETOOLONG),
    ("ü" * 128, ENAMETOOLONG),
    ("odd/" + "n" * 256, ENAMETOOLONG),
    ("a/" * 1500 + "a", ENAMETOOLONG),
    ("/".join(["n" * 250] * 12), ENAMETOOLONG),
    ("n" * 255, ENOENT),
    ("a/" * 1000 + "a", ENOENT),
    ("nowhere", ENOENT),
    ("tools/nowhere/cat", ENOENT),
    ("tools/cat/more", ENOTDIR),
    ("odd/data/more", ENOTDIR),
    ("silent/more", ENOTDIR),
    ("odd/to-file", ENOENT),
    ("odd/to-directory", ENOENT),
    ("odd/to-directory/cat", ENOENT),
    ("odd/to-outside", ENOENT),
    ("odd/to-outside/passwd", ENOENT),
    ("odd/to-proc/etc/passwd", ENOENT),
    ("odd/absolute", ENOENT),
    ("odd/dangling", ENOENT),
    ("odd/itself", ENOENT),
    ("odd/character", ENOENT),
    ("odd/block", ENOENT),
    ("odd/socket", ENOENT),
    ("odd/data", ENOENT),
    ("odd/mount", ENOENT),
    ("odd/mount/cat", ENOENT),
    ("odd/bound", ENOENT),
    ("C:\\tools", ENOENT),
    ("tools\\cat", ENOENT),
    ("tools%2fcat", ENOENT),
    ("~root", ENOENT),
    ("*", ENOENT),
    ("\u202e\u2028\x1b[2J", ENOENT),
]


@pytest.mark.parametrize("transport", ["tls", "local"])
def test_paths_that_lead_nowhere_are_refused_and_the_connection_goes_on(daemon: realm.Daemon, transport: str) -> None:
    made = Raw.tls(daemon.tcp, next(_addresses)) if transport == "tls" else Raw.local(daemon.local, "alice")
    with made as client:
        client.login("alice")
        found = [(path, client.walk(path, 2).errno) for path, _errno in PATHS]
        assert found == PATHS
        # The same below another place, and the whole path together is what counts.
        assert client.walk("odd", 3).kind == WALK + 1
        assert client.walk("../tools", 2, fid=3).errno == EINVAL
        assert client.walk("to-directory", 2, fid=3).errno == ENOENT
        assert client.walk("n" * 255, 4, fid=3).kind == WALK + 1
        assert client.walk("a/" * 900 + "a", 2, fid=4).errno == ENAMETOOLONG
        assert client.walk("", 2, fid=3).kind == WALK + 1


def test_the_same_paths_as_anames_are_refused(alice: Raw) -> None:
    for path, errno in PATHS:
        wanted = errno
        if path.startswith("/") and path not in ("//tools",):
            continue  # one slash in front is an aname's own
        assert alice.ask(ATTACH, afid=1000, fid=2, uname="alice", aname=path).errno == wanted, path


def test_the_same_paths_can_not_be_announced(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "svc") as client:
        for path, _errno in PATHS:
            if path != "/tools":
                assert client.ask(ANNOUNCE, fid=2, path=path).kind == ERROR, path
        assert client.ask(ANNOUNCE, fid=2, path="silent").kind == ANNOUNCE + 1
        assert client.ask(CLUNK, fid=2).kind == CLUNK + 1


def test_a_listing_names_only_what_can_be_walked_to(alice: Raw) -> None:
    assert alice.walk("odd", 2).kind == WALK + 1
    described = alice.ask(STAT, fid=2).json
    for name in described["children"]:
        walked = alice.walk(f"odd/{name}", 3)
        if walked.kind == WALK + 1:
            alice.ask(CLUNK, fid=3)
        else:
            # Mount points are seen by nobody who only reads the directory.
            assert name in ("mount", "bound")
    assert "n" * 255 in described["children"]
    assert not {"to-file", "character", "socket", "data", ".hidden"} & set(described["children"])


def test_a_link_swapped_in_during_walks_never_leads_outside(
    alice: Raw, daemon: realm.Daemon, private_realm: realm.Place
) -> None:
    """The directory at the path is a link half of the time: what is found is what lies inside, or nothing."""
    inside, outside = daemon.tree / "swap", private_realm.temporary / "outside"
    link = daemon.tree / "swap-link"
    realm.install(inside / "which", "#!/bin/sh\necho inside\n", 0o755)
    realm.install(outside / "which", "#!/bin/sh\necho outside\n", 0o755)
    if not link.is_symlink():
        link.symlink_to(outside)
    right = (inside / "which").stat()
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            exchange(inside, link)
            time.sleep(0.0002)
            exchange(inside, link)
            time.sleep(0.0002)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        walked, told = 0, set()
        for _ in range(10):
            asked = [alice.post(WALK, {"fid": 1, "newfid": 100 + n, "path": "swap/which"}) for n in range(50)]
            answers = [alice.answer(seq) for seq in asked]
            assert {each.errno for each in answers} <= {0, ENOENT}
            there = [100 + n for n, each in enumerate(answers) if not each.errno]
            assert {each.json["qid"] for each in answers if not each.errno} <= {f"{right.st_dev}:{right.st_ino}"}
            calls = [alice.post(CALL, call_body(fid)) for fid in there[:2]]
            for seq in calls:
                answer = alice.answer(seq)
                told.add(answer.payload if not answer.errno else answer.errno)
            for fid in there:
                alice.post(CLUNK, {"fid": fid})
            walked += len(there)
    finally:
        over.set()
        thread.join()
    assert 0 < walked < 500
    # The link itself may be met by the look at who owns the way to a program: EACCES.
    assert told <= {b"inside\n", ENOENT, errnos.ESTALE, EACCES}


# --- much of everything ------------------------------------------------------------------------------------------------


def test_fids_have_a_limit_and_clunk_frees(alice: Raw) -> None:
    alice.send(b"".join(frame(WALK, seq, {"fid": 1, "newfid": 10_000 + seq, "path": ""}) for seq in range(10_000, 15_000)))
    answers = [alice.next() for _ in range(5000)]
    assert sorted(each.seq for each in answers) == list(range(10_000, 15_000))
    made = [each.seq + 10_000 for each in answers if each.kind == WALK + 1]
    assert {each.errno for each in answers if each.kind == ERROR} == {EAGAIN}
    # Some may have met the limit of outstanding requests: the rest comes one by one.
    fid = 50_000
    while alice.walk("", fid).kind == WALK + 1:
        made.append(fid)
        fid += 1
    assert len(made) == 4095  # and fid 1
    assert alice.walk("", 3).errno == EAGAIN
    assert alice.ask(CLUNK, fid=made[0]).kind == CLUNK + 1
    assert alice.walk("", 3).kind == WALK + 1
    assert alice.ask(STAT, fid=3).kind == STAT + 1


def test_calls_beyond_the_limit_are_refused_and_each_is_answered_once(alice: Raw) -> None:
    assert alice.walk("silent", 2).kind == WALK + 1
    seqs = list(range(1000, 3000))
    alice.send(b"".join(frame(CALL, seq, call_body(2, b"x")) for seq in seqs))
    alice.send(frame(PING, 999))  # needs no place
    answers = [alice.next() for _ in range(2001)]
    assert sorted(each.seq for each in answers) == [999, *seqs]
    counted = {errno: sum(each.errno == errno for each in answers) for errno in {each.errno for each in answers}}
    assert counted == {0: 1, EAGAIN: 976, ENXIO: 1024}
    assert alice.answer(alice.post(PING)).kind == PING + 1  # nothing else has come


def test_flushing_everything_answers_each_call_before_its_flush(alice: Raw) -> None:
    assert alice.walk("silent", 2).kind == WALK + 1
    calls = range(1000, 1200)
    alice.send(b"".join(frame(CALL, seq, call_body(2)) for seq in calls))
    alice.send(b"".join(frame(FLUSH, seq + 1000, struct.pack("!Q", seq)) for seq in calls))
    order = [alice.next() for _ in range(400)]
    places = {each.seq: at for at, each in enumerate(order)}
    assert len(places) == 400
    for seq in calls:
        assert order[places[seq]].errno == errnos.ECANCELED
        assert order[places[seq + 1000]].kind == FLUSH + 1
        assert places[seq] < places[seq + 1000]


def test_a_hang_up_with_calls_outstanding_is_forgotten(alice: Raw) -> None:
    assert alice.walk("silent", 2).kind == WALK + 1
    alice.send(b"".join(frame(CALL, seq, call_body(2, bytes(1000))) for seq in range(500)))
    alice.hang_up()


def test_connections_that_come_and_go_without_a_word_do_no_harm(daemon: realm.Daemon) -> None:
    for _ in range(100):
        tcp(daemon.tcp, next(_addresses)).close()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.local))


def test_descriptors_sent_over_the_local_socket_do_no_harm(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "alice") as client:
        (gate,) = daemon.processes("gate", "local")
        before = len(realm.fds(gate.pid))
        read, write = os.pipe()
        try:
            with contextlib.suppress(PermissionError):  # Linux 6.16: they can't be sent at all
                for _ in range(20):
                    socket.send_fds(client.sock, [frame(PING, client.number())], [read] * 50)
                    assert client.next().kind == PING + 1
        finally:
            os.close(read)
            os.close(write)
        assert len(realm.fds(gate.pid)) <= before + 2
        client.login("alice")


# --- a reader that does not read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tls", "local"])
def test_a_slow_reader_costs_a_bounded_amount_of_memory_and_nobody_else_s_time(
    hurried: realm.Daemon, transport: str
) -> None:
    over_tls = transport == "tls"
    made = Raw.tls(hurried.tcp, next(_addresses), receive_buffer=65536) if over_tls else Raw.local(hurried.local, "alice")
    with made as slow, Raw.tls(hurried.tcp, next(_addresses)) as other:
        slow.login("alice")
        other.login("bob")
        assert slow.walk("svc/big", 2).kind == WALK + 1
        assert other.walk("svc/echo", 2).kind == WALK + 1
        (gate,) = hurried.processes("gate", transport)
        (worker,) = hurried.processes("worker", "alice")
        before = {each.pid: memory(each.pid) for each in (gate, worker)}
        most = dict(before)
        began = time.monotonic()
        slow.send(b"".join(frame(CALL, seq, call_body(2, b"%d" % MIB)) for seq in range(10_000, 10_500)))  # 500 MiB wanted
        calls = 0
        while not (ended := [each for each in hurried.events("connection", state="over") if each["peer"] == name(slow)]):
            assert other.call(2, b"x").payload == b"x"
            calls += 1
            most = {pid: max(bytes_, memory(pid)) for pid, bytes_ in most.items()}
            assert time.monotonic() - began < 20 * realm.PACE, "the slow reader is never disconnected"
            time.sleep(0.005)
        assert ended
        assert time.monotonic() - began >= 0.9 * TIMES
        assert calls > 20
        for pid, bytes_ in most.items():
            assert bytes_ - before[pid] < 48 * MIB, f"{bytes_ - before[pid]} bytes more"
        with contextlib.suppress(ssl.SSLError):
            assert len(slow.rest()) < 500
        # The user himself is served again.
        with Raw.tls(hurried.tcp, next(_addresses)) as again:
            again.login("alice")
            assert again.walk("svc/echo", 2).kind == WALK + 1
            assert again.call(2, b"again").payload == b"again"


def name(client: Raw) -> str:
    """As the log names it."""
    if client.sock.family == socket.AF_UNIX:
        return f"uid:{realm.account('alice').uid}"
    host, port = client.sock.getsockname()
    return f"{host}:{port}"


def test_a_slow_reader_that_reads_at_last_gets_everything(daemon: realm.Daemon) -> None:
    """More than the buffer, and slower than it comes: nothing is lost, nothing comes twice."""
    with Raw.tls(daemon.tcp, next(_addresses), receive_buffer=65536) as client:
        client.login("alice")
        assert client.walk("svc/big", 2).kind == WALK + 1
        client.send(b"".join(frame(CALL, seq, call_body(2, b"%d" % (MIB // 2))) for seq in range(1000, 1040)))
        time.sleep(0.3)
        found = [client.next() for _ in range(40)]
        assert sorted(each.seq for each in found) == list(range(1000, 1040))
        assert {len(each.payload) for each in found} == {MIB // 2}


def test_a_sender_of_much_is_read_no_faster_than_it_can_be_served(daemon: realm.Daemon) -> None:
    """Calls that wait for nobody pile up to the limit, and no further: whoever sends is made to wait."""
    with Raw.local(daemon.local, "alice") as client:
        client.login("alice")
        assert client.walk("silent", 2).kind == WALK + 1
        (gate,) = daemon.processes("gate", "local")
        (worker,) = daemon.processes("worker", "alice")
        before = {each.pid: memory(each.pid) for each in (gate, worker)}
        data = b"".join(frame(CALL, seq, call_body(2, bytes(MIB))) for seq in range(1000, 1200))
        sent, most = 0, dict(before)
        deadline = time.monotonic() + 0.8
        while sent < len(data) and time.monotonic() < deadline:
            some = client.send_some(data[sent : sent + MIB])
            sent += some
            if not some:
                time.sleep(0.002)
            most = {pid: max(bytes_, memory(pid)) for pid, bytes_ in most.items()}
        for pid, bytes_ in most.items():
            assert bytes_ - before[pid] < 160 * MIB
        client.hang_up()


# --- times and numbers of connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["nothing", "half a hello", "a hello and no more"])
def test_a_handshake_that_is_not_finished_ends_at_its_time(hurried: realm.Daemon, said: str) -> None:
    hello = client_hello()
    with Raw(tcp(hurried.tcp, next(_addresses))) as client:
        began = time.monotonic()
        client.send({"nothing": b"", "half a hello": hello[: len(hello) // 2], "a hello and no more": hello}[said])
        with contextlib.suppress(ConnectionResetError):
            while client.sock.recv(65536):
                pass
        assert time.monotonic() - began >= 0.5 * TIMES


def test_a_handshake_that_drips_does_not_last_longer(hurried: realm.Daemon) -> None:
    with Raw(tcp(hurried.tcp, next(_addresses))) as client:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in client_hello():
                client.send(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - began > 10 * realm.PACE:
                    pytest.fail("it is never ended")
        assert time.monotonic() - began >= 0.5 * TIMES


@pytest.mark.parametrize("transport", ["tls", "local"])
def test_a_connection_on_which_nothing_happens_ends_at_its_time(hurried: realm.Daemon, transport: str) -> None:
    made = Raw.tls(hurried.tcp, next(_addresses)) if transport == "tls" else Raw.local(hurried.local, "alice")
    with made as client:
        client.login("alice")
        began = time.monotonic()
        for _ in range(3):
            time.sleep(0.3 * TIMES)
            assert client.answer(client.post(PING)).kind == PING + 1
        assert client.over()
        assert time.monotonic() - began >= 1.4 * TIMES


def refused_handshake(daemon: realm.Daemon, **how: Any) -> bool:
    """Whether no connection comes about that anything could be said on."""
    try:
        client = Raw.tls(daemon.tcp, next(_addresses), **how)
    except (ssl.SSLError, ConnectionError, Ended):
        return True
    with client:
        with contextlib.suppress(OSError):
            client.post(PING)
        try:
            return client.rest() == []
        except ssl.SSLError:
            return True


@pytest.mark.parametrize("alpn", [[], ["h2"], ["srpc/2", "http/1.1"], ["srpc/1 "]])
def test_tls_without_our_alpn_is_refused(daemon: realm.Daemon, alpn: list[str]) -> None:
    assert refused_handshake(daemon, alpn=alpn)


def test_our_alpn_among_others_is_chosen(daemon: realm.Daemon) -> None:
    with Raw.tls(daemon.tcp, next(_addresses), alpn=["srpc/2", "srpc/1"]) as client:
        client.login("alice")


def test_tls_1_2_is_refused(daemon: realm.Daemon) -> None:
    assert refused_handshake(daemon, highest=ssl.TLSVersion.TLSv1_2)


def test_a_half_closed_connection_ends(alice: Raw) -> None:
    """Whoever says that nothing more will come is gone: what is outstanding is dropped, and nothing is left behind."""
    assert alice.walk("silent", 2).kind == WALK + 1
    alice.post(CALL, call_body(2))
    alice.half_close()
    began = time.monotonic()
    alice.rest()
    assert time.monotonic() - began < 10


def test_a_broken_record_ends_the_connection(daemon: realm.Daemon) -> None:
    with Raw.tls(daemon.tcp, next(_addresses)) as client:
        client.login("alice")
        client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ssl.SSLError):
            assert client.rest() == []


# --- and after all of it -----------------------------------------------------------------------------------------------


def test_no_process_has_died_or_complained(daemon: realm.Daemon, hurried: realm.Daemon) -> None:
    for each in (daemon, hurried):
        assert each.events("gate-restart") == []
        assert each.events("child-output") == []
        assert [event for event in each.events("process-kill") if "violation" in event["reason"]] == []
        assert len(each.processes("gate")) == 2


@pytest.mark.parametrize("transport", ["tls", "local"])
def test_random_frames_are_survived(daemon: realm.Daemon, transport: str) -> None:
    """Frames with a good header and any body, of any type: parsed or refused, one error each, and no process dies."""
    import random  # noqa: PLC0415

    dice = random.Random(20)
    made: Callable[[], Raw] = (
        (lambda: Raw.tls(daemon.tcp, next(_addresses))) if transport == "tls" else (lambda: Raw.local(daemon.local))
    )
    bodies: list[Callable[[], bytes]] = [
        lambda: dice.randbytes(dice.randrange(60)),
        lambda: b'{"fid": %d, "newfid": %d, "path": "%s"}' % (dice.randrange(4), dice.randrange(4), dice.randbytes(3)),
        lambda: b'{"afid": %d, "uname": "x%d", "data": ""}' % (dice.randrange(9), dice.randrange(9)),
    ]
    pids = {each.pid for each in daemon.processes("gate")}
    for _ in range(25):
        with made() as client:
            for seq in range(1, 40):
                try:
                    client.send(frame(dice.randrange(-3, 25), seq, dice.choice(bodies)()))
                except OSError:
                    break
            with contextlib.suppress(TimeoutError, OSError, ssl.SSLError):
                client.sock.settimeout(0.1)
                answers: list[Frame] = client.rest()
                assert len(answers) <= 40
    assert {each.pid for each in daemon.processes("gate")} == pids
