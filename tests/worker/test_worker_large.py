"""Large frames through a worker: whole or not at all, and held up by nobody who stops in the middle."""

import errno
import fcntl
import os
import select
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from srpcd import ipc
from srpcd.wire import frames
from srpcd.wire.limits import LARGE, MIB, PAYLOAD_MAX
from srpcd.worker.parcel import Depot
from tests.worker.conftest import call_body

if TYPE_CHECKING:
    from srpcd.worker.loop import Loop
    from tests.worker.conftest import Bench, Frames, Gate, Handler

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look at the worker's descriptors and memory")

PATTERN = bytes(range(256)) * 4096 + b"!"
"""Somewhat more than a megabyte, with a period that no buffer has."""


def payload_of(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


@contextmanager
def sending(peer: "Frames", data: bytes) -> Iterator[None]:
    """Send meanwhile, because it takes until the other end reads."""
    sender = threading.Thread(target=peer.send_raw, args=(data,), daemon=True)
    sender.start()
    yield
    sender.join(10)
    assert not sender.is_alive()


def request(inode: tuple[int, int], tag: int, payload: bytes, path: str = "echo", metadata: bytes = b"") -> bytes:
    return frames.frame(ipc.CALL, tag, call_body(path, *inode, payload, metadata))


def reply(seq: int, payload: bytes, metadata: bytes = b"") -> bytes:
    return frames.frame(frames.CALL_REPLY, seq, frames.METADATA_LENGTH.pack(len(metadata)) + metadata + payload)


def exchange(gate: "Gate", handler: "Handler", inode: tuple[int, int], path: str = "echo") -> None:
    """A small call, to see that all is well."""
    tag = gate.start(path, b"small", inode)
    seq, payload = handler.request()
    assert payload == b"small"
    handler.reply(seq, b"answer")
    assert gate.reply(tag) == b"\0\0\0\0answer"


@pytest.mark.parametrize("size", [LARGE - 100, LARGE, LARGE + 1, MIB - 1, MIB, MIB + 1, 5 * MIB + 17, PAYLOAD_MAX])
@pytest.mark.parametrize("metadata", [b"", b'{"a":1}', b"m" * 65536])
def test_a_payload_goes_both_ways_unchanged(bench: "Bench", gate: "Gate", size: int, metadata: bytes) -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(size)
    for tag in (1000, 1001):  # the second after the first has changed what is read at once
        with sending(gate, request(inode, tag, payload, metadata=metadata)):
            kind, seq, body = handler.receive()
        assert kind == frames.CALL
        assert body == frames.CALL_HEAD.pack(0, len(metadata)) + metadata + payload
        with sending(handler, reply(seq, payload[::-1], metadata)):
            assert gate.reply(tag) == frames.METADATA_LENGTH.pack(len(metadata)) + metadata + payload[::-1]
        exchange(gate, handler, inode)


@pytest.mark.parametrize("cut", [1, 19, 20, 21, 47, 48, 52, 56, 57, 4096, 65536, 65537, 70_000, -70_000, -65536, -1])
def test_a_large_frame_may_come_in_pieces_cut_anywhere(bench: "Bench", gate: "Gate", cut: int) -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(3 * LARGE)
    for tag in (1000, 1001):
        data = request(inode, tag, payload)
        gate.send_raw(data[:cut])
        assert handler.silent(0.02)
        gate.send_raw(data[cut:] + frames.frame(ipc.WALK, tag + 10, b""))
        seq, found = handler.request()
        assert found == payload
        assert gate.receive()[:2] == (ipc.WALKED, tag + 10)
        data = reply(seq, payload)
        handler.send_raw(data[:cut])
        assert gate.silent(0.02)
        handler.send_raw(data[cut:])
        assert gate.reply(tag) == bytes(4) + payload


@needs_root
def test_a_request_that_passes_is_not_in_the_workers_memory(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(PAYLOAD_MAX)
    with open(f"/proc/{bench.process.pid}/clear_refs", "w") as file:
        file.write("5")

    def peak() -> int:
        with open(f"/proc/{bench.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    before = peak()
    with sending(gate, request(inode, 1000, payload)):
        seq, found = handler.request()
    handler.reply(seq, b"")
    assert gate.reply(1000) == bytes(4)
    assert found == payload
    assert peak() - before < 4 * MIB  # of 16: what is read at a time, and what is kept for the next read


def test_a_gate_that_dies_or_stops_half_way_leaves_nothing_with_the_handler(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    for begun in (30, 100, 70_000, MIB, 3 * MIB):
        other = bench.gate()
        half = request(inode, 1000, payload_of(4 * MIB))[:begun]
        with sending(other, half):
            exchange(gate, handler, inode)  # it stops there: nobody waits for it
        for fd in other.fds:
            os.close(fd)
        bench.peers.remove(other)
        assert handler.silent()
        exchange(gate, handler, inode)


def test_a_handler_that_dies_half_way_is_one_error_and_nothing_of_its_answer(bench: "Bench", gate: "Gate") -> None:
    for number, begun in enumerate((24, 30, 5000, 70_000, MIB)):
        path = f"dying{number}"
        inode, handler = bench.announced(gate, path)
        tag = gate.start(path, b"", inode)
        seq, _payload = handler.request()
        handler.send_raw(reply(seq, payload_of(2 * MIB))[:begun])
        assert gate.silent(0.05)
        handler.close()
        bench.peers.remove(handler)
        assert gate.outcome(tag) == errno.ECONNRESET
        assert bench.told() == ipc.LineGone(bench.lines)
        assert gate.silent(0.05)
        assert gate.walk("")


def test_what_a_handler_has_answered_before_it_died_counts(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(MIB // 2)
    for _ in range(2):  # the second time there is room for all of it in the pipe
        tag = gate.start("echo", b"", inode)
        seq, _payload = handler.request()
        with sending(handler, reply(seq, payload)):
            assert gate.reply(tag)[4:] == payload
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    handler.send_raw(reply(seq, payload))
    handler.close()
    bench.peers.remove(handler)
    assert gate.reply(tag)[4:] == payload


def test_a_handler_that_stops_half_way_holds_up_no_other(start: "Callable[..., Bench]") -> None:
    bench = start(call_timeout=700)
    gate = bench.gate()
    inode, slow = bench.announced(gate, "slow")
    other_inode, other = bench.announced(gate, "other")
    tag = gate.start("slow", b"", inode)
    seq, _payload = slow.request()
    answer = reply(seq, payload_of(4 * MIB))
    with sending(slow, answer[: 3 * MIB]):
        exchange(gate, other, other_inode, "other")
    assert gate.outcome(tag) == errno.ETIMEDOUT
    # It may go on later; then its line is as good as before.
    assert slow.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    with sending(slow, answer[3 * MIB :]):
        assert gate.silent()
    exchange(gate, slow, inode, "slow")


def test_a_handler_that_takes_nothing_does_not_hold_up_the_gates_pipe(bench: "Bench", gate: "Gate") -> None:
    inode, stuck = bench.announced(gate, "stuck")
    other_inode, other = bench.announced(gate, "other")
    payload = payload_of(15 * MIB)
    with sending(gate, request(inode, 1000, payload, "stuck") + request(inode, 1001, payload[::-1], "stuck")):
        pass  # both are with the worker, or on the line
    exchange(gate, other, other_inode, "other")
    for tag, wanted in ((1000, payload), (1001, payload[::-1])):
        seq, found = stuck.request()
        assert found == wanted
        stuck.reply(seq, b"")
        assert gate.reply(tag) == bytes(4)


def test_more_than_the_pipes_hold_waits_in_memory_and_comes_out_in_order(bench: "Bench", gate: "Gate") -> None:
    stuck = [bench.announced(gate, f"stuck{number}") for number in range(2)]
    payload = payload_of(14 * MIB)
    for number in range(4):  # 56 MiB, and 32 pipes
        inode = stuck[number % 2][0]
        with sending(gate, request(inode, 1000 + number, payload[number:], f"stuck{number % 2}")):
            pass
    assert gate.walk("")
    for number in range(4):
        handler = stuck[number % 2][1]
        seq, found = handler.request()
        assert found == payload[number:]
        handler.reply(seq, b"%d" % number)
        assert gate.reply(1000 + number)[4:] == b"%d" % number


def test_a_large_call_that_is_flushed_before_it_was_written_never_reaches_the_handler(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    first, second = payload_of(14 * MIB), payload_of(2 * MIB)  # the line does not hold the first
    with sending(gate, request(inode, 1000, first) + request(inode, 1001, second)):
        pass
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(1001))
    assert gate.outcome(1001) == errno.ECANCELED
    assert gate.receive()[:2] == (ipc.FLUSHED, 5)
    seq, found = handler.request()
    assert found == first
    assert handler.silent()
    handler.reply(seq, b"")
    assert gate.outcome(1000) == 0
    exchange(gate, handler, inode)


def test_a_large_call_that_is_flushed_half_written_is_written_to_its_end(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(3 * MIB)
    with sending(gate, request(inode, 1000, payload)):
        pass
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(1000))
    assert gate.outcome(1000) == errno.ECANCELED  # at once, though the handler has not read anything yet
    assert gate.receive()[:2] == (ipc.FLUSHED, 5)
    seq, found = handler.request()
    assert found == payload
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    with sending(handler, reply(seq, payload)):
        assert gate.silent()
    exchange(gate, handler, inode)


def test_a_call_that_is_flushed_while_its_large_answer_comes_gets_its_one_error(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    answer = reply(seq, payload_of(2 * MIB))
    handler.send_raw(answer[:MIB])
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
    assert gate.outcome(tag) == errno.ECANCELED
    assert gate.receive()[:2] == (ipc.FLUSHED, 5)
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    with sending(handler, answer[MIB:]):
        assert gate.silent()
    exchange(gate, handler, inode)


@pytest.mark.parametrize("seq", [0, 7])
def test_a_large_answer_to_no_call_costs_the_handler_its_line(bench: "Bench", gate: "Gate", seq: int) -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    handler.request()
    handler.send_raw(reply(seq, payload_of(MIB))[:60_000])
    assert gate.outcome(tag) == errno.ECONNRESET
    assert bench.told() == ipc.LineGone(bench.lines)


def test_a_large_call_with_lengths_that_do_not_fit_costs_the_gate_its_link(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    for bad in (
        ipc.CALL_HEAD.pack(1, *inode, 4) + b"echo" + frames.METADATA_LENGTH.pack(65537) + bytes(MIB // 4),
        ipc.CALL_HEAD.pack(1, *inode, 3000) + bytes(MIB // 4),
        ipc.CALL_HEAD.pack(2, *inode, 4) + b"echo" + bytes(4) + bytes(MIB // 4),  # of no connection
    ):
        other = bench.gate()
        try:
            other.send(ipc.CALL, 1000, bad)
        except BrokenPipeError:
            pass
        with pytest.raises(EOFError):
            other.receive()
        assert "broke the protocol" in bench.standard_error()
    exchange(gate, handler, inode)


def test_a_gate_whose_sessions_are_over_gets_no_large_call_either(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate, "late")
    tag = gate.start("late", b"under way", inode)
    seq, _payload = handler.request()
    for number in range(1, 5):  # whichever it is
        bench.send(ipc.GateOver(number))
    time.sleep(0.1)
    with sending(gate, request(inode, 1000, payload_of(MIB), "late")):
        assert gate.outcome(1000) == errno.EKEYEXPIRED
    handler.reply(seq, b"done")
    assert gate.reply(tag)[4:] == b"done"
    assert handler.silent()


def test_a_large_call_waits_for_a_line_as_a_small_one_does(bench: "Bench", gate: "Gate") -> None:
    pipe = bench.tree / "later"
    os.mkfifo(pipe)
    pipe.chmod(0o622 if os.geteuid() == 0 else 0o600)
    inode = gate.walk("later")[:2]
    payload = payload_of(2 * MIB)
    with sending(gate, request(inode, 1000, payload, "later") + request(inode, 1001, payload, "later")):
        assert bench.told() == ipc.LinesWanted("later", *inode)
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(1001))
    assert gate.outcome(1001) == errno.ECANCELED
    assert gate.receive()[:2] == (ipc.FLUSHED, 5)
    handler = bench.line(inode)
    seq, found = handler.request()
    assert found == payload
    handler.reply(seq, b"")
    assert gate.outcome(1000) == 0
    assert handler.silent(0.05)


@needs_root
def test_nothing_of_a_large_call_stays_open(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    before = bench.descriptors()
    payload = payload_of(2 * MIB)
    with sending(gate, request(inode, 1000, payload)):
        seq, _payload = handler.request()
    with sending(handler, reply(seq, payload)):
        gate.reply(1000)
    end = time.monotonic() + 5
    while time.monotonic() < end and bench.descriptors() != before:
        time.sleep(0.1)
    assert bench.descriptors() == before
    exchange(gate, handler, inode)


def test_a_handler_that_answers_at_length_what_it_was_not_given_yet_ends_nobody(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    payload = payload_of(3 * MIB)
    with sending(gate, request(inode, 1000, payload) + request(inode, 1001, payload)):
        pass  # the second waits behind the first, which the handler does not read
    answer = reply(3, payload_of(MIB))  # numbers can be guessed: `announced` has made one call
    handler.send_raw(answer[:70_000])
    time.sleep(0.05)
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(1001))
    assert gate.outcome(1001) == errno.ECANCELED
    assert gate.receive()[:2] == (ipc.FLUSHED, 5)
    with sending(handler, answer[70_000:]):
        assert gate.silent()
    assert gate.walk("")


@needs_root
def test_a_handler_that_answers_byte_by_byte_does_not_cost_more_than_it_says(bench: "Bench", gate: "Gate") -> None:
    def resident() -> int:
        with open(f"/proc/{bench.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    answer = reply(seq, payload_of(MIB))
    handler.send_raw(answer[:30])
    before, waiting = resident(), bytearray(4)
    for at in range(30, 50_030):
        handler.send_raw(answer[at : at + 1])
        while fcntl.ioctl(handler.fds[1], termios.FIONREAD, waiting) == 0 and any(waiting):
            pass  # each is read alone
    assert resident() - before < 2 * MIB
    with sending(handler, answer[50_030:]):
        assert gate.reply(tag) == bytes(4) + payload_of(MIB)
    exchange(gate, handler, inode)


@pytest.mark.parametrize("begun", [0, 70_000])
def test_a_handler_that_leaves_its_requests_unread_is_one_error(bench: "Bench", gate: "Gate", begun: int) -> None:
    # It has closed its end, and left unread what it was sent: its socket is reset.
    inode, other = bench.announced(gate)
    pipe = bench.tree / "reset"
    os.mkfifo(pipe)
    pipe.chmod(0o622 if os.geteuid() == 0 else 0o600)
    inode = gate.walk("reset")[:2]
    tag = gate.start("reset", b"", inode)
    assert bench.told() == ipc.LinesWanted("reset", *inode)
    ours, theirs = socket.socketpair()
    bench.send(ipc.LineExpected(7, *inode))
    bench.send(ipc.Line(7), theirs.detach())
    with ours:
        assert select.select([ours], [], [], 5)[0]
        ours.send(reply(1, payload_of(MIB))[:begun])
    assert gate.outcome(tag) == errno.ECONNRESET
    assert bench.told() == ipc.LineGone(7)
    exchange(gate, other, gate.walk("echo")[:2])


def test_a_gate_reads_no_pages_that_a_handler_has_spliced(bench: "Bench", gate: "Gate", tmp_path: Path) -> None:
    # Such a page may be one that nobody can read. Here it is one that changes later.
    inode, handler = bench.announced(gate)
    out, into = os.pipe()
    payload = payload_of(4 * LARGE)
    for number in range(2):  # the second time the pipes are wide
        tag = gate.start("echo", b"", inode)
        seq, _payload = handler.request()
        answer = reply(seq, payload)
        handler.send_raw(answer[:30])
        path = tmp_path / f"answer{number}"
        path.write_bytes(answer[30:])
        with path.open("rb+") as file:
            while count := os.splice(file.fileno(), into, len(answer)):
                while count:
                    count -= os.splice(out, handler.fds[1], count)
            assert select.select([gate.fds[0]], [], [], 5)[0]
            file.seek(0)
            file.write(bytes(len(payload)))
        assert gate.reply(tag) == bytes(4) + payload
    os.close(out)
    os.close(into)


def test_a_handler_that_writes_byte_by_byte_does_not_keep_the_worker_in_one_read_loop() -> None:
    """It writes as fast as it is read, so its reader never finds the socket empty."""
    loop = cast("Loop", SimpleNamespace(duties=[]))
    parcel = Depot(loop).parcel(b"", PAYLOAD_MAX, copied=True)
    assert parcel.take(-1, lambda _fd, _size: b"x")
    assert 0 < parcel.size < LARGE
    assert parcel.size + parcel.missing == PAYLOAD_MAX
    assert not parcel.take(-1, lambda _fd, _size: b"")
