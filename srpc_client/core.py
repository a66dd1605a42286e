"""The client's side of the protocol, without I/O: requests in, bytes out; bytes in, completed requests out.

Rules that it keeps, so that the pumps (`pump`, `blocking`) need not know them:

- Each request gets a seq that no other request of the connection ever had, so an answer that comes after its caller has
  given up meets nobody else (the paper's prototype handed it to whoever called next).
- A request that is given up is flushed, and its seq stays taken until the server has answered it. If its answer made a
  fid after all, the fid is clunked.
- A reply that nobody asked for, or of the wrong type, ends the connection; `failure` then says why. A type of which no
  request was made yet ends it at its header, before a byte of its body is kept.
- What a server costs is bounded: bytes of a reply, requests that it leaves unanswered, errors that answer no request.
- When the connection is over, `lose` gives back each outstanding waiter once.

A *waiter* is whatever the pump wants to get back with the answer: a future, a slot.
"""

from collections import deque
from collections.abc import Callable
from errno import EAGAIN, EINVAL, EMSGSIZE, EPROTO
from struct import Struct
from typing import Any, Generic, TypeVar

from srpc_client.errors import CallError, ConnectionLost, SrpcError
from srpcd.wire import frames, messages
from srpcd.wire.errors import ProtocolError
from srpcd.wire.frames import CALL, CALL_REPLY, LISTEN_REPLY
from srpcd.wire.limits import ERROR_MESSAGE_MAX, JSON_MAX, LARGE, METADATA_MAX, OUTSTANDING_MAX, PAYLOAD_MAX
from srpcd.wire.messages import split_call_reply

W = TypeVar("W")

FLUSHES_MAX = 64
"""Flushes on their way at once: a thousand calls that are cancelled together must not go over OUTSTANDING_MAX."""

BUSY = OUTSTANDING_MAX - 2 * FLUSHES_MAX
"""Requests outstanding from which on a caller has to wait: room is left for flushes and clunks."""

UNASKED_MAX = 16
"""Errors that answer no request, of one connection. One says why the server closes; more cost time and say nothing new."""

_CALL = Struct("!iQQQI")  # header and head of a call in one: type, seq, length, fid, metadata length

_REPLY_TYPES: dict[int, type[messages.Message]] = {
    frames.AUTH_REPLY: messages.AuthReply,
    frames.ATTACH_REPLY: messages.Qid,
    frames.WALK_REPLY: messages.Qid,
    frames.STAT_REPLY: messages.StatReply,
    frames.APPEND_REPLY: messages.AppendReply,
    frames.CLUNK_REPLY: messages.Empty,
    frames.PING_REPLY: messages.PingReply,
    frames.ANNOUNCE_REPLY: messages.AnnounceReply,
    frames.LISTEN_REPLY: messages.ListenReply,
}

_CANCELLABLE = {frames.WALK_REPLY, frames.STAT_REPLY, frames.APPEND_REPLY, frames.CALL_REPLY}


def checked_bytes(name: str, value: bytes) -> bytes:
    """`value`, as what can be put into a frame. Raises TypeError.

    To be asked before a call is noted down: one that is outstanding and never sent would take a place for ever.
    """
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{name} is bytes, not {type(value).__name__}: text.encode() makes bytes of text")
    # An array's memoryview counts its items, and the frame has to say how many bytes there are.
    return value if len(value) == memoryview(value).nbytes else bytes(value)


def too_long(payload: bytes, metadata: bytes) -> CallError:
    """The error of a call that would not fit into a message."""
    what, size, most = "payload", len(payload), f"{PAYLOAD_MAX >> 20} MiB"
    if size <= PAYLOAD_MAX:
        what, size, most = "metadata", len(metadata), f"{METADATA_MAX >> 10} KiB"
    return CallError(EMSGSIZE, f"{size} bytes of {what}: a call carries at most {most}; send less at once")


def _unanswered() -> CallError:
    return CallError(
        EAGAIN, f"{OUTSTANDING_MAX} requests of this connection are not answered yet: wait, or close it and dial again"
    )


def _decoder(kind: type[messages.Message]) -> Callable[[bytes, int], object]:
    return lambda body, seq: messages.decode(kind, body, seq)


_DECODE: dict[int, Callable[[bytes, int], object]] = {
    **{kind: _decoder(message) for kind, message in _REPLY_TYPES.items()},
    frames.FLUSH_REPLY: lambda _body, _seq: None,
}


