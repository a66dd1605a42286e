"""The process: connections and workers from the monitor, timers, the shutdown."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from OpenSSL import SSL

from srpcd import ipc, libc, passing
from srpcd.config import Config, size
from srpcd.gate import sandbox
from srpcd.gate.budget import LOCAL_PEER, Budget, Share
from srpcd.gate.channel import Channel
from srpcd.gate.connection import Connection
from srpcd.gate.loop import Loop
from srpcd.gate.routes import Link
from srpcd.gate.tls import Plain, Tls
from srpcd.session.session import Session

WORKER_MARGIN = 5.0
"""Seconds after `limits.call_timeout`, which the worker keeps itself, after which a gate gives a silent worker up."""

DRAIN_CHECK = 0.05
"""Seconds between two looks at whether everything has been answered."""

LAST_WORDS = 1.0
"""Seconds in which clients may take their last replies, after the time for the shutdown."""

RELEASED_BYTES = 1 << 20
"""Memory that was freed is given back to the kernel, once a second, when it is so much. Less is kept for what comes next."""


class Gate:
    """One gate. context: of TLS; None: the gate of the local socket.

    budget: of the memory.
    """

    def __init__(self, loop: Loop, config: Config, context: SSL.Context | None, sock: socket.socket) -> None:
        self.loop = loop
        self.limits = config.limits
        self.connections: dict[int, Connection] = {}
        self.links: dict[int, Link] = {}
        self.budget = Budget(size(config.limits.memory), self._memory_freed)
        self._unattached = Share()
        self._uids: WeakValueDictionary[str, Share] = WeakValueDictionary()
        self._users: WeakValueDictionary[int, Share] = WeakValueDictionary()
        self._release_memory = libc.memory_releaser()
        self.channel = Channel(loop, sock, self._dispatch, self._congestion_changed)
        self._tree = config.paths.tree
        self._context = context
        self._draining = False
        self.refuses = passing.kernel_refuses()
        """Whether the kernel refuses descriptors that peers send. Else each read is bounded, see `srpcd.passing`."""
        if not self.refuses:
            passing.interrupt_releases()  # what it needs is there before the sandbox is
        limits = config.limits
        shortest = min(limits.handshake_timeout, limits.authentication_timeout, limits.idle_timeout, limits.stall)
        self._interval = min(1.0, shortest / 4)
        loop.call_later(self._interval, self._check)

    # --- what connections and links say --------------------------------------------------------------------------------

    def connection_ended(self, connection: Connection) -> None:
        """A connection is over."""
        self.connections.pop(connection.number, None)

    def descriptors_sent(self, connection: Connection) -> None:
        """The peer of a local connection sends descriptors: end all of that user's, unread, and tell the monitor."""
        self.channel.send(ipc.DescriptorsSent(connection.number))
        for each in [each for each in self.connections.values() if each.peer == connection.peer]:
            each.end()

    def link_died(self, link: Link) -> None:
        """A worker is gone."""
        if self.links.get(link.number) is link:
            del self.links[link.number]

    # --- what the monitor says -----------------------------------------------------------------------------------------

    def _dispatch(self, message: ipc.Message, fds: list[int]) -> None:
        if isinstance(message, ipc.Connection):
            self._connection(message, fds)
        elif isinstance(message, ipc.Ping):
            self.channel.send(ipc.Pong())
        elif isinstance(message, ipc.Drain):
            self._drain(message.milliseconds / 1000)
        else:
            link = self._link(message, fds) if isinstance(message, ipc.Attached) else None
            connection = self.connections.get(getattr(message, "conn", -1))
            if connection is None:
                if not isinstance(message, ipc.Attached):
                    ipc.close_all(fds)
                return
            try:
                _RESULTS[type(message)](connection, message, link, fds)
            except Exception as fault:
                connection.fault(fault)
            else:
                connection.settle()

    def _connection(self, message: ipc.Connection, fds: list[int]) -> None:
        self.channel.send(ipc.Taken(message.conn))
        sock = socket.socket(fileno=fds[0])
        sock.setblocking(False)
        transport = Tls(sock, self._context) if self._context else Plain(sock)
        if self._draining:
            transport.close()
            return
        session = Session(self._context is None, self._tree, self.limits.outstanding)
        connection = Connection(self, message.conn, message.peer, transport, session)
        self.connections[message.conn] = connection
        connection.start()

    def _link(self, message: ipc.Attached, fds: list[int]) -> Link | None:
        """A link to a worker, made if its socket came with the message; None if it has died."""
        if fds:
            share = self._users.setdefault(message.uid, Share())
            self.links[message.link] = Link(self, message.link, fds[0], share)
        return self.links.get(message.link)

    def _congestion_changed(self) -> None:
        for connection in list(self.connections.values()):
            connection.update()

    # --- memory --------------------------------------------------------------------------------------------------------

    def share(self, peer: str) -> Share:
        """The share of a connection that is not attached to a worker: of its uid, or of all such connections."""
        return self._uids.setdefault(peer, Share()) if peer.startswith(LOCAL_PEER) else self._unattached

    def _memory_freed(self) -> None:
        self.loop.call_soon(self.budget.offer)

    def _trim(self) -> None:
        """Give memory back to the kernel. malloc keeps what lies between two blocks that are in use, which is most of it."""
        budget = self.budget
        if budget.peak - budget.held >= RELEASED_BYTES:
            self._release_memory()
            budget.peak = budget.held

    # --- time ----------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        now = self.loop.time()
        self.budget.look()
        for connection in list(self.connections.values()):
            connection.check(now)
        for link in list(self.links.values()):
            link.check(now, self.limits.stall, self.limits.call_timeout + WORKER_MARGIN)
        self._trim()
        self.loop.call_later(self._interval, self._check)

    def _drain(self, seconds: float) -> None:
        if not self._draining:
            self._draining = True
            for connection in self.connections.values():
                connection.session.drain()
            self._drained(self.loop.time() + seconds)

    def _drained(self, deadline: float) -> None:
        """Say when everything is answered, and stay, as the services here may be needed; end when the time is over."""
        if self.loop.time() < deadline:
            if any(each.busy for each in self.connections.values()):
                self.loop.call_later(DRAIN_CHECK, self._drained, deadline)
            else:
                self.channel.send(ipc.Drained())
                self.loop.call_at(deadline, self._drained, deadline)
            return
        for connection in list(self.connections.values()):
            connection.expire()
        self._leave(self.loop.time() + LAST_WORDS)

    def _leave(self, deadline: float) -> None:
        """End when everybody has the last reply, or does not take it."""
        if self.loop.time() < deadline and any(each.busy for each in self.connections.values()):
            self.loop.call_later(DRAIN_CHECK, self._leave, deadline)
            return
        for connection in list(self.connections.values()):
            connection.end()
        self.loop.stop()


