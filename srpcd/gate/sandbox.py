"""The gate's sandbox: what the kernel refuses this process from now on, whatever code has come to run in it.

`enter` is called when everything is loaded and open, and before the first byte of a client. Two layers, none of which can
be taken off again:

- Landlock (landlock(7)): no file, directory or device can be opened, no TCP port bound or connected to, and no process
  outside be signalled or reached by an abstract socket, as far as the kernel's version of it goes.
- seccomp (seccomp(2), by libseccomp): the system calls of `ALLOWED`, with those arguments, and no others. The list is what
  gates made under all tests (strace), and the few that libc and OpenSSL make seldom, or on other machines; those say so.
  Anything else fails with EPERM, because Python and the libraries take that as an answer: a source file that is looked for
  when a fault is reported, say. `DEADLY` ends the process instead (SIGSYS): no way through their code leads there, so
  whoever calls one of these is not us.

What it already has a gate keeps: its connections, its pipes, its memory. Descriptors come by the monitor's socket only.
"""

import ctypes
import os
import struct
import sys
from errno import EACCES, ENOSYS, EOPNOTSUPP, EPERM
from socket import SO_PROTOCOL, SO_TYPE, SOL_SOCKET
from types import ModuleType
from typing import Any, cast

from srpcd.confine import NotConfined, status
from srpcd.passing import SO_PASSRIGHTS

MONITOR = 3
"""The descriptor of the monitor's socket (see `srpcd.gate.__main__`)."""

TIMER_ABSTIME = 1
FIONBIO, FUTEX_WAKE_PRIVATE = 0x5421, 0x81
PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, MREMAP_MAYMOVE = 0b11, 0x22, 1
MADV_DONTNEED = 4

ALLOWED: tuple[tuple[str, dict[int, int]], ...] = (
    ("read", {}),
    ("readv", {}),  # the same, for what is large: straight to where it belongs
    ("write", {}),
    ("epoll_wait", {}),
    ("epoll_pwait", {}),  # the same where there is no epoll_wait (arm64)
    ("epoll_ctl", {}),
    ("timerfd_settime", {1: TIMER_ABSTIME}),  # of the one timer that the loop has, to be woken up in time
    ("recvfrom", {}),
    ("sendto", {4: 0}),  # no address: with one, and MSG_FASTOPEN, it is a connect
    ("recvmsg", {0: MONITOR}),  # no descriptor can be taken from a client; nor given to one: there is no sendmsg
    ("shutdown", {}),
    ("close", {}),
    ("ioctl", {1: FIONBIO}),
    ("getsockname", {}),
    ("getsockopt", {1: SOL_SOCKET, 2: SO_TYPE}),
    ("getsockopt", {1: SOL_SOCKET, 2: SO_PROTOCOL}),
    ("setsockopt", {1: SOL_SOCKET, 2: SO_PASSRIGHTS}),
    ("brk", {}),
    ("mmap", {2: PROT_READ_WRITE, 3: MAP_PRIVATE_ANONYMOUS}),  # nothing executable, no file, no fixed address
    ("mremap", {3: MREMAP_MAYMOVE}),
    ("munmap", {}),
    ("madvise", {2: MADV_DONTNEED}),  # malloc_trim: what is free between two blocks goes back to the kernel
    ("futex", {1: FUTEX_WAKE_PRIVATE}),  # pthread_once wakes those who wait for it, even if nobody does
    ("getrandom", {}),  # OpenSSL, every few minutes
    ("getpid", {}),  # OpenSSL, to see that it was not forked
    ("clock_gettime", {}),  # this and the next two: where the kernel can't tell the time without a system call
    ("gettimeofday", {}),
    ("time", {}),
    ("exit_group", {}),
)
"""System calls, and what arguments (by position) have to be. A name twice: either."""

