"""One connection's protocol: bytes and results in, replies and effects out.

The theory of operation: `receive` takes what the peer sent, and the methods under "results" take what became of effects.
Each of them only appends to two lists, `out` (frames for the peer) and `effects` (for the gate), which whoever calls
empties afterwards. A request is outstanding from its arrival until its one reply; a result for something that is not
outstanding any more is dropped, so a late answer can't reach anybody. A protocol error ends the session: what is in
`out` then is the last that the peer gets.
"""

from collections.abc import Callable
from errno import EACCES, EAGAIN, EBADF, EBADMSG, EILSEQ, EIO, EISDIR, EKEYEXPIRED, EMSGSIZE, ENAMETOOLONG, EPROTO, ESHUTDOWN
from typing import Any

from srpcd.session import effects
from srpcd.session.announcements import Announcements
from srpcd.session.authentication import Authentications
from srpcd.session.effects import Forward
from srpcd.session.fids import Afid, Announcement, Attachment, Fid, FidTable
from srpcd.session.replies import Replies, Request
from srpcd.session.rules import LIMITS, RULES, State, refusals
from srpcd.wire import frames, messages
from srpcd.wire.errors import ProtocolError, RequestError
from srpcd.wire.frames import CALL, CALL_REPLY, HEADER, METADATA_LENGTH, FrameReader, apart, call_head, frame
from srpcd.wire.limits import (
    APPEND_REPLY_MAX,
    LARGE,
    METADATA_MAX,
    NAME_MAX,
    OUTSTANDING_MAX,
    OUTSTANDING_TIGHT,
    PATH_MAX,
    PAYLOAD_MAX,
    STAT_REPLY_MAX,
)

REQUEST_BYTES = 500
"""Bytes of memory that one outstanding request takes beside what it carries, with what the gate keeps for it."""

SESSIONS_KEPT = 256
"""Sessions of one connection after which those are looked for that no fid belongs to any more."""


