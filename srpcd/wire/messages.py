"""The JSON bodies of the protocol, as types; and the binary body of a call.

Decoding checks each body against its type and raises ProtocolError(EBADMSG) for anything else: broken JSON, a missing
field, a wrong type, a number out of range. Fields that are not known are ignored, so that later versions may add some.
"""

from errno import EBADMSG, EINVAL, EMSGSIZE, ENAMETOOLONG
from typing import Annotated, Literal, TypeVar

import msgspec

from srpcd.wire import errors, frames
from srpcd.wire.errors import ProtocolError, RequestError
from srpcd.wire.limits import (
    ERROR_MESSAGE_MAX,
    HELD_MAX,
    LABEL_MAX,
    METADATA_MAX,
    NAME_MAX,
    PATH_MAX,
    PAYLOAD_MAX,
    PROMPTS_MAX,
    QID_MAX,
    STAT_PAGE,
    UNAME_MAX,
)

U64 = Annotated[int, msgspec.Meta(ge=0)]
"""msgspec has no bounds beyond 63 bits: `decode` checks the upper one."""
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Time = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""Without bounds a server could send a time or a mode that the client can't turn into text."""
Name = Annotated[str, msgspec.Meta(max_length=NAME_MAX)]
QidText = Annotated[str, msgspec.Meta(max_length=QID_MAX)]
Account = Annotated[str, msgspec.Meta(max_length=UNAME_MAX)]
Label = Annotated[str, msgspec.Meta(max_length=LABEL_MAX)]
Sentence = Annotated[str, msgspec.Meta(max_length=ERROR_MESSAGE_MAX)]
Style = Literal["secret", "text", "info", "error"]
Mechanism = Literal["pam", "peer"]
Kind = Literal["directory", "service", "program", "resident"]


class Message(msgspec.Struct, frozen=True, gc=False):
    """Base of all JSON bodies."""


class Auth(Message, frozen=True):
    """Make an afid: begin to authenticate `uname` for the part of the tree at `aname`."""

    afid: U64
    uname: str
    aname: str = "/"
    mechanism: Mechanism = "pam"


class Prompt(Message, frozen=True):
    """One thing that PAM says. `secret` and `text` want an answer, by one append each; `info` and `error` do not."""

    style: Style
    text: Annotated[str, msgspec.Meta(max_length=HELD_MAX)]


Prompts = Annotated[list[Prompt], msgspec.Meta(max_length=PROMPTS_MAX)]


class AuthReply(Message, frozen=True):
    """What to append next, in this order. No prompts that want an answer: the afid is accepted already."""

    prompts: Prompts = []


class Attach(Message, frozen=True):
    """Point `fid` at `aname`, as the user of an accepted afid."""

    afid: U64
    fid: U64
    uname: str
    aname: str = "/"


class Qid(Message, frozen=True):
    """Reply to attach and walk. `qid` is `"device:inode"`."""

    qid: QidText
    is_dir: bool


class Walk(Message, frozen=True):
    """Point `newfid` at `path` (elements joined by `/`, relative to `fid`; empty: the same place)."""

    fid: U64
    newfid: U64
    path: str


class Stat(Message, frozen=True):
    """Describe a fid. Names of children come in pages, sorted by their bytes: those after `after`, at most `limit`."""

    fid: U64
    after: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=STAT_PAGE)] = STAT_PAGE


class StatReply(Message, frozen=True):
    """What stat tells.

    children: names in a directory; null where the kernel does not let the caller read them; empty for endpoints.
    more: whether there are names after the last one given.
    context: the SELinux context, null where there is none. mtime: nanoseconds since 1970.
    live: whether somebody serves it (a program endpoint always is).
    """

    qid: QidText
    name: Name
    is_dir: bool
    children: Annotated[list[Name], msgspec.Meta(max_length=STAT_PAGE)] | None
    more: bool
    mode: Mode
    uid: Id
    gid: Id
    user: Account
    group: Account
    context: Label | None
    mtime: Time
    kind: Kind
    live: bool


class Append(Message, frozen=True):
    """Answer a prompt of an afid, or call an endpoint with text."""

    fid: U64
    data: str


class AppendReply(Message, frozen=True, omit_defaults=True):
    """An endpoint's reply; on an afid `"1"` accepted, `"0"` refused, `""` go on with `prompts` (or with those left)."""

    data: str
    prompts: Prompts | None = None


class Clunk(Message, frozen=True):
    """Forget a fid, an afid, or an announcement."""

    fid: U64


class Announce(Message, frozen=True):
    """Serve the named pipe at `path` (from the tree's root); `fid` stands for the announcement from then on."""

    fid: U64
    path: str


class AnnounceReply(Message, frozen=True):
    """warning: a sentence for the administrator, or null."""

    warning: Sentence | None = None


class Listen(Message, frozen=True):
    """Tell each line of an announcement: many replies, until the announcement ends."""

    fid: U64


class ListenReply(Message, frozen=True):
    """`line`: the id of a new line, a directory under LINES/<own uid>."""

    line: U64


class Empty(Message, frozen=True):
    """The reply to clunk."""


class PingReply(Message, frozen=True, omit_defaults=True):
    """Facts about the server. tree: path of the tree's root directory, told on the local socket only."""

    tree: str | None = None


class Error(Message, frozen=True):
    """Why a request failed: `errno` of Linux, its name, a sentence."""

    errno: Annotated[int, msgspec.Meta(ge=1, le=4095)]
    code: str
    message: str


class Caller(Message, frozen=True):
    """First frame of a line: on whose behalf all its requests are. groups: null where they do not fit (many hundreds)."""

    uid: int
    gid: int
    groups: list[int] | None
    user: str
    context: str | None
    endpoint: str


