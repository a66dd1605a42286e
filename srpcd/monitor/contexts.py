"""Which SELinux context a user's worker runs in: user and level as for logins, the role by one rule.

The administrator says who is who where he says it for logins: `semanage login` maps the account to an SELinux user and a
level (semanage-login(8)); a file in `logins/` may name others for the service "srpcd" alone. Of that SELinux user's roles
the first of `ROLES` is taken, the one with the least privilege, and its worker's domain with it. If the kernel does not
know that context there is no worker: the next role would be more than what is meant. The administrator can name another
domain in `contexts/users/NAME`, in a line for the daemon's domain (user_contexts(5)); the first one there counts, and no
other. (libselinux takes the next where one is not valid, in the end that of an administrator's shell: so it is not asked.)

libselinux reads files of the administrator's only; it is loaded in the look-up child, so that the monitor never maps it.
"""

import ctypes
import os
from contextlib import suppress
from errno import EAGAIN, EINVAL

from srpcd import selinux

ROLES = ("user", "staff", "sysadm", "unconfined")
"""Of `NAME_r`, in this order; a login in it is in the domain `NAME_t`, its worker in `srpc_NAME_worker_t`."""

_TRIES = 3


class Unmapped(Exception):
    """There is no context in which the user's worker may run; the message says why, for the log."""


def worker_context(user: str, daemon: str) -> str:
    """The context of an account's worker. daemon: the daemon's own context.

    Raises Unmapped, for whatever goes wrong.
    """
    try:
        selinux_user, level, directory = _mapping(user)
        for _ in range(_TRIES):
            before = selinux.status()
            role = _configured(os.path.join(directory, selinux_user), daemon) or _role(selinux_user, level)
            context = _canonical(selinux_user, role, level)
            if selinux.status() == before:
                break
        else:  # of two policies each may have said no to what the other one has
            raise BlockingIOError(EAGAIN, "the policy is being changed")
    except (OSError, ValueError) as fault:
        raise Unmapped(f"no SELinux context: {fault}") from None
    domain = selinux.domain(context)
    if not (domain.startswith("srpc_") and domain.endswith("_worker_t")):
        raise Unmapped(f"no SELinux context: {selinux_user}:{role}:{level} is not valid, or no worker's")
    return context


def _mapping(user: str) -> tuple[str, str, str]:
    """SELinux user; level, empty where the policy has none; directory of SELinux users' own contexts. Raises OSError."""
    library = ctypes.CDLL("libselinux.so.1", use_errno=True)
    for name in ("selinux_usersconf_path", "selinux_user_contexts_path"):
        getattr(library, name).restype = ctypes.c_char_p
    # Where it can't read this one, it would take the account's name for an SELinux user's.
    os.close(os.open(library.selinux_usersconf_path(), os.O_RDONLY | os.O_CLOEXEC))
    selinux_user, level = ctypes.c_char_p(), ctypes.c_char_p()
    if library.getseuser(user.encode(), b"srpcd", ctypes.byref(selinux_user), ctypes.byref(level)) != 0:
        raise OSError(ctypes.get_errno(), "the SELinux user can't be found out")
    return (
        (selinux_user.value or b"").decode(),
        (level.value or b"").decode(),
        os.fsdecode(library.selinux_user_contexts_path()),
    )


def _configured(file: str, daemon: str) -> str:
    """Role and type that a file of `contexts/users` names for us, else empty. Raises OSError where it can't be read."""
    with suppress(FileNotFoundError), open(file, encoding="utf-8") as lines:
        for line in lines:
            words = [each.split(":")[:2] for each in line.split()]
            if len(words) > 1 and words[0] == daemon.split(":")[1:3]:
                return ":".join(words[1])
    return ""


def _role(selinux_user: str, level: str) -> str:
    """Role and type of a worker of this SELinux user. Raises OSError."""
    for name in ROLES:
        if _canonical(selinux_user, f"{name}_r:{name}_t", level):  # he has the role: this is the context of its logins
            return f"{name}_r:srpc_{name}_worker_t"
    raise OSError(EINVAL, f"{selinux_user} has, at level {level or 'none'}, none of the roles {', '.join(ROLES)}")


def _canonical(*parts: str) -> str:
    """A context as the kernel writes it; empty where the policy does not know it. Raises OSError."""
    try:
        return selinux.canonical(":".join(filter(None, parts)))
    except OSError as fault:
        if fault.errno != EINVAL:
            raise
        return ""
