"""Frames: a header of 20 bytes, `int32 type, uint64 seq, uint64 length` in network byte order, then `length` bytes.

The same frames go over TLS, over the local socket, over lines and over a resident program's standard input and output
(paper, section III.A; docs/protocol.md). A length is checked against its type's limit before a byte is kept for it.
"""

from errno import EMSGSIZE, EPROTO
from struct import Struct

from srpcd.wire.errors import ProtocolError
from srpcd.wire.limits import APPEND_MAX, CALL_MAX, JSON_MAX, PAYLOAD_MAX, STAT_REPLY_MAX, STRANGER_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HEADER = Struct("!iQQ")
_header_at = HEADER.unpack_from
CALL_HEAD = Struct("!QI")
"""Head of a call's body: fid, metadata length."""
METADATA_LENGTH = Struct("!I")
"""Head of a call's reply: metadata length."""
SEQ = Struct("!Q")
"""Body of a flush: the seq to cancel."""

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
    APPEND_REPLY: 6 * PAYLOAD_MAX + JSON_MAX,
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


class FrameReader:
    """Cuts a stream of bytes into frames.

    limits: type to the largest body allowed, as `REQUESTS`; may be replaced between two calls of `feed`.
    """

    __slots__ = ("_missing", "_pending", "limits")

    def __init__(self, limits: "Mapping[int, int]") -> None:
        self.limits = limits
        self._pending = bytearray()  # the beginning of a frame whose rest has not come yet
        self._missing = 0  # bytes after which `_pending` is worth another look

    def feed(self, data: bytes) -> "Iterator[tuple[int, int, bytes]]":
        """Each frame that `data` completes, as (type, seq, body). To be consumed to its end.

        Raises ProtocolError (EPROTO: unknown type; EMSGSIZE: too long) at the place in the stream where it is; nothing
        may be fed after that.
        """
        rest = len(data) - 20
        if rest >= 0 and not self._missing:
            kind, seq, length = _header_at(data)
            if rest == length <= self.limits.get(kind, -1):  # one frame and no more: a lone call
                return iter(((kind, seq, data[20:]),))
        return self._frames(data)

    def _frames(self, data: bytes) -> "Iterator[tuple[int, int, bytes]]":
        if self._missing:
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
                self._missing = stop - end
                break
            yield kind, seq, data[offset + 20 : stop]
            offset = stop
        else:
            if end == offset:
                return
            self._missing = 20 - (end - offset)
        self._pending += data[offset:] if offset else data

    @property
    def partial(self) -> bool:
        """Whether the beginning of a frame is waiting for its rest."""
        return self._missing > 0