class Session(frames.Receiver):
    """The protocol of one connection.

    local: whether it came in on the local listener. tree: path of the tree's root, told on the local listener only.
    outstanding: requests at most that are not answered.
    out: frames for the peer, in order. effects: what is to be done, in order. Whoever calls empties both.
    bulky: in `out` is something that is better not copied. Whoever calls takes that back, too.
    closed: nothing more is read or answered.
    """

    def __init__(self, local: bool, tree: str = "", outstanding: int = OUTSTANDING_MAX) -> None:
        self._replies = Replies()
        self.out = self._replies.out
        self.effects = self._replies.effects
        self.bulky = False
        self.closed = False
        self._local = local
        self._tree = tree
        self._limit = self._most = outstanding
        self._state = State.STRANGER
        self._reader = FrameReader(LIMITS[State.STRANGER], call_head)
        self._refused = refusals(State.STRANGER, local)
        self._outstanding = self._replies.outstanding
        self._fids = FidTable()
        self._authentications = Authentications(self._replies, self._fids, local)
        self._announcements = Announcements(self._replies, self._fids)
        self._attachments: dict[int, Attachment] = {}
        self._attachments_wanted = SESSIONS_KEPT

    # --- what the gate asks --------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """Whether somebody has authenticated on the connection."""
        return self._reader.limits is LIMITS[State.KNOWN]

    @property
    def partial(self) -> bool:
        """Whether the peer is in the middle of a message: what has come of it is kept."""
        return self._reader.partial

    @property
    def partials(self) -> int:
        """How many messages have begun without being whole so far."""
        return self._reader.partials

    @property
    def missing(self) -> int:
        """Bytes that the message in progress lacks, or its header."""
        return self._reader.missing

    @property
    def pinned(self) -> int:
        """Bytes of memory that the message in progress takes."""
        return self._reader.held

    @property
    def held(self) -> int:
        """Bytes of memory that fids and outstanding requests take, about."""
        return self._fids.held + len(self._outstanding) * REQUEST_BYTES

    @property
    def busy(self) -> bool:
        """Whether anything is outstanding but listens, which always are."""
        return len(self._outstanding) > self._announcements.listens

    @property
    def serving(self) -> bool:
        """Whether there is an announcement, or one is being made."""
        return self._fids.count(Announcement) > 0

    def forwards(self) -> list[Forward]:
        """The requests that were forwarded and are not answered."""
        return self._replies.forwards()

    # --- events --------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take what the peer sent."""
        if self.closed:
            return
        outstanding, entries, reader = self._outstanding, self._fids.entries, self._reader
        try:
            for kind, seq, body in reader.feed(data):
                if seq in outstanding:
                    raise ProtocolError(EPROTO, f"seq {seq} is still outstanding", seq)
                if kind == CALL:
                    payload = reader.payload
                    number, rest = (
                        messages.split_call(body, seq, len(payload)) if payload else messages.split_call(body, seq)
                    )
                    place = entries.get(number)
                    if (
                        place.__class__ is Fid
                        and not place.is_dir
                        and not place.attachment.ended
                        and not self._refused[CALL]
                        and len(outstanding) < self._limit
                    ):
                        forward = outstanding[seq] = Forward(CALL, seq, place, rest)
                        if payload:
                            forward.payload = payload
                        self.effects.append(forward)
                        continue
                self._request(kind, seq, body)
        except ProtocolError as fault:
            self.out.append(messages.error_frame(fault.seq, fault.errno, fault.message))
            self.effects.append(effects.Close(self.end()))

    def tighten(self, tight: bool) -> None:
        """Allow fewer fids and outstanding requests while memory is short. Those that are there stay."""
        self._fids.tight = tight
        self._limit = min(self._most, OUTSTANDING_TIGHT) if tight else self._most

    def drain(self) -> None:
        """The daemon is shutting down: no new work from now on."""
        self._enter(State.DRAINING)

    def expire(self, errno: int = ESHUTDOWN) -> list[Forward]:
        """Answer all that is outstanding with an error, and end. Returns what `end` returns."""
        for seq in self._outstanding:
            self.out.append(messages.error_frame(seq, errno))
        return self.end()

    def end(self) -> list[Forward]:
        """The connection is over: nothing is read or answered any more.

        Returns the forwarded requests whose answers nobody awaits now.
        """
        left = self._replies.forwards()
        self.closed = True
        self._reader.clear()
        for each in (self._replies, self._fids, self._authentications, self._announcements, self._attachments):
            each.clear()
        return left

    # --- results -------------------------------------------------------------------------------------------------------

    def prompted(self, afid: int, prompts: list[messages.Prompt]) -> None:
        """An authentication goes on with these prompts."""
        self._authentications.prompted(afid, prompts)

    def verdict(self, afid: int, errno: int, message: str = "") -> None:
        """An authentication is over. errno: 0 accepted, EACCES refused, or why it could not be finished."""
        if self._authentications.verdict(afid, errno, message):
            self._reader.limits = LIMITS[State.KNOWN]
            if self._state is State.STRANGER:
                self._enter(State.KNOWN)

    def warned(self, errno: int, message: str) -> None:
        """The connection is about to be ended. The peer is told why, by an error that answers no request."""
        if not self.closed:
            seq = 0
            while seq in self._outstanding:
                seq += 1
            self.out.append(messages.error_frame(seq, errno, message))

    def attached(self, request: int, session: int) -> None:
        """The monitor made (or found) a session: the worker is to walk to the aname."""
        waiting = self._replies.asked(request)
        if waiting is None:
            return
        attachment = self._attachments.get(session)
        if attachment is None:
            attachment = self._attachments[session] = Attachment(session)
        self._replies.forward(Forward(frames.ATTACH, waiting.seq, Fid(waiting.path, attachment), number=waiting.number))
        if len(self._attachments) > self._attachments_wanted:
            self._forget_attachments()

    def announced(self, request: int, announcement: int, warning: str = "") -> None:
        """The monitor registered an endpoint."""
        waiting = self._replies.asked(request)
        if waiting is not None:
            self._announcements.announced(waiting, announcement, warning)

    def refused(self, request: int, errno: int, message: str = "") -> None:
        """The monitor does not grant an attach or an announce."""
        waiting = self._replies.asked(request)
        if waiting is not None:
            self._fids.release(waiting.number)
            self._replies.fail(waiting.seq, errno, message)

    def over(self, session: int) -> None:
        """A session has ended. What is outstanding on it is still answered; its fids are of no use any more."""
        attachment = self._attachments.pop(session, None)
        if attachment is not None:
            attachment.ended = True

    def line(self, announcement: int, line: int) -> None:
        """A caller's line is ready."""
        self._announcements.line(announcement, line)

    def walked(self, forward: Forward, dev: int, ino: int, is_dir: bool) -> None:
        """A walk found something."""
        if self._outstanding.get(forward.seq) is not forward:
            return
        place = forward.place
        if place.attachment.ended:
            self.failed(forward, EKEYEXPIRED)
            return
        place.dev = dev
        place.ino = ino
        place.is_dir = is_dir
        self._fids.bind(forward.number, place)
        body = messages.encode(messages.Qid(place.qid, is_dir))
        self._replies.finish(forward, frame(forward.kind + 1, forward.seq, body))

    def stated(self, forward: Forward, reply: messages.StatReply) -> None:
        """A stat's answer. Strings that are not UTF-8 make it an error."""
        if self._outstanding.get(forward.seq) is not forward:
            return
        try:
            body = messages.encode(reply)
        except UnicodeEncodeError:
            self.failed(forward, EILSEQ, "a name in the answer is not UTF-8")
            return
        if len(body) > STAT_REPLY_MAX:
            self.failed(forward, EMSGSIZE, "the answer is too long: ask for fewer names at once")
            return
        self._replies.finish(forward, frame(frames.STAT_REPLY, forward.seq, body))

    def called(self, forward: Forward, body: bytes) -> None:
        """A call's answer: metadata length, metadata, payload."""
        seq = forward.seq
        if self._outstanding.get(seq) is not forward:
            return
        # The worker, or the handler behind it, may send anything: it must not confuse the other users of the connection.
        rest = len(body) - 4
        if rest < 0 or not rest >= METADATA_LENGTH.unpack_from(body)[0] <= METADATA_MAX:
            self.failed(forward, EBADMSG, "the handler's reply is malformed")
        elif forward.kind == CALL:
            if forward.flushes is None:
                del self._outstanding[seq]
                if len(body) < LARGE:
                    self.out += (HEADER.pack(CALL_REPLY, seq, len(body)), body)
                else:
                    self.out += apart(HEADER.pack(CALL_REPLY, seq, len(body)), body)
                    self.bulky = True
            else:
                self._replies.finish(forward, frame(CALL_REPLY, seq, body))
        else:
            try:
                text = messages.split_call_reply(body)[0].decode()
            except UnicodeDecodeError:
                self.failed(forward, EILSEQ)
                return
            reply = messages.encode(messages.AppendReply(text))
            if len(reply) > APPEND_REPLY_MAX:
                self.failed(forward, EMSGSIZE, "the answer has too many characters that JSON escapes: make a call instead")
                return
            self._replies.finish(forward, frame(frames.APPEND_REPLY, seq, reply))

    def failed(self, forward: Forward, errno: int, message: str = "") -> None:
        """A forwarded request failed. errno: why; one that is none of Linux becomes EIO."""
        if self._outstanding.get(forward.seq) is not forward:
            return
        if forward.kind in (frames.WALK, frames.ATTACH):
            self._fids.release(forward.number)
        if not 1 <= errno <= 4095:
            errno = EIO
        self._replies.finish(forward, messages.error_frame(forward.seq, errno, message))

    def handler_failed(self, forward: Forward, body: bytes) -> None:
        """A handler answered with an error of its own, in JSON that nobody has looked into yet."""
        try:
            error = messages.decode(messages.Error, body)
        except ProtocolError:
            self.failed(forward, EBADMSG, "the handler's error is malformed")
            return
        self.failed(forward, error.errno, error.message)

    # --- requests ------------------------------------------------------------------------------------------------------

    def _request(self, kind: int, seq: int, body: bytes) -> None:
        """Any request but a call that can be granted. Raises ProtocolError."""
        rule = RULES[kind]
        message = messages.decode(rule.body, body, seq) if rule.body is not None else body
        try:
            if self._refused[kind]:
                raise RequestError(self._refused[kind])
            if rule.share and len(self._outstanding) >= rule.share * self._limit:
                raise RequestError(EAGAIN, f"{self._limit} requests are outstanding, which is the limit: wait for replies")
            _HANDLERS[kind](self, seq, message)
        except RequestError as fault:
            self._replies.fail(seq, fault.errno, fault.message)

    def _auth(self, seq: int, message: messages.Auth) -> None:
        self._authentications.auth(seq, message)

    def _attach(self, seq: int, message: messages.Attach) -> None:
        afid = self._fids.entries.get(message.afid)
        if not isinstance(afid, Afid) or not afid.accepted:
            raise RequestError(EACCES, "no authentication under this afid was accepted on this connection")
        if message.uname != afid.uname:
            raise RequestError(EACCES, "the afid was accepted for another user")
        aname = messages.split_aname(message.aname)
        if aname[: len(afid.aname)] != afid.aname:
            raise RequestError(EACCES, "the afid is good for a part of the tree that this aname is not in")
        self._fids.reserve(message.fid, Fid)
        path = "/".join(aname)
        request = self._replies.ask(Request(seq, message.fid, path.encode()))
        self.effects.append(effects.Attach(request, afid.ticket, afid.uname, path))

    def _walk(self, seq: int, message: messages.Walk) -> None:
        fid = self._fids.fid(message.fid)
        path = fid.path
        if messages.split_path(message.path):
            path = (path + b"/" if path else b"") + message.path.encode()
            if len(path) > PATH_MAX:
                raise RequestError(ENAMETOOLONG, f"a path of over {PATH_MAX} bytes")
        self._fids.reserve(message.newfid, Fid)
        self._replies.forward(Forward(frames.WALK, seq, Fid(path, fid.attachment), number=message.newfid))

    def _stat(self, seq: int, message: messages.Stat) -> None:
        after = message.after.encode()
        if len(after) > NAME_MAX:
            raise RequestError(ENAMETOOLONG, f"after: a name has at most {NAME_MAX} bytes")
        self._replies.forward(Forward(frames.STAT, seq, self._fids.fid(message.fid), after, limit=message.limit))

    def _append(self, seq: int, message: messages.Append) -> None:
        entry = self._fids.entries.get(message.fid)
        if isinstance(entry, Afid):
            self._authentications.append(seq, entry, message.data)
            return
        fid = self._fids.fid(message.fid)
        if fid.is_dir:
            raise RequestError(EISDIR)
        payload = message.data.encode()
        if len(payload) > PAYLOAD_MAX:
            raise RequestError(EMSGSIZE, f"{len(payload)} bytes of text: at most {PAYLOAD_MAX}")
        self._replies.forward(Forward(frames.APPEND, seq, fid, METADATA_LENGTH.pack(0) + payload))

    def _clunk(self, seq: int, message: messages.Clunk) -> None:
        entry = self._fids.entries.get(message.fid)
        if isinstance(entry, Afid):
            self._authentications.clunk(entry)
        elif isinstance(entry, Announcement):
            self._announcements.clunk(entry)
        elif not isinstance(entry, Fid):
            raise RequestError(EBADF)
        self._fids.release(message.fid)
        self._replies.reply(seq, frames.CLUNK_REPLY, messages.Empty())

    def _call(self, seq: int, body: bytes) -> None:
        """A call that `receive` did not grant, though nothing speaks against requests as such: because of its fid."""
        self._fids.fid(messages.split_call(body, seq)[0])
        raise RequestError(EISDIR)

    def _flush(self, seq: int, body: bytes) -> None:
        if len(body) != frames.SEQ.size:
            raise ProtocolError(EBADMSG, f"flush: a body of {len(body)} bytes, not {frames.SEQ.size}", seq)
        target = self._outstanding.get(frames.SEQ.unpack(body)[0])
        if not isinstance(target, Forward) or not RULES[target.kind].cancellable:
            self.out.append(frame(frames.FLUSH_REPLY, seq))
            return
        self._outstanding[seq] = Request(seq)
        if target.flushes is None:
            target.flushes = []
            self.effects.append(effects.Flush(target))
        target.flushes.append(seq)

    def _ping(self, seq: int, _body: bytes) -> None:
        self._replies.reply(seq, frames.PING_REPLY, messages.PingReply(self._tree if self._local else None))

    def _announce(self, seq: int, message: messages.Announce) -> None:
        self._announcements.announce(seq, message)

    def _listen(self, seq: int, message: messages.Listen) -> None:
        self._announcements.listen(seq, message)

    def _enter(self, state: State) -> None:
        self._state = state
        self._refused = refusals(state, self._local)

    def _forget_attachments(self) -> None:
        """Drop the sessions that nothing belongs to, so that attaching again and again does not collect memory."""
        used = {entry.attachment.session for entry in self._fids.entries.values() if isinstance(entry, Fid)}
        used |= {forward.session for forward in self._replies.forwards()}
        for session in self._attachments.keys() - used:
            del self._attachments[session]
            self.effects.append(effects.ForgetSession(session))
        self._attachments_wanted = max(SESSIONS_KEPT, 2 * len(self._attachments))


_HANDLERS: dict[int, Callable[[Session, int, Any], None]] = {
    frames.AUTH: Session._auth,
    frames.ATTACH: Session._attach,
    frames.WALK: Session._walk,
    frames.STAT: Session._stat,
    frames.APPEND: Session._append,
    frames.CLUNK: Session._clunk,
    frames.CALL: Session._call,
    frames.FLUSH: Session._flush,
    frames.PING: Session._ping,
    frames.ANNOUNCE: Session._announce,
    frames.LISTEN: Session._listen,
}
