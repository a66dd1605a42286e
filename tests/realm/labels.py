"""SELinux labels for what the realm makes, where SELinux is on: inside the machine of `make test-vm`, package installed.

The daemon is then the installed one, in its own domain, and reads and makes files of the types that it has on a real
system. Files of the tests themselves have a type of their own (tests/vm/guest/srpc_test.cil), which says what of the
daemon's may touch them.
"""

import os
from pathlib import Path

ON = os.path.exists("/sys/fs/selinux/enforce")

DAEMON = "system_u:system_r:srpcd_t:s0"
"""The context in which systemd starts the daemon."""

PROGRAM = "/usr/sbin/srpcd"
"""The installed daemon: its label is the way into its domain."""

TESTS = "srpc_test_t"

_NAME = "security.selinux"


def label(path: Path, kind: str) -> None:
    """Give a file or directory a type. What is made in a directory has the directory's, unless the policy says otherwise."""
    if ON:
        os.setxattr(path, _NAME, f"system_u:object_r:{kind}:s0\0".encode())


def copy(source: Path, target: Path) -> None:
    """Give `target` the label of `source`."""
    if ON:
        os.setxattr(target, _NAME, os.getxattr(source, _NAME))
