#!/usr/bin/python3 -I
"""A whole client with nothing but Python's standard library, written from docs/protocol.md alone.

$ python3 minimal_client.py HOST PORT PIN USER /tools/wc 'one two'            asks for the password on the terminal
"""

import base64
import getpass
import hashlib
import json
import socket
import ssl
import struct
import sys
from typing import Any

HEADER = struct.Struct("!iQQ")  # type, seq, length
ERROR, AUTH, ATTACH, WALK, APPEND, CALL = -1, 1, 3, 5, 9, 13
BODY_MAX = 16 * 1024**2 + 64 * 1024 + 12  # of a call's reply; what else is asked for here is answered in less


def content(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the DER element at `at` begins and ends."""
    length, at = der[at + 1], at + 2
    if length >= 0x80:  # the long form: so many bytes of length follow
        at, length = at + length - 0x80, int.from_bytes(der[at : at + length - 0x80], "big")
    return at, at + length


def pin_of(certificate: bytes) -> str:
    """The pin of the key: its SubjectPublicKeyInfo is the seventh field of what is signed (RFC 5280, section 4.1)."""
    at = content(certificate, content(certificate, 0)[0])[0]
    for _ in range(6 if certificate[at] == 0xA0 else 5):  # version (optional), serial, algorithm, issuer, dates, subject
        at = content(certificate, at)[1]
    key = certificate[at : content(certificate, at)[1]]
    return "sha256:" + base64.b64encode(hashlib.sha256(key).digest()).decode()


class Server:
    """A connection on which one request is made at a time, so that whatever comes is its reply."""

    def __init__(self, host: str, port: str, pin: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the pin stands in the place of both
        context.set_alpn_protocols(["srpc/1"])
        self.tls, self.seq = context.wrap_socket(socket.create_connection((host, int(port)))), 0
        if pin_of(self.tls.getpeercert(binary_form=True) or b"") != pin or self.tls.selected_alpn_protocol() != "srpc/1":
            sys.exit("the server's key is not the pinned one, or it does not speak srpc/1: nothing was sent to it")
        self.stream = self.tls.makefile("rb")

    def ask(self, kind: int, body: bytes) -> bytes:
        self.seq += 1
        self.tls.sendall(HEADER.pack(kind, self.seq, len(body)) + body)
        head = self.stream.read(HEADER.size)
        found, seq, length = HEADER.unpack(head) if len(head) == HEADER.size else (0, 0, 0)
        reply = self.stream.read(min(length, BODY_MAX))
        if len(reply) < length or found not in (kind + 1, ERROR) or seq != self.seq:
            sys.exit("the connection is over")
        return reply if found != ERROR else sys.exit("{code}: {message}".format(**json.loads(reply)))

    def json(self, kind: int, **body: int | str) -> Any:
        return json.loads(self.ask(kind, json.dumps(body).encode()))


server, user, path, payload = Server(*sys.argv[1:4]), sys.argv[4], sys.argv[5].strip("/"), "".join(sys.argv[6:])
step = server.json(AUTH, afid=1, uname=user)
while asked := [each for each in step.get("prompts") or () if each["style"] in ("secret", "text")]:
    for prompt in asked:
        step = server.json(APPEND, fid=1, data=getpass.getpass(prompt["text"]))
        if step["data"]:  # "1" or "0": it is decided
            break
if step.get("data", "1") != "1":
    sys.exit("user name or password is wrong")
server.json(ATTACH, afid=1, fid=2, uname=user)
server.json(WALK, fid=2, newfid=3, path=path)
answer = server.ask(CALL, struct.pack("!QI", 3, 0) + payload.encode())
sys.stdout.buffer.write(answer[4 + int.from_bytes(answer[:4], "big") :])
