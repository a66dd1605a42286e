"""The files that a service touches: its endpoint's pipe in the tree, and the pipes of its callers' lines.

Both are found by descriptor, element by element and through no symlink: a service may run with more rights than whoever
can write next to it.
"""

import grp
import os
import stat
from errno import EACCES, EEXIST, EINVAL, ELOOP, ENOENT, ENOTDIR, ENXIO, EPERM

from srpc_client.errors import SrpcError, UntrustedServer
from srpc_client.owner import distrust
from srpcd.wire.errors import WireError
from srpcd.wire.messages import split_aname

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


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


def open_line(socket_path: str, line: int) -> tuple[int, int]:
    """The pipes of a line of ours, both non-blocking: (to read requests from, to write replies to).

    socket_path: of the daemon's local socket. line: the id that a listen told.
    Raises UntrustedServer where anything on the way is not a directory or pipe of root's or our own: whoever can make
    such a thing could pass himself off as any caller. SrpcError (ENXIO, ENOENT) where the caller has gone already.
    """
    uid = os.geteuid()
    where = os.path.dirname(socket_path) or "."
    try:
        directory = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for element in ("lines", str(uid), str(line)):
                where = os.path.join(where, element)
                inner = os.open(element, _DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = inner
                _check_owner(os.fstat(directory), where)
            receive = _open_pipe("recv", directory, _READ, where)
            try:
                return receive, _open_pipe("send", directory, _WRITE, where)
            except BaseException:
                os.close(receive)
                raise
        finally:
            os.close(directory)
    except SrpcError:
        raise
    except OSError as fault:
        if fault.errno in (ENOTDIR, ELOOP):
            raise UntrustedServer(message=f"{where}: a symlink or a file, where the daemon makes a directory") from None
        errno = fault.errno or EINVAL
        gone = "its caller has gone" if errno in (ENOENT, ENXIO) else fault.strerror
        raise SrpcError(errno, f"line {line} can't be opened: {gone}") from None


def _open_pipe(name: str, directory: int, flags: int, where: str) -> int:
    # Looked at before it is opened: opening alone can have effects (a device, a tape).
    _check_pipe(os.stat(name, dir_fd=directory, follow_symlinks=False), f"{where}/{name}")
    fd = os.open(name, flags, dir_fd=directory)
    try:
        _check_pipe(os.fstat(fd), f"{where}/{name}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_pipe(found: os.stat_result, path: str) -> None:
    if not stat.S_ISFIFO(found.st_mode):
        raise UntrustedServer(message=f"{path} is no named pipe: it is not opened")
    _check_owner(found, path)


def _check_owner(found: os.stat_result, path: str) -> None:
    if reason := distrust(found.st_uid):
        raise UntrustedServer(message=f"{path} {reason}: it is not used")
