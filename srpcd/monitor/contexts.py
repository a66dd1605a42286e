"""Which SELinux context a user's worker runs in: what the policy's configuration says, by libselinux, in the look-up child.

The administrator says it where he says it for logins: `semanage login` maps the account to an SELinux user and a level
(semanage-login(8)), the line for the daemon's domain in `default_contexts` gives each role its worker domain
(default_contexts(5)), and a file in `logins/` may name others for the service "srpcd" alone. Nothing is invented here, the
level included; what does not come out as the context of a worker is refused.

libselinux reads files of the administrator's only; it is loaded in the child, so that the monitor never maps it.
"""

import ctypes
import os

from srpcd import selinux

SERVICE = b"srpcd"


class Unmapped(Exception):
    """There is no context in which the user's worker may run; the message says why, for the log."""


def worker_context(user: str, daemon: str) -> str:
    """The context of an account's worker. daemon: the daemon's own context, the one that it is reached from.

    Raises Unmapped, for whatever goes wrong.
    """
    try:
        context = selinux.canonical(_default_context(user, daemon))
    except (OSError, ValueError) as fault:
        raise Unmapped(f"no SELinux context: {fault}") from None
    domain = selinux.domain(context)
    # Without a line for our domain libselinux takes failsafe_context: an administrator's shell.
    if not (domain.startswith("srpc_") and domain.endswith("_worker_t")):
        raise Unmapped(
            f"no SELinux context: {context} is no worker's; default_contexts needs a line for {selinux.domain(daemon)} "
            f"with a worker domain for a role of this SELinux user"
        )
    return context


def _default_context(user: str, daemon: str) -> str:
    library = ctypes.CDLL("libselinux.so.1", use_errno=True)
    library.selinux_usersconf_path.restype = ctypes.c_char_p
    # Where it can't read this one, it would take the account's name for an SELinux user's.
    os.close(os.open(library.selinux_usersconf_path(), os.O_RDONLY | os.O_CLOEXEC))
    selinux_user, level, context = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_char_p()

    def call(name: str, *arguments: object) -> None:
        ctypes.set_errno(0)
        if getattr(library, name)(*arguments) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"{name}: {os.strerror(errno) if errno else 'failed'}")

    call("getseuser", user.encode(), SERVICE, ctypes.byref(selinux_user), ctypes.byref(level))
    if level.value is None:
        call("get_default_context", selinux_user, daemon.encode(), ctypes.byref(context))
    else:
        call("get_default_context_with_level", selinux_user, level, daemon.encode(), ctypes.byref(context))
    return (context.value or b"").decode()
