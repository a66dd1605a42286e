"""Authentications: who is at the other end of a connection, as PAM (in a child) and the accounts say."""

import asyncio
import os
import socket
import time
from errno import EACCES, EAGAIN, EOPNOTSUPP, ETIMEDOUT
from functools import partial
from typing import TYPE_CHECKING

from srpcd import ipc, selinux
from srpcd.monitor import accounts, authentication
from srpcd.monitor.authentication import Afid, PamChild
from srpcd.monitor.connections import NO_ROOM, Connection
from srpcd.monitor.conversations import Conversation, Conversations
from srpcd.monitor.credentials import LACKS_GROUPS, Credentials, has_groups, worker_identity
from srpcd.monitor.faults import Denied
from srpcd.monitor.launch import Drop
from srpcd.monitor.limiter import FairLimiter
from srpcd.monitor.requests import Violation, plain_path
from srpcd.wire import limits as wire

if TYPE_CHECKING:
    from srpcd.monitor.monitor import Monitor


GAVE_WAY = "no answer came for a while, and others wait to authenticate: try again"
"""What is said to a client whose conversation was evicted."""


class Logins:
    """Handlers of the requests about authentications (`requests`)."""

    def __init__(self, monitor: "Monitor") -> None:
        self._monitor = monitor
        self._failures = authentication.Failures()
        # Local users whom the kernel vouches for do not wait behind unauthenticated clients that type no password.
        self._pam = {each: Conversations(self._failures.suspicion) for each in ("pam", "peer")}
        self._pam_context = selinux.with_domain(monitor.own.context, selinux.AUTHENTICATION)
        self._look_ups = FairLimiter(wire.LOOK_UPS_MAX, wire.LOOK_UPS_MAX // 2)

    def authenticate(self, connection: Connection, message: ipc.Authenticate) -> None:
        if message.afid in connection.afids or message.mechanism not in self._pam:
            raise Violation("an afid twice, or a mechanism that there is none of")
        if len(connection.afids) >= wire.AFIDS_MAX or connection.authenticating or connection.failures >= wire.FAILURES_MAX:
            text = "one authentication at a time on a connection, and a bounded number of afids and failures"
            connection.gate.send(ipc.Verdict(message.conn, message.afid, EAGAIN, text))
            return
        afid = connection.afids[message.afid] = Afid(message.uname, plain_path(message.aname))
        connection.authenticating = afid
        afid.task = self._monitor.run(connection, self._authenticate(connection, afid, message))

    async def _authenticate(self, connection: Connection, afid: Afid, message: ipc.Authenticate) -> None:
        user, by_password = afid.uname, message.mechanism == "pam"
        process = None if by_password else connection.identity
        errno, told, reason, answered = EACCES, authentication.REFUSED, "abandoned", 0
        try:
            if not by_password and process is None:
                raise Denied(EOPNOTSUPP, "the mechanism peer is for the local socket")
            async with self._failures.attempt(user, connection.origin.groups) as attempt:
                attempt.begun = True
                connection.failures += 1
                if process is not None:  # who it is not can be told without PAM
                    afid.proved = Credentials(user, process.uid, process)
                    reason = await self._refusal(connection, afid.proved)
                if by_password or not reason:
                    outcome = await self._converse(connection, message)
                    reason, answered = outcome.reason, outcome.answered
                    if not outcome.errno:
                        afid.proved = afid.proved or Credentials(user, outcome.uid, None)
                        reason = await self._refusal(connection, afid.proved)
                if not reason and afid.proved is not None:
                    attempt.accepted = True
                    connection.failures -= 1
                    if not connection.becomes_known(f"uid:{afid.proved.uid}"):
                        raise Denied(EAGAIN, NO_ROOM)
                    errno, told = 0, ""
            if errno and by_password:
                step = self._monitor.config.authentication.refusal
                await asyncio.sleep(authentication.deadline(answered / 1e9, step) - time.monotonic())
        except Denied as denied:
            errno, told, reason = denied.errno, denied.message, denied.message
        finally:
            if connection.authenticating is afid:  # and not the next one's, after this one was clunked
                connection.authenticating = None
            aname = "/" + afid.aname
            facts = {"user": user, "mechanism": message.mechanism, "aname": aname, "reason": reason or None}
            self._monitor.told("authentication", connection, errno, "accepted", **facts)
            if errno and connection.afids.get(message.afid) is afid:
                del connection.afids[message.afid]
            if connection.failures >= wire.FAILURES_MAX:
                about = {"which": "failed authentications", "peer": connection.peer, "user": user}
                self._monitor.log.peer_event(connection.log_origin, "warning", "limit", **about)
                last = ipc.Verdict(connection.number, 0, EACCES, "too many failed logins on this connection")
                asyncio.get_running_loop().call_soon(connection.gate.send, last)  # after the answer, which is sent below
                asyncio.get_running_loop().call_later(1.0, self._monitor.connection_over, connection)
        if not errno:
            afid.expires = time.monotonic() + self._monitor.config.authentication.afid_age
        connection.gate.send(ipc.Verdict(connection.number, message.afid, errno, told))

    async def look_up(self, user: str, connection: Connection) -> accounts.Account | None:
        try:
            async with self._look_ups.turn(connection.origin.groups):
                return await accounts.look_up(user, self._monitor.own.context)
        except OSError as fault:
            raise Denied(EAGAIN, f"no look-up of accounts at the moment: {fault.strerror or fault}") from None

    async def _refusal(self, connection: Connection, credentials: Credentials) -> str:
        """Why the credentials are refused; empty if they are not. Raises Denied, EAGAIN."""
        account = await self.look_up(credentials.user, connection)
        try:
            self.admit(account, connection, credentials)
        except Denied as denied:
            return denied.message
        return ""

    def admit(self, account: accounts.Account | None, connection: Connection, credentials: Credentials) -> accounts.Account:
        """Return the account with the identity that a worker for these credentials has.

        Args:
            account: what a look-up of `credentials.user` has just found.

        Raises:
            Denied: EACCES, where the account may not be used, or is not the one that was proved.
        """
        monitor = self._monitor
        settings = monitor.config.authentication
        reason = authentication.policy(account, settings, monitor.daemon_uids, connection.identity is None)
        if account is None or reason:
            raise Denied(EACCES, reason)
        if not monitor.personal:
            return account._replace(identity=worker_identity(account, credentials, settings))
        if account.identity.uid != monitor.own.uid:
            raise Denied(EACCES, "this daemon serves the user who started it, and nobody else")
        if credentials.process and not has_groups(credentials.process, monitor.own, settings):
            raise Denied(EACCES, LACKS_GROUPS)
        # A personal daemon can start no worker with other ids than its own, whatever groups the account has by now.
        return account._replace(identity=worker_identity(account._replace(identity=monitor.own), credentials, settings))

    async def _converse(self, connection: Connection, message: ipc.Authenticate) -> ipc.Outcome:
        """Let a child authenticate. Raises Denied: EAGAIN, ETIMEDOUT."""
        child: PamChild | None = None
        conversation: Conversation | None = None
        seconds = self._monitor.config.authentication.timeout
        try:
            async with asyncio.timeout(None) as timeout:
                conversation = Conversation(self._pam[message.mechanism], connection.origin.groups, seconds, timeout)
                await conversation.begun.wait()
                drop = Drop(None, {}, not self._monitor.personal, context=self._pam_context)
                child = self._monitor.start(PamChild, message.uname, drop, log_origin=connection.log_origin)
                child.conversation = conversation
                conversation.proceed = partial(child.send, ipc.Proceed())
                self._introduce(connection, message, child)
                await asyncio.shield(child.gone)
                return child.result or ipc.Outcome(EACCES, "the authentication child died", 0, 0)
        except TimeoutError:
            if conversation is not None and conversation.gave_way:
                raise Denied(EAGAIN, GAVE_WAY) from None
            raise Denied(ETIMEDOUT, "authentication was not finished in time") from None
        except OSError as fault:
            raise Denied(EAGAIN, f"no authentication at the moment: {fault.strerror}") from None
        finally:
            if conversation is not None:
                conversation.leave()
                if child is None:
                    conversation.over()
                else:  # what is killed may still be at work
                    over = conversation.over
                    child.kill("")
                    child.gone.add_done_callback(lambda _: over())

    def _introduce(self, connection: Connection, message: ipc.Authenticate, child: PamChild) -> None:
        """Tell the child whom to authenticate, and let it and the gate talk to each other."""
        service = self._monitor.config.authentication.pam_service
        child_end, gate_end = (each.detach() for each in ipc.socket_pair(socket.SOCK_SEQPACKET))
        setup = ipc.AuthSetup(self._pam_context, os.getpid(), message.mechanism, service, message.uname, connection.host)
        child.send(setup, (child_end,))
        connection.gate.send(ipc.Conversation(connection.number, message.afid), (gate_end,))

    def waiting(self, child: PamChild, _message: ipc.Waiting) -> None:
        child.conversation.waiting()

    def answered(self, child: PamChild, _message: ipc.Answered) -> None:
        child.conversation.answered()

    def look(self) -> None:
        """Let conversations that have been silent for long give way; to be called about once a second."""
        for conversations in self._pam.values():
            conversations.look()

    def outcome(self, child: PamChild, message: ipc.Outcome) -> None:
        child.result = message
        child.release()

    def forget_afid(self, connection: Connection, message: ipc.ForgetAfid) -> None:
        afid = connection.afids.pop(message.afid, None)
        if afid and afid.task:
            afid.task.cancel()
            if connection.authenticating is afid:
                connection.authenticating = None
