"""A session, its client, and what the gate would do, step by step."""

import json
from typing import Any, TypeVar

from srpcd.session import effects
from srpcd.session.effects import Effect, Forward
from srpcd.session.session import Session
from srpcd.wire import frames, messages
from srpcd.wire.frames import FrameReader, frame
from srpcd.wire.messages import Prompt

E = TypeVar("E", bound=Effect)

SECRET = Prompt("secret", "Password:")
CODE = Prompt("text", "Code:")
HELLO = Prompt("info", "hello")


class Peer:
    """Says things to a session, and takes what it says. replies: by seq, in order."""

    def __init__(self, local: bool = False, **options: Any) -> None:
        self.session = Session(local, "/the/tree", **options)
        self.seq = 0
        self._reader = FrameReader(frames.REPLIES)
        self.order: list[int] = []

    def send(self, kind: int, message: messages.Message | bytes = b"", seq: int | None = None) -> int:
        """A request. Returns its seq."""
        if seq is None:
            self.seq += 1
            seq = self.seq
        body = message if isinstance(message, bytes) else messages.encode(message)
        self.session.receive(frame(kind, seq, body))
        return seq

    def replies(self) -> list[tuple[int, int, Any]]:
        """(type, seq, body: JSON decoded, an errno for an error, bytes for a call) of what was answered."""
        data = b"".join(self.session.out)
        self.session.out.clear()
        found = []
        for kind, seq, body in self._reader.feed(data):
            content: Any = body if kind == frames.CALL_REPLY else json.loads(body or b"null")
            found.append((kind, seq, content["errno"] if kind == frames.ERROR else content))
        return found

    def ask(self, kind: int, message: messages.Message | bytes = b"") -> Any:
        """A request that is answered at once. Returns the body, or an errno."""
        seq = self.send(kind, message)
        ((got_kind, got, body),) = self.replies()
        assert got == seq
        assert got_kind in (kind + 1, frames.ERROR)
        return body

    def answer(self) -> Any:
        """The body of the one reply that there is now."""
        ((_, _, body),) = self.replies()
        return body

    def effect(self, kind: type[E]) -> E:
        """The one effect that there is now."""
        (effect,) = self.session.effects
        self.session.effects.clear()
        assert isinstance(effect, kind)
        return effect

    def authenticate(self, uname: str = "alice", afid: int = 1, aname: str = "/") -> int:
        """Log in with a password. Returns the session's number of the afid."""
        self.send(frames.AUTH, messages.Auth(afid, uname, aname))
        number = self.effect(effects.Authenticate).afid
        self.session.prompted(number, [SECRET])
        assert self.answer()["prompts"][0]["style"] == "secret"
        self.send(frames.APPEND, messages.Append(afid, "secret"))
        assert self.effect(effects.Answer).answer == b"secret"
        self.session.verdict(number, 0)
        assert self.answer() == {"data": "1", "prompts": []}
        return number

    def attach(self, uname: str = "alice", afid: int = 1, fid: int = 2, session: int = 100) -> None:
        """Attach at the root."""
        self.send(frames.ATTACH, messages.Attach(afid, fid, uname))
        self.session.attached(self.effect(effects.Attach).request, session)
        self.session.walked(self.effect(Forward), 1, 1, True)
        assert self.answer() == {"qid": "1:1", "is_dir": True}

    def walk(self, path: str, newfid: int, fid: int = 2, is_dir: bool = False) -> Forward:
        """Walk, and find something."""
        self.send(frames.WALK, messages.Walk(fid, newfid, path))
        forward = self.effect(Forward)
        self.session.walked(forward, 1, newfid, is_dir)
        assert self.answer() == {"qid": f"1:{newfid}", "is_dir": is_dir}
        return forward

    def ready(self) -> None:
        """Log in, attach (fid 2), walk to an endpoint (fid 3)."""
        self.authenticate()
        self.attach()
        self.walk("calc/add", 3)

    def call(self, fid: int = 3, payload: bytes = b"x", seq: int | None = None) -> Forward:
        """A call that is forwarded."""
        self.send(frames.CALL, messages.call_body(fid, payload), seq)
        return self.effect(Forward)
