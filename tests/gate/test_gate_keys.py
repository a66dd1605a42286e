"""The real gate and a client that asks for new keys without end, and takes none of the answers (RFC 8446, section 4.6.3)."""

import ctypes
import ctypes.util
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from srpcd.gate.tls import Tls, server_context
from srpcd.wire.frames import APPEND, HEADER
from srpcd.wire.limits import LARGE, MIB
from tests.gate.test_gate_slow import resident
from tests.gate.world import World, certificate

LIBRARY = ctypes.util.find_library("ssl")

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs the system's libssl: pyOpenSSL can't ask for new keys")

Start = Callable[..., World]


def system_client(sock: socket.socket) -> tuple[ctypes.c_void_p, Any]:
    """The client's end of a TLS connection, and the system's OpenSSL to use it with."""
    library: Any = ctypes.CDLL(LIBRARY)
    for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
        getattr(library, name).restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.SSL_CTX_new(ctypes.c_void_p(library.TLS_client_method())))
    client = ctypes.c_void_p(library.SSL_new(context))
    library.SSL_set_alpn_protos(client, b"\x06srpc/1", 7)
    library.SSL_set_fd(client, sock.fileno())
    return client, library


class KeyUpdater:
    """A TLS client by the system's OpenSSL, on a connection that never blocks."""

    def __init__(self, world: World) -> None:
        self.client = world.connect(handshake=False, buffers={"SO_SNDBUF": 1 << 15})
        self._ssl, self._lib = system_client(self.client.sock)
        self.client.sock.settimeout(None)
        assert self._lib.SSL_connect(self._ssl) == 1
        self.client.sock.setblocking(False)

    def send(self, data: bytes) -> None:
        assert self._lib.SSL_write(self._ssl, data, len(data)) == len(data)

    def flood(self, count: int, patience: float) -> int:
        """Ask for new keys so often, or until nothing was taken for `patience` seconds. Returns how often."""
        done, since = 0, time.monotonic()
        asked = False
        while done < count and time.monotonic() - since < patience:
            asked = asked or self._lib.SSL_key_update(self._ssl, 1) == 1
            if self._lib.SSL_do_handshake(self._ssl) == 1:
                done, since, asked = done + 1, time.monotonic(), False
            else:
                time.sleep(0.001)
        return done


def test_who_asks_in_the_middle_of_records_gets_the_rest_and_the_answers() -> None:
    """OpenSSL on a socket says 'bad length' then, and the connection would end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for sock in (ours, theirs):
            sock.setblocking(False)
        gate = Tls(ours, server_context(*certificate()))
        client, library = system_client(theirs)
        while library.SSL_connect(client) != 1 or not gate.handshake():
            gate.handshake()
        data, sent, got, asked = os.urandom(10_000) * 100, 0, b"", False
        room = ctypes.create_string_buffer(3000)
        end = time.monotonic() + 10
        while got != data and time.monotonic() < end:
            asked = asked or (len(got) < len(data) // 2 and library.SSL_key_update(client, 1) == 1)
            asked = asked and library.SSL_do_handshake(client) != 1
            assert gate.recv() is None
            while sent < len(data) and (taken := gate.send(data[sent : sent + 10_000])):
                sent += taken
            count = library.SSL_read(client, room, len(room))
            got += room.raw[: max(0, count)]
        assert got == data


def test_a_read_ends_after_each_message_of_tls() -> None:
    """A client that sends them without end would keep the gate in one read, and all other clients waiting."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setblocking(False)
        gate = Tls(ours, server_context(*certificate()))
        client, library = system_client(theirs)
        while library.SSL_connect(client) != 1 or not gate.handshake():
            gate.handshake()
        for _ in range(50):
            assert library.SSL_key_update(client, 0) == 1
            assert library.SSL_do_handshake(client) == 1
        assert library.SSL_write(client, b"data", 4) == 4
        nothing = 0
        while (data := gate.recv()) is None:
            nothing += 1
        assert (data, nothing) == (b"data", 50)


def processor_time(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_who_takes_no_answers_is_not_read_from_in_vain(start: Start) -> None:
    world = start("tls")
    hostile = KeyUpdater(world)
    assert hostile.flood(100_000, 0.3) < 100_000
    before = processor_time(world.pid)
    time.sleep(0.5)
    assert processor_time(world.pid) - before < 0.2
    other = world.connect()
    other.log_in("bob")


def test_the_answers_do_not_collect_in_memory_while_something_large_is_sent(start: Start) -> None:
    world = start("tls")
    hostile = KeyUpdater(world)
    hostile.send(HEADER.pack(APPEND, 1, 2 * LARGE) + bytes(100))
    time.sleep(0.05)
    hostile.send(bytes(100))
    time.sleep(0.05)
    before = resident(world.pid)
    assert hostile.flood(100_000, 0.3) < 100_000
    assert resident(world.pid) - before < 2 * MIB
    other = world.connect()
    other.log_in("bob")
