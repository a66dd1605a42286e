"""Large frames on their way through a worker: what calls carry goes from pipe to pipe in the kernel (splice(2)), uncopied.

What handlers answer is copied once, here. They may splice pages of a file into their pipe, and whoever reads such a page at
last waits in read(2) for as long as its file system keeps it locked, also where the descriptor does not block (tried, with
FUSE). That may be this worker, whose user has called them, and not a gate, which all users share.

A parcel first collects a frame to its end, and only then is it written on: a gate that dies in the middle of a request, or a
handler in the middle of a reply, leaves nothing behind in anybody's stream, and one who stops there holds up nobody.
Meanwhile its bytes lie in pipes of our own, so that the pipe they came by is free for others; where there are no more such
pipes to be had, in memory.

The pipes to gates and handlers are made larger while large frames pass through them, and small again soon after: what all
pipes of a user may hold together is limited (pipe-user-pages-soft in pipe(7)), and those of one who has gone over it get
next to nothing.
"""

import os
from errno import EBUSY
from fcntl import F_SETPIPE_SZ, fcntl
from select import POLLOUT, poll

from srpcd.wire.limits import KIB, PIPE_MAX
from srpcd.worker.loop import INFINITY, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket

    from srpcd.passing import Receive

PIPES_MAX = 32
"""Pipes of PIPE_MAX that parcels may have at a time: enough for two calls of the largest size, and half of what the pipes
of one user may hold together."""

_PIPES_KEPT = 2
"""Of these, kept for the next parcel."""

_SMALL = 64 * KIB
"""Bytes that a pipe holds unless it is asked to hold more."""

_READS_MAX = 64
"""Reads of one parcel in one pass of the loop. A handler that writes single bytes as fast as the worker reads them could
otherwise keep the worker there for 16 MiB, and the user's other calls would wait. The next pass reads on."""

_QUIET = 1.0
"""Seconds without a large frame after which a pipe is made small again."""


class _Pipe:
    """One of our own. held: bytes in it."""

    __slots__ = ("held", "read", "write")

    def __init__(self) -> None:
        self.held = 0
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def full(self) -> bool:
        """Whether nothing more goes into it: it holds so many pieces, not bytes."""
        look = poll()
        look.register(self.write, POLLOUT)
        return not look.poll(0)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


