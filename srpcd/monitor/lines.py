"""The register of service endpoints, and the lines between workers and services.

An endpoint is an inode, pinned by an O_PATH descriptor from the probe that found it. It has servers (announcements) and
callers (workers that a probe has passed); each pair of these has one line: two named pipes, `recv` and `send`, in
LINES/<service uid>/<line id>/, owned by root, that only the service's uid may enter and open. Where SELinux is on they
carry the endpoint's label, so the kernel asks the policy anew at each read and write. The names are gone as soon as the
service has opened both. What a worker or gate says has no influence on whom the service is told that it serves.
"""

import ctypes
import os
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EMSGSIZE
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from srpcd import ipc, selinux
from srpcd.wire import frames

W = TypeVar("W")  # a worker, whatever that is to the monitor
IN_OPEN, IN_ONESHOT, IN_NONBLOCK, IN_CLOEXEC = 0x20, 0x80000000, 0o4000, 0o2000000
_EVENT = struct.Struct("iIII")
_ACL = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY = 1, 2, 4, 16, 32, 0xFFFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


def _access_list(uid: int, permission: int, owner: int) -> bytes:
    """A POSIX ACL (acl(5)) that gives `permission` to one user besides the owner, and nothing to anybody else."""
    entries = (
        (_USER_OBJ, owner, _NOBODY),
        (_USER, permission, uid),
        (_GROUP_OBJ, 0, _NOBODY),
        (_MASK, permission, _NOBODY),
        (_OTHER, 0, _NOBODY),
    )
    return struct.pack("<I", 2) + b"".join(_ACL.pack(*entry) for entry in entries)


def _attributes(fd: int, labelled: bool) -> tuple[int, int, int, int, int, str]:
    """An ACL changes ctime; a label may not, on a tmpfs before Linux 6.6. Zeros: SELinux lets us see nothing of it."""
    try:
        found = os.fstat(fd)
        label = selinux.label(fd) if labelled else ""
    except OSError:
        return 0, 0, 0, 0, 0, ""
    return found.st_mode, found.st_uid, found.st_gid, found.st_ctime_ns, min(found.st_nlink, 1), label


class Announcement(NamedTuple):
    """One server of an endpoint. uid: of the service, which alone can open its lines. tell: of a new line, to it.
    doubt: whether it may still serve."""

    number: int
    uid: int
    tell: Callable[[int], None]
    doubt: Callable[[], None]


class Endpoint(Generic[W]):
    """A pinned inode, found at a path, with its servers and callers.

    chain: O_PATH descriptors, tree root first, the pipe last. owner: uid on whose account they are. labelled: SELinux is
    on. seen: what `revoke` has looked at; None at first, so that nobody else's probe can hide a change. changed: when
    that last was another (monotonic seconds). lines: numbers, by announcement and worker. given: for which announcement and
    worker there ever was one: it may still be open, where the worker only says that it is gone.
    """

    def __init__(self, key: tuple[int, int, str], chain: list[int], owner: int, labelled: bool) -> None:
        self.key = key
        self.chain = chain
        self.owner = owner
        self.labelled = labelled
        self.seen: object = None
        self.servers: list[Announcement] = []
        self.callers: set[W] = set()
        self.changed = 0.0
        self.lines: dict[tuple[int, W], int] = {}
        self.given: set[tuple[int, W]] = set()

    def had(self, worker: object) -> bool:
        """Whether a worker has or had a line to somebody who still serves."""
        return any(each is worker for _number, each in self.given)

    @property
    def path(self) -> str:
        """Where it was found."""
        return self.key[2]

    @property
    def mode(self) -> int:
        """Its file mode now; 0 where SELinux hides it from us."""
        return _attributes(self.chain[-1], False)[0]

    @property
    def label(self) -> str:
        """Its SELinux label now; empty where SELinux is off, or hides it from us."""
        with suppress(OSError):
            return selinux.label(self.chain[-1]) if self.labelled else ""
        return ""

    def attributes(self) -> list[tuple[int, int, int, int, int, str]]:
        """What decides about access, of the endpoint and all directories above it."""
        return [_attributes(fd, self.labelled) for fd in self.chain]


class Line(Generic[W]):
    """One line. recv: the monitor's own hold on `recv` until the service has opened both ends, else None.

    label: of SELinux, the endpoint's when it was made.
    """

    def __init__(self, endpoint: Endpoint[W], server: Announcement, worker: W, place: str, recv: int, label: str) -> None:
        self.endpoint = endpoint
        self.server = server
        self.worker = worker
        self.directory = place
        self.recv: int | None = recv
        self.label = label
        self.unopened = {"recv", "send"}


