"""How much of the log peers may cause, by a clock of the test's own."""

from srpcd.lograte import BURST_SECONDS, OVERHEAD_BYTES, WINDOW_SECONDS, WINDOWS_MAX, LogRate, Suppressed

LATER = WINDOW_SECONDS + 1


def rate(lines: int = 3, size: int = 1 << 30) -> LogRate:
    made = LogRate(lines, size)
    made.charge(0, 1000.0)
    return made


def test_the_first_lines_of_a_minute_are_written_and_the_rest_is_counted() -> None:
    bounded = rate(3)
    assert [bounded.admits("a", "k", 1000.0 + each) for each in range(10)] == [True] * 3 + [False] * 7
    assert bounded.suppressed(1059.9) == []
    assert bounded.suppressed(1060.0) == [Suppressed("a", "k", 7)]
    assert bounded.suppressed(1060.0) == []
    assert bounded.admits("a", "k", 1060.0)


def test_another_minute_begins_with_the_first_line_after_one() -> None:
    bounded = rate(1)
    assert bounded.admits("a", "k", 1000.0)
    assert not bounded.admits("a", "k", 1059.0)
    assert bounded.admits("a", "k", 1060.0)
    assert bounded.suppressed(1061.0) == [Suppressed("a", "k", 1)]


def test_origins_and_kinds_are_counted_apart() -> None:
    bounded = rate(1)
    assert all(bounded.admits(origin, kind, 1000.0) for origin in "ab" for kind in "kl")
    assert not bounded.admits("a", "k", 1000.0)


def test_nothing_is_said_of_those_who_stayed_below() -> None:
    bounded = rate(3)
    assert bounded.admits("a", "k", 1000.0)
    assert bounded.suppressed(1000.0 + LATER) == []


def test_lines_that_were_left_out_elsewhere_count() -> None:
    bounded = rate(1)
    assert bounded.admits("a", "k", 1000.0, 40)
    assert not bounded.admits("a", "k", 1000.0, 2)
    assert bounded.suppressed(0.0, last=True) == [Suppressed("a", "k", 43)]


def test_what_is_remembered_is_bounded_and_no_count_is_lost() -> None:
    bounded = rate(1)
    for number in range(3 * WINDOWS_MAX):
        bounded.admits(str(number), "k", 1000.0)
        bounded.admits(str(number), "k", 1000.0)
    assert len(bounded._windows) == WINDOWS_MAX
    assert sum(each.lines for each in bounded.suppressed(1000.0, last=True)) == 3 * WINDOWS_MAX
    assert bounded._windows == {}


def test_all_together_are_bounded_by_bytes() -> None:
    bounded = rate(size=1000)
    line = 100 + OVERHEAD_BYTES
    written = sum(bounded.pays(100, 1000.0) for _ in range(1000))
    assert written == int(BURST_SECONDS * 1000 / line)
    written = sum(bounded.pays(100, 1000.0 + second) for second in range(1, 101) for _ in range(100))
    assert abs(written - 100 * 1000 / line) <= 1
    left = 1000 + 100 * 100 - int(BURST_SECONDS * 1000 / line) - written
    assert bounded.unpaid(1000.0 + LATER) == left
    assert bounded.unpaid(2000.0) == 0


def test_that_something_was_left_out_is_said_a_minute_later_or_at_the_end() -> None:
    bounded = rate(size=1)
    assert not bounded.pays(1000, 1000.0)
    assert not bounded.pays(1000, 1000.0, lines=7)
    assert bounded.unpaid(1001.0) == 0
    assert bounded.unpaid(1001.0, last=True) == 8


def test_what_is_written_in_any_case_leaves_less_for_others_and_no_debt() -> None:
    bounded = rate(size=1000)
    for _ in range(1000):
        bounded.charge(1000, 1000.0)
    assert not bounded.pays(100, 1000.1)
    assert bounded.pays(100, 1001.0)


def test_other_bounds_hold_at_once() -> None:
    bounded = rate(1)
    assert bounded.admits("a", "k", 1000.0)
    bounded.configure(2, 1)
    assert bounded.admits("a", "k", 1000.0)
    assert not bounded.admits("a", "k", 1000.0)
    bounded._refill(1000.0)
    assert not bounded.pays(100, 1000.0)
