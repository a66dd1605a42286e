"""gRPC's side in Python, set up as its own documentation does it: one server process, one channel for all calls of a caller.

The methods take and give bytes (generic handlers without protobuf), which spares gRPC the work of its usual messages.
Its servers authenticate nobody and check nothing: over TLS whoever reaches them may call.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

LARGEST = 32 * 1024 * 1024
OWN = ("grpc.use_local_subchannel_pool", 1)
"""An option: channels to one server share a connection otherwise."""

SIZES = [("grpc.max_receive_message_length", LARGEST), ("grpc.max_send_message_length", LARGEST)]
"""Options: gRPC takes messages of 4 MB by default."""


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

    running = grpc.server(ThreadPoolExecutor(max_workers=THREADS), options=SIZES)
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
        running = grpc.aio.server(options=SIZES)
        running.add_generic_rpc_handlers((_handlers(echo),))
        _listen(running, setup)
        await running.start()
        await asyncio.to_thread(driver.until_told_to_end)
        await running.stop(None)

    asyncio.run(main())


def channel(setup: Setup, module: Any, *options: tuple[str, int]) -> Any:
    """A channel as `setup` says. module: grpc or grpc.aio. options: further ones."""
    if "certificate" not in setup:
        return module.insecure_channel(setup["address"], options=[*SIZES, *options])
    credentials = grpc.ssl_channel_credentials(setup["certificate"].encode())
    return module.secure_channel(setup["address"], credentials, options=[*SIZES, *options])


def aio_channel(setup: Setup, *options: tuple[str, int]) -> Any:
    """A channel of `grpc.aio`."""
    return channel(setup, grpc.aio, *options)


def caller(setup: Setup) -> None:
    """A synchronous channel; several in flight are threads that share it."""
    call = channel(setup, grpc).unary_unary(METHOD)
    call(b"", wait_for_ready=True, timeout=20)
    driver.say(ready={})
    for inflight, payload, seconds in driver.commands():
        if inflight == 1:
            driver.one_at_a_time(call, payload, seconds)
        else:
            driver.by_threads(call, inflight, payload, seconds)


def aio_caller(setup: Setup) -> None:
    """A channel of `grpc.aio`, any number in flight."""
    with asyncio.Runner() as runner:

        async def connected() -> Any:
            opened = aio_channel(setup)
            await asyncio.wait_for(opened.channel_ready(), 20)
            return opened.unary_unary(METHOD)

        call = runner.run(connected())
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            runner.run(driver.concurrently(call, inflight, payload, seconds))


def connecting(setup: Setup) -> None:
    """Each call is a channel with a connection of its own: made, called once, closed."""

    def once(payload: bytes) -> bytes:
        with channel(setup, grpc, OWN) as made:
            answer: bytes = made.unary_unary(METHOD)(payload, wait_for_ready=True, timeout=20)
            return answer

    driver.say(ready={})
    for inflight, payload, seconds in driver.commands():
        if inflight == 1:
            driver.one_at_a_time(once, payload, seconds)
        else:
            driver.by_threads(once, inflight, payload, seconds)


def holding(setup: Setup) -> None:
    """Holds as many channels as it is told, each with a connection of its own."""
    held: list[Any] = []
    driver.say(ready={})
    while True:
        wanted = driver.told()["held"]
        while len(held) < wanted:
            held.append(channel(setup, grpc, OWN))
            grpc.channel_ready_future(held[-1]).result(20)
        while len(held) > wanted:
            held.pop().close()
        driver.say(held=len(held))


def main() -> None:
    """Be one of these, as `sys.argv[1]` says."""
    driver.run(
        {
            "server": server,
            "aio_server": aio_server,
            "caller": caller,
            "aio_caller": aio_caller,
            "connecting": connecting,
            "holding": holding,
        }
    )
