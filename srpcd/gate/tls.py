"""Bytes to and from a client: TLS 1.3, or plain on the local socket, behind the same few methods.

Both work on a non-blocking descriptor directly: whoever calls waits for the descriptor and calls again.
"""

import ctypes
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from srpcd import passing
from srpcd.records import RECORD, Records, room_for_one
from srpcd.wire.limits import READ_SIZE

ALPN = b"srpc/1"
"""The protocol's name and version (RFC 7301)."""

_NO_ROOM = memoryview(b"")


class TransportError(Exception):
    """The connection is of no use any more."""


class DescriptorsSent(TransportError):
    """The client sends descriptors, and the release of these takes time that other clients need."""


class Plain:
    """A connection on the local socket.

    moved: grows when the client has taken something that `send` could not tell of yet.
    held: bytes of memory that TLS uses for what it sends.
    records: whether bytes come in TLS records, of which nothing is seen before they are whole.
    refuses: the kernel refuses descriptors that the client sends; else each read is bounded (`srpcd.passing`).
    """

    records = False
    held = 0
    moved = 0
    wants_write = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.refuses = sock.family != socket.AF_UNIX or passing.refuse_descriptors(sock)
        self._suspicion = passing.Suspicion()

    def handshake(self) -> bool:
        """Whether data may be exchanged. Raises TransportError."""
        return True

    def recv(self) -> bytes | None:
        """What has come; None: nothing at the moment; empty: end of file. Raises TransportError."""
        try:
            return self.sock.recv(READ_SIZE) if self.refuses else self._bounded(self.sock.recv, READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as fault:
            raise TransportError(str(fault)) from None

    def recv_into(self, room: memoryview) -> tuple[int, bytes | None]:
        """As `recv`, straight to where it belongs. Returns how many bytes, and what came after them."""
        try:
            return self.sock.recv_into(room) if self.refuses else self._bounded(self.sock.recv_into, room), b""
        except (BlockingIOError, InterruptedError):
            return 0, None
        except OSError as fault:
            raise TransportError(str(fault)) from None

    def _bounded(self, read: Callable[[Any], Any], argument: object) -> Any:
        """Read, with the release of descriptors bounded. (The sandbox has no recvmsg, which would tell of them.)"""
        self._suspicion.reads()
        result = read(argument)
        if self._suspicion.confirmed():
            raise DescriptorsSent("the client sends descriptors")
        return result

    def send(self, data: bytes | memoryview) -> int:
        """Send what goes without waiting. Returns how many bytes. Raises TransportError."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as fault:
            raise TransportError(str(fault)) from None

    def rest(self) -> None:
        """Nothing large has passed for a while: let go of what is kept for that."""

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def discard(self) -> bool:
        """After `finish`: throw away what has come. Returns whether it was the end of file, or an error."""
        try:
            return not self.sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the connection. The monitor has the socket too: closing alone would send nothing."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()


_buffer = room_for_one()  # one for all: a gate has one thread


class Tls(Plain):
    """A connection that speaks TLS.

    wants_write: TLS has something of its own to send before it can go on.
    """

    records = True

    def __init__(self, sock: socket.socket, context: SSL.Context) -> None:
        self.sock = sock
        self._ready = False
        self._tls = SSL.Connection(context, sock)
        self._tls.set_accept_state()
        self._records = Records(self._tls, sock)

    def handshake(self) -> bool:
        if not self._ready:
            self.wants_write = False
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                return False
            except SSL.WantWriteError:
                self.wants_write = True
                return False
            except SSL.Error as fault:
                raise TransportError(f"handshake: {fault!r}") from None
            # A client that names no protocol at all gets through OpenSSL's own check.
            if self._tls.get_alpn_proto_negotiated() != ALPN:
                raise TransportError("the client does not speak srpc/1")
            self._ready = True
        return True

    def recv(self) -> bytes | None:
        # One read gives one record. A full one is rarely the last: only then it is worth asking again, because finding
        # nothing there costs a system call and an exception.
        if self._records.active:
            return self.recv_into(_NO_ROOM)[1]
        self.wants_write = False
        data = b""
        try:
            data = self._records.get(_buffer)
            if len(data) == RECORD:
                while len(data) < READ_SIZE:
                    data += self._records.get(_buffer)
            return data
        except SSL.WantReadError:
            return data or None
        except SSL.WantWriteError:
            self.wants_write = True
            return data or None
        except SSL.ZeroReturnError:
            return data
        except SSL.Error as fault:
            raise TransportError(f"read: {fault!r}") from None

    def recv_into(self, room: memoryview) -> tuple[int, bytes | None]:
        try:
            return self._records.receive(room)
        except (SSL.Error, OSError) as fault:
            raise TransportError(f"read: {fault!r}") from None
        finally:
            self.wants_write = self._records.owes

    @property
    def moved(self) -> int:  # type: ignore[override]
        return self._records.moved

    @property
    def held(self) -> int:  # type: ignore[override]
        return self._records.held

    def send(self, data: bytes | memoryview) -> int:
        try:
            return self._records.write(data)
        except (SSL.Error, OSError) as fault:
            raise TransportError(f"write: {fault!r}") from None

    def rest(self) -> None:
        self._records.rest()

    def finish(self) -> None:
        self._close_notify()
        super().finish()

    def close(self) -> None:
        self._close_notify()
        super().close()

    def _close_notify(self) -> None:
        """Say goodbye if that goes without waiting, and once."""
        if self._ready:
            self._ready = False
            try:
                self._tls.shutdown()
                self._records.flush()
            except (SSL.Error, OSError):
                pass


_CHOICE = ctypes.create_string_buffer(ALPN, len(ALPN))
_OK, _NONE = 0, 3  # SSL_TLSEXT_ERR_OK, SSL_TLSEXT_ERR_NOACK: the handshake goes on, and the gate hangs up


def _choose(_tls: Any, choice: Any, length: Any, offered: Any, size: int, _argument: Any) -> int:
    names = ctypes.string_at(offered, size)
    while names:
        if names[1 : 1 + names[0]] == ALPN:
            choice[0], length[0] = ctypes.addressof(_CHOICE), len(ALPN)
            return _OK
        names = names[1 + names[0] :]
    return _NONE


_out, _length, _in = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_ubyte), ctypes.c_void_p
_SELECT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, _out, _length, _in, ctypes.c_uint, ctypes.c_void_p)(_choose)
"""SSL_CTX_set_alpn_select_cb(3). pyOpenSSL's own way is a callback of cffi's, which needs memory that is writable and
executable at once: SELinux and `MemoryDenyWriteExecute=` refuse that. What ctypes makes is executed where libffi lies."""


def _read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def server_context(key: bytes, certificates: bytes) -> SSL.Context:
    """What every TLS connection of this gate starts from.

    key, certificates: PEM; the server's own certificate first.
    TLS 1.3 only, and its key exchange by the library's preference: hybrid post-quantum groups come first where it has
    them (OpenSSL 3.5 and later). Nothing to resume sessions with is kept: each connection proves the key anew.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # 34 KiB less for each idle connection
    signature = "int (*)(SSL *, const unsigned char **, unsigned char *, const unsigned char *, unsigned int, void *)"
    select = ffi.cast(signature, ctypes.cast(_SELECT, ctypes.c_void_p).value)
    lib.SSL_CTX_set_alpn_select_cb(context._context, select, ffi.NULL)
    first, *others = x509.load_pem_x509_certificates(certificates)
    context.use_certificate(first)
    for other in others:
        context.add_extra_chain_cert(other)
    context.use_privatekey(load_pem_private_key(key, None))  # type: ignore[arg-type]
    context.check_privatekey()
    return context


def inherited_context(fds: Iterable[int]) -> SSL.Context:
    """The context from inherited descriptors of key and certificate, which are closed."""
    key, certificates = (_read(fd) for fd in fds)
    return server_context(key, certificates)
