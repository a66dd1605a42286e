"""Serve synchronous handlers without asyncio: one loop around epoll, the shortest way from a request to its reply.

def add(request):
    return str(sum(map(int, request.payload.split()))).encode()

blocking.serve({"/calc/add": add}, group="calc")
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from errno import EINVAL, EIO, EOPNOTSUPP, ESHUTDOWN
from select import EPOLLIN, EPOLLOUT, epoll
from typing import TYPE_CHECKING, Any

from srpc_client import address as addresses
from srpc_client import pipes, requests
from srpc_client.address import Address, Local
from srpc_client.blocking.connection import Connection, connect
from srpc_client.callers import Callers
from srpc_client.endpoint import EndpointPipe, open_line, refuse_mode
from srpc_client.errors import CallError, SrpcError
from srpc_client.handling import HIGH_WATER, HandlerCore, Request, begin, refuse_what_is_no_handler
from srpc_client.service_bounds import GRACE, MODE, QUIET, RETRY_FIRST, RETRY_LAST
from srpc_client.text import plain
from srpcd import passing
from srpcd.alarm import Alarm
from srpcd.wire.errors import ProtocolError
from srpcd.wire.messages import ListenReply

if TYPE_CHECKING:
    from srpc_client.handling import Answer, Handler

PATIENCE = 0.001
"""Seconds for which the replies of a batch are gathered before they are written."""

TICK = 0.5
"""Seconds after which the loop looks up although nothing has come."""

_log = logging.getLogger("srpc_client")


def serve(
    handlers: "Mapping[str, Handler]",
    *,
    mode: int = MODE,
    group: str | int | None = None,
    address: str | Address | None = None,
    tree: str | None = None,
    keep: bool = False,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """As `srpc_client.serve`, blocking, for handlers that are plain functions. They run one at a time.

    until: asked about twice a second, and after each batch, whether to end; a KeyboardInterrupt or SystemExit (raised by
    a signal's handler) ends it as well. Either way the calls that are there are finished first.
    Raises as `srpc_client.serve`.
    """
    refuse_what_is_no_handler(handlers)
    refuse_mode(mode)
    where = addresses.parse(address)
    if not isinstance(where, Local):
        raise SrpcError(EOPNOTSUPP, f"{where}: endpoints are announced on the host that has them, over its local socket")
    service = _Service(where, tree)
    try:
        for path, handler in handlers.items():
            service.add(path, handler, mode, group)
        while not until():
            service.turn()
    finally:
        service.close(keep)


class _Listening:
    """Shaped as a pump's slot: what is put into it are the lines of an announcement."""

    done = False

    def __init__(self, endpoint: "_Endpoint") -> None:
        self._endpoint = endpoint

    @property
    def reply(self) -> ListenReply | None:
        return None

    @reply.setter
    def reply(self, reply: ListenReply | None) -> None:
        if reply is not None:
            self._endpoint.service.open(self._endpoint, reply.line)

    @property
    def error(self) -> SrpcError | None:
        return None

    @error.setter
    def error(self, error: SrpcError | None) -> None:
        if error is not None:
            self._endpoint.registered = False
            self._endpoint.service.lapsed = True


class _Endpoint:
    """One path that is served."""

    def __init__(self, service: "_Service", path: str, handler: "Handler", pipe: EndpointPipe, remake: Any) -> None:
        self.service, self.path, self.handler, self.pipe = service, path, handler, pipe
        self.registered = False
        self.fid = 0
        self.callers: Callers[_Line] = Callers(path, _Line.close)
        self._remake = remake
        self._warned: str | None = None

    def register(self, connection: Connection, tree: str) -> None:
        if not self.pipe.there:
            pipe = EndpointPipe(tree, self.path, *self._remake)
            self.pipe.close(remove=False)
            self.pipe = pipe
        self.fid = connection.new_fid()
        reply = connection.request(requests.announce(self.fid, self.path), timeout=10)
        if reply.warning and reply.warning != self._warned:
            _log.warning("%s: %s", self.path, plain(reply.warning))
        self._warned = reply.warning
        self.registered = True
        listen = requests.listen(self.fid)
        connection._pump.core.request(listen.kind, listen.body, _Listening(self))  # type: ignore[arg-type]
        connection._pump.send()


class _Line:
    """One caller's line."""

    def __init__(self, endpoint: _Endpoint, fd: int) -> None:
        self._service, self._handler, self._fd = endpoint.service, endpoint.handler, fd
        self._source = passing.source(fd)
        self._endpoint = endpoint
        self.core = HandlerCore(endpoint.pipe.endpoint)
        self.core.on_caller = lambda caller: endpoint.callers.came(caller, self)
        self._requests: deque[Request] = deque()
        self._unsent: bytes | memoryview = b""
        self._reading = True
        self._watch(EPOLLIN, self._readable)
        endpoint.callers.opened(self)

    def _watch(self, events: int, source: Callable[[int], None]) -> None:
        self._service.epoll.register(self._fd, events)
        self._service.sources[self._fd] = source

    def _readable(self, _events: int) -> None:
        try:
            requests = pipes.receive(self._source, self.core)
        except BlockingIOError:
            return
        except ProtocolError as fault:
            _log.warning("a line is closed, because it does not speak as a worker does: %s", fault.message)
            requests = None
        except OSError:
            requests = None
        if requests is None:
            self.close()
        else:
            self._requests.extend(requests)
            self._work()

    def _work(self) -> None:
        begun = time.monotonic()
        core, waiting, handler = self.core, self._requests, self._handler
        while waiting and not self._unsent:
            request = waiting.popleft()
            try:
                awaitable = begin(handler, request)
            except BaseException:  # a signal's: the call is over, but its caller still waits
                if not request.answered:
                    request.fail(ESHUTDOWN, "the service was ended in the middle of the call")
                if not self._unsent:
                    self._write()
                raise
            if awaitable is not None:
                _refuse(request, awaitable)
            if waiting and (core.waiting > HIGH_WATER or time.monotonic() - begun > PATIENCE):
                self._write()
                begun = time.monotonic()
        if core.waiting and not self._unsent:
            self._write()

    def _write(self) -> None:
        waited = len(self._unsent) > 0
        data = self._unsent or self.core.take()
        try:
            while data:
                written = os.write(self._fd, data)
                if written < len(data):
                    data = memoryview(data)[written:]
                    break
                data = self.core.take() if self.core.waiting else b""
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: the caller's worker is gone
            self.close()
            return
        self._unsent = data
        if bool(data) != waited:  # a caller who does not take his replies is neither read nor served
            self._service.forget(self._fd)
            if waited:
                self._watch(EPOLLIN, self._readable)
            else:
                self._watch(EPOLLOUT, self._writable)

    def _writable(self, _events: int) -> None:
        self._write()
        if not self._unsent:
            self._work()

    def close(self) -> None:
        if self not in self._service.lines:
            return
        self._service.lines.discard(self)
        self._endpoint.callers.gone(self.core.caller, self)
        self._service.forget(self._fd)
        passing.let_go(self._source)
        os.close(self._fd)
        self._requests.clear()
        self._unsent = b""
        self.core.end()


def _refuse(request: Request, awaitable: "Any | Answer") -> None:
    getattr(awaitable, "close", lambda: None)()  # a coroutine that is never awaited says so, at some later time
    _log.error("the handler of %s is asynchronous: serve it with srpc_client.serve", request.caller.endpoint)
    request.fail(EIO, "the handler failed; its log says why")


class _Service:
    """The loop, the connection to the daemon, and what is served."""

    def __init__(self, where: Local, tree: str | None) -> None:
        self.where = where
        self.epoll = epoll()
        self.sources: dict[int, Callable[[int], None]] = {}
        self.lines: set[_Line] = set()
        self._tree = tree
        self._endpoints: list[_Endpoint] = []
        self._connection: Connection | None = None
        self.lapsed = False
        """Whether there may be an endpoint that is not registered any more."""
        self._pause, self._retry = RETRY_FIRST, 0.0
        self._alarm = Alarm()
        self.epoll.register(self._alarm.fd, EPOLLIN)
        self.sources[self._alarm.fd] = self._tick
        self._tick()

    def forget(self, fd: int) -> None:
        if self.sources.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def add(self, path: str, handler: "Handler", mode: int, group: str | int | None) -> None:
        connection, tree = self._connected()
        endpoint = _Endpoint(self, path, handler, EndpointPipe(tree, path, mode, group), (mode, group))
        self._endpoints.append(endpoint)
        endpoint.register(connection, tree)

    def _connected(self) -> tuple[Connection, str]:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.where)
            pump = self._connection._pump
            self.epoll.register(pump.fd, EPOLLIN)
            self.sources[pump.fd] = lambda _events: pump.receive()
            pump.on_over = lambda: self.forget(pump.fd)  # before its descriptor is closed
        tree = self._tree or self._connection.ping(timeout=10).tree
        if tree is None:
            raise CallError(EINVAL, "the daemon does not say where its tree is: give tree=")
        return self._connection, tree

    def open(self, endpoint: _Endpoint, number: int) -> None:
        try:
            fd = open_line(self.where.path, number)
        except SrpcError as fault:
            _log.warning("%s: %s", endpoint.path, fault)
            return
        self.lines.add(_Line(endpoint, fd))

    def _tick(self, _events: int = 0) -> None:
        self._alarm.clear()
        self._alarm.set(time.monotonic() + TICK)

    def turn(self, seconds: float | None = None) -> None:
        """Serve what has come within `seconds`, or within TICK; bring back what the daemon does not know any more."""
        for fd, events in self.epoll.poll(seconds):
            source = self.sources.get(fd)
            if source is not None:  # else an earlier one of this batch has ended it
                source(events)
        if self.lapsed:
            self._bring_back()

    def _bring_back(self) -> None:
        if all(endpoint.registered for endpoint in self._endpoints):
            self.lapsed = False
            self._pause, self._retry = RETRY_FIRST, 0.0
            return
        now = time.monotonic()
        if self._retry == 0.0:
            self._retry = now + self._pause
        elif now >= self._retry:
            self._pause = min(2 * self._pause, RETRY_LAST)
            self._retry = now + self._pause
            self._restore()

    def _restore(self) -> None:
        for endpoint in self._endpoints:
            if endpoint.registered:
                continue
            try:
                endpoint.register(*self._connected())
                _log.info("%s is announced again", endpoint.path)
            except SrpcError as fault:
                _log.info("%s can't be announced again yet: %s", endpoint.path, fault)

    def close(self, keep: bool) -> None:
        """Withdraw, finish what is there, and let go of everything."""
        for endpoint in self._endpoints:
            if endpoint.registered and self._connection is not None and not self._connection.closed:
                try:
                    self._connection.request(requests.clunk(endpoint.fid), timeout=5)
                except SrpcError:
                    pass  # then the end of the connection withdraws it
            endpoint.pipe.close(remove=not keep)
        self._endpoints.clear()
        begun = busy = time.monotonic()
        while self.lines:
            now = time.monotonic()
            if any(line.core.outstanding for line in self.lines):
                busy = now
            if now > begun + GRACE or now > busy + QUIET:
                break
            self.turn(0.01)
        for line in list(self.lines):
            line.close()
        if self._connection is not None:
            self._connection.close()
        self.epoll.close()
        self._alarm.close()
