"""Many users in one process, each with a connection and a session of his own.

◄ {"users": 1000}                                  so many are logged in from here on: the first of the list
► {"users": 1000, "faults": []}
◄ {"turns": 1000, "size": 64, "seconds": 1.0}      blocking: one call at a time, by each of the first so many in turn
◄ {"at_once": 1000, "size": 64, "seconds": 1.0}    asyncio: each of them makes a call as soon as his last is answered
► as in `driver`; at_once also `least` and `most`: calls of single users
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle, islice
from time import perf_counter
from typing import Any

from bench.programs import driver
from bench.programs.driver import Setup
from srpc_client import Connection, SrpcError, blocking, dial

LOGINS = 4
"""At a time: the daemon runs as many PAM children for one address."""

Call = Callable[[bytes], Awaitable[bytes]]


def turns(setup: Setup) -> None:
    """By `blocking.dial`."""
    connections: list[blocking.Connection] = []
    path = setup["path"]

    def one(user: tuple[str, str]) -> blocking.Connection | str:
        try:
            connection = blocking.dial(setup["address"], pins=setup["pins"], user=user[0], password=user[1], timeout=60)
            if connection.call(path, user[0].encode(), timeout=60) != user[0].encode():
                return f"{user[0]}: a wrong answer"
        except SrpcError as fault:
            return f"{user[0]}: {fault}"
        return connection

    driver.say(ready={})
    with ThreadPoolExecutor(LOGINS) as pool:
        while True:
            wanted = driver.told()
            if "users" in wanted:
                faults = []
                for found in pool.map(one, setup["users"][len(connections) : wanted["users"]]):
                    if isinstance(found, str):
                        faults.append(found)
                    else:
                        connections.append(found)
                for connection in connections[wanted["users"] :]:
                    connection.close()
                del connections[wanted["users"] :]
                driver.say(users=len(connections), faults=faults)
                continue
            turn = cycle(islice(connections, wanted["turns"]))
            driver.one_at_a_time(lambda data: next(turn).call(path, data), b"x" * wanted["size"], wanted["seconds"])  # noqa: B023


def at_once(setup: Setup) -> None:
    """By `dial`."""
    connections: list[Connection] = []
    path = setup["path"]

    def calls() -> list[Call]:
        return [lambda data, each=each: each.call(path, data) for each in connections]  # type: ignore[misc]

    async def log_in(wanted: int) -> list[str]:
        faults: list[str] = []
        places = asyncio.Semaphore(LOGINS)

        async def one(name: str, password: str) -> None:
            async with places:
                try:
                    connection = await dial(setup["address"], pins=setup["pins"], user=name, password=password, timeout=60)
                    connections.append(connection)
                except SrpcError as fault:
                    faults.append(f"{name}: {fault}")

        await asyncio.gather(*(one(*user) for user in setup["users"][len(connections) : wanted]))
        return faults

    _serve(log_in, calls, connections)


def grpc_at_once(setup: Setup) -> None:
    """By `grpc.aio`, with a channel for each user, who is nobody to gRPC."""
    from bench.programs import grpc_echo  # noqa: PLC0415

    channels: list[Any] = []

    def calls() -> list[Call]:
        return [channel.unary_unary(grpc_echo.METHOD) for channel in channels]

    async def connect(wanted: int) -> list[str]:
        while len(channels) < wanted:
            channel = grpc_echo.aio_channel(setup, grpc_echo.OWN)
            await asyncio.wait_for(channel.channel_ready(), 20)
            channels.append(channel)
        return []

    _serve(connect, calls, channels)


def _serve(log_in: Callable[[int], Awaitable[list[str]]], calls: Callable[[], list[Call]], who: Sequence[object]) -> None:
    driver.say(ready={})
    with asyncio.Runner() as runner:
        while True:
            wanted = driver.told()
            if "users" in wanted:
                faults = runner.run(_awaited(log_in(wanted["users"])))
                driver.say(users=len(who), faults=faults)
            else:
                payload = b"x" * wanted["size"]
                runner.run(_at_once(calls()[: wanted["at_once"]], payload, wanted["seconds"]))


async def _awaited(work: Awaitable[list[str]]) -> list[str]:
    return await work


async def _at_once(calls: list[Call], payload: bytes, seconds: float) -> None:
    counts = [0] * len(calls)

    async def one(at: int, call: Call, until: float) -> None:
        while perf_counter() < until:
            if len(await call(payload)) != len(payload):
                raise ValueError("an answer of another length")
            counts[at] += 1

    made = []
    for limit in (max(seconds * driver.WARM_UP, 0.1), seconds):
        counts[:] = [0] * len(calls)
        begun = perf_counter()
        await asyncio.gather(*(one(at, call, begun + limit) for at, call in enumerate(calls)))
        elapsed = perf_counter() - begun
        made.append(sum(counts))
    driver.say(calls=made[1], all=sum(made), elapsed=elapsed, least=min(counts), most=max(counts))


def main() -> None:
    """Be one of these."""
    with suppress(KeyboardInterrupt):
        driver.run({"turns": turns, "at_once": at_once, "grpc_at_once": grpc_at_once})
