"""What a worker hears from gates: requests in frames, over a socket for each gate.

Everything that a gate asks for names a whole path, and device and inode of what its client found there: nothing of a
client is kept here but calls that are not yet answered, and the addresses of the connections they came from.
"""

import os
from errno import EAGAIN, ECANCELED, EIO, EKEYEXPIRED, EPROTO
from select import EPOLLIN

from srpcd import ipc
from srpcd.ipc import CALL_HEAD, STAT_HEAD, WALKED_BODY, Stat
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import METADATA_LENGTH, FrameReader
from srpcd.wire.limits import KIB, METADATA_MAX, MIB, PATH_MAX, READ_SIZE
from srpcd.worker.calls import Call, Link
from srpcd.worker.loop import GATES, SHORT_READ, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from srpcd.worker.lines import Endpoint
    from srpcd.worker.lines import Line as HandlerLine
    from srpcd.worker.parcel import Parcel
    from srpcd.worker.serve import Worker

_LARGE = 4 * KIB
HANDLER_INPUT_MAX = 64 * MIB
"""Bytes that may wait for handlers to read them before calls of more than _LARGE are refused."""

PEERS_MAX = 65536
"""Connections of one gate whose addresses are remembered: whoever has taken a gate over is not to fill our memory."""

_KEY_BEGIN, _KEY_END = 8, CALL_HEAD.size
"""In a CALL's body: device, inode, length of the path; the path follows. As bytes, they are the key of an endpoint."""


def _call_head(kind: int, beginning: bytes) -> int:
    """For FrameReader: bytes of a CALL's body before its payload."""
    if kind != ipc.CALL or len(beginning) < _KEY_END:
        return 0
    begin: int = _KEY_END + CALL_HEAD.unpack_from(beginning)[3]
    if len(beginning) < begin + METADATA_LENGTH.size:
        return 0
    size: int = begin + METADATA_LENGTH.size + METADATA_LENGTH.unpack_from(beginning, begin)[0]
    return size if size <= len(beginning) else 0


class Known:
    """What was checked of an endpoint. batch: of reads in which it was; one check stands for all calls of one read."""

    __slots__ = ("batch", "endpoint", "line", "name", "path")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.path = _text(name)
        self.batch = 0
        self.endpoint: Endpoint | None = None
        self.line: HandlerLine | None = None


