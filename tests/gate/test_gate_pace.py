"""The pace of a transfer: who is too slow, and who is not."""

from hypothesis import given
from hypothesis import strategies as st

from srpcd.config import Limits
from srpcd.gate.pace import Transfer
from srpcd.wire.limits import LARGE, MIB

LIMITS = Limits(stall=20.0, pace=16384)


def late_at(rate: float, pinned: int, *, until: int = 4000, records: bool = False, fast: int = 0) -> int:
    """After how many seconds a peer is late that moves `rate` bytes a second (after `fast` bytes at once); 0: never."""
    transfer, done = Transfer(LIMITS, records=records), 0.0
    transfer.late(0.0, 1, 0, pinned)
    done += fast
    for now in range(1, until):
        done += rate
        if transfer.late(float(now), 1, int(done), pinned):
            return now
    return 0


def test_a_large_transfer_that_trickles_is_late_soon_after_the_stall() -> None:
    assert late_at(0.05, 16 * MIB) == 21
    assert 21 <= late_at(1000, 16 * MIB) <= 23
    assert late_at(20_000, 16 * MIB) == 0


def test_a_fast_beginning_buys_nothing() -> None:
    assert late_at(0.05, 16 * MIB, fast=15 * MIB) in (21, 22)


def test_what_pins_little_may_be_slow_but_not_for_ever() -> None:
    assert late_at(900, LARGE - 1) == 0
    assert 20 < late_at(1 / 19, LARGE - 1) < 25


def test_a_record_on_its_way_gets_its_time() -> None:
    assert late_at(0, 16 * MIB, records=True) == 22
    assert late_at(0, LARGE - 1, records=True) == 41


def test_the_clock_stands_still_while_the_peer_is_halted() -> None:
    transfer = Transfer(LIMITS)
    assert not transfer.late(0.0, 1, 0, MIB)
    for now in range(1, 500):
        assert not transfer.late(float(now), 1, 0, MIB, halted=True)
    assert not transfer.late(515.0, 1, 0, MIB)
    assert transfer.late(520.0, 1, 0, MIB)


def test_a_hurried_transfer_has_to_move_faster_where_it_pins_much() -> None:
    for pinned, rate, hurried, late in (
        (MIB, 2, False, False),
        (MIB, 2, True, True),
        (MIB, 17, True, False),
        (9, 2, True, False),
    ):
        transfer = Transfer(LIMITS)
        looks = [
            transfer.late(float(now), 1, now * rate * LIMITS.pace, pinned, hurried=hurried and now > 30)
            for now in range(100)
        ]
        assert any(looks) == late
        assert not any(looks[:50])


def test_another_transfer_begins_anew_and_none_is_never_late() -> None:
    transfer = Transfer(LIMITS)
    for now in range(0, 1000, 15):
        assert not transfer.late(float(now), 1 + now, 0, MIB)
    for now in range(1000, 2000, 15):
        assert not transfer.late(float(now), 0, 0, 0)


@given(st.lists(st.integers(1, 19), min_size=1, max_size=50))
def test_who_keeps_the_pace_between_all_looks_is_never_late(pauses: list[int]) -> None:
    transfer, now, done = Transfer(LIMITS), 0, 0
    transfer.late(0.0, 1, 0, 16 * MIB)
    for pause in pauses:
        now += pause
        done += pause * LIMITS.pace
        assert not transfer.late(float(now), 1, done, 16 * MIB)
