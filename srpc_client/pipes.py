"""Reading a line: small requests as they come, a large one straight to where it belongs."""

import os

from srpcd import passing
from srpcd.wire.limits import READ_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket

    from srpc_client.handling import HandlerCore, Request


def receive(source: "int | Socket", core: "HandlerCore") -> "list[Request] | None":
    """Read once, and return the requests that this completes; None at the end of file. Raises OSError, ProtocolError.

    source: a descriptor, or what `passing.source` made of that of a socket.
    """
    if core.large:
        with core.room() as room:
            count = os.readv(source, [room]) if isinstance(source, int) else passing.receive_into(source, room)
        core.filled(count)
        return core.receive(b"") if count else None
    data = os.read(source, READ_SIZE) if isinstance(source, int) else passing.receive(source, READ_SIZE)
    return core.receive(data) if data else None
