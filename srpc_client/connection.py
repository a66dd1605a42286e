"""Connections and sessions for asyncio.

    async with await dial("calc.example:7443", pins=pin, user="alice", password=secret) as connection:
        print(await connection.call("/calc/add", b"1 2"))

A connection runs any number of requests at a time, for any number of users (`login`). It is bound to the loop that it was
made on. Cancelling a task, or the end of a `timeout`, cancels its call up to the handler.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from errno import EINVAL, ETIMEDOUT
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from srpc_client import address as addresses
from srpc_client import procedures, reach, requests, tls
from srpc_client.address import CONNECT_TIMEOUT, Address, Local
from srpc_client.errors import LATE_LOGIN, CallError, CallTimeout, Unreachable
from srpc_client.link import Link
from srpc_client.procedures import Ask, Book, Forget, Identified, Pause, Procedure, SessionState
from srpc_client.pump import Pump, Waiter
from srpc_client.requests import Reply, Send
from srpcd.wire.messages import Mechanism, PingReply, Prompt, StatReply

PromptCallback: TypeAlias = Callable[[Sequence[Prompt]], Sequence[str] | Awaitable[Sequence[str]]]
"""Answers prompts: one text for each prompt whose style is "secret" or "text", in order."""

T = TypeVar("T")


async def connect(
    address: str | Address | None = None,
    *,
    pins: str | Iterable[str] | None = None,
    ca: tls.Authority | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  # the user's word for it
) -> "Connection":
    """Connect, and make sure that the server is who it has to be; nobody is logged in yet.

    address: as `srpc_client.address.parse`. pins: of the server's key; ca: else, who vouches for it; neither on a local
    socket. timeout: seconds, CONNECT_TIMEOUT if None.
    Raises Unreachable, UntrustedServer, PinMismatch; ValueError for arguments that can't be right.
    """
    where = addresses.parse(address)
    if isinstance(where, Local):
        addresses.refuse_proof(where, pins, ca)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT if timeout is None else timeout):
            if isinstance(where, Local):
                return Connection(await reach.local(where), where, "")
            link, pin = await reach.remote(where, None if pins is None else tls.checked_pins(pins), ca)
            return Connection(link, where, pin)
    except TimeoutError:
        raise Unreachable(ETIMEDOUT, f"{where} did not answer in time") from None


async def dial(
    address: str | Address | None = None,
    *,
    pins: str | Iterable[str] | None = None,
    ca: tls.Authority | None = None,
    user: str | None = None,
    password: str | None = None,
    prompt: PromptCallback | None = None,
    mechanism: Mechanism | None = None,
    aname: str = "/",
    timeout: float | None = None,  # noqa: ASYNC109
) -> "Connection":
    """Connect and log in: `connect`, then `Connection.login`, whose session is the connection's default one.

    user: on a local socket your own account if None; over TLS None logs nobody in.
    timeout: seconds for both together; if None, CONNECT_TIMEOUT for the first and none for the second.
    Raises what those raise.
    """
    where = addresses.parse(address)

    async def both() -> Connection:
        connection = await connect(where, pins=pins, ca=ca, timeout=timeout)
        try:
            if user is not None or isinstance(where, Local):
                connection.session = await connection.login(
                    user, password=password, prompt=prompt, mechanism=mechanism, aname=aname
                )
        except BaseException:
            connection.lose()
            raise
        return connection

    return await (both() if timeout is None else _within(timeout, both(), LATE_LOGIN))


async def _within(timeout: float, work: Awaitable[T], late: str = "") -> T:  # noqa: ASYNC109
    try:
        async with asyncio.timeout(timeout) as limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise CallTimeout(message=late) from None
        raise


class Connection:
    """A connection. Made by `dial` and `connect`; an async context manager that closes it."""

    def __init__(self, link: Link, address: Address, pin: str) -> None:
        self.address = address
        self.pin = pin
        """The pin of the server's key; empty on a local socket."""
        self._pump = Pump(link)
        self._book = Book()
        self._session: Session | None = None
        self._loop = asyncio.get_running_loop()

    # --- sessions -------------------------------------------------------------------------------------------------

    async def login(
        self,
        user: str | None = None,
        *,
        password: str | None = None,
        prompt: PromptCallback | None = None,
        mechanism: Mechanism | None = None,
        aname: str = "/",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> "Session":
        """Authenticate a user on this connection and attach to `aname`. Several may be logged in at once.

        user: None is your own account. password: answers the first secret prompt; prompt: all else that is asked.
        mechanism: None is "peer" on a local socket if neither password nor prompt is given, else "pam".
        While the server is busy (EAGAIN) the login is tried again, for half a minute.
        Raises AuthenticationError, CallError, CallTimeout, ConnectionLost, and what `prompt` raises.
        """
        name = addresses.own_name(self.address) if user is None else user
        how = procedures.mechanism_for(mechanism, isinstance(self.address, Local) and password is None and prompt is None)
        who = procedures.Login(name, aname, how, password, prompt is not None)
        work = self._run(procedures.login(self._book, who), None, prompt)
        return Session(self, await (work if timeout is None else _within(timeout, work, LATE_LOGIN)))

    @property
    def session(self) -> "Session":
        """The default session, of whom `dial` logged in. Raises CallError (EINVAL) where there is none."""
        if self._session is None:
            raise CallError(EINVAL, "nobody is logged in on this connection: give dial() a user, or call login()")
        return self._session

    @session.setter
    def session(self, session: "Session") -> None:
        self._session = session

    async def call(
        self,
        path: str,
        payload: bytes,
        metadata: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        """`Session.call` of the default session."""
        return (await self.session._exchange(path, payload, metadata, timeout))[0]

    async def append(self, path: str, text: str, timeout: float | None = None) -> str:  # noqa: ASYNC109
        """`Session.append` of the default session."""
        return await self.session.append(path, text, timeout)

    async def stat(self, path: str = "/", timeout: float | None = None) -> StatReply:  # noqa: ASYNC109
        """`Session.stat` of the default session."""
        return await self.session.stat(path, timeout)

    async def list(self, path: str = "/", timeout: float | None = None) -> list[str]:  # noqa: ASYNC109
        """`Session.list` of the default session."""
        return await self.session.list(path, timeout)

    # --- requests -------------------------------------------------------------------------------------------------

    def new_fid(self) -> int:
        """A fid that nobody uses on this connection."""
        return self._book.new()

    async def request(self, request: Send, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        """Make one request of the protocol (`srpc_client.requests`); returns its reply.

        timeout: seconds. When it is over, or the task is cancelled, the request is cancelled at the server too.
        Raises CallError, CallTimeout, ConnectionLost.
        """
        if timeout is not None:
            return await _within(timeout, self.request(request))
        pump = self._pump
        if pump.crowded:
            await pump.room()
        waiter = self._loop.create_future()
        seq = pump.core.request(request.kind, request.body, waiter)
        pump.submit()
        try:
            return await waiter
        except asyncio.CancelledError:
            refused = waiter.done() and not waiter.cancelled() and waiter.exception() is not None
            outstanding = pump.core.cancel(seq, request.fid)
            # The answer was there already, and nobody took it; or it came between the waiter's cancelling and now, and was
            # dropped: then it may be an error, and the clunk gets one too, which does no harm.
            if not outstanding and not refused and request.fid:
                pump.core.clunk(request.fid)
            pump.submit()
            raise

    def stream(self, request: Send, waiter: Waiter) -> None:
        """Make a request that is answered many times (listen). waiter: `set_result` for each, `set_exception` at the end."""
        self._pump.core.request(request.kind, request.body, waiter)
        self._pump.submit()

    async def ping(self, timeout: float | None = None) -> PingReply:  # noqa: ASYNC109
        """Ask the server whether it is there. Needs no login."""
        reply: PingReply = await self.request(requests.ping(), timeout)
        return reply

    async def _run(
        self,
        procedure: Procedure[T],
        timeout: float | None = None,  # noqa: ASYNC109
        prompt: PromptCallback | None = None,
    ) -> T:
        if timeout is not None:
            return await _within(timeout, self._run(procedure, None, prompt))
        try:
            step = procedure.send(None)
            while True:
                try:
                    result: Any = None
                    if isinstance(step, Send):
                        result = await self.request(step)
                    elif isinstance(step, Forget):
                        self._pump.core.clunk(step.fid)
                        self._pump.submit()
                    elif isinstance(step, Pause):
                        await asyncio.sleep(step.seconds)
                    elif isinstance(step, Ask) and prompt is not None:
                        result = prompt(step.prompts)
                        if inspect.isawaitable(result):
                            result = await result
                except Exception as fault:
                    step = procedure.throw(fault)
                else:
                    step = procedure.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            procedure.close()

    # --- the end --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._pump.over.is_set()

    async def wait_closed(self) -> None:
        """Wait until the connection is over, for whatever reason."""
        await self._pump.over.wait()

    def lose(self) -> None:
        """Close at once. Each outstanding request ends with ConnectionLost."""
        self._pump.say_goodbye()

    async def close(self) -> None:
        """Close. Each outstanding request ends with ConnectionLost; all sessions end."""
        self.lose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Session(Identified):
    """One user's session on a connection. Paths are below its `aname`; a slash in front makes no difference.

    An async context manager that logs out; the connection goes on.
    """

    def __init__(self, connection: Connection, state: SessionState) -> None:
        self.connection = connection
        self._state = state
        self._book = connection._book
        self._pump = connection._pump
        self._loop = connection._loop

    async def call(
        self,
        path: str,
        payload: bytes,
        metadata: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        """Call the endpoint at `path`.

        payload: up to 16 MiB. metadata: up to 64 KiB that the handler gets beside it, JSON by convention.
        timeout: seconds, after which the handler is told to stop.
        Returns the reply's payload. Raises CallError (EACCES: the kernel refused; what the handler said), CallTimeout,
        ConnectionLost.
        """
        return (await self._exchange(path, payload, metadata, timeout))[0]

    async def exchange(
        self,
        path: str,
        payload: bytes,
        metadata: bytes = b"",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Reply:
        """As `call`; returns the reply's payload and metadata."""
        return Reply(*await self._exchange(path, payload, metadata, timeout))

    async def _exchange(
        self,
        path: str,
        payload: bytes,
        metadata: bytes,
        timeout: float | None,  # noqa: ASYNC109
    ) -> tuple[bytes, bytes]:
        if timeout is not None:
            try:
                return await _within(timeout, self._exchange(path, payload, metadata, None))
            except CallTimeout as fault:
                fault.filename = path
                raise
        pump = self._pump
        if pump.crowded:
            await pump.room()
        place = self._book.get(self._state, path)
        refusal: CallError | None = None
        if place is not None:
            waiter = self._loop.create_future()
            seq = 0
            try:
                seq = pump.core.call(place.fid, payload, metadata, waiter)
                pump.submit()
                reply: tuple[bytes, bytes] = await waiter
                return reply
            except asyncio.CancelledError:
                pump.core.cancel(seq)
                pump.submit()
                raise
            except CallError as fault:
                if fault.errno not in procedures.RETRIED:
                    fault.filename = path
                    raise
                refusal = fault

        def request(fid: int) -> Send:
            return requests.call(fid, payload, metadata)

        procedure = procedures.on_path(self._book, self._state, path, request, place=place, refusal=refusal)
        answer: tuple[bytes, bytes] = await self._run(path, procedure)
        return answer

    async def _run(self, path: str, procedure: Procedure[T], timeout: float | None = None) -> T:  # noqa: ASYNC109
        try:
            return await self.connection._run(procedure, timeout)
        except (CallError, CallTimeout) as fault:
            fault.filename = path
            raise

    async def append(self, path: str, text: str, timeout: float | None = None) -> str:  # noqa: ASYNC109
        """Call with text, for a text. Raises as `call`; CallError (EILSEQ) where the reply is not UTF-8."""
        return await self._run(path, procedures.append(self._book, self._state, path, text), timeout)

    async def stat(self, path: str = "/", timeout: float | None = None) -> StatReply:  # noqa: ASYNC109
        """Describe a file or directory; of a directory's names, the first page. Raises as `call`."""
        return await self._run(path, procedures.stat(self._book, self._state, path), timeout)

    async def list(self, path: str = "/", timeout: float | None = None) -> list[str]:  # noqa: ASYNC109
        """All names in a directory, sorted by their bytes. Raises as `call`; CallError (EACCES) if they may not be read."""
        return await self._run(path, procedures.listing(self._book, self._state, path), timeout)

    async def close(self) -> None:
        """Log out: nothing of this session is left on the server."""
        if not self.connection.closed:
            await self.connection._run(procedures.logout(self._book, self._state))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
