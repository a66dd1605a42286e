"""The protocol's requests, one function each, for `connection.request(...)`: for those who keep fids themselves.

    reply = await connection.request(requests.walk(fid, newfid, "calc/add"))     # a messages.Qid

`connection.new_fid()` gives numbers that do not collide with those that the library uses. docs/protocol.md says what each
request does; errors are raised as CallError.
"""

from errno import EINVAL
from typing import NamedTuple

from srpc_client.core import checked_bytes, too_long
from srpc_client.errors import CallError
from srpcd.wire import frames, messages
from srpcd.wire.limits import METADATA_MAX, PAYLOAD_MAX, STAT_PAGE
from srpcd.wire.messages import Mechanism


class Send(NamedTuple):
    """One request. fid: that it makes, to be clunked if the request is given up and succeeds all the same."""

    kind: int
    body: bytes
    fid: int = 0


class Reply(NamedTuple):
    """What a handler answered."""

    payload: bytes
    metadata: bytes


def _json(kind: int, message: messages.Message, fid: int = 0) -> Send:
    try:
        return Send(kind, messages.encode(message), fid)
    except UnicodeEncodeError:  # lone surrogates, from os.fsdecode for instance
        raise CallError(EINVAL, "a name or text is not valid Unicode, and can't be sent") from None


def _text(name: str, value: str) -> str:
    # msgspec writes bytes as base64: a password given as bytes would be sent, and refused as a wrong one.
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, not {type(value).__name__}")
    return value


def auth(afid: int, uname: str, aname: str = "/", mechanism: Mechanism = "pam") -> Send:
    """Begin to authenticate `uname`; the reply, AuthReply, says what to append."""
    return _json(frames.AUTH, messages.Auth(afid, _text("user", uname), _text("aname", aname), mechanism))


def attach(afid: int, fid: int, uname: str, aname: str = "/") -> Send:
    """Point `fid` at `aname`; replied by Qid."""
    return _json(frames.ATTACH, messages.Attach(afid, fid, uname, aname), fid)


def walk(fid: int, newfid: int, path: str) -> Send:
    """Point `newfid` at `path` below `fid`; replied by Qid."""
    return _json(frames.WALK, messages.Walk(fid, newfid, path), newfid)


def stat(fid: int, after: str = "", limit: int = STAT_PAGE) -> Send:
    """Describe `fid`; replied by StatReply."""
    return _json(frames.STAT, messages.Stat(fid, after, limit))


def append(fid: int, data: str) -> Send:
    """Answer a prompt of an afid, or call an endpoint with text; replied by AppendReply."""
    return _json(frames.APPEND, messages.Append(fid, _text("what is appended (text, a password, an answer)", data)))


def call(fid: int, payload: bytes, metadata: bytes = b"") -> Send:
    """Call the endpoint behind `fid`; replied by (payload, metadata)."""
    payload, metadata = checked_bytes("payload", payload), checked_bytes("metadata", metadata)
    if len(payload) > PAYLOAD_MAX or len(metadata) > METADATA_MAX:
        raise too_long(payload, metadata)
    return Send(frames.CALL, messages.call_body(fid, payload, metadata))


def clunk(fid: int) -> Send:
    """Forget a fid, an afid or an announcement; replied by Empty."""
    return _json(frames.CLUNK, messages.Clunk(fid))


def flush(seq: int) -> Send:
    """Cancel the request with this seq; replied by None, after that request's own error."""
    return Send(frames.FLUSH, frames.SEQ.pack(seq))


def ping() -> Send:
    """Facts about the server; replied by PingReply."""
    return Send(frames.PING, b"")


def announce(fid: int, path: str) -> Send:
    """Serve the named pipe at `path`; replied by AnnounceReply. On a local connection only."""
    return _json(frames.ANNOUNCE, messages.Announce(fid, path), fid)


def listen(fid: int) -> Send:
    """Tell the lines of an announcement; replied by one ListenReply for each, until it ends with an error."""
    return _json(frames.LISTEN, messages.Listen(fid))
