"""Functions of the C library that Python has no name for.

By `_ctypes`, which is what `ctypes` wraps: the wrapper would take a millisecond of a worker's start, a tenth of the whole.
"""

import os
from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Int(_SimpleCData):  # type: ignore[type-arg]
    """int."""

    _type_ = "i"


class Unsigned(_SimpleCData):  # type: ignore[type-arg]
    """unsigned int."""

    _type_ = "I"


class Long(_SimpleCData):  # type: ignore[type-arg]
    """long."""

    _type_ = "l"


class UnsignedLong(_SimpleCData):  # type: ignore[type-arg]
    """unsigned long, size_t."""

    _type_ = "L"


class Unsigned64(_SimpleCData):  # type: ignore[type-arg]
    """uint64_t."""

    _type_ = "Q"


class String(_SimpleCData):  # type: ignore[type-arg]
    """char *, ended by a NUL."""

    _type_ = "z"


class Pointer(_SimpleCData):  # type: ignore[type-arg]
    """void *."""

    _type_ = "P"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = Int


def function(name: str, result: "type[Any]", *arguments: "type[Any]") -> "Callable[..., int]":
    """The function of this name, with the types of its result and of its arguments. Raises OSError where there is none."""
    found = _Function(dlsym(dlopen(None, 0), name))  # type: ignore[arg-type]  # None: what is loaded
    found.argtypes = arguments
    found.restype = result
    return found


def keep_memory(size: int) -> None:
    """Have malloc keep what was freed for what comes next: blocks of up to `size` bytes, and twice that in all.

    glibc by itself begins with 128 KiB (mallopt(3)): what is free beyond goes back to the kernel at once, and larger blocks
    come from there, each of their pages by a fault. With another C library nothing changes.
    """
    try:
        mallopt = function("mallopt", Int, Int, Int)
    except OSError:
        return
    mallopt(_M_TRIM_THRESHOLD, 2 * size)
    mallopt(_M_MMAP_THRESHOLD, size)


def memory_releaser() -> "Callable[[], object]":
    """A function that gives what was freed back to the kernel, wherever in the heap it lies (malloc_trim(3)).

    With a C library that has no such function it does nothing.
    """
    try:
        trim = function("malloc_trim", Int, UnsignedLong)
    except OSError:
        return lambda: None
    return lambda: trim(0)


def failed(what: str) -> "NoReturn":
    """Raise the OSError of the function that was just called. what: for its message."""
    errno = get_errno()
    raise OSError(errno, f"{what}: {os.strerror(errno)}")
