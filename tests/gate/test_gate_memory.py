"""The real gate and a user who pins as much of its memory as the bounds allow: others do not notice, and it comes back."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ETIMEDOUT

import pytest
from OpenSSL import SSL

from srpcd import ipc
from srpcd.wire import frames, messages
from srpcd.wire.frames import CALL, PING, frame
from srpcd.wire.limits import LARGE, MIB, PAYLOAD_MAX, STRANGER_MAX
from tests.gate.client import Client
from tests.gate.test_gate_large import payload_of, ready
from tests.gate.test_gate_slow import resident
from tests.gate.world import World

Start = Callable[..., World]

BUDGET = 64 * MIB
MARGIN = 48 * MIB
"""Bytes beside the budget: connections as such, calls that are being passed on, and what malloc has not given back yet."""

BODY = frame(CALL, 1000, messages.call_body(3, bytes(PAYLOAD_MAX)))


def pour(clients: list[Client], data: bytes, quiet: float = 1.0) -> list[int]:
    """Send `data` on each connection, as far as it goes: until nothing was taken for `quiet` seconds. Returns how much."""
    sent = [0] * len(clients)
    over: set[int] = set()
    for client in clients:
        client.sock.setblocking(False)
    last = time.monotonic()
    while len(over) < len(clients) and time.monotonic() - last < quiet:
        for at, client in enumerate(clients):
            if at in over:
                continue
            try:
                some = (client.tls or client.sock).send(data[sent[at] : sent[at] + MIB])
            except (BlockingIOError, SSL.WantWriteError):
                continue
            except (OSError, SSL.Error):
                over.add(at)
                continue
            sent[at] += some
            last = time.monotonic()
            if sent[at] == len(data):
                over.add(at)
        time.sleep(0.001)
    for client in clients:
        client.sock.setblocking(True)
    return sent


class Bystander:
    """Somebody else who calls all the time, and logs in anew."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls = self.large = self.logins = 0
        self.most = 0
        self.fault: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                client = ready(self.world, user="bob")
                self.logins += 1
                for _ in range(20):
                    assert client.call(b"small") == b"small"
                    self.calls += 1
                    self.most = max(self.most, resident(self.world.pid))
                assert client.call(payload_of(MIB)) == payload_of(MIB)
                self.large += 1
                client.sock.close()
                self._stop.wait(0.02)
        except BaseException as fault:  # shown by the test
            self.fault = fault

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.fault is not None:
            raise self.fault


