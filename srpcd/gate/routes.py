"""The way from connections to workers: links, which connections share, and routes, one for each session of a connection.

The hot path is here. `Link.send` only packs a frame; `flush` writes all of a batch at once. `_readable` parses all that
one read gave, hands each answer to its connection, and lets every connection that got one send once.
"""

import os
from errno import ECONNRESET
from struct import Struct
from typing import TYPE_CHECKING

from srpcd import ipc, passing
from srpcd.gate.backlog import Backlog
from srpcd.gate.budget import Holding, Share
from srpcd.gate.pace import Transfer
from srpcd.session.effects import Forward
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import APPEND, CALL, HEADER, STAT, FrameReader, frame
from srpcd.wire.limits import LARGE, NAME_MAX, READ_SIZE

if TYPE_CHECKING:
    from srpcd.gate.connection import Connection
    from srpcd.gate.gate import Gate

CALL_PREFIX = Struct(HEADER.format + ipc.CALL_HEAD.format[1:])
"""Header and head of a forwarded call, in one go."""

_CALLS = (CALL, APPEND)

REFUSALS = 10
"""Refused requests of one user that are told to the monitor in one second, for its log. The rest is told as a number."""

LAST_READS = 64
"""Reads of what a worker that is gone has still left in the socket."""


class LinkBroken(Exception):
    """The worker sent what no worker sends."""


class Refusals:
    """How many refusals of one user the monitor gets a message of."""

    __slots__ = ("_count", "_since", "_unreported")

    def __init__(self) -> None:
        self._count = 0
        self._since = 0.0
        self._unreported = 0

    def report(self, now: float) -> int | None:
        """Whether this one gets a message: how many before it got none, else None. now: the loop's clock."""
        if now - self._since > 1:
            self._since = now
            self._count = 0
        self._count += 1
        if self._count > REFUSALS:
            self._unreported += 1
            return None
        unreported, self._unreported = self._unreported, 0
        return unreported


