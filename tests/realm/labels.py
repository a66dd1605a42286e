"""SELinux labels for what the realm makes, where SELinux is on: inside the machine of `make test-vm`, package installed.

The daemon is then the installed one, in its own domain, and reads and makes files of the types that it has on a real
system. Files of the tests themselves have a type of their own (tests/vm/guest/srpc_test.cil), which says what of the
daemon's may touch them.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ON = os.path.exists("/sys/fs/selinux/enforce")

DAEMON = "system_u:system_r:srpcd_t:s0"
"""The context in which systemd starts the daemon, and of the sockets that it makes for it."""

MANAGER = "system_u:system_r:init_t:s0"
"""The context of systemd, and of the socket on which it is told things."""

PROGRAM = "/usr/sbin/srpcd"
"""The installed daemon: its label is the way into its domain."""

TESTS = "srpc_test_t"

_NAME = "security.selinux"


def label(path: Path, kind: str) -> None:
    """Give a file or directory a type. What is made in a directory has the directory's, unless the policy says otherwise."""
    if ON:
        os.setxattr(path, _NAME, f"system_u:object_r:{kind}:s0\0".encode())


def copy(source: Path, target: Path) -> None:
    """Give `target` the label of `source`, of the symbolic links themselves where they are links."""
    if ON:
        os.setxattr(target, _NAME, os.getxattr(source, _NAME, follow_symlinks=False), follow_symlinks=False)


@contextlib.contextmanager
def sockets_of(context: str) -> Iterator[None]:
    """Sockets that this thread makes in the block have this context, as if that process had made them."""
    if ON:
        _sockets(context.encode())
    try:
        yield
    finally:
        if ON:
            _sockets(b"\0")


def _sockets(context: bytes) -> None:
    fd = os.open("/proc/thread-self/attr/sockcreate", os.O_WRONLY)  # no O_CREAT: the policy would be asked about that
    try:
        os.write(fd, context)
    finally:
        os.close(fd)
