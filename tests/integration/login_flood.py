"""Many clients that keep the places for authentications busy: run as a program by `test_login_load`.

Arguments: port, mode, how many connections, how many addresses. It says "ready" when each of them has begun to authenticate,
and goes on until it is ended. The modes are those of MODES.
"""

import asyncio
import contextlib
import random
import ssl
import sys

from tests.integration.raw import APPEND, AUTH, CLUNK, ERROR, HEADER, frame

SILENT, LATE, WRONG = "silent", "late", "wrong"
MODES = {
    SILENT: "never answers",
    LATE: "answers after as long as a client may take while others wait, or after nearly a minute",
    WRONG: "answers at once, and wrongly; does not wait for the refusal",
}


def pause(mode: str) -> float:
    """Seconds until the answer."""
    if mode == SILENT:
        return 3600.0
    return random.choice((14.5, 58.0)) if mode == LATE else 0.0


class Client:
    """One connection, made anew whenever it ends."""

    def __init__(self, port: int, mode: str, address: str, number: int) -> None:
        self.begun = asyncio.Event()
        self._port = port
        self._mode = mode
        self._address = address
        self._number = number
        self._tries = 0

    async def run(self, context: ssl.SSLContext) -> None:
        """Attack for ever."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, ssl=context, server_hostname="", local_addr=(self._address, 0)
                )
                try:
                    while True:
                        await self._attempt(reader, writer)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(random.random())

    async def _attempt(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tries += 1
        number = self._tries
        writer.write(frame(AUTH, 3 * number, {"afid": number, "uname": f"u{self._number}-{number}"}))
        self.begun.set()
        if await _reply(reader, 3 * number) == ERROR:
            await asyncio.sleep(0.1)
            return
        await asyncio.sleep(pause(self._mode))
        writer.write(frame(APPEND, 3 * number + 1, {"fid": number, "data": "wrong"}))
        if self._mode == WRONG:
            await asyncio.sleep(0.3)
        else:
            await _reply(reader, 3 * number + 1)
        writer.write(frame(CLUNK, 3 * number + 2, {"fid": number}))
        await _reply(reader, 3 * number + 2)


async def _reply(reader: asyncio.StreamReader, seq: int) -> int:
    while True:
        kind, found, length = HEADER.unpack(await reader.readexactly(HEADER.size))
        await reader.readexactly(length)
        if found == seq:
            return int(kind)


async def main(port: int, mode: str, connections: int, addresses: int) -> None:
    """Attack for ever. The addresses are in as many prefixes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["srpc/1"])
    clients = [Client(port, mode, f"10.200.{each % addresses}.1", each) for each in range(connections)]
    tasks = [asyncio.create_task(each.run(context)) for each in clients]
    for each in clients:
        await each.begun.wait()
    print("ready", flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
