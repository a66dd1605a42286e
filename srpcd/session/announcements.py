"""The announcements of one connection, and the listens on them."""

from errno import EBADF, EBUSY, ECANCELED, EISDIR

from srpcd.session import effects
from srpcd.session.fids import Announcement, FidTable
from srpcd.session.replies import Replies, Request
from srpcd.wire import messages
from srpcd.wire.errors import RequestError
from srpcd.wire.frames import ANNOUNCE_REPLY, LISTEN_REPLY, frame


class Announcements:
    """What one connection serves. listens: how many listens are outstanding."""

    __slots__ = ("_announcements", "_fids", "_replies", "listens")

    def __init__(self, replies: Replies, fids: FidTable) -> None:
        self.listens = 0
        self._replies = replies
        self._fids = fids
        self._announcements: dict[int, Announcement] = {}

    def announce(self, seq: int, message: messages.Announce) -> None:
        """Make one. Raises RequestError."""
        path = "/".join(messages.split_aname(message.path))
        if not path:
            raise RequestError(EISDIR, "the tree's root is a directory: name an endpoint in it")
        self._fids.reserve(message.fid, Announcement)
        request = self._replies.ask(Request(seq, message.fid))
        self._replies.effects.append(effects.Announce(request, path))

    def announced(self, request: Request, announcement: int, warning: str) -> None:
        """The monitor registered it."""
        entry = self._announcements[announcement] = Announcement(announcement)
        self._fids.bind(request.number, entry)
        self._replies.reply(request.seq, ANNOUNCE_REPLY, messages.AnnounceReply(warning or None))

    def listen(self, seq: int, message: messages.Listen) -> None:
        """Tell each line from now on. Raises RequestError."""
        entry = self._fids.entries.get(message.fid)
        if not isinstance(entry, Announcement):
            raise RequestError(EBADF)
        if entry.listen is not None:
            raise RequestError(EBUSY, "the announcement is being listened to already")
        self._replies.outstanding[seq] = Request(seq)
        self.listens += 1
        entry.listen = seq
        while entry.lines:
            self._tell(seq, entry.lines.popleft())

    def line(self, announcement: int, line: int) -> None:
        """A caller's line is ready."""
        entry = self._announcements.get(announcement)
        if entry is None:
            return
        if entry.listen is None:
            entry.lines.append(line)
        else:
            self._tell(entry.listen, line)

    def clunk(self, entry: Announcement) -> None:
        """Withdraw one; its listen is cancelled. The caller frees its number."""
        del self._announcements[entry.announcement]
        if entry.listen is not None:
            self.listens -= 1
            self._replies.fail(entry.listen, ECANCELED, "the announcement was withdrawn")
        self._replies.effects.append(effects.Withdraw(entry.announcement))

    def clear(self) -> None:
        """Forget all."""
        self._announcements.clear()
        self.listens = 0

    def _tell(self, seq: int, line: int) -> None:
        """One of the many replies to a listen."""
        self._replies.out.append(frame(LISTEN_REPLY, seq, messages.encode(messages.ListenReply(line))))
