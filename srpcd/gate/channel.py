"""The socket to the monitor, which hands out descriptors with its messages."""

import os
import socket
from collections import deque
from collections.abc import Callable

from srpcd import ipc
from srpcd.gate.loop import Loop

QUEUE_HIGH, QUEUE_LOW = 256, 64
"""Messages that wait for the monitor before clients are no longer read, and when they are again."""

QUEUE_MAX = 65536
"""Messages after which something is wrong: the gate ends."""

BATCH = 64
"""Messages taken from the monitor in one go, so that clients have their turn."""


class Channel:
    """The socket that the gate has inherited.

    dispatch: takes each message and its descriptors. congested: whether clients should wait. changed: called when that
    has changed. Ends the process when the monitor is gone.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        dispatch: Callable[[ipc.Message, list[int]], None],
        changed: Callable[[], None],
    ) -> None:
        self.congested = False
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._dispatch = dispatch
        self._changed = changed
        self._queue: deque[ipc.Message] = deque()
        sock.setblocking(False)
        loop.add_reader(self._fd, self._readable)

    def send(self, message: ipc.Message) -> None:
        """Send, or keep it until the socket has room."""
        if not self._queue:
            try:
                ipc.write_packet(self._fd, message)
                return
            except BlockingIOError:
                self._loop.add_writer(self._fd, self._writable)
            except (BrokenPipeError, ConnectionResetError):
                os._exit(0)
        self._queue.append(message)
        if len(self._queue) > QUEUE_HIGH and not self.congested:
            self.congested = True
            self._changed()
        if len(self._queue) > QUEUE_MAX:
            raise RuntimeError("the monitor does not read")

    def _writable(self) -> None:
        try:
            while self._queue:
                ipc.write_packet(self._fd, self._queue[0])
                self._queue.popleft()
            self._loop.remove_writer(self._fd)
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
        if self.congested and len(self._queue) <= QUEUE_LOW:
            self.congested = False
            self._changed()

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                received = ipc.receive(self._sock)
            except BlockingIOError:
                return
            if received is None:
                os._exit(0)  # the monitor is gone, and everything ends with it
            self._dispatch(*received)
