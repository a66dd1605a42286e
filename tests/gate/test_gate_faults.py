"""The real gate when something goes wrong: nobody is disturbed who has nothing to do with it."""

import json
import os
import select
import socket
import time
from collections.abc import Callable
from errno import ECONNRESET, EKEYEXPIRED, EMSGSIZE, EPROTO, ESHUTDOWN

import pytest

from srpcd import ipc
from srpcd.wire import frames, messages
from srpcd.wire.frames import AUTH, CALL, HEADER, PING, WALK, frame
from tests.gate.client import Client
from tests.gate.fake_worker import Worker
from tests.gate.world import World
from tests.lingering import send_lingering

Start = Callable[..., World]


def fails(client: Client) -> int:
    """The errno of the next reply."""
    kind, _, body = client.frame()
    assert kind == frames.ERROR
    return messages.decode(messages.Error, body).errno


BROKEN = [
    (frame(99, 7), EPROTO),
    (frame(frames.PING_REPLY, 7), EPROTO),
    (HEADER.pack(WALK, 7, 2**63), EMSGSIZE),
    (HEADER.pack(CALL, 7, 2**64 - 1), EMSGSIZE),
    (frame(WALK, 7, b"[" * 60_000), 74),
    (frame(WALK, 7, b"\xff"), 74),
    (frame(99, 7) + bytes(500_000), EPROTO),
]


