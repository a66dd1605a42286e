"""A gate that was taken over: it runs, as Python, whatever comes in on its connections, and sends back what that gives.

Started by the real monitor in the place of the real gate, with all that a real gate has. The code that a test sends finds
`ask(message)` and `tell(message)` for the monitor, `heard` (all messages so far, with descriptors), `kept` (to keep
things in), `conn`, `ipc`, `os`.
"""

import os
import select
import sys
import time
import traceback
from _socket import socket as Socket
from typing import Any

sys.path[:0] = [sys.argv[1]]

from srpcd import ipc  # noqa: E402

MONITOR = Socket(fileno=3)
heard: list[tuple[ipc.Message, list[int]]] = []
kept: dict[str, object] = {}
clients: dict[int, tuple[int, Socket]] = {}


def tell(message: ipc.Message) -> None:
    """Send to the monitor."""
    ipc.write_packet(4, message)


def listen(seconds: float) -> bool:
    """Take one message from the monitor, if one comes in time."""
    if not select.select([MONITOR], [], [], seconds)[0]:
        return False
    received = ipc.receive(MONITOR)
    if received is None:
        os._exit(0)
    heard.append(received)
    message, fds = received
    if isinstance(message, ipc.Connection):
        clients[fds[0]] = (message.conn, Socket(fileno=fds[0]))
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


def main() -> None:
    """Serve."""
    received = ipc.receive(MONITOR)
    assert received is not None
    tell(ipc.Ready())
    while True:
        waiting: list[Any] = [MONITOR, *clients]
        ready, _, _ = select.select(waiting, [], [])
        if MONITOR in ready:
            listen(0)
        for fd in [each for each in ready if isinstance(each, int)]:
            conn, client = clients[fd]
            code = client.recv(65536)
            if not code:
                del clients[fd]
                client.close()
                continue
            scope = {**globals(), "conn": conn, "result": None}
            try:
                exec(code.decode(), scope)
                answer = repr(scope["result"])
            except BaseException:
                answer = traceback.format_exc()
            client.sendall(answer.encode() + b"\0\n")


if __name__ == "__main__":
    main()
