#!/usr/bin/python3 -I
"""A handler with nothing but Python's standard library, written from docs/protocol.md alone. It is both kinds:

    $ python3 raw_service.py /calc/upper                          a service, which announces a path of the tree
    # install -D -m 1755 raw_service.py /srv/rpc/tools/upper      a resident program (sticky bit), which srpcd starts
    $ srpc call /calc/upper hello
    alice: HELLO

Environment: SRPC_SOCKET, the daemon's local socket (/run/srpc/srpc.sock).
"""

import contextlib
import json
import os
import selectors
import socket
import struct
import sys
from collections.abc import Iterator

HEADER = struct.Struct("!iQQ")  # type, seq, length
CALLER, ERROR, CALL, CALL_REPLY, FLUSH, PING, ANNOUNCE, LISTEN, LISTEN_REPLY = -2, -1, 13, 14, 15, 17, 19, 21, 22
BODY_MAX = 16 * 1024**2 + 64 * 1024 + 12
SO_PASSRIGHTS = 83  # off: the kernel refuses descriptors that are sent along
NO_DATA = struct.pack("!I", 0)  # length of the metadata of our replies


def frame(kind: int, seq: int, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, seq, len(body)) + body


def frames(buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Take the whole frames out of a buffer: (type, seq, body)."""
    while len(buffer) >= HEADER.size:
        kind, seq, length = HEADER.unpack_from(buffer)
        if length > BODY_MAX:
            raise ValueError(f"a frame of {length} bytes")
        if len(buffer) < HEADER.size + length:
            return
        body = bytes(buffer[HEADER.size : HEADER.size + length])
        del buffer[: HEADER.size + length]
        yield kind, seq, body


def trusted(uid: int) -> bool:
    """Whether it is root's or ours. The overflow uid may be anybody's, as seen from inside a user namespace."""
    with open("/proc/sys/kernel/overflowuid") as file:
        return uid in (0, os.geteuid()) and uid != int(file.read())


class Line:
    """One caller's requests and our replies. receive, send: descriptors; of a service's line both are its socket."""

    def __init__(self, selector: selectors.BaseSelector, receive: int, send: int) -> None:
        self.selector, self.receive, self.send = selector, receive, send
        self.input, self.output = bytearray(), bytearray()
        self.user = ""
        for fd in (receive, send):
            os.set_blocking(fd, False)
        selector.register(receive, selectors.EVENT_READ, self.readable)

    def readable(self) -> None:
        try:
            data = os.read(self.receive, 65536)
        except ConnectionError:
            data = b""
        if not data:  # the caller's worker has gone, or the announcement was withdrawn and all is answered
            self.close()
            return
        self.input += data
        for kind, seq, body in frames(self.input):
            if kind == CALLER:
                self.user = json.loads(body)["user"]
            elif kind == CALL:
                begin = 12 + int.from_bytes(body[8:12], "big")  # fid (always 0), metadata length, metadata, payload
                reply = f"{self.user}: ".encode() + body[begin:].upper()
                self.output += frame(CALL_REPLY, seq, NO_DATA + reply)
            # A FLUSH wants a call ended that is not answered yet; here every call is answered at once.
        self.selector.unregister(self.receive)  # a caller who does not take his replies is not served any further
        self.selector.register(self.send, selectors.EVENT_WRITE, self.writable)

    def writable(self) -> None:
        try:
            if self.output:
                del self.output[: os.write(self.send, self.output)]
        except ConnectionError:
            self.selector.unregister(self.send)
            self.close()
            return
        if not self.output:
            self.selector.unregister(self.send)
            self.selector.register(self.receive, selectors.EVENT_READ, self.readable)

    def close(self) -> None:
        if self.receive in self.selector.get_map():
            self.selector.unregister(self.receive)
        for fd in {self.receive, self.send}:
            os.close(fd)


class Service:
    """The connection to the daemon, which tells the lines of our callers."""

    def __init__(self, selector: selectors.BaseSelector, path: str) -> None:
        where = os.environ.get("SRPC_SOCKET", "/run/srpc/srpc.sock")
        self.selector, self.runtime, self.input = selector, os.path.dirname(where), bytearray()
        self.daemon = socket.socket(socket.AF_UNIX)
        self.daemon.connect(where)
        check_peer(self.daemon)
        pipe = os.path.join(json.loads(self.ask(frame(PING, 1)))["tree"], path.strip("/"))
        try:
            os.mkfifo(pipe, 0o600)
            os.chmod(pipe, 0o620)  # who may call: the pipe's group. Left there at the end, for the next start
        except FileExistsError:
            pass  # with the owner, mode and ACL that the administrator gave it
        self.ask(frame(ANNOUNCE, 2, json.dumps({"fid": 1, "path": path}).encode()))
        self.daemon.sendall(frame(LISTEN, 3, b'{"fid":1}'))
        selector.register(self.daemon, selectors.EVENT_READ, self.readable)

    def ask(self, request: bytes) -> bytes:
        """One request, before there is a listen: what comes is its reply."""
        self.daemon.sendall(request)
        while data := self.daemon.recv(65536):
            self.input += data
            for kind, _seq, body in frames(self.input):
                return body if kind != ERROR else sys.exit(body.decode())
        sys.exit("the daemon has closed the connection")

    def readable(self) -> None:
        data = self.daemon.recv(65536)
        self.input += data
        for kind, _seq, body in frames(self.input):
            if kind != LISTEN_REPLY:
                sys.exit(body.decode())
            try:
                fd = self.open_line(json.loads(body)["line"])
                Line(self.selector, fd, fd)
            except OSError as fault:
                print(f"a caller has gone before we came: {fault}", file=sys.stderr)
        if not data:
            sys.exit("the daemon has ended: to be started again")

    def open_line(self, line: int) -> int:
        """Connect a line. Whoever could listen there could pass for any caller: so it has to be root, or ourselves."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(OSError):  # before Linux 6.16
                sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
            sock.connect(os.path.join(self.runtime, "lines", str(os.geteuid()), str(line)))
            check_peer(sock)
            return sock.detach()
        finally:
            sock.close()


def check_peer(sock: socket.socket) -> None:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if not trusted(struct.unpack("iII", credentials)[1]):
        sys.exit("the daemon's socket is served by a process that is neither root's nor ours")


def main() -> None:
    selector = selectors.DefaultSelector()
    if len(sys.argv) > 1:
        Service(selector, sys.argv[1])
    else:
        Line(selector, 0, 1)
    while selector.get_map():  # a resident program ends with its line
        for key, _events in selector.select():
            key.data()


if __name__ == "__main__":
    main()
