"""Unix sockets on which no descriptor may arrive.

A peer can send descriptors along with its bytes (SCM_RIGHTS, unix(7)). A receiver that asks for none still has to release
them: in its own read(2), or in its close(2) where they were never read. Releasing a TCP socket with SO_LINGER and unsent
data waits for the linger time, which its sender chose; only a signal ends that wait (measured).

Since Linux 6.16 a receiver can refuse such messages before they are queued (SO_PASSRIGHTS): `refuse_descriptors`. Where the
kernel can't do that, three things bound what a peer gains by sending descriptors:

  - `receive` finds out that some came, so that the connection is ended the first time;
  - `interrupt_releases` sends SIGALRM to the own process while it is active, so that one release waits TICK_SECONDS at most;
  - `close` bounds the release of what was never read.

This module is light: workers import it.
"""

import atexit
import os
from _socket import AF_UNIX, MSG_CTRUNC, SOCK_STREAM, SOL_SOCKET
from _socket import socket as make_socket
from errno import EBADMSG, ENOPROTOOPT

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from _socket import socket as Socket
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Receive: TypeAlias = Callable[[Any, int], bytes]
    """Reads so many bytes from a source; as os.read."""
else:
    import _signal  # what is behind `signal`, without its enums

SO_PASSRIGHTS = 83
"""Of asm-generic/socket.h, Linux 6.16. A connection to a listener inherits it before anything can be sent."""

TICK_SECONDS = 0.1
"""Longest wait for the release of descriptors. Ten signals a second cost a busy process nothing that can be measured."""

QUIET_TICKS = 10
"""Ticks without `interrupt_releases` after which the signals stop. What was read last has been released by then."""

STRIKES = 3
"""Reads in a row, of one peer, that waited for the release of descriptors, after which it is cut off. By chance a signal
falls into an honest read once in 6,800 times, on a machine with twice as much to do as it can (measured)."""

CLOSE_SECONDS = 0.001
"""Longest wait for the release of descriptors in `close`."""


def refuse_descriptors(sock: "Socket") -> bool:
    """Let the kernel refuse messages to `sock` that carry descriptors: their sender gets EPERM.

    Returns whether the kernel can do that. Where it can't, read through `receive` and close through `close`.
    """
    try:
        sock.setsockopt(SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError as fault:
        if fault.errno != ENOPROTOOPT:
            raise
        return False
    return True


def kernel_refuses() -> bool:
    """Return whether the kernel can refuse descriptors (Linux 6.16)."""
    sock = make_socket(AF_UNIX, SOCK_STREAM)
    try:
        return refuse_descriptors(sock)
    finally:
        sock.close()


def source(fd: int) -> "int | Socket":
    """Refuse descriptors on a Unix stream socket. Returns what it is read by.

    That is `fd` itself, for read(2); where the kernel can't refuse them, a socket object, for `receive` and `let_go`.
    """
    sock = make_socket(AF_UNIX, SOCK_STREAM, 0, fd)
    return sock.detach() if refuse_descriptors(sock) else sock


def let_go(source: "int | Socket") -> None:
    """Leave the descriptor of a source to its owner, who closes it."""
    if not isinstance(source, int):
        source.detach()


def receive(sock: "Socket", size: int) -> bytes:
    """Read from a socket to which descriptors can be sent. Returns b"" at end of file.

    Raises OSError (EBADMSG) where descriptors came along: the connection is to be ended. BlockingIOError.
    """
    data, _ancillary, flags, _address = sock.recvmsg(size)
    _check(flags)
    return data


def receive_into(sock: "Socket", buffer: memoryview) -> int:
    """The same, into a buffer. Returns how many bytes."""
    count, _ancillary, flags, _address = sock.recvmsg_into([buffer])
    _check(flags)
    return count


def receive_bounded(sock: "Socket", size: int) -> bytes:
    """As `receive`, with `interrupt_releases`: for the daemon's processes, which have no other use for SIGALRM."""
    interrupt_releases()
    return receive(sock, size)


def _check(flags: int) -> None:
    if flags & MSG_CTRUNC:
        raise OSError(EBADMSG, "a descriptor was sent along")


def close(*fds: int) -> None:
    """Close sockets to which descriptors can have been sent."""
    if not fds:
        return
    _releases.every(CLOSE_SECONDS)
    try:
        for fd in fds:
            os.close(fd)
    finally:
        _releases.every(TICK_SECONDS if _releases.active else 0.0)


def interrupt_releases() -> None:
    """Bound what is released in the next second: no system call of the main thread waits longer than TICK_SECONDS for it."""
    _releases.quiet = 0
    if not _releases.active:
        _releases.active = True
        _releases.every(TICK_SECONDS)


class Suspicion:
    """Tells whether a peer sends descriptors, by how long reads from it take: for a process whose sandbox has no recvmsg."""

    __slots__ = ("_strikes",)

    def __init__(self) -> None:
        self._strikes = 0

    def reads(self) -> None:
        """Begin a read from the peer. The release of what comes with it is bounded."""
        interrupt_releases()

    def confirmed(self) -> bool:
        """End the read. Returns whether STRIKES of them in a row were interrupted, so that the peer is to be cut off."""
        self._strikes = self._strikes + 1 if _releases.quiet else 0
        return self._strikes >= STRIKES


class _Releases:
    """The timer. active: `interrupt_releases` has set it. quiet: ticks since then."""

    def __init__(self) -> None:
        self.active = False
        self.quiet = 0
        self._prepared = False

    def every(self, seconds: float) -> None:
        """Send SIGALRM so often; 0: never."""
        if not self._prepared:
            self._prepared = True
            _signal.signal(_signal.SIGALRM, self._tick)  # a signal that is ignored would interrupt nothing
            atexit.register(self.every, 0.0)  # the interpreter's end takes the handler away, and the signal would kill
        _signal.setitimer(_signal.ITIMER_REAL, seconds, seconds)

    def _tick(self, _number: int, _frame: object) -> None:
        self.quiet += 1
        if self.active and self.quiet > QUIET_TICKS:
            self.active = False
            self.every(0.0)


_releases = _Releases()
