"""Serving without asyncio, against a fake daemon and lines that the test makes as the monitor would."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from errno import EACCES, ECANCELED, EIO, ENOENT, EOPNOTSUPP, ESHUTDOWN
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from srpc_client import CallError, Request, SrpcError, blocking
from srpcd.wire import frames, messages

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, FakeLine, MakeLine

    Serve = Callable[..., threading.Event]


def add(request: Request) -> bytes:
    if request.payload == b"mine":
        raise CallError(ENOENT, "no such number")
    return str(sum(map(int, request.payload.split()))).encode()


def gone(line: FakeLine) -> bool:
    return not line.read()


@pytest.fixture
def serve(local: FakeDaemon, tree: Path) -> Iterator[Serve]:
    """Serves a handler in a thread until the event that it returns is set, or the test is over."""
    threads: list[threading.Thread] = []
    events: list[threading.Event] = []

    def start(handler: Any = add) -> threading.Event:
        over = threading.Event()
        arguments = {"address": local.address, "tree": str(tree), "until": over.is_set}
        thread = threading.Thread(target=blocking.serve, args=({"/calc/add": handler},), kwargs=arguments)
        thread.start()
        threads.append(thread)
        events.append(over)
        local.wait_for(local.listening.is_set)
        return over

    yield start
    for over, thread in zip(events, threads, strict=True):
        over.set()
        thread.join(10)
        assert not thread.is_alive()


def test_calls_are_answered_and_errors_are_the_callers(
    local: FakeDaemon, tree: Path, serve: Serve, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [make_line(1), make_line(2)]
    over = serve()
    for line in lines:
        local.tell_line(line.number)
        for seq in range(1, 301):
            line.call(seq, b"%d 1" % seq)
        line.call(1000, b"mine")
        line.call(1001, b"hunter2")
        line.write(
            frames.frame(frames.CALL, 1002, messages.call_body(0, b"1"))
            + frames.frame(frames.FLUSH, 0, frames.SEQ.pack(1002))
        )
    for line in lines:
        assert [line.reply(seq) for seq in range(1, 301)] == [b"%d" % (seq + 1) for seq in range(1, 301)]
        assert (line.error(1000).errno, line.error(1000).message) == (ENOENT, "no such number")
        assert line.error(1001).errno == EIO
        assert "hunter2" not in line.error(1001).message
        assert line.error(1002).errno == ECANCELED
    assert "hunter2" in caplog.text
    over.set()
    local.wait_for(lambda: not (tree / "calc/add").exists())
    for line in lines:
        local.wait_for(partial(gone, line))


def test_an_asynchronous_handler_is_refused_with_a_sentence(
    local: FakeDaemon, serve: Serve, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_request: Request) -> bytes:
        return b""

    line = make_line()
    serve(handler)
    local.tell_line(1)
    line.call(1, b"")
    assert line.error(1).errno == EIO
    assert "srpc_client.serve" in caplog.text


def test_a_caller_who_does_not_take_his_replies_is_not_served_and_others_are(
    local: FakeDaemon, serve: Serve, make_line: MakeLine
) -> None:
    served: list[str] = []

    def big(request: Request) -> bytes:
        served.append(request.payload.decode())
        return bytes(256 * 1024)

    slow, quick = make_line(1), make_line(2)
    serve(big)
    local.tell_line(1)
    local.tell_line(2)
    for seq in range(1, 101):
        slow.call(seq, b"slow")
    quick.call(1, b"quick")
    assert len(quick.reply(1)) == 256 * 1024
    time.sleep(0.2)
    assert served.count("slow") < 12
    for seq in range(1, 101):
        assert len(slow.reply(seq)) == 256 * 1024


@pytest.mark.parametrize("data", [b"x" * 100, frames.frame(frames.CALL, 1, messages.call_body(0, b""))])
def test_a_line_that_does_not_speak_as_a_worker_is_closed(
    local: FakeDaemon, serve: Serve, make_line: MakeLine, data: bytes
) -> None:
    bad, good = make_line(1, None), make_line(2)
    serve()
    bad.write(data)
    local.tell_line(1)
    local.tell_line(2)
    good.call(1, b"1 2")
    assert good.reply(1) == b"3"
    local.wait_for(lambda: not bad.read())


def test_a_line_of_another_endpoint_is_closed(local: FakeDaemon, serve: Serve, make_line: MakeLine) -> None:
    other = messages.Caller(1001, 1001, [1001], "alice", None, "/calc/harmless")
    bad, good = make_line(1, other), make_line(2)
    serve()
    bad.call(1, b"1 2")
    local.tell_line(1)
    local.tell_line(2)
    good.call(1, b"1 2")
    assert good.reply(1) == b"3"
    local.wait_for(lambda: not bad.read())
    assert not bad.answers


def test_callers_come_and_go(local: FakeDaemon, serve: Serve, make_line: MakeLine) -> None:
    serve()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 21):
        line = make_line(number)
        local.tell_line(number)
        line.call(1, b"1 2")
        assert line.reply(1) == b"3"
        line.call(2, b"1 2")
        line.hang_up()
    local.wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_it_comes_back_when_the_daemon_does(local: FakeDaemon, tree: Path, serve: Serve, make_line: MakeLine) -> None:
    path = local.address.removeprefix("unix:")
    serve()
    line = make_line(1)
    local.tell_line(1)
    local.listening.clear()
    local.stop()
    os.unlink(path)
    line.call(1, b"1 2")
    assert line.reply(1) == b"3"  # a line is its caller's, not the daemon's
    (tree / "calc/add").unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    local.listener = listener
    local.start()
    local.wait_for(local.listening.is_set)
    assert (tree / "calc/add").is_fifo()
    again = make_line(2)
    local.tell_line(2)
    again.call(1, b"3 4")
    assert again.reply(1) == b"7"


def test_what_is_there_when_it_ends_is_finished(local: FakeDaemon, serve: Serve, make_line: MakeLine) -> None:
    def slow(request: Request) -> bytes:
        time.sleep(0.01)
        return request.payload

    line = make_line()
    over = serve(slow)
    local.tell_line(1)
    for seq in range(1, 31):
        line.call(seq, b"x")
    line.reply(1)
    over.set()
    assert [line.reply(seq) for seq in range(1, 31)] == [b"x"] * 30


def test_a_signal_ends_it_and_the_call_that_it_ends_says_so(local: FakeDaemon, tree: Path, make_line: MakeLine) -> None:
    def interrupted(_request: Request) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b""

    line = make_line()
    line.call(1, b"")

    def tell() -> None:
        local.listening.wait(5)
        local.tell_line(1)

    told = threading.Thread(target=tell)
    told.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell starts this with `&`
    try:
        with pytest.raises(KeyboardInterrupt):
            blocking.serve({"/calc/add": interrupted}, address=local.address, tree=str(tree))
    finally:
        signal.signal(signal.SIGINT, before)
    told.join()
    assert line.error(1).errno == ESHUTDOWN
    assert not (tree / "calc/add").exists()


def test_what_can_not_be_served_is_said_at_once(local: FakeDaemon, tree: Path) -> None:
    with pytest.raises(SrpcError) as caught:
        blocking.serve({"/calc/add": add}, address="calc.example")
    assert caught.value.errno == EOPNOTSUPP
    local.on[frames.ANNOUNCE] = lambda peer, seq, _body: peer.fail(seq, EACCES)
    with pytest.raises(CallError) as caught_:
        blocking.serve({"/calc/add": add}, address=local.address, tree=str(tree))
    assert caught_.value.errno == EACCES
    assert not (tree / "calc/add").exists()
    with pytest.raises(CallError, match="give tree="):
        blocking.serve({"/calc/add": add}, address=local.address)
