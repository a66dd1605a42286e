"""Connecting without asyncio: to a Unix socket or by TLS, as far as the first byte may be sent."""

import socket
import time
from errno import EINVAL, ETIMEDOUT
from queue import Empty, SimpleQueue
from select import POLLIN, POLLOUT, poll
from typing import Any

from srpc_client import address as addresses
from srpc_client import resolver, tls
from srpc_client.address import LONGEST_WAIT, Address, Local, Remote
from srpc_client.errors import SrpcError, Unreachable
from srpc_client.link import LocalLink, TlsLink

_BACKLOG_RETRY_SECONDS = 0.02
"""Pause between two tries to connect to a Unix socket whose backlog is full. Other local users can fill it."""


def _late(where: Address) -> Unreachable:
    return Unreachable(ETIMEDOUT, f"{where} did not answer in time")


def _left(deadline: float, where: Address) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _late(where)
    return min(left, LONGEST_WAIT)


def local(where: Local, deadline: float) -> LocalLink:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.setblocking(False)
        while True:
            try:
                connected.connect(where.path)
                break
            except BlockingIOError:  # the server's backlog is full, and nothing tells when it no longer is
                time.sleep(min(_BACKLOG_RETRY_SECONDS, _left(deadline, where)))
        return LocalLink(connected)
    except SrpcError:
        connected.close()
        raise
    except OSError as fault:
        connected.close()
        raise addresses.from_os_error(fault, where) from None


def _addresses(where: Remote, deadline: float) -> list[tuple[Any, ...]]:
    answer: SimpleQueue[resolver.Found] = SimpleQueue()
    resolver.look_up(where, answer.put)
    try:
        found = answer.get(timeout=_left(deadline, where))
    except Empty:
        raise _late(where) from None
    if isinstance(found, OSError):
        raise addresses.from_os_error(found, where) from None
    if isinstance(found, UnicodeError):
        raise found
    return found


def _connect(where: Remote, deadline: float) -> socket.socket:
    """Connect to the first address that answers. `deadline` is for all of them together."""
    failure: OSError = OSError(EINVAL, "the name has no address")
    for family, kind, protocol, _name, target in _addresses(where, deadline):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(_left(deadline, where))
            connected.connect(target)
            return connected
        except TimeoutError as fault:
            connected.close()
            failure = fault
        except OSError as fault:
            connected.close()
            if isinstance(fault, SrpcError):
                raise
            failure = fault
        except BaseException:
            connected.close()
            raise
    if isinstance(failure, TimeoutError) and failure.errno is None:
        raise _late(where)
    raise addresses.from_os_error(failure, where) from None


def remote(where: Remote, pins: frozenset[str] | None, ca: tls.Authority | None, deadline: float) -> tuple[TlsLink, str]:
    if (pins is None) == (ca is None):
        raise ValueError("give either pins= or ca=: a server that proves nothing is not talked to")
    connected = _connect(where, deadline)
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
