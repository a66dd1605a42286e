"""Large payloads in the client library: callers and handlers, both kinds of each, over every transport."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import srpc_client
from srpc_client import CallTimeout, ConnectionLost, blocking
from srpc_client.core import ClientCore
from srpc_client.handling import HandlerCore, Request
from srpc_client.line import Line
from srpcd.wire import frames, messages
from srpcd.wire.limits import LARGE, METADATA_MAX, MIB, PAYLOAD_MAX, PORTION

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon

SIZES = [LARGE - 40, LARGE - 32, LARGE, LARGE + 1, 2 * LARGE, PORTION, MIB, MIB + 1, 5 * MIB + 17, PAYLOAD_MAX]
ALICE = frames.frame(frames.CALLER, 0, messages.encode(messages.Caller(1001, 1001, [], "alice", None, "/calc/add")))


def payload_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.fixture(params=["local", "remote"])
def daemon(request: pytest.FixtureRequest) -> FakeDaemon:
    """A daemon over each transport."""
    made: FakeDaemon = request.getfixturevalue(request.param)
    return made


def arguments(daemon: FakeDaemon) -> dict[str, Any]:
    remote = {"pins": daemon.pin, "password": "secret"} if daemon.context is not None else {}
    return {"address": daemon.address, "user": "alice", **remote}


# --- callers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_an_asyncio_caller_gets_back_what_he_sent(daemon: FakeDaemon, size: int) -> None:
    payload = payload_of(size)
    async with await srpc_client.dial(**arguments(daemon)) as connection:
        for metadata in (b"", b'{"a":1}'):
            assert await connection.session.exchange("/echo", payload, metadata) == (payload, metadata)
            assert await connection.call("/echo", b"small") == b"small"


@pytest.mark.parametrize("size", SIZES)
def test_a_blocking_caller_gets_back_what_he_sent(daemon: FakeDaemon, size: int) -> None:
    payload = payload_of(size)
    with blocking.dial(**arguments(daemon)) as connection:
        for metadata in (b"", b'{"a":1}'):
            assert connection.session.exchange("/echo", payload, metadata) == (payload, metadata)
            assert connection.call("/echo", b"small") == b"small"


async def test_large_and_small_calls_at_once_get_each_their_own(daemon: FakeDaemon) -> None:
    payloads = [payload_of(size) for size in (1, MIB, 20, LARGE, 5000, 3 * LARGE, 7)] * 4
    async with await srpc_client.dial(**arguments(daemon)) as connection:
        assert await asyncio.gather(*(connection.call("/echo", payload) for payload in payloads)) == payloads


def test_many_blocking_calls_large_and_small_come_in_order(daemon: FakeDaemon) -> None:
    payloads = [payload_of(size) for size in (1, LARGE, 20, 3 * LARGE, 5000, 7)] * 4
    with blocking.dial(**arguments(daemon)) as connection:
        assert list(connection.session.call_many("/echo", payloads, 3)) == payloads


def test_a_call_that_is_given_up_while_it_is_sent_leaves_the_connection_whole(daemon: FakeDaemon) -> None:
    with blocking.dial(**arguments(daemon)) as connection:
        assert connection.call("/echo", b"") == b""
        with pytest.raises(CallTimeout):
            connection.call("/calc/never", payload_of(8 * MIB), timeout=0.001)
        assert connection.call("/echo", payload_of(MIB)) == payload_of(MIB)
        assert connection.call("/echo", b"small") == b"small"


@pytest.mark.parametrize("method", ["send", "receive_into"])
def test_an_interruption_in_the_middle_of_a_large_call_ends_the_connection(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupted(self: Any, data: Any) -> Any:
        original(self, data)
        raise KeyboardInterrupt

    with blocking.dial(**arguments(daemon)) as connection:
        assert connection.call("/echo", b"first") == b"first"
        link = type(connection.session.connection._pump._link)
        original = getattr(link, method)
        with monkeypatch.context() as patched:
            patched.setattr(link, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                connection.call("/echo", payload_of(MIB))
        # How much of it is gone is not known: what came next would be taken for the rest.
        with pytest.raises(ConnectionLost):
            connection.call("/echo", b"x" * MIB, timeout=5)


@pytest.mark.parametrize("part", [10, 24, 100, 20_000, LARGE, 200_000])
async def test_a_server_that_hangs_up_in_the_middle_of_a_large_reply_is_one_error(daemon: FakeDaemon, part: int) -> None:
    async with await srpc_client.dial(**arguments(daemon)) as connection:
        await connection.call("/echo", b"")

        def reply(peer: Any, seq: int, _body: bytes) -> bool:
            data: bytes = frames.frame(frames.CALL_REPLY, seq, messages.call_reply_body(payload_of(MIB)))
            peer.raw(data[:part])
            peer.hang_up()
            return True

        daemon.on[frames.CALL] = reply
        with pytest.raises(ConnectionLost):
            await connection.call("/echo", b"")
    del daemon.on[frames.CALL]
    with blocking.dial(**arguments(daemon)) as again:
        again.call("/echo", b"")
        daemon.on[frames.CALL] = reply
        with pytest.raises(ConnectionLost):
            again.call("/echo", b"")


def test_the_core_copies_no_large_payload() -> None:
    core: ClientCore[object] = ClientCore()
    payload = payload_of(MIB)
    core.call(3, payload, b"{}", object())
    core.call(3, b"small", b"", object())
    waiting, taken = core.waiting, []
    while data := core.take():
        taken.append(data)
        assert core.waiting == waiting - sum(map(len, taken))
    assert core.waiting == 0
    assert any(isinstance(each, memoryview) and each.obj is payload for each in taken)
    found = list(frames.FrameReader(frames.REQUESTS).feed(b"".join(taken)))
    assert [messages.split_call(body)[1] for _, _, body in found] == [
        messages.call_reply_body(payload, b"{}"),
        messages.call_reply_body(b"small"),
    ]


def test_a_large_reply_with_too_much_metadata_breaks_the_protocol() -> None:
    core: ClientCore[object] = ClientCore()
    seq = core.call(3, b"", b"", object())
    body = frames.METADATA_LENGTH.pack(METADATA_MAX + 1) + bytes(4 * LARGE)
    data = frames.frame(frames.CALL_REPLY, seq, body)
    assert core.receive(data[:100]) == []
    assert core.receive(data[100:]) == []
    assert core.failure is not None


# --- handlers ----------------------------------------------------------------------------------------------------------


def test_the_handlers_core_gives_out_large_requests_and_takes_large_replies() -> None:
    core = HandlerCore()
    core.receive(ALICE)
    payload = payload_of(MIB)
    data = frames.frame(frames.CALL, 1, messages.call_body(0, payload, b"{}"))
    assert core.receive(data[:1000]) == []
    assert core.large == len(data) - 1000
    with core.room() as room:
        room[:500] = data[1000:1500]
    core.filled(500)
    assert core.receive(b"") == []
    (request,) = core.receive(data[1500:])
    assert (request.payload, request.metadata) == (payload, b"{}")
    request.reply(payload, b"{}")
    taken = []
    while part := core.take():
        taken.append(part)
    assert any(part is payload for part in taken)
    (answer,) = frames.FrameReader(frames.LINE_REPLIES).feed(b"".join(taken))
    assert answer == (frames.CALL_REPLY, 1, messages.call_reply_body(payload, b"{}"))


def test_what_a_handler_changes_after_its_reply_is_not_sent() -> None:
    core = HandlerCore()
    core.receive(ALICE)
    (request,) = core.receive(frames.frame(frames.CALL, 1, messages.call_body(0, b"")))
    answer = bytearray(payload_of(MIB))
    request.reply(answer)
    answer[:] = bytes(MIB)
    assert b"".join(iter(core.take, b""))[24:] == payload_of(MIB)


class Ends:
    """The worker's ends of a line, in a thread: sends the calls and collects what is answered."""

    def __init__(self, calls: list[bytes]) -> None:
        self.receive, self._write = os.pipe()
        self._read, self.send = os.pipe()
        for fd in (self.receive, self.send):
            os.set_blocking(fd, False)
        self._data = ALICE + b"".join(
            frames.frame(frames.CALL, seq, messages.call_body(0, payload, b"{}")) for seq, payload in enumerate(calls)
        )
        self._count = len(calls)
        self.answers: dict[int, bytes] = {}
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._ask, self._listen)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        view = memoryview(self._data)
        while view:
            view = view[os.write(self._write, view) :]

    def _listen(self) -> None:
        reader = frames.FrameReader(frames.LINE_REPLIES)
        while len(self.answers) < self._count and (data := os.read(self._read, 65536)):
            for _, seq, body in reader.feed(data):
                self.answers[seq] = body
        os.close(self._read)
        os.close(self._write)

    async def answered(self) -> dict[int, bytes]:
        """Once all are."""
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 20)
        return self.answers


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_line_serves_large_and_small_requests(asynchronous: bool) -> None:
    def handler(request: Request) -> bytes:
        assert request.metadata == b"{}"
        return request.payload

    async def coroutine(request: Request) -> bytes:
        await asyncio.sleep(0)
        return handler(request)

    calls = [payload_of(size) for size in (1, MIB, 7, LARGE, LARGE - 1, 3 * MIB, 100, PAYLOAD_MAX)]
    ends = Ends(calls)
    line = Line(ends.receive, ends.send, coroutine if asynchronous else handler)
    answers = await ends.answered()
    assert answers == {seq: messages.call_reply_body(payload) for seq, payload in enumerate(calls)}
    await line.wait_closed()
