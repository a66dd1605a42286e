"""Serve endpoints: announce a path, listen for the lines of its callers, answer their requests.

    async def add(request):
        return str(sum(map(int, request.payload.split()))).encode()

    await serve({"/calc/add": add}, group="calc")

or, when the callers are to be told apart:

    async with await announce("/calc/add", group="calc") as announcement:
        async for line in announcement.listen():
            ...                                    # one task for each line; line.caller says who
            async for request in line:
                request.reply(b"3")

An `Announcer` holds one connection to the local daemon for any number of announcements. If the daemon is restarted, they
come back by themselves. Several processes may announce the same path; callers are spread over them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from errno import EINVAL, EOPNOTSUPP
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from srpc_client import address as addresses
from srpc_client import requests
from srpc_client.address import Address, Local
from srpc_client.callers import Callers
from srpc_client.connection import Connection, connect
from srpc_client.endpoint import EndpointPipe, open_line, refuse_mode
from srpc_client.errors import CallError, ConnectionLost, SrpcError
from srpc_client.handling import HandlerCore, refuse_what_is_no_handler
from srpc_client.line import Line
from srpc_client.service_bounds import GRACE, MODE, QUIET, RETRY_FIRST, RETRY_LAST
from srpc_client.text import plain
from srpcd.wire.messages import AnnounceReply, ListenReply, PingReply

if TYPE_CHECKING:
    from srpc_client.handling import Handler

_log = logging.getLogger("srpc_client")


class Announcement:
    """An endpoint that is being served. Made by `announce` and `Announcer.announce`; an async context manager."""

    def __init__(self, announcer: "Announcer", pipe: EndpointPipe, path: str, remake: tuple[int, str | int | None]) -> None:
        self.path = path
        """As announced."""
        self.warning: str | None = None
        """What the daemon had to remark, for the administrator; it is logged too."""
        self.keep = False
        """Leave the pipe in the tree when the announcement is closed."""
        self.registered = False
        """Whether the daemon knows it at the moment."""
        self.handler: Handler | None = None
        self._announcer = announcer
        self._own_announcer = False
        self._pipe = pipe
        self._remake = remake
        self._fid = 0
        self._lines: set[Line] = set()
        self._callers: Callers[Line] = Callers(path, Line._end)
        self._new: asyncio.Queue[Line | None] = asyncio.Queue()
        self._closed = False

    async def listen(self) -> AsyncIterator[Line]:
        """Yield each caller's line, with `line.caller` known; ends when the announcement is closed.

        One line is one worker of the daemon, so one user (and SELinux context). Serve it in a task of its own.
        """
        while not self._closed:
            line = await self._new.get()
            if line is None:
                return
            try:
                await line.ready()
            except ConnectionLost:
                continue
            yield line

    async def close(self) -> None:
        """Withdraw: no further lines, and a pipe that this announcement made is removed.

        A handler may finish the calls that it has, for GRACE seconds at most. Then the lines end.
        """
        if self._closed:
            return
        self._closed = True
        self._announcer._announcements.discard(self)
        connection = self._announcer._connection
        if connection is not None and self.registered and not connection.closed:
            try:
                await connection.request(requests.clunk(self._fid), timeout=5)
            except SrpcError:
                pass  # then the end of the connection withdraws it
        self.registered = False
        self._pipe.close(remove=not self.keep)
        try:
            if self.handler is not None:
                await self._drain()
        finally:
            for line in list(self._lines):
                await line.close()
        self._new.put_nowait(None)
        if self._own_announcer:
            await self._announcer.close()

    async def _drain(self) -> None:
        """Let the handler finish what callers have sent: their workers close the lines when all of it is answered."""
        begun = busy = monotonic()
        while self._lines:
            now = monotonic()
            if any(line.outstanding for line in self._lines):
                busy = now
            if now > begun + GRACE or now > busy + QUIET:
                break
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_how: Any) -> None:
        await self.close()

    # --- what the announcer does with it --------------------------------------------------------------------------

    async def _register(self, connection: Connection, tree: str) -> None:
        if not self._pipe.there:
            pipe = EndpointPipe(tree, self.path, *self._remake)
            self._pipe.close(remove=False)
            self._pipe = pipe
        self._fid = connection.new_fid()
        reply: AnnounceReply = await connection.request(requests.announce(self._fid, self.path))
        if reply.warning and reply.warning != self.warning:
            _log.warning("%s: %s", self.path, plain(reply.warning))
        self.warning = reply.warning
        self.registered = True
        connection.stream(requests.listen(self._fid), _Listener(self, connection))

    def _line(self, number: int) -> None:
        address = self._announcer.address
        try:
            core = HandlerCore(self._pipe.endpoint)
            fd = open_line(address.path, number)
        except SrpcError as fault:
            _log.warning("%s: %s", self.path, fault)
            return
        line = Line(fd, fd, self.handler, core)
        self._lines.add(line)
        core.on_caller = lambda caller: self._callers.came(caller, line)
        line.on_over = self._gone
        self._callers.opened(line)
        if self.handler is None:
            self._new.put_nowait(line)

    def _gone(self, line: Line) -> None:
        self._lines.discard(line)
        self._callers.gone(line._core.caller, line)


class _Listener:
    """Takes the replies to a listen; shaped as a future, for the pump."""

    def __init__(self, announcement: Announcement, connection: Connection) -> None:
        self._announcement = announcement
        self._connection = connection

    def done(self) -> bool:
        return self._announcement._closed

    def set_result(self, reply: ListenReply) -> None:
        self._announcement._line(reply.line)

    def set_exception(self, fault: Exception) -> None:
        self._announcement.registered = False
        if not isinstance(fault, ConnectionLost):
            _log.warning("%s is announced no longer: %s", self._announcement.path, fault)
        self._announcement._announcer._news.set()


class Announcer:
    """Announces any number of endpoints over one connection to the local daemon, again and again if that is restarted.

    address: a local one (None: this host's daemon). tree: the tree's root directory, None to ask the daemon.
    An async context manager that closes all its announcements.
    """

    def __init__(self, address: str | Address | None = None, *, tree: str | None = None) -> None:
        where = addresses.parse(address)
        if not isinstance(where, Local):
            raise SrpcError(EOPNOTSUPP, f"{where}: endpoints are announced on the host that has them, over its local socket")
        self.address = where
        self._tree = tree
        self._connection: Connection | None = None
        self._announcements: set[Announcement] = set()
        self._connecting = asyncio.Lock()
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def announce(
        self,
        path: str,
        *,
        mode: int = MODE,
        group: str | int | None = None,
        handler: "Handler | None" = None,
        keep: bool = False,
    ) -> Announcement:
        """Put an endpoint into the tree, and serve it.

        path: from the tree's root. mode, group: of the pipe, where it is made (an existing one is used untouched).
        handler: answers the requests of all lines; without one, take them from `Announcement.listen`.
        keep: leave the pipe there afterwards (several processes that serve one path want that).
        Raises SrpcError (EACCES: the kernel does not let this process serve there), CallError, Unreachable,
        UntrustedServer; ValueError for a mode beyond 0o777, TypeError for a handler that can't be called.
        """
        refuse_mode(mode)
        if handler is not None:
            refuse_what_is_no_handler({path: handler})
        async with self._connecting:
            connection, tree = await self._connected()
        pipe = EndpointPipe(tree, path, mode, group)
        announcement = Announcement(self, pipe, path, (mode, group))
        announcement.handler = handler
        announcement.keep = keep
        try:
            await announcement._register(connection, tree)
        except BaseException:
            announcement._closed = True
            announcement._pipe.close(remove=True)
            raise
        self._announcements.add(announcement)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        return announcement

    async def _connected(self) -> tuple[Connection, str]:
        """The connection, made if there is none, and the tree's root."""
        if self._closed:
            raise ConnectionLost(message="the announcer is closed")
        if self._connection is None or self._connection.closed:
            self._connection = await connect(self.address)
        tree = self._tree
        if tree is None:
            reply: PingReply = await self._connection.ping(timeout=10)
            tree = reply.tree
            if tree is None:
                raise CallError(EINVAL, "the daemon does not say where its tree is: give tree=")
        return self._connection, tree

    async def _keep(self) -> None:
        """Bring back what the daemon does not know (any more), until closed."""
        pause = RETRY_FIRST
        while True:
            missing = [each for each in self._announcements if not each.registered]
            if not missing:
                pause = RETRY_FIRST
                await self._news.wait()
                self._news.clear()
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST)
            for announcement in missing:
                try:
                    async with self._connecting:
                        connection, tree = await self._connected()
                    if not announcement._closed:
                        await announcement._register(connection, tree)
                        _log.info("%s is announced again", announcement.path)
                except SrpcError as fault:
                    _log.info("%s can't be announced again yet: %s", announcement.path, fault)

    async def close(self) -> None:
        """Withdraw everything."""
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        for announcement in list(self._announcements):
            await announcement.close()
        if self._connection is not None:
            await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_how: Any) -> None:
        await self.close()


