"""What the numbers of one connection stand for: fids, afids, announcements, and numbers that are reserved.

All three kinds share one space of numbers, which the client chooses from. A request that makes a fid reserves its number
first; it is bound when the request succeeds and free again when it fails (lib9p's habit: whoever fails undoes the fid).
"""

from collections import deque
from errno import EAGAIN, EBADF, EEXIST, EKEYEXPIRED

from srpcd.wire.errors import RequestError
from srpcd.wire.limits import AFIDS_MAX, FIDS_MAX, FIDS_TIGHT, HELD_MAX, LINES_MAX, LISTENERS_MAX, PROMPTS_MAX
from srpcd.wire.messages import Prompt


class Attachment:
    """A session of one user: what its fids have in common. ended: the monitor says that it is over."""

    __slots__ = ("ended", "session")

    def __init__(self, session: int) -> None:
        self.session = session
        self.ended = False


class Fid:
    """A place in the tree: the whole path (UTF-8, elements joined by `/`, no slash in front), and what was found there."""

    __slots__ = ("attachment", "dev", "ino", "is_dir", "path")

    def __init__(self, path: bytes, attachment: Attachment) -> None:
        self.path = path
        self.attachment = attachment
        self.dev = 0
        self.ino = 0
        self.is_dir = False

    @property
    def qid(self) -> str:
        """As the protocol writes it."""
        return f"{self.dev}:{self.ino}"


class Afid:
    """One authentication: what it is for, what is still to be answered, and how it ended.

    ticket: the session's own number for it, new on each connection, where `number` is the client's.
    wants: prompts that the client has and that still want an answer.
    held: prompts that the client does not have yet. pending: seq of the auth or append that waits.
    verdict: errno (0: accepted) and sentence, once it is over.
    """

    __slots__ = ("aname", "begun", "held", "number", "pending", "ticket", "uname", "verdict", "wants")

    def __init__(self, number: int, ticket: int, uname: str, aname: list[str], seq: int) -> None:
        self.number = number
        self.ticket = ticket
        self.uname = uname
        self.aname = aname
        self.pending: int | None = seq
        self.begun = False
        self.wants = 0
        self.held: list[Prompt] = []
        self.verdict: tuple[int, str] | None = None

    @property
    def accepted(self) -> bool:
        """Whether it may be attached with."""
        return self.verdict is not None and self.verdict[0] == 0

    def hold(self, prompts: list[Prompt]) -> None:
        """Keep prompts for the next reply."""
        self.held += prompts
        self.wants += sum(prompt.style in ("secret", "text") for prompt in prompts)
        while len(self.held) > PROMPTS_MAX or sum(len(prompt.text) for prompt in self.held) > HELD_MAX:
            self.wants -= self.held.pop(0).style in ("secret", "text")

    def take(self) -> list[Prompt]:
        """The prompts for this reply."""
        held, self.held = self.held, []
        return held


class Announcement:
    """An endpoint that the client serves. listen: seq of the listen that waits for lines."""

    __slots__ = ("announcement", "lines", "listen")

    def __init__(self, announcement: int) -> None:
        self.announcement = announcement
        self.listen: int | None = None
        self.lines: deque[int] = deque(maxlen=LINES_MAX)


class Reserved:
    """The number of a fid, an afid or an announcement that a request is about to make."""

    __slots__ = ("kind",)

    def __init__(self, kind: type["Fid | Afid | Announcement"]) -> None:
        self.kind = kind


Entry = Fid | Afid | Announcement | Reserved


class FidTable:
    """The numbers of one connection.

    tight: memory is short, so no more than FIDS_TIGHT fids are made.
    """

    __slots__ = ("_counts", "_paths", "entries", "tight")

    def __init__(self) -> None:
        self.tight = False
        self._paths = 0  # bytes of all fids' paths
        self.entries: dict[int, Entry] = {}
        self._counts: dict[type, int] = {Fid: 0, Afid: 0, Announcement: 0}

    def count(self, kind: type[Fid | Afid | Announcement]) -> int:
        """How many of a kind there are, reserved ones included."""
        return self._counts[kind]

    @property
    def held(self) -> int:
        """Bytes of memory that all of them take, about."""
        return len(self.entries) * ENTRY_BYTES + self._paths

    def reserve(self, number: int, kind: type[Fid | Afid | Announcement]) -> None:
        """Take a number for something that is about to be made. Raises RequestError: EEXIST, EAGAIN."""
        if number in self.entries:
            raise RequestError(EEXIST)
        most = FIDS_TIGHT if self.tight and kind is Fid else MAXIMA[kind]
        if self._counts[kind] >= most:
            raise RequestError(EAGAIN, f"{most} {kind.__name__.lower()}s on one connection are the limit: clunk some")
        self.entries[number] = Reserved(kind)
        self._counts[kind] += 1

    def bind(self, number: int, entry: Fid | Afid | Announcement) -> None:
        """Put into a reserved number what it stands for."""
        self.entries[number] = entry
        if isinstance(entry, Fid):
            self._paths += len(entry.path)

    def release(self, number: int) -> None:
        """Free a number, reserved or bound."""
        entry = self.entries.pop(number)
        self._counts[entry.kind if isinstance(entry, Reserved) else type(entry)] -= 1
        if isinstance(entry, Fid):
            self._paths -= len(entry.path)

    def fid(self, number: int) -> Fid:
        """The place that a number stands for. Raises RequestError: EBADF, EKEYEXPIRED."""
        entry = self.entries.get(number)
        if entry.__class__ is not Fid:
            raise RequestError(EBADF)
        if entry.attachment.ended:
            raise RequestError(EKEYEXPIRED)
        return entry

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._counts = dict.fromkeys(self._counts, 0)
        self._paths = 0


ENTRY_BYTES = 400
"""Bytes of memory that one number takes, beside its path (measured: 340 for a fid)."""

MAXIMA: dict[type, int] = {Fid: FIDS_MAX, Afid: AFIDS_MAX, Announcement: LISTENERS_MAX}
"""How many of each kind one connection may have."""
