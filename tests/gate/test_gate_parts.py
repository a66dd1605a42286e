"""Parts of the gate, in this process."""

import os
import socket
from collections.abc import Iterator
from errno import EACCES
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpcd import ipc
from srpcd.config import Config, Limits
from srpcd.gate.answers import give
from srpcd.gate.backlog import Backlog
from srpcd.gate.budget import Budget, Share
from srpcd.gate.conversation import prompt
from srpcd.gate.gate import Gate
from srpcd.gate.loop import Loop
from srpcd.gate.routes import REFUSALS, Link, LinkBroken, Refusals
from srpcd.session.effects import Forward
from srpcd.session.fids import Attachment, Fid
from srpcd.session.session import Session
from srpcd.wire import frames
from srpcd.wire.frames import PING, frame
from srpcd.wire.limits import STAT_PAGE


@given(st.lists(st.binary(min_size=1, max_size=300_000), max_size=12), st.lists(st.integers(0, 100_000), max_size=40))
def test_a_backlog_gives_every_byte_once_and_in_order(chunks: list[bytes], takes: list[int]) -> None:
    backlog = Backlog()
    for chunk in chunks:
        backlog.add(chunk, 1.0)
    written = bytearray()

    def write(data: bytes | memoryview) -> int:
        taken = min(takes.pop() if takes else len(data), len(data))
        written.extend(data[:taken])
        return taken

    while backlog.size:
        backlog.push(write, 2.0)
    assert bytes(written) == b"".join(chunks)


def test_a_backlog_knows_since_when_nobody_takes_anything() -> None:
    backlog = Backlog()
    backlog.add(b"abc", 1.0)
    backlog.add(b"def", 2.0)
    backlog.push(lambda _data: 0, 3.0)
    assert (backlog.since, backlog.size) == (1.0, 6)
    takes = [2, 0]
    backlog.push(lambda _data: takes.pop(0), 4.0)
    assert (backlog.since, backlog.size) == (4.0, 4)


def test_what_is_written_again_after_a_block_begins_with_the_same_bytes() -> None:
    """OpenSSL demands it."""
    backlog = Backlog()
    seen: list[bytes] = []

    def write(data: bytes | memoryview) -> int:
        seen.append(bytes(data))
        return 0

    for byte in (b"a", b"b", b"c"):
        backlog.add(byte, 0.0)
        backlog.push(write, 0.0)
    assert seen == [b"a", b"ab", b"abc"]


def test_refusals_are_told_at_a_bounded_rate() -> None:
    refusals = Refusals()
    assert [refusals.report(100.0) for _ in range(1000)] == [0] * REFUSALS + [None] * (1000 - REFUSALS)
    assert [refusals.report(101.5), refusals.report(101.5)] == [1000 - REFUSALS, 0]


def test_prompts_of_odd_modules_become_prompts_of_the_protocol() -> None:
    assert prompt("secret", "ä").style == "secret"
    assert (prompt("strange", "x\udcff").style, prompt("strange", "x\udcff").text) == ("info", "x?")


STAT = ipc.Stat(7, 8, ipc.DIRECTORY, 0o755, 1, 2, 3, True, False, False, "u", "g", "label", ())

NONSENSE = [
    (frames.CALL, ipc.WALKED, ipc.WALKED_BODY.pack(1, 2, 0)),
    (frames.CALL, ipc.STATTED, STAT.pack()),
    (frames.CALL, ipc.FLUSHED, b""),
    (frames.CALL, ipc.WORKER_ERROR, b""),
    (frames.CALL, ipc.WORKER_ERROR, ipc.ERROR_HEAD.pack(5, 9)),
    (frames.WALK, ipc.WORKER_ERROR, ipc.ERROR_HEAD.pack(5, ipc.ORIGIN_HANDLER) + b"{}"),
    (frames.WALK, ipc.WALKED, b"short"),
    (frames.WALK, ipc.CALLED, bytes(4)),
    (frames.STAT, ipc.STATTED, b""),
    (frames.STAT, ipc.STATTED, STAT.pack()[:-1]),
    (frames.STAT, ipc.STATTED, ipc.Ready(0).pack()),
    (frames.STAT, ipc.STATTED, ipc.Stat(*(STAT.__dict__ | {"kind": 9}).values()).pack()),
    (frames.STAT, ipc.STATTED, ipc.Stat(*(STAT.__dict__ | {"children": ("a", "b")}).values()).pack()),  # none was asked for
]


@pytest.mark.parametrize(("asked", "kind", "body"), NONSENSE)
def test_an_answer_that_does_not_fit_the_request_is_no_workers(asked: int, kind: int, body: bytes) -> None:
    with pytest.raises(LinkBroken):
        give(Session(True), Forward(asked, 1, Fid(b"a", Attachment(1))), kind, body)