class Register(Generic[W]):
    """All endpoints, announcements and lines. One instance, of the monitor.

    directory: LINES. own: the monitor's uid (a service of that uid, in personal mode, owns its pipes anyway). labelled:
    SELinux is on.
    """

    def __init__(self, directory: str, own: int, labelled: bool) -> None:
        self._directory = directory
        self._own = own
        self._labelled = labelled
        self._numbers = count(1)
        self._watches: dict[int, tuple[int, str]] = {}
        self._held: Counter[int] = Counter()  # descriptors, by uid
        self._room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self.endpoints: dict[tuple[int, int, str], Endpoint[W]] = {}
        self._inodes: dict[tuple[int, int], set[Endpoint[W]]] = {}
        self.lines: dict[int, Line[W]] = {}
        shutil.rmtree(directory, ignore_errors=True)  # what a crash left behind
        os.mkdir(directory, 0o711)
        self.inotify: int = _libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if self.inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")

    def endpoint(self, path: str, chain: list[int], owner: int) -> Endpoint[W] | None:
        """The endpoint of a probe's descriptors, which belong to the register from here on. None: over a limit.

        owner: the uid that they are counted for, which may hold a quarter of all.
        """
        try:
            inode = os.fstat(chain[-1])
        except OSError:  # SELinux, since a moment ago
            ipc.close_all(chain)
            return None
        key = (inode.st_dev, inode.st_ino, path)
        found = self.endpoints.get(key)
        if found is not None or self._held[owner] > self._room // 4 or self._held.total() > self._room:
            ipc.close_all(chain)
            return found
        self._held[owner] += len(chain)
        found = self.endpoints[key] = Endpoint(key, chain, owner, self._labelled)
        self._inodes.setdefault(key[:2], set()).add(found)
        return found

    def live(self, dev: int, ino: int) -> bool:
        """Whether anybody serves the pipe with this inode."""
        return any(each.servers for each in self._inodes.get((dev, ino), ()))

    def release(self, endpoint: Endpoint[W]) -> None:
        """Forget an endpoint that has neither servers nor callers."""
        if not endpoint.servers and not endpoint.callers and self.endpoints.get(endpoint.key) is endpoint:
            del self.endpoints[endpoint.key]
            same = self._inodes[endpoint.key[:2]]
            same.remove(endpoint)
            if not same:
                del self._inodes[endpoint.key[:2]]
            self._held[endpoint.owner] -= len(endpoint.chain)
            ipc.close_all(endpoint.chain)
            endpoint.chain = []  # whoever holds it still must not take the numbers for descriptors

    def make_line(
        self, endpoint: Endpoint[W], server: Announcement, worker: W, caller: tuple[int, int, tuple[int, ...], str, str]
    ) -> tuple[int, int, int]:
        """Make a line. caller: uid, gid, groups, SELinux context, user name, as the service is to be told.

        Returns (line id, write end of recv, read end of send): the worker's, to be passed on and closed. Raises OSError.
        """
        number = next(self._numbers)
        parent = os.path.join(self._directory, str(server.uid))
        directory = os.path.join(parent, str(number))
        with suppress(FileExistsError):
            os.mkdir(parent, 0o711)
        recv, send = os.path.join(directory, "recv"), os.path.join(directory, "send")
        opened: list[int] = []
        try:
            label = endpoint.label
            if endpoint.labelled and not label:
                raise PermissionError(EACCES, "the endpoint's label can't be read")
            os.mkdir(directory, 0o700)
            with selinux.creating(label):
                os.mkfifo(recv, 0o600)
                os.mkfifo(send, 0o600)
            opened.append(os.open(recv, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            opened.append(os.open(recv, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            opened.append(os.open(send, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            uid, gid, groups, context, user = caller
            first = frames.caller_frame(uid, gid, groups, user, context, "/" + endpoint.path)
            if len(first) > frames.PIPE_BUF or os.write(opened[0], first) != len(first):
                raise OSError(EMSGSIZE, "the first frame does not fit")  # cut short, the worker could write its end
            for path, name in ((recv, "recv"), (send, "send")):  # after our own opens, which are not to be seen
                watch: int = _libc.inotify_add_watch(self.inotify, os.fsencode(path), IN_OPEN | IN_ONESHOT)
                if watch < 0:
                    raise OSError(ctypes.get_errno(), "inotify_add_watch")
                self._watches[watch] = (number, name)
            if server.uid != self._own:
                os.setxattr(recv, "system.posix_acl_access", _access_list(server.uid, 4, 6))
                os.setxattr(send, "system.posix_acl_access", _access_list(server.uid, 2, 6))
                os.setxattr(directory, "system.posix_acl_access", _access_list(server.uid, 1, 7))  # last: now it opens
        except OSError:
            ipc.close_all(opened)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.lines[number] = Line(endpoint, server, worker, directory, opened[0], label)
        endpoint.lines[server.number, worker] = number
        endpoint.given.add((server.number, worker))
        return number, opened[1], opened[2]

    def opened(self) -> None:
        """Handle what inotify has to say: a service has opened an end. With both open the names go."""
        with suppress(BlockingIOError):
            data = os.read(self.inotify, 64 * 1024)
            for at in range(0, len(data), _EVENT.size):  # watches on files: events carry no names
                watch, mask, _cookie, _length = _EVENT.unpack_from(data, at)
                number, name = self._watches.get(watch, (0, ""))
                line = self.lines.get(number)
                if not mask & IN_OPEN:
                    self._watches.pop(watch, None)
                elif line is not None:
                    line.unopened.discard(name)
                    if not line.unopened:
                        self._remove_names(line)

    def _remove_names(self, line: Line[W]) -> None:
        if line.recv is not None:
            os.close(line.recv)
            line.recv = None
            shutil.rmtree(line.directory, ignore_errors=True)

    def end_line(self, number: int) -> Line[W] | None:
        """Forget a line and remove what is left of it on disk; the worker's ends are the worker's to close."""
        line = self.lines.pop(number, None)
        if line is not None:
            del line.endpoint.lines[line.server.number, line.worker]
            self._remove_names(line)
        return line

    def close(self) -> None:
        """Remove everything that lies on disk; what is only open ends with the process."""
        for number in list(self.lines):
            self.end_line(number)
        os.close(self.inotify)
        shutil.rmtree(self._directory, ignore_errors=True)
