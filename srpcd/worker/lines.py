"""Lines: calls to a handler, and the register of the service endpoints that have some.

A service is at the other end of a Unix stream socket. A resident program is a line too, whose ends are its standard input
and output, two pipes (`srpcd.worker.programs`).

What a line says about its other end, and what follows (pipe(7), unix(7), poll(2); tried):
  - a write end gives EPOLLERR once the last reader of a pipe is gone; a socket EPOLLHUP, to whom watches for nothing too;
  - an end of file is the end of the line: a service that shuts down one direction wants no further calls;
  - what a handler wrote before it died can still be read, and counts: it is read before its calls are given up.
"""

import os
from errno import EAGAIN, ECONNRESET, ENXIO
from select import EPOLLIN
from struct import Struct

from srpcd import passing
from srpcd.ipc import LineGone, LinesWanted, Message
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import CALL, CALL_REPLY, FLUSH, LINE_REPLIES, METADATA_LENGTH, SEQ, FrameReader, frame, reply_head
from srpcd.wire.limits import CALL_MAX, LINE_OUTSTANDING_MAX, METADATA_MAX, READ_SIZE
from srpcd.worker.calls import Call
from srpcd.worker.loop import HANDLERS, INFINITY, SHORT_READ, Loop, Writer
from srpcd.worker.resolve import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable

    from srpcd.worker.parcel import Parcel

WAIT = 1.0
"""Seconds that a call waits for somebody to serve its endpoint, from its arrival: a service that is being restarted."""

BUFFER_MAX = 2 * CALL_MAX
"""Bytes that may wait for one handler to read them: a stuck one does not use up the room of all."""

ENDPOINTS_MAX = 1024
"""Endpoints without lines that are remembered. The monitor is asked again for those that were forgotten."""

STUCK_MARGIN = 1.0
"""Seconds by which a handler may be later than its calls' deadline before it counts as stuck."""

_DRAIN_READS = 256

_CALL_HEAD = Struct("!iQQQ")
"""Header of a call, with the fid 0 that its body begins with."""
_FULL = "too many calls wait for this handler: try again later"


