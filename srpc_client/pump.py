"""Moves bytes between a `ClientCore` and a `Link` on an asyncio loop: the socket itself, no streams, no task per call.

What is asked for during one turn of the loop goes out in one send, and all that one read completes is handed out
at once. A lone request is sent straight away.
"""

import asyncio
from collections import deque
from typing import Any, Protocol

from srpc_client.core import BUSY, ClientCore
from srpc_client.errors import ConnectionLost, SrpcError
from srpc_client.link import Link

HIGH_WATER = 1024 * 1024
"""Bytes that may wait to be sent; above that callers wait in `room`."""

TURNS = 64
"""Callers that leave `room` at once: each of them may bring as much as would fill it again."""


class Waiter(Protocol):
    """A future, or what looks like one."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Any, /) -> None: ...


class Pump:
    """One connection's pump. core: to be asked directly; call `submit` afterwards."""

    def __init__(self, link: Link) -> None:
        self.core: ClientCore[Waiter] = ClientCore()
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._unsent: bytes | memoryview = b""
        self._scheduled = False
        self._writing = False  # the loop tells when the descriptor can be written to
        self._closed = False
        self._waiting: deque[asyncio.Future[None]] = deque()  # in `room`, first come first served
        self.over = asyncio.Event()
        """Set when the connection has ended, for whatever reason."""
        self._loop.add_reader(link.fd, self._on_readable)

    def submit(self) -> None:
        """Something is waiting in the core to be sent."""
        if self._scheduled or self._unsent:
            return
        self._scheduled = True
        if self.core.outstanding == 1:
            self._flush()
        else:
            self._loop.call_soon(self._flush)

    @property
    def crowded(self) -> bool:
        """Whether callers have to wait in `room`: the server takes no more, or others wait already."""
        return self._full or len(self._waiting) > 0

    @property
    def _full(self) -> bool:
        return self.core.busy or len(self._unsent) + self.core.waiting > HIGH_WATER

    async def room(self) -> None:
        """Wait until there is room for another request, or the connection is over."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
            while self._full and not self._closed:  # those before it have filled it again
                turn = self._loop.create_future()
                self._waiting.appendleft(turn)
                await turn
        except asyncio.CancelledError:
            self._wake()  # its turn may have been another's
            raise

    def _flush(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        waited = len(self._unsent) > 0
        data = self._unsent or self.core.take()
        try:
            if not data and self._link.owes:
                self._link.flush()
            while data:
                sent = self._link.send(data)
                if sent < len(data):
                    data = memoryview(data)[sent:]
                    break
                data = self.core.take() if self.core.waiting else b""
        except ConnectionLost as fault:
            self.lose(fault)
            return
        self._unsent = data
        self._watch()
        if waited:
            self._wake()

    def _watch(self) -> None:
        """Wait until the descriptor can be written to, if there is something to write."""
        writing = len(self._unsent) > 0 or self._link.owes
        if writing is not self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._link.fd, self._flush)
            else:
                self._loop.remove_writer(self._link.fd)

    def _wake(self) -> None:
        # As many as there is room for, and not all of them: thousands may wait, and each answer makes room for one.
        room = 0 if self._full else min(BUSY - self.core.outstanding, TURNS)
        while self._waiting and room > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

    def _on_readable(self) -> None:
        core, count = self.core, 0
        try:
            if core.large:
                with core.room() as room:
                    count, data = self._link.receive_into(room)
                core.filled(count)
            else:
                data = self._link.receive()
        except ConnectionLost as fault:
            self.lose(fault)
            return
        if self._link.owes:
            self._watch()
        if data is None:
            return
        if not data and not count:
            self.lose()
            return
        for waiter, reply, error in core.receive(data):
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(reply)
            else:
                waiter.set_exception(error)
        if core.failure is not None:
            self.lose()
            return
        if self._waiting:
            self._wake()
        if core.waiting:
            self.submit()

    def lose(self, failure: SrpcError | None = None) -> None:
        """End the connection; each outstanding request gets its one error."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._link.fd)
        self._loop.remove_writer(self._link.fd)
        self._link.close()
        for waiter in self.core.lose(failure):
            if not waiter.done():
                waiter.set_exception(self.core.lost())
        self._unsent = b""
        while self._waiting:  # all of them: their requests will fail by themselves
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        self.over.set()

    def say_goodbye(self) -> None:
        """Send what still waits, as far as that needs no waiting (clunks, mostly), and end the connection."""
        if not self._closed:
            self._flush()
        self.lose(ConnectionLost(message="the connection was closed on this side"))
