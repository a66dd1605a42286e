"""The worker: what it holds, how a call is permitted, and what the monitor tells it.

A call comes from a gate (`srpcd.worker.gates`). The kernel is asked about it here, and it is handed to the handler's line.
"""

import os
from errno import EIO, EISDIR
from select import EPOLLIN, EPOLLOUT

from srpcd import ipc
from srpcd.ipc import Gate, GateOver, Line, LineExpected, LineGone, LineOver, Lines, Live, Message, WorkerSetup
from srpcd.wire.errors import RequestError
from srpcd.wire.limits import MIB
from srpcd.worker.calls import Call, Calls
from srpcd.worker.gates import GateLink, Known
from srpcd.worker.lines import Services
from srpcd.worker.loop import GATES, HANDLERS, Loop
from srpcd.worker.resolve import Tree, fail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from typing import NoReturn

    from srpcd.worker.describe import Describer
    from srpcd.worker.programs import Programs

GATE_OUTPUT_MAX = 4 * MIB
"""Bytes that may wait for one gate to read them before nothing more is read from handlers and gates."""

_TELL_MAX = 4096
"""Messages that may wait for the monitor to read them. It never lets that happen while it works."""

_KNOWN_MAX = 4096
"""Endpoints whose key in the frames of gates is remembered."""

_NOTHING: frozenset[int] = frozenset()


class Worker:
    """One worker: everything together. sock: to the monitor."""

    def __init__(self, setup: WorkerSetup, sock: "Socket") -> None:
        self.loop = Loop()
        self.tree = Tree(setup.tree, self.loop.close_later)
        self.calls = Calls(self.loop, setup.call_timeout / 1000)
        self.services = Services(self.loop, self.tree, self.tell, self.calls.timeout)
        self._setup = setup
        self._programs: Programs | None = None
        self._describer: Describer | None = None
        self.known: dict[bytes, Known] = {}
        self.finishing: list[GateLink] = []  # begin nothing more, and have answers to come
        self.batch = 0
        self._sock = sock
        self._monitor = sock.fileno()
        self._unsent: list[Message] = []
        self._paused = _NOTHING
        sock.setblocking(False)
        self.loop.watch(self._monitor, EPOLLIN, self._monitor_ready)

    @property
    def programs(self) -> "Programs":
        """Made, and loaded, when the first program is called: a worker has to start fast."""
        if self._programs is None:
            from srpcd.worker.programs import Programs  # noqa: PLC0415

            self._programs = Programs(self.loop, self.tree, self._setup)
        return self._programs

    @property
    def describer(self) -> "Describer":
        """Made, and loaded, at the first stat."""
        if self._describer is None:
            from srpcd.worker.describe import Describer  # noqa: PLC0415

            self._describer = Describer(self.loop, self.tree, self.tell)
        return self._describer

    def terminated(self, _number: int, _frame: object) -> None:
        """SIGTERM: the monitor has died (it is the parent death signal). End, and the programs too."""
        self._end()

    def run(self) -> "NoReturn":
        """Serve until the monitor is gone."""
        loop, waiters = self.loop, self.services.waiters
        while True:
            if self.finishing:
                for link in [each for each in self.finishing if not each.calls and not each.writer.size]:
                    link.end()
            loop.turn()
            if loop.armed or self._paused or waiters:
                self._balance()

    def tell(self, message: Message) -> None:
        """Send a message to the monitor, now or when it reads again."""
        if self._unsent:
            if len(self._unsent) >= _TELL_MAX:
                raise ipc.MessageError("the monitor does not read")
            self._unsent.append(message)
            return
        try:
            ipc.write_packet(self._monitor, message)
        except BlockingIOError:
            self._unsent.append(message)
            self.loop.modify(self._monitor, EPOLLIN | EPOLLOUT)

    def know(self, key: bytes, name: bytes) -> Known:
        """Remember an endpoint by its key. name: its path."""
        if len(self.known) >= _KNOWN_MAX:
            self.known.clear()
        known = self.known[key] = Known(name)
        return known

    def check(self, known: Known, call: Call, peer: str) -> None:
        """Have the kernel decide about a call, and hand it over."""
        # What was found before is most likely still there, and there are shorter ways to see that it is, and is permitted.
        # Whatever else they find, the long way is gone after them, which says what it is.
        if known.endpoint is not None:
            if self.tree.may_write(known.name, call.dev, call.ino):
                known.batch = self.batch
                self.services.deliver(known.endpoint, call)
                return
        elif known.line is not None:
            try:
                known.line = self.programs.call(call, peer)
                known.batch = self.batch
                return
            except (OSError, RequestError):
                pass
        known.endpoint = known.line = None
        try:
            fd, _found, kind = self.tree.open_fid(call.path, call.dev, call.ino)
            try:
                if kind == ipc.DIRECTORY:
                    fail(EISDIR)
                if kind == ipc.SERVICE:
                    self.tree.check_write(fd)
                    known.endpoint = self.services.endpoint(call.dev, call.ino)
            finally:
                os.close(fd)
            if known.endpoint is None:
                known.line = self.programs.call(call, peer)
        except OSError as fault:
            call.fail(fault.errno or EIO)
            return
        except RequestError as fault:
            call.fail(fault.errno, fault.message)
            return
        known.batch = self.batch
        if known.endpoint is not None:
            self.services.deliver(known.endpoint, call)

    def _tell_rest(self) -> None:
        while self._unsent:
            try:
                ipc.write_packet(self._monitor, self._unsent[0])
            except BlockingIOError:
                return
            del self._unsent[0]
        self.loop.modify(self._monitor, EPOLLIN)

    def _monitor_ready(self, mask: int) -> None:
        if self._unsent and mask & EPOLLOUT:
            self._tell_rest()
        if not mask & ~EPOLLOUT:
            return
        try:
            received = ipc.receive(self._sock)
        except BlockingIOError:
            return
        except OSError:
            received = None
        if received is None:
            self._end()
        message, fds = received
        if isinstance(message, Gate | GateOver):
            for link in [each for each in self.calls.links if isinstance(each, GateLink) and each.number == message.gate]:
                link.finish()
        if isinstance(message, GateOver):
            return
        if isinstance(message, Gate) and len(fds) == 1:
            self.calls.links.append(GateLink(self, message.gate, fds[0]))
        elif isinstance(message, LineExpected):
            self.services.expect_line(message.line, message.dev, message.ino)
        elif isinstance(message, Line) and len(fds) == 1:
            self.services.add_line(message.line, fds[0])
        elif isinstance(message, Lines):
            self.services.answered(message.dev, message.ino, message.errno)
        elif isinstance(message, LineOver):
            self.services.announcement_over(message.line)
        elif isinstance(message, Live):
            self.describer.live(message.request, message.live)
        elif isinstance(message, Line):  # no room for more descriptors
            self.services.announcement_over(message.line)
            self.tell(LineGone(message.line))
        else:
            raise ipc.MessageError(f"{type(message).__name__} with {len(fds)} descriptors")

    def _balance(self) -> None:
        """Read no more than what others take."""
        paused = _NOTHING
        if any(link.writer.size > GATE_OUTPUT_MAX for link in self.calls.links):
            paused = frozenset((GATES, HANDLERS))
        if paused != self._paused:
            self._paused = paused
            self.loop.pause(paused)

    def _end(self) -> "NoReturn":
        if self._programs is not None:
            self._programs.kill()
        os._exit(0)
