"""A started program as the monitor sees it: its messages, its standard error, its end."""

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from errno import EBADMSG
from typing import TYPE_CHECKING, NamedTuple

from srpcd import ipc, passing
from srpcd.log import Log
from srpcd.monitor.credentials import Credentials
from srpcd.monitor.forked import collect
from srpcd.monitor.launch import Identity, Spawned
from srpcd.monitor.requests import State, Violation

if TYPE_CHECKING:
    from srpcd.monitor.connections import Connection
    from srpcd.monitor.lines import Endpoint

_PACKETS = 64
"""Messages of one child that are handled before others get their turn."""
_UNREAD_MAX, _UNREAD_SECONDS = 1024, 10.0
"""Messages that may wait for a child: with more, nothing more is heard from it (else it could have the monitor remember
answers without end), and one that has waited for so many seconds ends it, however much it reads meanwhile."""
_STUCK_SECONDS = 5.0
"""Seconds after SIGKILL until others take the place of a process. One that hangs in the kernel never ends."""


class Child:
    """Base of Gate, Worker and PamChild.

    role: as in the launch table. name: who or what it serves, for the log. local: whether it is the local socket's gate.
    swept: whoever waits for its end looks for what it left behind, and takes it off the process table afterwards.
    lasting: it is started by the daemon itself, so its start and end are always in the log. Other children are started and
    ended by what a peer does: their lines count for `log_origin`, the peer or user that they serve.
    gone: its end, with the exit status, None where a tracer holds that back, or where it was killed and hangs in the kernel.
    """

    role = log_origin = ""
    level = "info"
    local = swept = lasting = False

    def __init__(
        self, spawned: Spawned, name: str, log: Log, handle: Callable[["Child", ipc.Message], None], log_origin: str = ""
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pid = spawned.pid
        self.name = name
        self.state = State.NEW
        self.proved: asyncio.Future[bool] = loop.create_future()
        self.gone: asyncio.Future[int | None] = loop.create_future()
        self.started = time.monotonic()
        self.log_origin = log_origin or f"{self.role}:{name}"
        self._spawned = spawned
        self._refuses = passing.refuse_descriptors(spawned.socket)
        spawned.errors.setblocking(False)
        self._killed = False
        self._log = log
        self._handle = handle
        self._unread: deque[tuple[ipc.Message, tuple[int, ...], float]] = deque()  # and since when
        loop.add_reader(spawned.socket, self._requests_ready)
        loop.add_reader(spawned.errors, self._errors_ready)
        loop.add_reader(spawned.pidfd, self._ended)
        self._note("process-start")

    def _note(self, event: str, **fields: int | None) -> None:
        """Log the start or the end."""
        if self.lasting:
            self._log.event(self.level, event, role=self.role, name=self.name, pid=self.pid, **fields)
        else:
            self._log.peer_event(self.log_origin, self.level, event, role=self.role, name=self.name, pid=self.pid, **fields)

    def send(self, message: ipc.Message, fds: tuple[int, ...] = ()) -> None:
        """Send without blocking, and close the descriptors here. A child that does not read for long is killed."""
        if self.state is State.DONE:
            passing.close(*fds)
            return
        self._unread.append((message, fds, time.monotonic()))
        if len(self._unread) == 1:
            self._send_unread()
        elif len(self._unread) > _UNREAD_MAX and time.monotonic() - self._unread[0][2] > _UNREAD_SECONDS:
            self.kill("does not read what it is sent")

    def _send_unread(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unread:
            message, fds, _since = self._unread[0]
            try:
                ipc.send_descriptors(self._spawned.socket, message, fds)
            except BlockingIOError:
                loop.add_writer(self._spawned.socket, self._send_unread)
                return
            except OSError:  # it is about to end, or told to
                self.kill("")
            self._unread.popleft()
            passing.close(*fds)
        if not self.gone.done() and loop.remove_writer(self._spawned.socket):
            loop.add_reader(self._spawned.socket, self._requests_ready)  # it may not have been heard meanwhile

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
            if reason and self.state is not State.DONE:
                self._log.event("warning", "process-kill", role=self.role, name=self.name, pid=self.pid, reason=reason)
            self.state = State.DONE
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._spawned.pidfd, signal.SIGKILL)
            if not self._killed:
                self._killed = True
                asyncio.get_running_loop().call_later(_STUCK_SECONDS, self._stuck)

    def _stuck(self) -> None:
        """Give up a killed process that waits in the kernel, uninterruptibly: what depends on its end goes on."""
        if not self.gone.done():
            text = (
                "it was killed and does not end: it hangs in the kernel, on a file system perhaps (see its stack in /proc)"
            )
            self._log.event("error", "process-stuck", role=self.role, name=self.name, pid=self.pid, text=text)
            self._over(None)

    def _bound_releases(self) -> None:
        if not self._refuses:  # an older kernel: a child that was taken over may send descriptors
            passing.interrupt_releases()

    def _requests_ready(self) -> None:
        self._bound_releases()
        for _ in range(_PACKETS):
            if self.state is State.DONE or len(self._unread) > _UNREAD_MAX:
                asyncio.get_running_loop().remove_reader(self._spawned.socket)
                return
            try:
                message = ipc.receive_request(self._spawned.socket)
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
        self._bound_releases()
        data = b""
        try:
            data = passing.receive(self._spawned.errors, 4096)
        except OSError as fault:  # nothing is there after its end
            if fault.errno == EBADMSG:  # each one can cost a read of TICK_SECONDS, and more would follow
                self.kill("violation: descriptors on standard error")
        if not data:
            asyncio.get_running_loop().remove_reader(self._spawned.errors)
        for line in data.decode(errors="replace").splitlines():
            if line.strip():
                self._log.peer_event(
                    self.log_origin, "warning", "child-output", role=self.role, name=self.name, pid=self.pid, text=line
                )

    def _ended(self) -> None:
        self._requests_ready()  # what it said before it ended counts
        self._errors_ready()
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        status = None if info is None else info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        self._note("process-end", status=status)
        self._over(status)

    def _over(self, status: int | None) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._spawned.pidfd)
        os.close(self._spawned.pidfd)
        loop.remove_writer(self._spawned.socket)
        for sock in (self._spawned.socket, self._spawned.errors):
            loop.remove_reader(sock)
            passing.close(sock.detach())
        for _message, fds, _since in self._unread:
            passing.close(*fds)
        self._unread.clear()
        self.state = State.DONE
        if not self.proved.done():
            self.proved.set_result(False)
        self.gone.set_result(status)
        if not self.swept:
            collect(self.pid)


