"""Connecting without asyncio: to a Unix socket or by TLS, as far as the first byte may be sent."""

import socket
import time
from errno import ETIMEDOUT
from select import POLLIN, POLLOUT, poll

from srpc_client import address as addresses
from srpc_client import tls
from srpc_client.address import LONGEST_WAIT, Address, Local, Remote
from srpc_client.errors import SrpcError, Unreachable
from srpc_client.link import LocalLink, TlsLink


def _left(deadline: float, where: Address) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Unreachable(ETIMEDOUT, f"{where} did not answer in time")
    return min(left, LONGEST_WAIT)


def local(where: Local, deadline: float) -> LocalLink:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(_left(deadline, where))
        connected.connect(where.path)
        connected.setblocking(False)
        return LocalLink(connected)
    except SrpcError:
        connected.close()
        raise
    except OSError as fault:
        connected.close()
        raise addresses.from_os_error(fault, where) from None


def remote(where: Remote, pins: frozenset[str] | None, ca: tls.Authority | None, deadline: float) -> tuple[TlsLink, str]:
    if (pins is None) == (ca is None):
        raise ValueError("give either pins= or ca=: a server that proves nothing is not talked to")
    try:
        connected = socket.create_connection((where.host, where.port), _left(deadline, where))
    except TimeoutError:
        raise Unreachable(ETIMEDOUT, f"{where} did not answer in time") from None
    except OSError as fault:
        raise addresses.from_os_error(fault, where) from None
    try:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setblocking(False)
        handshake = tls.Handshake(connected, where.host, pins, ca)
        ready = poll()
        while (wants := handshake.step()) != "done":
            ready.register(connected.fileno(), POLLIN if wants == "read" else POLLOUT)
            ready.poll(_left(deadline, where) * 1000 + 1)
        return TlsLink(connected, handshake.connection), handshake.pin
    except BaseException:
        connected.close()
        raise
