"""A worker that the tests play."""

import os
import socket
import threading
from typing import TYPE_CHECKING

from srpcd import ipc
from srpcd.wire.frames import FrameReader, frame

if TYPE_CHECKING:
    from tests.gate.world import World


class Worker:
    """A worker, as its paths say.

    dir… is a directory, none is not there, closed is refused. Calls: echo gives the payload back; late is answered when
    `World.release` is called; error gives a handler's error; size gives as many bytes as the payload says; broken is an
    answer that no worker gives; die closes the socket.
    """

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        here, there = ipc.socket_pair(socket.SOCK_STREAM)
        here.setblocking(True)
        self.fd, self.gate_end = here.detach(), there.detach()
        self.reader = FrameReader(ipc.TO_WORKER)
        self.got: list[tuple[int, int, bytes]] = []
        self.late: list[tuple[int, bytes]] = []
        self.paused = threading.Event()

    def readable(self) -> None:
        data = os.read(self.fd, 65536)
        if not data:
            self.close()
            return
        for kind, tag, body in self.reader.feed(data):
            self.got.append((kind, tag, body[:100]))
            self.handle(kind, tag, body)

    def handle(self, kind: int, tag: int, body: bytes) -> None:
        if kind == ipc.WALK:
            last = body.rpartition(b"/")[2]
            if last in (b"none", b"closed"):
                self.error(tag, 2 if last == b"none" else 13)
            else:
                kind = ipc.DIRECTORY if last.startswith(b"dir") or not last else ipc.SERVICE
                self.send(ipc.WALKED, tag, ipc.WALKED_BODY.pack(7, len(body), kind))
        elif kind == ipc.STAT:
            stat = ipc.Stat(7, 8, ipc.DIRECTORY, 0o755, 1, 2, 3, True, True, False, "u", "g", "", ("a", "b"))
            self.send(ipc.STATTED, tag, stat.pack())
        elif kind == ipc.FLUSH:
            (cancelled,) = ipc.FLUSH_BODY.unpack(body)
            if any(each == cancelled for each, _ in self.late):
                self.late = [each for each in self.late if each[0] != cancelled]
                self.error(cancelled, 125)
            self.send(ipc.FLUSHED, tag)
        elif kind == ipc.CALL:
            size = ipc.CALL_HEAD.size
            *_, length = ipc.CALL_HEAD.unpack_from(body)
            self.call(tag, body[size : size + length].rpartition(b"/")[2], body[size + length :])

    def call(self, tag: int, name: bytes, rest: bytes) -> None:
        if name == b"echo":
            self.send(ipc.CALLED, tag, rest)
        elif name == b"late":
            self.late.append((tag, rest))
        elif name == b"error":
            self.error(tag, 5, ipc.ORIGIN_HANDLER, b'{"errno":42,"code":"x","message":"no luck"}')
        elif name == b"size":
            self.send(ipc.CALLED, tag, bytes(4 + int(rest[4:])))
        elif name == b"broken":
            self.send(ipc.WALKED, tag, ipc.WALKED_BODY.pack(1, 2, 0))
        elif name == b"die":
            self.close()
        else:
            self.error(tag, 6)

    def error(self, tag: int, errno: int, origin: int = ipc.ORIGIN_KERNEL, rest: bytes = b"") -> None:
        self.send(ipc.WORKER_ERROR, tag, ipc.ERROR_HEAD.pack(errno, origin) + rest)

    def send(self, kind: int, tag: int, body: bytes = b"") -> None:
        data = frame(kind, tag, body)
        while data:
            data = data[os.write(self.fd, data) :]

    def close(self) -> None:
        if self.fd >= 0:
            self.world.forget(self.fd)
            os.close(self.fd)
            self.fd = -1
            if self.world.workers.get(self.number) is self:
                del self.world.workers[self.number]
