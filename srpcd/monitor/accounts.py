"""Who a user is: name, uid, groups, shell, looked up afresh in a child (a directory service must not block the monitor)."""

import os
import pwd
import socket
from typing import NamedTuple

from srpcd import ipc
from srpcd.monitor.forked import ask
from srpcd.monitor.launch import Drop, Identity

SECONDS = 10.0
"""How long a directory service may take."""


class Account(NamedTuple):
    """identity: uid, gid and supplementary groups. login: whether the shell is one of /etc/shells."""

    name: str
    identity: Identity
    login: bool


class _Found(ipc.Message):
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    login: bool


async def look_up(name: str) -> Account | None:
    """The account of a name; None where there is none. Raises OSError where that could not be found out in time."""
    try:
        data, _fds = await ask(lambda end: _answer(end, name), Drop(None, {}), SECONDS)
    except TimeoutError:
        raise OSError("the account database does not answer") from None
    if not data:
        raise OSError("the look-up of an account died")
    found = ipc.Message.unpack(data)
    if not isinstance(found, _Found) or not found.name:
        return None
    return Account(found.name, Identity(found.uid, found.gid, found.groups), found.login)


def _answer(end: socket.socket, name: str) -> None:
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: a NUL in it
        end.send(_Found("", 0, 0, (), False).pack())
        return
    groups = sorted(set(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    end.send(_Found(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups), _may_log_in(entry.pw_shell)).pack())


def _may_log_in(shell: str) -> bool:
    if os.path.basename(shell) in ("nologin", "false"):
        return False
    try:
        with open("/etc/shells", encoding="utf-8", errors="replace") as file:
            return (shell or "/bin/sh") in (line.strip() for line in file)
    except OSError:
        return False
