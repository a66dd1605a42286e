"""A TLS 1.3 server whose records a test makes itself, after an ordinary handshake by OpenSSL (RFC 8446).

No TLS library lets a test choose where a KeyUpdate stands, or send a half of one. So the traffic secrets are taken from the
key log, and records are made and opened here.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

ALERT, HANDSHAKE, DATA = 21, 22, 23
KEY_UPDATE = b"\x18\x00\x00\x01"
"""A KeyUpdate without its last byte: 0 (not requested) or 1 (the peer is to update its keys too)."""
ANSWERED, UNANSWERED = KEY_UPDATE + b"\x01", KEY_UPDATE + b"\x00"
RECORD = 16384


class Keys:
    """One direction's keys."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._hash: Any = hashes.SHA384() if len(secret) == 48 else hashes.SHA256()
        self._key_size = 32 if len(secret) == 48 else 16
        self.updates = 0
        self._derive()

    def _expand(self, label: bytes, size: int) -> bytes:
        name = b"tls13 " + label
        info = struct.pack("!HB", size, len(name)) + name + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _derive(self) -> None:
        self._aead = AESGCM(self._expand(b"key", self._key_size))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self._seq = 0

    def update(self) -> None:
        self._secret = self._expand(b"traffic upd", len(self._secret))
        self.updates += 1
        self._derive()

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self._seq).to_bytes(12, "big")
        self._seq += 1
        return nonce

    def skip(self) -> None:
        """Another has made a record with these keys."""
        self._seq += 1

    def seal(self, kind: int, plain: bytes) -> bytes:
        head = struct.pack("!BHH", DATA, 0x0303, len(plain) + 17)
        return head + self._aead.encrypt(self._nonce(), plain + bytes([kind]), head)

    def open(self, head: bytes, body: bytes) -> tuple[int, bytes]:
        plain = self._aead.decrypt(self._nonce(), body, head).rstrip(b"\0")
        return plain[-1], plain[:-1]


class RawTls:
    """The server's end. What it seals goes out by `sendall`, in whatever pieces the test likes."""

    def __init__(self, sock: socket.socket, context: SSL.Context) -> None:
        """context: a server's, with a certificate and ALPN. Raises SSL.Error where the client ends the handshake."""
        secrets: dict[bytes, bytes] = {}

        def log(_connection: object, line: bytes) -> None:
            label, _random, secret = line.split()
            secrets[label] = bytes.fromhex(secret.decode())

        context.set_keylog_callback(log)
        tls = SSL.Connection(context)
        tls.set_accept_state()
        self.sock = sock
        self._wire = b""
        while True:
            try:
                tls.do_handshake()
                break
            except SSL.WantReadError:
                _flush(tls, sock)
                tls.bio_write(self._take_record())
        self.out = Keys(secrets[b"SERVER_TRAFFIC_SECRET_0"])
        self._in = Keys(secrets[b"CLIENT_TRAFFIC_SECRET_0"])
        for _ in range(_flush(tls, sock)):  # session tickets, one record each
            self.out.skip()

    def data(self, plain: bytes) -> bytes:
        """`plain` in records, as full as they can be."""
        return b"".join(self.out.seal(DATA, plain[at : at + RECORD]) for at in range(0, len(plain), RECORD))

    def key_update(self, message: bytes = ANSWERED) -> bytes:
        """A KeyUpdate in one record. What is sealed afterwards has the new keys."""
        record = self.out.seal(HANDSHAKE, message)
        self.out.update()
        return record

    def sendall(self, wire: bytes) -> None:
        self.sock.sendall(wire)

    @property
    def answers(self) -> int:
        """How often the client has updated its keys."""
        return self._in.updates

    def receive(self) -> bytes | None:
        """One record of the client's data; empty for anything else, None at the end of file."""
        record = self._take_record()
        if not record:
            return None
        kind, plain = self._in.open(record[:5], record[5:])
        if kind == HANDSHAKE:
            assert plain[:4] == KEY_UPDATE
            self._in.update()
        return plain if kind == DATA else None if kind == ALERT else b""

    def _take_record(self) -> bytes:
        """The next record as it came; empty at the end of file."""
        while len(self._wire) < 5 or len(self._wire) < self._record_size():
            more = self.sock.recv(1 << 16)
            if not more:
                return b""
            self._wire += more
        size = self._record_size()
        taken, self._wire = self._wire[:size], self._wire[size:]
        return taken

    def _record_size(self) -> int:
        return 5 + int.from_bytes(self._wire[3:5], "big")


def _flush(tls: SSL.Connection, sock: socket.socket) -> int:
    """Send what OpenSSL wants to send. Returns how many records that was."""
    wire = b""
    while True:
        try:
            wire += tls.bio_read(1 << 16)
        except SSL.WantReadError:
            break
    sock.sendall(wire)
    count = 0
    while wire:
        wire = wire[5 + int.from_bytes(wire[3:5], "big") :]
        count += 1
    return count
