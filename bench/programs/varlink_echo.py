"""asyncvarlink's side, as its README has it: an interface with a typed method, served on a Unix socket, called by a proxy.

The payload is text, which varlink carries as JSON. Calls in flight are pipelined on one connection.
"""

import asyncio
import os
from typing import Any

from bench.programs import driver
from bench.programs.driver import Setup

try:
    import asyncvarlink
except ImportError as fault:
    driver.say(missing=f"asyncvarlink can't be imported ({fault})")
    raise SystemExit(0) from None


class Echo(asyncvarlink.VarlinkInterface, name="bench.echo"):
    """The interface, for both sides."""

    @asyncvarlink.varlinkmethod(return_parameter="data")
    def Call(self, *, data: str) -> str:  # noqa: N802  # varlink's methods are capitalised
        """Return what was sent."""
        return data


def server(setup: Setup) -> None:
    """A server on the socket `local`."""

    async def serve() -> None:
        registry = asyncvarlink.VarlinkInterfaceRegistry()
        registry.register_interface(Echo())
        os.umask(0)  # whoever may reach the directory may connect
        running = await asyncvarlink.create_unix_server(registry.protocol_factory, setup["local"].removeprefix("unix:"))
        driver.say(ready={"address": setup["local"]})
        await asyncio.to_thread(driver.until_told_to_end)
        running.close()

    asyncio.run(serve())


def caller(setup: Setup) -> None:
    """A proxy on one connection."""
    with asyncio.Runner() as runner:

        async def connected() -> Any:
            path = setup["address"].removeprefix("unix:")
            _transport, protocol = await asyncvarlink.connect_unix_varlink(asyncvarlink.VarlinkClientProtocol, path)
            return protocol.make_proxy(Echo)

        proxy = runner.run(connected())
        driver.say(ready={})
        for inflight, payload, seconds in driver.commands():
            text = payload.decode()
            runner.run(
                driver.concurrently(
                    lambda _payload: proxy.Call(data=text),  # noqa: B023
                    inflight,
                    payload,
                    seconds,
                    lambda answer: len(answer["data"]),
                )
            )


def main() -> None:
    """Be one of these."""
    driver.run({"server": server, "caller": caller})
