"""The daemon's life: gates that are started again when they die, listening sockets, looking after, and the end."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from srpcd import ipc
from srpcd.config import encode
from srpcd.monitor import launch
from srpcd.monitor.children import Gate
from srpcd.monitor.connections import Connection, Counts, Peer, accept
from srpcd.monitor.launch import Identity
from srpcd.monitor.monitor import START_SECONDS, Monitor
from srpcd.monitor.requests import State

_UNTAKEN = 64
"""Connections that a gate has not yet taken; more wait in the listening socket."""
_LOOK = 1.0
"""Seconds between two looks at permissions, ages and gates; four times as long as the look took, if that is longer."""
_FIRST_PAUSE, _LONGEST_PAUSE, _GOOD_LIFE = 0.1, 1.0, 10.0
"""Seconds between the death of a gate and the next try, doubled each time unless it lived for `_GOOD_LIFE`."""


class Front(NamedTuple):
    """One kind of gate. kind: "tls" or "local". identity: who it runs as. files: what it is given, key and certificate."""

    kind: str
    identity: Identity
    listeners: list[socket.socket]
    files: tuple[int, ...]


class Service:
    """Runs gates before a monitor. ready: called when all gates serve."""

    def __init__(self, monitor: Monitor, fronts: list[Front], ready: Callable[[], None]) -> None:
        self._monitor = monitor
        self._fronts = fronts
        self._ready = ready
        self._counts = {front.kind: Counts(monitor.config.limits) for front in fronts}
        self._numbers = count(1)
        self._gates: dict[str, Gate] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then let what is in flight finish, and leave nothing behind."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        keepers = [loop.create_task(self._keep(front)) for front in self._fronts]
        keepers += [loop.create_task(each) for each in (self._look_after(), self._revoke(), self._refresh())]
        stopped = loop.create_task(self._stop.wait())
        await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        reason = "signal" if stopped.done() else "a fault of the daemon itself"
        self._monitor.log.event("info", "stop", reason=reason)
        for task in (stopped, *keepers):
            task.cancel()
        for front in self._fronts:
            for listener in front.listeners:
                loop.remove_reader(listener)
                listener.close()
        await self._drain()
        await self._monitor.stop()
        for fault in await asyncio.gather(*keepers, return_exceptions=True):
            if isinstance(fault, BaseException) and not isinstance(fault, asyncio.CancelledError):
                raise fault

    async def _drain(self) -> None:
        seconds = self._monitor.config.limits.drain
        gates = [gate for gate in self._gates.values() if not gate.gone.done()]
        for gate in gates:
            gate.send(ipc.Drain(int(seconds * 1000)))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(gate.drained.wait() for gate in gates)), seconds + 1)
        for gate in gates:
            gate.release()
            self._over(gate)

    async def _keep(self, front: Front) -> None:
        """Keep one gate running."""
        pause, log = _FIRST_PAUSE, self._monitor.log
        while True:
            started = time.monotonic()
            try:
                gate = self._start(front)
            except OSError as fault:
                log.event("error", "gate-restart", gate=front.kind, reason=str(fault), wait=f"{_LONGEST_PAUSE:g}s")
                await asyncio.sleep(_LONGEST_PAUSE)
                continue
            if await asyncio.shield(gate.proved):
                if all(each.state is State.SERVING for each in self._gates.values()) and len(self._gates) == len(
                    self._fronts
                ):
                    self._ready()
                self._accept_again(front, gate)
            status = await asyncio.shield(gate.gone)
            for listener in front.listeners:
                asyncio.get_running_loop().remove_reader(listener)
            self._over(gate)
            pause = _FIRST_PAUSE if time.monotonic() - started > _GOOD_LIFE else min(pause * 2, _LONGEST_PAUSE)
            log.event("error", "gate-restart", gate=front.kind, status=status, wait=f"{pause:g}s")
            await asyncio.sleep(pause)

    def _start(self, front: Front) -> Gate:
        monitor = self._monitor
        gate: Gate = monitor.start(Gate, front.kind, monitor.drop(front.identity, launch.GATE_LIMITS), front.kind)
        gate.begin(next(self._numbers), front.kind == "local")
        gate.room = lambda: self._accept_again(front, gate)
        self._gates[front.kind] = gate
        # Opened anew for each: one that was taken over could move the offset that it shares with its successor.
        files = tuple(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in front.files)
        gate.send(ipc.GateSetup(*front.identity, monitor.personal, front.kind, encode(monitor.config)), files)
        return gate

    def _over(self, gate: Gate) -> None:
        for connection in list(gate.connections.values()):
            self._monitor.connection_over(connection)

    def _accept_again(self, front: Front, gate: Gate) -> None:
        if gate.state is State.SERVING and len(gate.untaken) < _UNTAKEN and not self._stop.is_set():
            for listener in front.listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, front, gate, listener)

    def _accept(self, front: Front, gate: Gate, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if gate.state is not State.SERVING or len(gate.untaken) >= _UNTAKEN:
            for each in front.listeners:
                loop.remove_reader(each)
            return
        try:
            accepted = accept(listener, _UNTAKEN - len(gate.untaken))
        except OSError as fault:
            self._monitor.log.event("error", "limit", which=f"accept: {fault.strerror}")
            loop.remove_reader(listener)
            loop.call_later(1.0, self._accept_again, front, gate)
            return
        for sock, peer in accepted:
            with sock:
                self._welcome(gate, sock, peer)

    def _welcome(self, gate: Gate, sock: socket.socket, peer: Peer) -> None:
        monitor = self._monitor
        counts = self._counts[gate.name]
        limit = counts.refusal(peer.origin)
        if monitor.personal and peer.identity is not None and peer.identity.uid not in (0, monitor.own.uid):
            limit = "this daemon serves the user who started it, and nobody else"
        if limit:
            if gate.quota.take():
                monitor.log.event("warning", "limit", which=limit, peer=peer.name)
            return
        gate.last += 1
        connection = Connection(gate, gate.last, peer, sock.dup(), counts)
        gate.connections[gate.last] = connection
        gate.untaken[gate.last] = time.monotonic()
        monitor.hang_ups.add(connection)
        gate.send(ipc.Connection(connection.number, peer.name), (sock.detach(),))
        monitor.log.event("debug", "connection", state="accepted", conn=gate.last, gate=gate.name, peer=peer.name)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            self._monitor.expire()
            for gate in list(self._gates.values()):
                since = min([gate.started] if gate.state is State.NEW else gate.untaken.values(), default=time.monotonic())
                if time.monotonic() - since > START_SECONDS:
                    gate.kill("does not do its work")

    async def _revoke(self) -> None:
        while True:
            began = time.monotonic()
            await self._monitor.revoke()
            await asyncio.sleep(max(_LOOK, 4 * (time.monotonic() - began)))

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._monitor.config.authentication.refresh)
            await self._monitor.refresh()
