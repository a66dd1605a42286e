"""What is outstanding on a connection, and the one reply that each request gets."""

from srpcd.session.effects import Effect, Forward
from srpcd.wire import messages
from srpcd.wire.frames import FLUSH_REPLY, frame


class Request:
    """An outstanding request that no worker has.

    number: the fid that is reserved for its result. path: where an attach goes.
    """

    __slots__ = ("number", "path", "seq")

    def __init__(self, seq: int, number: int = 0, path: bytes = b"") -> None:
        self.seq = seq
        self.number = number
        self.path = path


class Replies:
    """The outgoing half of a session.

    out: frames for the peer, in order. effects: what is to be done, in order. outstanding: by seq.
    """

    __slots__ = ("_asked", "_last", "effects", "out", "outstanding")

    def __init__(self) -> None:
        self.out: list[bytes | memoryview] = []
        self.effects: list[Effect] = []
        self.outstanding: dict[int, Forward | Request] = {}
        self._asked: dict[int, Request] = {}
        self._last = 0

    def number(self) -> int:
        """A new number for an afid or a request, as the monitor is told it."""
        self._last += 1
        return self._last

    def ask(self, request: Request) -> int:
        """A request now waits for the monitor. Returns the number under which."""
        number = self.number()
        self.outstanding[request.seq] = request
        self._asked[number] = request
        return number

    def asked(self, number: int) -> Request | None:
        """The request that the monitor answers."""
        return self._asked.pop(number, None)

    def forward(self, forward: Forward) -> None:
        """A request now waits for a worker."""
        self.outstanding[forward.seq] = forward
        self.effects.append(forward)

    def reply(self, seq: int, kind: int, message: messages.Message) -> None:
        """Answer a request. kind: type of the reply."""
        self.outstanding.pop(seq, None)
        self.out.append(frame(kind, seq, messages.encode(message)))

    def fail(self, seq: int, errno: int, message: str = "") -> None:
        """Answer a request with an error."""
        self.outstanding.pop(seq, None)
        self.out.append(messages.error_frame(seq, errno, message))

    def finish(self, forward: Forward, reply: bytes) -> None:
        """Answer a forwarded request, and after it the flushes of it."""
        del self.outstanding[forward.seq]
        self.out.append(reply)
        for seq in forward.flushes or ():
            del self.outstanding[seq]
            self.out.append(frame(FLUSH_REPLY, seq))

    def forwards(self) -> list[Forward]:
        """The outstanding requests that workers have."""
        return [each for each in self.outstanding.values() if isinstance(each, Forward)]

    def clear(self) -> None:
        """Forget what is outstanding: it gets no reply any more."""
        self.outstanding.clear()
        self._asked.clear()
