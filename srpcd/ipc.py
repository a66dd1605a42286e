"""Typed messages between the daemon's processes, and the pipes and sockets that carry them.

Who talks to whom, and through what:

    monitor ◄─► gate, worker, authentication child    a SEQPACKET socket; only the monitor sends descriptors with it
    gate ◄─► authentication child                     a SEQPACKET socket
    gate ◄─► worker                                   a STREAM socket, with frames (see below)

All are Unix sockets, because a pipe takes more than bytes: splice(2) puts pages of a file into it, and the reader of a page
that a FUSE file system keeps locked can't be killed any more. What is sent to a socket is copied while the *sender* waits.
The monitor accepts no descriptors, and its children accept them from the monitor alone (`srpcd.passing`). A message is at
most PACKET_MAX bytes.

This module is light: workers import it.

Between gate and worker there are frames as on the network, with types of their own (`WALK` … `WORKER_ERROR`), bodies
packed by struct, and a *tag* that the gate chooses in the place of seq. The worker keeps no fids.

    gate ► worker   OPEN   tag = connection number   peer's address, UTF-8 (before anything else of that connection)
                    CLOSE  tag = connection number   —               (flushes what is outstanding, no replies to that)
                    WALK                             path
                    STAT                             STAT_HEAD: dev, ino, limit, length of after; after; path
                    CALL                             CALL_HEAD: connection, dev, ino, length of path; path;
                                                     metadata length, metadata, payload (as on the network)
                    FLUSH                            FLUSH_BODY: tag to cancel
    worker ► gate   WALKED                           WALKED_BODY: dev, ino, kind
                    STATTED                          a packed `Stat`
                    CALLED                           metadata length, metadata, payload
                    FLUSHED                          — (after the cancelled call's own WORKER_ERROR)
                    WORKER_ERROR                     ERROR_HEAD: errno, origin; origin ORIGIN_KERNEL: a sentence, UTF-8,
                                                     may be empty; ORIGIN_HANDLER: the handler's own error body, JSON
                                                     that nobody has looked into yet

A path is that of the whole tree: elements joined by `/`, no slash in front, empty for the root.
"""

import os
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_TRUNC,
    SCM_RIGHTS,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    socketpair,
)
from _socket import socket as Socket
from struct import Struct, pack, unpack_from
from struct import error as StructError

from srpcd.passing import refuse_descriptors
from srpcd.wire.limits import CALL_MAX, ERROR_MESSAGE_MAX, JSON_MAX, NAME_MAX, PATH_MAX, STAT_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import dataclass_transform
else:

    def dataclass_transform():
        return lambda cls: cls


PACKET_MAX = 4096
"""Bytes of the largest message to the monitor, and between gate and authentication child: two paths, with room."""

# --- frames between gate and worker ------------------------------------------------------------------------------------

OPEN, CLOSE, WALK, STAT, CALL, FLUSH = 1, 2, 3, 4, 5, 6
WALKED, STATTED, CALLED, FLUSHED, WORKER_ERROR = 33, 34, 35, 36, 37

STAT_HEAD = Struct("!QQIH")
CALL_HEAD = Struct("!QQQH")
FLUSH_BODY = Struct("!Q")
WALKED_BODY = Struct("!QQB")
ERROR_HEAD = Struct("!HB")
ORIGIN_KERNEL, ORIGIN_HANDLER = 0, 1

DIRECTORY, SERVICE, PROGRAM, RESIDENT = 0, 1, 2, 3
"""Kinds of file in the tree (WALKED_BODY, Stat)."""

TO_WORKER = {
    OPEN: NAME_MAX,
    CLOSE: 0,
    WALK: PATH_MAX,
    STAT: STAT_HEAD.size + NAME_MAX + PATH_MAX,
    CALL: CALL_HEAD.size + PATH_MAX + CALL_MAX,
    FLUSH: FLUSH_BODY.size,
}
FROM_WORKER = {
    WALKED: WALKED_BODY.size,
    STATTED: STAT_PAGE * (4 + NAME_MAX) + JSON_MAX,  # a page of names, and what is said about the file
    CALLED: CALL_MAX,
    FLUSHED: 0,
    WORKER_ERROR: ERROR_HEAD.size + max(JSON_MAX, ERROR_MESSAGE_MAX),
}
"""For FrameReader: type to the largest body."""

# --- typed messages ----------------------------------------------------------------------------------------------------


