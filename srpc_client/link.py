"""A connected stream that never blocks: a Unix socket whose owner was checked, or TLS over TCP.

Both kinds have the same four methods, and both pumps use them. `fd` is what to wait on.
"""

import socket
import struct
from typing import Protocol

from OpenSSL import SSL

from srpc_client.errors import ConnectionLost, UntrustedServer
from srpc_client.owner import distrust
from srpcd.records import Records, room_for_one
from srpcd.wire.limits import READ_SIZE

_UCRED = struct.Struct("3i")


class Link(Protocol):
    """What a pump needs."""

    fd: int

    @property
    def owes(self) -> bool:
        """Whether TLS has something of its own to send: `flush` does, when the descriptor can be written to."""

    def flush(self) -> None:
        """Send of that as much as goes out now. Raises ConnectionLost."""

    def send(self, data: bytes | memoryview) -> int:
        """Send as much as goes out now; returns how much. Raises ConnectionLost.

        If that is not all, the next call has to begin with the first byte that is not sent.
        """

    def receive(self) -> bytes | None:
        """What has come in; None if nothing has, empty at the end. Raises ConnectionLost."""

    def receive_into(self, room: memoryview) -> tuple[int, bytes | None]:
        """As `receive`, straight to where it belongs. Returns how many bytes, and what came after them."""

    def close(self) -> None:
        """Say goodbye as far as that needs no waiting, and close."""

    def detach(self) -> int:
        """Use it no more. Returns the descriptor, for the caller to close."""


class LocalLink:
    """A Unix socket, to a server that is root or the user himself.

    Raises UntrustedServer: whoever else managed to put a socket at the path learns nothing.
    """

    __slots__ = ("_socket", "fd")

    owes = False

    def __init__(self, connected: socket.socket) -> None:
        _pid, uid, _gid = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if reason := distrust(uid):
            connected.close()
            raise UntrustedServer(message=f"the server behind the socket {reason}")
        self._socket = connected
        self.fd = connected.fileno()

    def flush(self) -> None:
        pass

    def send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as fault:
            raise ConnectionLost(message=f"the connection ended: {fault.strerror}") from None

    def receive(self) -> bytes | None:
        try:
            return self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as fault:
            raise ConnectionLost(message=f"the connection ended: {fault.strerror}") from None

    def receive_into(self, room: memoryview) -> tuple[int, bytes | None]:
        try:
            return self._socket.recv_into(room), b""
        except BlockingIOError:
            return 0, None
        except OSError as fault:
            raise ConnectionLost(message=f"the connection ended: {fault.strerror}") from None

    def close(self) -> None:
        self._socket.close()

    def detach(self) -> int:
        return self._socket.detach()


class TlsLink:
    """TLS, after its handshake."""

    __slots__ = ("_buffer", "_records", "_socket", "_tls", "fd")

    def __init__(self, connected: socket.socket, tls: SSL.Connection) -> None:
        self._socket = connected
        self._tls = tls
        self._buffer = room_for_one()
        self._records = Records(tls, connected)
        self.fd = connected.fileno()

    @property
    def owes(self) -> bool:
        return self._records.owes

    def flush(self) -> None:
        try:
            self._records.flush()
        except (SSL.Error, OSError) as fault:
            raise self._lost(fault) from None

    def send(self, data: bytes | memoryview) -> int:
        try:
            return self._records.write(data)
        except (SSL.Error, OSError) as fault:
            raise self._lost(fault) from None

    def receive_into(self, room: memoryview) -> tuple[int, bytes | None]:
        try:
            return self._records.receive(room)
        except SSL.SysCallError as fault:
            if fault.args[0] == -1:
                return 0, b""
            raise self._lost(fault) from None
        except (SSL.Error, OSError) as fault:
            raise self._lost(fault) from None

    def receive(self) -> bytes | None:
        try:
            return self._records.read(self._buffer)
        except SSL.SysCallError as fault:
            if fault.args[0] == -1:  # end of file without a goodbye; frames know for themselves whether they are whole
                return b""
            raise self._lost(fault) from None
        except (SSL.Error, OSError) as fault:
            raise self._lost(fault) from None

    @staticmethod
    def _lost(fault: SSL.Error | OSError) -> ConnectionLost:
        if isinstance(fault, SSL.SysCallError | OSError):
            return ConnectionLost(message=f"the connection ended: {fault.args[-1]}")
        if isinstance(fault, SSL.WantReadError):
            return ConnectionLost(
                message="the server sent a part of a TLS handshake message, and nothing can be sent before its rest"
            )
        return ConnectionLost(message=f"the TLS connection failed: {fault}")

    def close(self) -> None:
        try:
            self._tls.shutdown()
            self._records.flush()
        except (SSL.Error, OSError):
            pass
        self._socket.close()

    def detach(self) -> int:
        return self._socket.detach()
