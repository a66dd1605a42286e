"""The handler's side of a line, without I/O: frames in, requests out; replies in, frames out (design: lines).

The same on a line of a service endpoint and on the standard input and output of a resident program. First comes CALLER,
then CALL and FLUSH in any number; each call is answered once, in any order, cancelled ones too (so that the worker knows
that the seq is free; it drops that answer).

This module is light: resident programs start with it. It imports neither asyncio nor msgspec nor OpenSSL.
"""

from errno import ECANCELED, EIO, EMSGSIZE, EPROTO
from struct import Struct

from srpc_client.errors import SrpcError
from srpcd.wire import errors as wire_errors
from srpcd.wire import frames
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import CALL, CALL_HEAD, CALL_REPLY
from srpcd.wire.limits import ERROR_MESSAGE_MAX, LARGE, LINE_OUTSTANDING_MAX, METADATA_MAX, PAYLOAD_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import TypeAlias

    Answer: TypeAlias = bytes | bytearray | memoryview | None
    Handler: TypeAlias = Callable[["Request"], Answer | Awaitable[Answer]]

HIGH_WATER = 1024 * 1024
"""Bytes of replies that may wait for the caller to take them; above that no further request of his is begun."""

_REPLY = Struct("!iQQI")  # header and head of a reply in one: type, seq, length, metadata length


class Caller:
    """On whose behalf all requests of a line are: said by the kernel and the daemon, not by the caller.

    uid, gid, groups: of the worker that calls. groups: None where there are too many to tell. A process that calls through
    the local socket may have fewer groups than its account. user: the account's name.
    context: the SELinux context, None where there is none. endpoint: path in the tree of what is called.
    """

    __slots__ = ("context", "endpoint", "gid", "groups", "uid", "user")

    def __init__(
        self, uid: int, gid: int, groups: "list[int] | None", user: str, *, context: "str | None", endpoint: str
    ) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.user = user
        self.context = context
        self.endpoint = endpoint

    def __repr__(self) -> str:
        return f"Caller({self.user!r}, uid={self.uid}, gid={self.gid}, endpoint={self.endpoint!r})"

    @classmethod
    def parse(cls, body: bytes) -> "Caller":
        """The caller in a CALLER frame's body. Raises ProtocolError."""
        import json  # noqa: PLC0415  # at the first frame, not at the start of each resident program

        try:
            facts = json.loads(body)
            caller = cls(
                facts["uid"],
                facts["gid"],
                facts["groups"],
                facts["user"],
                context=facts["context"],
                endpoint=facts["endpoint"],
            )
        except (ValueError, LookupError, TypeError, RecursionError) as fault:
            raise ProtocolError(EPROTO, f"the first frame does not say who calls: {fault}") from None
        groups = caller.groups
        if not (
            type(caller.uid) is type(caller.gid) is int
            and (groups is None or (type(groups) is list and all(type(each) is int for each in groups)))
            and type(caller.user) is type(caller.endpoint) is str
            and (caller.context is None or type(caller.context) is str)
        ):
            raise ProtocolError(EPROTO, "the first frame does not say who calls: a field has another type")
        return caller


