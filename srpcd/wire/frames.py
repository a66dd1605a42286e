"""Frames: a header of 20 bytes, `int32 type, uint64 seq, uint64 length` in network byte order, then `length` bytes.

The same frames go over TLS, over the local socket, over lines and over a resident program's standard input and output
(paper, section III.A; docs/protocol.md). A length is checked against its type's limit before a byte is kept for it.
"""

from errno import EMSGSIZE, EPROTO
from io import SEEK_CUR, BytesIO
from struct import Struct

from srpcd.wire.errors import ProtocolError
from srpcd.wire.limits import (
    APPEND_MAX,
    APPEND_REPLY_MAX,
    CALL_MAX,
    JSON_MAX,
    LARGE,
    METADATA_MAX,
    STAT_REPLY_MAX,
    STRANGER_MAX,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HEADER = Struct("!iQQ")
_header_at = HEADER.unpack_from
CALL_HEAD = Struct("!QI")
"""Head of a call's body: fid, metadata length."""
METADATA_LENGTH = Struct("!I")
"""Head of a call's reply: metadata length."""
SEQ = Struct("!Q")
"""Body of a flush: the seq to cancel."""

_AHEAD = 32
"""How many times as much room is made for a large frame as has come of it."""

_ROOM_MIN = LARGE // 4
"""Bytes of room below which more is made: a read that brings less is not worth its system call."""

PIPE_BUF = 4096
"""Bytes that a pipe takes as one, on Linux."""

CALLER = -2
"""First frame of a line: who the caller is, a JSON object. Written by the monitor (lines) or the worker (programs)."""
ERROR = -1
AUTH, AUTH_REPLY = 1, 2
ATTACH, ATTACH_REPLY = 3, 4
WALK, WALK_REPLY = 5, 6
STAT, STAT_REPLY = 7, 8
APPEND, APPEND_REPLY = 9, 10
CLUNK, CLUNK_REPLY = 11, 12
CALL, CALL_REPLY = 13, 14
FLUSH, FLUSH_REPLY = 15, 16
PING, PING_REPLY = 17, 18
ANNOUNCE, ANNOUNCE_REPLY = 19, 20
LISTEN, LISTEN_REPLY = 21, 22

NAMES = {
    AUTH: "auth",
    ATTACH: "attach",
    WALK: "walk",
    STAT: "stat",
    APPEND: "append",
    CLUNK: "clunk",
    CALL: "call",
    FLUSH: "flush",
    PING: "ping",
    ANNOUNCE: "announce",
    LISTEN: "listen",
}
"""Name of each request, by type."""

REQUESTS = {
    AUTH: JSON_MAX,
    ATTACH: JSON_MAX,
    WALK: JSON_MAX,
    STAT: JSON_MAX,
    APPEND: APPEND_MAX,
    CLUNK: JSON_MAX,
    CALL: CALL_MAX,
    FLUSH: SEQ.size,
    PING: 0,
    ANNOUNCE: JSON_MAX,
    LISTEN: JSON_MAX,
}
"""What a server reads: type to the largest body allowed. A type that is not here ends the connection."""

STRANGER_REQUESTS = {kind: min(limit, STRANGER_MAX) for kind, limit in REQUESTS.items()}
"""What a server reads before anybody has authenticated on the connection."""

REPLIES = {
    ERROR: JSON_MAX,
    AUTH_REPLY: JSON_MAX,
    ATTACH_REPLY: JSON_MAX,
    WALK_REPLY: JSON_MAX,
    STAT_REPLY: STAT_REPLY_MAX,
    APPEND_REPLY: APPEND_REPLY_MAX,
    CLUNK_REPLY: JSON_MAX,
    CALL_REPLY: CALL_MAX,
    FLUSH_REPLY: 0,
    PING_REPLY: JSON_MAX,
    ANNOUNCE_REPLY: JSON_MAX,
    LISTEN_REPLY: JSON_MAX,
}
"""What a client reads."""

LINE_REQUESTS = {CALLER: JSON_MAX, CALL: CALL_MAX, FLUSH: SEQ.size}
"""What a handler reads from its line."""

LINE_REPLIES = {CALL_REPLY: CALL_MAX, ERROR: JSON_MAX}
"""What a worker reads from a line or from a resident program."""


def frame(kind: int, seq: int, body: bytes = b"") -> bytes:
    """One frame, ready to be sent."""
    return HEADER.pack(kind, seq, len(body)) + body


def _json_text(text: str) -> str:
    """A JSON string, in ASCII."""
    units = text.encode("utf-16-be", "surrogatepass")
    codes = (int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2))
    return '"' + "".join(chr(c) if 32 <= c < 127 and c not in (34, 92) else f"\\u{c:04x}" for c in codes) + '"'


