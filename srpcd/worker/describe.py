"""Stat: what there is to say about a file in the tree, and the names in a directory, page by page."""

import os
from time import time_ns

from srpcd.ipc import DIRECTORY, SERVICE, IsLive, Message, Stat
from srpcd.wire.limits import STAT_PAGE
from srpcd.worker.loop import INFINITY, Loop
from srpcd.worker.resolve import Tree, kind_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Answer = Callable[[Stat], None]

WAIT = 1.0
"""Seconds that a stat waits for the monitor to say whether somebody serves an endpoint."""

NAMES_MAX = 1024
"""Names of users, and as many of groups, that are remembered."""

LISTING_SECONDS = 10.0
"""How long a directory's sorted names are kept for the next page: 100,000 of them take 10 MB."""

_FRESH = 100_000_000
"""Nanoseconds. A directory that changed so short a time ago may change again under the same time stamp, whose clock
ticks every few milliseconds: its listing is not kept."""

_LATEST = (1 << 63) - 1
"""Nanoseconds, in the year 2262. Some file systems keep whatever time a file's owner sets: others' stat must not fail."""


class Names:
    """Names of users and groups, by number; the number itself where it has none."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}

    def user(self, uid: int) -> str:
        """The account's name."""
        if uid not in self._users:
            import pwd  # noqa: PLC0415  most workers never need it

            try:
                name = pwd.getpwuid(uid).pw_name
            except KeyError:
                name = str(uid)
            _remember(self._users, uid, name)
        return self._users[uid]

    def group(self, gid: int) -> str:
        """The group's name."""
        if gid not in self._groups:
            import grp  # noqa: PLC0415

            try:
                name = grp.getgrgid(gid).gr_name
            except KeyError:
                name = str(gid)
            _remember(self._groups, gid, name)
        return self._groups[gid]


def _remember(names: "dict[int, str]", number: int, name: str) -> None:
    if len(names) >= NAMES_MAX:
        names.clear()
    names[number] = name


def _first_after(names: "list[str]", after: str) -> int:
    """Index of the first name greater than `after` (`bisect`, without another import)."""
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) // 2
        if names[middle] <= after:
            low = middle + 1
        else:
            high = middle
    return low


class Listing:
    """A directory's names, sorted; those that can be no endpoints by their very name or type are left out.

    sure: names of directories, which need no look at their mode.
    """

    def __init__(self, directory: int) -> None:
        self.names: list[str] = []
        self.sure: set[str] = set()
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name[0] == "." or entry.is_symlink():
                    continue
                try:
                    entry.name.encode()
                except UnicodeEncodeError:  # not UTF-8: it came as surrogates
                    continue
                self.names.append(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    self.sure.add(entry.name)
        self.names.sort()  # by code point is by byte, in UTF-8

    def page(self, directory: int, after: str, limit: int) -> "tuple[list[str], bool]":
        """At most `limit` names after `after`, and whether there are more."""
        found: list[str] = []
        for at in range(_first_after(self.names, after) if after else 0, len(self.names)):
            name = self.names[at]
            if name in self.sure or _exists(directory, name):
                if len(found) == limit:
                    return found, True
                found.append(name)
        return found, False


def _exists(directory: int, name: str) -> bool:
    try:
        return kind_of(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode) is not None
    except PermissionError:  # may be read but not searched: a name is all there is to know
        return True
    except OSError:
        return False


class Describer:
    """Answers stat requests. tell: sends a message to the monitor, who knows whether a service is live."""

    def __init__(self, loop: Loop, tree: Tree, tell: "Callable[[Message], None]") -> None:
        self._loop = loop
        self._tree = tree
        self._tell = tell
        self._names = Names()
        self._request = 0
        self._asked: dict[int, tuple[Stat, Answer, float]] = {}
        self._listing: Listing | None = None
        self._listed: tuple[int, ...] = ()
        self._used = 0.0
        loop.duties.append(self._due)

    def stat(self, path: str, dev: int, ino: int, after: str, limit: int, answer: "Answer") -> int:
        """Describe what a fid stands for; `answer` is called now or, for services, when the monitor has answered.

        after, limit: the page of names in a directory. Returns 0, or a number to `forget` it by. Raises OSError.
        """
        fd, found, kind = self._tree.open_fid(path, dev, ino)
        children: list[str] = []
        readable, more = True, False
        try:
            if kind == DIRECTORY:
                try:
                    children, more = self._children(fd, after, min(limit, STAT_PAGE))
                except PermissionError:
                    readable = False
            context = self._context(fd)
        finally:
            os.close(fd)
        stat = Stat(
            dev,
            ino,
            kind,
            found.st_mode & 0o7777,
            found.st_uid,
            found.st_gid,
            min(max(0, found.st_mtime_ns), _LATEST),
            kind != SERVICE,
            readable,
            more,
            self._names.user(found.st_uid),
            self._names.group(found.st_gid),
            context,
            tuple(children),
        )
        if kind != SERVICE:
            answer(stat)
            return 0
        self._request += 1
        self._asked[self._request] = stat, answer, self._loop.now + WAIT
        self._loop.wake(self._loop.now + WAIT)
        self._tell(IsLive(self._request, dev, ino))
        return self._request

    def forget(self, request: int) -> None:
        """Nobody wants the answer any more."""
        self._asked.pop(request, None)

    def live(self, request: int, live: bool) -> None:
        """The monitor's answer."""
        asked = self._asked.pop(request, None)
        if asked is not None:
            stat, answer, _expires = asked
            stat.live = live
            answer(stat)

    def _children(self, fd: int, after: str, limit: int) -> "tuple[list[str], bool]":
        directory = self._tree.reopen(fd, os.O_RDONLY | os.O_DIRECTORY)  # at each stat: may this user read it now?
        try:
            found = os.fstat(directory)
            state = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
            listing = self._listing
            if listing is None or state != self._listed:
                self._listing = None
                listing = Listing(directory)
                if time_ns() - found.st_ctime_ns > _FRESH:  # mtime may be set to anything, and that sets ctime
                    self._listing, self._listed = listing, state
            self._used = self._loop.now
            self._loop.wake(self._used + LISTING_SECONDS)
            return listing.page(directory, after, limit)
        finally:
            os.close(directory)

    def _context(self, fd: int) -> str:
        try:
            return os.getxattr(f"/proc/self/fd/{fd}", "security.selinux").rstrip(b"\0").decode(errors="replace")
        except OSError:
            return ""

    def _due(self) -> float:
        now, due = self._loop.now, INFINITY
        for request, (_stat, _answer, expires) in list(self._asked.items()):
            if now < expires:
                due = min(due, expires)
                break
            self.live(request, False)
        if self._listing is not None:
            if now >= self._used + LISTING_SECONDS:
                self._listing = None
            else:
                due = min(due, self._used + LISTING_SECONDS)
        return due
