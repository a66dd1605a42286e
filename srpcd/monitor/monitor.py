"""The monitor: children, connections, sessions and workers, and what is done about their requests (`requests`).

A connection belongs to one gate. What was authenticated on it (afids), the sessions that were attached with that, and its
announcements end with it. A worker belongs to an identity and is shared by all sessions of it. Whatever takes time (PAM,
NSS, a probe, a new process) is a task of the connection or worker that asked, and ends with it.
"""

import asyncio
import os
import time
from collections.abc import Coroutine
from contextlib import suppress
from errno import EACCES, EAGAIN, ECONNRESET, EKEYEXPIRED, EPERM, ETIMEDOUT
from itertools import count
from operator import attrgetter
from signal import SIGKILL, SIGTERM
from socket import SOCK_STREAM
from typing import Any

from srpcd import ipc
from srpcd.config import Config
from srpcd.log import Log, Value
from srpcd.monitor import accounts, launch, pamsession
from srpcd.monitor.cgroups import Groups
from srpcd.monitor.children import Child, Gate, Session, Worker
from srpcd.monitor.connections import Connection, HangUps
from srpcd.monitor.credentials import Credentials
from srpcd.monitor.endpoints import Endpoints
from srpcd.monitor.faults import Denied, StartFault
from srpcd.monitor.forked import collect, in_child, sweep_sessions
from srpcd.monitor.launch import Drop, Identity
from srpcd.monitor.logins import Logins
from srpcd.monitor.origins import Origin
from srpcd.monitor.requests import State, Violation, permitted, plain_path
from srpcd.wire import limits as wire

_BAN_SECONDS = 60.0
"""For how long a local user can't connect that held up the gate: where the kernel can't prevent it (before Linux 6.16)."""

START_SECONDS = 10.0
"""How long a new process may take to prove that it is confined, and an old one to end."""


