"""Control groups (cgroups(7), version 2): what one user may take of the machine, and an end for all that a worker started.

    <unit>/monitor           the monitor, and its forks of a moment
          /gates             the gates: memory derived from their budget
          /authentication    PAM children
          /users/u<uid>      one user: memory, tasks and CPU weight as configured
                 u<uid>/w<n> one worker and its programs, which are ended together, whatever sessions they made

The unit's own group is delegated to us (systemd's `Delegate=`). A process can leave its group only by writing to files that
belong to root. Files are opened as they are, never created: SELinux would log that as an attempt to.
"""

import asyncio
import os
from contextlib import suppress
from errno import EBUSY, ENODATA
from itertools import count

from srpcd.config import Config, gates_memory, size
from srpcd.monitor.faults import StartFault

_MOUNT = "/sys/fs/cgroup"
_CONTROLLERS = "+cpu +memory +pids"

_LEAVES = {"monitor": ("monitor", 1000), "gate": ("gates", 1000), "authenticate": ("authentication", 300)}
"""By role: name and CPU weight. All users together have 100, the default: whatever they do, those who serve them run."""


def delegated() -> str:
    """The directory of this process's own group, which systemd has delegated. Raises StartFault where it has not."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        own = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
    path = _MOUNT + own
    try:
        if own and os.getxattr(path, "user.delegate") == b"1":
            return path
        reason = "no control group of version 2"
    except OSError as fault:
        reason = "not delegated" if fault.errno == ENODATA else str(fault.strerror)
    advice = "give the unit `Delegate=cpu memory pids` and `ProtectControlGroups=no`, or set users.cgroups = false"
    raise StartFault(f"control group {path}: {reason}; {advice}")


def join(group: str) -> None:
    """Move the calling process into the group of this directory. Raises OSError."""
    _write(f"{group}/cgroup.procs", "0")


class Groups:
    """All groups below one that was delegated, where no other process is. This process moves into one of them.

    leaves: directories by role in the launch table, and of the monitor. Raises StartFault.
    """

    def __init__(self, unit: str, config: Config) -> None:
        self._users = f"{unit}/users"
        self._config = config
        self._numbers = count(1)
        self.leaves = {role: f"{unit}/{name}" for role, (name, _weight) in _LEAVES.items()}
        try:
            for group in (*self.leaves.values(), self._users):
                os.makedirs(group, exist_ok=True)
            join(self.leaves["monitor"])  # before the next step: a group that has processes can't hand out controllers
            for inner in (unit, self._users):
                _write(f"{inner}/cgroup.subtree_control", _CONTROLLERS)
            for role, (_name, weight) in _LEAVES.items():
                _write(f"{self.leaves[role]}/cpu.weight", str(weight))
            self._limit_gates()
            os.stat(f"{unit}/cgroup.kill")  # Linux 5.14
        except OSError as fault:
            raise StartFault(f"control groups: {fault.filename or unit}: {fault.strerror}") from None

    def worker(self, uid: int) -> str:
        """A new leaf for a worker of this user, and a group with limits where it is his first one. Raises OSError."""
        user = f"{self._users}/u{uid}"
        leaf = f"{user}/w{next(self._numbers)}"
        try:
            if not os.path.isdir(user):
                os.mkdir(user)
                self._limit(user)
            os.mkdir(leaf)
        except OSError:
            with suppress(OSError):  # nobody may find a group without limits; one that has workers can't be removed
                os.rmdir(user)
            raise
        return leaf

    def configure(self, config: Config) -> None:
        """Use other limits for new groups. `limit_all` sets them for those that are here."""
        self._config = config

    def limit_all(self) -> None:
        """Set the limits for everybody. May take its time: whoever has more than that is made to shrink. Raises OSError."""
        self._limit_gates()
        for name in os.listdir(self._users):
            if name[0] == "u":
                with suppress(FileNotFoundError):  # his last worker has just ended
                    self._limit(f"{self._users}/{name}")

    def _limit_gates(self) -> None:
        # A backstop: a gate keeps its budget itself. If it does not, the kernel ends the largest gate and never the monitor.
        self._limit_memory(self.leaves["gate"], gates_memory(self._config.limits))

    @staticmethod
    def _limit_memory(group: str, most: int) -> None:
        _write(f"{group}/memory.max", str(most))
        with suppress(FileNotFoundError):  # a kernel that does not count swap
            _write(f"{group}/memory.swap.max", "0")  # else whoever is over his limit keeps the disk busy for everybody

    def _limit(self, group: str) -> None:
        users = self._config.users
        self._limit_memory(group, size(users.memory))
        _write(f"{group}/pids.max", str(users.tasks))
        _write(f"{group}/cpu.weight", str(users.cpu_weight))
        # memory.oom.group stays 0: the kernel ends the largest process, which is the hog and rarely the worker.

    def end(self, leaf: str) -> None:
        """Kill whatever is left in a worker's leaf, and remove it, and the user's group if it was the last one."""
        with suppress(FileNotFoundError):
            _write(f"{leaf}/cgroup.kill", "1")
        self._remove(leaf)

    def _remove(self, leaf: str, pause: float = 0.005) -> None:
        """Never waits: a process that hangs in the kernel keeps its group for as long as it does."""
        try:
            os.rmdir(leaf)
        except FileNotFoundError:
            pass
        except OSError as fault:
            if fault.errno != EBUSY:
                raise
            asyncio.get_running_loop().call_later(pause, self._remove, leaf, min(pause * 2, 1.0))
            return
        with suppress(OSError):  # he has other workers
            os.rmdir(os.path.dirname(leaf))


def _write(file: str, text: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as fault:
        fault.filename = file
        raise
    finally:
        os.close(fd)