class MessageError(Exception):
    """The bytes are no message of ours: the sender is broken or hostile, and whoever reads this ends it."""


_U64 = Struct("!Q")
_U32 = Struct("!I")


def _put(kind: object, value: object) -> bytes:
    if kind is int:
        return _U64.pack(value)
    if kind is bool:
        return b"\1" if value else b"\0"
    if kind is bytes:
        return _U32.pack(len(value)) + value  # type: ignore[arg-type, operator]
    if kind is str:
        text = value.encode("utf-8", "surrogateescape")  # type: ignore[attr-defined]
        return _U32.pack(len(text)) + text  # type: ignore[no-any-return]
    item = kind.__args__[0]  # type: ignore[attr-defined]  # tuple[item, ...]
    return _U32.pack(len(value)) + b"".join(_put(item, each) for each in value)  # type: ignore[arg-type, attr-defined]


def _get(kind: object, data: bytes, at: int) -> "tuple[object, int]":
    if kind is int:
        return _U64.unpack_from(data, at)[0], at + 8
    if kind is bool:
        return data[at] != 0, at + 1
    (length,) = _U32.unpack_from(data, at)
    at += 4
    if length > len(data) - at:
        raise MessageError("a length beyond the message")
    if kind is bytes:
        return data[at : at + length], at + length
    if kind is str:
        return data[at : at + length].decode("utf-8", "surrogateescape"), at + length
    values = []
    for _ in range(length):
        value, at = _get(kind.__args__[0], data, at)  # type: ignore[attr-defined]
        values.append(value)
    return tuple(values), at


