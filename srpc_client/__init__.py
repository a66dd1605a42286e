"""sRPC for Python: call endpoints of a host, and serve them.

An endpoint is a file in a tree of directories on the host that has it: a named pipe that a service announced, or an
executable. Whoever calls it is authenticated first, and the call is made by a process that runs as that user: so the
kernel of that host decides, by the file's mode, owner, group, ACL and label, whether this call may be made now.

Calling, asynchronously or (`srpc_client.blocking`, the same names) not:

    async with await srpc_client.dial("calc.example", pins="sha256:…", user="alice", password=secret) as connection:
        print(await connection.call("/calc/add", b"1 2", timeout=5))

    with srpc_client.blocking.dial() as connection:            # this host, as yourself
        print(connection.list("/calc"))

Nothing is sent to a server before it has proved who it is: by a key that you pinned, by a certificate authority with
`ca=`, and on the local socket by running as root or as yourself. A connection runs calls concurrently and may hold
sessions of several users (`connection.login`). What fails raises one of a small tree of errors (`srpc_client.errors`).

Serving, where the paths are files of this host's tree and the kernel decides whether you may put them there:

    async def add(request):
        print(request.caller.user, "calls")                    # the kernel's word, not the caller's
        return str(sum(map(int, request.payload.split()))).encode()

    asyncio.run(srpc_client.serve({"/calc/add": add}, group="calc"))

`announce` and `listen` give each caller's line by itself; `srpc_client.stdio.serve_stdio(add)` serves the same handler in a
program that srpcd starts as the caller. docs/client.md has it all, with examples that run.

How it is made: `core` (the protocol without I/O) and `procedures` (what takes several requests, as generators) are pumped
by `connection` with asyncio and by `blocking` without; `handling` is the other side's core, pumped by `line` and `stdio`.
Names are loaded when they are first used, so that a resident program does not pay for TLS.
"""

TYPE_CHECKING = False  # not from typing, which alone takes 10 ms

_HOME = {
    "Announcement": "srpc_client.service",
    "Announcer": "srpc_client.service",
    "AuthenticationError": "srpc_client.errors",
    "CallError": "srpc_client.errors",
    "CallTimeout": "srpc_client.errors",
    "Caller": "srpc_client.handling",
    "Connection": "srpc_client.connection",
    "ConnectionLost": "srpc_client.errors",
    "Line": "srpc_client.line",
    "PinMismatch": "srpc_client.errors",
    "Prompt": "srpcd.wire.messages",
    "Reply": "srpc_client.requests",
    "Request": "srpc_client.handling",
    "Session": "srpc_client.connection",
    "SrpcError": "srpc_client.errors",
    "StatReply": "srpcd.wire.messages",
    "Unreachable": "srpc_client.errors",
    "UntrustedServer": "srpc_client.errors",
    "announce": "srpc_client.service",
    "connect": "srpc_client.connection",
    "dial": "srpc_client.connection",
    "pin_of": "srpc_client.tls",
    "serve": "srpc_client.service",
    "serve_stdio": "srpc_client.stdio",
}

if TYPE_CHECKING:
    from srpc_client import blocking, requests, stdio
    from srpc_client.connection import Connection, Session, connect, dial
    from srpc_client.errors import (
        AuthenticationError,
        CallError,
        CallTimeout,
        ConnectionLost,
        PinMismatch,
        SrpcError,
        Unreachable,
        UntrustedServer,
    )
    from srpc_client.handling import Caller, Request
    from srpc_client.line import Line
    from srpc_client.requests import Reply
    from srpc_client.service import Announcement, Announcer, announce, serve
    from srpc_client.stdio import serve_stdio
    from srpc_client.tls import pin_of
    from srpcd.wire.messages import Prompt, StatReply

__all__ = [
    "Announcement",
    "Announcer",
    "AuthenticationError",
    "CallError",
    "CallTimeout",
    "Caller",
    "Connection",
    "ConnectionLost",
    "Line",
    "PinMismatch",
    "Prompt",
    "Reply",
    "Request",
    "Session",
    "SrpcError",
    "StatReply",
    "Unreachable",
    "UntrustedServer",
    "announce",
    "blocking",
    "connect",
    "dial",
    "pin_of",
    "requests",
    "serve",
    "serve_stdio",
    "stdio",
]


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415

    if name in ("blocking", "requests", "stdio"):
        return import_module(f"srpc_client.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'srpc_client' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