class Gate(Child):
    """A network process.

    connections: by number. last: the highest number handed out. untaken: those it has not seen yet, and since when
    (monotonic seconds). room: called when it has taken one. drained: set when it has nothing outstanding, or has ended.
    silent: how often it was looked at since the ping that it has not answered; 0: it owes no answer.
    """

    role = "gate"
    lasting = True
    number = 0
    silent = 0
    room: Callable[[], None]

    def begin(self, number: int, local: bool) -> None:
        """Say which gate it is."""
        self.number, self.local = number, local
        self.connections: dict[int, Connection] = {}
        self.last = 0
        self.untaken: dict[int, float] = {}
        self.drained = asyncio.Event()
        self.gone.add_done_callback(lambda _: self.drained.set())


class Worker(Child):
    """The process of one security context. lines: how many it has. waiting: endpoints that it wants lines to.

    wanted: attaches that wait for it. group: the directory of its control group, or empty.
    """

    role = "worker"
    swept = True

    def begin(self, identity: Identity, user: str, group: str) -> None:
        """Say whose it is."""
        self.identity, self.user, self.group = identity, user, group
        self.gates: dict[Gate, int] = {}  # with the number of the pipes between them
        self.connections: set[Connection] = set()
        self.endpoints: set[Endpoint[Worker]] = set()
        self.lines = self.waiting = self.wanted = 0
        self.idle: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.doubted: dict[Endpoint[Worker], None] = {}  # in this order, whether it may still call these


class Session(NamedTuple):
    """One attach. credentials: those of its afid. expires: monotonic seconds."""

    credentials: Credentials
    worker: Worker
    expires: float
