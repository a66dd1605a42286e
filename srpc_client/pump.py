"""Moves bytes between a `ClientCore` and a `Link` on an asyncio loop: the socket itself, no streams, no task per call.

What is asked for during one turn of the loop goes out in one send, and all that one read completes is handed out
at once. A lone request is sent straight away.
"""

import asyncio
from typing import Any, Protocol

from srpc_client.core import ClientCore
from srpc_client.errors import ConnectionLost, SrpcError
from srpc_client.link import Link


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
        self._closed = False
        self._room: asyncio.Event | None = None
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
        """Whether callers have to wait in `room`: the server takes no more, and requests queue up behind that."""
        return self.core.busy or (len(self._unsent) > 0 and self.core.to_send)

    async def room(self) -> None:
        """Wait until there is room for another request. Raises ConnectionLost."""
        while self.crowded:
            if self.core.failure is not None:
                raise self.core.lost()
            if self._room is None:
                self._room = asyncio.Event()
            await self._room.wait()

    def _flush(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        waited = len(self._unsent) > 0
        data = self._unsent or self.core.take()
        try:
            while data:
                sent = self._link.send(data)
                if sent < len(data):
                    data = memoryview(data)[sent:]
                    break
                data = self.core.take()
        except ConnectionLost as fault:
            self.lose(fault)
            return
        self._unsent = data
        if bool(data) != waited:
            if waited:
                self._loop.remove_writer(self._link.fd)
            else:
                self._loop.add_writer(self._link.fd, self._flush)
        if waited:
            self._wake()

    def _wake(self) -> None:
        if self._room is not None and not self.crowded:
            self._room.set()
            self._room = None

    def _on_readable(self) -> None:
        try:
            data = self._link.receive()
        except ConnectionLost as fault:
            self.lose(fault)
            return
        if data is None:
            return
        if not data:
            self.lose()
            return
        core = self.core
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
        if self._room is not None:
            self._wake()
        if core.to_send:
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
        if self._room is not None:
            self._room.set()
            self._room = None
        self.over.set()

    def say_goodbye(self) -> None:
        """Send what still waits, as far as that needs no waiting (clunks, mostly), and end the connection."""
        if not self._closed:
            self._flush()
        self.lose(ConnectionLost(message="the connection was closed on this side"))
