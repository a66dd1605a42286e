"""Who a user is, and in which SELinux context, looked up in a child: a directory service must not block the monitor."""

import os
import pwd
from typing import NamedTuple

from srpcd import ipc
from srpcd.monitor import contexts
from srpcd.monitor.forked import ask
from srpcd.monitor.launch import Drop, Identity

SECONDS = 10.0
"""How long a directory service may take."""


class Account(NamedTuple):
    """login: whether the shell is one of /etc/shells. unmapped: why there is no SELinux context to run in; else empty.

    first_of_uid: whether a look-up of the uid gives this name: several accounts may have one uid, and the kernel knows no
    names.
    """

    name: str
    identity: Identity
    login: bool
    unmapped: str
    first_of_uid: bool


class _Found(ipc.Message):
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    context: str
    login: bool
    unmapped: str
    first_of_uid: bool


async def look_up(name: str, daemon: str) -> Account | None:
    """The account of a name; None where there is none. Raises OSError where that could not be found out in time.

    daemon: its own SELinux context; empty: workers need none.
    """
    try:
        data, _fds = await ask(lambda end: end.send(_answer(name, daemon).pack()), Drop(None, {}), SECONDS)
    except TimeoutError:
        raise OSError("the account database does not answer") from None
    if not data:
        raise OSError("the look-up of an account died")
    found = ipc.Message.unpack(data)
    if not isinstance(found, _Found) or not found.name:
        return None
    identity = Identity(found.uid, found.gid, found.groups, found.context)
    return Account(found.name, identity, found.login, found.unmapped, found.first_of_uid)


def _answer(name: str, daemon: str) -> _Found:
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: a NUL in it
        return _Found("", 0, 0, (), "", False, "", False)
    groups = tuple(sorted(set(os.getgrouplist(entry.pw_name, entry.pw_gid))))
    context, unmapped = "", ""
    if daemon:
        try:
            context = contexts.worker_context(entry.pw_name, daemon)
        except contexts.Unmapped as fault:
            unmapped = str(fault)
    login, first = _may_log_in(entry.pw_shell), _first_name(entry.pw_uid) == entry.pw_name
    return _Found(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, context, login, unmapped, first)


def _first_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _may_log_in(shell: str) -> bool:
    if os.path.basename(shell) in ("nologin", "false"):
        return False
    try:
        with open("/etc/shells", encoding="utf-8", errors="replace") as file:
            return (shell or "/bin/sh") in (line.strip() for line in file)
    except OSError:
        return False
