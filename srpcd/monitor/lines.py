"""The register of service endpoints, and the lines between workers and services.

An endpoint is an inode, pinned by an O_PATH descriptor from the probe that found it. It has servers (announcements) and
callers (workers that a probe has passed); each pair of these has one line: a connection through a Unix stream socket.

The register listens for the service at LINES/<service uid>/<line id>, in a directory that only the service's uid can enter.
When the service has connected, the register checks its uid, writes the first frame, which says who calls, and hands the
connection to the worker. Then the name and the listening socket are gone. What a worker or gate says has no influence on
whom the service is told that it serves. Where SELinux is on, the socket that the worker gets has the endpoint's type, so
the kernel asks the policy anew at each read and write.

A line is a socket because a service may be hostile. It could move a page of a file on a file system of its own into a pipe,
whose reader then waits for that file system without end; with a socket it is the sender that waits (docs/privsep.md).
"""

import asyncio
import os
import resource
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EMFILE, EMSGSIZE
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from srpcd import ipc, passing, selinux
from srpcd.wire import frames
from srpcd.wire.limits import LINE_CONNECT_SECONDS

W = TypeVar("W")  # a worker, whatever that is to the monitor
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_ACL = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY = 1, 2, 4, 16, 32, 0xFFFFFFFF


def _searchable_by(uid: int) -> bytes:
    """A POSIX ACL (acl(5)) of a directory that one user besides the owner may search, and nobody else."""
    entries = ((_USER_OBJ, 7, _NOBODY), (_USER, 1, uid), (_GROUP_OBJ, 0, _NOBODY), (_MASK, 1, _NOBODY), (_OTHER, 0, _NOBODY))
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
    """One server of an endpoint. uid: of the service, which alone can connect its lines. tell: of a new line, to it.
    doubt: whether it may still serve."""

    number: int
    uid: int
    tell: Callable[[int], None]
    doubt: Callable[[], None]


class Endpoint(Generic[W]):
    """A pinned inode, found at a path, with its servers and callers.

    chain: O_PATH descriptors, tree root first, the pipe last. owner: uid on whose account they are. labelled: SELinux is
    on. seen: what `revoke` has looked at; None at first, so that nobody else's probe can hide a change. changed: when
    that last was another (monotonic seconds). lines: numbers, by announcement and worker. given: by the same, which of
    them were ever connected. A worker's word that a line is gone does not count: it may still be open.
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
    """One line.

    path: of its socket. listener: the listening socket, None when the service has connected. first: the frame that says who
    calls. label: of SELinux, the endpoint's when it was made. made: monotonic seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint[W],
        server: Announcement,
        worker: W,
        label: str,
        first: bytes,
        path: str,
        listener: socket.socket,
    ) -> None:
        self.endpoint = endpoint
        self.server = server
        self.worker = worker
        self.label = label
        self.first = first
        self.path = path
        self.listener: socket.socket | None = listener
        self.made = time.monotonic()


