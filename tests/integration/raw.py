"""A raw client of the protocol for tests: blocking, with timeouts, and able to send any bytes whatever.

It shares no code with srpcd or srpc_client, so that what they have in common is checked by somebody else. TLS runs over
memory, which lets a test cut a ClientHello in half, close half of a connection, or hang up without a goodbye.
"""

import json
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests import realm

HEADER = struct.Struct("!iQQ")
ERROR, AUTH, ATTACH, WALK, STAT, APPEND, CLUNK, CALL, FLUSH, PING, ANNOUNCE, LISTEN = (
    -1,
    1,
    3,
    5,
    7,
    9,
    11,
    13,
    15,
    17,
    19,
    21,
)

SECONDS = 10.0 * realm.PACE
"""How long an answer may take before a test fails: much longer than it does on a busy machine."""

_CONNECT = """
import _socket, array, sys
pair, sock = _socket.socket(fileno=0), _socket.socket(_socket.AF_UNIX)
sock.connect(sys.argv[1])
pair.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))])
"""


class Ended(AssertionError):
    """The server closed the connection where an answer was expected."""


@dataclass(frozen=True)
class Frame:
    """kind: the message type. body: as it came."""

    kind: int
    seq: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)

    @property
    def errno(self) -> int:
        """Of an error; 0 for any other message."""
        return int(self.json["errno"]) if self.kind == ERROR else 0

    @property
    def data(self) -> str:
        """Of the reply to an append."""
        return str(self.json["data"])

    @property
    def payload(self) -> bytes:
        """Of the reply to a call."""
        (metadata,) = struct.unpack_from("!I", self.body)
        return self.body[4 + metadata :]


