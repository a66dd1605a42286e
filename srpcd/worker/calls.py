"""Calls that are not yet answered, and the links to gates that they came by.

Each call is answered exactly once: `Call.finish` and `Call.fail` take it out of its link, and whoever comes second finds
that it is gone. Nobody is answered after the CLOSE of the connection, or when the link is closed.
"""

from errno import ECANCELED, EIO, ETIMEDOUT

from srpcd.ipc import CALLED, ERROR_HEAD, FLUSHED, ORIGIN_HANDLER, ORIGIN_KERNEL, WORKER_ERROR
from srpcd.wire.frames import HEADER
from srpcd.wire.limits import ERROR_MESSAGE_MAX
from srpcd.worker.loop import INFINITY, Loop, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from srpcd.worker.parcel import Parcel

    class Custodian(Protocol):
        """Who has a call now: an endpoint where it waits, a line, a running program."""

        def abandon(self, call: "Call") -> None:
            """The call is over, though not answered: let go of it, and stop what is done about it."""


def cut(text: str) -> bytes:
    """A sentence as it may go into an error: UTF-8, at most ERROR_MESSAGE_MAX bytes."""
    data = text.encode(errors="replace")
    return data if len(data) <= ERROR_MESSAGE_MAX else data[:ERROR_MESSAGE_MAX].decode(errors="ignore").encode()


class Link:
    """What goes back to one gate, and the calls that came from it."""

    __slots__ = ("calls", "writer")

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.calls: dict[int, Call] = {}

    def reply(self, kind: int, tag: int, body: bytes = b"") -> None:
        """Send a reply."""
        self.writer.add(HEADER.pack(kind, tag, len(body)) + body)

    def error(self, tag: int, errno: int, message: str = "") -> None:
        """Send an error of ours or of the kernel's. message: a sentence, or empty for that of the errno."""
        self.reply(WORKER_ERROR, tag, ERROR_HEAD.pack(errno, ORIGIN_KERNEL) + cut(message))


class Call:
    """One call. body: metadata length, metadata, payload; emptied when the handler has it. arrived: monotonic seconds.

    parcel: the payload where it is large, and then not in the body; likewise.
    custodian: who has it. seq: its number on a line.
    """

    __slots__ = ("arrived", "body", "conn", "custodian", "dev", "ino", "link", "parcel", "path", "seq", "tag")

    def __init__(self, link: Link, tag: int, conn: int, path: str, dev: int, ino: int, body: bytes, arrived: float) -> None:
        self.parcel: Parcel | None = None
        self.link = link
        self.tag = tag
        self.conn = conn
        self.path = path
        self.dev = dev
        self.ino = ino
        self.body = body
        self.arrived = arrived
        self.custodian: Custodian | None = None
        self.seq = 0

    def finish(self, body: bytes) -> None:
        """Answer: metadata length, metadata, payload."""
        if self.link.calls.pop(self.tag, None) is not None:
            self.link.writer.add(HEADER.pack(CALLED, self.tag, len(body)) + body)

    @property
    def size(self) -> int:
        """Bytes that are held for it."""
        return len(self.body) + (self.parcel.size if self.parcel is not None else 0)

    def finish_large(self, head: bytes, parcel: "Parcel") -> None:
        """Answer, where the payload is large. head: metadata length, metadata."""
        if self.link.calls.pop(self.tag, None) is None:
            parcel.close()
            return
        parcel.put(HEADER.pack(CALLED, self.tag, len(head) + len(parcel)) + head)
        self.link.writer.send(parcel)

    def fail(self, errno: int, message: str = "") -> None:
        """Answer with an error of ours or of the kernel's."""
        self._drop()
        if self.link.calls.pop(self.tag, None) is not None:
            self.link.error(self.tag, errno, message)

    def fail_by_handler(self, body: bytes) -> None:
        """Answer with the handler's own error, whose body nobody has looked into."""
        if self.link.calls.pop(self.tag, None) is not None:
            self.link.reply(WORKER_ERROR, self.tag, ERROR_HEAD.pack(EIO, ORIGIN_HANDLER) + body)

    def abandon(self) -> None:
        """Have whoever has it let go of it. Not answered by this."""
        if self.custodian is not None:
            self.custodian.abandon(self)
            self.custodian = None
        self.body = b""
        self._drop()

    def _drop(self) -> None:
        if self.parcel is not None:
            self.parcel.close()
            self.parcel = None


class Calls:
    """All links, and the calls' deadlines. timeout: seconds for one call."""

    def __init__(self, loop: Loop, timeout: float) -> None:
        self._loop = loop
        self.timeout = timeout
        self.links: list[Link] = []
        loop.duties.append(self._deadlines)

    def flush(self, link: Link, tag: int, target: int) -> None:
        """A gate's FLUSH: the call's own error first, then the reply to the flush."""
        call = link.calls.get(target)
        if call is not None:
            call.abandon()
            call.fail(ECANCELED)
        link.reply(FLUSHED, tag)

    def drop(self, link: Link, conn: "int | None" = None) -> None:
        """Flush the calls of one connection (None: of all) without a word: nobody is there to hear it."""
        for tag, call in list(link.calls.items()):
            if conn is None or call.conn == conn:
                del link.calls[tag]
                call.abandon()

    def _deadlines(self) -> float:
        now, due = self._loop.now, INFINITY
        for link in self.links:
            late = []
            for call in link.calls.values():  # in the order of arrival, and all have the same time
                if call.arrived + self.timeout > now:
                    due = min(due, call.arrived + self.timeout)
                    break
                late.append(call)
            for call in late:
                call.abandon()
                call.fail(ETIMEDOUT)
        return due
