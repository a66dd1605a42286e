"""Calls on service endpoints: permission at each call, lines, and exactly one answer."""

import errno
import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc
from srpcd.wire import frames

if TYPE_CHECKING:
    from tests.worker.conftest import Bench, Gate


def test_calls_go_through_a_line_and_answers_come_in_any_order(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tags = [gate.start("echo", str(number).encode(), inode, metadata=b"{}") for number in range(5)]
    requests = [handler.request() for _ in tags]
    assert [payload for _seq, payload in requests] == [b"0", b"1", b"2", b"3", b"4"]
    assert len({seq for seq, _payload in requests}) == 5
    for tag, (seq, payload) in reversed(list(zip(tags, requests, strict=True))):
        handler.send(frames.CALL_REPLY, seq, b"\0\0\0\2{}" + payload)
        assert gate.reply(tag) == b"\0\0\0\2{}" + payload


def test_metadata_goes_through_unchanged(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    gate.start("echo", b"payload", inode, metadata=b'{"a": 1}')
    _kind, _seq, body = handler.receive()
    assert body == bytes(8) + b'\0\0\0\x08{"a": 1}payload'


def test_the_handlers_own_error_goes_through_unread(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    handler.send(frames.ERROR, seq, b"not even JSON")
    kind, seq, body = gate.receive()
    assert (kind, seq) == (ipc.WORKER_ERROR, tag)
    assert body == ipc.ERROR_HEAD.pack(errno.EIO, ipc.ORIGIN_HANDLER) + b"not even JSON"


def test_chmod_binds_at_the_next_call(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    pipe = bench.tree / "echo"
    mode = pipe.stat().st_mode & 0o7777
    for _ in range(3):
        pipe.chmod(0)
        assert gate.outcome(gate.start("echo", b"", inode)) == errno.EACCES
        assert handler.silent(0.02)
        pipe.chmod(mode)
        tag = gate.start("echo", b"again", inode)
        seq, payload = handler.request()
        handler.reply(seq, payload)
        assert gate.reply(tag) == b"\0\0\0\0again"


def test_a_directory_closed_further_up_binds_at_the_next_call(bench: "Bench", gate: "Gate") -> None:
    (bench.tree / "a/b").mkdir(parents=True)
    inode, handler = bench.announced(gate, "a/b/echo")
    (bench.tree / "a").chmod(0)
    assert gate.outcome(gate.start("a/b/echo", b"", inode)) == errno.EACCES
    (bench.tree / "a").chmod(0o755)
    gate.start("a/b/echo", b"", inode)
    handler.request()


def test_another_pipe_at_the_path_is_stale_and_nothing_is_delivered(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    os.rename(bench.tree / "echo", bench.tree / "old")
    assert gate.outcome(gate.start("echo", b"", inode)) == errno.ENOENT
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    assert gate.outcome(gate.start("echo", b"", inode)) == errno.ESTALE
    (bench.tree / "echo").unlink()
    (bench.tree / "echo").mkdir()
    assert gate.outcome(gate.start("echo", b"", inode)) == errno.ESTALE
    assert handler.silent(0.02)


def test_permission_is_that_of_the_pipe_whether_or_not_somebody_reads_it(bench: "Bench", gate: "Gate") -> None:
    inode, _handler = bench.announced(gate)
    reader = os.open(bench.tree / "echo", os.O_RDONLY | os.O_NONBLOCK)
    (bench.tree / "echo").chmod(0o400)
    assert gate.outcome(gate.start("echo", b"", inode)) == errno.EACCES
    os.close(reader)


def test_a_directory_can_not_be_called(bench: "Bench", gate: "Gate") -> None:
    (bench.tree / "d").mkdir()
    assert gate.outcome(gate.start("d")) == errno.EISDIR


def test_nobody_serves_it_is_told_after_a_second(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    begin = time.monotonic()
    tag = gate.start("echo", b"", (dev, ino))
    assert bench.told() == ipc.LinesWanted("echo", dev, ino)
    bench.send(ipc.Lines(dev, ino, 0))
    assert gate.outcome(tag) == errno.ENXIO
    assert 0.95 < time.monotonic() - begin < 1.4


def test_a_call_that_waits_goes_to_the_service_that_comes_back(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    tag = gate.start("echo", b"patient", (dev, ino))
    bench.told()
    bench.send(ipc.Lines(dev, ino, 0))
    time.sleep(0.3)
    handler = bench.line((dev, ino))
    seq, payload = handler.request()
    handler.reply(seq, payload)
    assert gate.reply(tag) == b"\0\0\0\0patient"


def test_a_call_that_waited_is_checked_again_before_it_is_delivered(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    tag = gate.start("echo", b"", (dev, ino))
    bench.told()
    (bench.tree / "echo").chmod(0)
    handler = bench.line((dev, ino))
    assert gate.outcome(tag) == errno.EACCES
    assert handler.silent(0.02)


def test_what_the_monitors_probe_found_is_told_and_the_next_call_asks_again(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    for number in (errno.EACCES, errno.EAGAIN):
        tags = [gate.start("echo", b"", (dev, ino)) for _ in range(2)]
        assert bench.told() == ipc.LinesWanted("echo", dev, ino)
        bench.send(ipc.Lines(dev, ino, number))
        assert [gate.outcome(tag) for tag in tags] == [number, number]


def test_calls_go_to_the_line_with_the_fewest_outstanding(bench: "Bench", gate: "Gate") -> None:
    inode, first = bench.announced(gate)
    second = bench.line(inode)
    gate.walk("echo")  # so that the second line is known
    time.sleep(0.05)
    for _ in range(6):
        gate.start("echo", b"", inode)
    for handler in (first, second):
        for _ in range(3):
            handler.request()
    assert first.silent(0.02)
    assert second.silent(0.02)


def test_each_call_of_a_handler_that_dies_gets_exactly_one_error(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tags = [gate.start("echo", b"", inode) for _ in range(10)]
    requests = [handler.request() for _ in tags]
    handler.reply(requests[3][0], b"before it died")
    handler.close()
    got = {}
    for _ in tags:
        kind, tag, _body = gate.receive()
        got[tag] = kind
    assert got.pop(tags[3]) == ipc.CALLED  # what it wrote before it died counts
    assert set(got) == set(tags) - {tags[3]}
    assert set(got.values()) == {ipc.WORKER_ERROR}
    assert gate.silent()
    assert bench.told() == ipc.LineGone(handler.number)


def test_after_a_handlers_death_the_next_call_asks_for_another_line(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    handler.close()
    assert bench.told() == ipc.LineGone(handler.number)
    tag = gate.start("echo", b"next", inode)
    assert bench.told() == ipc.LinesWanted("echo", *inode)
    other = bench.line(inode)
    seq, payload = other.request()
    other.reply(seq, payload)
    assert gate.reply(tag) == b"\0\0\0\0next"


def test_other_lines_are_not_disturbed_by_a_death(bench: "Bench", gate: "Gate") -> None:
    inode, first = bench.announced(gate)
    other, second = bench.announced(gate, "other")
    tag = gate.start("other", b"", other)
    seq, _payload = second.request()
    lost = gate.start("echo", b"", inode)
    first.request()
    first.close()
    assert gate.outcome(lost) == errno.ECONNRESET
    second.reply(seq, b"well")
    assert gate.reply(tag) == b"\0\0\0\0well"


@pytest.mark.parametrize(
    "answer",
    [
        frames.frame(frames.CALL_REPLY, 999, bytes(4)),
        frames.frame(frames.CALL, 2, bytes(12)),
        frames.frame(frames.CALL_REPLY, 2, b"\0\0"),
        frames.frame(frames.CALL_REPLY, 2, b"\0\0\0\5{}"),
        frames.HEADER.pack(frames.CALL_REPLY, 2, 1 << 63),
        frames.HEADER.pack(frames.ERROR, 2, 1 << 20),
    ],
)
def test_a_handler_that_breaks_the_protocol_loses_its_line(bench: "Bench", gate: "Gate", answer: bytes) -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    assert handler.request()[0] == 2
    handler.send_raw(answer)
    assert gate.outcome(tag) == errno.ECONNRESET
    assert bench.told() == ipc.LineGone(handler.number)
    with pytest.raises(EOFError):
        handler.receive()


def test_a_flushed_call_is_cancelled_at_once_and_its_late_answer_dropped(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
    assert gate.outcome(tag) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 5, b"")
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    handler.reply(seq, b"late")
    assert gate.silent()
    tag = gate.start("echo", b"", inode)
    other, _payload = handler.request()
    assert other > seq
    handler.reply(other, b"fine")
    assert gate.reply(tag) == b"\0\0\0\0fine"


def test_a_call_that_is_flushed_before_it_was_written_never_reaches_the_handler(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    body = ipc.CALL_HEAD.pack(1, *inode, 4) + b"echo" + bytes(4) + b"never seen"
    gate.send_raw(frames.frame(ipc.CALL, 3, body) + frames.frame(ipc.FLUSH, 4, ipc.FLUSH_BODY.pack(3)))
    assert gate.outcome(3) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 4, b"")
    assert handler.silent()


def test_flush_of_what_is_not_outstanding_is_answered_at_once(gate: "Gate") -> None:
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(4))
    assert gate.receive() == (ipc.FLUSHED, 5, b"")


def test_a_call_that_waits_for_a_line_can_be_flushed(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    tag = gate.start("echo")
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
    assert gate.outcome(tag) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 5, b"")


def test_the_calls_of_a_closed_connection_are_flushed_without_a_word(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    gate.send(ipc.CLOSE, 1)
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    assert gate.silent()


def test_a_gate_that_is_gone_has_its_calls_flushed(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    gate.close()
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))
    other = bench.gate()
    tag = other.start("echo", b"hello", inode)
    seq, payload = handler.request()
    handler.reply(seq, payload)
    assert other.reply(tag) == b"\0\0\0\0hello"


@pytest.mark.parametrize(
    "broken",
    [
        frames.frame(99, 1),
        frames.frame(ipc.CALL, 1, b"short"),
        frames.frame(ipc.CALL, 1, ipc.CALL_HEAD.pack(1, 2, 3, 60000) + b"path"),
        frames.frame(ipc.CALL, 1, ipc.CALL_HEAD.pack(1, 2, 3, 4000) + b"p" * 4000 + bytes(4)),
        frames.frame(ipc.CALL, 1, ipc.CALL_HEAD.pack(77, 2, 3, 4) + b"echo" + bytes(4)),
        frames.frame(ipc.CALL, 1, ipc.CALL_HEAD.pack(1, 2, 3, 4) + b"echo" + b"\0\0\0\7{}"),
        frames.frame(ipc.STAT, 1, b"short"),
        frames.frame(ipc.FLUSH, 1, b"short"),
        frames.frame(ipc.OPEN, 3, b"nul\0"),
        frames.HEADER.pack(ipc.CALL, 1, (1 << 64) - 1),
    ],
)
def test_a_gate_that_breaks_the_protocol_loses_its_link_and_others_go_on(
    bench: "Bench", gate: "Gate", broken: bytes
) -> None:
    other = bench.gate()
    gate.send_raw(broken)
    with pytest.raises(EOFError):
        gate.receive()
    other.walk("")
    assert "broke the protocol" in bench.standard_error()


def test_a_tag_that_is_in_use_breaks_the_protocol(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    gate.tag -= 1
    assert gate.start("echo", b"", inode) == tag
    with pytest.raises(EOFError):
        gate.receive()
    assert handler.receive() == (frames.FLUSH, 0, frames.SEQ.pack(seq))


def test_a_line_whose_announcement_ended_takes_no_new_calls_but_may_answer_its_old(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    seq, _payload = handler.request()
    bench.send(ipc.LineOver(handler.number))
    time.sleep(0.05)
    late = gate.start("echo", b"", inode)
    assert bench.told() == ipc.LinesWanted("echo", *inode)
    handler.reply(seq, b"done")
    assert gate.reply(tag) == b"\0\0\0\0done"
    assert bench.told() == ipc.LineGone(handler.number)
    with pytest.raises(EOFError):
        handler.receive()
    bench.send(ipc.Lines(*inode, 0))
    assert gate.outcome(late) == errno.ENXIO


def test_a_line_that_the_service_connects_later_is_waited_for(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    tag = gate.start("echo", b"hello", (dev, ino))
    bench.told()
    bench.send(ipc.LineExpected(9, dev, ino))
    bench.send(ipc.Lines(dev, ino, 0))
    assert gate.silent(1.5)  # where no line is expected, it is over after a second
    ours, theirs = socket.socketpair()
    with ours:
        bench.send(ipc.Line(9), theirs.detach())
        kind, seq, _length = frames.HEADER.unpack_from(ours.recv(65536))
        assert kind == frames.CALL
        ours.sendall(frames.frame(frames.CALL_REPLY, seq, bytes(4)))
        assert gate.outcome(tag) == 0
    assert bench.told() == ipc.LineGone(9)


def test_a_line_that_the_service_does_not_connect_is_not_waited_for_any_longer(bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(bench.tree / "echo")
    (bench.tree / "echo").chmod(0o666)
    dev, ino, _kind = gate.walk("echo")
    tag = gate.start("echo", b"hello", (dev, ino))
    bench.told()
    bench.send(ipc.LineExpected(9, dev, ino))
    bench.send(ipc.Lines(dev, ino, 0))
    assert gate.silent(1.2)
    bench.send(ipc.LineOver(9))
    assert gate.outcome(tag) == errno.ENXIO


@pytest.mark.parametrize("direction", [socket.SHUT_RD, socket.SHUT_WR])
def test_a_service_that_shuts_down_one_direction_has_ended_its_line(bench: "Bench", gate: "Gate", direction: int) -> None:
    inode, handler = bench.announced(gate)
    tag = gate.start("echo", b"", inode)
    handler.request()
    with socket.socket(fileno=os.dup(handler.fds[0])) as end:
        end.shutdown(direction)
    if direction == socket.SHUT_RD:  # seen at the next write
        gate.start("echo", b"", inode)
    assert gate.outcome(tag) == errno.ECONNRESET
    assert bench.told() == ipc.LineGone(handler.number)


def test_a_gate_whose_sessions_are_over_gets_what_is_under_way_and_begins_nothing(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate, "late")
    tag = gate.start("late", b"under way", inode)
    seq, _payload = handler.request()
    for number in range(1, 5):  # whichever it is
        bench.send(ipc.GateOver(number))
    bench.wait_for_reading()
    refused = gate.start("late", b"too late", inode)
    assert gate.outcome(refused) == errno.EKEYEXPIRED
    handler.reply(seq, b"done")
    assert gate.reply(tag)[4:] == b"done"
    with pytest.raises(EOFError):
        gate.receive()


def test_a_gate_whose_sessions_are_over_can_still_flush_a_connection(bench: "Bench", gate: "Gate") -> None:
    inode, handler = bench.announced(gate, "late")
    gate.start("late", b"nobody waits", inode)
    handler.request()
    for number in range(1, 5):  # whichever it is
        bench.send(ipc.GateOver(number))
    gate.send(ipc.CLOSE, 1)
    with pytest.raises(EOFError):
        gate.receive()
