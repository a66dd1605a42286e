"""The blocking connection: pumps the protocol's core itself."""

import getpass
import time
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EINVAL
from select import POLLIN, POLLOUT, poll
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from srpc_client import address as addresses
from srpc_client import procedures, requests, tls
from srpc_client.address import CONNECT_TIMEOUT, Address, Local
from srpc_client.blocking import reach
from srpc_client.core import BUSY, ClientCore
from srpc_client.errors import CallError, CallTimeout, ConnectionLost, SrpcError
from srpc_client.link import Link
from srpc_client.procedures import Ask, Book, Forget, Pause, Place, Procedure, SessionState
from srpc_client.requests import Reply, Send
from srpcd.wire.messages import Mechanism, PingReply, Prompt, StatReply

PromptCallback: TypeAlias = Callable[[Sequence[Prompt]], Sequence[str]]
"""Answers prompts: one text for each prompt whose style is "secret" or "text", in order."""

HIGH_WATER = 1024 * 1024
"""Bytes that `call_many` lets wait to be sent."""

T = TypeVar("T")


class _Slot:
    """Where one request's answer is put."""

    __slots__ = ("done", "error", "reply")

    def __init__(self) -> None:
        self.done = False
        self.reply: Any = None
        self.error: SrpcError | None = None


def connect(
    address: str | Address | None = None,
    *,
    pins: str | Iterable[str] | None = None,
    ca: tls.Authority | None = None,
    timeout: float | None = None,
) -> "Connection":
    """As `srpc_client.connect`, blocking."""
    where = addresses.parse(address)
    deadline = time.monotonic() + (CONNECT_TIMEOUT if timeout is None else timeout)
    if isinstance(where, Local):
        return Connection(reach.local(where, deadline), where, "")
    link, pin = reach.remote(where, None if pins is None else tls.checked_pins(pins), ca, deadline)
    return Connection(link, where, pin)


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
) -> "Connection":
    """As `srpc_client.dial`, blocking. timeout: seconds for connecting, and again for logging in."""
    connection = connect(address, pins=pins, ca=ca, timeout=timeout)
    try:
        if user is not None or isinstance(connection.address, Local):
            connection.session = connection.login(
                user, password=password, prompt=prompt, mechanism=mechanism, aname=aname, timeout=timeout
            )
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """A connection. Made by `dial` and `connect`; a context manager that closes it."""

    def __init__(self, link: Link, address: Address, pin: str) -> None:
        self.address = address
        self.pin = pin
        """The pin of the server's key; empty on a local socket."""
        self._link = link
        self._core: ClientCore[_Slot] = ClientCore()
        self._book = Book()
        self._session: Session | None = None
        self._unsent: bytes | memoryview = b""
        self._poll = poll()
        self._poll.register(link.fd, POLLIN)
        self._mine = allocate_lock()

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
        name = getpass.getuser() if user is None else user
        if mechanism is None:
            local = isinstance(self.address, Local) and password is None and prompt is None
            mechanism = "peer" if local else "pam"
        who = procedures.Login(name, aname, mechanism, password, prompt is not None)
        return Session(self, self._run(procedures.login(self._book, who), timeout, prompt))

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
        return self._transact(lambda slot: self._core.request(request.kind, request.body, slot), request.fid, deadline)

    def _claim(self) -> None:
        if not self._mine.acquire(False):
            raise RuntimeError("the connection is in use by another thread: each thread needs one of its own")

    def _transact(self, start: Callable[[_Slot], int], fid: int, deadline: float | None) -> Any:
        """Start a request and pump until its answer is there; give it up where that does not happen."""
        self._claim()
        try:
            slot = _Slot()
            self._finish(slot, start(slot), fid, deadline)
        finally:
            self._mine.release()
        if slot.error is not None:
            raise slot.error
        return slot.reply

    def _finish(self, slot: _Slot, seq: int, fid: int, deadline: float | None) -> None:
        try:
            self._pump(slot, deadline)
        except BaseException:  # the time is over, or a KeyboardInterrupt
            if slot.done and slot.error is None and fid:
                self._core.clunk(fid)
            self._core.cancel(seq, fid)
            self._send()
            raise

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
                        self._core.clunk(step.fid)
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
            self._send()

    # --- the pump -------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        waited = len(self._unsent) > 0
        data = self._unsent or self._core.take()
        try:
            while data:
                sent = self._link.send(data)
                if sent < len(data):
                    data = memoryview(data)[sent:]
                    break
                data = self._core.take()
        except ConnectionLost as fault:
            self._lose(fault)
            return
        self._unsent = data
        if bool(data) != waited:
            self._poll.modify(self._link.fd, POLLIN if waited else POLLIN | POLLOUT)

    def _pump(self, slot: _Slot, deadline: float | None) -> None:
        """Send and receive until the slot is filled. Raises CallTimeout."""
        self._send()
        while not slot.done:
            if deadline is None:
                events = self._poll.poll()
            else:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CallTimeout
                events = self._poll.poll(left * 1000 + 1)
            for _fd, event in events:
                if event & ~POLLOUT:
                    self._receive()
                if event & POLLOUT:
                    self._send()

    def _receive(self) -> None:
        try:
            data = self._link.receive()
        except ConnectionLost as fault:
            self._lose(fault)
            return
        if data is None:
            return
        if not data:
            self._lose(None)
            return
        core = self._core
        for slot, reply, error in core.receive(data):
            slot.reply = reply
            slot.error = error
            slot.done = True
        if core.failure is not None:
            self._lose(None)
        elif core.waiting:
            self._send()

    def _lose(self, failure: SrpcError | None) -> None:
        self._unsent = b""
        for slot in self._core.lose(failure):
            slot.error = self._core.lost()
            slot.done = True
        if not self._closed:
            self._closed = True
            self._poll.unregister(self._link.fd)
            self._link.close()

    _closed = False

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._closed

    def close(self) -> None:
        """Close; all sessions end."""
        if not self._closed:
            self._send()
            self._lose(ConnectionLost(message="the connection was closed on this side"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session:
    """One user's session on a connection; as `srpc_client.Session`, blocking."""

    def __init__(self, connection: Connection, state: SessionState) -> None:
        self.connection = connection
        self._state = state
        self._book = connection._book

    @property
    def user(self) -> str:
        """The user's name."""
        return self._state.user

    @property
    def mechanism(self) -> Mechanism:
        """How the user was authenticated."""
        return self._state.mechanism

    @property
    def aname(self) -> str:
        """Where the session's paths begin."""
        return self._state.aname

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
            core, fid = connection._core, place.fid
            try:
                reply: tuple[bytes, bytes] = connection._transact(
                    lambda slot: core.call(fid, payload, metadata, slot), 0, deadline
                )
                return reply
            except CallError as fault:
                if fault.errno not in procedures.RETRIED:
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
        answer: tuple[bytes, bytes] = self.connection._run(procedure, left)
        return answer

    def call_many(self, path: str, payloads: Iterable[bytes], window: int = 64) -> Iterator[bytes]:
        """Call once for each payload, up to `window` at a time; yields the replies in the payloads' order.

        Raises the first error in that order, as `call`; the calls after it are cancelled. Until the iterator is used up
        or closed, nothing else may be called on this connection from inside of the loop but with its own answers.
        """
        connection, core = self.connection, self.connection._core
        flying: deque[tuple[_Slot, int, bytes, Place]] = deque()
        waiting = iter(payloads)
        bound = min(window, BUSY)
        more = True
        try:
            while True:
                size = len(connection._unsent)
                while more and len(flying) < bound and size < HIGH_WATER:
                    payload = next(waiting, None)
                    if payload is None:
                        more = False
                        break
                    size += len(payload)
                    place = self._book.get(self._state, path)
                    if place is None:
                        place = connection._run(procedures.place_of(self._book, self._state, path))
                    slot = _Slot()
                    flying.append((slot, core.call(place.fid, payload, b"", slot), payload, place))
                if not flying:
                    return
                reply = self._first(path, *flying[0])
                flying.popleft()
                yield reply
        finally:
            for _slot, seq, _payload, _place in flying:
                core.cancel(seq)
            connection._send()

    def _first(self, path: str, slot: _Slot, seq: int, payload: bytes, place: Place) -> bytes:
        """The reply that `call_many` has to give next."""
        connection = self.connection
        connection._claim()
        try:
            connection._finish(slot, seq, 0, None)
        finally:
            connection._mine.release()
        if isinstance(slot.error, CallError) and slot.error.errno in procedures.RETRIED:
            return self._slowly(path, payload, b"", None, place, slot.error)[0]
        if slot.error is not None:
            raise slot.error
        return slot.reply[0]  # type: ignore[no-any-return]

    def append(self, path: str, text: str, timeout: float | None = None) -> str:
        """As `srpc_client.Session.append`, blocking."""
        return self.connection._run(procedures.append(self._book, self._state, path, text), timeout)

    def stat(self, path: str = "/", timeout: float | None = None) -> StatReply:
        """As `srpc_client.Session.stat`, blocking."""
        return self.connection._run(procedures.stat(self._book, self._state, path), timeout)

    def list(self, path: str = "/", timeout: float | None = None) -> list[str]:
        """As `srpc_client.Session.list`, blocking."""
        return self.connection._run(procedures.listing(self._book, self._state, path), timeout)

    def close(self) -> None:
        """Log out: nothing of this session is left on the server."""
        if not self.connection.closed:
            self.connection._run(procedures.logout(self._book, self._state))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
