"""Announcements, lines, and who may go on with them: what is done about endpoints.

Whatever a right depends on is proved by a probe, anew whenever something about the endpoint has changed.
"""

import asyncio
import os
import time
from errno import EACCES, EAGAIN, EPERM
from typing import TYPE_CHECKING

from srpcd import ipc, selinux
from srpcd.monitor import authentication
from srpcd.monitor.children import Worker
from srpcd.monitor.connections import NO_ROOM, Connection
from srpcd.monitor.credentials import LACKS_GROUPS, has_groups
from srpcd.monitor.faults import Denied
from srpcd.monitor.launch import Identity
from srpcd.monitor.limiter import FairLimiter
from srpcd.monitor.lines import Announcement, Endpoint, Line, Register
from srpcd.monitor.origins import of_uid
from srpcd.monitor.probe import Proof, probe
from srpcd.monitor.requests import State, Violation, plain_path
from srpcd.wire import limits as wire

if TYPE_CHECKING:
    from srpcd.monitor.monitor import Monitor


class Endpoints:
    """Handlers of the requests about announcements and lines (`requests`), and the watch on what was granted."""

    def __init__(self, monitor: "Monitor") -> None:
        self._monitor = monitor
        self._log = monitor.log
        runtime, own = monitor.config.paths.runtime, monitor.own
        lines = os.path.join(runtime, "lines")
        self._register: Register[Worker] = Register(lines, own.uid, bool(own.context), self._connected)
        self._probes = FairLimiter(wire.PROBES_MAX, wire.PROBES_MAX // 8)

    async def _probe(
        self, identity: Identity, origin: str, path: str, access: int, inode: tuple[int, int] | None = None
    ) -> Proof:
        """Let a probe try. origin: whom a refusal of the policy counts for in the log."""
        if self._monitor.own.context and not identity.context:
            return Proof(EACCES, [])  # of whom SELinux knows nothing, nothing can be asked
        async with self._probes.turn(of_uid(identity.uid).groups):
            drop, tree = self._monitor.drop(identity), self._monitor.config.paths.tree
            proof = await probe(drop, tree, path, access, inode, identity.context)
        if proof.reason:
            operation = "serve" if access == os.O_RDONLY else "call"
            self._log.peer_event(
                origin, "info", "refused", operation=operation, uid=identity.uid, endpoint="/" + path, errno=proof.errno,
                reason=proof.reason,
            )  # fmt: skip
        return proof

    def announce(self, connection: Connection, message: ipc.Announce) -> None:
        path, identity = plain_path(message.path), connection.identity
        if identity is None:
            raise Violation("an announcement for nobody")
        both = connection.pending + len(connection.announcements)
        if both >= wire.LISTENERS_MAX or connection.pending >= wire.DECIDING_MAX:
            text = "too many announcements on one connection"
            connection.gate.send(ipc.Refused(message.conn, message.request, EAGAIN, text))
            return
        connection.pending += 1
        self._monitor.run(connection, self._announce(connection, identity, message.request, path))

    async def _announce(self, connection: Connection, identity: Identity, request: int, path: str) -> None:
        errno, text, began = 0, "", time.monotonic()
        try:
            if identity.uid in self._monitor.daemon_uids | {0, authentication.OVERFLOW_UID}:
                raise Denied(EPERM, "a service needs an account of its own: root and the daemon's accounts can't announce")
            own, settings = self._monitor.own, self._monitor.config.authentication
            if self._monitor.personal and not has_groups(identity, own, settings):  # its probe would prove the daemon's
                raise Denied(EACCES, LACKS_GROUPS)
            refused, chain, _reason = await self._probe(identity, connection.log_origin, path, os.O_RDONLY)
            if connection.over:
                ipc.close_all(chain)
                return
            if refused:
                raise Denied(refused)
            text = self._enter(connection, request, identity.uid, path, chain, began)
        except Denied as denied:
            errno, text = denied.errno, denied.message
            connection.gate.send(ipc.Refused(connection.number, request, errno, text))
        finally:
            connection.pending -= 1
        self._monitor.told("announce", connection, errno, uid=identity.uid, endpoint="/" + path, reason=text or None)

    def _enter(self, connection: Connection, request: int, uid: int, path: str, chain: list[int], began: float) -> str:
        """Enter a server, tell it so, and give its callers lines. began: when its probe did (monotonic seconds).

        Returns a warning, or nothing. Raises Denied.
        """
        if not connection.becomes_known(f"uid:{uid}"):
            ipc.close_all(chain)
            raise Denied(EAGAIN, NO_ROOM)
        endpoint, number = self._register.endpoint(path, chain, uid), next(self._monitor.numbers)
        if endpoint is None or len(endpoint.servers) >= wire.SERVERS_MAX:
            raise Denied(EAGAIN, "too many endpoints, or too many processes that serve this one")
        gate, conn = connection.gate, connection.number
        server = Announcement(
            number, uid, lambda line: gate.send(ipc.NewLine(conn, number, line)), lambda: self._doubt(connection, endpoint)
        )
        endpoint.servers.append(server)
        if endpoint.changed >= began:  # it has been looked at since then, and not for us
            server.doubt()
        connection.announcements[number] = endpoint, server
        mode, warning = endpoint.mode, ""
        if mode & 0o060 == 0o060 or mode & 0o006 == 0o006:
            warning = f"mode {mode & 0o777:o}: whoever may call this endpoint may also serve it; take read away from callers"
        gate.send(ipc.Announced(conn, request, number, warning))  # before the lines, which the gate knows by the number
        for worker in list(endpoint.callers):
            self._join(endpoint, server, worker)
        return warning

    def withdraw(self, connection: Connection, message: ipc.Withdraw) -> None:
        if message.announcement in connection.announcements:
            self.end_announcement(connection, message.announcement)

    def end_announcement(self, connection: Connection, number: int) -> None:
        endpoint, server = connection.announcements.pop(number)
        endpoint.servers.remove(server)
        for line in [line for (each, _worker), line in endpoint.lines.items() if each == number]:
            self._line_over(line)
        endpoint.given = {each for each in endpoint.given if each[0] != number}
        self._register.release(endpoint)
        about = {"peer": connection.peer, "endpoint": "/" + endpoint.path}
        self._log.peer_event(connection.log_origin, "info", "withdraw", conn=connection.number, **about)

    def _line_over(self, number: int) -> None:
        line = self._register.end_line(number)
        if line is not None:
            line.worker.lines -= 1
            line.worker.send(ipc.LineOver(number))

    def _join(self, endpoint: Endpoint[Worker], server: Announcement, worker: Worker) -> None:
        """Make a line between a worker that may call and a server, and tell both."""
        if worker.lines >= self._monitor.config.limits.lines_per_worker:
            about = {"which": "lines_per_worker", "user": worker.user, "endpoint": "/" + endpoint.path}
            self._log.peer_event(worker.log_origin, "warning", "limit", **about)
            return
        try:
            number = self._register.make_line(endpoint, server, worker, (*worker.identity, worker.user))
        except OSError as fault:
            about = {"text": f"no line: {fault}", "endpoint": "/" + endpoint.path}
            self._log.peer_event(worker.log_origin, "error", "warning", **about)
            return
        worker.lines += 1
        worker.send(ipc.LineExpected(number, *endpoint.key[:2]))
        server.tell(number)

    def _connected(self, number: int, line: Line[Worker], fd: int) -> None:
        """A service has connected a line: it is the worker's. fd: -1 where it is of no use."""
        if fd < 0:
            self._line_over(number)
        else:
            line.worker.send(ipc.Line(number), (fd,))

    def lines_wanted(self, worker: Worker, message: ipc.LinesWanted) -> None:
        path, inode = plain_path(message.path), (message.dev, message.ino)
        if worker.waiting >= wire.PROBING_MAX or len(worker.endpoints) >= self._monitor.config.limits.lines_per_worker:
            worker.send(ipc.Lines(*inode, EAGAIN))
            return
        worker.waiting += 1
        self._monitor.run(worker, self._lines_wanted(worker, path, inode))

    async def _lines_wanted(self, worker: Worker, path: str, inode: tuple[int, int]) -> None:
        began = time.monotonic()
        try:
            errno, chain, _reason = await self._probe(worker.identity, worker.log_origin, path, os.O_WRONLY, inode)
        finally:
            worker.waiting -= 1
        if worker.state is State.DONE:
            ipc.close_all(chain)
            return
        endpoint = None if errno else self._register.endpoint(path, chain, worker.identity.uid)
        if endpoint is not None:
            endpoint.callers.add(worker)
            worker.endpoints.add(endpoint)
            if endpoint.changed >= began:
                self._doubt(worker, endpoint)
            for server in endpoint.servers:
                if (server.number, worker) not in endpoint.lines:
                    self._join(endpoint, server, worker)
            if endpoint.servers and not any((server.number, worker) in endpoint.lines for server in endpoint.servers):
                errno = EAGAIN  # there was no room for a line, which is something else than that nobody serves it
        elif not errno:
            errno = EAGAIN
        worker.send(ipc.Lines(*inode, errno))

    def line_gone(self, worker: Worker, message: ipc.LineGone) -> None:
        line = self._register.lines.get(message.line)
        if line is not None and line.worker is worker:
            self._register.end_line(message.line)
            worker.lines -= 1

    def is_live(self, worker: Worker, message: ipc.IsLive) -> None:
        worker.send(ipc.Live(message.request, self._register.live(message.dev, message.ino)))

    def revoke(self) -> None:
        """Where attributes of an endpoint or of a directory above it changed, or the policy, doubt who calls and serves.

        End the lines that no service has connected in time.
        """
        for number in self._register.late(time.monotonic()):
            self._line_over(number)
        policy = selinux.status() if self._monitor.own.context else b""
        for endpoint in self._register.endpoints.values():
            found = [policy, *endpoint.attributes()]
            if endpoint.seen != found:  # None at first: what changed since its first probe is not known
                endpoint.seen, endpoint.changed = found, time.monotonic()
                for worker in endpoint.callers:
                    self._doubt(worker, endpoint)
                for server in endpoint.servers:
                    server.doubt()

    def _doubt(self, whose: Connection | Worker, endpoint: Endpoint[Worker]) -> None:
        """Probe again, soon, whether somebody may still serve or call an endpoint."""
        if not whose.doubted:  # one probe at a time for each of them: whoever has his own ones take long delays nobody else
            self._monitor.run(whose, self._settle(whose))
        whose.doubted.setdefault(endpoint)

    async def _settle(self, whose: Connection | Worker) -> None:
        calls, identity = isinstance(whose, Worker), whose.identity
        while whose.doubted and identity is not None:
            # Those with a line first: a user may hold up each of his probes for a second.
            endpoint = next((each for each in whose.doubted if each.had(whose)), next(iter(whose.doubted)))
            changed = endpoint.changed
            access = os.O_WRONLY if calls else os.O_RDONLY
            errno, chain, _reason = await self._probe(identity, whose.log_origin, endpoint.path, access, endpoint.key[:2])
            ipc.close_all(chain)
            if errno == EAGAIN:
                await asyncio.sleep(1.0)  # there was no process for it
            del whose.doubted[endpoint]
            if errno == EAGAIN or (not errno and endpoint.changed != changed):
                # Anew, but the others first: whoever keeps changing one of his own must not put off all that is behind it.
                whose.doubted[endpoint] = None
            elif isinstance(whose, Worker):
                self._settled_caller(whose, endpoint, errno)
            elif errno and any(each is endpoint for each, _server in whose.announcements.values()):
                name = "/" + endpoint.path
                self._monitor.told("announce", whose, errno, uid=identity.uid, endpoint=name, reason="no longer")
                self._monitor.connection_over(whose)  # the client library comes again, and is told why

    def _settled_caller(self, worker: Worker, endpoint: Endpoint[Worker], errno: int) -> None:
        """Kill a worker that may not call and could, since it has a line; one that has none has to ask again.

        Nor is it believed that it has none to somebody who still serves.
        """
        lines = [(server, endpoint.lines.get((server.number, worker), 0)) for server in endpoint.servers]
        if errno and endpoint.had(worker):
            worker.kill(f"may no longer call /{endpoint.path} (errno {errno})")
        elif errno:
            self.forget_caller(worker, endpoint)
        elif worker.state is not State.DONE:
            for server, number in lines:  # with the endpoint's label, by which the kernel goes; calls may finish
                if number and self._register.lines[number].label != endpoint.label:
                    self._line_over(number)
                    self._join(endpoint, server, worker)

    def forget_caller(self, worker: Worker, endpoint: Endpoint[Worker]) -> None:
        """Forget that a worker may call, and end its lines there: those too that a service has yet to connect."""
        for server in endpoint.servers:
            self._line_over(endpoint.lines.get((server.number, worker), 0))
        worker.endpoints.discard(endpoint)
        endpoint.callers.discard(worker)
        endpoint.given = {each for each in endpoint.given if each[1] is not worker}
        self._register.release(endpoint)

    def worker_gone(self, worker: Worker) -> None:
        """End its lines."""
        for endpoint in list(worker.endpoints):
            self.forget_caller(worker, endpoint)

    def close(self) -> None:
        """Remove everything that was made."""
        self._register.close()
