"""One connection: pumps its session, runs the session's effects, and keeps its bounds of time and memory.

An event (bytes from the client, an answer from a worker, a message from the monitor) is given to the session, and then
`settle` carries out what the session wants: requests go to their links, which write once, and replies to the client with
one send. A client that does not take its replies is not read from, and past the same bound neither are the workers that
have calls of it. A large message is read only when its memory is reserved (`srpcd.gate.budget`). So nothing here grows
without a bound, and `check` ends connections that make others wait too long.
"""

import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from errno import EACCES, ECANCELED, ECONNRESET, EPERM, ETIMEDOUT
from typing import TYPE_CHECKING, Any

from srpcd import ipc
from srpcd.gate.answers import CALLS, OPERATIONS, give
from srpcd.gate.backlog import Backlog
from srpcd.gate.budget import LOCAL_PEER, Holding
from srpcd.gate.conversation import Conversations
from srpcd.gate.deadlines import Deadlines
from srpcd.gate.routes import Link, Route
from srpcd.gate.tls import DescriptorsSent, Plain, TransportError
from srpcd.session import effects
from srpcd.session.effects import Effect, Forward
from srpcd.session.session import Session
from srpcd.wire.limits import LARGE
from srpcd.wire.messages import Prompt

if TYPE_CHECKING:
    from srpcd.gate.gate import Gate

RESUME_REQUESTS = 1 << 32
"""Requests for another worker are numbered from here: a session numbers its own from 1."""

RESUME_ATTEMPTS, RESUME_PAUSE = 10, 0.02
"""A worker's pipes close before the monitor sees it end, so it may name the dead one: how often, and after how many
seconds (growing), it is asked again."""

LINGER = 2.0
"""Seconds in which a client that broke the protocol may take the error before the connection is ended."""


class Stage(IntEnum):
    """How far a connection is. CLOSING: the last reply is being sent. LINGERING: until the client hangs up."""

    HANDSHAKE = 0
    OPEN = 1
    CLOSING = 2
    LINGERING = 3
    ENDED = 4