class ClientCore(frames.Receiver, Generic[W]):
    """The state of one connection: what is outstanding, what waits to be sent, and why it ended."""

    __slots__ = (
        "_flushes",
        "_large",
        "_limits",
        "_listening",
        "_orphans",
        "_out",
        "_outstanding",
        "_reader",
        "_reason",
        "_seq",
        "_to_flush",
        "_unasked_errors",
        "failure",
        "waiting",
    )

    def __init__(self) -> None:
        self.failure: SrpcError | None = None
        """Why the connection can't go on; None while it can."""
        self.waiting = 0
        """Bytes in `take`."""
        self._limits = {frames.ERROR: frames.REPLIES[frames.ERROR]}  # of the replies that were ever asked for
        self._reader = frames.FrameReader(self._limits, frames.reply_head)
        self._outstanding: dict[int, tuple[int, W | None]] = {}  # seq: (type of the reply wanted, who waits for it)
        self._out: list[bytes | memoryview] = []
        self._large = False  # something LARGE is in `_out`
        self._seq = 0
        self._flushes = 0  # on their way
        self._listening = 0  # listens stay outstanding for good and are counted apart
        self._to_flush: deque[int] = deque()
        self._orphans: dict[int, int] = {}  # seq of a walk or attach that was given up: the fid that it may still make
        self._reason = ""
        self._unasked_errors = 0

    # --- requests -------------------------------------------------------------------------------------------------

    def call(self, fid: int, payload: bytes, metadata: bytes, waiter: W) -> int:
        """Call the endpoint behind `fid`; the waiter gets (payload, metadata). Returns the seq, for `cancel`.

        Raises ConnectionLost (it is over already), CallError (EMSGSIZE, EAGAIN: nothing was sent), TypeError (it is not
        bytes).
        """
        if self.failure is not None:
            raise self.lost()
        if len(self._outstanding) >= OUTSTANDING_MAX:
            raise _unanswered()
        if payload.__class__ is not bytes or metadata.__class__ is not bytes:
            payload, metadata = checked_bytes("payload", payload), checked_bytes("metadata", metadata)
        if len(payload) > PAYLOAD_MAX or len(metadata) > METADATA_MAX:
            raise too_long(payload, metadata)
        if CALL_REPLY not in self._limits:
            self._limits[CALL_REPLY] = frames.REPLIES[CALL_REPLY]
        seq = self._seq = self._seq + 1
        self._outstanding[seq] = (CALL_REPLY, waiter)
        length = 12 + len(metadata) + len(payload)
        head = _CALL.pack(CALL, seq, length, fid, len(metadata))
        if length < LARGE:
            self._out.append(b"%b%b%b" % (head, metadata, payload))
        else:
            self._out += frames.apart(head + metadata, payload)
            self._large = True
        self.waiting += 20 + length
        return seq

    def request(self, kind: int, body: bytes, waiter: W | None) -> int:
        """Any request; the waiter gets its reply as a message. Returns the seq.

        kind: as `frames.WALK`. waiter: None where nobody wants the answer.
        Raises ConnectionLost, CallError (EMSGSIZE, EAGAIN: nothing was sent).
        """
        if self.failure is not None:
            raise self.lost()
        # Clunks and flushes are not refused: there is one for each request that was, at most.
        if waiter is not None and len(self._outstanding) >= OUTSTANDING_MAX:
            raise _unanswered()
        if len(body) > frames.REQUESTS[kind]:
            raise CallError(EMSGSIZE, f"a body of {len(body)} bytes: {frames.NAMES[kind]} allows {frames.REQUESTS[kind]}")
        seq = self._seq = self._seq + 1
        self._outstanding[seq] = (kind + 1, waiter)
        self._expect(kind)
        if kind == frames.LISTEN:
            self._listening += 1
        self._out.append(frames.frame(kind, seq, body))
        self.waiting += 20 + len(body)
        return seq

    def _expect(self, kind: int) -> None:
        """Allow replies to this type of request. Before an attach an append answers a prompt, and its reply is short."""
        most = frames.REPLIES[kind + 1]
        if kind == frames.APPEND and frames.ATTACH_REPLY not in self._limits:
            most = min(most, JSON_MAX)
        self._limits[kind + 1] = most

    def cancel(self, seq: int, fid: int = 0) -> bool:
        """Nobody waits for this request any more: flush it where that is possible, and drop its answer.

        fid: the one that the request makes if it succeeds after all; it is clunked then. Returns False if it is not
        outstanding any more.
        """
        entry = self._outstanding.get(seq)
        if entry is None or entry[1] is None or self.failure is not None:
            return False
        self._outstanding[seq] = (entry[0], None)
        if fid:
            self._orphans[seq] = fid
        if entry[0] in _CANCELLABLE:
            self._to_flush.append(seq)
            self._send_flushes()
        return True

    def clunk(self, fid: int) -> None:
        """Forget a fid, whatever the server says to that; does nothing on a connection that is over."""
        if self.failure is None:
            self.request(frames.CLUNK, messages.encode(messages.Clunk(fid)), None)

    def _send_flushes(self) -> None:
        while self._to_flush and self._flushes < FLUSHES_MAX:
            seq = self._to_flush.popleft()
            if seq in self._outstanding:  # else it was answered meanwhile
                self._flushes += 1
                self.request(frames.FLUSH, frames.SEQ.pack(seq), None)

    # --- bytes ----------------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Requests that have not been answered, listens apart."""
        return len(self._outstanding) - self._listening

    @property
    def busy(self) -> bool:
        """Whether so much is outstanding that a new call had better wait (the server would say EAGAIN)."""
        return len(self._outstanding) >= BUSY

    def take(self) -> bytes | memoryview:
        """What is to be sent next; empty when that was all."""
        out = self._out
        if not out:
            return b""
        if self._large:
            data = frames.take(out)
            self.waiting -= len(data)
            self._large = self.waiting >= LARGE
            return data
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        self.waiting = 0
        return data

    def receive(self, data: bytes) -> list[tuple[W, Any, CallError | None]]:
        """Take what came in. Returns what it completed: (waiter, reply, None) or (waiter, None, error).

        A reply is the message of its type, and (payload, metadata) for a call. If the server broke the protocol,
        `failure` is set afterwards; what had been completed before is returned all the same.
        """
        done: list[tuple[W, Any, CallError | None]] = []
        outstanding, reader = self._outstanding, self._reader
        try:
            for kind, seq, body in reader.feed(data):
                entry = outstanding.get(seq)
                if entry is None:
                    self._unasked(kind, seq, body)
                    continue
                wanted, waiter = entry
                if kind == wanted:
                    if kind != CALL_REPLY:
                        reply = _DECODE[kind](body, seq)
                    elif reader.payload:
                        reply = (reader.payload, body[4:])
                    else:
                        reply = split_call_reply(body, seq)
                    if kind != LISTEN_REPLY:
                        del outstanding[seq]
                    if waiter is not None:
                        done.append((waiter, reply, None))
                    else:
                        self._given_up(kind, seq)
                elif kind == frames.ERROR:
                    error = messages.decode(messages.Error, body, seq)
                    del outstanding[seq]
                    if wanted == frames.LISTEN_REPLY:
                        self._listening -= 1
                    if waiter is not None:
                        done.append((waiter, None, CallError(error.errno, error.message[:ERROR_MESSAGE_MAX])))
                    else:
                        self._orphans.pop(seq, None)
                        self._flushes -= wanted == frames.FLUSH_REPLY
                else:
                    raise ProtocolError(EPROTO, f"a reply of type {kind} to a request that wants {wanted}", seq)
        except ProtocolError as fault:
            self.failure = ConnectionLost(message=f"the server broke the protocol: {fault.message}")
        if self._to_flush and self.failure is None:
            self._send_flushes()
        return done

    def _given_up(self, kind: int, seq: int) -> None:
        if kind == frames.FLUSH_REPLY:
            self._flushes -= 1
        elif (fid := self._orphans.pop(seq, 0)) != 0:
            self.clunk(fid)

    def _unasked(self, kind: int, seq: int, body: bytes) -> None:
        # An error that answers no request is how a server says why it closes the connection.
        if kind != frames.ERROR:
            raise ProtocolError(EPROTO, f"a reply of type {kind} to a request that was never made", seq)
        self._unasked_errors += 1
        if self._unasked_errors > UNASKED_MAX:
            raise ProtocolError(EPROTO, f"over {UNASKED_MAX} errors that answer no request", seq)
        error = messages.decode(messages.Error, body, seq)
        self._reason = f"{error.code}: {error.message}"[:ERROR_MESSAGE_MAX]

    def lost(self) -> SrpcError:
        """A fresh error that says why the connection is over."""
        failure = self.failure or ConnectionLost()
        return type(failure)(failure.errno or EINVAL, failure.message)

    def lose(self, failure: SrpcError | None = None) -> list[W]:
        """The connection is over. Returns each waiter that was outstanding, once; afterwards none is.

        failure: why, to which the server's last words are added; those alone where it is None.
        """
        if self.failure is None:
            said = f"the server closed the connection and said {self._reason}" if self._reason else ""
            if isinstance(failure, ConnectionLost) and said:
                failure = ConnectionLost(message=f"{failure.message}; the server's last words were {self._reason}")
            self.failure = failure or ConnectionLost(message=said)
        waiters = [waiter for _kind, waiter in self._outstanding.values() if waiter is not None]
        self._outstanding.clear()
        self._out.clear()
        self.waiting = 0
        self._to_flush.clear()
        self._orphans.clear()
        self._listening = self._flushes = 0
        return waiters
