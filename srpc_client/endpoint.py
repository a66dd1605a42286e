"""The files that a service touches: its endpoint's pipe in the tree, and the sockets of its callers' lines.

Both are found by descriptor, element by element and through no symlink: a service may run with more rights than whoever
can write next to it.
"""

import grp
import os
import socket
import stat
import struct
from errno import EACCES, ECONNREFUSED, EEXIST, EINVAL, ELOOP, ENOENT, ENOTDIR, EPERM

from srpc_client.errors import SrpcError, UntrustedServer
from srpc_client.level import low_level
from srpc_client.owner import distrust
from srpcd import passing
from srpcd.wire.errors import WireError
from srpcd.wire.messages import split_aname

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_LINK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def refuse_mode(mode: int) -> None:
    """Raise ValueError for more than the permissions of owner, group and others."""
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode={mode:#o}: a pipe has a mode from 0 to 0o777")


class EndpointPipe:
    """The named pipe at a path of the tree: made if it is not there, else used as the administrator made it.

    tree: the tree's root directory. path: as announced. mode, group: for a pipe that is made; group by name or number, or
    None for the process's own.
    `endpoint` is the path as the daemon has it. `made` tells whether this made it. It is held open for reading, which a
    worker's permission check finds and which keeps the inode from being used again; nobody reads it, and no data goes
    through it.
    Raises SrpcError, with a sentence that names the file; ValueError for a mode that no pipe of ours has.
    """

    def __init__(self, tree: str, path: str, mode: int, group: str | int | None) -> None:
        refuse_mode(mode)
        try:
            elements = split_aname(path)
        except WireError as fault:
            raise SrpcError(fault.errno, fault.message) from None
        if not elements:
            raise SrpcError(EINVAL, "the tree's root is a directory, and only a file below it can be announced")
        self.path = os.path.join(tree, *elements)
        self.endpoint = "/" + "/".join(elements)
        self.made = False
        self._name = elements[-1]
        group_id = _group(group)
        self._directory = _open_directory(tree, elements[:-1])
        try:
            self._fd = self._open(mode, group_id)
        except OSError as fault:
            os.close(self._directory)
            raise _explained(fault, self.path) from None

    def _open(self, mode: int, group: int) -> int:
        try:
            os.mkfifo(self._name, 0o600, dir_fd=self._directory)
            self.made = True
        except FileExistsError:
            pass
        found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        if not stat.S_ISFIFO(found.st_mode):
            raise OSError(EEXIST, "a file that is no named pipe is there already: remove it, or choose another path")
        self._identity = found.st_dev, found.st_ino
        try:
            fd = os.open(self._name, _READ, dir_fd=self._directory)
        except BaseException:
            self._remove()
            raise
        try:
            opened = os.fstat(fd)
            if (opened.st_dev, opened.st_ino) != self._identity:
                raise OSError(EEXIST, "the file there is being replaced by somebody else: try again")
            # Only what was made here gets a mode: by descriptor, so that it is that very file.
            if self.made:
                if group != -1:
                    _give(fd, group)
                os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            self._remove()
            raise
        return fd

    def _remove(self) -> None:
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
            if self.made and (found.st_dev, found.st_ino) == self._identity:
                os.unlink(self._name, dir_fd=self._directory)
        except OSError:
            pass  # it is gone, or the directory may no longer be written: nothing of ours to undo

    @property
    def there(self) -> bool:
        """Whether the path still leads to this pipe."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def close(self, remove: bool) -> None:
        """Let go of it. remove: take it out of the tree too, if this made it and it still is the same file."""
        if self._fd < 0:
            return
        if remove and self.made:
            self._remove()  # before the close: until then its inode number can't belong to another file
        os.close(self._fd)
        os.close(self._directory)
        self._fd = -1


def _group(group: str | int | None) -> int:
    if group is None:
        return -1
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SrpcError(EINVAL, f"there is no group {group!r} on this host") from None


def _give(fd: int, group: int) -> None:
    try:
        os.fchown(fd, -1, group)
    except PermissionError:
        raise OSError(
            EPERM,
            f"this process is not a member of the group {_group_name(group)}, and so can't give it the endpoint: add its"
            " account to that group, or let an administrator make the pipe",
        ) from None


def _group_name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


def _open_directory(root: str, elements: list[str]) -> int:
    """A descriptor of a directory below `root`, which itself may be reached by symlinks: the administrator names it."""
    at = root
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for element in elements:
            at = os.path.join(at, element)
            try:
                inner = os.open(element, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
    except OSError as fault:
        raise _explained(fault, at) from None
    return fd


def _explained(fault: OSError, path: str) -> SrpcError:
    sentences = {
        EACCES: "permission denied: announcing needs search permission on the directories, write permission on the last"
        " one for a new endpoint, and read permission on the pipe for one that is there",
        ENOENT: "no such directory: an administrator makes the directories of the tree",
        ENOTDIR: "not a directory (a symlink is none either)",
        ELOOP: "a symlink: the tree has none",
    }
    errno = fault.errno or EINVAL
    return SrpcError(errno, f"{path}: {sentences.get(errno, fault.strerror)}")


def open_line(socket_path: str, line: int) -> int:
    """Connect a line of ours. Returns its descriptor, a Unix stream socket, not blocking, which takes no descriptors.

    socket_path: of the daemon's local socket. line: the id that a listen told.
    Raises UntrustedServer where anything on the way, or who listens, is not root or ourselves: such a one could pass himself
    off as any caller. SrpcError (ENOENT, ECONNREFUSED) where the caller has gone already.
    """
    uid = os.geteuid()
    where = os.path.dirname(socket_path) or "."
    with low_level():
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        passing.refuse_descriptors(connected)
        file = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for element, kind in (("lines", stat.S_IFDIR), (str(uid), stat.S_IFDIR), (str(line), stat.S_IFSOCK)):
                where = os.path.join(where, element)
                inner = os.open(element, _LINK, dir_fd=file)
                os.close(file)
                file = inner
                found = os.fstat(file)
                _check_owner(found.st_uid, where)
                if stat.S_IFMT(found.st_mode) != kind:
                    what = "directory" if kind == stat.S_IFDIR else "socket"
                    raise UntrustedServer(message=f"{where} is no {what}, where the daemon makes one: it is not used")
            connected.connect(f"/proc/self/fd/{file}")  # that very file, whatever is at its path by now
        finally:
            os.close(file)
        _check_owner(struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1], where)
        return connected.detach()
    except SrpcError:
        raise
    except OSError as fault:
        errno = fault.errno or EINVAL
        gone = "its caller has gone" if errno in (ENOENT, ECONNREFUSED) else fault.strerror
        raise SrpcError(errno, f"line {line} can't be connected: {gone}") from None
    finally:
        connected.close()


def _check_owner(uid: int, path: str) -> None:
    if reason := distrust(uid):
        raise UntrustedServer(message=f"{path} {reason}: it is not used")