class Parcel:
    """A large frame's payload, and what is written in front of it.

    copied: it is collected in memory. missing: bytes that are still to be collected. size, also its length: bytes that are
    here. begun: some were written. Whoever has it last calls `close`, unless all of it was written.
    """

    __slots__ = ("_copied", "_depot", "_parts", "begun", "missing", "size")

    def __init__(self, depot: "Depot", beginning: bytes, missing: int, *, copied: bool) -> None:
        self._copied = copied
        self._depot = depot
        self._parts: list[bytes | memoryview | _Pipe] = []
        self.begun = False
        self.missing = missing
        self.size = 0
        if beginning:
            self.put(beginning)

    def __len__(self) -> int:
        return self.size

    def put(self, data: bytes) -> None:
        """Have `data` before what is there."""
        first = self._parts[0] if self._parts else None
        if isinstance(first, bytes):
            self._parts[0] = data + first  # one write, and one wake-up, for both
        else:
            self._parts.insert(0, data)
        self.size += len(data)

    def starts_with(self, head: bytes) -> bool:
        """Whether it begins with `head` and nothing of it was written."""
        first = self._parts[0]
        return not self.begun and isinstance(first, bytes) and first.startswith(head)

    def take(self, fd: "int | Socket", receive: "Receive" = os.read) -> bool:
        """Collect what has come on `fd`, a pipe or a socket, in _READS_MAX reads at most. Raises OSError.

        receive: how to read it, where it is collected in memory. Returns False at its end of file.
        """
        try:
            for _ in range(_READS_MAX):
                if not self.missing:
                    break
                taken = self._take(fd, receive)
                if not taken:
                    return False
                self.missing -= taken
                self.size += taken
        except BlockingIOError:
            pass
        return True

    def _take(self, fd: "int | Socket", receive: "Receive") -> int:
        while True:
            last = self._parts[-1] if self._parts else None
            if not isinstance(last, _Pipe):
                pipe = None if self._copied or self.missing < PIPE_MAX // 16 else self._depot.pipe()
                if pipe is None:
                    data = receive(fd, min(self.missing, PIPE_MAX))
                    if len(data) < _SMALL and isinstance(last, bytes) and len(last) < _SMALL:
                        self._parts[-1] = last + data  # or who sends single bytes would have us keep a hundred for each
                    elif data:
                        self._parts.append(data)
                    return len(data)
                self._parts.append(pipe)
                last = pipe
            try:
                taken = os.splice(fd, last.write, self.missing, flags=os.SPLICE_F_NONBLOCK)  # type: ignore[arg-type]
            except BlockingIOError:
                if not last.full():
                    raise
                self._parts.append(b"")  # go on with another one
                continue
            last.held += taken
            return taken

    def write(self, fd: int) -> int:
        """Write on as much as goes without waiting. Returns how many bytes. Raises OSError."""
        parts, before = self._parts, self.size
        try:
            while parts:
                part = parts[0]
                if isinstance(part, _Pipe):
                    written = os.splice(part.read, fd, part.held, flags=os.SPLICE_F_NONBLOCK) if part.held else 0
                    part.held -= written
                    rest = part.held
                else:
                    written = os.write(fd, part) if part else 0
                    rest = len(part) - written
                    if rest:
                        parts[0] = memoryview(part)[written:]
                self.begun = True
                self.size -= written
                if not rest:
                    del parts[0]
                    if isinstance(part, _Pipe):
                        self._depot.take_back(part)
        except BlockingIOError:
            pass
        return before - self.size

    def close(self) -> None:
        """Let go of what was not written."""
        for part in self._parts:
            if isinstance(part, _Pipe):
                self._depot.take_back(part)
        self._parts.clear()
        self.size = 0


class Depot:
    """The pipes that parcels have, and those of others that were widened for them."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._idle: list[_Pipe] = []
        self._used = 0
        self._wide: dict[int, float] = {}  # descriptor: when a large frame last came by
        loop.duties.append(self._narrow)

    def parcel(self, beginning: bytes, missing: int, *, copied: bool = False) -> Parcel:
        """One to be collected. beginning: what is here already."""
        return Parcel(self, beginning, missing, copied=copied)

    def pipe(self) -> _Pipe | None:
        """A pipe with nothing in it; None where there is none to be had."""
        if self._idle:
            return self._idle.pop()
        if self._used >= PIPES_MAX:
            return None
        try:
            pipe = _Pipe()
        except OSError:
            return None
        try:
            fcntl(pipe.write, F_SETPIPE_SZ, PIPE_MAX)
        except OSError:
            pipe.close()
            return None
        self._used += 1
        return pipe

    def take_back(self, pipe: _Pipe) -> None:
        """A parcel needs it no more."""
        if pipe.held or len(self._idle) >= _PIPES_KEPT:
            pipe.close()
            self._used -= 1
        else:
            self._idle.append(pipe)

    def widen(self, fd: int) -> None:
        """Let this pipe hold more for a while, if that is granted."""
        if fd not in self._wide:
            self._resize(fd, PIPE_MAX)
            self._loop.wake(self._loop.now + _QUIET)
        self._wide[fd] = self._loop.now

    def _narrow(self) -> float:
        due = INFINITY
        for fd, since in list(self._wide.items()):
            if since + _QUIET > self._loop.now:
                due = min(due, since + _QUIET)
            elif self._resize(fd, _SMALL):
                del self._wide[fd]
            else:
                due = min(due, self._loop.now + _QUIET)
        if not self._wide:
            while self._idle:
                self._idle.pop().close()
                self._used -= 1
        return due

    @staticmethod
    def _resize(fd: int, size: int) -> bool:
        """Returns whether there is nothing more to be done. What was closed meanwhile is none; another's pipe gets its usual
        size by this."""
        try:
            fcntl(fd, F_SETPIPE_SZ, size)
        except OSError as fault:
            return fault.errno != EBUSY
        return True