@pytest.mark.parametrize(("data", "errno"), BROKEN)
def test_broken_input_is_answered_and_ends_that_connection_only(world: World, data: bytes, errno: int) -> None:
    other = world.connect()
    client = world.connect()
    try:
        client.send(data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert fails(client) == errno
    assert client.over()
    assert other.ask(PING) is not None


def test_garbage_instead_of_a_handshake_ends_that_connection_only(start: Start) -> None:
    world = start("tls")
    other = world.connect()
    client = world.connect(handshake=False)
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert client.over()
    assert other.ask(PING) == {}


def test_a_request_that_drips_in_is_answered(world: World) -> None:
    client = world.connect()
    for byte in frame(PING, 1):
        client.send(bytes((byte,)))
        time.sleep(0.002)
    assert client.frame()[0] == frames.PING_REPLY


def test_a_hang_up_closes_the_connection_at_the_worker(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("late")
    client.request(CALL, messages.call_body(3, b""))
    world.until(lambda: world.workers[1].late)
    client.sock.close()
    world.until(lambda: (ipc.CLOSE, client.number, b"") in world.workers[1].got)
    world.release()
    other = world.connect()
    other.log_in()
    other.walk("echo")
    assert other.call(b"x") == b"x"


def test_a_workers_death_is_one_error_for_each_call_and_the_next_call_has_another_worker(world: World) -> None:
    client = world.connect()
    client.log_in("alice", 1, 2)
    client.log_in("bob", 11, 12)
    client.walk("late", 3)
    client.walk("die", 4)
    client.walk("echo", 5)
    client.walk("late", 13, 12)
    client.request(CALL, messages.call_body(13, b"bob's"))
    seqs = {client.request(CALL, messages.call_body(3, b"")) for _ in range(5)}
    seqs.add(client.request(CALL, messages.call_body(4, b"")))
    died = set()
    for _ in seqs:
        kind, seq, body = client.frame()
        assert (kind, messages.decode(messages.Error, body).errno) == (frames.ERROR, ECONNRESET)
        died.add(seq)
    assert died == seqs
    assert client.call(b"again", 5) == b"again"
    assert world.heard(ipc.Resume)[0].session == 100
    world.release()
    assert client.frame()[2][4:] == b"bob's"


def test_a_dead_worker_that_the_monitor_still_names_is_asked_for_again(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("echo")
    world.hand_out_dead = 2
    world.workers[1].close()
    assert client.call(b"x") == b"x"
    assert len(world.heard(ipc.Resume)) == 3


def test_a_worker_that_does_not_come_back_is_an_error_in_bounded_time(local: World) -> None:
    client = local.connect()
    client.log_in()
    client.walk("echo")
    local.hand_out_dead = 1000
    local.workers[1].close()
    assert client.call(b"x") == ECONNRESET
    local.hand_out_dead = 0
    assert client.call(b"x") == b"x"


def test_calls_that_wait_for_a_worker_can_be_flushed_or_refused(local: World) -> None:
    client = local.connect()
    client.log_in()
    client.walk("echo")
    local.on[ipc.Resume] = lambda _message: None
    local.workers[1].close()
    call = client.request(CALL, messages.call_body(3, b"x"))
    other = client.request(CALL, messages.call_body(3, b"y"))
    resume = local.heard(ipc.Resume)[0]
    flush = client.request(frames.FLUSH, frames.SEQ.pack(call))
    assert [client.frame()[:2] for _ in range(2)] == [(frames.ERROR, call), (frames.FLUSH_REPLY, flush)]
    local.tell(ipc.SessionOver(client.number, 100))
    local.tell(ipc.Refused(client.number, resume.request, EKEYEXPIRED, ""))
    assert client.frame()[:2] == (frames.ERROR, other)
    assert client.call() == EKEYEXPIRED
    assert len(local.heard(ipc.Resume)) == 1


def test_a_worker_that_talks_nonsense_is_done_with(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("broken")
    client.walk("echo", 4)
    assert client.call() == ECONNRESET
    assert client.call(b"x", 4) == b"x"


def test_an_ended_session_is_expired_and_the_user_attaches_again(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("echo")
    world.tell(ipc.SessionOver(client.number, 100))
    assert client.ask(PING) is not None
    world.until(lambda: client.call() == EKEYEXPIRED)
    assert client.ask(frames.ATTACH, messages.Attach(1, 9, "alice"))["is_dir"]
    client.walk("echo", 10, 9)
    assert client.call(b"x", 10) == b"x"


# --- the end -----------------------------------------------------------------------------------------------------------


def test_a_drained_gate_finishes_what_it_has_says_so_and_exits_when_told(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("late")
    client.request(CALL, messages.call_body(3, b"last"))
    world.until(lambda: world.workers[1].late)
    world.tell(ipc.Drain(5000))
    world.until(lambda: client.call() == ESHUTDOWN)
    late = world.connect(handshake=False)
    assert late.over()
    world.release()
    assert client.frame()[2][4:] == b"last"
    world.until(lambda: any(isinstance(each, ipc.Drained) for each in world.said))
    world.monitor.close()
    assert client.over()
    assert world.exit_code() == 0


def test_a_drained_gate_answers_what_is_outstanding_when_the_time_is_over(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("late")
    client.request(CALL, messages.call_body(3, b""))
    world.until(lambda: world.workers[1].late)
    world.tell(ipc.Drain(100))
    assert fails(client) == ESHUTDOWN
    assert client.over()
    assert world.exit_code() == 0


def test_a_gate_ends_with_its_monitor(world: World) -> None:
    client = world.connect()
    client.log_in()
    world.monitor.close()
    assert world.exit_code() == 0
    assert client.over()


def test_a_gate_is_confined_and_ignores_the_signals_that_are_for_the_monitor(local: World) -> None:
    local.heard(ipc.Ready)
    with open(f"/proc/{local.pid}/status") as file:
        facts = dict(line.split(":\t", 1) for line in file.read().splitlines())
    assert facts["NoNewPrivs"] == "1"
    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 0
    os.kill(local.pid, 15)
    os.kill(local.pid, 2)
    assert local.connect().ask(PING) == {"tree": "/the/tree"}


def test_a_client_can_not_pass_descriptors_to_a_gate(local: World) -> None:
    client = local.connect()
    client.ask(PING)
    before = len(os.listdir(f"/proc/{local.pid}/fd"))
    try:
        socket.send_fds(client.sock, [frame(PING, 1)], [0])
    except OSError:
        client.send(frame(PING, 1))  # the kernel refuses them (SO_PASSRIGHTS)
    assert client.frame()[0] == frames.PING_REPLY
    assert len(os.listdir(f"/proc/{local.pid}/fd")) == before


def test_descriptors_that_are_slow_to_release_hold_up_no_other_client(start: Callable[..., World]) -> None:
    """On a kernel that can't refuse them: all connections of that user end, and the monitor is told."""
    local = start("local", program="older.py")
    mallory, again, other = local.connect(), local.connect(), local.connect(peer="uid:2")
    assert other.ask(PING)
    kept: list[socket.socket] = []
    for _ in range(5):
        kept += [send_lingering(each.sock, frame(PING, 1), 60) for each in (mallory, again)]
    assert other.ask(PING)
    assert mallory.over()
    assert again.over()
    assert other.ask(PING)
    assert len(local.heard(ipc.DescriptorsSent)) == 1
    for each in kept:
        each.close()


def test_an_honest_client_of_a_gate_on_an_older_kernel_is_served_as_ever(start: Callable[..., World]) -> None:
    local = start("local", program="older.py")
    client = local.connect()
    client.log_in()
    client.walk("echo")
    end = time.monotonic() + 1.0  # in which ten signals come
    while time.monotonic() < end:
        assert client.call(b"x" * 1000) == b"x" * 1000


def test_nothing_is_left_of_connections_that_are_over(world: World) -> None:
    def fds() -> int:
        return len(os.listdir(f"/proc/{world.pid}/fd"))

    first = world.connect()
    first.log_in()
    first.walk("late")
    before = fds()
    for _ in range(20):
        client = world.connect()
        client.log_in()
        client.walk("late")
        client.request(CALL, messages.call_body(3, b""))
        client.request(AUTH, messages.Auth(50, "bob"))
        client.sock.close()
    world.until(lambda: fds() == before)


def test_a_worker_that_ends_with_something_unread_ends_no_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # The gate's next read then fails with ECONNRESET, where it otherwise is at an end of file.
    def end_with_something_unread(self: Worker, *_: object) -> None:
        select.select([self.fd], [], [], 10)
        self.close()

    other = world.connect()
    other.log_in("bob")
    client = world.connect()
    client.log_in()
    client.walk("die")
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "call", end_with_something_unread)
        sent = [client.request(CALL, messages.call_body(3, b""))]
        time.sleep(0.2)  # in which the worker has taken the first
        sent.append(client.request(CALL, messages.call_body(3, b"")))
        answers = [client.frame() for _ in sent]
    assert [(kind, seq, json.loads(body)["errno"]) for kind, seq, body in answers] == [
        (frames.ERROR, seq, ECONNRESET) for seq in sent
    ]
    assert client.ask(PING) is not None
    other.walk("echo")
    assert other.call(b"x") == b"x"
