"""timerfd_create(2), which Python 3.11 does not have: a descriptor that can be read from a given moment on.

A loop that waits for it among its other descriptors needs no timeout. With one, the kernel sets a timer up at each wait and
takes it down again at the event that is waited for: half a microsecond, for each hop of each call.
"""

import os
from _ctypes import Array, byref

from srpcd.libc import Int, Long, Pointer, failed, function

_MONOTONIC, _ABSOLUTE = 1, 1  # CLOCK_MONOTONIC, TFD_TIMER_ABSTIME
_NANO = 1_000_000_000


class _Setting(Array):  # type: ignore[type-arg]
    """struct itimerspec: interval, first time; seconds and nanoseconds of each."""

    _type_ = Long
    _length_ = 4


_create = function("timerfd_create", Int, Int, Int)
_settime = function("timerfd_settime", Int, Int, Int, Pointer, Pointer)
_setting = _Setting()
_setting_reference = byref(_setting)


class Alarm:
    """One alarm. fd: readable when it has gone off, until `clear`. Raises OSError."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = _create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            failed("timerfd_create")

    def set(self, when: float) -> None:
        """Go off at this time (by time.monotonic), once, in the place of what was set before. Raises OSError."""
        _setting[2], _setting[3] = divmod(max(1, int(when * _NANO)), _NANO)  # 0 would be never
        if _settime(self.fd, _ABSOLUTE, _setting_reference, None) < 0:
            failed("timerfd_settime")

    def clear(self) -> None:
        """After it has gone off: be silent until it is set anew."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            pass  # it was set anew meanwhile

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
