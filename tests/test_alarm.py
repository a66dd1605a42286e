"""The descriptor that a loop is woken up by in time."""

import os
import select
import time
from collections.abc import Iterator

import pytest

from srpcd.alarm import Alarm

SOON = 0.05


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    yield made
    made.close()


def gone_off(alarm: Alarm, seconds: float = 0.0) -> bool:
    return bool(select.select([alarm.fd], [], [], seconds)[0])


def test_it_goes_off_at_its_time_and_not_before(alarm: Alarm) -> None:
    when = time.monotonic() + SOON
    alarm.set(when)
    assert not gone_off(alarm)
    assert gone_off(alarm, 5)
    assert time.monotonic() >= when


@pytest.mark.parametrize("when", [0.0, 1e-9, 1.0])
def test_a_time_that_is_over_is_now(alarm: Alarm, when: float) -> None:
    alarm.set(when)
    assert gone_off(alarm, 5)


def test_it_goes_off_once(alarm: Alarm) -> None:
    alarm.set(1.0)
    assert gone_off(alarm, 5)
    alarm.clear()
    assert not gone_off(alarm, SOON)


def test_what_is_set_takes_the_place_of_what_was_set(alarm: Alarm) -> None:
    alarm.set(1.0)
    alarm.set(time.monotonic() + 3600)
    assert not gone_off(alarm, SOON)
    alarm.clear()
    alarm.set(1.0)
    assert gone_off(alarm, 5)


def test_programs_do_not_inherit_it(alarm: Alarm) -> None:
    assert not os.get_inheritable(alarm.fd)


def test_a_failure_is_an_error(alarm: Alarm) -> None:
    alarm.fd, kept = -1, alarm.fd
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            alarm.set(1.0)
    finally:
        alarm.fd = kept
