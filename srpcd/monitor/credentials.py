"""What an authentication has proved, and which identity a worker gets from that.

A name is no identity: an account can be deleted, made anew, or get another uid while a connection lives. So an afid and
its sessions hold the uid that was proved, and `worker_identity` compares it with the account as it is now, at the end of
each authentication and at each attach, resume and refresh.

The mechanism `peer` proves a process, and a process may have fewer groups than its account (setgroups(2), a sandbox).
With `peer_groups = "process"` its worker gets those groups that both have, so no process gets a group back by a call.
"""

from errno import EACCES
from typing import NamedTuple

from srpcd.config import Authentication as Settings
from srpcd.monitor.accounts import Account
from srpcd.monitor.faults import Denied
from srpcd.monitor.launch import Identity

LACKS_GROUPS = "the process lacks groups that this daemon has, and would get them from it"
"""Why a personal daemon, all of whose children have its own ids, refuses a process of its user."""


class Credentials(NamedTuple):
    """What was proved of the user of an afid and of its sessions.

    user: the name that the client gave. uid: the account's uid at that time. process: ids of the connecting process, from
    the kernel, for the mechanism `peer`; None where PAM has proved the user.
    """

    user: str
    uid: int
    process: Identity | None


def worker_identity(account: Account, credentials: Credentials, settings: Settings) -> Identity:
    """Return the identity of the worker that serves these credentials, by the account as it is now.

    Raises:
        Denied: EACCES, where the account is not the one that was proved, or the process may not have it.
    """
    identity, process = account.identity, credentials.process
    if identity.uid != credentials.uid:
        which = "that its user proved" if process is None else "of the connecting process, by the kernel"
        raise Denied(EACCES, f"the account's uid is {identity.uid}, and not the {credentials.uid} {which}")
    if process is None:
        return identity
    if not account.first_of_uid and account.name not in settings.peer_names:
        text = f"another account comes first for uid {identity.uid}, and authentication.peer_names does not name this one"
        raise Denied(EACCES, text)
    if settings.peer_groups == "account":
        return identity
    groups = tuple(group for group in identity.groups if group in process.groups)
    if identity.gid in process.groups:
        return identity._replace(groups=groups)
    if process.gid in groups:
        return identity._replace(gid=process.gid, groups=groups)
    text = f"the process has neither the account's primary group {identity.gid} nor another of its groups as effective gid"
    raise Denied(EACCES, text)


def has_groups(process: Identity, other: Identity, settings: Settings) -> bool:
    """Whether a process has all groups of another identity, where that is asked for."""
    return settings.peer_groups == "account" or {other.gid, *other.groups} <= set(process.groups)


def covers(account: Account | None, identity: Identity) -> bool:
    """Whether the account, as it is now, still has all of the ids with which a worker was started."""
    if account is None:
        return False
    now = account.identity
    return (now.uid, now.context) == (identity.uid, identity.context) and {identity.gid, *identity.groups} <= set(now.groups)