async def announce(
    path: str,
    *,
    mode: int = MODE,
    group: str | int | None = None,
    address: str | Address | None = None,
    tree: str | None = None,
    keep: bool = False,
) -> Announcement:
    """Announce one endpoint, over a connection of its own. Arguments and errors as `Announcer` and its `announce`."""
    announcer = Announcer(address, tree=tree)
    try:
        announcement = await announcer.announce(path, mode=mode, group=group, keep=keep)
    except BaseException:
        await announcer.close()
        raise
    announcement._own_announcer = True
    return announcement


async def serve(
    handlers: "Mapping[str, Handler]",
    *,
    mode: int = MODE,
    group: str | int | None = None,
    address: str | Address | None = None,
    tree: str | None = None,
    keep: bool = False,
) -> None:
    """Serve endpoints until the task is cancelled.

    handlers: path to handler. A handler gets a Request and returns the reply, or None for an empty one. Synchronous ones
    are called directly, and must not take long; asynchronous ones run as tasks, and are cancelled when their call is. A
    CallError that a handler raises is its caller's error; any other exception is EIO for the caller, and logged.
    The rest, and the errors, as `Announcer.announce`; ValueError where there is nothing to serve.
    """
    refuse_what_is_no_handler(handlers)
    async with AsyncExitStack() as stack:
        announcer = await stack.enter_async_context(Announcer(address, tree=tree))
        for path, handler in handlers.items():
            await announcer.announce(path, mode=mode, group=group, handler=handler, keep=keep)
        await asyncio.get_running_loop().create_future()  # until cancelled
