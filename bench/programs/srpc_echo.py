"""sRPC's side: services by either `serve`, with a plain or an asyncio handler, and callers by either `dial`."""

import asyncio
import resource
from collections.abc import Callable, Iterator
from errno import EAGAIN
from itertools import cycle
from threading import Event, Thread
from time import perf_counter
from typing import Any

from bench.programs import driver
from bench.programs.driver import Setup
from srpc_client import CallError, Connection, Request, blocking, dial, serve


def echo(request: Request) -> bytes:
    """The synchronous handler."""
    return request.payload


async def aecho(request: Request) -> bytes:
    """The asyncio handler."""
    return request.payload


HANDLERS: dict[str, Callable[[Request], Any]] = {"plain": echo, "asyncio": aecho}


def _served(setup: Setup) -> dict[str, Any]:
    """What both kinds of `serve` are told: `paths`, by the handler of that name, for a group, with a mode."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two descriptors for each caller
    handlers = dict.fromkeys(setup["paths"], HANDLERS[setup["handler"]])
    return {"handlers": handlers, "address": setup["local"], "group": setup["group"], "mode": setup["mode"]}


def service(setup: Setup) -> None:
    """Serve on an asyncio loop. In a process of its own, as its own user."""

    async def main() -> None:
        serving = asyncio.ensure_future(serve(**_served(setup)))
        driver.say(ready={})
        await asyncio.to_thread(driver.until_told_to_end)
        serving.cancel()
        await asyncio.wait([serving])

    asyncio.run(main())


def blocking_service(setup: Setup) -> None:
    """Serve by `srpc_client.blocking.serve`, which takes plain handlers only."""
    ended, said = Event(), False

    def wait() -> None:
        driver.until_told_to_end()
        ended.set()

    def until() -> bool:  # first asked when all is announced
        nonlocal said
        if not said:
            said = True
            driver.say(ready={})
        return ended.is_set()

    Thread(target=wait, daemon=True).start()
    blocking.serve(**_served(setup), until=until)


def blocking_caller(setup: Setup, busy_poll: float = 0.0) -> None:
    """`srpc_client.blocking`: one at a time by `call`, else by `call_many`."""
    path = setup["path"]
    with blocking.dial(**setup["dial"], busy_poll=busy_poll) as connection:
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            if inflight == 1:
                driver.one_at_a_time(lambda data: connection.call(path, data), payload, seconds)
                continue
            before, calls = 0, 0
            for limit in (seconds * driver.WARM_UP, seconds):
                before, calls, begun = calls, 0, perf_counter()
                for answer in connection.session.call_many(path, _until(begun + limit, payload), inflight):
                    if len(answer) != len(payload):
                        raise ValueError("an answer of another length")
                    calls += 1
                elapsed = perf_counter() - begun
            driver.say(calls=calls, all=before + calls, elapsed=elapsed, latencies={})


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


def patient(setup: Setup) -> None:
    """As `asyncio_caller`, and a call that is refused because too much waits for its handler is made again."""
    path = setup["path"]
    refused = 0
    with asyncio.Runner() as runner:
        connection = runner.run(_dialled(setup))

        async def call(data: bytes) -> bytes:
            nonlocal refused
            while True:
                try:
                    return await connection.call(path, data)
                except CallError as fault:
                    if fault.errno != EAGAIN:
                        raise
                    refused += 1
                    await asyncio.sleep(0.01)

        def said() -> dict[str, int]:
            return {"refused": refused}

        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            refused = 0
            runner.run(driver.concurrently(call, inflight, payload, seconds, more=said))


async def _dialled(setup: Setup) -> Connection:
    return await dial(**setup["dial"])


def several(setup: Setup) -> None:
    """`blocking.dial`; one call at a time, on `paths` in turn: as many of them as it is told."""
    with blocking.dial(**setup["dial"]) as connection:
        driver.say(ready={})
        turn = cycle(setup["paths"])
        while True:
            wanted = driver.told()
            if "paths" in wanted:
                turn = cycle(setup["paths"][: wanted["paths"]])
                driver.say(paths=wanted["paths"])
            else:
                payload, seconds = b"x" * wanted["size"], wanted["seconds"]
                driver.one_at_a_time(lambda data: connection.call(next(turn), data), payload, seconds)  # noqa: B023


def connecting(setup: Setup) -> None:
    """Each call is a connection: made, asked whether the server is there, closed."""
    options = {key: value for key, value in setup["dial"].items() if key in ("address", "pins")}

    def once(payload: bytes) -> bytes:
        with blocking.connect(**options) as connection:
            connection.ping(timeout=20)
        return payload

    _each_connects(once)


def logging_in(setup: Setup) -> None:
    """Each call is a connection with a login and one call on it."""

    def once(payload: bytes) -> bytes:
        with blocking.dial(**setup["dial"], timeout=60) as connection:
            return connection.call(setup["path"], payload, timeout=20)

    with blocking.dial(**setup["dial"]) as connection:  # so that the worker is there, and stays
        connection.stat("/")
        _each_connects(once)


def _each_connects(once: Callable[[bytes], bytes]) -> None:
    driver.say(ready={})
    for inflight, payload, seconds in driver.commands():
        if inflight == 1:
            driver.one_at_a_time(once, payload, seconds)
        else:
            driver.by_threads(once, inflight, payload, seconds)


def holding(setup: Setup) -> None:
    """Holds as many connections as it is told; over TLS nobody logs in on them."""
    options = {key: value for key, value in setup["dial"].items() if key in ("address", "pins")}
    held: list[blocking.Connection] = []
    driver.say(ready={})
    while True:
        wanted = driver.told()["held"]
        while len(held) < wanted:
            held.append(blocking.dial(**options))
            held[-1].ping(timeout=20)
        while len(held) > wanted:
            held.pop().close()
        driver.say(held=len(held))


def main() -> None:
    """Be one of these, as `sys.argv[1]` says."""
    driver.run(
        {
            "service": service,
            "blocking_service": blocking_service,
            "blocking": blocking_caller,
            "busy": lambda setup: blocking_caller(setup, 2e-4),
            "asyncio": asyncio_caller,
            "patient": patient,
            "several": several,
            "connecting": connecting,
            "logging_in": logging_in,
            "holding": holding,
        }
    )
