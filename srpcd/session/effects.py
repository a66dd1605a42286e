"""What a session wants done: data that the gate carries out, and answers by the session's methods for results."""

from collections.abc import Iterable
from typing import Any

from srpcd.session.fids import Fid


class Effect:
    """Base of all effects: a record of its slots."""

    __slots__: Iterable[str] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Authenticate(Effect):
    """Begin an authentication. afid: the session's own number. Results: `prompted`, `verdict`."""

    __slots__ = ("afid", "aname", "mechanism", "uname")

    def __init__(self, afid: int, mechanism: str, uname: str, aname: str) -> None:
        self.afid = afid
        self.mechanism = mechanism
        self.uname = uname
        self.aname = aname


class Answer(Effect):
    """The answer to the next prompt of an authentication. Results: `prompted`, `verdict`."""

    __slots__ = ("afid", "answer")

    def __init__(self, afid: int, answer: bytes) -> None:
        self.afid = afid
        self.answer = answer

    def __repr__(self) -> str:
        return f"Answer(afid={self.afid})"  # never the secret


class ForgetAfid(Effect):
    """The afid was clunked: end its authentication, and what it is good for. No result."""

    __slots__ = ("afid",)

    def __init__(self, afid: int) -> None:
        self.afid = afid


class Attach(Effect):
    """Make a session for the user of an accepted afid. Results: `attached`, `refused`."""

    __slots__ = ("afid", "aname", "request", "uname")

    def __init__(self, request: int, afid: int, uname: str, aname: str) -> None:
        self.request = request
        self.afid = afid
        self.uname = uname
        self.aname = aname


class ForgetSession(Effect):
    """No fid and no request belongs to this session any more. No result."""

    __slots__ = ("session",)

    def __init__(self, session: int) -> None:
        self.session = session


class Announce(Effect):
    """Register the endpoint at `path` (from the tree's root). Results: `announced`, `refused`."""

    __slots__ = ("path", "request")

    def __init__(self, request: int, path: str) -> None:
        self.request = request
        self.path = path


class Withdraw(Effect):
    """End an announcement. No result."""

    __slots__ = ("announcement",)

    def __init__(self, announcement: int) -> None:
        self.announcement = announcement


class Forward(Effect):
    """A request for the worker of `session`, and the session's own record of it until it is answered.

    kind: type of the client's request. ATTACH and WALK: walk to `place.path`, result `walked`. STAT: of `place`, `body`
    the name after which to go on, `limit` how many; result `stated`. CALL and APPEND: of `place`, `body` what follows
    the fid in a call's body, and `payload` the end of that where it is LARGE; result `called`. Any of them: `failed`,
    `handler_failed`.
    number: the fid that is reserved for the result of a walk. flushes: seqs of flushes that wait for the answer.
    carrier, ticket: for the runner, who notes here to whom and under which number it passed the request on.
    """

    __slots__ = ("body", "carrier", "flushes", "kind", "limit", "number", "payload", "place", "seq", "session", "ticket")

    def __init__(self, kind: int, seq: int, place: Fid, body: bytes = b"", *, limit: int = 0, number: int = 0) -> None:
        self.kind = kind
        self.seq = seq
        self.place = place
        self.session = place.attachment.session
        self.body = body
        self.payload = b""
        self.limit = limit
        self.number = number
        self.flushes: list[int] | None = None
        self.carrier: Any = None
        self.ticket = 0

    @property
    def size(self) -> int:
        """Bytes of body and payload."""
        return len(self.body) + len(self.payload)

    def __repr__(self) -> str:
        return f"Forward(kind={self.kind}, seq={self.seq}, session={self.session})"  # never the payload


class Flush(Effect):
    """Cancel a request that was forwarded. Result: the request's own."""

    __slots__ = ("forward",)

    def __init__(self, forward: Forward) -> None:
        self.forward = forward


class Close(Effect):
    """The peer broke the protocol: send what is in `out`, and end the connection. left: as `Session.end` returns them."""

    __slots__ = ("left",)

    def __init__(self, left: list[Forward]) -> None:
        self.left = left