class Link:
    """A socket to a worker, with the number that the monitor gave it.

    dead: it is gone. congested: too much waits for the worker, so those who feed it are not read for.
    users: connections that were opened on it. refusals: of the worker's user, on all of them. share: of its user, which
    outlives it in the connections that hold something.
    """

    def __init__(self, gate: "Gate", number: int, fd: int, share: Share) -> None:
        self.number = number
        self.dead = False
        self.congested = False
        self.users: set[Connection] = set()
        self.refusals = Refusals()
        self._gate = gate
        self._loop = gate.loop
        self._fd = fd
        self._reader = FrameReader(ipc.FROM_WORKER)
        self._pending: dict[int, tuple[Connection, Forward]] = {}
        self._oldest, self._oldest_since = 0, 0.0
        self._tag = 0  # never used twice, so an answer can't be taken for another
        self._out: list[bytes] = []
        self._out_size = 0
        self._backlog = Backlog()
        self._holding = Holding(gate.budget, share)
        self._holders: set[Connection | Link] = set()
        self._incoming = Transfer(gate.limits)
        self._outgoing = Transfer(gate.limits)
        self._failed = False
        self._suspicion = passing.Suspicion()
        self._loop.add_reader(fd, self._readable)

    def join(self, holding: Holding, *, by_uid: bool) -> None:
        """Count what this link holds and what a connection holds for one origin: the connection's uid, or this worker's."""
        if by_uid:
            self._holding.move(holding.share)
        else:
            holding.move(self._holding.share)

    # --- to the worker -------------------------------------------------------------------------------------------------

    def send(self, connection: "Connection", forward: Forward) -> None:
        """Pass a request on with the next `flush`."""
        if connection not in self.users:
            self.users.add(connection)
            connection.links.add(self)
            self._put(frame(ipc.OPEN, connection.number, connection.peer.encode("utf-8", "replace")[:NAME_MAX]))
        tag = self._tag = self._tag + 1
        self._pending[tag] = (connection, forward)
        forward.carrier = self
        forward.ticket = tag
        place = forward.place
        path = place.path
        kind = forward.kind
        if kind in _CALLS:
            body = forward.body
            size = ipc.CALL_HEAD.size + len(path) + len(body)
            payload = forward.payload
            if payload:
                size += len(payload)
            head = CALL_PREFIX.pack(ipc.CALL, tag, size, connection.number, place.dev, place.ino, len(path)) + path
            self._out += (head, body)
            self._out_size += HEADER.size + size
            forward.body = b""  # the worker's now
            if payload:
                self._out.append(payload)
                forward.payload = b""
        elif kind == STAT:
            after = forward.body
            head = ipc.STAT_HEAD.pack(place.dev, place.ino, forward.limit, len(after))
            self._put(frame(ipc.STAT, tag, head + after + path))
        else:
            self._put(frame(ipc.WALK, tag, path))

    def cancel(self, forward: Forward) -> None:
        """Ask for a request's end with the next `flush`. Its answer still comes."""
        self._tag += 1
        self._put(frame(ipc.FLUSH, self._tag, ipc.FLUSH_BODY.pack(forward.ticket)))

    def forget(self, connection: "Connection", left: list[Forward]) -> None:
        """A connection is over. left: what it has outstanding, here or elsewhere."""
        for forward in left:
            if forward.carrier is self:
                self._pending.pop(forward.ticket, None)
        self.users.discard(connection)
        self.release(connection)
        if not self.dead:
            self._put(frame(ipc.CLOSE, connection.number))
            self.flush()

    def flush(self) -> None:
        """Write what was sent since the last flush."""
        out = self._out
        if not out or self._failed:
            return
        if self._backlog.size or self._out_size > READ_SIZE:
            now = self._loop.time()
            for chunk in out:
                self._backlog.add(chunk, now)
            self._out = []
            self._out_size = 0
            self._push(now)
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        self._out = []
        self._out_size = 0
        try:
            written = os.write(self._fd, data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._fail()
            return
        if written < len(data):
            self._backlog.add(memoryview(data)[written:], self._loop.time())
            self._loop.add_writer(self._fd, self._writable)

    def check(self, now: float, stall: float, patience: float) -> None:
        """Give up on a worker that takes nothing for `stall` seconds, or leaves its oldest request alone for `patience`."""
        oldest = next(iter(self._pending), 0)
        if oldest != self._oldest:
            self._oldest, self._oldest_since = oldest, now
        hung = oldest and now - self._oldest_since > patience and not self._holders
        reader, backlog = self._reader, self._backlog
        hurried = self._holding.greedy
        number = reader.partials if reader.partial else 0
        slow = self._incoming.late(now, number, -reader.missing, reader.held, hurried=hurried, halted=bool(self._holders))
        number = backlog.number if backlog.size else 0
        slow = self._outgoing.late(now, number, backlog.taken, backlog.held, hurried=hurried) or slow
        if hung or slow or (backlog.size and now - backlog.since > stall):
            self.die()

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._out_size += len(data)

    def _writable(self) -> None:
        self._push(self._loop.time())

    def _push(self, now: float) -> None:
        try:
            self._backlog.push(self._write_some, now)
        except OSError:
            self._fail()
            return
        size = self._backlog.size
        if size:
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._loop.remove_writer(self._fd)
        self._holding.hold(self._backlog.held)
        limit = LARGE if self._holding.over else self._gate.limits.buffer
        if self.congested if size <= limit // 2 else not self.congested and size > limit:
            self.congested = not self.congested
            for connection in list(self.users):
                connection.update()

    def _write_some(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    # --- from the worker -----------------------------------------------------------------------------------------------

    def hold(self, holder: "Connection | Link") -> None:
        """Stop reading: this connection has no room for answers, or the link no memory for a large one."""
        if not self._holders and not self._failed:
            self._loop.remove_reader(self._fd)
        self._holders.add(holder)

    def release(self, holder: "Connection | Link") -> None:
        """The holder has room again."""
        if holder in self._holders:
            self._holders.discard(holder)
            if not self._holders and not self._failed:
                self._oldest_since = self._loop.time()  # its answers could not come meanwhile
                self._loop.add_reader(self._fd, self._readable)

    def _reserve(self) -> bool:
        """Reserve memory for the large answer that has begun, or stop reading until there is some."""
        reserved = self._holding.reserve(self._reader.expected, self._reserve)
        if reserved:
            self.release(self)
        else:
            self.hold(self)
        return reserved

    def _readable(self) -> bool:
        """Take what has come. Returns whether there may be more."""
        large = self._reader.large
        if large and not self._holding.reserved and not self._failed and not self._reserve():
            return False
        bounded = not self._gate.refuses
        if bounded:
            self._suspicion.reads()
        try:
            if large:
                with self._reader.room() as room:
                    count = os.readv(self._fd, [room])
                self._reader.filled(count)
                data = b""
            else:
                data = os.read(self._fd, READ_SIZE)
                count = len(data)
        except BlockingIOError:
            return False
        except OSError:  # ECONNRESET: it ended, and left something unread
            count = 0
        if not count or (bounded and self._suspicion.confirmed()):
            self.die()
            return False
        if large and large <= count:
            self._holding.unreserve()  # it is whole, and the connection's from now on
        pending = self._pending
        touched: dict[Connection, None] = {}
        try:
            for kind, tag, body in self._reader.feed(data):
                waiting = pending.pop(tag, None)
                if waiting is None:
                    continue  # of a connection that is over, or the answer to a flush
                connection, forward = waiting
                touched[connection] = None
                try:
                    connection.answered(forward, kind, body)
                except LinkBroken:
                    pending[tag] = waiting
                    raise
                except Exception as fault:
                    connection.fault(fault)
        except (ProtocolError, LinkBroken):
            for connection in touched:
                connection.settle()
            self.die()
            return False
        for connection in touched:
            connection.settle()
        return True

    def _fail(self) -> None:
        """It does not read any more. Later, because whoever is sending right now must not be answered meanwhile."""
        if not self._failed:
            self._failed = True
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._loop.call_soon(self._take_the_rest)

    def _take_the_rest(self) -> None:
        """What it has answered before its end still counts."""
        for _ in range(LAST_READS):
            if self.dead or not self._readable():
                break
        self.die()

    def die(self) -> None:
        """The worker is gone: everything outstanding gets its one error."""
        if self.dead:
            return
        self.dead = self._failed = True
        self.congested = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._backlog.clear()
        self._holding.clear()
        self._out.clear()
        self._gate.link_died(self)
        pending, self._pending = self._pending, {}
        users, self.users = self.users, set()
        for connection, forward in pending.values():
            connection.session.failed(forward, ECONNRESET)
        for connection in users:
            connection.links.discard(self)
            connection.update()
            connection.settle()


class Route:
    """Where the requests of one session go. number: of the link, also of one that has died.

    waiting: requests that wait for another worker in the place of one that died.
    resuming: whether the monitor was asked for one. attempts: how often it has named one that is dead too.
    """

    __slots__ = ("attempts", "link", "number", "resuming", "session", "waiting")

    def __init__(self, session: int) -> None:
        self.session = session
        self.link: Link | None = None
        self.number = 0
        self.resuming = False
        self.attempts = 0
        self.waiting: list[Forward] = []