@dataclass_transform()
class Message:
    """A record whose fields are its annotations: int (64 bits, unsigned), bool, str, bytes, or tuple[one of these, ...]."""

    _classes: "list[type[Message]]" = []
    _fields: "dict[str, object]" = {}
    _number = 0

    def __init_subclass__(cls) -> None:
        cls._number = len(Message._classes)
        cls._fields = dict(cls.__annotations__)
        Message._classes.append(cls)

    def __init__(self, *values: object) -> None:
        if len(values) != len(self._fields):
            raise TypeError(f"{type(self).__name__} has {len(self._fields)} fields, not {len(values)}")
        self.__dict__.update(zip(self._fields, values, strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def pack(self) -> bytes:
        """The message as bytes."""
        parts = [_put(kind, self.__dict__[name]) for name, kind in self._fields.items()]
        return bytes((self._number,)) + b"".join(parts)

    @staticmethod
    def unpack(data: bytes) -> "Message":
        """The message in `data`, all of it. Raises MessageError for anything that `pack` would not have made."""
        try:
            cls = Message._classes[data[0]]
            values, at = [], 1
            for kind in cls._fields.values():
                value, at = _get(kind, data, at)
                values.append(value)
        except (IndexError, StructError, UnicodeDecodeError) as fault:
            raise MessageError(str(fault)) from None
        if at != len(data):
            raise MessageError("bytes left over")
        return cls(*values)


# monitor ► gate


class GateSetup(Message):
    """First message to a gate, with the descriptors of key and certificate where it speaks TLS.

    uid, gid, groups, context, personal, monitor: as in `WorkerSetup`. kind: "tls" or "local".
    config: the daemon's configuration as JSON (`srpcd.config`).
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    context: str
    personal: bool
    monitor: int
    kind: str
    config: bytes


class Connection(Message):
    """An accepted connection, with its descriptor. peer: address for people and for programs (`SRPC_PEER`)."""

    conn: int
    peer: str


class Conversation(Message):
    """Authentication has begun: talk to its child through the descriptor, a packet socket."""

    conn: int
    afid: int


class Verdict(Message):
    """Authentication is over. errno: 0 accepted; EACCES refused; EAGAIN a limit; ETIMEDOUT not finished in time.

    afid: 0, which is none: there will be no more, for the connection is about to be ended, and this is why.
    """

    conn: int
    afid: int
    errno: int
    message: str


class Attached(Message):
    """An attach or a resume is granted. With a descriptor, a stream socket to the worker, where the gate does not have one
    yet; without where it does. link: the number of this socket. uid: of the worker."""

    conn: int
    request: int
    session: int
    link: int
    uid: int


class Refused(Message):
    """An attach, resume or announce is not granted."""

    conn: int
    request: int
    errno: int
    message: str


class SessionOver(Message):
    """The session is too old, or its user has changed: forget its fids (EKEYEXPIRED), another attach is needed."""

    conn: int
    session: int


class Announced(Message):
    """The endpoint is registered. warning: a sentence, or empty."""

    conn: int
    request: int
    announcement: int
    warning: str


class NewLine(Message):
    """A caller's line is ready for the service behind an announcement."""

    conn: int
    announcement: int
    line: int


class Drain(Message):
    """Take no new calls; finish or fail what is outstanding within `milliseconds`; say `Drained`, and stay until the end of
    file (a service of the local gate may have calls of the other one to answer)."""

    milliseconds: int


class Ping(Message):
    """Answer with `Pong`: whoever does not is taken for hung."""


# gate ► monitor


class Ready(Message):
    """The gate has dropped everything, proved it, is in its sandbox, and serves. landlock: the version of Landlock's
    interface that is in force there; 0: the kernel has none."""

    landlock: int


class Taken(Message):
    """The gate has the connection (so the monitor may hand over more)."""

    conn: int


class Authenticate(Message):
    """Begin to authenticate. afid: a number that the gate chose (its own, not the network's), new on this connection."""

    conn: int
    afid: int
    mechanism: str
    uname: str
    aname: str


class ForgetAfid(Message):
    """The client clunked the afid: end its authentication, or what it is good for."""

    conn: int
    afid: int


class Attach(Message):
    """Make a session. request: the gate's number for the reply (Attached or Refused). aname: normalised path."""

    conn: int
    request: int
    afid: int
    uname: str
    aname: str


class Resume(Message):
    """The worker of a session has died, or the socket to it has: give another (Attached or Refused). link: what it had."""

    conn: int
    request: int
    session: int
    link: int


class Detach(Message):
    """The last fid of a session is gone."""

    conn: int
    session: int


class Drained(Message):
    """Nothing is outstanding any more, after `Drain`."""


class Pong(Message):
    """Answer to Ping."""


class Announce(Message):
    """Register the endpoint at `path` for the process at the other end of a local connection."""

    conn: int
    request: int
    path: str


class Withdraw(Message):
    """End an announcement."""

    conn: int
    announcement: int


class DescriptorsSent(Message):
    """The process at the other end of a local connection sends descriptors, whose release takes the gate's time."""

    conn: int


class Refusal(Message):
    """For the log: the kernel (or a rule) refused a walk, stat or call. unreported: refusals of that user before this one
    that have no message of their own."""

    conn: int
    session: int
    operation: str
    path: str
    errno: int
    unreported: int


# monitor ► worker


class WorkerSetup(Message):
    """First message to a worker: who it must find itself to be, and its bounds.

    uid, gid, groups: all three ids of each kind, and the supplementary groups exactly. context: of SELinux, empty where
    that is off. personal: no drop took place. monitor: its process id. user: the account's name. tree: the tree's root
    directory. path: `PATH` for programs. call_timeout: ms for one call. children: programs at once. resident_idle: ms
    without a call after which one that stays ends.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    context: str
    personal: bool
    monitor: int
    user: str
    tree: str
    path: str
    call_timeout: int
    children: int
    resident_idle: int


class Gate(Message):
    """A gate routes to this worker: one descriptor, a stream socket, in the place of the one that it had."""

    gate: int


class GateOver(Message):
    """No session of this gate is left at this worker: close its socket."""

    gate: int


class LineExpected(Message):
    """A service was told to connect a line: `Line` or `LineOver` follows. dev, ino: of the endpoint."""

    line: int
    dev: int
    ino: int


class Line(Message):
    """A service has connected a line: one descriptor, a Unix stream socket, in which the first frame was sent."""

    line: int


class Lines(Message):
    """Answer to LinesWanted, after `LineExpected` for each line. errno 0: permitted, and further lines will come by
    themselves when somebody announces; else the probe's errno (EACCES, ENOENT, ESTALE …) or EAGAIN."""

    dev: int
    ino: int
    errno: int


class LineOver(Message):
    """The announcement behind a line has ended."""

    line: int


class Live(Message):
    """Answer to IsLive."""

    request: int
    live: bool


# worker ► monitor


class Proved(Message):
    """The worker has proved its drop, and serves."""


class LinesWanted(Message):
    """First call on a service endpoint, or no line to it is left. The worker's word for dev and ino is checked."""

    path: str
    dev: int
    ino: int


class LineGone(Message):
    """The other end of a line is gone."""

    line: int


class IsLive(Message):
    """Does anybody serve this endpoint?"""

    request: int
    dev: int
    ino: int


# monitor ► authentication child


class AuthSetup(Message):
    """First message, with one descriptor, a packet socket to the gate.

    context, monitor: as in `WorkerSetup`. mechanism: "pam"; or "peer", where the monitor knows who it is, and only the
    account is checked. service: PAM service. rhost: the peer's address, empty on the local socket.
    """

    context: str
    monitor: int
    mechanism: str
    service: str
    uname: str
    rhost: str


class Proceed(Message):
    """The answer to `Answered`: PAM may work."""


# authentication child ► monitor


class Waiting(Message):
    """PAM asks the client something: the child does nothing until there is an answer."""


class Answered(Message):
    """The client has answered. The child goes on when it gets `Proceed`."""


class Outcome(Message):
    """How it ended. errno 0: accepted. reason: for the log, never for the client. answered: CLOCK_MONOTONIC in ns of the
    last answer that came, 0 if none. uid: the account's, from before the first step of PAM until after the last; 0 if PAM
    has refused."""

    errno: int
    reason: str
    answered: int
    uid: int


# authentication child ► gate, gate ► authentication child


class Prompts(Message):
    """What PAM says, in order: styles "secret", "text", "info", "error", and texts."""

    styles: tuple[str, ...]
    texts: tuple[str, ...]


class Answer(Message):
    """The answer to the next prompt that wants one. Over PASSWORD_MAX: cut to one byte more, so that it is refused."""

    answer: bytes


# a worker's STATTED body


class Stat(Message):
    """What stat found; fields as in the protocol. kind: DIRECTORY … RESIDENT. readable: children could be read."""

    dev: int
    ino: int
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    live: bool
    readable: bool
    more: bool
    user: str
    group: str
    context: str
    children: tuple[str, ...]


# --- transport ---------------------------------------------------------------------------------------------------------


def receive(sock: Socket) -> "tuple[Message, list[int]] | None":
    """The monitor's next message on `sock`, with the descriptors that came with it (close-on-exec).

    Returns None at end of file: the monitor is gone. Raises BlockingIOError, MessageError.
    """
    data, ancillary, _flags, _address = sock.recvmsg(256 * 1024, 4096, MSG_CMSG_CLOEXEC)
    if not data:
        return None
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            fds.extend(unpack_from(f"{len(content) // 4}i", content))  # `array` would import collections: 1 ms
    return Message.unpack(data), fds


def send_descriptors(sock: Socket, message: Message, fds: "Sequence[int]" = ()) -> None:
    """Send from the monitor, without blocking. Raises BlockingIOError when the peer does not read: end that peer."""
    ancillary = [(SOL_SOCKET, SCM_RIGHTS, pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([message.pack()], ancillary, MSG_DONTWAIT)


def socket_pair(kind: int) -> "tuple[Socket, Socket]":
    """Two connected Unix sockets, not blocking, close-on-exec, that accept no descriptors. kind: SOCK_SEQPACKET keeps
    messages apart, SOCK_STREAM does not. Raises OSError."""
    pair = socketpair(AF_UNIX, kind | SOCK_NONBLOCK)
    for sock in pair:
        refuse_descriptors(sock)
    return pair


def receive_request(sock: Socket) -> "Message | None":
    """The next message to the monitor, from a process that may be hostile; None at end of file.

    The call has no buffer for descriptors. Raises BlockingIOError; MessageError also for descriptors and for a message that
    is too large, so that the sender is ended.
    """
    try:
        data, _none, flags, _address = sock.recvmsg(PACKET_MAX, 0, MSG_DONTWAIT)
    except ConnectionResetError:  # it ended, and left something unread
        return None
    if flags & MSG_CTRUNC:
        raise MessageError("it came with descriptors")
    if flags & MSG_TRUNC:
        raise MessageError(f"over {PACKET_MAX} bytes")
    return Message.unpack(data) if data else None


def read_packet(fd: int) -> "Message | None":
    """The next message of a packet socket; None at end of file. Raises BlockingIOError, MessageError."""
    data = os.read(fd, PACKET_MAX)
    return Message.unpack(data) if data else None


def write_packet(fd: int, message: Message) -> None:
    """Write one message to a packet socket. Raises BlockingIOError when it is full, MessageError when it is too large."""
    data = message.pack()
    if len(data) > PACKET_MAX:
        raise MessageError(f"{type(message).__name__}: {len(data)} bytes, over {PACKET_MAX}")
    os.write(fd, data)


def close_all(fds: "Iterable[int]") -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
