"""The blocking connection: pumps the protocol's core itself."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EINVAL
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from srpc_client import address as addresses
from srpc_client import procedures, requests, tls
from srpc_client.address import CONNECT_TIMEOUT, Address, Local
from srpc_client.blocking import reach
from srpc_client.blocking.pump import HIGH_WATER, Pump, Slot
from srpc_client.core import BUSY
from srpc_client.errors import LATE_LOGIN, CallError, CallTimeout
from srpc_client.link import Link
from srpc_client.procedures import Ask, Book, Forget, Identified, Pause, Place, Procedure, SessionState
from srpc_client.requests import Reply, Send
from srpcd.wire.messages import Mechanism, PingReply, Prompt, StatReply

PromptCallback: TypeAlias = Callable[[Sequence[Prompt]], Sequence[str]]
"""Answers prompts: one text for each prompt whose style is "secret" or "text", in order."""

T = TypeVar("T")


def connect(
    address: str | Address | None = None,
    *,
    pins: str | Iterable[str] | None = None,
    ca: tls.Authority | None = None,
    timeout: float | None = None,
    busy_poll: float = 0.0,
) -> "Connection":
    """As `srpc_client.connect`, blocking. busy_poll: as for `dial`."""
    where = addresses.parse(address)
    deadline = time.monotonic() + (CONNECT_TIMEOUT if timeout is None else timeout)
    if isinstance(where, Local):
        addresses.refuse_proof(where, pins, ca)
        return Connection(reach.local(where, deadline), where, "", busy_poll)
    link, pin = reach.remote(where, None if pins is None else tls.checked_pins(pins), ca, deadline)
    return Connection(link, where, pin, busy_poll)


def dial(
    address: str | Address | None = None,
    *,
    pins: str | Iterable[str] | None = None,
    ca: tls.Authority | None = None,
    user: str | None = None,
    password: str | None = None,
    prompt: PromptCallback | None = None,
    mechanism: Mechanism | None = None,
    aname: str = "/",
    timeout: float | None = None,
    busy_poll: float = 0.0,
) -> "Connection":
    """As `srpc_client.dial`, blocking.

    busy_poll: seconds, some hundred microseconds (2e-4) at most, for which a lone call asks again and again for its answer
    before it sleeps. Where a processor has nothing else to do that spares a wake-up, which in a virtual machine may take
    longer than a hop of the call; it costs the caller that processor's time, and where all are busy it slows everybody down.
    """
    begun = time.monotonic()
    connection = connect(address, pins=pins, ca=ca, timeout=timeout, busy_poll=busy_poll)
    try:
        if user is not None or isinstance(connection.address, Local):
            left = None if timeout is None else begun + timeout - time.monotonic()
            connection.session = connection.login(
                user, password=password, prompt=prompt, mechanism=mechanism, aname=aname, timeout=left
            )
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """A connection. Made by `dial` and `connect`; a context manager that closes it."""

    def __init__(self, link: Link, address: Address, pin: str, busy_poll: float = 0.0) -> None:
        self.address = address
        self.pin = pin
        """The pin of the server's key; empty on a local socket."""
        self._pump = Pump(link, busy_poll)
        self._book = Book()
        self._session: Session | None = None

    # --- sessions -------------------------------------------------------------------------------------------------

    def login(
        self,
        user: str | None = None,
        *,
        password: str | None = None,
        prompt: PromptCallback | None = None,
        mechanism: Mechanism | None = None,
        aname: str = "/",
        timeout: float | None = None,
    ) -> "Session":
        """As `srpc_client.Connection.login`, blocking."""
        name = addresses.own_name(self.address) if user is None else user
        how = procedures.mechanism_for(mechanism, isinstance(self.address, Local) and password is None and prompt is None)
        who = procedures.Login(name, aname, how, password, prompt is not None)
        try:
            return Session(self, self._run(procedures.login(self._book, who), timeout, prompt))
        except CallTimeout:
            raise CallTimeout(message=LATE_LOGIN) from None

    @property
    def session(self) -> "Session":
        """The default session, of whom `dial` logged in. Raises CallError (EINVAL) where there is none."""
        if self._session is None:
            raise CallError(EINVAL, "nobody is logged in on this connection: give dial() a user, or call login()")
        return self._session

    @session.setter
    def session(self, session: "Session") -> None:
        self._session = session

    def call(self, path: str, payload: bytes, metadata: bytes = b"", timeout: float | None = None) -> bytes:
        """`Session.call` of the default session."""
        return self.session._exchange(path, payload, metadata, timeout)[0]

    def append(self, path: str, text: str, timeout: float | None = None) -> str:
        """`Session.append` of the default session."""
        return self.session.append(path, text, timeout)

    def stat(self, path: str = "/", timeout: float | None = None) -> StatReply:
        """`Session.stat` of the default session."""
        return self.session.stat(path, timeout)

    def list(self, path: str = "/", timeout: float | None = None) -> list[str]:
        """`Session.list` of the default session."""
        return self.session.list(path, timeout)

    # --- requests -------------------------------------------------------------------------------------------------

    def new_fid(self) -> int:
        """A fid that nobody uses on this connection."""
        return self._book.new()

    def request(self, request: Send, timeout: float | None = None) -> Any:
        """As `srpc_client.Connection.request`, blocking."""
        return self._request(request, None if timeout is None else time.monotonic() + timeout)

    def ping(self, timeout: float | None = None) -> PingReply:
        """Ask the server whether it is there. Needs no login."""
        reply: PingReply = self.request(requests.ping(), timeout)
        return reply

    def _request(self, request: Send, deadline: float | None) -> Any:
        return self._pump.transact(request.kind, request.body, request.fid, deadline)

    def _run(self, procedure: Procedure[T], timeout: float | None = None, prompt: PromptCallback | None = None) -> T:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            step = procedure.send(None)
            while True:
                try:
                    result: Any = None
                    if isinstance(step, Send):
                        result = self._request(step, deadline)
                    elif isinstance(step, Forget):
                        self._pump.core.clunk(step.fid)
                    elif isinstance(step, Pause):
                        if deadline is not None and time.monotonic() + step.seconds > deadline:
                            raise CallTimeout
                        time.sleep(step.seconds)
                    elif isinstance(step, Ask) and prompt is not None:
                        result = prompt(step.prompts)
                except Exception as fault:
                    step = procedure.throw(fault)
                else:
                    step = procedure.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            procedure.close()
            self._pump.send()

    # --- the end --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._pump.closed

    def close(self) -> None:
        """Close; all sessions end."""
        self._pump.say_goodbye()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session(Identified):
    """One user's session on a connection; as `srpc_client.Session`, blocking."""

    def __init__(self, connection: Connection, state: SessionState) -> None:
        self.connection = connection
        self._state = state
        self._book = connection._book

    def call(self, path: str, payload: bytes, metadata: bytes = b"", timeout: float | None = None) -> bytes:
        """As `srpc_client.Session.call`, blocking."""
        return self._exchange(path, payload, metadata, timeout)[0]

    def exchange(self, path: str, payload: bytes, metadata: bytes = b"", timeout: float | None = None) -> Reply:
        """As `call`; returns the reply's payload and metadata."""
        return Reply(*self._exchange(path, payload, metadata, timeout))

    def _exchange(self, path: str, payload: bytes, metadata: bytes, timeout: float | None) -> tuple[bytes, bytes]:
        connection = self.connection
        deadline = None if timeout is None else time.monotonic() + timeout
        place = self._book.get(self._state, path)
        refusal: CallError | None = None
        if place is not None:
            try:
                return connection._pump.call(place.fid, payload, metadata, deadline)
            except (CallError, CallTimeout) as fault:
                if isinstance(fault, CallTimeout) or fault.errno not in procedures.RETRIED:
                    fault.filename = path
                    raise
                refusal = fault
        left = None if deadline is None else deadline - time.monotonic()
        return self._slowly(path, payload, metadata, left, place, refusal)

    def _slowly(
        self, path: str, payload: bytes, metadata: bytes, left: float | None, place: Any, refusal: Any
    ) -> tuple[bytes, bytes]:
        def request(fid: int) -> Send:
            return requests.call(fid, payload, metadata)

        procedure = procedures.on_path(self._book, self._state, path, request, place=place, refusal=refusal)
        answer: tuple[bytes, bytes] = self._run(path, procedure, left)
        return answer

    def _run(self, path: str, procedure: Procedure[T], timeout: float | None = None) -> T:
        try:
            return self.connection._run(procedure, timeout)
        except (CallError, CallTimeout) as fault:
            fault.filename = path
            raise

    def call_many(self, path: str, payloads: Iterable[bytes], window: int = 64) -> Iterator[bytes]:
        """Call once for each payload, up to `window` at a time; yields the replies in the payloads' order.

        Raises the first error in that order, as `call`; the calls after it are cancelled. ValueError for a window below 1.
        """
        if window < 1:
            raise ValueError(f"window={window}: at least one call has to be in flight")
        pump = self.connection._pump
        flying: deque[tuple[Slot, int, bytes, Place]] = deque()
        waiting = iter(payloads)
        try:
            while True:
                # All that one read has completed is given out before new calls are made: those then go out together.
                while flying and flying[0][0].done:
                    slot, _seq, payload, place = flying.popleft()
                    yield self._taken(path, slot, payload, place)
                for payload in self._as_many_as(waiting, min(window, BUSY) - len(flying)):
                    known = self._book.get(self._state, path)
                    place = known or self._run(path, procedures.place_of(self._book, self._state, path))
                    slot = Slot()
                    try:
                        seq = pump.core.call(place.fid, payload, b"", slot)
                    except CallError as fault:
                        fault.filename = path
                        raise
                    flying.append((slot, seq, payload, place))
                if not flying:
                    return
                pump.claim()
                try:
                    pump.until_done(flying[0][0], None)
                finally:
                    pump.release()
        finally:
            for _slot, seq, _payload, _place in flying:
                pump.core.cancel(seq)
            pump.send()

    def _as_many_as(self, payloads: Iterator[bytes], count: int) -> Iterator[bytes]:
        for payload in islice(payloads, count):
            yield payload
            if self.connection._pump.backlog > HIGH_WATER:
                return

    def _taken(self, path: str, slot: Slot, payload: bytes, place: Place) -> bytes:
        if isinstance(slot.error, CallError) and slot.error.errno in procedures.RETRIED:
            return self._slowly(path, payload, b"", None, place, slot.error)[0]
        if isinstance(slot.error, CallError):
            slot.error.filename = path
        reply: bytes = slot.taken()[0]
        return reply

    def append(self, path: str, text: str, timeout: float | None = None) -> str:
        """As `srpc_client.Session.append`, blocking."""
        return self._run(path, procedures.append(self._book, self._state, path, text), timeout)

    def stat(self, path: str = "/", timeout: float | None = None) -> StatReply:
        """As `srpc_client.Session.stat`, blocking."""
        return self._run(path, procedures.stat(self._book, self._state, path), timeout)

    def list(self, path: str = "/", timeout: float | None = None) -> list[str]:
        """As `srpc_client.Session.list`, blocking."""
        return self._run(path, procedures.listing(self._book, self._state, path), timeout)

    def close(self) -> None:
        """Log out: nothing of this session is left on the server."""
        if not self.connection.closed:
            self.connection._run(procedures.logout(self._book, self._state))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
