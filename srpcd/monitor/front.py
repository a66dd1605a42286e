"""One kind of gate, "tls" or "local", kept running: its sockets, the gate that takes new connections, and older ones.

A gate that dies is started again, and one that does not do its work is killed. When a configuration is read again, a new
gate takes the new connections, and the old one serves those that it has until they are over.
"""

import asyncio
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from itertools import count
from typing import NamedTuple

from srpcd import ipc, passing
from srpcd.config import Config, Limits, encode, within
from srpcd.monitor import launch
from srpcd.monitor.admission import Admission
from srpcd.monitor.children import Gate
from srpcd.monitor.connections import Connection, Peer, accept
from srpcd.monitor.launch import Identity
from srpcd.monitor.monitor import START_SECONDS, Monitor
from srpcd.monitor.requests import State

_UNTAKEN = 64
"""Connections that a gate has not yet taken; more wait in the listening socket."""
_SILENT = 10
"""Looks at a gate in which it does not answer a ping. Looks and not seconds: a machine that was asleep is nobody's fault."""
_OLD = 4
"""Gates that serve what is left of their connections; at one more the oldest has to end them."""
_START = 60.0
"""Seconds that a new gate may take until it serves: it loads OpenSSL, on a machine that may be busy with nothing else."""
_FIRST_PAUSE, _LONGEST_PAUSE, _GOOD_LIFE = 0.1, 1.0, 10.0
"""Seconds between the death of a gate and the next try, doubled each time unless it lived for `_GOOD_LIFE`."""

_LAST_WORDS = 1.0
"""Seconds in which a client can take the reason why its connection is closed."""

_numbers = count(1)


class Terms(NamedTuple):
    """What a gate is started with. files: descriptors of key and certificate, for "tls". pin: of that key, else empty.

    state: of these files when they were opened: a file that has another state has another content.
    """

    config: Config
    files: tuple[int, ...] = ()
    pin: str = ""
    state: tuple[tuple[int, ...], ...] = ()

    def same(self, other: "Terms") -> bool:
        """Whether a gate would be no different."""
        return (self.config.limits, self.state) == (other.config.limits, other.state)


