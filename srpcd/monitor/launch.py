"""Start other processes: fork, drop everything, exec a fresh interpreter.

The order of the steps in `become` is the substance of this file. A step that fails ends the child, before the exec:
nothing is logged and passed. The other half, the proof, is `srpcd.confine` in the new program.
"""

import _signal  # type: ignore[import-not-found]  # without the enums of `signal`: each page touched after a fork is copied
import ctypes
import fcntl
import os
import platform
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from errno import ENOSYS
from typing import NamedTuple, NoReturn

from srpcd import confine, selinux
from srpcd.monitor import cgroups, pamsession
from srpcd.passing import refuse_descriptors

CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_AUDIT_WRITE = 5, 6, 7, 8, 29
KEPT = (CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_AUDIT_WRITE)
"""What the monitor keeps: to end workers, to become users, to empty their bounding sets, to let PAM write its records."""

GATE_LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 16384}
WORKER_LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 4096}
"""What setrlimit(2) is told for gates and workers. (RLIMIT_NPROC 0 would make the exec fail, and RLIMIT_FSIZE 0 callbacks of
ctypes: a gate sets these two itself.)"""

PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 23, 24, 47, 4
_FDS_MIN = 1024  # a limit that was lowered closes nothing of what was opened before
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "armv7l": 311, "ppc64le": 271, "s390x": 280}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_UNUSED_GIDS = (65534, 65533)
"""Groups that own nothing (nogroup), for an effective group that is not the real one."""
_CAPABILITY_VERSION_3 = 0x20080522

_SIGNALS = _signal.valid_signals()
_libc = ctypes.CDLL(None, use_errno=True)


class Program(NamedTuple):
    """What to exec for a role: interpreter, flags and script; behind the arguments, directories with its libraries."""

    command: tuple[str, ...]
    libraries: tuple[str, ...] = ()


Table = dict[str, Program]
"""By role: "gate", "worker", "authenticate". Tests put others in."""


class Identity(NamedTuple):
    """Who a process is. groups: the supplementary ones, sorted. context: of SELinux, empty where that is off."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    context: str = ""


class Drop(NamedTuple):
    """What a child becomes.

    identity: None stays who it is (personal mode; the authentication child). no_new_privs: False only for the
    authentication child of a personal daemon, whose PAM needs the set-gid `unix_chkpwd`. death_signal: what it gets when
    the monitor dies (a program sets it again: the exec into another SELinux domain clears it). group: directory of the
    control group that it moves into; empty: it stays where the monitor is. context: of SELinux, for what is exec'd.
    session: of PAM, for what is exec'd; None: none.
    """

    identity: Identity | None
    limits: dict[int, int]
    no_new_privs: bool = True
    death_signal: int = signal.SIGKILL
    group: str = ""
    context: str = ""
    session: pamsession.Wanted | None = None


def launch_table(code: str, libraries: list[str]) -> Table:
    """The real programs. code: directory that holds `srpcd`. libraries: directories of OpenSSL, msgspec, pam.

    Where the package has installed them executable they are started themselves: SELinux looks at the label of the file that
    is executed, and every script of the system would do if that were the interpreter.
    """
    python = os.path.realpath(sys.executable)

    def command(*place: str) -> tuple[str, ...]:
        file = os.path.join(code, "srpcd", *place)
        return (file,) if os.access(file, os.X_OK) else (python, "-I", "-S", file)

    return {
        "gate": Program(command("gate", "__main__.py"), tuple(libraries)),
        "worker": Program(command("worker", "__main__.py")),
        "authenticate": Program(command("monitor", "pamchild.py"), tuple(libraries)),
    }


def _check(result: int, what: str) -> None:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def _empty_bounding_set(kept: tuple[int, ...] = ()) -> None:
    for capability in range(64):
        held = _libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0)
        if held < 0:  # EINVAL: beyond the kernel's last capability
            break
        if held and capability not in kept:
            confine.prctl(PR_CAPBSET_DROP, capability)


def keep_capabilities(kept: tuple[int, ...] = KEPT) -> None:
    """Reduce this process to `kept` in permitted, effective and bounding set, nothing in the others. Raises OSError."""
    confine.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _empty_bounding_set(kept)
    low = sum(1 << each for each in kept)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(low, low, 0, 0, 0, 0)  # effective, permitted, inheritable: low words, then high ones
    _check(_libc.capset(header, data), "capset")


def become(drop: Drop, parent: int, *, before_exec: bool = False) -> None:
    """Become what `drop` says, in the child of process `parent`. The order is that of the design, and has its reasons.

    before_exec: keep the new program closed off from its first instruction on. At an exec the kernel lets processes of the
    same user trace the new program, and take its descriptors, unless real and effective ids differ (begin_new_exec in
    fs/exec.c: dumpable is then fs.suid_dumpable). So the effective group is another one until `confine.close_off` has run.
    (A kernel before 6.16 takes the real group for all at the exec itself, under no_new_privs, and is as strict.)
    """
    if drop.group:
        cgroups.join(drop.group)  # as root, and before anything is done on the user's account
    os.setsid()  # no terminal; and the monitor finds what a dead worker left behind by its session
    number = _SYS_KEYCTL.get(platform.machine())
    if number is not None:
        joined = _libc.syscall(ctypes.c_long(number), _KEYCTL_JOIN_SESSION_KEYRING, None)
        if joined < 0 and ctypes.get_errno() != ENOSYS:  # a kernel without keyrings has no keys to inherit either
            _check(joined, "keyctl")
    for limit, value in drop.limits.items():
        held = resource.getrlimit(limit)  # a PAM session may have set less
        soft, hard = (value if each == resource.RLIM_INFINITY else min(value, each) for each in held)
        resource.setrlimit(limit, (soft, hard))
    os.chdir("/")
    os.umask(0o077)
    if drop.identity is not None:
        uid, gid, groups, _context = drop.identity
        if uid == 0:
            raise PermissionError("nothing is ever started as uid 0 by a drop")
        confine.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        _empty_bounding_set()  # takes CAP_SETPCAP, so it comes before the uid goes
        os.setgroups(groups)  # groups and gid take CAP_SETGID, so before the uid goes too
        effective = next(each for each in _UNUSED_GIDS if each != gid) if before_exec else gid
        os.setresgid(gid, effective, gid)
        os.setresuid(uid, uid, uid)  # from 0 to another uid: the kernel empties permitted, effective and ambient
        check_undumpable()
    confine.prctl(confine.PR_SET_PDEATHSIG, drop.death_signal)  # after setresuid, which clears it
    if os.getppid() != parent:  # the monitor died before the line above
        raise ProcessLookupError("the monitor is gone")
    if drop.no_new_privs:
        confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)


def check_undumpable() -> None:
    """Check that processes of the same user can't trace this one, whose ids were just changed. Raises PermissionError."""
    if confine.prctl(confine.PR_GET_DUMPABLE) == confine.TRACEABLE:
        raise PermissionError(
            "fs.suid_dumpable is 1: users could trace the daemon's processes; set it to 0 or 2 (sysctl fs.suid_dumpable=0)"
        )


