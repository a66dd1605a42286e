#!/usr/bin/python3 -IS
"""Tries what a process of the daemon's must not do; prints an errno for each attempt, 0 where it went through.

`test_mac.py` starts it in each of the daemon's domains, as root with all capabilities: so whatever is refused, it is
SELinux that refuses it. Not a module of the tests: the machine's own interpreter runs it as a program.
"""

import ctypes
import json
import mmap
import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PTRACE_ATTACH = 16

libc = ctypes.CDLL(None, use_errno=True)


def child(work: "Callable[[], object]") -> None:
    """The errno of something that, if it succeeds, is better done by somebody else."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OSError as fault:
            os._exit(fault.errno or 255)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, os.strerror(status))


def connect(family: int, address: "tuple[str, int] | str") -> None:
    """Reach somebody; no attempt to be understood."""
    with socket.socket(family) as sock:
        sock.connect(address)


def attach(pid: int) -> None:
    """Begin to trace a process."""
    if libc.ptrace(ctypes.c_long(PTRACE_ATTACH), ctypes.c_long(pid), None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def tell(path: str, value: str) -> None:
    """Write into a file of the kernel's."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def read(path: str) -> None:
    """Open, and look."""
    with open(path, "rb") as file:
        file.read(1)


ATTEMPTS: "dict[str, Callable[[], object]]" = {
    "key": lambda: read("/var/lib/srpc/key.pem"),
    "shadow": lambda: read("/etc/shadow"),
    "home": lambda: os.listdir("/home/bob"),
    "network": lambda: connect(socket.AF_INET, ("127.0.0.1", 22)),
    "bus": lambda: connect(socket.AF_UNIX, "/run/dbus/system_bus_socket"),
    "shell": lambda: child(lambda: os.execv("/bin/sh", ["sh", "-c", ":"])),
    "command": lambda: child(lambda: os.execv("/usr/bin/true", ["true"])),
    "setuid": lambda: child(lambda: os.setuid(1000)),
    "ptrace": lambda: child(lambda: attach(int(sys.argv[1]))),
    "kill": lambda: os.kill(int(sys.argv[1]), 18),  # SIGCONT: the victim goes on living
    "memory": lambda: mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANON, 7).close(),
    "tree": lambda: child(lambda: os.mkdir("/srv/rpc/attempt")),
    "line": lambda: connect(socket.AF_UNIX, "/run/srpctest/line"),
    "booleans": lambda: tell("/sys/fs/selinux/commit_pending_bools", "0"),  # 0: none
    "context": lambda: child(lambda: tell("/proc/thread-self/attr/current", "unconfined_u:unconfined_r:unconfined_t:s0")),
}


found: "dict[str, int | None]" = {}
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
        found[name] = 0
    except OSError as fault:
        found[name] = fault.errno
print(json.dumps(found))
