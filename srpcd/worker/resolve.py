"""Find files in the tree, as the user that this process runs as: the kernel decides, anew at each call.

Every look-up goes through the whole path from the tree's root (`srpcd.openat2`), without symbolic links and mount points.
What was found is held by an O_PATH descriptor, and whatever is decided about it is decided through that descriptor:
so it is decided about this very inode, even if the path leads to another one a moment later.
"""

import os
from errno import EACCES, EINVAL, ELOOP, ENOENT, ENXIO, ESTALE, EXDEV
from time import monotonic

from srpcd.ipc import DIRECTORY, PROGRAM, RESIDENT, SERVICE
from srpcd.openat2 import may_execute, open_beneath, open_pipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

ROOT_SECONDS = 1.0
"""How often to look whether the tree's path leads to another directory, at most."""

_S_IFMT, _S_IFDIR, _S_IFIFO, _S_IFREG = 0o170000, 0o040000, 0o010000, 0o100000


def kind_of(mode: int) -> "int | None":
    """DIRECTORY, SERVICE, PROGRAM or RESIDENT by st_mode; None for what does not exist for callers."""
    form = mode & _S_IFMT
    if form == _S_IFIFO:
        return SERVICE
    if form == _S_IFDIR:
        return DIRECTORY
    if form == _S_IFREG and mode & 0o111:
        return RESIDENT if mode & 0o1000 else PROGRAM
    return None


def fail(errno: int) -> "NoReturn":
    """Raise the OSError of an errno."""
    raise OSError(errno, os.strerror(errno))


def check_path(path: str) -> None:
    """Refuse what no client can have named (the gate has checked already). Raises OSError (EINVAL)."""
    if path and ("\0" in path or path[0] in "./" or path[-1] == "/" or "//" in path or "/." in path):
        fail(EINVAL)


class Tree:
    """The tree of endpoints. path: its root directory, which may be a symbolic link or be replaced by another one.

    close: closes a descriptor, not necessarily at once.
    """

    def __init__(self, path: str, close: "Callable[[int], None]" = os.close) -> None:
        self._path = path
        self._close = close
        self._root = -1
        self._inode = (-1, -1)
        self._looked = -ROOT_SECONDS
        # To reopen what an O_PATH descriptor holds. Shorter than by path: one element instead of four.
        self._descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)

    def root(self) -> int:
        """An O_PATH descriptor of the root directory, which stays the tree's. Raises OSError."""
        now = monotonic()
        if self._root < 0 or now - self._looked >= ROOT_SECONDS:
            found = os.stat(self._path)
            if self._root < 0 or (found.st_dev, found.st_ino) != self._inode:
                opened = os.open(self._path, os.O_PATH | os.O_DIRECTORY)
                if self._root >= 0:
                    os.close(self._root)
                self._root = opened
                # Of what was opened, not of what was looked at. The descriptor pins the inode: the number stays its own.
                found = os.fstat(opened)
                self._inode = (found.st_dev, found.st_ino)
            self._looked = now
        return self._root

    def _look_up(self, path: str) -> "tuple[int, os.stat_result]":
        check_path(path)
        try:
            fd = open_beneath(self.root(), path or ".", os.O_PATH)
        except OSError as fault:
            if fault.errno in (ELOOP, EXDEV):
                fail(ENOENT)
            raise
        return fd, os.fstat(fd)

    def open(self, path: str) -> "tuple[int, os.stat_result, int]":
        """Look a path up: (O_PATH descriptor, to be closed by the caller; fstat; kind).

        path: from the tree's root, no slash in front; "" for the root itself.
        Raises OSError with what the kernel said; ENOENT for what does not exist for callers.
        """
        fd, found = self._look_up(path)
        kind = kind_of(found.st_mode)
        if kind is None:
            os.close(fd)
            fail(ENOENT)
        return fd, found, kind

    def open_fid(self, path: str, dev: int, ino: int) -> "tuple[int, os.stat_result, int]":
        """As `open`, for what a fid stands for.

        Raises OSError; ESTALE where another file is at the path now; EACCES where a program is no longer executable.
        """
        fd, found = self._look_up(path)
        kind = kind_of(found.st_mode)
        same = found.st_dev == dev and found.st_ino == ino
        if kind is None or not same:
            os.close(fd)
            fail(EACCES if same else ENOENT if kind is None else ESTALE)
        return fd, found, kind

    def walk(self, path: str) -> "tuple[int, int, int]":
        """(device, inode, kind) of what is at a path. Raises OSError."""
        fd, found, kind = self.open(path)
        os.close(fd)
        return found.st_dev, found.st_ino, kind

    def check_write(self, fd: int) -> None:
        """May this user write on the named pipe that `fd` (O_PATH) holds? That is the permission to call it.

        Raises OSError. Nobody needs to have its other end open: ENXIO comes after the permission check (fifo(7)).
        """
        try:
            os.close(os.open(str(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=self._descriptors))
        except OSError as fault:
            if fault.errno != ENXIO:
                raise

    def may_write(self, name: bytes, dev: int, ino: int) -> bool:
        """Whether the named pipe of a fid is at its path, and this user may write on it.

        One look-up of the whole path answers both: what was opened for writing is looked at, so it is decided about that
        very inode here too. False: not so, or nobody reads the pipe; `open_fid` and `check_write` tell what it is.
        name: a path where they have found this pipe before. To open anything else for writing could have effects.
        """
        if monotonic() - self._looked >= ROOT_SECONDS:
            try:
                self.root()
            except OSError:
                return False
        fd = open_pipe(self._root, name)
        if fd < 0:
            return False
        found = os.fstat(fd)
        self._close(fd)
        return found.st_ino == ino and found.st_dev == dev and found.st_mode & _S_IFMT == _S_IFIFO

    def check_execute(self, fd: int) -> None:
        """May this user execute the file that `fd` (O_PATH) holds? Raises OSError (EACCES)."""
        if not may_execute(fd) and not os.access(str(fd), os.X_OK, dir_fd=self._descriptors):
            fail(EACCES)

    def reopen(self, fd: int, flags: int) -> int:
        """Open what `fd` (O_PATH) holds with other flags; the kernel checks the permission. Raises OSError."""
        return os.open(str(fd), flags, dir_fd=self._descriptors)

    def check_service(self, path: str, dev: int, ino: int) -> None:
        """The whole check of a call on a service endpoint, once more. Raises OSError."""
        fd, _found, kind = self.open_fid(path, dev, ino)
        try:
            if kind != SERVICE:
                fail(ESTALE)
            self.check_write(fd)
        finally:
            os.close(fd)
