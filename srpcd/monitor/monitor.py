"""The monitor: what is done about each request of the table in `requests`.

A connection belongs to one gate. What was authenticated on it (afids), the sessions that were attached with that, and its
announcements end with it. A worker belongs to an identity and is shared by all sessions of it. Whatever takes time (PAM,
NSS, a probe, a new process) is a task of the connection or worker that asked, and ends with it.
"""

import asyncio
import os
import time
from collections.abc import Coroutine
from contextlib import suppress
from errno import EACCES, EAGAIN, ECONNRESET, EKEYEXPIRED, EOPNOTSUPP, EPERM, ETIMEDOUT
from itertools import count
from signal import SIGKILL, SIGTERM
from typing import Any

from srpcd import ipc, selinux
from srpcd.config import Config
from srpcd.log import Log, Value
from srpcd.monitor import accounts, authentication, launch, pamsession
from srpcd.monitor.authentication import Afid, PamChild
from srpcd.monitor.cgroups import Groups
from srpcd.monitor.children import Child, Gate, Quota, Session, Worker
from srpcd.monitor.connections import Connection, HangUps
from srpcd.monitor.faults import StartFault
from srpcd.monitor.forked import Turns, collect, in_child, sweep_sessions
from srpcd.monitor.launch import Drop, Identity
from srpcd.monitor.lines import Announcement, Endpoint, Register
from srpcd.monitor.probe import Proof, probe
from srpcd.monitor.requests import State, Violation, permitted, plain_path
from srpcd.wire import limits as wire

START_SECONDS = 10.0
"""How long a new process may take to prove that it is confined, and an old one to end."""