@contextmanager
def many(world: World, count: int, path: str = "echo") -> Iterator[list[Client]]:
    clients = [ready(world, path, "alice") for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.sock.close()


def test_one_user_with_a_hundred_connections_pins_no_more_than_the_budget(world_of: Start, kind: str) -> None:
    """Bodies of the largest size less one byte: 1.6 GiB before there was a budget, and kept when the user had gone."""
    world = world_of(kind)
    bob = ready(world, user="bob")
    assert bob.call(payload_of(MIB)) == payload_of(MIB)
    before = resident(world.pid)
    with Bystander(world) as bystander, many(world, 100) as clients:
        sent = pour(clients, BODY[:-1])
        assert sum(sent) < 100 * MIB  # the others wait in the kernel's buffers
        assert sum(size == len(BODY) - 1 for size in sent) == 2
        bystander.most = max(bystander.most, resident(world.pid))
    assert bystander.most - before < BUDGET + MARGIN
    assert bystander.calls > 100
    assert bystander.large > 5
    assert bystander.logins > 5
    world.until(lambda: resident(world.pid) - before < 16 * MIB)


@pytest.fixture(params=["local", "tls"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world_of(start: Start) -> Start:
    def make(kind: str, **limits: object) -> World:
        return start(kind, **({"memory": BUDGET, "stall": 30.0} | limits))

    return make


def test_half_sent_calls_do_not_lock_each_other_out_for_ever(world_of: Start, kind: str) -> None:
    """A body that has its memory can always be finished. A client that does not finish it gets an error and makes room."""
    world = world_of(kind, stall=0.5)
    with many(world, 8) as clients:
        stuck, last = clients[:7], clients[7]
        pour(stuck, BODY[: LARGE * 3], 0.2)
        seq = last.request(CALL, messages.call_body(3, payload_of(PAYLOAD_MAX)))
        assert last.frame() == (frames.CALL_REPLY, seq, messages.call_reply_body(payload_of(PAYLOAD_MAX)))
        for client in stuck:
            reply, _seq, body = client.frame()
            assert (reply, messages.decode(messages.Error, body).errno) == (frames.ERROR, ETIMEDOUT)
            assert client.over()


def test_users_who_hold_more_than_their_part_have_to_hurry_while_another_waits(world_of: Start, kind: str) -> None:
    """Each of them keeps the pace, so the next one would wait for 1,044 seconds by default."""
    world = world_of(kind, stall=1.0, memory=80 * MIB)
    held = []
    for user, count in (("alice", 2), ("carol", 1), ("dave", 1)):
        held += [ready(world, user=user) for _ in range(count)]
        pour(held[-count:], BODY[: 4 * LARGE], 0.2)
    bob = ready(world, user="bob")
    answers: list[bytes] = []
    bob.sock.settimeout(60 if bob.tls is None else None)
    caller = threading.Thread(target=lambda: answers.append(bob.call(payload_of(PAYLOAD_MAX))), daemon=True)
    caller.start()
    begin, at = time.monotonic(), 4 * LARGE
    ended: list[Client] = []
    while not answers and time.monotonic() - begin < 60:
        time.sleep(0.1)
        for client in held:
            if client not in ended and select.select([client.sock], [], [], 0)[0]:
                ended.append(client)  # by an error: else nothing is sent to it
            elif client not in ended:
                client.send(BODY[at : at + 8192])
        at += 8192
    assert answers == [payload_of(PAYLOAD_MAX)]
    (client,) = ended
    assert client in held[:2]  # one of alice's, who has two, and that is enough
    assert messages.decode(messages.Error, client.frame()[2]).errno == ETIMEDOUT


@pytest.mark.parametrize("size", [40_000, MIB])
def test_a_sender_that_trickles_is_disconnected(world_of: Start, kind: str, size: int) -> None:
    """A sign of life before each stall is not enough."""
    world = world_of(kind, stall=0.5)
    slow, other = ready(world), ready(world, user="bob")
    data = frame(CALL, 1000, messages.call_body(3, bytes(size)))
    slow.send(data[: size // 2])
    begin = time.monotonic()
    slow.sock.setblocking(False)
    for at in range(size // 2, size):
        assert time.monotonic() - begin < 20, "it trickles for ever"
        try:
            slow.send(data[at : at + 1])
            slow.frames += slow.reader.feed(slow.recv())
        except (BlockingIOError, SSL.WantReadError):
            pass
        except (OSError, SSL.Error):
            break
        if slow.frames:
            break
        time.sleep(0.1)
    assert [messages.decode(messages.Error, body).errno for _kind, _seq, body in slow.frames] == [ETIMEDOUT]
    assert other.call(b"x") == b"x"


def test_a_reader_that_trickles_is_disconnected(world_of: Start, kind: str) -> None:
    world = world_of(kind, stall=0.5, buffer=MIB)
    slow = ready(world, "size", "alice", buffers={"SO_SNDBUF": 1 << 13, "SO_RCVBUF": 1 << 12})
    other = ready(world, user="bob")
    for _ in range(4):
        slow.request(CALL, messages.call_body(3, b"3000000"))
    begin = time.monotonic()
    got = 0
    while time.monotonic() - begin < 20:
        try:
            data = slow.sock.recv(512)
        except OSError:
            break
        if not data:
            break
        got += len(data)
        time.sleep(0.1)
    assert time.monotonic() - begin < 20, "it trickles for ever"
    assert got < MIB
    assert other.call(b"x") == b"x"


def test_slow_readers_of_one_user_pin_no_more_than_the_budget(world_of: Start, kind: str) -> None:
    """Each connection may have `limits.buffer` waiting, which would be 240 MiB here."""
    world = world_of(kind, buffer=4 * MIB)
    bob = ready(world, user="bob")
    assert bob.call(payload_of(MIB)) == payload_of(MIB)
    before = resident(world.pid)
    clients = [ready(world, "size", "alice", buffers={"SO_SNDBUF": 1 << 15}) for _ in range(60)]
    for client in clients:
        client.send(b"".join(frame(CALL, 1000 + at, messages.call_body(3, b"1000000")) for at in range(8)))
    most = 0
    for _ in range(20):
        time.sleep(0.1)
        most = max(most, resident(world.pid))
    assert most - before < BUDGET + MARGIN
    for client in clients:
        client.sock.close()
    assert bob.call(payload_of(MIB)) == payload_of(MIB)
    world.until(lambda: resident(world.pid) - before < 16 * MIB)


@pytest.mark.parametrize("peer", ["uid:1", "192.0.2.7:9"])
def test_several_workers_of_one_uid_have_one_part(start: Start, peer: str) -> None:
    """On the local socket, a process that has dropped groups gets another worker than its user's other processes."""
    world = start("local", memory=BUDGET, stall=30.0)
    clients = [ready(world, user=user, peer=peer) for user in ("alice", "alice2", "alice3") for _ in range(3)]
    sent = pour(clients, BODY[:-1], 0.5)
    assert (sum(size == len(BODY) - 1 for size in sent) == 2) == (peer == "uid:1")
    bob = ready(world, user="bob", peer="uid:2")
    assert bob.call(b"small") == b"small"
    if peer == "uid:1":
        assert bob.call(payload_of(PAYLOAD_MAX)) == payload_of(PAYLOAD_MAX)


def test_a_user_who_ends_the_own_worker_again_and_again_has_one_part(start: Start) -> None:
    """Its connections that keep what they hold, and those that have the next worker, are one user's."""
    world = start("local", memory=BUDGET, stall=30.0)
    whole, clients = 0, []
    for _ in range(3):
        clients += (some := [ready(world, user="alice", peer="192.0.2.7:9") for _ in range(3)])
        whole += sum(size == len(BODY) - 1 for size in pour(some, BODY[:-1], 0.5))
        (worker,) = world.workers.values()
        worker.close()
        world.until(lambda: not world.workers)
    assert whole == 2
    bob = ready(world, user="bob", peer="192.0.2.8:9")
    assert bob.call(payload_of(PAYLOAD_MAX)) == payload_of(PAYLOAD_MAX)


def test_a_user_over_its_share_still_makes_small_calls(world_of: Start, kind: str) -> None:
    world = world_of(kind)
    with many(world, 8) as clients:
        pour(clients, BODY[:-1], 0.3)
        alice = ready(world)
        assert alice.call(payload_of(LARGE // 2)) == payload_of(LARGE // 2)
        assert isinstance(alice.ask(PING), dict)


def test_those_who_have_not_authenticated_share_one_part(world_of: Start, kind: str) -> None:
    world = world_of(kind)
    bob = ready(world, user="bob")
    before = resident(world.pid)
    strangers = [world.connect() for _ in range(60)]
    body = frames.HEADER.pack(frames.APPEND, 1, STRANGER_MAX) + bytes(STRANGER_MAX)
    pour(strangers, body[:-1], 0.5)
    assert resident(world.pid) - before < BUDGET // 2 + MARGIN // 2
    assert bob.call(payload_of(PAYLOAD_MAX)) == payload_of(PAYLOAD_MAX)
    for client in strangers:
        client.sock.close()


def test_a_worker_that_stops_in_the_middle_of_a_large_answer_is_given_up(start: Start) -> None:
    """Also when the call's client has gone, so that nothing is outstanding there."""
    world = start("local", stall=0.5)
    alice = ready(world, "late")
    alice.request(CALL, messages.call_body(3, b"x"))
    world.until(lambda: world.workers[1].late)
    worker = world.workers[1]
    tag, _rest = worker.late.pop()
    os.write(worker.fd, frames.HEADER.pack(ipc.CALLED, tag, MIB) + bytes(60_000))
    alice.sock.shutdown(socket.SHUT_RDWR)
    world.until(lambda: worker.fd < 0)  # it sees that the gate has closed the socket
