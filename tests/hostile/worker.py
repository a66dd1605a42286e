"""A worker that was taken over: it runs, as Python, the payload of each call, and answers with what that gives.

Started by the real monitor in the place of the real worker, as its user. Walks succeed for any path, so that a client
behind a real gate gets this far. The code finds `tell`, `wait` (monitor), `setup`, `heard`, `ipc`, `os`.
"""

import os
import select
import sys
import time
import traceback
from _socket import socket as Socket
from typing import Any

sys.path[:0] = [sys.argv[1]]

from srpcd import confine, ipc  # noqa: E402
from srpcd.wire.frames import FrameReader, frame  # noqa: E402

MONITOR = Socket(fileno=3)
heard: list[tuple[ipc.Message, list[int]]] = []
gates: dict[int, FrameReader] = {}


def tell(message: ipc.Message) -> None:
    """Send to the monitor."""
    ipc.write_packet(MONITOR.fileno(), message)


def listen(seconds: float) -> bool:
    """Take one message from the monitor, if one comes in time."""
    if not select.select([MONITOR], [], [], seconds)[0]:
        return False
    received = ipc.receive(MONITOR)
    if received is None:
        os._exit(0)
    message, fds = received
    if isinstance(message, ipc.Gate):
        os.set_blocking(fds[0], True)
        gates[fds[0]] = FrameReader(ipc.TO_WORKER)
    else:
        heard.append(received)
    return True


def wait(*kinds: type[ipc.Message], seconds: float = 4.0) -> tuple[ipc.Message, list[int]] | None:
    """Wait for a message of one of these kinds, which is then taken out of `heard`."""
    end = time.monotonic() + seconds
    while True:
        for at, (message, _fds) in enumerate(heard):
            if isinstance(message, kinds):
                return heard.pop(at)
        if not listen(max(0.0, end - time.monotonic())):
            return None


def run(code: bytes) -> bytes:
    """What the code leaves in `result`, as text."""
    scope = {**globals(), "result": None}
    try:
        exec(code.decode(), scope)
        return repr(scope["result"]).encode()
    except BaseException:
        return traceback.format_exc().encode()


def main() -> None:
    """Serve."""
    received = ipc.receive(MONITOR)
    assert received is not None
    globals()["setup"] = received[0]
    tell(ipc.Proved())
    while True:
        waiting: list[Any] = [MONITOR, *gates]
        ready, _, _ = select.select(waiting, [], [])
        if MONITOR in ready:
            listen(0)
        for fd in [each for each in ready if isinstance(each, int)]:
            reader = gates[fd]
            data = os.read(fd, 65536)
            if not data:
                del gates[fd]
                continue
            for kind, tag, body in reader.feed(data):
                answer = b""
                if kind == ipc.WALK:
                    answer = frame(ipc.WALKED, tag, ipc.WALKED_BODY.pack(1, len(body) + 1, ipc.SERVICE if body else 0))
                elif kind == ipc.CALL:
                    *_, length = ipc.CALL_HEAD.unpack_from(body)
                    result = run(body[ipc.CALL_HEAD.size + length + 4 :])
                    answer = frame(ipc.CALLED, tag, b"\0\0\0\0" + result)
                elif kind == ipc.FLUSH:
                    answer = frame(ipc.FLUSHED, tag)
                if answer:
                    os.write(fd, answer)


if __name__ == "__main__":
    assert confine
    main()