_RESULTS: dict[type[ipc.Message], Callable[[Connection, Any, Link | None, list[int]], None]] = {
    ipc.Conversation: lambda c, m, _link, fds: c.conversing(m.afid, fds),
    ipc.Verdict: lambda c, m, _link, _fds: c.verdict(m.afid, m.errno, m.message),
    ipc.Attached: lambda c, m, link, _fds: c.attached(m.request, m.session, link, m.link),
    ipc.Refused: lambda c, m, _link, _fds: c.refused(m.request, m.errno, m.message),
    ipc.SessionOver: lambda c, m, _link, _fds: c.over(m.session),
    ipc.Announced: lambda c, m, _link, _fds: c.session.announced(m.request, m.announcement, m.warning),
    ipc.NewLine: lambda c, m, _link, _fds: c.session.line(m.announcement, m.line),
}


def serve(config: Config, context: SSL.Context | None, sock: socket.socket) -> None:
    """Be a gate until the monitor says that it is over, or is gone."""
    loop = Loop()
    gate = Gate(loop, config, context, sock)
    gate.channel.send(ipc.Ready(sandbox.enter(interrupts=not gate.refuses)))
    try:
        loop.run_forever()
    except Exception as fault:
        # Outside any connection: end, and the monitor starts another gate. Values are not shown.
        traceback.print_tb(fault.__traceback__, file=sys.stderr)
        print(f"{type(fault).__name__}: a gate ends, because it has a fault", file=sys.stderr, flush=True)
        os._exit(1)
