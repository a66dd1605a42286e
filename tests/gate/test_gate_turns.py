"""The real gate and a user who sends many small requests on many connections: others do not wait for all of them."""

import os
import select
import signal

from srpcd.gate.budget import TURN, Share
from srpcd.wire.frames import CLUNK, PING, frame
from tests.gate.test_gate_large import ready
from tests.gate.world import World

COUNT, ROUNDS = 40, 8
FLOOD = b"".join(frame(CLUNK, seq, b'{"fid":99}') for seq in range(1000, 1400))


def test_who_sends_much_on_many_connections_is_not_seen_to_before_everybody_else(world: World) -> None:
    """It is all there before another one asks, and takes the gate milliseconds for each connection."""
    bob = ready(world, user="bob", peer="uid:2")
    flood = [ready(world, user="alice", peer="uid:1") for _ in range(COUNT)]
    before_bob = 0
    for _ in range(ROUNDS):
        os.kill(world.pid, signal.SIGSTOP)
        for client in flood:
            client.send(FLOOD)
        bob.send(frame(PING, 1000))
        os.kill(world.pid, signal.SIGCONT)
        assert bob.frame()[:2] == (PING + 1, 1000)
        os.kill(world.pid, signal.SIGSTOP)
        before_bob += len(select.select([client.sock for client in flood], [], [], 0)[0])
        os.kill(world.pid, signal.SIGCONT)
        for client in flood:  # each of them has its turn
            while client.frame()[1] != 1399:
                pass
    assert before_bob < ROUNDS * COUNT // 4


def test_an_origin_has_so_much_time_in_each_pass_and_one_event_at_least() -> None:
    share = Share()
    assert share.has_turn(1.0)
    share.spend(TURN / 2)
    assert share.has_turn(1.0)
    share.spend(TURN)
    assert not share.has_turn(1.0)
    assert share.has_turn(2.0)
    assert Share().has_turn(1.0)