def caller_frame(uid: int, gid: int, groups: "tuple[int, ...]", user: str, context: str, endpoint: str) -> bytes:
    """The first frame of a line (`messages.Caller`), at most PIPE_BUF bytes: groups are null where they do not fit.

    Made by hand: neither the monitor nor a worker has a JSON library in it. context: empty for none.
    """
    label = _json_text(context) if context else "null"
    head = f'{{"uid":{uid},"gid":{gid},"user":{_json_text(user)},"context":{label},"endpoint":{_json_text(endpoint)}'
    body = f'{head},"groups":[{",".join(map(str, groups))}]}}'.encode()
    if HEADER.size + len(body) > PIPE_BUF:
        body = f'{head},"groups":null}}'.encode()
    return frame(CALLER, 0, body)


def _before_payload(beginning: bytes, head: int) -> int:
    """Bytes of a body before its payload; 0 where `beginning` does not tell. head: bytes, the last of a metadata length."""
    if len(beginning) < head:
        return 0
    metadata: int = METADATA_LENGTH.unpack_from(beginning, head - METADATA_LENGTH.size)[0]
    size = head + metadata
    return size if metadata <= METADATA_MAX and size <= len(beginning) else 0


def call_head(kind: int, beginning: bytes) -> int:
    """Bytes of a call's body before its payload; 0 where `beginning` does not tell. For `FrameReader`."""
    return _before_payload(beginning, CALL_HEAD.size) if kind == CALL else 0


def reply_head(kind: int, beginning: bytes) -> int:
    """Bytes of a call reply's body before its payload; 0 where `beginning` does not tell. For `FrameReader`."""
    return _before_payload(beginning, METADATA_LENGTH.size) if kind == CALL_REPLY else 0


def take(out: "list[bytes | memoryview]") -> "bytes | memoryview":
    """What of `out` is to be written next, taken from its front: what is small joined, what is LARGE alone, uncopied."""
    count = 0
    for part in out:
        if len(part) >= LARGE:
            break
        count += 1
    data = b"".join(out[:count]) if count else out[0]
    del out[: count or 1]
    return data


def apart(head: bytes, payload: bytes) -> "tuple[bytes | memoryview, ...]":
    """A frame in pieces to be sent one after the other: with something LARGE to begin with, and the rest not copied."""
    if len(payload) < 2 * LARGE:
        return (head + payload,)
    return head + payload[:LARGE], memoryview(payload)[LARGE:]