def frame(kind: int, seq: int, body: bytes | dict[str, Any] = b"", length: int | None = None) -> bytes:
    """A frame. body: a dict becomes JSON. length: what the header says, if not the truth."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    return HEADER.pack(kind, seq, len(data) if length is None else length) + data


def call_body(fid: int, payload: bytes = b"", metadata: bytes = b"") -> bytes:
    """The body of a call."""
    return struct.pack("!QI", fid, len(metadata)) + metadata + payload


class Raw:
    """One connection. Made by `tls` or `local`; closed by `close`, or as a context manager."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLObject | None = None) -> None:
        self.sock = sock
        self.seq = 0
        self._tls = tls
        self._pending = bytearray()
        self._others: list[Frame] = []
        self._ended = False
        sock.settimeout(SECONDS)

    # --- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def tls(
        cls,
        address: tuple[str, int],
        source: str = "",
        *,
        alpn: list[str] | None = None,
        highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        receive_buffer: int = 0,
    ) -> "Raw":
        """Connect and shake hands.

        source: the address to come from, of `realm.addresses()`. alpn: None is what the server wants, an empty list no ALPN.
        receive_buffer: bytes that the kernel keeps for us, 0 for as many as it likes.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = highest
        if alpn != []:
            context.set_alpn_protocols(alpn or ["srpc/1"])
        sock = tcp(address, source, receive_buffer)
        try:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            raw = cls(sock, context.wrap_bio(incoming, outgoing))
            raw._incoming, raw._outgoing = incoming, outgoing
            raw._shaken(raw._object.do_handshake)
        except BaseException:
            sock.close()
            raise
        return raw

    @classmethod
    def local(cls, path: Path, user: str | None = None) -> "Raw":
        """Connect to the local socket, as a user of the realm or as ourselves."""
        if user is None:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            return cls(sock)
        # Who connects is who the server sees: a process of that user connects, and hands the socket over.
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = realm.popen_as(user, [realm.PYTHON, "-I", "-S", "-c", _CONNECT, str(path)], stdin=theirs.fileno())
            try:
                theirs.close()
                ours.settimeout(SECONDS)
                _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
            finally:
                process.wait(SECONDS)
                realm.finish(process)
        if not fds:
            raise Ended(f"{user} could not connect to {path}")
        return cls(socket.socket(fileno=fds[0]))

    # --- bytes ---------------------------------------------------------------------------------------------------------

    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO

    @property
    def _object(self) -> ssl.SSLObject:
        assert self._tls is not None
        return self._tls

    def _shaken(self, action: Callable[[], object]) -> None:
        """Do something that TLS needs several messages for."""
        while True:
            try:
                action()
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                if not data:
                    raise Ended("the server closed the connection during the handshake") from None
                self._incoming.write(data)
            else:
                self._flush()
                return

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.sock.sendall(data)

    def send(self, data: bytes) -> None:
        """Send bytes, all of them. Raises OSError, TimeoutError."""
        if self._tls is None:
            self.sock.sendall(data)
            return
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
            self._flush()

    def sealed(self, data: bytes) -> bytes:
        """The bytes that `send` would put on the wire."""
        if self._tls is None:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    def send_some(self, data: bytes) -> int:
        """Send what goes without waiting, and no TLS is in the way; how much it was (0: the server does not read)."""
        assert self._tls is None
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _receive(self) -> bytes:
        """Some bytes, empty at the end. Raises OSError, TimeoutError."""
        if self._tls is None:
            return self.sock.recv(1 << 18)
        while True:
            try:
                return self._tls.read(1 << 18)
            except ssl.SSLWantReadError:
                data = self.sock.recv(1 << 18)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def ready(self) -> bool:
        """Whether a whole message (or the end) is there, without waiting. TLS has messages of its own, which are not."""
        while True:
            if self._others or self._whole() or self._ended:
                return True
            if not select.select([self.sock], [], [], 0)[0]:
                return False
            data = self.sock.recv(1 << 18)
            if self._tls is None:
                self._pending += data
            elif data:
                self._incoming.write(data)
                with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                    while more := self._tls.read(1 << 18):
                        self._pending += more
            self._ended = self._ended or not data

    def _whole(self) -> bool:
        return len(self._pending) >= HEADER.size and len(self._pending) >= HEADER.size + HEADER.unpack_from(self._pending)[2]

    # --- frames --------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        """A seq that was not used yet."""
        self.seq += 1
        return self.seq

    def post(self, kind: int, body: bytes | dict[str, Any] = b"", seq: int | None = None) -> int:
        """Send a request; returns its seq."""
        seq = self.number() if seq is None else seq
        self.send(frame(kind, seq, body))
        return seq

    def next(self) -> Frame:
        """The next message, whichever. Raises Ended, TimeoutError."""
        if self._others:
            return self._others.pop(0)
        return self._next()

    def _next(self) -> Frame:
        while True:
            if self._whole():
                kind, seq, length = HEADER.unpack_from(self._pending)
                body = bytes(self._pending[HEADER.size : HEADER.size + length])
                del self._pending[: HEADER.size + length]
                return Frame(kind, seq, body)
            data = b"" if self._ended else self._receive()
            if not data:
                raise Ended(f"the server closed the connection ({len(self._pending)} bytes of a message had come)")
            self._pending += data

    def answer(self, seq: int) -> Frame:
        """The message with this seq; others are kept for later. Raises Ended, TimeoutError."""
        for at, kept in enumerate(self._others):
            if kept.seq == seq:
                return self._others.pop(at)
        while True:
            found = self._next()
            if found.seq == seq:
                return found
            self._others.append(found)

    def ask(self, kind: int, **body: Any) -> Frame:
        """A request with a JSON body, and its answer."""
        return self.answer(self.post(kind, body))

    def call(self, fid: int, payload: bytes = b"") -> Frame:
        """A call, and its answer."""
        return self.answer(self.post(CALL, call_body(fid, payload)))

    def rest(self) -> list[Frame]:
        """All that still comes until the server closes the connection. Raises TimeoutError if it does not."""
        found = []
        while True:
            try:
                found.append(self.next())
            except (Ended, ConnectionResetError, BrokenPipeError):
                return found

    def over(self, seconds: float = SECONDS) -> bool:
        """Whether the server closes the connection within this time, saying nothing more."""
        self.sock.settimeout(seconds)
        try:
            return self.rest() == []
        except TimeoutError:
            return False
        finally:
            self.sock.settimeout(SECONDS)

    # --- what tests do again and again ---------------------------------------------------------------------------------

    def authenticate(self, afid: int, user: str, password: str | None = None, aname: str = "/") -> Frame:
        """Authenticate by a password; the reply to it, whose `data` is "1" or "0". password: None is the right one."""
        begun = self.ask(AUTH, afid=afid, uname=user, aname=aname)
        assert begun.kind == AUTH + 1, begun
        return self.ask(APPEND, fid=afid, data=realm.password(user) if password is None else password)

    def login(self, user: str, fid: int = 1, afid: int = 1000) -> None:
        """Authenticate and attach to the root; the afid stays. On a local socket made by `user`, without a password."""
        if self._tls is None:
            assert self.ask(AUTH, afid=afid, uname=user, mechanism="peer").kind == AUTH + 1
        else:
            assert self.authenticate(afid, user).data == "1"
        attached = self.ask(ATTACH, afid=afid, fid=fid, uname=user)
        assert attached.kind == ATTACH + 1, attached

    def walk(self, path: str, newfid: int, fid: int = 1) -> Frame:
        """Walk, and the answer."""
        return self.ask(WALK, fid=fid, newfid=newfid, path=path)

    def hang_up(self) -> None:
        """End the connection without a goodbye of TLS."""
        self.sock.close()

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        if self._tls is not None:
            with suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._flush()
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the connection."""
        if self._tls is not None:
            with suppress(ssl.SSLError, OSError):
                self._tls.unwrap()
            with suppress(OSError):
                self._flush()
        self.sock.close()

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def tcp(address: tuple[str, int], source: str = "", receive_buffer: int = 0) -> socket.socket:
    """A TCP connection, without TLS."""
    sock = socket.socket()
    try:
        sock.settimeout(SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            sock.bind((source, 0))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def client_hello() -> bytes:
    """The first bytes that a client of this protocol sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["srpc/1"])
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@contextmanager
def several(connections: list[Raw]) -> Iterator[list[Raw]]:
    """Close them all at the end."""
    try:
        yield connections
    finally:
        for each in connections:
            each.close()


def first(connections: Iterable[Raw]) -> list[Raw]:
    """Those of the connections on which a message has come; waits for one."""
    found: list[Raw] = []
    connections = list(connections)

    def come() -> list[Raw]:
        found[:] = [each for each in connections if each.ready()]
        return found

    if not realm.until(come, SECONDS, 0.002):
        raise AssertionError("nothing has come on any of the connections")
    return found


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(realm.status(pid)["VmRSS"].split()[0]) * 1024


def elapsed(since: float) -> float:
    """Seconds since a moment of `time.monotonic`."""
    return time.monotonic() - since


def exchange(one: Path, other: Path) -> None:
    """Swap two names at once (renameat2(2) with RENAME_EXCHANGE)."""
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "renameat2")