def test_a_stat_costs_the_gate_no_more_than_a_page_of_names_may() -> None:
    """Empty names are short, and each costs time of everybody's: four megabytes of them cost the better part of a second."""
    longest = ipc.Stat(*(STAT.__dict__ | {"children": ("ä" * 127,) * STAT_PAGE, "context": "x" * 4096}).values()).pack()
    assert len(longest) <= ipc.FROM_WORKER[ipc.STATTED] < 2 * len(longest)


@given(st.sampled_from([frames.WALK, frames.STAT, frames.CALL]), st.sampled_from(sorted(ipc.FROM_WORKER)), st.binary())
def test_any_answer_is_taken_or_breaks_the_link_and_nothing_else(asked: int, kind: int, body: bytes) -> None:
    try:
        give(Session(True), Forward(asked, 1, Fid(b"a", Attachment(1))), kind, body)
    except LinkBroken:
        pass


def test_a_refusal_by_the_kernel_is_told_and_one_by_a_handler_is_not() -> None:
    forward = Forward(frames.CALL, 1, Fid(b"a", Attachment(1)))
    kernel = ipc.ERROR_HEAD.pack(EACCES, ipc.ORIGIN_KERNEL) + b"\xff"
    handler = ipc.ERROR_HEAD.pack(EACCES, ipc.ORIGIN_HANDLER) + b"{}"
    assert give(Session(True), forward, ipc.WORKER_ERROR, kernel) == EACCES
    assert give(Session(True), forward, ipc.WORKER_ERROR, handler) == 0


class Here:
    """A gate in this process, turned by hand."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.monitor, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.gate = Gate(self.loop, Config(), None, self.theirs)
        self.clients: list[socket.socket] = []

    def turn(self) -> None:
        self.loop.call_later(0.02, self.loop.stop)
        self.loop.run_forever()

    def connect(self) -> socket.socket:
        client, server = socket.socketpair()
        client.setblocking(False)
        self.clients.append(client)
        ipc.send_descriptors(self.monitor, ipc.Connection(len(self.clients), "here"), [server.fileno()])
        server.close()
        self.turn()
        return client

    def close(self) -> None:
        for connection in list(self.gate.connections.values()):
            connection.end()
        self.loop.remove_reader(self.theirs.fileno())
        self.loop.close()
        for each in (self.monitor, self.theirs, *self.clients):
            each.close()


@pytest.fixture
def here() -> Iterator[Here]:
    made = Here()
    yield made
    made.close()


def test_a_fault_in_one_connection_ends_that_one_and_shows_no_values(
    here: Here, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = here.connect(), here.connect()

    def receive(data: bytes) -> None:
        raise ValueError(data.decode())

    monkeypatch.setattr(here.gate.connections[1].session, "receive", receive)
    first.send(b"a secret")
    second.send(frame(PING, 1))
    here.turn()
    assert first.recv(100) == b""
    assert second.recv(100)[:4] == bytes((0, 0, 0, frames.PING_REPLY))
    assert list(here.gate.connections) == [2]
    said = capfd.readouterr().err
    assert "ValueError" in said
    assert "secret" not in said


def test_a_connection_is_taken_at_once(here: Here) -> None:
    here.connect()
    assert ipc.receive_request(here.monitor) == ipc.Taken(1)


def test_messages_for_connections_that_are_over_are_dropped_with_their_descriptors(here: Here) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pipes = os.pipe()
    ipc.send_descriptors(here.monitor, ipc.Conversation(9, 1), pipes[:1])
    ipc.send_descriptors(here.monitor, ipc.Verdict(9, 1, 0, ""))
    ipc.send_descriptors(here.monitor, ipc.NewLine(9, 1, 1))
    here.connect()
    ipc.send_descriptors(here.monitor, ipc.Conversation(1, 77), pipes[1:])
    here.turn()
    ipc.close_all(pipes)
    here.clients[0].close()
    here.turn()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_that_was_not_listened_to_is_not_taken_for_hung() -> None:
    clock = [0.0]
    here, there = ipc.socket_pair(socket.SOCK_STREAM)
    gate = Mock(loop=Mock(time=lambda: clock[0]), limits=Limits(), budget=Budget(1 << 30, Mock()))
    link = Link(gate, 1, here.detach(), Share())
    connection = Mock(number=3, peer="192.0.2.7")
    link.send(connection, Forward(frames.CALL, 1, Fid(b"echo", Attachment(5)), bytes(4)))
    link.check(0.0, 20.0, 65.0)
    link.hold(connection)
    clock[0] = 100.0
    link.check(100.0, 20.0, 65.0)
    link.release(connection)  # and only now what it has answered long ago can be read
    taken_for_hung = []
    for now in (100.5, 166.0):
        link.check(now, 20.0, 65.0)
        taken_for_hung.append(link.dead)
    assert taken_for_hung == [False, True]
    there.close()
