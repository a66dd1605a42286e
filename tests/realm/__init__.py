"""A place of one's own for tests, demo and benches: throwaway users, a tmpfs, code that other users can reach.

As root, `enter` lets the program go on in mount, PID, IPC and network namespaces of its own (see `namespaces`). There, and
only there, `/etc` is a copy that has the accounts of `accounts.PEOPLE` and the PAM services of the tests, a tmpfs lies on
`/srv` (tree, sockets, keys, code, temporary files), `/proc` shows this run's processes, and the only network is loopback,
with many addresses (see `network`).
All of it ends with the program; nothing outside changes, and changes outside do not reach it. So several runs do not disturb
each other.

As an ordinary user there is no such place: `enter` then makes a temporary directory for a daemon in personal mode, and
`missing` says what can't be had.

    place = realm.enter()
    with realm.Daemon() as daemon:
        realm.install(daemon.tree / "tools/wc", "#!/bin/sh\\nwc -c\\n", 0o755)
        realm.run_as("alice", ["/bin/ls", "-l", str(daemon.tree)])
"""

from tests.realm.accounts import (
    PEOPLE,
    Account,
    account,
    add,
    add_group,
    change,
    group,
    password,
    remove,
    remove_group,
    share,
)
from tests.realm.acl import grant, strip
from tests.realm.daemon import Daemon, DaemonFault
from tests.realm.network import addresses
from tests.realm.place import PYTHON, Place, enter, install, missing
from tests.realm.processes import PACE, Process, alive, descendants, fds, finish, popen_as, python, run_as, status, until

__all__ = [
    "PACE",
    "PEOPLE",
    "PYTHON",
    "Account",
    "Daemon",
    "DaemonFault",
    "Place",
    "Process",
    "account",
    "add",
    "add_group",
    "addresses",
    "alive",
    "change",
    "descendants",
    "enter",
    "fds",
    "finish",
    "grant",
    "group",
    "install",
    "missing",
    "password",
    "popen_as",
    "python",
    "remove",
    "remove_group",
    "run_as",
    "share",
    "status",
    "strip",
    "until",
]