M = TypeVar("M", bound=Message)

REQUEST_TYPES: dict[int, type[Message]] = {
    frames.AUTH: Auth,
    frames.ATTACH: Attach,
    frames.WALK: Walk,
    frames.STAT: Stat,
    frames.APPEND: Append,
    frames.CLUNK: Clunk,
    frames.ANNOUNCE: Announce,
    frames.LISTEN: Listen,
}
"""Type of each JSON request's body. Call, flush and ping have bodies of their own."""

_encoder = msgspec.json.Encoder()
_call_head = frames.CALL_HEAD.unpack_from
_metadata_length = frames.METADATA_LENGTH.unpack_from
_decoders: dict[type[Message], tuple[msgspec.json.Decoder[Message], list[str]]] = {}
"""Decoder of each type, and its fields of type U64."""


def encode(message: Message) -> bytes:
    """The JSON body of a message."""
    return _encoder.encode(message)


def decode(kind: type[M], body: bytes, seq: int = 0) -> M:
    """The message in a JSON body.

    kind: the type wanted. seq: of the frame, for the error.
    Raises ProtocolError (EBADMSG) with the place of the fault.
    """
    if kind not in _decoders:
        wide = [name for name, hint in kind.__annotations__.items() if hint is U64]
        _decoders[kind] = msgspec.json.Decoder(kind), wide
    decoder, wide = _decoders[kind]
    try:
        body.decode()  # the decoder does not look at what it skips
        message = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as fault:
        raise ProtocolError(EBADMSG, f"{kind.__name__.lower()}: {fault}"[:ERROR_MESSAGE_MAX], seq) from None
    for name in wide:
        if getattr(message, name) >> 64:
            raise ProtocolError(EBADMSG, f"{kind.__name__.lower()}: {name} has over 64 bits", seq)
    return message  # type: ignore[return-value]


def error_body(errno: int, message: str = "") -> bytes:
    """The body of an error message."""
    text = message or errors.sentence(errno)
    return _encoder.encode(Error(errno, errors.code(errno), text[:ERROR_MESSAGE_MAX]))


def error_frame(seq: int, errno: int, message: str = "") -> bytes:
    """A whole error message."""
    return frames.frame(frames.ERROR, seq, error_body(errno, message))


def split_call(body: bytes, seq: int = 0, apart: int = 0) -> tuple[int, bytes]:
    """(fid, what follows it verbatim: metadata length, metadata, payload) of a call's body.

    apart: bytes of the payload where that is not in the body (`FrameReader.payload`).
    Raises ProtocolError: EBADMSG where the lengths do not fit, EMSGSIZE for too much metadata.
    """
    rest = len(body) - 12
    if rest < 0:
        raise ProtocolError(EBADMSG, f"call: a body of {len(body)} bytes, at least 12 are needed", seq)
    fid, metadata = _call_head(body)
    if metadata > METADATA_MAX:
        raise ProtocolError(EMSGSIZE, f"call: {metadata} bytes of metadata, at most {METADATA_MAX} are allowed", seq)
    if metadata > rest:
        raise ProtocolError(EBADMSG, f"call: {metadata} bytes of metadata announced, fewer are there", seq)
    if rest - metadata + apart > PAYLOAD_MAX:
        raise ProtocolError(EMSGSIZE, f"call: a payload of over {PAYLOAD_MAX} bytes", seq)
    return fid, body[8:]


def call_body(fid: int, payload: bytes, metadata: bytes = b"") -> bytes:
    """The body of a call (and, with fid 0, of a request on a line)."""
    return frames.CALL_HEAD.pack(fid, len(metadata)) + metadata + payload


def call_reply_body(payload: bytes, metadata: bytes = b"") -> bytes:
    """The body of a call's reply."""
    return frames.METADATA_LENGTH.pack(len(metadata)) + metadata + payload


def split_call_reply(body: bytes, seq: int = 0) -> tuple[bytes, bytes]:
    """(payload, metadata) of a call's reply (or of a call's body after its fid). Raises ProtocolError (EBADMSG)."""
    if len(body) < 4:
        raise ProtocolError(EBADMSG, f"call reply: a body of {len(body)} bytes, at least 4 are needed", seq)
    (metadata,) = _metadata_length(body)
    if not metadata:
        return body[4:], b""
    if metadata > min(METADATA_MAX, len(body) - 4):
        raise ProtocolError(EBADMSG, f"call reply: {metadata} bytes of metadata announced", seq)
    return body[4 + metadata :], body[4 : 4 + metadata]


def split_path(path: str) -> list[str]:
    """The elements of a walk's path; none for the empty path.

    Raises RequestError: EINVAL for an element that is empty, begins with a dot or holds a NUL (so an absolute path, `..`
    and a trailing slash too), ENAMETOOLONG.
    """
    if not path:
        return []
    elements = path.split("/")
    for element in elements:
        if not element or element[0] == ".":
            raise RequestError(EINVAL, f"path {path[:200]!r}: an element is empty or begins with a dot")
        if "\0" in element:
            raise RequestError(EINVAL, f"path {path[:200]!r}: an element holds a NUL")
        if len(element.encode()) > NAME_MAX:
            raise RequestError(ENAMETOOLONG, f"an element of the path has over {NAME_MAX} bytes")
    if len(path.encode()) > PATH_MAX:
        raise RequestError(ENAMETOOLONG, f"a path of over {PATH_MAX} bytes")
    return elements


def split_aname(aname: str) -> list[str]:
    """The elements of an aname or of an announced path: as `split_path`, with a slash in front allowed."""
    return split_path(aname.removeprefix("/"))
