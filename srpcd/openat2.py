"""openat2(2) and faccessat2(2), which Python does not have: open a path that can't leave a directory, whatever anybody puts
into it, and ask about what is open. They are on each call's path, so _ctypes gets as little to do as possible."""

import os
from _ctypes import Structure, byref, get_errno
from errno import EAGAIN, EINTR

from srpcd.libc import Int, Long, Unsigned64, UnsignedLong, function

O_PATH: int = os.O_PATH
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
_SYS_OPENAT2, _SYS_FACCESSAT2 = Long(437), Long(439)  # the same on all architectures
_AT_EACCESS, _AT_EMPTY_PATH = 0x200, 0x1000
_TRIES = 64  # EAGAIN: something above was renamed during the look-up (openat2(2)); bounded, so that nobody can hold us


class _How(Structure):
    _fields_ = [("flags", Unsigned64), ("mode", Unsigned64), ("resolve", Unsigned64)]


_syscall = function("syscall", Int)  # of any arguments: what is neither int nor bytes is given with its type
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
_any = _How(0, 0, _RESOLVE)
_pipe = _How(os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE)
_any_reference, _pipe_reference, _how_size = byref(_any), byref(_pipe), UnsignedLong(24)


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Open `path` below `directory`, without symbolic links, mount points or a way out. Returns a descriptor.

    directory: descriptor (O_PATH will do). path: relative; "." for the directory itself. flags: as of open(2);
    O_CLOEXEC and O_NOFOLLOW are added. Raises OSError; ValueError for a NUL in the path.
    """
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("a path can't hold a NUL")
    _any.flags = flags | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(_TRIES):
        fd = _syscall(_SYS_OPENAT2, directory, name, _any_reference, _how_size)
        if fd >= 0:
            return fd
        errno = get_errno()
        if errno not in (EAGAIN, EINTR):
            break
    raise OSError(errno, os.strerror(errno), path)


def open_pipe(directory: int, name: bytes) -> int:
    """Open the named pipe `name` below `directory` for writing, without blocking. Returns a descriptor; -1 where it fails.

    As `open_beneath`, but nothing is tried again or explained. name: without a NUL.
    """
    return _syscall(_SYS_OPENAT2, directory, name, _pipe_reference, _how_size)


def may_execute(fd: int) -> bool:
    """Whether this process may execute what `fd` (O_PATH) holds. False where that can't be told in this way, too."""
    return _syscall(_SYS_FACCESSAT2, fd, b"", os.X_OK, _AT_EMPTY_PATH | _AT_EACCESS) == 0