class Monitor:
    """Gates are started, and connections accepted, by `srpcd.monitor.service`.

    Handlers of requests are here and in its parts, `logins` and `endpoints`.

    table: what to exec. own: who the daemon is itself. gates: uids of the gates. personal: it serves its own user alone,
    and nothing is dropped. groups: control groups, where systemd has delegated them.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        table: launch.Table,
        own: Identity,
        gates: frozenset[int],
        personal: bool,
        groups: Groups | None = None,
    ) -> None:
        self.config = config
        self.log = log
        self.table = table
        self.own = own
        self.personal = personal
        self.groups = groups
        self.daemon_uids = frozenset() if personal else gates | {own.uid}
        self.workers: dict[tuple[Identity, str], Worker] = {}  # by name too: accounts may share a uid
        self.children: set[Child] = set()
        self.hang_ups = HangUps(self.connection_over)
        self.banned: dict[Origin, float] = {}  # origins, and until when (monotonic seconds)
        self.numbers = count(1)
        self._dead: set[int] = set()  # sessions of workers that have ended, to be swept
        self._sweep: asyncio.Task[None] | None = None
        self._keepers = pamsession.Keepers()
        self.logins = Logins(self)
        self.endpoints = Endpoints(self)

    # --- children ------------------------------------------------------------------------------------------------------

    def handle(self, child: Child, message: ipc.Message) -> None:
        """A request has come. Raises Violation.

        What a gate asks for on behalf of a connection is that connection's, and is nothing once that is over.
        """
        handler = attrgetter(permitted(message, child.role, child.state, child.local))(self)
        whose: Child | Connection | None = child
        if isinstance(child, Gate) and hasattr(message, "conn") and not isinstance(message, ipc.Taken):
            whose = self.connection(child, message.conn)
        if whose is not None:
            handler(whose, message)

    def start(self, kind: type[Child], name: str, drop: Drop, *arguments: str, log_origin: str = "") -> Any:
        """Start a program of the launch table, as what the monitor calls `kind`. log_origin: see Child. Raises OSError."""
        program = self.table[kind.role]
        if self.own.context and not drop.context:
            raise PermissionError(EPERM, "SELinux is on: nothing is started without a context of its own")
        if self.groups and not drop.group:
            drop = drop._replace(group=self.groups.leaves[kind.role])
        spawned = launch.spawn((*program.command, *arguments, *program.libraries), drop)
        child = kind(spawned, name, self.log, self.handle, log_origin)
        self.children.add(child)
        child.gone.add_done_callback(lambda _: self.children.discard(child))
        return child

    def drop(self, identity: Identity, limits: dict[int, int] | None = None, death_signal: int = SIGKILL) -> Drop:
        """How to become somebody; in personal mode everybody is the daemon's own user already."""
        whom = None if self.personal else identity
        return Drop(whom, limits or {}, death_signal=death_signal, context=identity.context)

    def proved(self, child: Child, _message: ipc.Message) -> None:
        child.serving()

    def ready(self, gate: Gate, message: ipc.Ready) -> None:
        level = "info" if message.landlock else "warning"  # the other half of the sandbox is always there
        self.log.event(level, "sandbox", name=gate.name, pid=gate.pid, landlock=message.landlock)
        gate.serving()

    def drained(self, gate: Gate, _message: ipc.Drained) -> None:
        gate.drained.set()

    def pong(self, gate: Gate, _message: ipc.Pong) -> None:
        gate.silent = 0

    # --- the configuration ---------------------------------------------------------------------------------------------

    async def configure(self, config: Config) -> None:
        """Go by another configuration, which differs in what can be changed while we run.

        Workers keep the bounds that they were started with, and their sessions; new sessions get new workers.
        """
        old, self.config = self.config, config
        self.log.configure(config.log.format, config.log.level)
        self.log.rate.configure(config.log.lines_per_minute, config.log.bytes_per_second)
        if (old.limits, old.program_path) != (config.limits, config.program_path):
            self.workers.clear()
        if self.groups and (old.users, old.limits) != (config.users, config.limits):
            self.groups.configure(config)
            try:
                await in_child(self.groups.limit_all)
            except StartFault as fault:
                self.log.event("error", "warning", text=f"control groups keep the limits that they had: {fault}")

    def all_workers(self) -> list[Worker]:
        """Those that new sessions do not get any more too."""
        return [each for each in self.children if isinstance(each, Worker)]

    # --- connections ---------------------------------------------------------------------------------------------------

    def connection(self, gate: Gate, number: int) -> Connection | None:
        """The gate's connection; None if it is over, which the gate may not know yet. Raises Violation for any other."""
        if not 0 < number <= gate.last:
            raise Violation(f"connection {number} was never handed out to it")
        return gate.connections.get(number)

    def connections(self) -> list[Connection]:
        """Return all connections of all gates."""
        gates = [child for child in self.children if isinstance(child, Gate)]
        return [connection for gate in gates for connection in gate.connections.values()]

    def run(self, whose: Connection | Worker, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do something that takes time, on behalf of a connection or worker and not longer than it."""
        task = asyncio.get_running_loop().create_task(work)
        whose.tasks.add(task)

        def done(task: "asyncio.Task[None]") -> None:
            whose.tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:  # a fault of ours: nobody gains by causing it
                text = f"the monitor failed: {task.exception()!r}"
                if isinstance(whose, Worker):
                    whose.kill(text)
                else:
                    self.log.peer_event(whose.log_origin, "error", "warning", text=text, peer=whose.peer)
                    self.connection_over(whose)

        task.add_done_callback(done)
        return task

    def connection_over(self, connection: Connection) -> None:
        """Everything that belongs to the connection ends."""
        if connection.over:
            return
        connection.over = True
        connection.gate.connections.pop(connection.number, None)
        for task in list(connection.tasks):
            task.cancel()
        for number in list(connection.announcements):
            self.endpoints.end_announcement(connection, number)
        for number in list(connection.sessions):
            self._end_session(connection, number)
        connection.admission.leave(connection)
        self.hang_ups.remove(connection)
        origin, peer = connection.log_origin, connection.peer
        self.log.peer_event(origin, "debug", "connection", state="over", conn=connection.number, peer=peer)

    def told(self, event: str, connection: Connection, errno: int, granted: str = "granted", **fields: Value) -> None:
        """Write what became of a request into the log. It counts for the user who is proved, else for the peer's origin."""
        level = "warning" if errno and event == "authentication" else "info"
        proved = "user" in fields and (event != "authentication" or not errno)
        origin = f"user:{fields['user']}" if proved else connection.log_origin
        outcome = "refused" if errno else granted
        about: dict[str, Value] = {"conn": connection.number, "peer": connection.peer, **fields, "errno": errno or None}
        self.log.peer_event(origin, level, event, outcome=outcome, **about)

    def taken(self, gate: Gate, message: ipc.Taken) -> None:
        self.connection(gate, message.conn)
        gate.untaken.pop(message.conn, None)
        gate.room()

    def refusal(self, connection: Connection, message: ipc.Refusal) -> None:
        session = connection.sessions.get(message.session)
        if session:
            self.log.peer_event(
                session.worker.log_origin, "info", "refused", message.unreported, operation=message.operation,
                conn=connection.number, peer=connection.peer, user=session.credentials.user, endpoint="/" + message.path,
                errno=message.errno,
            )  # fmt: skip

    def descriptors_sent(self, connection: Connection, _message: ipc.DescriptorsSent) -> None:
        """The user of a local connection holds up the gate: end all that it has there, and accept no more for a while."""
        self.log.peer_event(connection.log_origin, "warning", "limit", which="descriptors sent along", peer=connection.peer)
        self.banned[connection.origin] = time.monotonic() + _BAN_SECONDS
        for each in [each for each in self.connections() if each.origin == connection.origin]:
            self.connection_over(each)

    def is_banned(self, origin: Origin) -> bool:
        """Whether connections of this origin are refused at the moment."""
        if self.banned.get(origin, 0.0) < time.monotonic():
            self.banned.pop(origin, None)
            return False
        return True

    # --- sessions and workers ------------------------------------------------------------------------------------------

    def attach(self, connection: Connection, message: ipc.Attach) -> None:
        afid, aname = connection.afids.get(message.afid), plain_path(message.aname)
        if afid is None or afid.proved is None or not afid.allows(message.uname, aname):
            text = "the afid is not accepted, too old, or not for this user and this part of the tree"
            connection.gate.send(ipc.Refused(message.conn, message.request, EACCES, text))
        elif len(connection.sessions) >= wire.SESSIONS_MAX:
            connection.gate.send(ipc.Refused(message.conn, message.request, EAGAIN, "too many sessions on one connection"))
        else:
            expires = time.monotonic() + self.config.authentication.session_age
            self._grant(connection, message.request, afid.proved, aname, (next(self.numbers), expires, 0))

    def resume(self, connection: Connection, message: ipc.Resume) -> None:
        session = connection.sessions.get(message.session)
        if session is None or session.expires < time.monotonic():
            connection.gate.send(ipc.Refused(message.conn, message.request, EKEYEXPIRED, ""))
        else:
            ticket = (message.session, session.expires, message.link)
            self._grant(connection, message.request, session.credentials, "", ticket)

    def detach(self, connection: Connection, message: ipc.Detach) -> None:
        self._end_session(connection, message.session)

    def _grant(
        self, connection: Connection, request: int, credentials: Credentials, aname: str, ticket: tuple[int, float, int]
    ) -> None:
        """Answer an attach or resume. ticket: the session's number, when it expires, the link that the gate has lost."""
        number, expires, lost = ticket

        async def grant() -> None:
            gate, errno, text = connection.gate, 0, ""
            old = connection.sessions.get(number)
            try:
                if old is not None and old.worker.gates.get(gate) == lost:
                    old.worker.kill("a gate has given it up")  # it lives, but does not answer
                worker = await self._worker(connection, credentials)
                if connection.over:
                    return
                if old is not None and number not in connection.sessions:  # it has ended meanwhile, and stays so
                    raise Denied(EKEYEXPIRED)
                self._end_session(connection, number)  # of a resume: it may have been another worker's
                connection.sessions[number] = Session(credentials, worker, expires)
                worker.connections.add(connection)
                self._link(gate, worker, connection.number, request, number)
            except Denied as denied:
                errno, text = denied.errno, denied.message
                if old is not None and errno == EACCES:  # no worker will ever be granted to this session again
                    errno = EKEYEXPIRED
                gate.send(ipc.Refused(connection.number, request, errno, text))
                if errno == EKEYEXPIRED and number in connection.sessions:
                    self.session_over(connection, number)
            finally:
                connection.pending -= 1
            self.told("attach", connection, errno, user=credentials.user, aname="/" + aname, reason=text or None)

        if connection.pending >= wire.DECIDING_MAX:
            connection.gate.send(ipc.Refused(connection.number, request, EAGAIN, "too many requests at once"))
        else:
            connection.pending += 1
            self.run(connection, grant())

    def _end_session(self, connection: Connection, number: int) -> None:
        """A session is over. The gate loses its socket to the worker, where it has no other session there."""
        session = connection.sessions.pop(number, None)
        if session is None or any(each.worker is session.worker for each in connection.sessions.values()):
            return
        worker, gate = session.worker, connection.gate
        worker.connections.discard(connection)
        if gate in worker.gates and all(each.gate is not gate for each in worker.connections):
            del worker.gates[gate]
            worker.send(ipc.GateOver(gate.number))
        if not worker.connections:
            self._idle(worker)

    def session_over(self, connection: Connection, number: int) -> None:
        """End a session before its client does, and tell the gate."""
        connection.gate.send(ipc.SessionOver(connection.number, number))
        self._end_session(connection, number)

    async def _worker(self, connection: Connection, credentials: Credentials) -> Worker:
        """Return the worker for these credentials, by the account as it is now. Start it if there is none. Raises Denied."""
        account = self.logins.admit(await self.logins.look_up(credentials.user, connection), connection, credentials)
        for _ in range(2):  # the first may be about to end, idle
            worker = self.workers.get((account.identity, account.name))
            if worker is None or worker.state is State.DONE:
                worker = self._start_worker(account, connection.host)
            worker.wanted += 1
            try:
                async with asyncio.timeout(START_SECONDS):
                    if await asyncio.shield(worker.proved) and worker.state is not State.DONE:
                        return worker
            except TimeoutError:
                worker.kill("did not start in time")
                raise Denied(ETIMEDOUT, "the worker did not start in time") from None
            finally:
                worker.wanted -= 1
            if worker.gone.done() and worker.gone.result() == pamsession.REFUSED:
                raise Denied(EACCES, "no PAM session for this user: the daemon's log says why")
        raise Denied(ECONNRESET, "the worker could not be started: the daemon's log says why")

    def _start_worker(self, account: accounts.Account, host: str) -> Worker:
        limits, paths = self.config.limits, self.config.paths
        if len(self.all_workers()) >= limits.workers:
            raise Denied(EAGAIN, "the daemon has as many workers as it may have")
        others = [each for each in self.workers.values() if each.identity.uid == account.identity.uid]
        if len(others) >= wire.WORKERS_PER_UID_MAX:
            unused = next((each for each in others if not each.connections and not each.wanted), None)
            if unused is None:
                raise Denied(EAGAIN, "the user has as many workers, with different groups, as one uid may have")
            self.retire(unused)
            unused.kill("")  # its user could stop it, and so keep any number of them for START_SECONDS
        group, service = "", self.config.authentication.pam_service
        try:
            # If its service asks for any; a user's own daemon has nothing to open one with.
            session = None if self.personal else pamsession.Wanted(service, account.name, host, self._keepers.lease)
            if self.groups:
                group = self.groups.worker(account.identity.uid)
            drop = self.drop(account.identity, launch.WORKER_LIMITS, SIGTERM)  # at which it ends its programs, and itself
            drop = drop._replace(group=group, session=session)
            worker: Worker = self.start(Worker, account.name, drop, account.name, log_origin=f"user:{account.name}")
        except OSError as fault:
            if self.groups and group:
                self.groups.end(group)
            raise Denied(EAGAIN, f"no new process: {fault.strerror}") from None
        identity = account.identity
        worker.begin(identity, account.name, group)
        self.workers[identity, account.name] = worker
        worker.gone.add_done_callback(lambda _: self._worker_gone(worker))
        self._idle(worker)  # whoever asked for it may be gone before it is there
        worker.send(
            ipc.WorkerSetup(
                *identity, self.personal, os.getpid(), account.name, paths.tree, self.config.program_path,
                int(limits.call_timeout * 1000), limits.programs_per_worker, int(limits.resident_idle * 1000),
            )
        )  # fmt: skip
        return worker

    def _link(self, gate: Gate, worker: Worker, conn: int, request: int, session: int) -> None:
        """Tell the gate, and give it and the worker a socket to each other if they have none yet."""
        if gate in worker.gates:
            gate.send(ipc.Attached(conn, request, session, worker.gates[gate], worker.identity.uid))
            return
        try:
            gate_end, worker_end = (each.detach() for each in ipc.socket_pair(SOCK_STREAM))
        except OSError:
            raise Denied(EAGAIN, "no descriptors are left") from None
        number = worker.gates[gate] = next(self.numbers)
        worker.send(ipc.Gate(gate.number), (worker_end,))
        gate.send(ipc.Attached(conn, request, session, number, worker.identity.uid), (gate_end,))

    def _idle(self, worker: Worker) -> None:
        """Let a worker end after its idle time, unless somebody is attached to it then, or is about to be."""

        def look() -> None:
            if worker.wanted:
                self._idle(worker)
            elif not worker.connections and worker.state is not State.DONE:
                self.retire(worker)

        if worker.idle is not None:
            worker.idle.cancel()
        worker.idle = asyncio.get_running_loop().call_later(self.config.limits.worker_idle + 0.1, look)

    def retire(self, worker: Worker) -> None:
        """Let a worker end that nobody uses, or that is no longer what its user is."""
        if self.workers.get((worker.identity, worker.user)) is worker:
            del self.workers[worker.identity, worker.user]
        worker.release()
        asyncio.get_running_loop().call_later(START_SECONDS, worker.kill, "")

    def _worker_gone(self, worker: Worker) -> None:
        if self.workers.get((worker.identity, worker.user)) is worker:
            del self.workers[worker.identity, worker.user]
        for task in list(worker.tasks):
            task.cancel()
        self.endpoints.worker_gone(worker)
        if self.groups:
            collect(worker.pid)
            self.groups.end(worker.group)
            return
        self._dead.add(worker.pid)
        if self._sweep is None or self._sweep.done():
            self._sweep = asyncio.get_running_loop().create_task(self._sweep_dead())

    async def _sweep_dead(self) -> None:
        while self._dead:
            dead, self._dead = self._dead, set()
            await sweep_sessions(dead)
            for pid in dead:  # until now nobody else could get its number, and with that the name of its session
                collect(pid)

    # --- what is looked at from time to time ---------------------------------------------------------------------------

    def expire(self) -> None:
        """End sessions that are too old."""
        now = time.monotonic()
        for connection in self.connections():
            for number, session in list(connection.sessions.items()):
                if session.expires < now:
                    self.session_over(connection, number)

    async def stop(self) -> None:
        """End all children that are left, and remove everything that was made."""
        for end in (Child.release, lambda child: child.kill("")):
            for child in list(self.children):
                end(child)
            with suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await asyncio.gather(*(asyncio.shield(child.gone) for child in self.children))
        if self._sweep is not None:
            await self._sweep
        await self._keepers.over(START_SECONDS)
        self.hang_ups.close()
        self.endpoints.close()
