"""A client that the tests play, step by step."""

import json
import socket
from typing import Any

from OpenSSL import SSL

from srpcd.wire import frames, messages
from srpcd.wire.frames import FrameReader, frame

PATIENCE = 5.0


class Client:
    """A client, step by step."""

    def __init__(self, kind: str, sock: socket.socket, number: int, alpn: bytes = b"srpc/1", handshake: bool = True) -> None:
        self.kind = kind
        self.number = number
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.reader = FrameReader(frames.REPLIES)
        self.frames: list[tuple[int, int, bytes]] = []
        self.tls: SSL.Connection | None = None
        self.seq = 0
        if kind == "tls" and handshake:
            context = SSL.Context(SSL.TLS_CLIENT_METHOD)
            if alpn:
                context.set_alpn_protos([alpn])
            self.sock.settimeout(None)
            self.tls = SSL.Connection(context, self.sock)
            self.tls.set_connect_state()
            self.tls.do_handshake()

    def send(self, data: bytes) -> None:
        (self.tls or self.sock).sendall(data)

    def recv(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return self.tls.recv(65536) if self.tls else self.sock.recv(65536)
        except (SSL.ZeroReturnError, SSL.SysCallError, ConnectionResetError):
            return b""

    def frame(self) -> tuple[int, int, bytes]:
        """The next frame."""
        while not self.frames:
            data = self.recv()
            assert data, "the gate hung up"
            self.frames += self.reader.feed(data)
        return self.frames.pop(0)

    def over(self) -> bool:
        """Read to the end."""
        while data := self.recv():
            self.frames += self.reader.feed(data)
        return True

    def request(self, kind: int, message: messages.Message | bytes = b"") -> int:
        """Send a request. Returns its seq."""
        self.seq += 1
        body = message if isinstance(message, bytes) else messages.encode(message)
        self.send(frame(kind, self.seq, body))
        return self.seq

    def ask(self, kind: int, message: messages.Message | bytes = b"") -> Any:
        """Send a request, and take its reply: JSON as a dictionary, a call's payload, or the errno of an error."""
        seq = self.request(kind, message)
        reply, got, body = self.frame()
        assert got == seq
        assert reply in (kind + 1, frames.ERROR)
        if reply == frames.ERROR:
            return json.loads(body)["errno"]
        return body[4:] if reply == frames.CALL_REPLY else json.loads(body or b"null")

    def log_in(self, uname: str = "alice", afid: int = 1, fid: int = 2) -> None:
        """Authenticate and attach."""
        assert self.ask(frames.AUTH, messages.Auth(afid, uname))["prompts"][-1]["text"] == "Password:"
        assert self.ask(frames.APPEND, messages.Append(afid, uname[::-1]))["data"] == "1"
        assert self.ask(frames.ATTACH, messages.Attach(afid, fid, uname)) == {"qid": "7:0", "is_dir": True}

    def walk(self, path: str, fid: int = 3, root: int = 2) -> Any:
        return self.ask(frames.WALK, messages.Walk(root, fid, path))

    def call(self, payload: bytes = b"", fid: int = 3) -> Any:
        return self.ask(frames.CALL, messages.call_body(fid, payload))
