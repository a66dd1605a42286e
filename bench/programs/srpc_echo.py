"""sRPC's side: services by either `serve`, with a plain or an asyncio handler, and callers by either `dial`."""

import asyncio
from collections.abc import Callable, Iterator
from threading import Event, Thread
from time import perf_counter
from typing import Any

from bench.programs import driver
from bench.programs.driver import Setup
from srpc_client import Connection, Request, blocking, dial, serve


def echo(request: Request) -> bytes:
    """The synchronous handler."""
    return request.payload


async def aecho(request: Request) -> bytes:
    """The asyncio handler."""
    return request.payload


HANDLERS: dict[str, Callable[[Request], Any]] = {"plain": echo, "asyncio": aecho}


def service(setup: Setup) -> None:
    """Serve `path` on an asyncio loop by the handler of that name. In a process of its own, as its own user."""

    async def main() -> None:
        serving = asyncio.ensure_future(serve({setup["path"]: HANDLERS[setup["handler"]]}, address=setup["local"]))
        driver.say(ready={})
        await asyncio.to_thread(driver.until_told_to_end)
        serving.cancel()
        await asyncio.wait([serving])

    asyncio.run(main())


def blocking_service(setup: Setup) -> None:
    """Serve `path` by `srpc_client.blocking.serve`, which takes plain handlers only."""
    ended = Event()

    def wait() -> None:
        driver.until_told_to_end()
        ended.set()

    Thread(target=wait, daemon=True).start()
    driver.say(ready={})
    blocking.serve({setup["path"]: HANDLERS[setup["handler"]]}, address=setup["local"], until=ended.is_set)


def blocking_caller(setup: Setup) -> None:
    """`srpc_client.blocking`: one at a time by `call`, else by `call_many`."""
    path = setup["path"]
    with blocking.dial(**setup["dial"]) as connection:
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            if inflight == 1:
                driver.one_at_a_time(lambda data: connection.call(path, data), payload, seconds)
                continue
            for limit in (seconds * driver.WARM_UP, seconds):
                calls, begun = 0, perf_counter()
                for answer in connection.session.call_many(path, _until(begun + limit, payload), inflight):
                    if len(answer) != len(payload):
                        raise ValueError("an answer of another length")
                    calls += 1
                elapsed = perf_counter() - begun
            driver.say(calls=calls, elapsed=elapsed)


def _until(end: float, payload: bytes) -> Iterator[bytes]:
    while perf_counter() < end:
        yield payload


def asyncio_caller(setup: Setup) -> None:
    """`srpc_client.dial`, any number in flight."""
    path = setup["path"]
    with asyncio.Runner() as runner:
        connection = runner.run(_dialled(setup))
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            runner.run(driver.concurrently(lambda data: connection.call(path, data), inflight, payload, seconds))


async def _dialled(setup: Setup) -> Connection:
    return await dial(**setup["dial"])


def main() -> None:
    """Be one of these, as `sys.argv[1]` says."""
    driver.run(
        {
            "service": service,
            "blocking_service": blocking_service,
            "blocking": blocking_caller,
            "asyncio": asyncio_caller,
        }
    )
