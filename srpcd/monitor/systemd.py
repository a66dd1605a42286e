"""The service manager, as systemd has it: what it is told (sd_notify(3)) and the sockets that it passes (sd_listen_fds(3)).

Both are an environment variable and a few bytes, so no library is needed. Where the variables are not set there is no such
manager: nothing is told, and nothing is passed.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from struct import pack

_FIRST = 3
"""The first descriptor that is passed (SD_LISTEN_FDS_START)."""

_PATIENCE = 1.0
"""Seconds that a message may wait for a manager that does not read. It is lost then: the manager's watchdog tells."""


class Manager:
    """What the environment says of the service manager.

    there: whether it wants to be told anything. watchdog: seconds without a word after which it takes us for hung; 0: never.
    passed: sockets with the names that it has for them, of a socket unit and from its store of descriptors.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        own = str(os.getpid())
        address = environment.get("NOTIFY_SOCKET", "")
        self.there = address[:1] in ("/", "@")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self.there else None
        if self._socket:
            self._socket.settimeout(_PATIENCE)
        for_us = environment.get("WATCHDOG_PID", own) == own and self.there
        self.watchdog = int(environment.get("WATCHDOG_USEC", "0")) / 1e6 if for_us else 0.0
        self.passed: list[tuple[str, socket.socket]] = []
        if environment.get("LISTEN_PID") == own:
            number = int(environment.get("LISTEN_FDS", "0"))
            names = environment.get("LISTEN_FDNAMES", "").split(":")
            for at, fd in enumerate(range(_FIRST, _FIRST + number)):
                os.set_inheritable(fd, False)
                sock = socket.socket(fileno=fd)
                sock.setblocking(False)
                self.passed.append((names[at] if at < len(names) else "", sock))

    def ready(self, status: str) -> None:
        """We serve; also after `reloading`. status: one line for `systemctl status`."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """We read the configuration again."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, seconds: float) -> None:
        """We end, within so many seconds."""
        self._tell("STOPPING=1", "STATUS=ending: calls in flight are finished", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """We are well: to be told more often than every `watchdog` seconds."""
        if self.watchdog:
            self._tell("WATCHDOG=1")

    def store(self, name: str, sock: socket.socket) -> None:
        """Keep a socket over a restart. name: without a colon, at most 255 printable ASCII characters."""
        self._tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(sock.fileno(),))

    def forget(self, name: str) -> None:
        """Keep it no longer."""
        self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _tell(self, *lines: str, fds: tuple[int, ...] = ()) -> None:
        if self._socket:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pack(f"{len(fds)}i", *fds))] if fds else []
            with suppress(OSError):
                self._socket.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)