class Request:
    """One call, to be answered once: by `reply` or by `fail`.

    payload, metadata: what was sent. caller: who sent it.
    cancelled: the caller waits no longer (he may have gone); answering is still right, and nobody reads it.
    """

    __slots__ = ("_core", "_on_cancel", "answered", "cancelled", "metadata", "payload", "seq")

    def __init__(self, core: "HandlerCore", seq: int, payload: bytes, metadata: bytes) -> None:
        self._core = core
        self._on_cancel: "Callable[[], object] | None" = None
        self.seq = seq
        self.payload = payload
        self.metadata = metadata
        self.answered = False
        self.cancelled = False

    @property
    def caller(self) -> Caller:
        """Who calls."""
        caller = self._core.caller
        assert caller is not None  # no request is made before the caller is known
        return caller

    def reply(self, payload: "bytes | bytearray | memoryview", metadata: bytes = b"") -> None:
        """Answer. payload: up to 16 MiB; metadata: up to 64 KiB. Raises RuntimeError if it is answered already."""
        if payload.__class__ is memoryview and payload.nbytes != len(payload):  # an array's: it counts items, not bytes
            payload = bytes(payload)
        if len(payload) > PAYLOAD_MAX or len(metadata) > METADATA_MAX:
            self.fail(EMSGSIZE, "the handler's reply is larger than a message may be")
            return
        length = len(metadata) + len(payload)
        head = _REPLY.pack(CALL_REPLY, self.seq, 4 + length, len(metadata))
        if length < LARGE:
            self._core.answer(self, b"".join((head, metadata, payload)))
        else:
            self._core.answer(self, head + metadata, bytes(payload))

    def fail(self, errno: int, message: str = "") -> None:
        """Answer with an error. errno: of Linux. message: a sentence for the caller, the protocol's own when empty.

        Raises RuntimeError if it is answered already.
        """
        import json  # noqa: PLC0415

        if not 0 < errno < 4096:
            errno = EIO
        text = (message or wire_errors.sentence(errno))[: ERROR_MESSAGE_MAX // 4]
        # A file name that is not UTF-8 (in str(fault) of an OSError) has lone surrogates, which the worker would refuse.
        text = text.encode(errors="replace").decode()
        error = {"errno": errno, "code": wire_errors.code(errno), "message": text}
        self._core.answer(self, frames.frame(frames.ERROR, self.seq, json.dumps(error).encode()))

    def on_cancel(self, callback: "Callable[[], object]") -> None:
        """Have `callback()` called when the request is cancelled; at once if it is already."""
        if self.cancelled:
            callback()
        else:
            self._on_cancel = callback

    def _cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            callback, self._on_cancel = self._on_cancel, None
            if callback is not None:
                callback()


class HandlerCore(frames.Receiver):
    """The state of one line: its caller, what is not answered yet, and what waits to be written.

    endpoint: the path that it has to be a line of, which its first frame says; empty: any. It was found by a number that
    came from a gate, and calls must reach no handler but that of the endpoint on which they were permitted.
    """

    __slots__ = (
        "_endpoint",
        "_large",
        "_out",
        "_outstanding",
        "_reader",
        "caller",
        "on_answer",
        "on_caller",
        "over",
        "waiting",
    )

    def __init__(self, endpoint: str = "") -> None:
        self._endpoint = endpoint
        self.caller: "Caller | None" = None
        """Known from the first frame on."""
        self.waiting = 0
        """Bytes in `take`."""
        self.on_answer: "Callable[[], object] | None" = None
        """Called when something waits to be written."""
        self.on_caller: "Callable[[Caller], object] | None" = None
        """Called when the caller is known."""
        self.over = False
        """The line has ended: answers go nowhere."""
        self._reader = frames.FrameReader(frames.LINE_REQUESTS, frames.call_head)
        self._large = False  # something LARGE is in `_out`
        self._outstanding: "dict[int, Request]" = {}
        self._out: "list[bytes | memoryview]" = []

    def receive(self, data: bytes) -> "list[Request]":
        """Take what came in; returns the new requests. Raises ProtocolError, after which the line is to be closed."""
        new: "list[Request]" = []
        outstanding, reader = self._outstanding, self._reader
        for kind, seq, body in reader.feed(data):
            if kind == CALL:
                if self.caller is None or seq in outstanding:
                    raise ProtocolError(EPROTO, "a call before its caller was named, or with a seq that is in use", seq)
                if len(outstanding) >= LINE_OUTSTANDING_MAX:
                    raise ProtocolError(EPROTO, "more calls outstanding than a line may have", seq)
                payload, metadata = (reader.payload, body[12:]) if reader.payload else _split(body, seq)
                request = outstanding[seq] = Request(self, seq, payload, metadata)
                new.append(request)
            elif kind == frames.FLUSH:
                if len(body) != frames.SEQ.size:
                    raise ProtocolError(EPROTO, "a flush without a seq", seq)
                cancelled = outstanding.get(frames.SEQ.unpack(body)[0])
                if cancelled is not None:
                    cancelled._cancel()
            else:
                if self.caller is not None:
                    raise ProtocolError(EPROTO, "a line has one caller", seq)
                caller = Caller.parse(body)
                if self._endpoint not in ("", caller.endpoint):
                    raise ProtocolError(EPROTO, f"a line of another endpoint, {caller.endpoint!r}", seq)
                self.caller = caller
                if self.on_caller is not None:
                    self.on_caller(caller)
        return new

    def answer(self, request: Request, frame: bytes, payload: bytes = b"") -> None:
        """Queue a request's answer. payload: the rest of the frame, where that is large.

        Raises RuntimeError for a second one.
        """
        if request.answered:
            raise RuntimeError("the request is answered already")
        request.answered = True
        request._on_cancel = None
        self._outstanding.pop(request.seq, None)
        if not self.over:
            self._out.append(frame)
            self.waiting += len(frame)
            if payload:
                self._out.append(payload)
                self.waiting += len(payload)
                self._large = True
            if self.on_answer is not None:
                self.on_answer()

    def take(self) -> "bytes | memoryview":
        """What is to be written next; empty when that was all."""
        if not self._out:
            return b""
        if self._large:
            data = frames.take(self._out)
            self.waiting -= len(data)
            self._large = self.waiting >= LARGE
            return data
        joined = b"".join(self._out)  # of one, that one itself
        self._out.clear()
        self.waiting = 0
        return joined

    @property
    def outstanding(self) -> int:
        """Requests that are not answered."""
        return len(self._outstanding)

    def end(self) -> None:
        """The line has ended: nobody waits for what is outstanding."""
        self.over = True
        self._out.clear()
        self.waiting = 0
        for request in list(self._outstanding.values()):
            request._cancel()


def _split(body: bytes, seq: int) -> "tuple[bytes, bytes]":
    """(payload, metadata) of a call's body; as `messages.split_call`, without msgspec."""
    if len(body) < 12:
        raise ProtocolError(EPROTO, "a call shorter than its head", seq)
    _fid, metadata = CALL_HEAD.unpack_from(body)
    if not metadata:
        return body[12:], b""
    if metadata > min(METADATA_MAX, len(body) - 12):
        raise ProtocolError(EPROTO, "a call's metadata is longer than the call", seq)
    return body[12 + metadata :], body[12 : 12 + metadata]


# --- running a handler -------------------------------------------------------------------------------------------------


def refuse_what_is_no_handler(handlers: "Mapping[str, Handler]") -> None:
    """Raise ValueError where there is none at all, TypeError for one that can't be called."""
    if not handlers:
        raise ValueError("there is nothing to serve: give a handler for at least one path")
    for path, handler in handlers.items():
        if not callable(handler):
            raise TypeError(f"the handler of {path} is a {type(handler).__name__}, which can't be called")


def begin(handler: "Handler", request: Request) -> "Awaitable[Answer] | None":
    """Call the handler. Returns what is still to be awaited, if it is an asynchronous one; pass its result to `finish`."""
    if request.cancelled:
        request.fail(ECANCELED)
        return None
    try:
        result = handler(request)
    except Exception as fault:
        fail_with(request, fault)
        return None
    if result.__class__ is bytes:
        if not request.answered:
            request.reply(result)
        return None
    if hasattr(result, "__await__"):
        return result
    finish(request, result)
    return None


def finish(request: Request, result: object) -> None:
    """Answer with what a handler returned; None is an empty reply, where the handler has not answered by itself."""
    if request.answered:
        return
    if result is None:
        request.reply(b"")
    elif isinstance(result, bytes | bytearray | memoryview):
        request.reply(result)
    else:
        fail_with(request, TypeError(f"a handler returns bytes, not {type(result).__name__}"))


def fail_with(request: Request, fault: Exception) -> None:
    """Answer with what a handler raised: a SrpcError as it is; of anything else the caller learns nothing, the log all."""
    if isinstance(fault, SrpcError):
        if not request.answered:
            request.fail(fault.errno or EIO, fault.message)
        return
    import logging  # noqa: PLC0415

    logging.getLogger("srpc_client").error("the handler of %s failed", request.caller.endpoint, exc_info=fault)
    if not request.answered:
        request.fail(EIO, "the handler failed; its log says why")
