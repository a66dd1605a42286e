"""Who a user is: name, uid, groups, shell, looked up afresh in a child (a directory service must not block the monitor)."""

import asyncio
import os
import pwd
import signal
import socket
from typing import NamedTuple

from srpcd import ipc
from srpcd.monitor import launch, probe

SECONDS = 10.0
"""How long a directory service may take."""


class Account(NamedTuple):
    """identity: uid, gid and supplementary groups. shell: whether it is one of /etc/shells (`login`)."""

    name: str
    identity: launch.Identity
    login: bool


class _Found(ipc.Message):
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    login: bool


async def look_up(who: str | int) -> Account | None:
    """The account of a name or uid; None where there is none, or where the look-up failed or took too long."""
    pid, pidfd, sock = launch.run_forked(lambda end: _answer(end, who), launch.Drop(None, {}))
    try:
        sock.setblocking(False)
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 512 * 1024), SECONDS)
        found = ipc.Message.unpack(data)
    except (TimeoutError, ipc.MessageError, OSError):
        return None
    finally:
        sock.close()
        await probe.reap(pid, pidfd)
    if not isinstance(found, _Found):
        return None
    return Account(found.name, launch.Identity(found.uid, found.gid, found.groups), found.login)


def _answer(end: socket.socket, who: str | int) -> None:
    signal.alarm(int(SECONDS) + 1)
    entry = pwd.getpwnam(who) if isinstance(who, str) else pwd.getpwuid(who)  # KeyError ends the child: not found
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
