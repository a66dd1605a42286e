"""What a freshly exec'd process does before anything else: close itself off, and prove that it dropped what it had.

`srpcd.monitor.launch` drops the privileges before the exec; this module is the other half, in the new program. It does
not ask whether something changed but whether everything *is* as told (OpenSSH's `permanently_set_uid` tries to regain
what was dropped, and so do we). Any surprise raises `NotConfined`, and the process ends before it reads a request.
"""

import os

from srpcd import libc

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE = 1, 3, 4
TRACEABLE = 1
"""Of PR_GET_DUMPABLE. 0 and 2 (fs.suid_dumpable, as systemd-coredump sets it): not by processes of the same user."""
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39

_prctl = libc.function("prctl", libc.Int, libc.Int, *[libc.UnsignedLong] * 4)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class NotConfined(Exception):
    """The process is not what it was told to be."""


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with the unused arguments 0, as the kernel demands. Raises OSError."""
    result = _prctl(option, value, 0, 0, 0)
    if result < 0:
        libc.failed(f"prctl({option})")
    return result


def status() -> "dict[str, str]":
    """The fields of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def make_undumpable() -> None:
    """No core dump, no ptrace, no /proc/PID/mem by processes of the same uid."""
    prctl(PR_SET_DUMPABLE, 0)


def close_off() -> bool:
    """Close this process off from other processes of its user, and take its real group for all. To be called first.

    Returns whether it could be traced until now: it must not, see `srpcd.monitor.launch.become`. Raises OSError.
    """
    traceable = prctl(PR_GET_DUMPABLE) == TRACEABLE
    make_undumpable()
    gid = os.getgid()
    os.setresgid(gid, gid, gid)
    make_undumpable()  # once more: a change of ids sets it anew (fs.suid_dumpable)
    return traceable


def context() -> str:
    """This thread's SELinux context; where SELinux is off what another module says, or OSError (EINVAL: there is none)."""
    fd = os.open("/proc/thread-self/attr/current", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).rstrip(b"\0\n").decode(errors="replace")
    finally:
        os.close(fd)


def check(what: str, found: object, wanted: object) -> None:
    """Raises NotConfined where the two differ."""
    if found != wanted:
        raise NotConfined(f"{what}: {found}, not {wanted}")


def end_with(parent: int, signal: int) -> None:
    """Let the kernel send `signal` when the monitor ends; for the exec into another SELinux domain has cleared that.

    parent: the monitor's process id, as it told us. Raises NotConfined where it has ended already, OSError.
    """
    prctl(PR_SET_PDEATHSIG, signal)
    check("the monitor's process id", os.getppid(), parent)  # after the line above: from here on no end is missed


def prove_context(told: str) -> None:
    """Check that this process runs in exactly the SELinux context that it was told; empty: there is none to be in.

    Raises NotConfined, OSError.
    """
    if told:
        check("SELinux context", context(), told)


def prove(uid: int, gid: int, groups: "Iterable[int]", selinux: str, personal: bool, traceable: bool) -> None:
    """Check that this process is exactly who it was told to be, and can't become anybody else.

    uid, gid, groups, selinux: as in `WorkerSetup`, the last one its `context`. personal: the daemon runs as the user
    itself, so nothing was dropped; the capability bounding set is then whatever its processes have, and they may trace
    each other. traceable: what `close_off` returned.
    Raises NotConfined.
    """
    prove_context(selinux)
    if not personal:
        check("traceable by its user before its first instruction", traceable, False)
    check("dumpable", prctl(PR_GET_DUMPABLE), 0)
    check("user ids", os.getresuid(), (uid, uid, uid))
    check("group ids", os.getresgid(), (gid, gid, gid))
    check("supplementary groups", sorted(os.getgroups()), sorted(groups))
    if uid == 0:
        raise NotConfined("root is nobody to run as")
    facts = status()
    # The file system ids are a fourth kind that no getter tells; /proc does.
    check("user ids in /proc", facts["Uid"].split(), [str(uid)] * 4)
    check("group ids in /proc", facts["Gid"].split(), [str(gid)] * 4)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if not (personal and name == "CapBnd"):
            check(name, int(facts[name], 16), 0)
    check("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS), 1)
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise NotConfined("uid 0 could be regained")
