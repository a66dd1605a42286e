"""Start a program from a checked descriptor, and hold it: by pidfd, by process group, by its standard pipes, by a lifeline.

It is started by posix_spawn(3), which shares our memory until the exec instead of copying it: a fork of an interpreter takes
longer than what most programs do. So nothing of ours can run in the new process, and what it inherits is settled here.

The lifeline is a pipe that nothing goes through. Its read end is the program's, armed (F_SETSIG, F_SETOWN in fcntl(2)): when
the write end, which is ours alone, is closed, the kernel sends SIGKILL to the program's process group. So programs end with
their worker, however it ends, also where the monitor ends with it. (A parent death signal would have to be asked for by
the new process itself, would spare what that forks, and is cleared when SELinux changes the domain at the exec.)
"""

import os
from errno import ENOENT, ENOEXEC
from fcntl import F_SETFL, F_SETOWN, F_SETSIG, fcntl

from srpcd import libc
from srpcd.wire.errors import RequestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # what is behind `signal`, without its enums: they would import half of the library

_CLOSE_RANGE_CLOEXEC = 4
_SIGNALS = _signal.valid_signals()
_close_range = libc.function("close_range", libc.Int, libc.Unsigned, libc.Unsigned, libc.Int)
_zombies: "list[int]" = []  # held back by their tracers, to be collected when the next program starts


def _collect() -> None:
    for pid in list(_zombies):
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            _zombies.remove(pid)


def _inherit_nothing() -> None:
    """No descriptor above 2 survives an exec, whoever opened it, and however. Raises OSError."""
    if _close_range(3, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC) != 0:
        libc.failed("close_range")


class Process:
    """A started program. pidfd: readable once it has ended. stdin, stdout, stderr: our ends, not blocking.

    rest: what of the input did not fit into its pipe; where all did, stdin is closed already (-1). The ends belong to
    whoever has this, who closes them; `reap` closes none of these.
    """

    def __init__(self, program: int, argv: "list[str]", environment: "dict[str, str]", data: "bytes | None") -> None:
        """Execute what the descriptor `program` (O_PATH) holds: in `/`, where we are, in a process group of its own.

        data: all of its standard input, which is there before the program does anything, so that it waits for nobody; None
        for one that stays, and is sent more and more.
        Raises RequestError where it can't be executed, with the reason; OSError where we can't have descriptors for it.
        """
        _collect()
        self._reaped = False
        fds: list[int] = []
        try:
            for _ in range(4):
                fds += os.pipe()
            ins, self.stdin, self.stdout, outs, self.stderr, errs, held, self._lifeline = fds
            for fd in (self.stdin, self.stdout, self.stderr):
                os.set_blocking(fd, False)
            self.rest = b""
            if data is not None:
                written = os.write(self.stdin, data)
                if written < len(data):
                    self.rest = data[written:]
                else:
                    os.close(self.stdin)
                    fds.remove(self.stdin)
                    self.stdin = -1
            fcntl(held, F_SETSIG, _signal.SIGKILL)
            fcntl(held, F_SETFL, os.O_ASYNC)
            _inherit_nothing()
            standard = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((ins, outs, errs))]
            # To itself: only that it is inherited. The interpreter of a script opens the program by that number.
            kept = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (program, held)]
            try:
                self.pid = os.posix_spawn(
                    f"/proc/self/fd/{program}",
                    argv,
                    environment,
                    file_actions=standard + kept,
                    setpgroup=0,
                    setsigmask=(),
                    setsigdef=_SIGNALS,  # Python ignores SIGPIPE and SIGXFSZ
                )
            except OSError as fault:
                raise RequestError(*_exec_sentence(fault.errno or ENOEXEC)) from None
            try:
                fcntl(held, F_SETOWN, -self.pid)
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:
                os.killpg(self.pid, _signal.SIGKILL)
                _zombies.append(self.pid)
                raise
        except (OSError, RequestError):
            for fd in fds:
                os.close(fd)
            raise
        for fd in (ins, outs, errs, held):
            os.close(fd)

    def kill(self) -> None:
        """Kill it with its whole process group. Nothing happens once it is reaped: the number may be another's then."""
        if not self._reaped:
            try:
                os.killpg(self.pid, _signal.SIGKILL)
            except OSError:
                pass
            try:  # it may have left its group
                _signal.pidfd_send_signal(self.pidfd, _signal.SIGKILL)
            except OSError:
                pass

    def reap(self) -> int:
        """Collect the ended process, after killing what is left of its group: exit code, or minus the signal's number.

        The group is killed first: until the leader is reaped, its number can't have become somebody else's.
        """
        self.kill()
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if not found:  # it has ended, but a tracer holds its remains back: not to be waited for
            _zombies.append(self.pid)
            status = _signal.SIGKILL
        self._reaped = True
        os.close(self._lifeline)
        return os.waitstatus_to_exitcode(status)


def _exec_sentence(errno: int) -> "tuple[int, str]":
    """(errno, sentence) for a failed exec."""
    if errno == ENOENT:  # the file itself is there, it was executed by descriptor
        return ENOEXEC, "the program can't be executed: the interpreter that its first line names does not exist"
    if errno == ENOEXEC:
        return ENOEXEC, "the program can't be executed: it is no binary for this machine, and has no #! line"
    return errno, f"the program can't be executed: {os.strerror(errno)}"


def status_sentence(status: int) -> str:
    """How a program ended, for a person."""
    if status >= 0:
        return f"the program ended with status {status}"
    return f"the program was killed by signal {-status} ({_signal.strsignal(-status) or 'unknown'})"
