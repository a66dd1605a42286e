"""A server that asks for new keys (KeyUpdate, RFC 8446 section 4.6.3) at any time. Both libraries, real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import srpc_client
from srpc_client import CallTimeout, ConnectionLost, blocking
from tests.client.raw_tls import ANSWERED, DATA, HANDSHAKE, KEY_UPDATE, RECORD, UNANSWERED, RawTls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from OpenSSL import SSL

    from tests.client.conftest import FakeDaemon

LIBRARIES = ["asyncio", "blocking"]
SMALL, LARGE = 100, 3_000_000


class Updating:
    """A server's stream that puts KeyUpdates between its records.

    size: bytes of plaintext in one of its records. message: the KeyUpdate. every: records between two of them.
    """

    def __init__(self, tls: RawTls, size: int, message: bytes, every: int = 1) -> None:
        self.tls, self._size, self._message, self._every = tls, size, message, every
        self.sent = 0

    def recv(self, _size: int) -> bytes:
        while (data := self.tls.receive()) == b"":
            pass
        return data or b""

    def sendall(self, data: bytes) -> None:
        wire = self.ask()  # before the frame
        for number, at in enumerate(range(0, len(data), self._size)):
            wire += self.tls.out.seal(DATA, data[at : at + self._size])
            if number % self._every == 0:
                wire += self.ask()
        self.tls.sendall(wire)

    def ask(self) -> bytes:
        self.sent += 1
        return self.tls.key_update(self._message)


async def call(library: str, daemon: FakeDaemon, payloads: list[bytes]) -> list[bytes]:
    options: Any = {"pins": daemon.pin, "user": "alice", "password": "secret", "timeout": 60}
    if library == "asyncio":
        async with await srpc_client.dial(daemon.address, **options) as connection:
            return await asyncio.gather(*(connection.call("/echo", payload, timeout=60) for payload in payloads))

    def run() -> list[bytes]:
        with blocking.dial(daemon.address, **options) as connection:
            return [connection.call("/echo", payload, timeout=60) for payload in payloads]

    return await asyncio.to_thread(run)


@pytest.mark.parametrize("message", [ANSWERED, UNANSWERED], ids=["answered", "unanswered"])
@pytest.mark.parametrize(("size", "every"), [(7, 1), (7, 5), (1000, 50), (RECORD, 1)])
@pytest.mark.parametrize("library", LIBRARIES)
async def test_new_keys_before_between_and_inside_frames(
    remote: FakeDaemon, library: str, size: int, every: int, message: bytes
) -> None:
    streams: list[Updating] = []

    def wrap(sock: socket.socket, context: SSL.Context) -> Updating:
        streams.append(Updating(RawTls(sock, context), size, message, every))
        return streams[-1]

    remote.wrap = wrap
    payloads = [os.urandom(LARGE if size > 7 else 20_000), *(os.urandom(SMALL) for _ in range(20)), os.urandom(70_000), b""]
    assert await call(library, remote, payloads) == payloads
    assert streams[0].sent > 50
    if message == UNANSWERED:
        assert streams[0].tls.answers == 0


class Paused(Updating):
    """Reads only while `reading` is set."""

    def __init__(self, tls: RawTls) -> None:
        super().__init__(tls, RECORD, ANSWERED)
        self.reading = threading.Event()
        self.reading.set()
        self._sending = threading.Lock()

    def recv(self, size: int) -> bytes:
        self.reading.wait(60)
        return super().recv(size)

    def sendall(self, data: bytes) -> None:
        with self._sending:
            self.tls.sendall(self.tls.data(data))

    def ask_often(self, message: bytes, count: int) -> None:
        with self._sending:
            self.tls.sendall(b"".join(self.tls.key_update(message) for _ in range(count)))


def stuck(connection: Any) -> bool:
    """Whether the client has something to write that the socket does not take."""
    return len(connection._pump._unsent) > 0


def shrink(connection: Any) -> None:
    connection._pump._link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@pytest.fixture
def paused(remote: FakeDaemon) -> Iterator[list[Paused]]:
    """Makes the daemon's streams such ones, and gives them out."""
    streams: list[Paused] = []

    def wrap(sock: socket.socket, context: SSL.Context) -> Paused:
        streams.append(Paused(RawTls(sock, context)))
        return streams[-1]

    remote.wrap = wrap
    remote.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is accepted inherits it
    yield streams
    for stream in streams:
        stream.reading.set()


MESSAGES = pytest.mark.parametrize(
    ("count", "message"),
    [(1, ANSWERED), (50, ANSWERED), (3000, ANSWERED), (3, UNANSWERED)],
    ids=["one", "many", "thousands", "unanswered"],
)
SIZES = pytest.mark.parametrize("size", [500, 10_000, 15_000, 40_000, 300_000])


