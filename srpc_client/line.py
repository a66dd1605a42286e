"""One caller's line on an asyncio loop: requests are read from it, and replies are written to it.

A line is either *handled* (each request goes straight to a handler) or *listened to* (`async for request in line`).
A caller who does not take his replies is not served any further until he does, and then he is not read either: what he
can pin down in this process is bounded.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from errno import EAGAIN, ECANCELED
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from srpc_client import pipes
from srpc_client.errors import ConnectionLost
from srpc_client.handling import HIGH_WATER, Caller, HandlerCore, Request, begin, fail_with, finish
from srpcd import passing
from srpcd.wire.errors import ProtocolError
from srpcd.wire.limits import PAYLOAD_MAX

CONCURRENT_MAX = 256
"""Asynchronous handlers that run at a time for one line; further requests wait."""

HELD_MAX = 4 * PAYLOAD_MAX
"""Bytes of payload of these, above which further requests wait too: 256 of the largest would be four gigabytes."""

DEAF_MAX = 5.0
"""Seconds for which a caller is not read because his requests wait and none of his asynchronous handlers ends. That he waits
no longer, or has gone, comes behind the requests: after that he is read on, and what he asks for more is answered EAGAIN."""

PATIENCE = 0.001
"""Seconds for which synchronous handlers may keep the replies of a batch waiting."""

if TYPE_CHECKING:
    from srpc_client.handling import Answer, Handler

_log = logging.getLogger("srpc_client")


class Line:
    """A line. receive, send: its descriptors, not blocking; the line closes them. Of a socket both are the same one.

    handler: None if it is to be listened to: then it is an async iterator of requests. An async context manager.
    """

    def __init__(self, receive: int, send: int, handler: "Handler | None" = None, core: HandlerCore | None = None) -> None:
        self._core = HandlerCore() if core is None else core
        self._core.on_answer = self._submit
        self._receive = receive
        self._send = send
        self._source = passing.source(receive) if receive == send else receive
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._requests: deque[Request] = deque()
        self._size = 0  # bytes of payload in _requests
        self._held = 0  # and of those that asynchronous handlers have
        self._tasks: set[asyncio.Future[Answer]] = set()
        self._deaf: asyncio.TimerHandle | None = None  # not read, for these
        self._refusing = False  # read in spite of that
        self._wakeup: asyncio.Event | None = None  # of those who wait in `ready` and in `__anext__`
        self._unsent: bytes | memoryview = b""
        self._scheduled = False
        self._reading = False
        self._working = False
        self._over = asyncio.Event()
        self.on_over: Callable[[Line], object] | None = None
        """Called when the line has ended."""
        self._read_on()

    @property
    def caller(self) -> Caller:
        """On whose behalf all requests of this line are. Raises ConnectionLost where the line never said it."""
        if self._core.caller is None:
            raise ConnectionLost(message="the line ended before it said who calls")
        return self._core.caller

    async def ready(self) -> None:
        """Wait for the first frame, which says who calls. Raises ConnectionLost if the line ends before it."""
        while self._core.caller is None and not self._over.is_set():
            await self._news()
        _ = self.caller

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Request:
        while not self._over.is_set():
            if self._requests and self._backlog <= HIGH_WATER:
                request = self._requests.popleft()
                self._size -= len(request.payload)
                self._read_on()
                return request
            await self._news()
        raise StopAsyncIteration

    async def _news(self) -> None:
        if self._wakeup is None:
            self._wakeup = asyncio.Event()
        await self._wakeup.wait()

    def _wake(self) -> None:
        if self._wakeup is not None:
            self._wakeup.set()
            self._wakeup = None

    def adopt(self, first: "tuple[Request, Awaitable[Answer]]", rest: list[Request]) -> None:
        """Take over what a synchronous loop had read (`stdio`)."""
        self._start(*first)
        self._take(rest)
        self._submit()

    # --- reading --------------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """Read, or stop reading, as the bounds want it."""
        crowded = self._size > HIGH_WATER and not self._refusing
        wanted = not crowded and self._backlog <= HIGH_WATER and not self._over.is_set()
        if crowded and self._tasks and self._deaf is None and not self._over.is_set():
            self._deaf = self._loop.call_later(DEAF_MAX, self._refuse)
        if wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self._receive, self._on_readable)
        else:
            self._loop.remove_reader(self._receive)

    def _refuse(self) -> None:
        """Hear the caller again, though nothing more of his is taken."""
        self._refusing = True
        self._read_on()

    def _hear(self) -> None:
        """A handler has ended, or nobody is to be heard any more."""
        self._refusing = False
        if self._deaf is not None:
            self._deaf.cancel()
            self._deaf = None

    def _on_readable(self) -> None:
        try:
            requests = pipes.receive(self._source, self._core)
        except BlockingIOError:
            return
        except ProtocolError as fault:
            _log.warning("a line is closed, because it does not speak as a worker does: %s", fault.message)
            self._end()
            return
        except OSError:
            self._end()
            return
        if requests is None:
            self._end()
            return
        self._take(requests)

    def _take(self, requests: list[Request]) -> None:
        if self._refusing:
            for request in requests:
                request.fail(EAGAIN, "earlier calls keep the handler of this caller's calls busy")
            requests = []
        self._requests.extend(requests)
        self._size += sum([len(request.payload) for request in requests])
        if self._handler is not None:
            self._work(self._handler)
        self._wake()
        self._read_on()

    # --- handling -------------------------------------------------------------------------------------------------

    @property
    def _backlog(self) -> int:
        """Bytes of replies that the caller has not taken."""
        return len(self._unsent) + self._core.waiting

    def _work(self, handler: "Handler") -> None:
        """Begin what may be begun. Synchronous answers go out together, unless that would keep the first one waiting."""
        self._working = True
        begun = monotonic()
        while self._requests and len(self._tasks) < CONCURRENT_MAX and self._held <= HELD_MAX:
            if self._backlog > HIGH_WATER:
                self._flush()
                if self._backlog > HIGH_WATER:
                    break
            request = self._requests.popleft()
            self._size -= len(request.payload)
            awaitable = begin(handler, request)
            if awaitable is not None:
                self._start(request, awaitable)
            elif monotonic() - begun > PATIENCE:
                self._flush()
                begun = monotonic()
        self._working = False
        if self._core.waiting:
            self._flush()

    def _start(self, request: Request, awaitable: "Awaitable[Answer]") -> None:
        task = asyncio.ensure_future(awaitable)
        size = len(request.payload)
        self._tasks.add(task)
        self._held += size
        request.on_cancel(task.cancel)
        task.add_done_callback(lambda task: self._ended(request, size, task))

    def _ended(self, request: Request, size: int, task: "asyncio.Future[Answer]") -> None:
        self._tasks.discard(task)
        self._held -= size
        self._hear()
        if task.cancelled():
            if not request.answered:
                request.fail(ECANCELED)
        elif (fault := task.exception()) is None:
            finish(request, task.result())
        else:
            fail_with(request, fault if isinstance(fault, Exception) else RuntimeError(repr(fault)))
        self._go_on()

    def _go_on(self) -> None:
        """There may be room again."""
        if self._handler is None:
            self._wake()
        elif self._requests and not self._working:
            self._work(self._handler)
        self._read_on()

    # --- writing --------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        if not self._scheduled and not self._working and not self._unsent:
            self._scheduled = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._scheduled = False
        self._flush()
        self._go_on()

    def _flush(self) -> None:
        if self._over.is_set():
            return
        waited = len(self._unsent) > 0
        data = self._unsent or self._core.take()
        try:
            while data:
                written = os.write(self._send, data)
                if written < len(data):
                    data = memoryview(data)[written:]
                    break
                data = self._core.take() if self._core.waiting else b""
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: the caller's worker is gone
            self._end()
            return
        self._unsent = data
        if bool(data) != waited:
            if waited:
                self._loop.remove_writer(self._send)
            else:
                self._loop.add_writer(self._send, self._write)

    # --- the end --------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._hear()
        self._read_on()
        self._loop.remove_writer(self._send)
        passing.let_go(self._source)
        for fd in {self._receive, self._send}:
            os.close(fd)
        self._core.end()
        self._requests.clear()
        self._unsent = b""
        self._wake()
        if self.on_over is not None:
            self.on_over(self)

    @property
    def closed(self) -> bool:
        """Whether the line has ended: its caller has gone, or it was closed."""
        return self._over.is_set()

    @property
    def outstanding(self) -> int:
        """Requests that are not answered."""
        return self._core.outstanding

    async def wait_closed(self) -> None:
        """Wait until the line has ended."""
        await self._over.wait()

    async def close(self) -> None:
        """End the line. What was answered is still sent as far as the line takes it; what was not, fails for its caller."""
        self._flush()
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_how: Any) -> None:
        await self.close()
