"""Compare afids, sessions and workers with the accounts as they are now, and end those that do not match.

Attach and resume compare too, but a session that goes on calling does neither. And an account that was deleted and made
anew with the same name and uid can't be told from the old one, except by a look in between.
"""

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from srpcd.monitor import accounts
from srpcd.monitor.children import Session
from srpcd.monitor.connections import Connection
from srpcd.monitor.credentials import covers
from srpcd.monitor.faults import Denied
from srpcd.monitor.requests import State

if TYPE_CHECKING:
    from srpcd.monitor.monitor import Monitor


async def refresh(monitor: "Monitor") -> None:
    """Look up each account once that an accepted afid, a session or a worker belongs to, and compare all of them with it."""
    if monitor.personal:  # its workers have the daemon's own ids, which do not change
        return
    names = {worker.user for worker in monitor.all_workers()}
    for connection in monitor.connections():
        names |= {afid.uname for afid in connection.afids.values() if afid.expires > time.monotonic()}
        names |= {session.credentials.user for session in connection.sessions.values()}
    for name in names:
        with suppress(OSError):  # a directory service that does not answer says nothing about any account
            _compare(monitor, name, await accounts.look_up(name, monitor.own.context))


def _compare(monitor: "Monitor", name: str, account: accounts.Account | None) -> None:
    for connection in monitor.connections():
        for afid in connection.afids.values():
            proved = afid.proved if afid.expires and afid.uname == name else None
            if proved and (account is None or account.identity.uid != proved.uid):
                afid.expires = 0.0
                _log(monitor, "afid", connection, name, "another uid" if account else "no such account")
        for number, session in list(connection.sessions.items()):
            if session.credentials.user == name and (reason := _mismatch(monitor, account, connection, session)):
                _log(monitor, "session", connection, name, reason)
                monitor.session_over(connection, number)
    for worker in monitor.all_workers():
        if worker.user == name and worker.state is not State.DONE and not covers(account, worker.identity):
            monitor.retire(worker)


def _mismatch(monitor: "Monitor", account: accounts.Account | None, connection: Connection, session: Session) -> str:
    """Return why a session may not go on; empty if it may."""
    try:
        identity = monitor.logins.admit(account, connection, session.credentials).identity
    except Denied as denied:
        return denied.message
    return "" if identity == session.worker.identity else "other groups, or another SELinux context"


def _log(monitor: "Monitor", what: str, connection: Connection, user: str, reason: str) -> None:
    about = {"what": what, "peer": connection.peer, "user": user, "reason": reason}
    monitor.log.peer_event(f"user:{user}", "info", "revoked", conn=connection.number, **about)