class Register(Generic[W]):
    """All endpoints, announcements and lines. One instance, of the monitor.

    directory: LINES. own: the monitor's uid (a service of that uid, in personal mode, owns its directory anyway). labelled:
    SELinux is on. connected: called with a line's number, the line, and the descriptor that is the worker's, which belongs
    to the callee; -1: the service has connected, and what came is of no use.
    """

    def __init__(self, directory: str, own: int, labelled: bool, connected: Callable[[int, Line[W], int], None]) -> None:
        self._directory = directory
        self._own = own
        self._labelled = labelled
        self._connected = connected
        self._numbers = count(1)
        self._held: Counter[int] = Counter()  # descriptors, by uid
        self._room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self.endpoints: dict[tuple[int, int, str], Endpoint[W]] = {}
        self._inodes: dict[tuple[int, int], set[Endpoint[W]]] = {}
        self.lines: dict[int, Line[W]] = {}
        self._expected: dict[int, Line[W]] = {}  # those whose service has not connected, the oldest first
        shutil.rmtree(directory, ignore_errors=True)  # what a crash left behind
        os.mkdir(directory, 0o711)

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
        if found is not None or self._full(owner):
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

    def _full(self, uid: int) -> bool:
        """Whether as many descriptors as may be are held on account of `uid`, or in all."""
        return self._held[uid] > self._room // 4 or self._held.total() > self._room

    def make_line(
        self, endpoint: Endpoint[W], server: Announcement, worker: W, caller: tuple[int, int, tuple[int, ...], str, str]
    ) -> int:
        """Make a line, and wait for the service. caller: uid, gid, groups, SELinux context, user name, as it is to be told.

        Returns the line's id. Raises OSError.
        """
        uid, gid, groups, context, user = caller
        first = frames.caller_frame(uid, gid, groups, user, context, "/" + endpoint.path)
        if len(first) > frames.PIPE_BUF:
            raise OSError(EMSGSIZE, "the first frame does not fit")
        if self._full(server.uid):
            raise OSError(EMFILE, "too many lines that their service has not connected")
        label = endpoint.label
        if endpoint.labelled and not label:
            raise PermissionError(EACCES, "the endpoint's label can't be read")
        number = next(self._numbers)
        path = os.path.join(self._directory_of(server.uid), str(number))
        listener = self._listen(path, label)
        self._held[server.uid] += 1
        line = self.lines[number] = self._expected[number] = Line(endpoint, server, worker, label, first, path, listener)
        endpoint.lines[server.number, worker] = number
        asyncio.get_running_loop().add_reader(listener, self._accept, number, line)
        return number

    def _directory_of(self, uid: int) -> str:
        """The directory of a service's lines, which nobody else can enter."""
        path = os.path.join(self._directory, str(uid))
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return path
        try:
            if uid != self._own:
                os.setxattr(path, "system.posix_acl_access", _searchable_by(uid))
        except OSError:
            os.rmdir(path)
            raise
        return path

    @staticmethod
    def _listen(path: str, label: str) -> socket.socket:
        listener = None
        try:
            with selinux.creating(label):
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                listener.bind(path)
            os.chmod(path, 0o666)  # noqa: S103  the directory says who comes this far
            passing.refuse_descriptors(listener)
            listener.listen(0)  # one connection is expected
        except OSError:
            if listener is not None:
                listener.close()
            with suppress(OSError):
                os.unlink(path)
            raise
        return listener

    def _accept(self, number: int, line: Line[W]) -> None:
        """Take the service's connection, write the first frame, and pass the connection on."""
        if line.listener is None:
            return
        try:
            sock, _address = line.listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor for it
            self._connected(number, line, -1)
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != line.server.uid:  # only root's processes come this far
            passing.close(sock.detach())
            return
        self._stop_listening(number, line)
        sock.setblocking(False)
        sent = 0
        with suppress(OSError):  # the service has gone again
            sent = sock.send(line.first)
        if sent == len(line.first):
            line.endpoint.given.add((line.server.number, line.worker))
            self._connected(number, line, sock.detach())
        else:
            passing.close(sock.detach())
            self._connected(number, line, -1)

    def _stop_listening(self, number: int, line: Line[W]) -> None:
        if line.listener is not None:
            asyncio.get_running_loop().remove_reader(line.listener)
            passing.close(line.listener.detach())
            line.listener = None
            del self._expected[number]
            self._held[line.server.uid] -= 1
            with suppress(OSError):
                os.unlink(line.path)

    def late(self, now: float) -> list[int]:
        """Lines that their service had LINE_CONNECT_SECONDS to connect. now: monotonic seconds."""
        return [number for number, line in self._expected.items() if line.made + LINE_CONNECT_SECONDS <= now]

    def end_line(self, number: int) -> Line[W] | None:
        """Forget a line and what is left of it; a connection that the worker has is the worker's to close."""
        line = self.lines.pop(number, None)
        if line is not None:
            del line.endpoint.lines[line.server.number, line.worker]
            self._stop_listening(number, line)
        return line

    def close(self) -> None:
        """Remove everything that lies on disk; what is only open ends with the process."""
        for number in list(self.lines):
            self.end_line(number)
        shutil.rmtree(self._directory, ignore_errors=True)
