"""Connecting with asyncio: to a Unix socket or by TLS, as far as the first byte may be sent."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from errno import EINVAL
from typing import Any, Literal

from srpc_client import address as addresses
from srpc_client import resolver, tls
from srpc_client.address import Local, Remote
from srpc_client.errors import SrpcError
from srpc_client.link import LocalLink, TlsLink


async def local(where: Local) -> LocalLink:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.setblocking(False)
        while True:
            try:
                connected.connect(where.path)
                break
            except BlockingIOError:  # the server's backlog is full, and nothing tells when it no longer is
                await asyncio.sleep(0.02)
        return LocalLink(connected)
    except SrpcError:
        raise
    except OSError as fault:
        connected.close()
        raise addresses.from_os_error(fault, where) from None
    except BaseException:
        connected.close()
        raise


async def remote(where: Remote, pins: frozenset[str] | None, ca: tls.Authority | None) -> tuple[TlsLink, str]:
    loop = asyncio.get_running_loop()
    if (pins is None) == (ca is None):
        raise ValueError("give either pins= or ca=: a server that proves nothing is not talked to")
    failure: OSError = OSError(EINVAL, "the name has no address")
    for family, kind, protocol, _name, target in await _addresses(where):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.setblocking(False)
            await loop.sock_connect(connected, target)
        except OSError as fault:
            connected.close()
            failure = fault
            continue
        except BaseException:
            connected.close()
            raise
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake = tls.Handshake(connected, where.host, pins, ca)
            while (wants := handshake.step()) != "done":
                async with _ready(connected.fileno(), wants) as ready:
                    await ready
            return TlsLink(connected, handshake.connection), handshake.pin
        except BaseException:
            connected.close()
            raise
    raise addresses.from_os_error(failure, where) from None


async def _addresses(where: Remote) -> list[tuple[Any, ...]]:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[resolver.Found] = loop.create_future()

    def settle(found: resolver.Found) -> None:
        if not answer.done():
            answer.set_result(found)

    def done(found: resolver.Found) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no task waits
            loop.call_soon_threadsafe(settle, found)

    resolver.look_up(where, done)
    found = await answer
    if isinstance(found, OSError):
        raise addresses.from_os_error(found, where) from None
    if isinstance(found, UnicodeError):
        raise found
    return found


@asynccontextmanager
async def _ready(fd: int, wants: Literal["read", "write"]) -> AsyncIterator[asyncio.Future[None]]:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def now() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_reader if wants == "read" else loop.add_writer)(fd, now)
    try:
        yield ready
    finally:
        (loop.remove_reader if wants == "read" else loop.remove_writer)(fd)