class GateLink(Link):
    """One gate: reads its requests. number: the monitor's. fd: a stream socket, not blocking."""

    __slots__ = (
        "_arriving",
        "_loop",
        "_over",
        "_peers",
        "_read",
        "_read_size",
        "_reader",
        "_stats",
        "_table",
        "_worker",
        "number",
    )

    def __init__(self, worker: "Worker", number: int, fd: int) -> None:
        self.number = number
        self._worker = worker
        self._loop = worker.loop
        self._read = fd
        self._read_size = READ_SIZE
        self._reader = FrameReader(ipc.TO_WORKER, _call_head)
        self._arriving: tuple[int, bytes, Parcel] | None = None  # tag and head of a large call that is being collected
        self._peers: dict[int, str] = {}
        self._stats: dict[int, int] = {}  # tags of those that wait for the monitor, and the describer's numbers
        self._over = False
        self._table: dict[int, Callable[..., None]] = {
            ipc.OPEN: self._open,
            ipc.CLOSE: self._close,
            ipc.WALK: self._walk,
            ipc.STAT: self._stat,
            ipc.CALL: self._call,
            ipc.FLUSH: self._flush,
        }
        super().__init__(Writer(worker.loop, os.dup(fd), self.end, handler=False))
        self._loop.watch(fd, EPOLLIN, self._readable, GATES)

    def end(self) -> None:
        """The gate is gone, or is not to be heard any longer: flush its calls, close its socket."""
        if not self._over:
            self._over = True
            self._loop.close(self._read)
            self.writer.close()
            if self._arriving is not None:
                self._arriving[2].close()
            self._worker.calls.links.remove(self)
            if self in self._worker.finishing:
                self._worker.finishing.remove(self)
            self._worker.calls.drop(self)

    def finish(self) -> None:
        """The gate has no session here any more: begin nothing further for it, and end when all calls are answered."""
        if not self._over and self not in self._worker.finishing:
            refuse = self._refuse
            self._table |= {ipc.OPEN: refuse, ipc.WALK: refuse, ipc.STAT: refuse, ipc.CALL: refuse}
            self._worker.finishing.append(self)

    def _refuse(self, tag: int, body: bytes, parcel: "Parcel | None" = None) -> None:
        if parcel is not None:
            parcel.close()
        self.error(tag, EKEYEXPIRED)

    def _readable(self, mask: int) -> None:
        if self._arriving is not None:
            self._collect(*self._arriving)
            return
        try:
            data = os.read(self._read, self._read_size)
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET: it ended, and left something unread
            data = b""
        if not data:
            self.end()
            return
        self._read_size = READ_SIZE
        self._worker.batch += 1
        try:
            for kind, tag, body in self._reader.feed(data):
                self._table[kind](tag, body)
            if self._reader.large and not self._over and (begun := self._reader.divert()) is not None:
                tag, head, beginning, missing = begun
                self._read_size = SHORT_READ
                self._loop.depot.widen(self._read)
                self._arriving = tag, head, self._loop.depot.parcel(beginning, missing)
                self._collect(*self._arriving)
        except ProtocolError as fault:
            self._broken(fault)

    def _collect(self, tag: int, head: bytes, parcel: "Parcel") -> None:
        """Take what has come of a large call, and begin it when that is all."""
        try:
            taken = parcel.take(self._read)
        except OSError:
            taken = False
        try:
            if not taken:
                self.end()
            if parcel.missing:
                return
            self._arriving = None
            self._worker.batch += 1
            self._table[ipc.CALL](tag, head, parcel)
        except ProtocolError as fault:
            parcel.close()
            self._broken(fault)

    def _broken(self, fault: ProtocolError) -> None:
        os.write(2, f"a gate broke the protocol, its link is closed: {fault}\n".encode())
        self.end()

    def _open(self, conn: int, body: bytes) -> None:
        if b"\0" in body:
            raise ProtocolError(EPROTO, "a peer's address with a NUL")
        if len(self._peers) >= PEERS_MAX:
            raise ProtocolError(EPROTO, "more connections than any gate has")
        self._peers[conn] = body.decode(errors="replace")

    def _close(self, conn: int, body: bytes) -> None:
        self._peers.pop(conn, None)
        self._worker.calls.drop(self, conn)

    def _walk(self, tag: int, body: bytes) -> None:
        try:
            found = self._worker.tree.walk(_text(body))
        except OSError as fault:
            self.error(tag, fault.errno or EIO)
            return
        self.reply(ipc.WALKED, tag, WALKED_BODY.pack(*found))

    def _stat(self, tag: int, body: bytes) -> None:
        if len(body) < STAT_HEAD.size:
            raise ProtocolError(EPROTO, "a short STAT", tag)
        dev, ino, limit, length = STAT_HEAD.unpack_from(body)
        begin = STAT_HEAD.size + length
        if begin > len(body):
            raise ProtocolError(EPROTO, "a short STAT", tag)
        after = _text(body[STAT_HEAD.size : begin])

        def answer(stat: Stat) -> None:
            self._stats.pop(tag, None)
            self.reply(ipc.STATTED, tag, stat.pack())

        try:
            request = self._worker.describer.stat(_text(body[begin:]), dev, ino, after, max(1, limit), answer)
            if request:
                self._stats[tag] = request
        except OSError as fault:
            self.error(tag, fault.errno or EIO)

    def _flush(self, tag: int, body: bytes) -> None:
        if len(body) != ipc.FLUSH_BODY.size:
            raise ProtocolError(EPROTO, "a short FLUSH", tag)
        (target,) = ipc.FLUSH_BODY.unpack(body)
        request = self._stats.pop(target, 0)
        if request:
            self._worker.describer.forget(request)
            self.error(target, ECANCELED)
        self._worker.calls.flush(self, tag, target)

    def _call(self, tag: int, body: bytes, parcel: "Parcel | None" = None) -> None:
        worker = self._worker
        if len(body) < _KEY_END:
            raise ProtocolError(EPROTO, "a short CALL", tag)
        conn, dev, ino, length = CALL_HEAD.unpack_from(body)
        begin = _KEY_END + length
        size = len(body) - begin - METADATA_LENGTH.size
        if parcel is not None:
            size += parcel.size
        if length > PATH_MAX or size < 0 or not size >= METADATA_LENGTH.unpack_from(body, begin)[0] <= METADATA_MAX:
            raise ProtocolError(EPROTO, "a CALL whose lengths do not fit", tag)
        calls = self.calls
        if conn not in self._peers or tag in calls:
            raise ProtocolError(EPROTO, "a CALL of no connection, or with a tag that is in use", tag)
        key = body[_KEY_BEGIN:begin]
        known = worker.known.get(key) or worker.know(key, body[_KEY_END:begin])
        now = self._loop.now
        if not calls:  # a deadline later than another's needs no seeing to: of a link's calls, only the oldest's
            self._loop.wake(now + worker.calls.timeout)
        call = calls[tag] = Call(self, tag, conn, known.path, dev, ino, body[begin:], now)
        call.parcel = parcel
        if size > _LARGE and self._loop.backlog() + worker.services.held() > HANDLER_INPUT_MAX:
            call.fail(EAGAIN, "too much waits for handlers that do not read: try again later")
            return
        if known.batch != worker.batch:
            worker.check(known, call, self._peers[conn])
        elif known.endpoint is not None:
            worker.services.deliver(known.endpoint, call)
        elif known.line is None or known.line.over or not known.line.send(call):
            worker.check(known, call, self._peers[conn])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
