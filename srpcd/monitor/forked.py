"""Our own code in a fork, for a moment: for what may block or has to be tried as somebody else (accounts, probe, sweep)."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from srpcd import confine
from srpcd.monitor.faults import StartFault
from srpcd.monitor.launch import Drop, become, fork, keep_only

_PATIENCE = 30.0
"""Seconds for a piece of work of our own: the longest is to make a key on a slow machine."""


async def ask(work: Callable[[socket.socket], object], drop: Drop, seconds: float) -> tuple[bytes, list[int]]:
    """What `work` sends from a fork that has become what `drop` says: bytes (none if it died), descriptors.

    work: given the child's end of a SEQPACKET socket; everything else is closed, standard error too. The child is killed
    when it has answered, or after `seconds`. Raises TimeoutError, OSError (no fork).
    """
    pid, pidfd, sock = _start(work, drop)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        async with asyncio.timeout(seconds):
            await readable.wait()
        data, ancillary, flags, _address = sock.recvmsg(256 * 1024, 4096, socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _level, _kind, content in ancillary for fd in memoryview(content).cast("i")]
        return (b"" if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) else data), fds
    finally:  # nothing here waits: whoever is cancelled leaves nothing behind
        loop.remove_reader(sock)
        sock.close()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        collect(pid)


async def in_child(work: Callable[..., str | None], *arguments: object) -> str:
    """What `work(*arguments)` returns, run in a fork that stays who we are. Raises StartFault, with its words if it does."""

    def answer(end: socket.socket) -> None:
        try:
            said = f"+{work(*arguments) or ''}"
        except Exception as fault:
            said = f"-{fault}"
        end.send(said.encode(errors="replace")[:4096])

    try:
        data, _fds = await ask(answer, Drop(None, {}), _PATIENCE)
    except OSError as fault:
        raise StartFault(f"a child of the daemon: {fault.strerror or 'it took too long'}") from None
    if data[:1] != b"+":
        raise StartFault(data[1:].decode(errors="replace") or "a child of the daemon died")
    return data[1:].decode(errors="replace")


def _start(work: Callable[[socket.socket], object], drop: Drop) -> tuple[int, int, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()

    def child() -> None:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        keep_only([null, null, null, theirs.fileno()], inheritable=False)
        confine.make_undumpable()
        become(drop, parent)
        confine.make_undumpable()  # once more: a change of ids sets it anew (fs.suid_dumpable)
        if drop.identity and (os.getresuid(), os.getresgid()) != ((drop.identity.uid,) * 3, (drop.identity.gid,) * 3):
            raise PermissionError("the drop did not take place")
        work(socket.socket(fileno=os.dup(3)))

    try:
        with theirs:
            pid, pidfd = fork(child)
    except OSError:
        ours.close()
        raise
    ours.setblocking(False)
    return pid, pidfd, ours


def collect(pid: int, pause: float = 0.005) -> None:
    """Take a dead child off the process table. Never waits: a tracer can hold a zombie back for as long as it likes."""
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            asyncio.get_running_loop().call_later(pause, collect, pid, min(pause * 2, 1.0))


async def sweep_sessions(sessions: set[int]) -> None:
    """Kill what workers that ended left running: all processes of their sessions.

    They must not have been taken off the process table yet: then their numbers can't have been given to somebody else, and
    name no other session.
    """
    with suppress(OSError, TimeoutError):
        await ask(lambda _end: _sweep(sessions), Drop(None, {}), 10.0)


def _sweep(sessions: set[int]) -> None:
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, IndexError):
            pidfd = os.pidfd_open(int(name))  # closed with this process
            with open(f"/proc/{name}/stat", "rb") as file:  # read after the pidfd: it is this process or none
                fields = file.read().rpartition(b")")[2].split()
            if int(fields[3]) in sessions and fields[0] != b"Z":
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