class Connection:
    """A client's connection. links: those that it was opened on."""

    def __init__(self, gate: "Gate", number: int, peer: str, transport: Plain, session: Session) -> None:
        self.number = number
        self.peer = peer
        self.session = session
        self.links: set[Link] = set()
        self._gate = gate
        self._loop = gate.loop
        self._limits = gate.limits
        self._transport = transport
        self._fd = transport.sock.fileno()
        self._stage = Stage.HANDSHAKE
        self._reading = self._writing = False
        self._backlog = Backlog()
        self._full = False  # the backlog was over its limit, and is not yet under half of it
        self._held: list[Link] = []
        self._routes: dict[int, Route] = {}
        self._resumes: dict[int, Route] = {}
        self._resume_number = RESUME_REQUESTS
        self._waiting = 0  # bytes that wait for another worker
        self._holding = Holding(gate.budget, gate.share(peer))
        self._kept = 0  # bytes of memory that fids and outstanding requests took at the last check
        self._parked = False  # a large message waits for its memory
        self._conversations: Conversations = Conversations(gate.loop, self._prompted)
        self._since = self._loop.time()
        self._deadlines = Deadlines(gate.limits, self._since, records=transport.records)

    def start(self) -> None:
        """Begin, once the gate knows it."""
        self._guard(self._handshake)

    # --- the client ----------------------------------------------------------------------------------------------------

    def _guard(self, action: Callable[[], object]) -> None:
        """Whatever happens in one connection ends that one and no other."""
        try:
            action()
        except DescriptorsSent:
            self._gate.descriptors_sent(self)
        except TransportError:
            self.end()
        except Exception as fault:
            self.fault(fault)

    def _readable(self) -> None:
        share, loop = self._holding.share, self._loop
        if share.has_turn(loop.now):  # else the next pass tells of it again
            begun = loop.time()
            self._guard(self._read)
            share.spend(loop.time() - begun)

    def _writable(self) -> None:
        self._guard(self._write)

    def _handshake(self) -> None:
        if self._transport.handshake():
            self._stage = Stage.OPEN
            self._deadlines.opened(self._loop.time())
        self.update()

    def _read(self) -> None:
        if self._stage is Stage.OPEN:
            if not self._reading and not self._transport.wants_write:
                return  # stopped between the event and now
            count = 0
            large = self.session.large
            if large:
                if not self._holding.reserved and not self._reserve():
                    return
                with self.session.room() as room:
                    count, data = self._transport.recv_into(room)
                self.session.filled(count)
            else:
                data = self._transport.recv()
            if data or count:
                self._deadlines.active = self._loop.now
                self.session.receive(data or b"")
                if large and large <= count + len(data or b""):
                    self._holding.unreserve()  # it is whole. Where it is still here, it is held by what `update` counts
                self._settle()
            elif data is None:
                if self._reading:  # some of a TLS record has come, which is all that a slow sender gets through in a while
                    self._deadlines.between = self._loop.now
                self.update()
            else:
                self.end()
        elif self._stage is Stage.HANDSHAKE:
            self._handshake()
        elif self._stage is Stage.LINGERING and self._transport.discard():
            self.end()

    def _reserve(self) -> bool:
        """Reserve memory for the large message that has begun, or stop reading until there is some."""
        reserved = self._holding.reserve(self.session.expected, self._reserve_again)
        if reserved is self._parked:
            self._parked = not reserved
            self.update()
        return reserved

    def _reserve_again(self) -> None:
        self._guard(self._reserve)

    def _write(self) -> None:
        if self._stage is Stage.HANDSHAKE:
            self._handshake()
            return
        if self._transport.wants_write:
            self._read()
        self._backlog.push(self._transport.send, self._loop.time())
        self.update()

    def settle(self) -> None:
        """Carry out what the session wants."""
        self._guard(self._settle)

    def _settle(self) -> None:
        session = self.session
        if session.effects:
            wanted = session.effects[:]
            session.effects.clear()
            for effect in wanted:
                if effect.__class__ is Forward:
                    route = self._routes[effect.session]
                    link = route.link
                    if link is None or link.dead or route.waiting:
                        self._wait(route, effect)
                    else:
                        link.send(self, effect)
                else:
                    _EFFECTS[type(effect)](self, effect)
            for link in self.links:
                link.flush()
        if session.out and self._stage < Stage.LINGERING:
            self._deadlines.active = self._loop.now
            if session.bulky:
                session.bulky = False
                now = self._loop.time()
                for chunk in session.out:
                    self._backlog.add(chunk, now)
                session.out.clear()
                self._backlog.push(self._transport.send, now)
                self.update()
                return
            data = b"".join(session.out)
            session.out.clear()
            sent = 0 if self._backlog.size else self._transport.send(data)
            if sent < len(data):
                self._backlog.add(memoryview(data)[sent:], self._loop.time())
            elif self._stage is Stage.OPEN:
                return
            self.update()

    def _count(self) -> None:
        self._holding.hold(self._backlog.held + self._waiting + self._kept + self._transport.held)

    def update(self) -> None:
        """Read and write what the bounds allow now."""
        stage, size, limit = self._stage, self._backlog.size, self._limits.buffer
        if stage is Stage.ENDED:
            return
        self._count()
        if size > LARGE and self._holding.over:
            limit = LARGE
        if stage is Stage.CLOSING and not size:
            self._transport.finish()
            stage = self._stage = Stage.LINGERING
        if self._full and size <= limit // 2:
            self._full = False
            held, self._held = self._held, []
            for link in held:
                link.release(self)
        elif not self._full and size > limit:
            self._full = True
            self._held = list({each.carrier for each in self.session.forwards() if each.carrier is not None})
            for link in self._held:
                link.hold(self)
        owing = self._transport.wants_write and stage <= Stage.OPEN
        if owing:
            reading = False  # it would get no further: TLS has to answer first
        elif stage is Stage.OPEN:
            others = self._gate.channel.congested or any(link.congested for link in self.links)
            reading = not (self._full or self._parked or self._waiting > limit or others)
        else:
            reading = stage is not Stage.CLOSING
        writing = size > 0 or owing
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._fd, self._readable)
            else:
                self._loop.remove_reader(self._fd)
        if writing is not self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)

    def check(self, now: float) -> None:
        """End the connection if one of its times is over."""
        session, stage = self.session, self._stage
        if stage is not Stage.OPEN:
            if now - self._since > (self._limits.handshake_timeout if stage is Stage.HANDSHAKE else LINGER):
                self.end()
            return
        reason = self._deadlines.over(
            now, session, self._backlog, self._transport, reading=self._reading, hurried=self._holding.greedy
        )
        if reason is None:
            self._kept = session.held
            self._count()
            session.tighten(self._holding.over)
        elif reason:
            session.warned(ETIMEDOUT, reason)
            self._close(session.end())
            self.settle()
            self._guard(self.update)
        else:
            self.end()

    # --- the end -------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a shutdown should wait for it."""
        return self.session.busy or self._backlog.size > 0

    def expire(self) -> None:
        """The daemon shuts down: answer what is outstanding, and close."""
        if self._stage is Stage.HANDSHAKE:
            self.end()
            return
        self._close(self.session.expire())
        self.settle()
        self._guard(self.update)

    def fault(self, fault: Exception) -> None:
        """The gate has a bug. Say where, but not with which values: they may be a user's."""
        traceback.print_tb(fault.__traceback__, file=sys.stderr)
        print(f"{type(fault).__name__} on a connection, which is closed", file=sys.stderr, flush=True)
        self.end()

    def end(self) -> None:
        """End the connection now."""
        if self._stage is Stage.ENDED:
            return
        self._stage = Stage.ENDED
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._release(self.session.end())
        self._backlog.clear()
        self._holding.clear()
        self.session.out.clear()
        self._transport.close()
        self._gate.connection_ended(self)

    def _close(self, left: list[Forward]) -> None:
        """End the connection when its last reply has been sent."""
        self._release(left)
        if self._stage is Stage.OPEN:
            self._stage = Stage.CLOSING
            self._since = self._loop.time()

    def _release(self, left: list[Forward]) -> None:
        """Let go of everything that belongs to the session."""
        self._holding.unreserve()
        self._parked = False
        self._kept = self._waiting = 0
        links, self.links = self.links, set()
        for link in links:
            link.forget(self, left)
        self._conversations.clear()
        self._routes.clear()
        self._resumes.clear()
        self._held.clear()

    # --- results from the monitor --------------------------------------------------------------------------------------

    def conversing(self, afid: int, fds: list[int]) -> None:
        """An authentication's child is ready to talk."""
        self._conversations.open(afid, fds)

    def verdict(self, afid: int, errno: int, message: str) -> None:
        """An authentication is over; or, of the afid 0, the connection will be."""
        if not afid:
            self.session.warned(errno, message)
            return
        self._conversations.poll(afid)
        self._conversations.close(afid)
        self.session.verdict(afid, errno, message)

    def attached(self, request: int, session: int, link: Link | None, number: int) -> None:
        """An attach, or a resume, is granted."""
        if link is not None:
            link.join(self._holding, by_uid=self.peer.startswith(LOCAL_PEER))
        resumed = self._resumes.pop(request, None)
        route = resumed or self._routes.setdefault(session, Route(session))
        route.number = number
        if resumed is None:
            if not route.resuming:
                route.link = link
            self.session.attached(request, session)
        elif link is not None and not link.dead:
            route.link = link
            for forward in self._unwait(route):
                link.send(self, forward)
            link.flush()
            if self._full:
                self._held.append(link)
                link.hold(self)
        elif route.attempts < RESUME_ATTEMPTS:
            route.attempts += 1
            self._loop.call_later(RESUME_PAUSE * route.attempts, self._resume, route)
        else:
            for forward in self._unwait(route):
                self.session.failed(forward, ECONNRESET)

    def refused(self, request: int, errno: int, message: str) -> None:
        """An attach, a resume or an announce is not granted."""
        route = self._resumes.pop(request, None)
        if route is None:
            self.session.refused(request, errno, message)
        else:
            for forward in self._unwait(route):
                self.session.failed(forward, errno, message)

    def over(self, session: int) -> None:
        """A session has ended."""
        self.session.over(session)
        route = self._routes.get(session)
        if route is not None and not route.resuming:
            del self._routes[session]

    def _prompted(self, afid: int, prompts: list[Prompt]) -> None:
        self._guard(lambda: self.session.prompted(afid, prompts))
        self.settle()

    # --- results from workers ------------------------------------------------------------------------------------------

    def answered(self, forward: Forward, kind: int, body: bytes) -> None:
        """A worker's answer. `settle` follows. Raises LinkBroken."""
        if kind == ipc.CALLED and forward.kind in CALLS:
            self.session.called(forward, body)
            return
        refusal = give(self.session, forward, kind, body)
        link = forward.carrier
        if refusal in (EACCES, EPERM) and link is not None:
            unreported = link.refusals.report(self._loop.time())
            if unreported is not None:
                path, operation = forward.place.path.decode(), OPERATIONS[forward.kind]
                self._tell(ipc.Refusal(self.number, forward.session, operation, path, refusal, unreported))

    # --- effects -------------------------------------------------------------------------------------------------------

    def _wait(self, route: Route, forward: Forward) -> None:
        """The worker is gone: ask for another one, once, and go on with that."""
        route.waiting.append(forward)
        self._waiting += forward.size
        self.update()
        if not route.resuming:
            route.resuming = True
            self._resume(route)

    def _resume(self, route: Route) -> None:
        if self._stage is Stage.OPEN:
            self._resume_number += 1
            self._resumes[self._resume_number] = route
            self._gate.channel.send(ipc.Resume(self.number, self._resume_number, route.session, route.number))

    def _unwait(self, route: Route) -> list[Forward]:
        """What waits on a route, which waits no more."""
        waiting, route.waiting = route.waiting, []
        self._waiting -= sum(forward.size for forward in waiting)
        route.resuming = False
        route.attempts = 0
        self.update()
        return waiting

    def _authenticate(self, effect: effects.Authenticate) -> None:
        self._conversations.expect(effect.afid)
        self._tell(ipc.Authenticate(self.number, effect.afid, effect.mechanism, effect.uname, effect.aname))

    def _answer(self, effect: effects.Answer) -> None:
        self._conversations.answer(effect.afid, effect.answer)

    def _forget_afid(self, effect: effects.ForgetAfid) -> None:
        self._conversations.close(effect.afid)
        self._tell(ipc.ForgetAfid(self.number, effect.afid))

    def _forget_session(self, effect: effects.ForgetSession) -> None:
        self._routes.pop(effect.session, None)
        self._tell(ipc.Detach(self.number, effect.session))

    def _flush(self, effect: effects.Flush) -> None:
        forward = effect.forward
        if forward.carrier is not None:
            forward.carrier.cancel(forward)
            return
        route = self._routes[forward.session]
        route.waiting.remove(forward)
        self._waiting -= forward.size
        self.session.failed(forward, ECANCELED)

    def _tell(self, message: ipc.Message) -> None:
        self._gate.channel.send(message)


_EFFECTS: dict[type[Effect], Callable[[Connection, Any], None]] = {
    effects.Authenticate: Connection._authenticate,
    effects.Answer: Connection._answer,
    effects.ForgetAfid: Connection._forget_afid,
    effects.Attach: lambda self, e: self._tell(ipc.Attach(self.number, e.request, e.afid, e.uname, e.aname)),
    effects.ForgetSession: Connection._forget_session,
    effects.Announce: lambda self, e: self._tell(ipc.Announce(self.number, e.request, e.path)),
    effects.Withdraw: lambda self, e: self._tell(ipc.Withdraw(self.number, e.announcement)),
    effects.Flush: Connection._flush,
    effects.Close: lambda self, e: self._close(e.left),
}