class FrameReader:
    """Cuts a stream of bytes into frames.

    limits: type to the largest body allowed, as `REQUESTS`; may be replaced between two calls of `feed`.
    head: tells from type and beginning of a body how much of it stands before the payload (0: not to be told). Of a body
    that is LARGE the two are then given out apart, so that nobody has to copy the payload to have it alone.
    large: bytes that are missing of a body that is being collected, where these were LARGE. They may be read straight into
    `room`, or fed as any others.
    payload: of the frame that was yielded last, where that is apart from its body; else empty.
    partials: how many frames have begun without being whole so far. It tells whether the one in progress is still the same.
    """

    __slots__ = ("_begun", "_collected", "_head", "_missing", "_pending", "_room", "large", "limits", "partials", "payload")

    def __init__(self, limits: "Mapping[int, int]", head: "Callable[[int, bytes], int] | None" = None) -> None:
        self.limits = limits
        self.large = 0
        self.partials = 0
        self.payload = b""
        self._head = head
        self._pending = bytearray()  # the beginning of a frame whose rest has not come yet
        self._missing = 0  # bytes after which `_pending` is worth another look
        self._begun: "tuple[int, int, bytes] | None" = None  # type, seq and head of the large frame that is being collected
        self._collected = BytesIO()  # its `getvalue` gives what was written without another copy
        self._room = 0  # bytes that it was made for so far

    def feed(self, data: bytes) -> "Iterator[tuple[int, int, bytes]]":
        """Each frame that `data` completes, as (type, seq, body). To be consumed to its end.

        Raises ProtocolError (EPROTO: unknown type; EMSGSIZE: too long) at the place in
        the stream where it is; nothing may be fed after that.
        """
        rest = len(data) - 20
        if rest >= 0 and not self._missing and self._begun is None:
            kind, seq, length = _header_at(data)
            if rest == length <= self.limits.get(kind, -1):  # one frame and no more: a lone call
                return iter(((kind, seq, data[20:]),))
        return self._frames(data)

    def _frames(self, data: bytes) -> "Iterator[tuple[int, int, bytes]]":
        if self._begun is not None:
            size = self.large
            self._keep(memoryview(data)[:size])
            if self.large:
                return
            kind, seq, head = self._begun
            body = self._collected.getvalue()
            self._begun = None
            self._collected = BytesIO()
            self._room = 0
            if head:
                self.payload = body
                yield kind, seq, head
                self.payload = b""
            else:
                yield kind, seq, body
            data = data[size:]
        elif self._missing:
            self._pending += data
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = bytes(self._pending)
            self._pending.clear()
            self._missing = 0
        offset, end = 0, len(data)
        while end - offset >= 20:
            kind, seq, length = _header_at(data, offset)
            limit = self.limits.get(kind)
            if limit is None:
                raise ProtocolError(EPROTO, f"message type {kind} is not known here", seq)
            if length > limit:
                raise ProtocolError(EMSGSIZE, f"a body of {length} bytes: at most {limit} for message type {kind}", seq)
            stop = offset + 20 + length
            if stop > end:
                if stop - end >= LARGE:
                    self._begin(kind, seq, data[offset + 20 :], stop - end)
                    return
                self._missing = stop - end
                break
            yield kind, seq, data[offset + 20 : stop]
            offset = stop
        else:
            if end == offset:
                return
            self._missing = 20 - (end - offset)
        self.partials += 1
        self._pending += data[offset:] if offset else data

    def divert(self) -> "tuple[int, bytes, bytes, int] | None":
        """Have the frame that is being collected to oneself, and go on behind its end, once that was read elsewhere.

        Returns its seq, its head, what has come of its payload, and how much has not; None where the head is not known: then
        it is collected here.
        """
        if self._begun is None or not self._begun[2]:
            return None
        _kind, seq, head = self._begun
        self._begun = None
        missing, self.large = self.large, 0
        beginning = self._collected.getvalue()[: self._collected.tell()]
        self._collected = BytesIO()
        self._room = 0
        return seq, head, beginning, missing

    @property
    def partial(self) -> bool:
        """Whether the beginning of a frame is waiting for its rest."""
        return self._missing > 0 or self._begun is not None

    @property
    def missing(self) -> int:
        """Bytes after which the frame in progress, or its header, is whole."""
        return self.large or self._missing

    @property
    def expected(self) -> int:
        """Bytes that the large frame in progress takes when it is whole; 0 if there is none."""
        return self._collected.tell() + self.large if self._begun is not None else 0

    @property
    def held(self) -> int:
        """Bytes of memory that are used for the frame in progress."""
        return len(self._pending) + self._room

    def clear(self) -> None:
        """Drop the frame in progress. Nothing may be fed afterwards."""
        self.large = self._missing = self._room = 0
        self._begun = None
        self._pending = bytearray()
        self._collected = BytesIO()

    def _begin(self, kind: int, seq: int, beginning: bytes, missing: int) -> None:
        """Collect a large frame's body. beginning: what has come of it."""
        size = self._head(kind, beginning) if self._head is not None else 0
        self._begun = (kind, seq, beginning[:size])
        self.partials += 1
        # No room is made yet: the reader of the stream may have to wait until it may take the rest.
        self._room = self._collected.write(memoryview(beginning)[size:])
        self.large = missing

    def room(self) -> memoryview:
        """Where the next bytes of the large frame belong, or some of them. To be released before anything else is done."""
        self._make_room(0)
        return self._collected.getbuffer()[self._collected.tell() : self._room]

    def _make_room(self, coming: int) -> None:
        """See to it that there is room. coming: bytes that are here, and for which it has to be enough."""
        collected = self._collected
        filled = collected.tell()
        if self._room - filled < max(coming, _ROOM_MIN) and self._room < filled + self.large:
            # For all of it at once, which spares it being moved again and again; but only in proportion to what has come, or
            # a header alone would cost us 16 MiB.
            self._room = min(max((filled + coming) * _AHEAD, LARGE), filled + self.large)
            collected.seek(self._room - 1)
            collected.write(b"\0")
            collected.seek(filled)

    def filled(self, count: int) -> None:
        """So many bytes were put into `room`. `feed` follows, with what came after them, and yields what they complete."""
        self._collected.seek(count, SEEK_CUR)
        self.large -= count

    def _keep(self, data: memoryview) -> None:
        """Add to what is collected of a large frame what has come of it."""
        self._make_room(len(data))
        self._collected.write(data)
        self.large -= len(data)


class Receiver:
    """Base of what takes a stream by a method `receive`: large frames may be read straight to where they belong."""

    __slots__ = ()

    _reader: FrameReader

    @property
    def large(self) -> int:
        """Bytes that are still to come of a large frame that has begun; else 0."""
        return self._reader.large

    @property
    def expected(self) -> int:
        """Bytes that this frame takes when it is whole; else 0."""
        return self._reader.expected

    def room(self) -> memoryview:
        """Where the next of them belong. To be released, and `filled` told, before `receive`."""
        return self._reader.room()

    def filled(self, count: int) -> None:
        """So many bytes were put into `room`. `receive` follows, with what came after them."""
        self._reader.filled(count)
