"""A gate that was taken over: it runs, as Python, whatever comes in on its connections, and sends back what that gives.

Started by the real monitor in the place of the real gate, with all that a real gate has. The code that a test sends finds
`ask(message)` and `tell(message)` for the monitor, `heard` (all messages so far, with descriptors), `kept` (to keep
things in), `conn`, `client` (its socket), `ipc`, `os`; `attempt(function)`, `call(number, …)` for system calls; and
`confine_gate()`, which does what a real gate has done before the first byte of a client.
"""

import ctypes
import mmap  # noqa: F401  for what tests send
import os
import select
import sys
import time
import traceback
from _socket import socket as Socket
from typing import Any

sys.path[:0] = [sys.argv[1]]
sys.path += sys.argv[3:]

from srpcd import ipc  # noqa: E402

MONITOR = Socket(fileno=3)
heard: list[tuple[ipc.Message, list[int]]] = []
kept: dict[str, object] = {}
clients: dict[int, tuple[int, Socket]] = {}
everything, monitor = select.epoll(), select.epoll()  # in the sandbox there is no other way to wait
libc = ctypes.CDLL(None, use_errno=True)


def tell(message: ipc.Message) -> None:
    """Send to the monitor."""
    ipc.write_packet(MONITOR.fileno(), message)


def listen(seconds: float) -> bool:
    """Take one message from the monitor, if one comes in time."""
    if not monitor.poll(seconds):
        return False
    received = ipc.receive(MONITOR)
    if received is None:
        os._exit(0)
    message, fds = received
    if isinstance(message, ipc.Ping):
        tell(ipc.Pong())
        return True
    heard.append(received)
    if isinstance(message, ipc.Connection):
        clients[fds[0]] = (message.conn, Socket(fileno=fds[0]))
        everything.register(fds[0], select.EPOLLIN)
        tell(ipc.Taken(message.conn))
    return True


def ask(message: ipc.Message, *kinds: type[ipc.Message], seconds: float = 8.0) -> tuple[ipc.Message, list[int]] | None:
    """Send, and wait for a message of one of these kinds."""
    tell(message)
    return wait(*kinds, seconds=seconds)


def wait(*kinds: type[ipc.Message], seconds: float = 8.0) -> tuple[ipc.Message, list[int]] | None:
    """Wait for a message of one of these kinds, which is then taken out of `heard`."""
    end = time.monotonic() + seconds
    while True:
        for at, (message, _fds) in enumerate(heard):
            if isinstance(message, kinds):
                return heard.pop(at)
        if not listen(max(0.0, end - time.monotonic())):
            return None


def confine_gate() -> None:
    """Enter the real gate's sandbox, once."""
    if "sandbox" not in kept:
        from srpcd.gate import sandbox  # noqa: PLC0415  loads OpenSSL

        kept["sandbox"] = sandbox.enter()


def call(number: int, *arguments: int) -> int:
    """A system call, by number. Raises OSError."""
    result = libc.syscall(*(ctypes.c_long(each) for each in (number, *arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def attempt(work: Any) -> Any:
    """What `work()` returns, or the negative errno."""
    try:
        return work()
    except OSError as fault:
        return -(fault.errno or 0)


def main() -> None:
    """Serve."""
    received = ipc.receive(MONITOR)
    assert received is not None
    for each in (everything, monitor):
        each.register(MONITOR, select.EPOLLIN)
    tell(ipc.Ready(0))
    while True:
        ready = [fd for fd, _events in everything.poll()]
        if MONITOR.fileno() in ready:
            listen(0)
        for fd in [each for each in ready if each in clients]:
            conn, client = clients[fd]
            code = client.recv(65536)
            if not code:
                everything.unregister(fd)
                del clients[fd]
                client.close()
                continue
            scope = {**globals(), "conn": conn, "client": client, "result": None}
            try:
                exec(code.decode(), scope)
                answer = repr(scope["result"])
            except BaseException:
                answer = traceback.format_exc()
            client.sendall(answer.encode() + b"\0\n")


if __name__ == "__main__":
    main()
