"""The real gate and those who are slow: memory stays bounded, and the others do not wait."""

import os
import socket
import time
from collections.abc import Callable
from errno import ECONNRESET, ETIMEDOUT

import pytest

from srpcd.records import Records
from srpcd.wire import frames, messages
from srpcd.wire.frames import AUTH, CALL, CALL_REPLY, PING, frame
from tests.gate.world import World

Start = Callable[..., World]


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_reader_that_takes_nothing_holds_a_bounded_part_of_memory_and_is_disconnected(start: Start) -> None:
    world = start("local", buffer=1 << 20, stall=0.5)
    slow, other = world.connect(), world.connect()
    for client, user in ((slow, "alice"), (other, "bob")):
        client.log_in(user)
        client.walk("size")
    before = resident(world.pid)
    sent = 40
    slow.send(b"".join(frame(CALL, 1000 + n, messages.call_body(3, b"1000000")) for n in range(sent)))
    assert other.call(b"10") == bytes(10)
    assert resident(world.pid) - before < 12 << 20
    time.sleep(0.8)
    slow.sock.settimeout(5)
    size = 0
    while data := slow.recv():
        size += len(data)
    assert size < sent * 1_000_000


@pytest.mark.parametrize("kind", ["local", "tls"])
def test_a_sender_that_stops_in_the_middle_of_a_message_is_disconnected(start: Start, kind: str) -> None:
    """What has come of it is kept, up to 16 MiB for each connection, and nothing else would end that for a long time."""
    world = start(kind, stall=0.5)
    slow, other = world.connect(), world.connect()
    for client, user in ((slow, "alice"), (other, "bob")):
        client.log_in(user)
        client.walk("echo")
    call = frame(CALL, 1000, messages.call_body(3, bytes(1 << 20)))
    for at in range(0, 1 << 19, 1 << 16):  # slower than that, but it goes on
        slow.send(call[at : at + (1 << 16)])
        time.sleep(0.1)
    kind_, _seq, body = slow.frame()
    assert (kind_, messages.decode(messages.Error, body).errno) == (frames.ERROR, ETIMEDOUT)
    assert slow.over()
    time.sleep(0.8)
    assert other.call(b"x") == b"x"  # who is between two messages may take his time


class Trickle:
    """A socket that takes little at a time, and that slowly."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fileno = sock.fileno

    def send(self, data: bytes) -> int:
        time.sleep(0.05)
        return self.sock.send(data[:1024])


def test_a_sender_may_take_longer_for_one_record_than_one_that_stops(start: Start) -> None:
    """Nothing of a record counts before it is whole; a line of 6 kbit/s needs 20 seconds for one."""
    world = start("tls", stall=0.5)
    slow = world.connect()
    slow.log_in()
    slow.walk("echo")
    assert slow.tls is not None
    records = Records(slow.tls, Trickle(slow.sock))
    records.send(frame(CALL, 1000, messages.call_body(3, bytes(40_000))))
    records.rest()
    assert slow.frame()[:2] == (CALL_REPLY, 1000)


def test_a_reader_that_pauses_gets_everything(start: Start) -> None:
    world = start("tls", buffer=1 << 17)
    client = world.connect(buffers={"SO_SNDBUF": 1 << 16})
    client.log_in()
    client.walk("size")
    seqs = [client.request(CALL, messages.call_body(3, b"300000")) for _ in range(20)]
    time.sleep(0.2)
    assert sorted(client.frame()[1] for _ in seqs) == seqs
    client.walk("echo", 4)
    assert client.call(b"x", 4) == b"x"


def test_a_worker_that_takes_nothing_stops_those_who_feed_it_and_is_given_up(start: Start) -> None:
    world = start("local", buffer=1 << 20, stall=0.5)
    client, other = world.connect(), world.connect()
    client.log_in("alice")
    client.walk("echo")
    other.log_in("bob")
    other.walk("echo")
    before = resident(world.pid)
    world.forget(world.workers[1].fd)
    client.sock.settimeout(0.2)
    body = messages.call_body(3, bytes(1 << 20))
    sent = 0
    try:
        for _ in range(100):
            client.send(frame(CALL, 1000 + sent, body))
            sent += 1
    except TimeoutError:
        pass
    assert sent < 20
    assert resident(world.pid) - before < 12 << 20
    assert other.call(b"x") == b"x"
    client.sock.settimeout(5)
    kind, _, reply = client.frame()
    assert (kind, messages.decode(messages.Error, reply).errno) == (frames.ERROR, ECONNRESET)


def test_a_monitor_that_is_busy_stops_the_clients_for_as_long(local: World) -> None:
    client = local.connect()
    client.log_in()
    local.forget(local.monitor.fileno())
    seqs = list(range(1000, 1600))
    bodies = [messages.encode(messages.Attach(1, seq, "alice")) for seq in seqs]
    client.send(b"".join(frame(frames.ATTACH, seq, body) for seq, body in zip(seqs, bodies, strict=True)))
    time.sleep(0.1)
    client.sock.settimeout(0.1)
    ping = client.request(PING)
    with pytest.raises(TimeoutError):
        client.frame()
    client.sock.settimeout(5)
    local.listen()
    assert sorted(client.frame()[1] for _ in range(601)) == [ping, *seqs]


@pytest.mark.parametrize("kind", ["local", "tls"])
def test_who_does_not_authenticate_in_time_is_disconnected_but_not_a_service(start: Start, kind: str) -> None:
    world = start(kind, authentication_timeout=0.3)
    known, stranger = world.connect(), world.connect()
    known.log_in()
    service = world.connect()
    if kind == "local":
        service.ask(frames.ANNOUNCE, messages.Announce(1, "calc"))
    stranger.ask(AUTH, messages.Auth(1, "alice"))
    begin = time.monotonic()
    assert stranger.over()
    assert 0.1 < time.monotonic() - begin < 1
    assert known.ask(PING) is not None
    if kind == "local":
        assert service.ask(PING) is not None


def test_who_does_not_finish_the_handshake_in_time_is_disconnected(start: Start) -> None:
    world = start("tls", handshake_timeout=0.3)
    client = world.connect(handshake=False)
    begin = time.monotonic()
    assert client.over()
    assert 0.2 < time.monotonic() - begin < 5  # the machine may be busy


def test_who_says_nothing_for_long_is_disconnected_unless_something_is_outstanding(start: Start) -> None:
    world = start("local", idle_timeout=0.3)
    idle, waiting, service = world.connect(), world.connect(), world.connect()
    for client in (idle, waiting):
        client.log_in()
        client.walk("late")
    waiting.request(CALL, messages.call_body(3, b""))
    service.ask(frames.ANNOUNCE, messages.Announce(1, "calc"))
    assert idle.over()
    time.sleep(0.2)
    world.release()
    assert waiting.frame()[0] == frames.CALL_REPLY
    assert service.ask(PING) is not None
