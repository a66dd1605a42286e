"""The service manager's part, as systemd plays it: a socket to be told on, sockets that are passed, a store for them."""

import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from tests.realm import labels, processes
from tests.realm.daemon import Daemon

_RECEIVE = """
import fcntl, os, socket, sys
from srpcd import __main__ as daemon
with socket.socket(socket.AF_UNIX) as giver:
    giver.connect(os.environ.pop("SOCKETS"))
    names, fds, _flags, _address = socket.recv_fds(giver, 65536, 64)
above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
for fd in fds:
    os.close(fd)
for number, fd in enumerate(above):
    os.dup2(fd, 3 + number)
    os.close(fd)
if fds:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names.decode().strip("|")}
del giver, fds
sys.exit(daemon.main())
"""


class Manager:
    """Is told things, and passes sockets.

    told: the messages so far, as dictionaries (FDSTORE and the like too). store: what was put into the store, by name, and
    not taken out again. passed: further sockets to pass at each start, with their names. sender: the pid that told last.
    """

    def __init__(self, directory: Path) -> None:
        self.told: list[dict[str, str]] = []
        self._new: list[dict[str, str]] = []
        self.store: list[tuple[str, socket.socket]] = []
        self.passed: list[tuple[str, socket.socket]] = []
        self.sender = 0
        with labels.sockets_of(labels.MANAGER):
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._giver = socket.socket(socket.AF_UNIX)
        self._notify.bind(str(directory / "notify"))
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._giver.bind(str(directory / "sockets"))
        self._giver.listen()
        self.environment = {"NOTIFY_SOCKET": str(directory / "notify"), "SOCKETS": str(directory / "sockets")}

    def give(self) -> None:
        """Pass what there is to the daemon that is being started, as `sd_listen_fds` wants it."""
        both = [*self.passed, *self.store]

        def work() -> None:
            sock, _address = self._giver.accept()
            with sock:
                names = ":".join(name for name, _sock in both)
                socket.send_fds(sock, [f"|{names}|".encode()], [each.fileno() for _name, each in both])

        threading.Thread(target=work, daemon=True).start()

    def hear(self) -> list[dict[str, str]]:
        """What was told and not yet returned by this or `wait`."""
        self._listen()
        new, self._new = self._new, []
        return new

    def wait(self, timeout: float = 10, **fields: str) -> dict[str, str]:
        """The next message with these fields; those before it are passed over. Raises AssertionError after that time."""
        end = time.monotonic() + timeout * processes.PACE
        while True:
            self._listen()
            while self._new:
                message = self._new.pop(0)
                if all(message.get(name) == value for name, value in fields.items()):
                    return message
            assert time.monotonic() < end, f"{fields} was not told within {timeout} s; last: {self.told[-5:]}"
            time.sleep(0.01)

    def _listen(self) -> None:
        while select.select([self._notify], [], [], 0)[0]:
            data, ancillary, _flags, _address = self._notify.recvmsg(65536, 4096)
            message = dict(line.split("=", 1) for line in data.decode().split("\n"))
            fds: list[int] = []
            for _level, kind, content in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    self.sender = struct.unpack("iII", content)[0]
                elif kind == socket.SCM_RIGHTS:
                    fds += memoryview(content).cast("i")
            if message.get("FDSTORE") == "1":
                self.store += [(message["FDNAME"], socket.socket(fileno=fd)) for fd in fds]
            if message.get("FDSTOREREMOVE") == "1":
                for each in [each for each in self.store if each[0] == message["FDNAME"]]:
                    self.store.remove(each)
                    each[1].close()
            self.told.append(message)
            self._new.append(message)

    def close(self) -> None:
        """End."""
        for sock in (self._notify, self._giver, *(each for _name, each in [*self.store, *self.passed])):
            sock.close()


class ManagedDaemon(Daemon):
    """A daemon that a manager runs. watchdog: seconds, 0 for none; other options as of `Daemon`."""

    def __init__(self, manager: Manager, *arguments: Any, watchdog: float = 0, **options: Any) -> None:
        environment = manager.environment | ({"WATCHDOG_USEC": str(int(watchdog * 1e6))} if watchdog else {})
        super().__init__(*arguments, environment=environment, **options)
        self.manager = manager

    def begin(self) -> None:
        """Start it, and do not wait."""
        self.manager.hear()
        self.manager.give()
        super().begin()

    def _start_code(self) -> list[str]:
        return ["-c", _RECEIVE]

    def hang_up(self) -> None:
        """SIGHUP: read the configuration again."""
        os.kill(self.pid, 1)
