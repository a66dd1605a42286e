"""Connections and sessions without asyncio: the same methods, each of which returns when the answer is there.

    with blocking.dial("calc.example:7443", pins=pin, user="alice", password=secret) as connection:
        print(connection.call("/calc/add", b"1 2"))

There is no loop and no thread: a call writes, waits on the socket and reads. A connection belongs to one thread at a time;
a second one that comes in between gets RuntimeError. It stays with the process that made it: after a fork the child dials
anew. `call_many` keeps many calls in flight. `serve` serves synchronous handlers in the same way.
"""

from srpc_client.blocking.connection import Connection, PromptCallback, Session, connect, dial
from srpc_client.blocking.service import serve
from srpc_client.requests import Reply

__all__ = ["Connection", "PromptCallback", "Reply", "Session", "connect", "dial", "serve"]
