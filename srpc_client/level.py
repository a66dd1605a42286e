"""The SELinux level of the sockets by which a service connects its lines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ATTRIBUTES = "/proc/thread-self/attr"


@contextmanager
def low_level() -> Iterator[None]:
    """Sockets that this thread makes meanwhile have the low end of the process's level, where that is a range.

    The worker's end of a line has the level of the socket that connected, and a worker may read and write it only if its
    own level dominates that. A caller with the category c1 does not dominate s0-s0:c0.c1023, which a service has that
    was started by an administrator's shell. Nothing is done without SELinux, nor where the policy forbids it.
    """
    try:
        wanted = lowered(_read("current"))
        if wanted:
            _write("sockcreate", wanted)
    except OSError:
        wanted = ""
    try:
        yield
    finally:
        if wanted:
            _write("sockcreate", "\n")  # as the kernel would have it: none


def lowered(context: str) -> str:
    """`context` with the low end of its range; empty where it has no range, or is none of SELinux."""
    parts = context.split(":", 3)  # user, role, type, level, which has colons of its own
    low, dash, _high = parts[-1].partition("-")
    return ":".join((*parts[:3], low)) if len(parts) == 4 and dash else ""


def _read(name: str) -> str:
    fd = os.open(f"{ATTRIBUTES}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).rstrip(b"\0\n").decode(errors="replace")
    finally:
        os.close(fd)


def _write(name: str, value: str) -> None:
    fd = os.open(f"{ATTRIBUTES}/{name}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
