"""Fuzzers: whatever is said in whatever order, a session raises nothing and answers every request at most once."""

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from srpcd.session import effects
from srpcd.session.effects import Forward
from srpcd.session.session import Session
from srpcd.wire import frames, messages
from srpcd.wire.frames import FrameReader, frame
from srpcd.wire.messages import Prompt

numbers = st.integers(0, 5)
seqs = st.integers(0, 30)
paths = st.sampled_from(["", "/", "a", "a/b", "..", "/a", "a\0", "x" * 300, "calc"])
names = st.sampled_from(["alice", "bob", ""])
errnos = st.sampled_from([0, 2, 13, 110, 125, 70000])
payloads = st.binary(max_size=20)


class Anything(RuleBasedStateMachine):
    """A client that says anything, and a gate that answers anything, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(True, "/tree", outstanding=8)
        self.reader = FrameReader(frames.REPLIES)
        self.open: Counter[int] = Counter()
        self.listens: set[int] = set()
        self.afids: list[int] = []
        self.requests: list[tuple[int, bool]] = []
        self.forwards: list[Forward] = []

    def say(self, kind: int, seq: int, body: messages.Message | bytes) -> None:
        if not self.session.closed:
            self.open[seq] += 1
            if kind == frames.LISTEN:
                self.listens.add(seq)
        self.session.receive(frame(kind, seq, body if isinstance(body, bytes) else messages.encode(body)))

    @rule(kind=st.sampled_from(list(frames.NAMES)), seq=seqs, body=st.binary(max_size=40))
    def garbage(self, kind: int, seq: int, body: bytes) -> None:
        # Rarely: a broken message ends the session.
        if len(body) == 7:
            self.open[seq] += 1
            self.session.receive(frame(kind, seq, body))

    @rule(seq=seqs, afid=numbers, uname=names, aname=paths, mechanism=st.sampled_from(["pam", "peer"]))
    def auth(self, seq: int, afid: int, uname: str, aname: str, mechanism: Any) -> None:
        self.say(frames.AUTH, seq, messages.Auth(afid, uname, aname, mechanism))

    @rule(seq=seqs, afid=numbers, fid=numbers, uname=names, aname=paths)
    def attach(self, seq: int, afid: int, fid: int, uname: str, aname: str) -> None:
        self.say(frames.ATTACH, seq, messages.Attach(afid, fid, uname, aname))

    @rule(seq=seqs, fid=numbers, newfid=numbers, path=paths)
    def walk(self, seq: int, fid: int, newfid: int, path: str) -> None:
        self.say(frames.WALK, seq, messages.Walk(fid, newfid, path))

    @rule(seq=seqs, fid=numbers)
    def stat(self, seq: int, fid: int) -> None:
        self.say(frames.STAT, seq, messages.Stat(fid))

    @rule(seq=seqs, fid=numbers, data=st.text(max_size=5))
    def append(self, seq: int, fid: int, data: str) -> None:
        self.say(frames.APPEND, seq, messages.Append(fid, data))

    @rule(seq=seqs, fid=numbers)
    def clunk(self, seq: int, fid: int) -> None:
        self.say(frames.CLUNK, seq, messages.Clunk(fid))

    @rule(seq=seqs, fid=numbers, payload=payloads)
    def call(self, seq: int, fid: int, payload: bytes) -> None:
        self.say(frames.CALL, seq, messages.call_body(fid, payload))

    @rule(seq=seqs, other=seqs)
    def flush(self, seq: int, other: int) -> None:
        self.say(frames.FLUSH, seq, frames.SEQ.pack(other))

    @rule(seq=seqs, fid=numbers, path=paths)
    def announce(self, seq: int, fid: int, path: str) -> None:
        self.say(frames.ANNOUNCE, seq, messages.Announce(fid, path))

    @rule(seq=seqs, fid=numbers)
    def listen(self, seq: int, fid: int) -> None:
        self.say(frames.LISTEN, seq, messages.Listen(fid))

    @rule()
    def drain(self) -> None:
        if len(self.open) > 20:
            self.session.drain()

    @precondition(lambda self: self.afids)
    @rule(data=st.data(), styles=st.lists(st.sampled_from(["secret", "info"]), max_size=3))
    def prompted(self, data: st.DataObject, styles: list[Any]) -> None:
        self.session.prompted(data.draw(st.sampled_from(self.afids)), [Prompt(style, "?") for style in styles])

    @precondition(lambda self: self.afids)
    @rule(data=st.data(), errno=errnos)
    def verdict(self, data: st.DataObject, errno: int) -> None:
        self.session.verdict(data.draw(st.sampled_from(self.afids)), errno)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), errno=errnos, session=st.integers(100, 102))
    def granted(self, data: st.DataObject, errno: int, session: int) -> None:
        request, attach = data.draw(st.sampled_from(self.requests))
        if errno:
            self.session.refused(request, errno)
        elif attach:
            self.session.attached(request, session)
        else:
            self.session.announced(request, request)

    @precondition(lambda self: self.forwards)
    @rule(data=st.data(), errno=errnos, body=payloads)
    def answered(self, data: st.DataObject, errno: int, body: bytes) -> None:
        forward = data.draw(st.sampled_from(self.forwards))
        if errno:
            self.session.failed(forward, errno)
        elif forward.kind in (frames.WALK, frames.ATTACH):
            self.session.walked(forward, 1, 2, len(body) % 2 == 0)
        elif forward.kind in (frames.CALL, frames.APPEND):
            self.session.called(forward, bytes(4) + body)
        else:
            self.session.handler_failed(forward, body)

    @rule(session=st.integers(100, 102))
    def over(self, session: int) -> None:
        self.session.over(session)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), line=st.integers(0, 2**64 - 1))
    def line(self, data: st.DataObject, line: int) -> None:
        self.session.line(data.draw(st.sampled_from(self.requests))[0], line)

    @invariant()
    def every_request_is_answered_at_most_once(self) -> None:
        for effect in self.session.effects:
            if isinstance(effect, effects.Authenticate):
                self.afids.append(effect.afid)
            elif isinstance(effect, effects.Attach | effects.Announce):
                self.requests.append((effect.request, isinstance(effect, effects.Attach)))
            elif isinstance(effect, Forward):
                self.forwards.append(effect)
        self.session.effects.clear()
        data = b"".join(self.session.out)
        self.session.out.clear()
        for kind, seq, _ in self.reader.feed(data):
            if kind == frames.LISTEN_REPLY:
                assert seq in self.listens
                continue
            assert self.open[seq] > 0, f"seq {seq} was answered twice"
            self.open[seq] -= 1
        assert not self.reader.partial
        if not self.session.closed:
            waiting = set(self.session._outstanding)
            assert waiting == {seq for seq, count in self.open.items() if count}, "a request without reply is outstanding"
            assert len(waiting) <= 16

    def teardown(self) -> None:
        if not self.session.closed:
            self.session.expire()
            self.every_request_is_answered_at_most_once()
            assert not +self.open, "every request has its one reply"


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