ITIMER_REAL = 0
INTERRUPTS: tuple[tuple[str, dict[int, int]], ...] = (("setitimer", {0: ITIMER_REAL}), ("rt_sigreturn", {}))
"""Allowed besides where the kernel can't refuse descriptors, for `srpcd.passing.interrupt_releases`."""

DEADLY = (
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_by_handle_at"),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
)
"""System calls that only an attacker makes."""

# Landlock. The numbers are the same on every architecture that Debian has but alpha; what each version knows: landlock(7).
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_CREATE_RULESET_VERSION = 1
_FILES = {1: 13, 2: 14, 3: 15, 5: 16}
_TCP_SINCE, _TCP = 4, 0b11
_SCOPES_SINCE, _SCOPES = 6, 0b11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def enter(interrupts: bool = False) -> int:
    """Enter the sandbox, for good. Returns the version of Landlock's interface that is in force; 0: the kernel has none.

    interrupts: this gate bounds the release of descriptors by signals.

    Raises NotConfined, OSError: whoever calls this must not go on.
    """
    if status()["Threads"] != "1":
        raise NotConfined("there is a second thread, which a sandbox of this one would not hold")
    if _open_something():
        raise NotConfined(f"{__file__} can't be read, so that it is refused later would prove nothing")
    filter_ = _filter(INTERRUPTS if interrupts else ())
    version = _landlock_version()
    if version:
        _restrict(version)
        if _open_something() != EACCES:
            raise NotConfined("Landlock lets files be opened")
    filter_.load()
    if _open_something() != EPERM:
        raise NotConfined("seccomp lets files be opened")
    return version


def _open_something() -> int:
    """0, or the errno with which a file can't be opened that anything but the sandbox lets us open."""
    try:
        os.close(os.open(__file__, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as fault:
        return fault.errno or -1
    return 0


# --- Landlock ----------------------------------------------------------------------------------------------------------


def handled(version: int) -> bytes:
    """The `struct landlock_ruleset_attr` of everything that this version can forbid."""
    files = (1 << max(bits for since, bits in _FILES.items() if since <= version)) - 1
    if version < _TCP_SINCE:
        return struct.pack("=Q", files)
    if version < _SCOPES_SINCE:
        return struct.pack("=QQ", files, _TCP)
    return struct.pack("=QQQ", files, _TCP, _SCOPES)


def _landlock_version() -> int:
    try:
        return _landlock(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as fault:
        if fault.errno in (ENOSYS, EOPNOTSUPP):  # not built in, or not among the modules that the kernel was booted with
            return 0
        raise


def _restrict(version: int) -> None:
    attributes = handled(version)
    ruleset = _landlock(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        _landlock(_RESTRICT_SELF, ruleset, 0)  # without a single rule: nothing of what is handled is permitted
    finally:
        os.close(ruleset)


def _landlock(number: int, *arguments: int | bytes | None) -> int:
    passed = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"Landlock: {os.strerror(errno)}")
    return result


# --- seccomp -----------------------------------------------------------------------------------------------------------


def _filter(more: tuple[tuple[str, dict[int, int]], ...]) -> Any:
    """The filter, ready to be loaded. Raises OSError."""
    # pyseccomp asks for the libraries' names. The real ctypes.util would run ldconfig, or a compiler, to find them out, and
    # brings what starts programs along.
    names: Any = ModuleType("ctypes.util")
    names.find_library = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}.get
    sys.modules["ctypes.util"] = cast(Any, ctypes).util = names
    import pyseccomp  # noqa: PLC0415  names are asked for when it is loaded

    made = pyseccomp.SyscallFilter(pyseccomp.ERRNO(EPERM))
    # A call by another architecture's convention (32 bit, x32) is judged by no rule here.
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    made.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree of the numbers, not a list
    for name, arguments in ALLOWED + more:
        made.add_rule(pyseccomp.ALLOW, name, *(pyseccomp.Arg(at, pyseccomp.EQ, value) for at, value in arguments.items()))
    for name in DEADLY:
        made.add_rule(pyseccomp.KILL_PROCESS, name)
    return made