@MESSAGES
@SIZES
async def test_new_keys_while_an_asyncio_client_writes(
    remote: FakeDaemon, paused: list[Paused], size: int, count: int, message: bytes
) -> None:
    async with await srpc_client.dial(remote.address, pins=remote.pin, user="alice", password="secret") as connection:
        shrink(connection)
        assert await connection.call("/echo", b"x") == b"x"
        (stream,) = paused
        stream.reading.clear()
        calls, payloads = [], []
        while not stuck(connection):
            payloads.append(os.urandom(size))
            calls.append(asyncio.ensure_future(connection.call("/echo", payloads[-1])))
            await asyncio.sleep(0.0001)
            assert len(calls) < 800
        stream.ask_often(message, count)
        for _ in range(10):  # while it has still no room to answer, it goes on as ever
            payloads.append(os.urandom(size))
            calls.append(asyncio.ensure_future(connection.call("/echo", payloads[-1])))
            await asyncio.sleep(0.005)
        stream.reading.set()
        assert await asyncio.wait_for(asyncio.gather(*calls), 60) == payloads
        assert stream.tls.answers == (count if message == ANSWERED else 0) or stream.tls.answers > 0


@MESSAGES
@SIZES
def test_new_keys_while_a_blocking_client_writes(
    remote: FakeDaemon, paused: list[Paused], size: int, count: int, message: bytes
) -> None:
    with blocking.dial(remote.address, pins=remote.pin, user="alice", password="secret") as connection:
        shrink(connection)
        assert connection.call("/echo", b"x") == b"x"
        (stream,) = paused
        stream.reading.clear()
        while not stuck(connection):
            with contextlib.suppress(CallTimeout):  # the first may still be answered
                connection.call("/echo", os.urandom(size), timeout=0.01)
        stream.ask_often(message, count)
        with contextlib.suppress(CallTimeout):
            connection.call("/echo", b"too early", timeout=0.05)
        threading.Timer(0.05, stream.reading.set).start()
        payload = os.urandom(size)
        assert connection.call("/echo", payload, timeout=60) == payload


# --- messages of TLS without end ---------------------------------------------------------------------------------------

_TICKET_BODY = b"\x00\x00\x0e\x10\x00\x00\x00\x01\x01a\x00\x01t\x00\x00"
TICKET = b"\x04" + len(_TICKET_BODY).to_bytes(3, "big") + _TICKET_BODY
"""A NewSessionTicket. Hundreds fit into a record, and each costs the client some microseconds."""


@pytest.mark.parametrize("kind", ["tickets", "answered", "unanswered"])
@pytest.mark.parametrize("library", LIBRARIES)
async def test_a_timeout_holds_though_messages_of_tls_come_without_end(
    remote: FakeDaemon, paused: list[Paused], library: str, kind: str
) -> None:
    """SSL_read would take one after the other and never return: no timer and no Ctrl-C would be served."""
    over = threading.Event()

    def flood(_payload: bytes, _metadata: bytes) -> None:
        (stream,) = paused
        while not over.is_set():
            if kind == "tickets":
                wire = stream.tls.out.seal(HANDSHAKE, TICKET * (16_000 // len(TICKET)))
            else:
                wire = b"".join(stream.tls.key_update(ANSWERED if kind == "answered" else UNANSWERED) for _ in range(1000))
            stream.tls.sendall(wire)

    remote.endpoints["calc/never"] = flood
    options: Any = {"pins": remote.pin, "user": "alice", "password": "secret", "timeout": 60}
    try:
        if library == "asyncio":
            async with await srpc_client.dial(remote.address, **options) as connection:
                with pytest.raises((CallTimeout, ConnectionLost)):
                    await connection.call("/calc/never", b"", timeout=0.5)
        else:
            with blocking.dial(remote.address, **options) as other, pytest.raises((CallTimeout, ConnectionLost)):
                other.call("/calc/never", b"", timeout=0.5)
    finally:
        over.set()


@pytest.mark.parametrize("library", LIBRARIES)
async def test_a_part_of_a_key_update_ends_the_connection_at_the_next_write(
    remote: FakeDaemon, paused: list[Paused], library: str
) -> None:
    """OpenSSL writes nothing before it has the rest; the client would ask it again and again."""
    options: Any = {"pins": remote.pin, "user": "alice", "password": "secret", "timeout": 60}
    if library == "asyncio":
        async with await srpc_client.dial(remote.address, **options) as connection:
            paused[0].tls.sendall(paused[0].tls.out.seal(HANDSHAKE, KEY_UPDATE[:2]))
            await asyncio.sleep(0.05)
            with pytest.raises(ConnectionLost):
                await connection.call("/echo", b"")
    else:
        with blocking.dial(remote.address, **options) as other:
            paused[0].tls.sendall(paused[0].tls.out.seal(HANDSHAKE, KEY_UPDATE[:2]))
            with pytest.raises(ConnectionLost):
                other.call("/echo", b"")


async def test_key_updates_whose_answers_are_not_taken_do_not_collect(remote: FakeDaemon, paused: list[Paused]) -> None:
    async with await srpc_client.dial(remote.address, pins=remote.pin, user="alice", password="secret") as connection:
        shrink(connection)
        (stream,) = paused
        stream.reading.clear()
        call = asyncio.ensure_future(connection.call("/calc/never", b"x"))

        def flood() -> None:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    stream.ask_often(ANSWERED, 1000)

        await asyncio.to_thread(flood)
        stream.reading.set()
        with pytest.raises(ConnectionLost, match="takes no answer"):
            await call
