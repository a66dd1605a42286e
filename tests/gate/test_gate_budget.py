"""The budget of a gate's memory: who may take how much, and in which order those who wait are asked again."""

from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from srpcd.gate.budget import Budget, Holding, Share

MIB = 1 << 20
BODY = 16 * MIB


def budget_of(size: int) -> tuple[Budget, Mock]:
    wake = Mock()
    return Budget(size, wake), wake


def greedy(budget: Budget, share: Share) -> list[Holding]:
    """Reserve for this origin until it gets nothing more."""
    got = []
    while (holding := Holding(budget, share)).reserve(BODY, Mock()):
        got.append(holding)
    holding.clear()
    return got


def test_an_origin_alone_gets_half_and_leaves_as_much_for_the_next() -> None:
    budget, _wake = budget_of(256 * MIB)
    assert len(greedy(budget, Share())) == 8
    assert len(greedy(budget, Share())) == 4
    assert len(greedy(budget, Share())) == 2
    assert Holding(budget, Share()).reserve(BODY, Mock())
    assert budget.held <= budget.size


def test_greedy_origins_leave_room_for_a_newcomer() -> None:
    budget, _wake = budget_of(256 * MIB)
    shares = [Share() for _ in range(10)]
    for _ in range(16):
        for share in shares:
            Holding(budget, share).reserve(BODY, Mock())
    assert budget.held <= budget.size
    assert Holding(budget, Share()).reserve(BODY, Mock())


def test_who_waits_is_asked_again_in_order_and_once() -> None:
    budget, wake = budget_of(64 * MIB)
    share = Share()
    first, *others = greedy(budget, share)
    asked = []
    waiting = [Holding(budget, share) for _ in range(3)]
    for at, holding in enumerate(waiting):
        assert not holding.reserve(BODY, lambda at=at: asked.append(at))  # type: ignore[misc]
    waiting[1].clear()
    wake.assert_not_called()
    first.unreserve()
    first.unreserve()  # nothing is left to give back
    for holding in others:
        holding.unreserve()
    wake.assert_called_once_with()
    budget.offer()
    assert asked == [0, 2]
    budget.offer()
    assert asked == [0, 2]


def test_what_is_held_is_counted_without_asking_and_keeps_its_origin_from_more() -> None:
    budget, wake = budget_of(64 * MIB)
    share = Share()
    holding = Holding(budget, share)
    holding.hold(40 * MIB)
    holding.hold(40 * MIB)
    assert (budget.held, budget.peak, budget.free) == (40 * MIB, 40 * MIB, 24 * MIB)
    assert (holding.over, Holding(budget, Share()).over) == (True, False)
    assert not holding.reserve(BODY, Mock())
    holding.hold(MIB)
    wake.assert_called_once_with()
    assert (holding.over, budget.held) == (False, MIB)
    assert budget.peak == 40 * MIB


def test_who_came_early_has_to_hurry_while_a_newcomer_waits() -> None:
    budget, _wake = budget_of(64 * MIB)
    first, second, third = Share(), Share(), Share()
    early, late = greedy(budget, first)[0], greedy(budget, second)[0]
    assert greedy(budget, third)
    more = Holding(budget, first)
    assert not more.reserve(BODY, Mock())
    budget.look()
    assert not early.greedy  # only an origin with more than its part waits
    newcomer = Holding(budget, Share())
    assert not newcomer.reserve(BODY, Mock())
    budget.look()
    assert (early.greedy, late.greedy) == (True, False)
    early.clear()
    budget.offer()
    assert newcomer.reserve(BODY, Mock())
    budget.look()
    assert (budget.contended, more.greedy) == (False, False)


def test_an_origin_that_holds_nothing_is_never_over() -> None:
    budget, _wake = budget_of(64 * MIB)
    Holding(budget, Share()).hold(100 * MIB)
    assert budget.free < 0
    assert not Holding(budget, Share()).over


def test_a_holding_takes_what_it_has_to_another_origin() -> None:
    budget, _wake = budget_of(64 * MIB)
    one, other = Share(), Share()
    holding = Holding(budget, one)
    assert holding.reserve(BODY, Mock())
    holding.hold(5)
    holding.move(other)
    assert (one.held, other.held, budget.held) == (0, BODY + 5, BODY + 5)
    holding.clear()
    assert (one.held, other.held, budget.held) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 40 * MIB)), max_size=60))
def test_sums_agree_and_reservations_never_exceed_the_budget(steps: list[tuple[int, int, int]]) -> None:
    budget, _wake = budget_of(64 * MIB)
    shares = [Share(), Share()]
    holdings = [Holding(budget, shares[at % 2]) for at in range(6)]
    for at, what, size in steps:
        holding = holdings[at]
        if what == 0:
            holding.unreserve()
            held = budget.held
            if holding.reserve(size, Mock()):
                assert held + size <= budget.size
        elif what == 1:
            holding.hold(size)
        elif what == 2:
            holding.move(shares[size % 2])
        else:
            holding.clear()
        assert budget.held == sum(each.held for each in shares) == sum(each.held + each.reserved for each in holdings)
        assert budget.peak >= budget.held
    for holding in holdings:
        holding.clear()
    assert budget.held == shares[0].held == shares[1].held == 0
