"""Start a program from a checked descriptor, and hold it: by pidfd, by process group, by its standard pipes."""

import os
from errno import ENOENT, ENOEXEC

from srpcd.confine import PR_SET_PDEATHSIG, prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import NoReturn
else:
    import _signal  # what is behind `signal`, without its enums: they would import half of the library

_EXEC_ERROR = 4  # bytes
_zombies: "list[int]" = []  # held back by their tracers, to be collected when the next program starts


def _collect() -> None:
    for pid in list(_zombies):
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            _zombies.remove(pid)


class Process:
    """A started program. pidfd: readable once it has ended. stdin, stdout, stderr: our ends, not blocking.

    The ends belong to whoever has this, who closes them; `reap` closes none of these.
    """

    def __init__(self, program: int, argv: "list[str]", environment: "dict[str, str]") -> None:
        """Fork, and execute what the descriptor `program` holds. Raises OSError where not even the fork succeeds.

        That the exec failed is seen by the process's end: see `reap`.
        """
        _collect()
        self._reaped = False
        fds: list[int] = []
        try:
            for _ in range(4):
                fds += os.pipe()
            ins, self.stdin, self.stdout, outs, self.stderr, errs, self._failure, failure = fds
            for fd in (self.stdin, self.stdout, self.stderr, self._failure):
                os.set_blocking(fd, False)
            parent = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                _child(parent, (ins, outs, errs), program, failure, argv, environment)
            try:
                os.setpgid(self.pid, self.pid)  # here as well as in the child: `kill` may come before it has run
            except OSError:
                pass  # it has run, and called exec already
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:
                os.kill(self.pid, _signal.SIGKILL)
                _zombies.append(self.pid)
                raise
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        for fd in (ins, outs, errs, failure):
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

    def reap(self) -> "tuple[int, int]":
        """Collect the ended process, after killing what is left of its group: (errno of the failed exec or 0, status).

        status: exit code, or minus the signal's number. The group is killed first: until the leader is reaped, its
        number can't have become somebody else's.
        """
        self.kill()
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if not found:  # it has ended, but a tracer holds its remains back: not to be waited for
            _zombies.append(self.pid)
            status = _signal.SIGKILL
        self._reaped = True
        try:
            data = os.read(self._failure, _EXEC_ERROR)
        except BlockingIOError:
            data = b""
        os.close(self._failure)
        return int.from_bytes(data, "big"), os.waitstatus_to_exitcode(status)


def exec_sentence(errno: int) -> "tuple[int, str]":
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


def _child(
    parent: int,
    standard: "tuple[int, int, int]",
    program: int,
    failure: int,
    argv: "list[str]",
    environment: "dict[str, str]",
) -> "NoReturn":
    try:
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, _signal.SIGKILL)
        if os.getppid() != parent:  # the worker died before the line above
            os._exit(127)
        for number, fd in enumerate(standard):
            os.dup2(fd, number)  # all of them are above 2: the worker's own are open
        kept = sorted((program, failure))
        os.closerange(3, kept[0])
        os.closerange(kept[0] + 1, kept[1])
        os.closerange(kept[1] + 1, os.sysconf("SC_OPEN_MAX"))
        os.set_inheritable(program, True)  # the interpreter of a script opens it as /dev/fd/N, after the exec
        os.chdir("/")
        for number in _signal.valid_signals():
            if number not in (_signal.SIGKILL, _signal.SIGSTOP):
                _signal.signal(number, _signal.SIG_DFL)  # Python ignores SIGPIPE and SIGXFSZ
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.execve(program, argv, environment)
    except OSError as fault:
        os.write(failure, (fault.errno or ENOEXEC).to_bytes(_EXEC_ERROR, "big"))
    finally:
        os._exit(127)
