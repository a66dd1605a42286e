"""A started program as the monitor sees it: its messages, its standard error, its end."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from srpcd import ipc
from srpcd.log import Log
from srpcd.monitor.launch import Identity, Spawned
from srpcd.monitor.requests import State, Violation

if TYPE_CHECKING:
    from srpcd.monitor.connections import Connection
    from srpcd.monitor.lines import Endpoint

_PACKETS = 64
"""Messages of one child that are handled before others get their turn."""
_LINES_PER_SECOND = 20
"""What one child may write into the log, by its standard error and by what it asks to be logged."""


class Child:
    """Base of Gate, Worker and Authentication. role: as in the launch table. name: who or what it serves, for the log."""

    role = ""
    level = "info"

    def __init__(self, spawned: Spawned, name: str, log: Log, handle: Callable[["Child", ipc.Message], None]) -> None:
        self.pid = spawned.pid
        self.name = name
        self.state = State.NEW
        self.local = False
        self.proved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.started = time.monotonic()
        self._spawned = spawned
        self._log = log
        self._handle = handle
        self._second, self._lines = 0, 0
        loop = asyncio.get_running_loop()
        loop.add_reader(spawned.requests, self._requests_ready)
        loop.add_reader(spawned.errors, self._errors_ready)
        loop.add_reader(spawned.pidfd, self._ended)
        log.event(self.level, "process-start", role=self.role, name=name, pid=self.pid)

    def send(self, message: ipc.Message, fds: tuple[int, ...] = ()) -> None:
        """Send without blocking; a child that does not read is killed."""
        try:
            ipc.send_descriptors(self._spawned.socket, message, fds)
        except BlockingIOError:
            self.kill("does not read what it is sent")
        except OSError:
            self.kill("its socket is closed")

    def serving(self) -> None:
        """It has proved that it is confined."""
        self.state = State.SERVING
        if not self.proved.done():
            self.proved.set_result(True)

    def release(self) -> None:
        """Let it end by itself: end of file is what tells it to."""
        self.state = State.DONE
        with suppress(OSError):
            self._spawned.socket.shutdown(1)

    def kill(self, reason: str) -> None:
        """End it now. reason: for the log; none is needed for a child that ends anyway."""
        if not self.gone.done():
            if reason:
                self._log.event("warning", "process-kill", role=self.role, name=self.name, pid=self.pid, reason=reason)
            self.state = State.DONE
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._spawned.pidfd, signal.SIGKILL)

    def may_log(self) -> bool:
        """Whether another line on its behalf still fits into this second."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._lines = now, 0
        self._lines += 1
        return self._lines <= _LINES_PER_SECOND

    def _requests_ready(self) -> None:
        for _ in range(_PACKETS):
            if self.state is State.DONE:
                asyncio.get_running_loop().remove_reader(self._spawned.requests)
                return
            try:
                message = ipc.read_packet(self._spawned.requests)
                if message is None:
                    self.kill("")
                else:
                    self._handle(self, message)
            except BlockingIOError:
                return
            except (ipc.MessageError, Violation) as fault:
                self.kill(f"violation: {fault}")
            except Exception as fault:  # a fault of ours: whoever can cause it gets nothing by it
                self.kill(f"the monitor failed at its request: {fault!r}")

    def _errors_ready(self) -> None:
        try:
            data = os.read(self._spawned.errors, 4096)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._spawned.errors)
        for line in data.decode(errors="replace").splitlines():
            if line.strip() and self.may_log():
                self._log.event("warning", "child-output", role=self.role, name=self.name, pid=self.pid, text=line)

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        self._requests_ready()  # what it said before it ended counts
        self._errors_ready()
        loop.remove_reader(self._spawned.pidfd)
        loop.remove_reader(self._spawned.requests)
        loop.remove_reader(self._spawned.errors)
        _pid, status = os.waitpid(self.pid, 0)
        self._spawned.socket.close()
        ipc.close_all((self._spawned.requests, self._spawned.errors, self._spawned.pidfd))
        self.state = State.DONE
        code = os.waitstatus_to_exitcode(status)
        self._log.event(self.level, "process-end", role=self.role, name=self.name, pid=self.pid, status=code)
        if not self.proved.done():
            self.proved.set_result(False)
        if not self.gone.done():
            self.gone.set_result(code)


class Gate(Child):
    """A network process. connections: by number; last: the highest handed out; untaken: those it has not seen yet."""

    role = "gate"

    def serve(self, number: int, kind: str, room: Callable[[], None]) -> None:
        """number: of the gate. kind: "tls" or "local". room: called when it has taken a connection."""
        self.number = number
        self.local = kind == "local"
        self.room = room
        self.connections: dict[int, Connection] = {}
        self.last = 0
        self.untaken: set[int] = set()
        self.drained = asyncio.Event()
        self.gone.add_done_callback(lambda _: self.drained.set())


class Worker(Child):
    """The process of one security context. lines: how many it has. probing: endpoints that are being probed for it."""

    role = "worker"

    def serve(self, number: int, identity: Identity, user: str) -> None:
        """Say whose it is."""
        self.number, self.identity, self.user = number, identity, user
        self.gates: set[Gate] = set()
        self.connections: set[Connection] = set()
        self.endpoints: set[Endpoint[Worker]] = set()
        self.lines = self.probing = 0
        self.idle: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()


class Session:
    """Somebody attached. expires: monotonic seconds."""

    def __init__(self, user: str, worker: Worker, expires: float) -> None:
        self.user = user
        self.worker = worker
        self.expires = expires
