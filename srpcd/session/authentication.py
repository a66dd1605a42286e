"""The authentications of one connection: afids, their prompts, their answers, their verdicts.

An afid is begun by `auth`, which waits for the first prompts that want an answer; each append gives one answer, and the
last one of a step waits for what comes next: further prompts, or the verdict. Prompts that want no answer are kept for
the next reply, because a reply without any wanting prompt says that it is over.
"""

from errno import EACCES, EAGAIN, ECANCELED, EINVAL, EOPNOTSUPP

from srpcd.session import effects
from srpcd.session.fids import Afid, FidTable
from srpcd.session.replies import Replies, Request
from srpcd.wire import messages
from srpcd.wire.errors import RequestError
from srpcd.wire.frames import APPEND_REPLY, AUTH_REPLY
from srpcd.wire.limits import PASSWORD_MAX, UNAME_MAX


class Authentications:
    """The afids of one connection. local: whether it came in on the local listener."""

    __slots__ = ("_afids", "_fids", "_local", "_replies")

    def __init__(self, replies: Replies, fids: FidTable, local: bool) -> None:
        self._replies = replies
        self._fids = fids
        self._local = local
        self._afids: dict[int, Afid] = {}

    def auth(self, seq: int, message: messages.Auth) -> None:
        """Begin one. Raises RequestError."""
        uname = message.uname
        if not uname or "\0" in uname or len(uname.encode()) > UNAME_MAX:
            raise RequestError(EINVAL, f"a user name has from 1 to {UNAME_MAX} bytes, and no NUL")
        if message.mechanism == "peer" and not self._local:
            raise RequestError(EOPNOTSUPP, "mechanism peer is for the local socket: use pam")
        aname = messages.split_aname(message.aname)
        self._fids.reserve(message.afid, Afid)
        ticket = self._replies.number()
        self._afids[ticket] = Afid(message.afid, ticket, uname, aname, seq)
        self._replies.outstanding[seq] = Request(seq)
        self._replies.effects.append(effects.Authenticate(ticket, message.mechanism, uname, "/".join(aname)))

    def append(self, seq: int, afid: Afid, data: str) -> None:
        """Answer the next prompt. Raises RequestError."""
        if afid.pending is not None:
            raise RequestError(EAGAIN, "the last answer is still being looked at: wait for its reply")
        if not afid.wants:
            raise RequestError(EINVAL, "the afid wants no answer")
        afid.wants -= 1
        afid.pending = seq
        self._replies.outstanding[seq] = Request(seq)
        if afid.verdict is not None:  # it ended before all answers were there
            self._decide(afid, *afid.verdict)
            return
        self._replies.effects.append(effects.Answer(afid.ticket, data.encode()[: PASSWORD_MAX + 1]))
        if afid.wants:
            self._answer(afid, seq, "")

    def prompted(self, ticket: int, prompts: list[messages.Prompt]) -> None:
        """An authentication goes on with these prompts."""
        afid = self._afids.get(ticket)
        if afid is None:
            return
        afid.hold(prompts)
        if afid.wants and afid.pending is not None:
            self._answer(afid, afid.pending, "")

    def verdict(self, ticket: int, errno: int, message: str) -> bool:
        """An authentication is over. Returns whether it was accepted."""
        afid = self._afids.get(ticket)
        if afid is None or afid.verdict is not None:
            return False
        afid.verdict = errno, message
        if afid.pending is not None:
            self._decide(afid, errno, message)
        return errno == 0

    def clunk(self, afid: Afid) -> None:
        """Forget one; an append that waits is cancelled. The caller frees its number."""
        del self._afids[afid.ticket]
        if afid.pending is not None:
            self._replies.fail(afid.pending, ECANCELED)
        self._replies.effects.append(effects.ForgetAfid(afid.ticket))

    def clear(self) -> None:
        """Forget all."""
        self._afids.clear()

    def _decide(self, afid: Afid, errno: int, message: str) -> None:
        """Tell the auth or append that waits how it ended."""
        seq = afid.pending
        assert seq is not None
        afid.wants = 0
        if errno == 0:
            self._answer(afid, seq, "1")
        elif afid.begun and errno == EACCES:
            self._answer(afid, seq, "0")
        else:
            afid.pending = None
            self._replies.fail(seq, errno, message)
            if not afid.begun:
                self._fids.release(afid.number)
                del self._afids[afid.ticket]

    def _answer(self, afid: Afid, seq: int, data: str) -> None:
        """Answer the auth or append that waits, with the prompts that the client does not have yet."""
        afid.pending = None
        if afid.begun:
            self._replies.reply(seq, APPEND_REPLY, messages.AppendReply(data, afid.take()))
        else:
            afid.begun = True
            self._fids.bind(afid.number, afid)
            self._replies.reply(seq, AUTH_REPLY, messages.AuthReply(afid.take()))
