"""One epoll loop, and writers that gather what goes out in one pass.

A pass: each readable descriptor is read once, what was due is done, then each writer that something was added to writes
it at once. Descriptors are closed at the end of the pass, so that a number is not given to something new while events
for the old one are still to be handled.
"""

import os
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, epoll
from time import monotonic

from srpcd.alarm import Alarm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from srpcd.worker.parcel import Depot, Parcel

ALWAYS, GATES, HANDLERS = 0, 1, 2
"""Groups of descriptors: those of GATES and HANDLERS (lines and programs) can be paused."""

INFINITY = float("inf")
TICK = 0.05
"""Seconds between two looks at what is due, at least: deadlines are that coarse."""

_EVENTS = 128
"""Descriptors that are seen to in one pass. Those beyond are first in the next one: the kernel takes turns."""

SHORT_READ = 4096
"""Bytes that are read first where the last frame was large, and so the next one probably is: what is read, is copied."""

_CLOSING_MAX = 64
"""Descriptors that wait for being closed, beyond which `close_later` closes at once: a worker has few to spare."""

_JOIN = 64 * 1024
"""Bytes that are joined into one write: a pipe's capacity. What is longer is not copied."""


class Writer:
    """Non-blocking output to one descriptor.

    broken: called once, when nobody can read it any more. patience: seconds without progress after which it counts as
    broken too. handler: it leads to a handler, so what waits in it counts as input (see `Loop.backlog`).
    """

    __slots__ = ("_broken", "_ending", "_loop", "fd", "handler", "parts", "patience", "since", "size")

    def __init__(
        self, loop: "Loop", fd: int, broken: "Callable[[], None]", patience: float = INFINITY, handler: bool = True
    ) -> None:
        self.fd = fd
        self.parts: list[bytes | memoryview | Parcel] = []
        self.size = 0
        self.since = 0.0  # when something was last taken, while something waits
        self.patience = patience
        self.handler = handler
        self._loop = loop
        self._broken = broken
        self._ending = False
        loop.watch(fd, 0, self._ready)

    def send(self, parcel: "Parcel") -> None:
        """As `add`, for a large frame."""
        if self.fd >= 0:
            self._loop.depot.widen(self.fd)
            self.add(parcel)
        else:
            parcel.close()

    def add(self, data: "bytes | Parcel") -> None:
        """Have `data` written at the end of this pass, or when there is room. Ignored when closed."""
        if self.fd >= 0:
            if not self.size:  # else something waits already, and this goes out after it
                self._loop.dirty.append(self)
            self.parts.append(data)
            self.size += len(data)

    def discard(self, head: bytes) -> bool:
        """Take back the frame that begins with `head`. False: it, or some of it, may be gone already."""
        for at, part in enumerate(self.parts):
            if isinstance(part, memoryview):  # the rest of what was begun
                continue
            if part.startswith(head) if isinstance(part, bytes) else part.starts_with(head):
                del self.parts[at]
                self.size -= len(part)
                if not isinstance(part, bytes):
                    part.close()
                return True
        return False

    def end(self) -> None:
        """Close once everything is written."""
        self._ending = True
        if not self.parts:
            self.close()

    def close(self) -> None:
        """Close now; what is left is dropped."""
        if self.fd >= 0:
            self._loop.armed.pop(self, None)
            self._loop.close(self.fd)
            self.fd = -1
            for part in self.parts:
                if not isinstance(part, bytes | memoryview):
                    part.close()
            self.parts.clear()
            self.size = 0

    def fail(self) -> None:
        """Close, and tell the owner."""
        if self.fd >= 0:
            self.close()
            self._broken()

    def _ready(self, mask: int) -> None:
        if mask & (EPOLLERR | EPOLLHUP):
            self.fail()
        elif self in self._loop.armed:
            self.flush()

    def flush(self) -> None:
        """Write what fits."""
        parts = self.parts
        while parts:
            chunk = parts[0]
            count = 1
            try:
                if chunk.__class__ is bytes or chunk.__class__ is memoryview:
                    count = len(parts)
                    if self.size > _JOIN and count > 1:
                        count, size = 1, len(chunk)
                        while size + len(parts[count]) <= _JOIN:  # never a parcel: those are longer
                            size += len(parts[count])
                            count += 1
                    if count > 1:
                        chunk = b"".join(parts[:count])  # type: ignore[arg-type]
                    written = os.write(self.fd, chunk)
                else:
                    written = chunk.write(self.fd)  # type: ignore[union-attr]
                    self.size -= written
                    if not len(chunk):
                        del parts[0]
                        continue
                    self._arm(written > 0)
                    return
            except BlockingIOError:
                written = 0
            except OSError:
                self.fail()
                return
            self.size -= written
            if written == len(chunk):
                del parts[:count]
                continue
            if written:
                parts[:count] = (memoryview(chunk)[written:],)  # type: ignore[arg-type]
            self._arm(written > 0)
            return
        if self in self._loop.armed:
            del self._loop.armed[self]
            self._loop.modify(self.fd, 0)
        if self._ending:
            self.close()

    def _arm(self, progress: bool) -> None:
        if self not in self._loop.armed:
            self._loop.armed[self] = None
            self._loop.modify(self.fd, EPOLLOUT)
            progress = True
        if progress:
            self.since = self._loop.now
            self._loop.wake(self.since + self.patience)


