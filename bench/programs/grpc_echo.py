"""gRPC's side, set up as its own documentation does it: one server process, one channel for all calls of a caller.

The methods take and give bytes (generic handlers without protobuf), which spares gRPC the work of its usual messages.
Its servers authenticate nobody and check nothing: over TLS whoever reaches them may call.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from time import perf_counter
from typing import Any

from bench.programs import driver
from bench.programs.driver import Setup

try:
    import grpc
except ImportError as fault:
    driver.say(missing=f"grpcio can't be imported ({fault})")
    raise SystemExit(0) from None

METHOD = "/bench.Echo/Call"
THREADS = 10
"""Of the synchronous server, as in gRPC's examples."""


def _handlers(echo: Callable[[bytes, Any], object]) -> Any:
    return grpc.method_handlers_generic_handler("bench.Echo", {"Call": grpc.unary_unary_rpc_method_handler(echo)})


def _listen(server: Any, setup: Setup) -> None:
    """Add the port, and say where it is."""
    if "local" in setup:
        server.add_insecure_port(setup["local"])
        driver.say(ready={"address": setup["local"]})
        return
    pair = (setup["key"].encode(), setup["certificate"].encode())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    driver.say(ready={"address": f"127.0.0.1:{port}"})


def server(setup: Setup) -> None:
    """`grpc.server`, with threads."""

    def echo(request: bytes, _context: Any) -> bytes:
        return request

    running = grpc.server(ThreadPoolExecutor(max_workers=THREADS))
    running.add_generic_rpc_handlers((_handlers(echo),))
    _listen(running, setup)
    running.start()
    driver.until_told_to_end()
    running.stop(None)


def aio_server(setup: Setup) -> None:
    """`grpc.aio.server`."""

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    async def main() -> None:
        running = grpc.aio.server()
        running.add_generic_rpc_handlers((_handlers(echo),))
        _listen(running, setup)
        await running.start()
        await asyncio.to_thread(driver.until_told_to_end)
        await running.stop(None)

    asyncio.run(main())


def _channel(setup: Setup, module: Any) -> Any:
    if "certificate" not in setup:
        return module.insecure_channel(setup["address"])
    return module.secure_channel(setup["address"], grpc.ssl_channel_credentials(setup["certificate"].encode()))


def caller(setup: Setup) -> None:
    """A synchronous channel; several in flight are threads that share it."""
    call = _channel(setup, grpc).unary_unary(METHOD)
    call(b"", wait_for_ready=True, timeout=20)
    driver.say(ready={})
    for inflight, payload, seconds in driver.commands():
        if inflight == 1:
            driver.one_at_a_time(call, payload, seconds)
        else:
            _by_threads(call, inflight, payload, seconds)


def _by_threads(call: Callable[[bytes], bytes], inflight: int, payload: bytes, seconds: float) -> None:
    for limit in (seconds * driver.WARM_UP, seconds):
        counts = [0] * inflight
        begun = perf_counter()

        def work(at: int, until: float, counts: list[int]) -> None:
            while perf_counter() < until:
                if len(call(payload)) != len(payload):
                    raise ValueError("an answer of another length")
                counts[at] += 1

        threads = [Thread(target=work, args=(at, begun + limit, counts)) for at in range(inflight)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = perf_counter() - begun
    driver.say(calls=sum(counts), elapsed=elapsed)


def aio_caller(setup: Setup) -> None:
    """A channel of `grpc.aio`, any number in flight."""
    with asyncio.Runner() as runner:

        async def opened() -> Any:
            channel = _channel(setup, grpc.aio)
            await asyncio.wait_for(channel.channel_ready(), 20)
            return channel.unary_unary(METHOD)

        call = runner.run(opened())
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            runner.run(driver.concurrently(call, inflight, payload, seconds))


def main() -> None:
    """Be one of these, as `sys.argv[1]` says."""
    driver.run({"server": server, "aio_server": aio_server, "caller": caller, "aio_caller": aio_caller})