class Line:
    """A handler's two pipes, or two descriptors of its socket.

    write: requests go there; read: replies come from there; both not blocking. timeout: seconds for one call. source: what
    `read` is read by, where that is something else (`passing.source`).
    lost: called once, when the handler is gone or broke the protocol; `pending` still has its calls then.
    fault: how it broke the protocol, or empty.
    """

    def __init__(
        self, loop: Loop, write: int, read: int, timeout: float, lost: "Callable[[Line], None]", source: "int | Socket" = -1
    ) -> None:
        self._loop = loop
        self._lost = lost
        self._read = read
        self._source = read if source == -1 else source
        self._receive: passing.Receive = os.read if isinstance(self._source, int) else passing.receive_bounded
        self._reader = FrameReader(LINE_REPLIES, reply_head)
        self._arriving: tuple[int, bytes, Parcel] | None = None  # seq and head of a large reply that is being collected
        self._read_size = READ_SIZE
        self._seq = 0
        self.pending: dict[int, Call | None] = {}
        """Calls that the handler has not answered, by seq. None: cancelled, the slot is free once the answer comes."""
        self.over = False
        self.answered = False
        self._retiring = self._ending = False
        self.used = loop.now
        self.fault = ""
        self.writer = Writer(loop, write, self.end, timeout + STUCK_MARGIN)
        loop.watch(read, EPOLLIN, self._readable, HANDLERS)

    def send(self, call: Call) -> bool:
        """Hand a call over. False: too many are with the handler already."""
        pending, writer, body, parcel = self.pending, self.writer, call.body, call.parcel
        size = len(body) if parcel is None else call.size
        if len(pending) >= LINE_OUTSTANDING_MAX or writer.size + size > BUFFER_MAX or self.over or self._retiring:
            return False
        self._seq = seq = self._seq + 1  # never used twice: a late answer can't be taken for another call's
        pending[seq] = call
        body = _CALL_HEAD.pack(CALL, seq, 8 + size, 0) + body
        if parcel is None:
            writer.add(body)
        else:
            parcel.put(body)
            writer.send(parcel)
            call.parcel = None
        self.used = self._loop.now
        call.body = b""
        call.seq = seq
        call.custodian = self
        return True

    def abandon(self, call: Call) -> None:
        """The call is over: tell the handler, and wait for its answer only to know that the slot is free."""
        if call.seq not in self.pending:
            return
        if self.over or self.writer.discard(_CALL_HEAD.pack(CALL, call.seq, 0, 0)[:12]):
            del self.pending[call.seq]
        else:
            self.pending[call.seq] = None
            self.writer.add(frame(FLUSH, 0, SEQ.pack(call.seq)))
        self._idle()

    def retire(self, end: bool) -> None:
        """Let the handler finish what it has; then end the line, or only close its input, which tells it to end."""
        self._retiring, self._ending = True, end
        self._idle()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return any(call is not None for call in self.pending.values())

    def end(self) -> None:
        """Take what the handler still wrote, close both pipes, tell the owner."""
        if not self.over:
            self.over = True
            self._drain()
            if self._arriving is not None:
                self._arriving[2].close()
            self.writer.close()
            if self._source is not self._read:
                passing.interrupt_releases()  # of what was not read
                passing.let_go(self._source)
            self._loop.close(self._read)
            self._lost(self)

    def fail(self, errno: int = ECONNRESET, message: str = "") -> None:
        """Give up all calls, each with the same error."""
        calls = [call for call in self.pending.values() if call is not None]
        self.pending.clear()
        for call in calls:
            call.fail(errno, message)

    def _idle(self) -> None:
        if self._retiring and not self.over and not self.busy:
            if self._ending:
                self.end()
            else:
                self.writer.end()

    def _readable(self, mask: int) -> None:
        if not mask & EPOLLIN:  # a hang-up, and nothing is left to be read
            self.end()
            return
        self._take()

    def _take(self) -> bool:
        """Read once. Returns whether something was there."""
        if self._arriving is not None:
            return self._collect(*self._arriving)
        try:
            data = self._receive(self._source, self._read_size)
        except BlockingIOError:
            return False
        except OSError as fault:
            return self._unreadable(fault)
        if data:
            self._feed(data)
        else:
            self.end()
        return bool(data)

    def _collect(self, seq: int, head: bytes, parcel: "Parcel") -> bool:
        before = parcel.missing
        try:
            more = parcel.take(self._source, self._receive)
        except OSError as fault:
            return self._unreadable(fault)
        if not more:
            self.end()
            return False
        self.used = self._loop.now
        if not parcel.missing:
            self._arriving = None
            call = self.pending.pop(seq, None)  # gone where it was taken back unwritten: then it was answered unasked
            self.answered = True
            if call is not None:
                call.finish_large(head, parcel)
            else:
                parcel.close()
            if self._retiring:
                self._idle()
        return parcel.missing < before

    def _unreadable(self, fault: OSError) -> bool:
        """A reset, a descriptor that was sent along, or a page of a file that a program spliced into its output."""
        self.fault = self.fault or f"its answers can't be read: {fault.strerror}"
        self.end()
        return False

    def _feed(self, data: bytes) -> None:
        self.used = self._loop.now
        pending = self.pending
        try:
            for kind, seq, body in self._reader.feed(data):
                if seq not in pending:
                    raise ProtocolError(ECONNRESET, "an answer to no call", seq)
                call = pending[seq]
                if kind == CALL_REPLY:
                    size = len(body) - METADATA_LENGTH.size
                    if size < 0 or not size >= METADATA_LENGTH.unpack_from(body)[0] <= METADATA_MAX:
                        raise ProtocolError(ECONNRESET, "the metadata length does not fit the answer", seq)
                    if call is not None:
                        call.finish(body)
                elif call is not None:
                    call.fail_by_handler(body)
                del pending[seq]
                self.answered = True
            if not pending and self._reader.partial:
                raise ProtocolError(ECONNRESET, "an answer to no call")  # else it could have us keep 16 MiB for nothing
            self._read_size = READ_SIZE
            if self._reader.large and (begun := self._reader.divert()) is not None:
                self._read_size = SHORT_READ
                seq, head, beginning, missing = begun
                if seq not in self.pending:
                    raise ProtocolError(ECONNRESET, "an answer to no call", seq)
                self._loop.depot.widen(self._read)
                self._arriving = seq, head, self._loop.depot.parcel(beginning, missing, copied=True)
                self._collect(*self._arriving)
        except ProtocolError as fault:
            self.fault = self.fault or fault.message
            self.end()
        if self._retiring:
            self._idle()

    def _drain(self) -> None:
        # What a dead handler left is no more than the pipe's capacity; one that lives on is not listened to for ever.
        for _ in range(_DRAIN_READS):
            if self.fault or not self.pending or not self._take():
                return


class Endpoint:
    """A service endpoint: its lines, and the calls that wait for one.

    state: UNKNOWN, ASKED (the monitor has not answered yet) or PERMITTED (lines will come when somebody announces).
    """

    UNKNOWN, ASKED, PERMITTED = 0, 1, 2

    def __init__(self, dev: int, ino: int) -> None:
        self.dev = dev
        self.ino = ino
        self.lines: list[Line] = []
        self.waiting: dict[Call, None] = {}
        self.expected: set[int] = set()
        """Lines that a service was told to connect. Calls wait for them, however long that takes."""
        self.state = self.UNKNOWN

    def abandon(self, call: Call) -> None:
        """The call is over."""
        self.waiting.pop(call, None)


