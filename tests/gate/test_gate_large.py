"""The real gate and large payloads: whole or not at all, in bounded memory, and without anybody waiting for another."""

import os
import time
from collections.abc import Callable
from errno import ECONNRESET
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc
from srpcd.wire import frames, messages
from srpcd.wire.frames import CALL, PING, frame
from srpcd.wire.limits import LARGE, MIB, PAYLOAD_MAX
from tests.gate.fake_worker import Worker
from tests.gate.test_gate_slow import resident
from tests.gate.world import World
from tests.realm.processes import until

if TYPE_CHECKING:
    from tests.gate.client import Client

Start = Callable[..., World]

SIZES = [LARGE - 30, LARGE, LARGE + 1, 2 * LARGE, MIB, MIB + 1, 5 * MIB + 17, PAYLOAD_MAX]


def payload_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def ready(world: World, path: str = "echo", user: str = "alice", **options: object) -> "Client":
    """Somebody who is logged in and has walked to fid 3."""
    client = world.connect(**options)
    client.sock.settimeout(20 if client.tls is None else None)
    client.log_in(user)
    client.walk(path)
    return client


@pytest.mark.parametrize("size", SIZES)
def test_a_payload_goes_both_ways_unchanged(world: World, size: int) -> None:
    client = ready(world)
    payload = payload_of(size)
    for metadata in (b"", b'{"a":1}'):
        seq = client.request(CALL, messages.call_body(3, payload, metadata))
        assert client.frame() == (frames.CALL_REPLY, seq, messages.call_reply_body(payload, metadata))
        assert client.call(b"small") == b"small"


@pytest.mark.parametrize("cut", [1, 20, 30, 32, 60, 16384, 16385, 65536, 65568, 70_000, -70_000, -65536, -1])
def test_a_large_call_may_come_in_pieces_cut_anywhere(world: World, cut: int) -> None:
    client = ready(world)
    payload = payload_of(3 * LARGE)
    for seq in (100, 101):
        data = frame(CALL, seq, messages.call_body(3, payload)) + frame(PING, seq + 10)
        client.send(data[:cut])
        time.sleep(0.02)
        client.send(data[cut:])
        assert sorted(client.frame()[:2] for _ in range(2)) == [(frames.CALL_REPLY, seq), (frames.PING_REPLY, seq + 10)]


def test_large_and_small_calls_of_one_connection_do_not_mix_up(world: World) -> None:
    client = ready(world)
    payloads = [payload_of(size) for size in (10, MIB, 3, 100_000, LARGE, 5, MIB + 7, 1, LARGE + 1)]
    client.send(b"".join(frame(CALL, 100 + at, messages.call_body(3, payload)) for at, payload in enumerate(payloads)))
    for _ in payloads:
        kind, seq, body = client.frame()
        assert kind == frames.CALL_REPLY
        assert body[4:] == payloads[seq - 100]


def test_who_stops_in_the_middle_of_a_large_call_holds_up_nobody(world: World) -> None:
    # The same user, so the same worker and the same pipe to it.
    slow, other = ready(world), ready(world)
    data = frame(CALL, 100, messages.call_body(3, payload_of(4 * MIB)))
    slow.send(data[: 3 * MIB])
    for _ in range(3):
        assert other.call(b"meanwhile") == b"meanwhile"
        assert other.call(payload_of(MIB)) == payload_of(MIB)
    slow.send(data[3 * MIB :])
    assert slow.frame() == (frames.CALL_REPLY, 100, messages.call_reply_body(payload_of(4 * MIB)))


def test_a_header_that_announces_much_costs_little(start: Start) -> None:
    world = start("local")
    clients = [ready(world) for _ in range(20)]
    other = ready(world)
    before = resident(world.pid)
    for client in clients:
        client.send(frame(CALL, 100, messages.call_body(3, bytes(PAYLOAD_MAX)))[:500])
    assert other.call(b"x") == b"x"
    assert resident(world.pid) - before < 4 * MIB


def test_a_worker_that_dies_in_the_middle_of_a_large_answer_is_one_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_in_between(self: Worker, tag: int, name: bytes, rest: bytes) -> None:
        data = frame(ipc.CALLED, tag, bytes(MIB))
        os.write(self.fd, data[:50_000])
        self.close()

    client = ready(world)
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "call", die_in_between)
        assert client.call(b"") == ECONNRESET
    assert isinstance(client.ask(PING), dict)  # the connection goes on
    assert client.call(b"another worker") == b"another worker"


def test_large_answers_wait_for_a_slow_reader_in_bounded_memory_and_come_whole(start: Start) -> None:
    world = start("tls", buffer=MIB)
    client = ready(world, "size", buffers={"SO_SNDBUF": 1 << 16})
    before = resident(world.pid)
    seqs = [client.request(CALL, messages.call_body(3, b"3000000")) for _ in range(12)]
    time.sleep(0.3)
    assert resident(world.pid) - before < 16 * MIB  # of 36 MB
    found = [client.frame() for _ in seqs]
    assert sorted(seq for _, seq, _ in found) == seqs
    assert all(len(body) == 3_000_004 for _, _, body in found)
    assert client.walk("echo", 5)
    assert client.call(b"small", 5) == b"small"


def test_a_reader_that_stops_in_the_middle_of_a_large_answer_is_disconnected(start: Start) -> None:
    world = start("tls", stall=0.5)
    client = ready(world, "size", buffers={"SO_SNDBUF": 1 << 16})
    other = ready(world, "echo", "bob")
    client.request(CALL, messages.call_body(3, b"3000000"))
    time.sleep(1.2)
    assert other.call(b"x") == b"x"
    with pytest.raises(AssertionError, match="hung up"):
        client.frame()


def test_a_reader_that_takes_a_little_at_a_time_is_not_disconnected(start: Start) -> None:
    world = start("tls", stall=1.0)
    client = ready(world, "size", buffers={"SO_SNDBUF": 1 << 13})
    client.request(CALL, messages.call_body(3, b"300000"))
    for _ in range(12):  # 16 KiB in each, so less than TLS is given at once in the time that is allowed
        time.sleep(0.25)
        client.frames += client.reader.feed(client.recv())
    assert client.frame()[2] == bytes(300_004)


@pytest.mark.parametrize("kind", ["local", "tls"])
def test_the_last_words_come_behind_a_large_answer(start: Start, kind: str) -> None:
    world = start(kind)
    client = ready(world, "size")
    client.send(frame(CALL, 100, messages.call_body(3, b"3000000")))
    assert client.frame()[1] == 100
    client.send(frame(99, 101))
    assert client.frame()[:2] == (frames.ERROR, 101)
    assert client.over()


def test_a_connection_that_has_carried_much_needs_little_when_it_rests(start: Start) -> None:
    world = start("tls")
    warm = ready(world)
    assert warm.call(payload_of(2 * MIB)) == payload_of(2 * MIB)
    clients = [ready(world) for _ in range(40)]
    before = resident(world.pid)
    for client in clients:
        assert client.call(payload_of(2 * MIB)) == payload_of(2 * MIB)
    # The allocator keeps a few MiB for all of them together; a payload kept for each would be 80 MiB.
    assert until(lambda: resident(world.pid) - before < 8 * MIB, 60, 0.1), resident(world.pid) - before
    for client in clients:
        assert client.call(b"still there") == b"still there"