class Front:
    """One kind of gate. identity: who it runs as.

    gate: the one that takes new connections; None between a death and the next start. changed: called when it is another.
    """

    def __init__(
        self, monitor: Monitor, kind: str, identity: Identity, listeners: list[socket.socket], terms: Terms
    ) -> None:
        self.kind = kind
        self.listeners = listeners
        self.terms = terms
        self.gate: Gate | None = None
        self.changed: Callable[[], None] = lambda: None
        self._monitor = monitor
        self._identity = identity
        self._admission: Admission[Connection] = Admission(self._limits(), self._make_room, secrets.choice)
        self._gates: dict[Gate, float] = {}  # all that run, by age; and until when old ones may serve (monotonic seconds)
        self._lost: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._closed = False

    # --- gates ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep one gate serving, for ever."""
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            status = reason = None
            try:
                status = await self._serve()
                pause = _FIRST_PAUSE if time.monotonic() - started > _GOOD_LIFE else min(pause * 2, _LONGEST_PAUSE)
            except OSError as fault:
                reason, pause = str(fault), _LONGEST_PAUSE
            self._monitor.log.event(
                "error", "gate-restart", gate=self.kind, status=status, reason=reason, wait=f"{pause:g}s"
            )
            await asyncio.sleep(pause)

    async def _serve(self) -> int | None:
        """Start a gate, and wait until it or its successor has ended. Returns that one's status. Raises OSError."""
        if self.gate is None:  # else a new configuration has brought one while we paused
            gate = self.start(self.terms)
            if not await asyncio.shield(gate.proved):
                return await asyncio.shield(gate.gone)
            self._proved(gate)
        return await asyncio.shield(self._lost)

    def _proved(self, gate: Gate) -> None:
        if self.gate is None:
            self.adopt(gate, self.terms)
        else:  # a new configuration was faster
            gate.kill("")

    def start(self, terms: Terms) -> Gate:
        """Start a gate, which does not yet get connections. Raises OSError."""
        # Opened anew for each: one that was taken over could move the offset that it shares with its successor.
        files = tuple(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in terms.files)
        monitor = self._monitor
        try:
            gate: Gate = monitor.start(Gate, self.kind, monitor.drop(self._identity, launch.GATE_LIMITS), self.kind)
        except OSError:
            ipc.close_all(files)
            raise
        gate.begin(next(_numbers), self.kind == "local")
        gate.room = self.accept_again
        gate.gone.add_done_callback(lambda _: self._ended(gate))
        self._gates[gate] = float("inf")
        setup = ipc.GateSetup(*self._identity, monitor.personal, os.getpid(), self.kind, encode(terms.config))
        gate.send(setup, files)
        return gate

    def adopt(self, gate: Gate, terms: Terms) -> None:
        """Let a gate that has proved its confinement take the new connections."""
        old, self.gate = self.gate, gate
        if old is not None:
            self._gates[old] = time.monotonic() + self.terms.config.authentication.session_age
            for each in [each for each, until in self._gates.items() if until < float("inf")][:-_OLD]:
                self._gates[each] = 0.0
        if self._lost.done():
            self._lost = asyncio.get_running_loop().create_future()
        self.agree(terms)
        self.changed()
        self.accept_again()

    def agree(self, terms: Terms) -> None:
        """Go by these terms from now on."""
        if terms is not self.terms:
            ipc.close_all(self.terms.files)
            self.terms = terms
            self._admission.limits = self._limits()

    def _ended(self, gate: Gate) -> None:
        del self._gates[gate]
        for connection in list(gate.connections.values()):
            self._monitor.connection_over(connection)
        if gate is self.gate:
            self.gate = None
            self._stop_accepting()
            self._lost.set_result(gate.gone.result())

    def look(self) -> None:
        """Look after the gates; to be called about once a second."""
        now = time.monotonic()
        for gate, until in list(self._gates.items()):
            since = min(gate.untaken.values(), default=now)
            if gate.state is State.SERVING:
                if not gate.silent:
                    gate.send(ipc.Ping())
                gate.silent += 1
            if gate.state is State.NEW and now - gate.started > _START:
                gate.kill("does not start in time")
            elif gate.silent > _SILENT or now - since > START_SECONDS:
                gate.kill("does not answer" if gate.silent > _SILENT else "does not take connections")
            elif gate is not self.gate and gate.state is State.SERVING and until < float("inf"):
                self._let_go(gate, until < now)

    def _let_go(self, gate: Gate, late: bool) -> None:
        """End an old gate, once nothing is left of it; or now."""
        seconds = self._monitor.config.limits.drain
        if late:
            self._gates[gate] = float("inf")
            gate.send(ipc.Drain(int(seconds * 1000)))
        elif not gate.connections:
            gate.release()
        else:
            return
        asyncio.get_running_loop().call_later(seconds + START_SECONDS, gate.kill, "does not end")

    async def drain(self, seconds: float) -> None:
        """Take no more connections, and let the gates finish what is in flight."""
        self._stop_accepting()
        self._closed = True
        for listener in self.listeners:
            listener.close()
        gates = list(self._gates)
        for gate in gates:
            gate.send(ipc.Drain(int(seconds * 1000)))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(gate.drained.wait() for gate in gates)), seconds + 1)

    def release(self) -> None:
        """Let the gates end."""
        for gate in list(self._gates):
            gate.release()
            for connection in list(gate.connections.values()):
                self._monitor.connection_over(connection)

    # --- connections ---------------------------------------------------------------------------------------------------

    def _stop_accepting(self) -> None:
        for listener in self.listeners if not self._closed else ():
            asyncio.get_running_loop().remove_reader(listener)

    def _room(self) -> int:
        gate = self.gate
        return _UNTAKEN - len(gate.untaken) if gate is not None and gate.state is State.SERVING else 0

    def accept_again(self) -> None:
        """Accept connections, if the gate has room for any."""
        if self._room() > 0 and not self._closed:
            for listener in self.listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        gate, room = self.gate, self._room()
        if gate is None or room <= 0:
            self._stop_accepting()
            return
        try:
            accepted = accept(listener, room, bool(self._monitor.own.context))
        except OSError as fault:
            self._pause(listener, fault)
            return
        for sock, peer in accepted:
            with sock:
                try:
                    self._welcome(gate, sock, sock.dup(), peer)
                except OSError as fault:
                    self._pause(listener, fault)

    def _pause(self, listener: socket.socket, fault: OSError) -> None:
        """Accept nothing for a moment: there is no descriptor for a connection."""
        self._monitor.log.peer_event(f"gate:{self.kind}", "error", "limit", which=f"accept: {fault.strerror}")
        asyncio.get_running_loop().remove_reader(listener)
        asyncio.get_running_loop().call_later(1.0, self.accept_again)

    def _welcome(self, gate: Gate, sock: socket.socket, duplicate: socket.socket, peer: Peer) -> None:
        monitor, reason = self._monitor, ""
        if monitor.personal and peer.identity is not None and peer.identity.uid not in (0, monitor.own.uid):
            reason = "this daemon serves the user who started it, and nobody else"
        elif monitor.is_banned(peer.origin):
            reason = "descriptors sent along, a moment ago"
        if reason:
            monitor.log.peer_event(peer.origin.address, "warning", "limit", which=reason, outcome="refused", peer=peer.name)
            passing.close(duplicate.detach(), sock.detach())  # unread: whatever was sent along is released here
            return
        gate.last += 1
        connection = Connection(gate, gate.last, peer, duplicate, self._admission)
        gate.connections[gate.last] = connection
        gate.untaken[gate.last] = time.monotonic()
        monitor.hang_ups.add(connection)
        self._admission.arrive(connection)
        gate.send(ipc.Connection(connection.number, peer.name), (sock.detach(),))
        monitor.log.peer_event(
            peer.origin.address, "debug", "connection", state="accepted", conn=gate.last, gate=gate.name, peer=peer.name
        )

    def _make_room(self, connection: Connection, limit: str) -> None:
        """Close a connection, so that there is room for another one. A user hears why; a peer without one may not listen."""
        monitor = self._monitor
        origin, peer = connection.log_origin, connection.peer
        monitor.log.peer_event(origin, "warning", "limit", which=limit, outcome="closed", conn=connection.number, peer=peer)
        if connection.known:
            text = "closed to make room: this user has more connections than others, and there are as many as there may be"
            connection.gate.send(ipc.Verdict(connection.number, 0, EAGAIN, text))
            asyncio.get_running_loop().call_later(_LAST_WORDS, monitor.connection_over, connection)
        else:
            monitor.connection_over(connection)

    def _limits(self) -> Limits:
        """Those of the configuration, or less where the process may not have the descriptors for them."""
        wanted, descriptors = self.terms.config.limits, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limits = within(wanted, descriptors)
        if limits != wanted:
            text = f"connections {limits.connections}, strangers {limits.strangers}: {descriptors} descriptors are allowed"
            self._monitor.log.event("warning", "limit", which=text)
        return limits