class Services:
    """All service endpoints that this worker calls.

    tell: sends a message to the monitor. timeout: seconds for one call.
    """

    def __init__(self, loop: Loop, tree: Tree, tell: "Callable[[Message], None]", timeout: float) -> None:
        self._loop = loop
        self._tree = tree
        self._tell = tell
        self._timeout = timeout
        self._endpoints: dict[tuple[int, int], Endpoint] = {}
        self.waiters: dict[Endpoint, None] = {}
        """Endpoints where calls wait, or did a moment ago."""
        self._lines: dict[int, tuple[Line, Endpoint]] = {}
        self._expected: dict[int, Endpoint] = {}
        loop.duties.append(self._waited)

    def held(self) -> int:
        """Bytes of calls that wait for a line."""
        return sum(call.size for endpoint in self.waiters for call in endpoint.waiting)

    def endpoint(self, dev: int, ino: int) -> Endpoint:
        """The register's entry of an endpoint."""
        found = self._endpoints.get((dev, ino))
        if found is None:
            if len(self._endpoints) >= ENDPOINTS_MAX:
                for key, each in list(self._endpoints.items()):
                    if not each.lines and not each.waiting and not each.expected:
                        del self._endpoints[key]
            found = self._endpoints[dev, ino] = Endpoint(dev, ino)
        return found

    def deliver(self, endpoint: Endpoint, call: Call) -> None:
        """Hand a permitted call to the line with the fewest calls, or let it wait for one."""
        lines = endpoint.lines
        if lines:
            line = lines[0] if len(lines) == 1 else min(lines, key=lambda each: len(each.pending))
            if not line.send(call):
                call.fail(EAGAIN, _FULL)
            return
        endpoint = self.endpoint(endpoint.dev, endpoint.ino)  # without lines it may have been forgotten
        if len(endpoint.waiting) >= LINE_OUTSTANDING_MAX:
            call.fail(EAGAIN, _FULL)
            return
        call.custodian = endpoint
        endpoint.waiting[call] = None
        self.waiters[endpoint] = None
        self._loop.wake(self._loop.now + WAIT)
        if endpoint.state == Endpoint.UNKNOWN:
            endpoint.state = Endpoint.ASKED
            self._tell(LinesWanted(call.path, call.dev, call.ino))

    def expect_line(self, number: int, dev: int, ino: int) -> None:
        """The monitor's LineExpected."""
        endpoint = self._expected[number] = self.endpoint(dev, ino)
        endpoint.expected.add(number)

    def add_line(self, number: int, fd: int) -> None:
        """The monitor's Line: hand over what waited for it. fd: of the socket."""
        endpoint = self._expected.pop(number)
        endpoint.expected.discard(number)

        def lost(line: Line) -> None:
            self._lines.pop(number, None)
            self._leave(endpoint, line)
            line.fail()
            self._tell(LineGone(number))

        try:
            write = os.dup(fd)  # for the other direction: the loop knows one purpose for each descriptor
        except OSError:
            os.close(fd)
            self._tell(LineGone(number))
            return
        os.set_blocking(fd, False)
        line = Line(self._loop, write, fd, self._timeout, lost, passing.source(fd))
        self._lines[number] = line, endpoint
        endpoint.lines.append(line)
        calls, endpoint.waiting = list(endpoint.waiting), {}
        permitted: dict[str, int] = {}  # what the kernel says *now*: they may have waited for a second
        for call in calls:
            if call.path not in permitted:
                try:
                    self._tree.check_service(call.path, endpoint.dev, endpoint.ino)
                    permitted[call.path] = 0
                except OSError as fault:
                    permitted[call.path] = fault.errno or ENXIO
            if permitted[call.path]:
                call.fail(permitted[call.path])
            else:
                self.deliver(endpoint, call)

    def answered(self, dev: int, ino: int, errno: int) -> None:
        """The monitor's Lines."""
        endpoint = self._endpoints.get((dev, ino))
        if endpoint is None:
            return
        if errno == 0:
            endpoint.state = Endpoint.PERMITTED
            self._loop.wake(self._loop.now)
            return
        endpoint.state = Endpoint.UNKNOWN  # the next call asks again
        calls, endpoint.waiting = list(endpoint.waiting), {}
        for call in calls:
            call.fail(errno)

    def announcement_over(self, number: int) -> None:
        """The monitor's LineOver: no new calls; those that the handler has, it may still answer."""
        if number in self._expected:
            self._expected.pop(number).expected.discard(number)
            self._loop.wake(self._loop.now)  # calls that have waited long enough for another one
        elif number in self._lines:
            line, endpoint = self._lines[number]
            self._leave(endpoint, line)
            line.retire(end=True)

    def _leave(self, endpoint: Endpoint, line: Line) -> None:
        if line in endpoint.lines:
            endpoint.lines.remove(line)
            if not endpoint.lines:
                endpoint.state = Endpoint.UNKNOWN

    def _waited(self) -> float:
        due = INFINITY
        for endpoint in list(self.waiters):
            if not endpoint.waiting:
                del self.waiters[endpoint]
            elif endpoint.state == Endpoint.PERMITTED and not endpoint.expected:
                late = []
                for call in endpoint.waiting:
                    if call.arrived + WAIT > self._loop.now:
                        due = min(due, call.arrived + WAIT)
                        break
                    late.append(call)
                for call in late:
                    del endpoint.waiting[call]
                    call.fail(ENXIO)
                if not endpoint.waiting:
                    endpoint.state = Endpoint.UNKNOWN  # the monitor forgets callers whose endpoint has gone: ask again
        return due
