"""Bounds of a worker: time, calls and bytes that wait, descriptors; and what it does about who is too slow."""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc
from srpcd.wire import frames
from srpcd.wire.limits import LINE_OUTSTANDING_MAX, PAYLOAD_MAX
from srpcd.worker.gates import PEERS_MAX

if TYPE_CHECKING:
    from tests.worker.conftest import Bench, Gate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look at the worker's descriptors")


def test_the_deadline_ends_a_call_and_tells_the_handler(start: "Callable[..., Bench]") -> None:
    bench = start(call_timeout=300)
    gate = bench.gate()
    inode, handler = bench.announced(gate)
    begin = time.monotonic()
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    assert gate.outcome(tag) == errno.ETIMEDOUT
    assert 0.28 < time.monotonic() - begin < 0.6
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))


def test_a_handler_that_never_answers_does_not_collect_calls_without_end(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    for _ in range(LINE_OUTSTANDING_MAX):
        tag = gate.start("echo", b"", inode)
        seq, _payload = handler.request()
        gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
        assert gate.outcome(tag) == errno.ECANCELED
        assert gate.receive()[0] == ipc.FLUSHED
        assert handler.receive()[0] == frames.FLUSH
    assert gate.outcome(gate.start("echo", b"", inode)) == errno.EAGAIN
    handler.reply(seq, b"")
    time.sleep(0.05)
    tag = gate.start("echo", b"", inode)
    handler.reply(handler.request()[0], b"")
    assert gate.outcome(tag) == 0


def test_the_largest_payload_goes_both_ways(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    payload = os.urandom(1 << 20) * (PAYLOAD_MAX >> 20)

    def serve() -> None:
        seq, got = handler.request(10)
        handler.reply(seq, got)

    service = threading.Thread(target=serve)
    service.start()
    assert gate.call("echo", payload, inode, 10) == payload
    service.join()


def test_a_stuck_handler_holds_up_no_other_and_is_given_up(start: "Callable[..., Bench]") -> None:
    bench = start(call_timeout=600)
    gate = bench.gate()
    inode, stuck = bench.announced(gate)
    other, handler = bench.announced(gate, "other")
    tag = gate.start("echo", bytes(14 << 20), inode)  # nobody reads it
    good = gate.start("other", b"", other)
    seq, _payload = handler.request()
    handler.reply(seq, b"")
    assert gate.outcome(good) == 0
    assert gate.outcome(tag) == errno.ETIMEDOUT
    assert bench.told() == ipc.LineGone(stuck.number)


@needs_root
def test_nothing_is_left_open_after_300_calls_and_lines(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    handler.close()
    bench.told()
    gate.walk("")  # descriptors are closed at the end of a pass
    before = bench.descriptors()
    for _ in range(100):
        tags = [gate.start("echo", b"", inode) for _ in range(3)]
        bench.told()
        handler = bench.line(inode)
        for _ in tags:
            handler.reply(handler.request()[0], b"")
        assert [gate.outcome(tag) for tag in tags] == [0, 0, 0]
        handler.close()
        assert bench.told() == ipc.LineGone(handler.number)
        gate.walk("")
    assert bench.descriptors() == before


def test_a_gate_that_reads_slowly_stops_the_reading_of_handlers(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tags = [gate.start("echo", b"", inode) for _ in range(40)]
    written = 0
    os.set_blocking(handler.fds[1], False)
    data = b"".join(frames.frame(frames.CALL_REPLY, handler.request()[0], bytes(1 << 20)) for _ in tags)
    end = time.monotonic() + 0.7
    while time.monotonic() < end and written < len(data):
        try:
            written += os.write(handler.fds[1], data[written : written + 65536])
        except BlockingIOError:
            time.sleep(0.01)
    assert written < 8 << 20  # 40 MiB are to be had, and the gate has taken nothing

    def rest() -> None:
        os.set_blocking(handler.fds[1], True)
        handler.send_raw(data[written:])

    service = threading.Thread(target=rest)
    service.start()
    assert [gate.outcome(tag) for tag in tags] == [0] * 40
    service.join()


def test_large_calls_that_nobody_takes_are_refused_and_others_go_on(start: "Callable[..., Bench]") -> None:
    bench = start(call_timeout=800)
    gate = bench.gate()
    inodes = [bench.announced(gate, f"stuck{number}")[0] for number in range(4)]
    calls = [(inodes[number], f"stuck{number}".encode()) for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    payload = bytes(15 << 20)

    def fill() -> None:
        for at, (inode, name) in enumerate(calls):
            head = ipc.CALL_HEAD.pack(1, *inode, len(name)) + name + bytes(4)
            gate.send_raw(frames.frame(ipc.CALL, 500 + at, head + payload))

    os.set_blocking(gate.fds[1], True)
    sender = threading.Thread(target=fill)  # 120 MiB, of which 64 are kept
    sender.start()
    found = [ipc.ERROR_HEAD.unpack_from(gate.receive(5)[2])[0] for _ in calls]
    sender.join()
    assert errno.EAGAIN in found
    assert set(found) <= {errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET}
    assert gate.walk("")


def test_a_gate_can_not_have_it_remember_connections_without_end(bench: "Bench", gate: "Gate") -> None:
    other, last = bench.gate(), 0
    with pytest.raises((BrokenPipeError, EOFError)):  # noqa: PT012
        for last in range(2, 200_000, 1000):
            gate.send_raw(b"".join(frames.frame(ipc.OPEN, conn, b"x" * 255) for conn in range(last, last + 1000)))
        gate.receive()
    assert last < PEERS_MAX + 2000
    other.walk("")
