"""Which local processes and files a client trusts: root's and its own user's, where the kernel can tell whose they are."""

import os

OVERFLOW_UID = 65534
"""What the kernel uses where nothing else is configured (DEFAULT_OVERFLOWUID)."""

_SETTING = "/proc/sys/kernel/overflowuid"


def overflow_uid() -> int:
    """The uid that stands for every uid that this user namespace does not map (user_namespaces(7))."""
    try:
        with open(_SETTING, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return OVERFLOW_UID


def distrust(uid: int) -> str:
    """Why a process or file of this uid is not trusted, as the end of a sentence about it; empty if it is trusted.

    The overflow uid is not, also where it is this process's own: inside a user namespace any user's socket has it.
    """
    if uid == 0:  # the usual case; a service in a domain of SELinux's may not read the kernel's settings
        return ""
    if uid == overflow_uid():
        return (
            f"has uid {uid}, which stands for every uid that is not mapped: inside a user namespace that "
            "does not map the server's uid nothing tells whose it is; map that uid (and root's), connect from outside, or "
            "use TLS"
        )
    if uid != os.geteuid():
        return f"belongs to uid {uid}, and only root or you may serve it"
    return ""
