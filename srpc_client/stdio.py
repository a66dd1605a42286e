"""Resident programs: handlers on standard input and output, started by the caller's worker and kept (sticky bit).

    #!/usr/bin/python3 -I
    from srpc_client.stdio import serve_stdio

    def add(request):
        return str(sum(map(int, request.payload.split()))).encode()

    serve_stdio(add)

The program runs as its caller. What it prints goes to standard error, so that it can't break a frame. A handler may be
asynchronous; then its calls run concurrently, and asyncio is imported at the first one.
"""

import os
import sys
from time import monotonic

from srpc_client import pipes
from srpc_client.handling import HIGH_WATER, HandlerCore, begin
from srpcd.wire.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable

    from srpc_client.handling import Answer, Handler, Request

PATIENCE = 0.001
"""Seconds for which replies of a batch are gathered before they are written."""


def serve_stdio(handler: "Handler") -> None:
    """Serve until the other end closes; then return, so that the program ends.

    handler: given a Request, returns the reply as bytes, or None for an empty one; may be asynchronous. A CallError that
    it raises is the caller's error; any other exception is EIO for the caller and a traceback on standard error.
    Raises SystemExit where the other end does not speak as a worker does (a person who started the program by hand).
    """
    if not callable(handler):
        raise TypeError(f"the handler is a {type(handler).__name__}, which can't be called")
    # Descriptors 0 and 1 are taken out of everybody's reach: print() and input() of the handler, and of programs that
    # it starts, must neither break nor eat frames.
    source, sink = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    core = HandlerCore()
    try:
        while (requests := pipes.receive(source, core)) is not None:
            begun = monotonic()
            for at, request in enumerate(requests):
                awaitable = begin(handler, request)
                if awaitable is not None:
                    _go_on_asynchronously(handler, core, (request, awaitable), requests[at + 1 :], (source, sink))
                    return
                if core.waiting > HIGH_WATER or monotonic() - begun > PATIENCE:
                    _write(sink, core)
                    begun = monotonic()
            if core.waiting:
                _write(sink, core)
    except ProtocolError as fault:
        sys.exit(f"this program is started by srpcd, which speaks frames on its standard input ({fault.message})")
    except BrokenPipeError:
        pass
    finally:
        core.end()
        os.close(source)
        os.close(sink)


def _write(fd: int, core: HandlerCore) -> None:
    while data := core.take():
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # the descriptor was made non-blocking by whoever started us
                import select  # noqa: PLC0415

                select.select([], [fd], [])


def _go_on_asynchronously(
    handler: "Handler",
    core: HandlerCore,
    first: "tuple[Request, Awaitable[Answer]]",
    rest: "list[Request]",
    fds: "tuple[int, int]",
) -> None:
    import asyncio  # noqa: PLC0415

    from srpc_client.line import Line  # noqa: PLC0415

    async def serve() -> None:
        for fd in fds:
            os.set_blocking(fd, False)
        line = Line(os.dup(fds[0]), os.dup(fds[1]), handler, core)
        line.adopt(first, rest)
        await line.wait_closed()

    asyncio.run(serve())