def fork(work: Callable[[], None]) -> tuple[int, int]:
    """Fork. The child runs `work` and never comes back. Returns (pid, pidfd). Raises OSError."""
    # A signal between fork and reset would be written into the parent's wake-up socket, which the child shares.
    blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _child(work)
        try:
            return pid, os.pidfd_open(pid)
        except OSError:  # out of descriptors; a child without a handle is of no use
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, blocked)


def _child(work: Callable[[], None]) -> NoReturn:
    try:
        _signal.set_wakeup_fd(-1)
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGCHLD):
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        work()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc(limit=4).encode(errors="replace"))
    finally:
        os._exit(127)


def keep_only(fds: list[int], inheritable: bool) -> None:
    """Give `fds` the numbers 0, 1, 2 … and close everything else."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(fds)) for fd in fds]  # out of the way of the numbers wanted
    for number, fd in enumerate(above):
        os.dup2(fd, number, inheritable)
    os.closerange(len(fds), max(resource.getrlimit(resource.RLIMIT_NOFILE)[1], _FDS_MIN))


class Spawned(NamedTuple):
    """A started program. socket: for messages both ways, and descriptors to it. errors: its standard error."""

    pid: int
    pidfd: int
    socket: socket.socket
    errors: socket.socket


def spawn(argv: tuple[str, ...], drop: Drop) -> Spawned:
    """Start a program, confined. It finds the other end of `socket` at 3 (see `srpcd.ipc`). Raises OSError."""
    parent = os.getpid()
    with ExitStack() as theirs, ExitStack() as ours:

        def pair(kind: int) -> tuple[socket.socket, socket.socket]:
            here, there = socket.socketpair(socket.AF_UNIX, kind)
            ours.callback(here.close)
            theirs.callback(there.close)
            refuse_descriptors(here)  # the child may be taken over; from us it takes some
            here.setblocking(False)
            return here, there

        here, there = pair(socket.SOCK_SEQPACKET)
        errors, error_end = pair(socket.SOCK_STREAM)

        def work() -> None:
            os.dup2(error_end.fileno(), 2)  # from here on a failure is told there, and not on the daemon's own
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            kept = [null, null, error_end.fileno(), there.fileno()]
            if drop.session is not None:
                keep_only([*kept, drop.session.lease], inheritable=False)  # not for what modules start
                pamsession.enter(drop.session._replace(lease=len(kept)))
                kept = list(range(len(kept)))
            keep_only(kept, inheritable=True)
            become(drop, parent, before_exec=True)
            if drop.context:
                selinux.set_exec(drop.context)  # last: whatever is executed next runs there
            os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"})

        pid, pidfd = fork(work)
        ours.pop_all()
        return Spawned(pid, pidfd, here, errors)
