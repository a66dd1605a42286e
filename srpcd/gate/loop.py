"""One epoll loop: readers, writers and timers, each called directly.

The methods are named as asyncio's and mean the same. What they save is everything between an event and its callback (a
handle, a queue, a context): a tenth of a gate's time for a lone call. Events are level-triggered. A descriptor has to be
removed before it is closed: the monitor has duplicates of the clients' sockets, for which epoll would go on to report.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from select import EPOLLIN, EPOLLOUT, epoll
from time import monotonic
from typing import Any

from srpcd.alarm import Alarm

INFINITY = float("inf")

EVENTS = 128
"""Descriptors that are seen to in one pass. Those beyond are first in the next one: the kernel takes turns."""


class Loop:
    """The loop of one gate. time: its clock, monotonic seconds. now: what it said when this pass began."""

    __slots__ = ("_alarm", "_alarm_set", "_epoll", "_first", "_number", "_readers", "_running", "_timers", "_writers", "now")

    time = staticmethod(monotonic)

    def __init__(self) -> None:
        self._epoll = epoll()
        self._readers: dict[int, Callable[[], object]] = {}
        self._writers: dict[int, Callable[[], object]] = {}
        self._timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._first = 0  # counts passes, so that each begins with another one of those that are always ready
        self._number = 0  # of the last timer: those that are due at the same time keep their order
        self._running = False
        self._alarm = Alarm()
        self._alarm_set = INFINITY  # when it goes off
        self.add_reader(self._alarm.fd, self._went_off)
        self.now = monotonic()

    # --- descriptors ---------------------------------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` whenever there is something to read, an end of file or an error."""
        self._change(fd, self._readers, callback)

    def remove_reader(self, fd: int) -> None:
        """No longer."""
        if fd in self._readers:
            self._change(fd, self._readers, None)

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` whenever there is room to write, or an error."""
        self._change(fd, self._writers, callback)

    def remove_writer(self, fd: int) -> None:
        """No longer."""
        if fd in self._writers:
            self._change(fd, self._writers, None)

    def _change(self, fd: int, side: dict[int, Callable[[], object]], callback: Callable[[], object] | None) -> None:
        before = self._mask(fd)
        if callback is None:
            del side[fd]
        else:
            side[fd] = callback
        after = self._mask(fd)
        if not after:
            self._epoll.unregister(fd)
        elif not before:
            self._epoll.register(fd, after)
        elif before != after:
            self._epoll.modify(fd, after)

    def _mask(self, fd: int) -> int:
        return (EPOLLIN if fd in self._readers else 0) | (EPOLLOUT if fd in self._writers else 0)

    # --- time ----------------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call it when this pass is over."""
        self.call_at(0.0, callback, *args)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> None:
        """Call it after that time."""
        self.call_at(monotonic() + seconds, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Call it at that time."""
        self._number += 1
        heappush(self._timers, (when, self._number, callback, args))

    def _went_off(self) -> None:
        self._alarm.clear()
        self._alarm_set = INFINITY

    # --- running -------------------------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Run until `stop`. Raises what a callback raises."""
        self._running = True
        poll, readers, writers, timers = self._epoll.poll, self._readers, self._writers, self._timers
        while self._running:
            timeout = None
            if timers and timers[0][0] < self._alarm_set:
                first = timers[0][0]
                if first <= self.now:
                    timeout = 0.0
                else:
                    self._alarm.set(first)
                    self._alarm_set = first
            ready = poll(timeout, EVENTS)
            now = self.now = monotonic()
            if len(ready) > 1:
                self._first += 1
                at = self._first % len(ready)
                ready = ready[at:] + ready[:at]
            for fd, events in ready:
                # Both may have been removed by what came before in this pass. A descriptor of the same number that was
                # added in it is called for nothing, which no callback minds.
                if events & ~EPOLLOUT and fd in readers:
                    readers[fd]()
                if events & ~EPOLLIN and fd in writers:
                    writers[fd]()
            if timers and timers[0][0] <= now:
                last = self._number
                while timers and timers[0][0] <= now and timers[0][1] <= last:  # what they add themselves waits for a pass
                    _when, _number, callback, args = heappop(timers)
                    callback(*args)

    def stop(self) -> None:
        """End `run_forever` after this pass."""
        self._running = False

    def close(self) -> None:
        """Let go of it."""
        self._epoll.close()
        self._alarm.close()
