"""Look up a host's addresses in a thread: neither a timeout nor a signal ends getaddrinfo(3)."""

import socket
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeAlias

from srpc_client.address import Remote

Found: TypeAlias = "list[tuple[Any, ...]] | OSError | UnicodeError"
"""As getaddrinfo returns it, or what it raised."""


def look_up(where: Remote, done: Callable[[Found], object]) -> None:
    """Find the addresses of a server, and give them to `done`: from here if it is a number, else from the thread.

    The thread is a daemon: one that a resolver keeps waiting holds up neither a timeout nor the end of the process.
    """
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        Thread(target=_ask, args=(where, done), name="srpc resolver", daemon=True).start()
    else:
        done(found)


def _ask(where: Remote, done: Callable[[Found], object]) -> None:
    found: Found
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as fault:
        found = fault
    done(found)