class Denied(Exception):
    """A request is not granted: errno and a sentence (empty: the usual one)."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message)
        self.errno = errno
        self.message = message


class Monitor:
    """Handlers of all requests. Gates are started, and connections accepted, by `srpcd.monitor.service`.

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
        self.register: Register[Worker] = Register(os.path.join(config.paths.runtime, "lines"), own.uid, bool(own.context))
        self.workers: dict[Identity, Worker] = {}
        self.children: set[Child] = set()
        self.hang_ups = HangUps(self.connection_over)
        self._numbers = count(1)
        self._dead: set[int] = set()  # sessions of workers that have ended, to be swept
        self._sweep: asyncio.Task[None] | None = None
        self._failures = authentication.Failures()
        # Those whom the kernel vouches for do not wait behind strangers who type no password.
        self._pam = {each: Turns(wire.PAM_CHILDREN_MAX, wire.PAM_CHILDREN_MAX // 2) for each in ("pam", "peer")}
        self._keepers = pamsession.Keepers()
        self._pam_context = selinux.with_domain(own.context, selinux.AUTHENTICATION)
        self._look_ups = Turns(wire.LOOK_UPS_MAX, wire.LOOK_UPS_MAX // 2)
        self._probes = Turns(wire.PROBES_MAX, wire.PROBES_MAX // 8)
        asyncio.get_running_loop().add_reader(self.register.inotify, self.register.opened)

    # --- children ------------------------------------------------------------------------------------------------------

    def handle(self, child: Child, message: ipc.Message) -> None:
        """A request has come. Raises Violation.

        What a gate asks for on behalf of a connection is that connection's, and is nothing once that is over.
        """
        handler = getattr(self, permitted(message, child.role, child.state, child.local))
        whose: Child | Connection | None = child
        if isinstance(child, Gate) and hasattr(message, "conn") and not isinstance(message, ipc.Taken):
            whose = self.connection(child, message.conn)
        if whose is not None:
            handler(whose, message)

    def start(self, kind: type[Child], name: str, drop: Drop, *arguments: str) -> Any:
        """Start a program of the launch table, as what the monitor calls `kind`. Raises OSError."""
        program = self.table[kind.role]
        if self.own.context and not drop.context:
            raise PermissionError(EPERM, "SELinux is on: nothing is started without a context of its own")
        if self.groups and not drop.group:
            drop = drop._replace(group=self.groups.leaves[kind.role])
        spawned = launch.spawn((*program.command, *arguments, *program.libraries), drop)
        child = kind(spawned, name, self.log, self.handle)
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
        if (old.limits, old.program_path) != (config.limits, config.program_path):
            self.workers.clear()
        if self.groups and old.users != config.users:
            self.groups.configure(config.users)
            try:
                await in_child(self.groups.limit_all)
            except StartFault as fault:
                self.log.event("error", "warning", text=f"users with workers keep the limits that they had: {fault}")

    def all_workers(self) -> list[Worker]:
        """Those that new sessions do not get any more too."""
        return [each for each in self.children if isinstance(each, Worker)]

    # --- connections ---------------------------------------------------------------------------------------------------

    def connection(self, gate: Gate, number: int) -> Connection | None:
        """The gate's connection; None if it is over, which the gate may not know yet. Raises Violation for any other."""
        if not 0 < number <= gate.last:
            raise Violation(f"connection {number} was never handed out to it")
        return gate.connections.get(number)

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
                    self.log.event("error", "warning", text=text, peer=whose.peer)
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
            self._withdraw(connection, number)
        for number in list(connection.sessions):
            self._end_session(connection, number)
        connection.counts.change(connection, -1)
        self.hang_ups.remove(connection)
        self.log.event("debug", "connection", state="over", conn=connection.number, peer=connection.peer)

    def _told(self, event: str, connection: Connection, errno: int, granted: str = "granted", **fields: Value) -> None:
        """Write what became of a request into the log."""
        if event == "authentication" or connection.quota.take():
            level, outcome = ("warning", "refused") if errno and event == "authentication" else ("info", granted)
            self.log.event(
                level, event, outcome="refused" if errno else outcome, conn=connection.number, peer=connection.peer,
                **fields, errno=errno or None,
            )  # fmt: skip

    def taken(self, gate: Gate, message: ipc.Taken) -> None:
        self.connection(gate, message.conn)
        gate.untaken.pop(message.conn, None)
        gate.room()

    def refusal(self, connection: Connection, message: ipc.Refusal) -> None:
        session = connection.sessions.get(message.session)
        if session and connection.quota.take():
            self.log.event(
                "info", "refused", operation=message.operation, conn=connection.number, peer=connection.peer,
                user=session.user, endpoint="/" + message.path, errno=message.errno,
            )  # fmt: skip

    # --- authentication ------------------------------------------------------------------------------------------------

    def authenticate(self, connection: Connection, message: ipc.Authenticate) -> None:
        if message.afid in connection.afids or message.mechanism not in self._pam:
            raise Violation("an afid twice, or a mechanism that there is none of")
        if len(connection.afids) >= wire.AFIDS_MAX or connection.authenticating or connection.failures >= wire.FAILURES_MAX:
            text = "one authentication at a time on a connection, and a bounded number of afids and failures"
            connection.gate.send(ipc.Verdict(message.conn, message.afid, EAGAIN, text))
            return
        afid = connection.afids[message.afid] = Afid(message.uname, plain_path(message.aname))
        connection.authenticating = afid
        afid.task = self.run(connection, self._authenticate(connection, afid, message))

    async def _authenticate(self, connection: Connection, afid: Afid, message: ipc.Authenticate) -> None:
        user, by_password = afid.uname, message.mechanism == "pam"
        errno, told, reason, answered = EACCES, authentication.REFUSED, "abandoned", 0
        try:
            if not by_password and connection.identity is None:
                raise Denied(EOPNOTSUPP, "the mechanism peer is for the local socket")
            async with self._failures.attempt((user, connection.origin)) as attempt:
                attempt.begun = True
                connection.failures += 1
                if not by_password:  # who it is not can be told without PAM
                    reason = self._policy(await self._look_up(user, connection), connection, message.mechanism)
                if by_password or not reason:
                    outcome = await self._converse(connection, message)
                    reason, answered = outcome.reason, outcome.answered
                    if not outcome.errno:
                        reason = self._policy(await self._look_up(user, connection), connection, message.mechanism)
                if not reason:
                    attempt.accepted = True
                    errno, told = 0, ""
                    connection.failures -= 1
            if errno and by_password:
                step = self.config.authentication.refusal
                await asyncio.sleep(authentication.deadline(answered / 1e9, step) - time.monotonic())
        except Denied as denied:
            errno, told, reason = denied.errno, denied.message, denied.message
        finally:
            if connection.authenticating is afid:  # and not the next one's, after this one was clunked
                connection.authenticating = None
            aname = "/" + afid.aname
            self._told("authentication", connection, errno, "accepted", user=user, mechanism=message.mechanism, aname=aname,
                       reason=reason or None)  # fmt: skip
            if errno and connection.afids.get(message.afid) is afid:
                del connection.afids[message.afid]
            if connection.failures >= wire.FAILURES_MAX:
                self.log.event("warning", "limit", which="failed authentications", peer=connection.peer, user=user)
                asyncio.get_running_loop().call_later(1.0, self.connection_over, connection)  # after the last answer
        if not errno:
            afid.expires = time.monotonic() + self.config.authentication.afid_age
            connection.becomes_known()
        connection.gate.send(ipc.Verdict(connection.number, message.afid, errno, told))

    async def _look_up(self, user: str, connection: Connection) -> accounts.Account | None:
        try:
            async with self._look_ups.turn(connection.origin):
                return await accounts.look_up(user, self.own.context)
        except OSError as fault:
            raise Denied(EAGAIN, f"no look-up of accounts at the moment: {fault.strerror or fault}") from None

    def _policy(self, account: accounts.Account | None, connection: Connection, mechanism: str) -> str:
        settings = self.config.authentication
        reason = authentication.policy(account, settings, self.daemon_uids, connection.identity is None)
        if account is None or reason:
            return reason or "no such account"
        if mechanism == "peer" and (connection.identity is None or account.identity.uid != connection.identity.uid):
            return "the kernel says that somebody else is there"
        if self.personal and account.identity.uid != self.own.uid:
            return "this daemon serves the user who started it, and nobody else"
        return ""

    async def _converse(self, connection: Connection, message: ipc.Authenticate) -> ipc.Outcome:
        """Let a child authenticate. Raises Denied: EAGAIN, ETIMEDOUT."""
        child: PamChild | None = None
        try:
            async with (
                asyncio.timeout(self.config.authentication.timeout),
                self._pam[message.mechanism].turn(connection.origin),
            ):
                drop = Drop(None, {}, not self.personal, context=self._pam_context)
                child = self.start(PamChild, message.uname, drop)
                self._introduce(connection, message, child)
                await asyncio.shield(child.gone)
                return child.result or ipc.Outcome(EACCES, "the authentication child died", 0)
        except TimeoutError:
            errno = ETIMEDOUT if child else EAGAIN
            raise Denied(errno, "authentication was not finished in time, or too many are under way") from None
        except OSError as fault:
            raise Denied(EAGAIN, f"no authentication at the moment: {fault.strerror}") from None
        finally:
            if child is not None:
                child.kill("")

    def _introduce(self, connection: Connection, message: ipc.Authenticate, child: PamChild) -> None:
        """Tell the child whom to authenticate, and let it and the gate talk to each other."""
        service = self.config.authentication.pam_service
        (answers, to_child), (prompts, from_child) = launch.two_pipes(ipc.packet_pipe)
        setup = ipc.AuthSetup(self._pam_context, os.getpid(), message.mechanism, service, message.uname, connection.host)
        child.send(setup, (answers, from_child))
        connection.gate.send(ipc.Conversation(connection.number, message.afid), (prompts, to_child))

    def outcome(self, child: PamChild, message: ipc.Outcome) -> None:
        child.result = message
        child.release()

    def forget_afid(self, connection: Connection, message: ipc.ForgetAfid) -> None:
        afid = connection.afids.pop(message.afid, None)
        if afid and afid.task:
            afid.task.cancel()
            if connection.authenticating is afid:
                connection.authenticating = None

    # --- sessions and workers ------------------------------------------------------------------------------------------

    def attach(self, connection: Connection, message: ipc.Attach) -> None:
        afid, aname = connection.afids.get(message.afid), plain_path(message.aname)
        if afid is None or not afid.allows(message.uname, aname):
            text = "the afid is not accepted, too old, or not for this user and this part of the tree"
            connection.gate.send(ipc.Refused(message.conn, message.request, EACCES, text))
        elif len(connection.sessions) >= wire.SESSIONS_MAX:
            connection.gate.send(ipc.Refused(message.conn, message.request, EAGAIN, "too many sessions on one connection"))
        else:
            expires = time.monotonic() + self.config.authentication.session_age
            self._grant(connection, message.request, afid.uname, aname, (next(self._numbers), expires, 0))

    def resume(self, connection: Connection, message: ipc.Resume) -> None:
        session = connection.sessions.get(message.session)
        if session is None or session.expires < time.monotonic():
            connection.gate.send(ipc.Refused(message.conn, message.request, EKEYEXPIRED, ""))
        else:
            ticket = (message.session, session.expires, message.link)
            self._grant(connection, message.request, session.user, "", ticket)

    def detach(self, connection: Connection, message: ipc.Detach) -> None:
        self._end_session(connection, message.session)

    def _grant(self, connection: Connection, request: int, user: str, aname: str, ticket: tuple[int, float, int]) -> None:
        """Answer an attach or resume. ticket: the session's number, when it expires, the link that the gate has lost."""
        number, expires, lost = ticket

        async def grant() -> None:
            gate, errno, text = connection.gate, 0, ""
            try:
                old = connection.sessions.get(number)
                if old is not None and old.worker.gates.get(gate) == lost:
                    old.worker.kill("a gate has given it up")  # it lives, but does not answer
                worker = await self._worker(connection, user)
                if connection.over:
                    return
                self._end_session(connection, number)  # of a resume: it may have been another worker's
                connection.sessions[number] = Session(user, worker, expires)
                worker.connections.add(connection)
                self._link(gate, worker, connection.number, request, number)
            except Denied as denied:
                errno, text = denied.errno, denied.message
                gate.send(ipc.Refused(connection.number, request, errno, text))
            finally:
                connection.pending -= 1
            self._told("attach", connection, errno, user=user, aname="/" + aname, reason=text or None)

        if connection.pending >= wire.DECIDING_MAX:
            connection.gate.send(ipc.Refused(connection.number, request, EAGAIN, "too many requests at once"))
        else:
            connection.pending += 1
            self.run(connection, grant())

    def _end_session(self, connection: Connection, number: int) -> None:
        """A session is over. The gate loses its pipes to the worker, where it has no other session there."""
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

    async def _worker(self, connection: Connection, user: str) -> Worker:
        """The worker of a user as he is now, started if there is none. Raises Denied."""
        account = await self._look_up(user, connection)
        reason = self._policy(account, connection, "")
        if account is None or reason:
            raise Denied(EACCES, reason)
        if self.personal:  # what the process has may be more or less than what the account would get today
            account = account._replace(identity=self.own)
        for _ in range(2):  # the first may be about to end, idle
            worker = self.workers.get(account.identity)
            if worker is None or worker.state is State.DONE:
                worker = self._start_worker(account, connection.host)
            try:
                async with asyncio.timeout(START_SECONDS):
                    if await asyncio.shield(worker.proved) and worker.state is not State.DONE:
                        return worker
            except TimeoutError:
                worker.kill("did not start in time")
                raise Denied(ETIMEDOUT, "the worker did not start in time") from None
            if worker.gone.done() and worker.gone.result() == pamsession.REFUSED:
                raise Denied(EACCES, "no PAM session for this user: the daemon's log says why")
        raise Denied(ECONNRESET, "the worker could not be started: the daemon's log says why")

    def _start_worker(self, account: accounts.Account, host: str) -> Worker:
        limits, paths = self.config.limits, self.config.paths
        if len(self.all_workers()) >= limits.workers:
            raise Denied(EAGAIN, "the daemon has as many workers as it may have")
        group = ""
        try:
            if self.groups:
                group = self.groups.worker(account.identity.uid)
            drop = self.drop(account.identity, launch.WORKER_LIMITS, SIGTERM)  # at which it ends its programs, and itself
            drop = drop._replace(group=group, session=self._session(account.name, host))
            worker: Worker = self.start(Worker, account.name, drop, account.name)
        except OSError as fault:
            if self.groups and group:
                self.groups.end(group)
            raise Denied(EAGAIN, f"no new process: {fault.strerror}") from None
        identity = account.identity
        worker.begin(identity, account.name, group)
        self.workers[identity] = worker
        worker.gone.add_done_callback(lambda _: self._worker_gone(worker))
        self._idle(worker)  # whoever asked for it may be gone before it is there
        worker.send(
            ipc.WorkerSetup(
                *identity, self.personal, os.getpid(), account.name, paths.tree, self.config.program_path,
                int(limits.call_timeout * 1000), limits.programs_per_worker, int(limits.resident_idle * 1000),
            )
        )  # fmt: skip
        return worker

    def _session(self, user: str, host: str) -> pamsession.Wanted | None:
        """The PAM session of a worker, if its service asks for any; a user's own daemon has nothing to open one with."""
        service = self.config.authentication.pam_service
        return None if self.personal else pamsession.Wanted(service, user, host, self._keepers.lease)

    def _link(self, gate: Gate, worker: Worker, conn: int, request: int, session: int) -> None:
        """Tell the gate, and give it and the worker two pipes to each other if they have none yet."""
        if gate in worker.gates:
            gate.send(ipc.Attached(conn, request, session, worker.gates[gate]))
            return
        try:
            (worker_reads, gate_writes), (gate_reads, worker_writes) = launch.two_pipes(launch.plain_pipe)
        except OSError:
            raise Denied(EAGAIN, "no descriptors are left") from None
        number = worker.gates[gate] = next(self._numbers)
        worker.send(ipc.Gate(gate.number), (worker_reads, worker_writes))
        gate.send(ipc.Attached(conn, request, session, number), (gate_reads, gate_writes))

    def _idle(self, worker: Worker) -> None:
        """Let a worker end after its idle time, unless somebody is attached to it then."""

        def look() -> None:
            if worker.state is State.NEW and time.monotonic() - worker.started < START_SECONDS:
                self._idle(worker)  # whoever waits for it has the longer patience
            elif not worker.connections and worker.state is not State.DONE:
                self._retire(worker)

        if worker.idle is not None:
            worker.idle.cancel()
        worker.idle = asyncio.get_running_loop().call_later(self.config.limits.worker_idle + 0.1, look)

    def _retire(self, worker: Worker) -> None:
        """Let a worker end that nobody uses, or that is no longer what its user is."""
        if self.workers.get(worker.identity) is worker:
            del self.workers[worker.identity]
        worker.release()
        asyncio.get_running_loop().call_later(START_SECONDS, worker.kill, "")

    def _worker_gone(self, worker: Worker) -> None:
        if self.workers.get(worker.identity) is worker:
            del self.workers[worker.identity]
        for task in list(worker.tasks):
            task.cancel()
        for endpoint in list(worker.endpoints):
            for server in endpoint.servers:
                self.register.end_line(endpoint.lines.get((server.number, worker), 0))
            self._forget_caller(worker, endpoint)
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

    def _forget_caller(self, worker: Worker, endpoint: Endpoint[Worker]) -> None:
        worker.endpoints.discard(endpoint)
        endpoint.callers.discard(worker)
        self.register.release(endpoint)

    # --- endpoints and lines -------------------------------------------------------------------------------------------

    async def _probe(
        self, identity: Identity, quota: Quota, path: str, access: int, inode: tuple[int, int] | None = None
    ) -> Proof:
        """Let a probe try. quota: of whoever it is for, to write a refusal of the policy into the log."""
        if self.own.context and not identity.context:
            return Proof(EACCES, [])  # of whom SELinux knows nothing, nothing can be asked
        async with self._probes.turn(identity.uid):
            proof = await probe(self.drop(identity), self.config.paths.tree, path, access, inode, identity.context)
        if proof.reason and quota.take():
            operation = "serve" if access == os.O_RDONLY else "call"
            self.log.event(
                "info", "refused", operation=operation, uid=identity.uid, endpoint="/" + path, errno=proof.errno,
                reason=proof.reason,
            )  # fmt: skip
        return proof

    def announce(self, connection: Connection, message: ipc.Announce) -> None:
        path, identity = plain_path(message.path), connection.identity
        if identity is None:
            raise Violation("an announcement for nobody")
        if (
            connection.pending + len(connection.announcements) >= wire.LISTENERS_MAX
            or connection.pending >= wire.DECIDING_MAX
        ):
            text = "too many announcements on one connection"
            connection.gate.send(ipc.Refused(message.conn, message.request, EAGAIN, text))
            return
        connection.pending += 1
        self.run(connection, self._announce(connection, identity, message.request, path))

    async def _announce(self, connection: Connection, identity: Identity, request: int, path: str) -> None:
        errno, text, began = 0, "", time.monotonic()
        try:
            if identity.uid in self.daemon_uids | {0, authentication.OVERFLOW_UID}:
                raise Denied(EPERM, "a service needs an account of its own: root and the daemon's accounts can't announce")
            refused, chain, _reason = await self._probe(identity, connection.quota, path, os.O_RDONLY)
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
        self._told("announce", connection, errno, uid=identity.uid, endpoint="/" + path, reason=text or None)

    def _enter(self, connection: Connection, request: int, uid: int, path: str, chain: list[int], began: float) -> str:
        """Enter a server, tell it so, and give its callers lines. began: when its probe did (monotonic seconds).

        Returns a warning, or nothing. Raises Denied.
        """
        endpoint, number = self.register.endpoint(path, chain, uid), next(self._numbers)
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
        connection.becomes_known()
        mode, warning = endpoint.mode, ""
        if mode & 0o060 == 0o060 or mode & 0o006 == 0o006:
            warning = f"mode {mode & 0o777:o}: whoever may call this endpoint may also serve it; take read away from callers"
        gate.send(ipc.Announced(conn, request, number, warning))  # before the lines, which the gate knows by the number
        for worker in list(endpoint.callers):
            self._join(endpoint, server, worker)
        return warning

    def withdraw(self, connection: Connection, message: ipc.Withdraw) -> None:
        if message.announcement in connection.announcements:
            self._withdraw(connection, message.announcement)

    def _withdraw(self, connection: Connection, number: int) -> None:
        endpoint, server = connection.announcements.pop(number)
        endpoint.servers.remove(server)
        for line in [line for (each, _worker), line in endpoint.lines.items() if each == number]:
            self._line_over(line)
        self.register.release(endpoint)
        if connection.quota.take():
            self.log.event("info", "withdraw", conn=connection.number, peer=connection.peer, endpoint="/" + endpoint.path)

    def _line_over(self, number: int) -> None:
        line = self.register.end_line(number)
        if line is not None:
            line.worker.lines -= 1
            line.worker.send(ipc.LineOver(number))

    def _join(self, endpoint: Endpoint[Worker], server: Announcement, worker: Worker) -> None:
        """Make a line between a worker that may call and a server, and tell both."""
        if worker.lines >= self.config.limits.lines_per_worker:
            if worker.quota.take():
                self.log.event("warning", "limit", which="lines_per_worker", user=worker.user, endpoint="/" + endpoint.path)
            return
        try:
            number, write, read = self.register.make_line(endpoint, server, worker, (*worker.identity, worker.user))
        except OSError as fault:
            if worker.quota.take():
                self.log.event("error", "warning", text=f"no line: {fault}", endpoint="/" + endpoint.path)
            return
        worker.lines += 1
        worker.send(ipc.Line(number, *endpoint.key[:2]), (write, read))
        server.tell(number)

    def lines_wanted(self, worker: Worker, message: ipc.LinesWanted) -> None:
        path, inode = plain_path(message.path), (message.dev, message.ino)
        if worker.waiting >= wire.PROBING_MAX or len(worker.endpoints) >= self.config.limits.lines_per_worker:
            worker.send(ipc.Lines(*inode, EAGAIN))
            return
        worker.waiting += 1
        self.run(worker, self._lines_wanted(worker, path, inode))

    async def _lines_wanted(self, worker: Worker, path: str, inode: tuple[int, int]) -> None:
        began = time.monotonic()
        try:
            errno, chain, _reason = await self._probe(worker.identity, worker.quota, path, os.O_WRONLY, inode)
        finally:
            worker.waiting -= 1
        if worker.state is State.DONE:
            ipc.close_all(chain)
            return
        endpoint = None if errno else self.register.endpoint(path, chain, worker.identity.uid)
        if endpoint is not None:
            endpoint.callers.add(worker)
            worker.endpoints.add(endpoint)
            if endpoint.changed >= began:
                self._doubt(worker, endpoint)
            for server in endpoint.servers:
                if (server.number, worker) not in endpoint.lines:
                    self._join(endpoint, server, worker)
        elif not errno:
            errno = EAGAIN
        worker.send(ipc.Lines(*inode, errno))

    def line_gone(self, worker: Worker, message: ipc.LineGone) -> None:
        line = self.register.lines.get(message.line)
        if line is not None and line.worker is worker:
            self.register.end_line(message.line)
            worker.lines -= 1

    def is_live(self, worker: Worker, message: ipc.IsLive) -> None:
        worker.send(ipc.Live(message.request, self.register.live(message.dev, message.ino)))

    # --- what is looked at from time to time ---------------------------------------------------------------------------

    def revoke(self) -> None:
        """Where attributes of an endpoint or of a directory above it changed, or the policy, doubt who calls and serves."""
        policy = selinux.status() if self.own.context else b""
        for endpoint in self.register.endpoints.values():
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
            self.run(whose, self._settle(whose))
        whose.doubted.add(endpoint)

    async def _settle(self, whose: Connection | Worker) -> None:
        calls, identity = isinstance(whose, Worker), whose.identity
        while whose.doubted and identity is not None:
            endpoint = next(iter(whose.doubted))
            changed = endpoint.changed
            access = os.O_WRONLY if calls else os.O_RDONLY
            errno, chain, _reason = await self._probe(identity, whose.quota, endpoint.path, access, endpoint.key[:2])
            ipc.close_all(chain)
            if errno == EAGAIN:
                await asyncio.sleep(1.0)  # there was no process for it
            elif endpoint.changed == changed:  # else it is doubted anew
                whose.doubted.discard(endpoint)
                if isinstance(whose, Worker):
                    self._settled_caller(whose, endpoint, errno)
                elif errno and any(each is endpoint for each, _server in whose.announcements.values()):
                    self._told("announce", whose, errno, uid=identity.uid, endpoint="/" + endpoint.path, reason="no longer")
                    self.connection_over(whose)  # the client library comes again, and is told why

    def _settled_caller(self, worker: Worker, endpoint: Endpoint[Worker], errno: int) -> None:
        """Kill a worker that may not call and could, since it has a line; one that has none has to ask again."""
        lines = [(server, endpoint.lines.get((server.number, worker), 0)) for server in endpoint.servers]
        if errno and any(number for _server, number in lines):
            worker.kill(f"may no longer call /{endpoint.path} (errno {errno})")
        elif errno:
            self._forget_caller(worker, endpoint)
        elif worker.state is not State.DONE:
            for server, number in lines:  # with the endpoint's label, by which the kernel goes; calls may finish
                if number and self.register.lines[number].label != endpoint.label:
                    self._line_over(number)
                    self._join(endpoint, server, worker)

    async def refresh(self) -> None:
        """Look afresh at who the users with workers are; a worker that is not what its user is now ends."""
        for worker in self.all_workers() if not self.personal else ():
            with suppress(OSError):  # a directory service that does not answer says nothing about anybody
                account = await accounts.look_up(worker.user, self.own.context)
                if account is None or account.identity != worker.identity:
                    self._expire(worker, float("inf"))
                    self._retire(worker)

    def expire(self) -> None:
        """End sessions that are too old."""
        now = time.monotonic()
        for worker in self.all_workers():
            self._expire(worker, now)

    def _expire(self, worker: Worker, now: float) -> None:
        for connection in list(worker.connections):
            for number, session in list(connection.sessions.items()):
                if session.worker is worker and session.expires < now:
                    connection.gate.send(ipc.SessionOver(connection.number, number))
                    self._end_session(connection, number)

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
        asyncio.get_running_loop().remove_reader(self.register.inotify)
        self.hang_ups.close()
        self.register.close()