class Loop:
    """The loop. now: monotonic seconds of this pass. armed: writers that wait for room."""

    def __init__(self) -> None:
        self.now = monotonic()
        self.dirty: list[Writer] = []
        self.armed: dict[Writer, None] = {}
        self.duties: list[Callable[[], float]] = [self._impatience]
        """Each does what is due at `now`, and returns when it wants to be called again (INFINITY: on `wake`)."""
        self._epoll = epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._watched: dict[int, tuple[int, int]] = {}
        self._closing: list[int] = []
        self._alarm = Alarm()
        self._alarm_set = INFINITY  # when it goes off
        self._next = INFINITY
        self._paused: frozenset[int] = frozenset()
        self._depot: Depot | None = None
        self.watch(self._alarm.fd, EPOLLIN, self._went_off)

    @property
    def depot(self) -> "Depot":
        """Of the parcels. Made, and loaded, when the first large frame comes."""
        if self._depot is None:
            from srpcd.worker.parcel import Depot  # noqa: PLC0415

            self._depot = Depot(self)
        return self._depot

    def watch(self, fd: int, mask: int, callback: "Callable[[int], None]", group: int = ALWAYS) -> None:
        """Call `callback` with the event mask whenever something is up. Errors and hang-ups are always reported."""
        self._callbacks[fd] = callback
        self._watched[fd] = (group, mask)
        if group not in self._paused:
            self._epoll.register(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        """Wait for other events (descriptors of ALWAYS only)."""
        self._watched[fd] = (ALWAYS, mask)
        self._epoll.modify(fd, mask)

    def close(self, fd: int) -> None:
        """Forget a watched descriptor now, close it at the end of the pass."""
        group, _mask = self._watched.pop(fd)
        del self._callbacks[fd]
        if group not in self._paused:
            self._epoll.unregister(fd)
        self._closing.append(fd)

    def close_later(self, fd: int) -> None:
        """Close a descriptor that is not watched at the end of the pass, when what others wait for has been written."""
        if len(self._closing) < _CLOSING_MAX:
            self._closing.append(fd)
        else:
            os.close(fd)

    def pause(self, groups: "frozenset[int]") -> None:
        """Take these groups out of the loop, and all others in. (With an empty mask they would still report hang-ups.)"""
        for fd, (group, mask) in self._watched.items():
            if group in groups and group not in self._paused:
                self._epoll.unregister(fd)
            elif group in self._paused and group not in groups:
                self._epoll.register(fd, mask)
        self._paused = groups

    def wake(self, when: float) -> None:
        """See to it that duties are looked at by then, or a little later."""
        if when < self._next:  # noqa: PLR1730  a call of min() costs more than the rest, and this is done for each call
            self._next = when

    def backlog(self) -> int:
        """Bytes that wait for handlers to take them."""
        return sum(writer.size for writer in self.armed if writer.handler)

    def turn(self) -> None:
        """One pass; sleeps until there is something to do."""
        timeout = None
        if self._closing:  # by somebody between two passes
            timeout = 0.0
        elif self._next < self._alarm_set:
            self._alarm.set(self._next)
            self._alarm_set = self._next
        events = self._epoll.poll(timeout, _EVENTS)
        now = self.now = monotonic()
        callbacks, dirty = self._callbacks, self.dirty
        for fd, mask in events:
            if fd in callbacks:
                callbacks[fd](mask)
        if now >= self._next:
            self._next = INFINITY
            due = min(duty() for duty in self.duties)
            self.wake(due if due == INFINITY else max(due, now + TICK))
        while dirty:  # a writer that breaks gives others something to say, once
            dirty.pop().flush()
        if self._closing:
            for fd in self._closing:
                os.close(fd)
            self._closing.clear()

    def _went_off(self, _mask: int) -> None:
        self._alarm.clear()
        self._alarm_set = INFINITY

    def _impatience(self) -> float:
        for writer in [each for each in self.armed if self.now >= each.since + each.patience]:
            writer.fail()
        return min((writer.since + writer.patience for writer in self.armed), default=INFINITY)
