"""Reading a line's pipe: small requests as they come, a large one straight to where it belongs."""

import os

from srpcd.wire.limits import READ_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from srpc_client.handling import HandlerCore, Request


def receive(fd: int, core: "HandlerCore") -> "list[Request] | None":
    """Read once, and return the requests that this completes; None at the end of file. Raises OSError, ProtocolError."""
    if core.large:
        with core.room() as room:
            count = os.readv(fd, [room])
        core.filled(count)
        return core.receive(b"") if count else None
    data = os.read(fd, READ_SIZE)
    return core.receive(data) if data else None
