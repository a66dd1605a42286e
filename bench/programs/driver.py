"""How a process of a bench is told what to do: JSON lines on its standard input, answers on its standard output.

    ◄ {"setup": …}                                       first, once
    ► {"ready": …}                                       what others need to know to use it, or {"missing": "why not"}
    ◄ {"inflight": 64, "size": 64, "seconds": 1.0}       callers only
    ► {"calls": 12345, "elapsed": 1.0003}

End of file on the standard input ends it, so nothing is left when the bench is killed. The loops that count are here and the
same for all; a contender brings one call of its own.
"""

import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from itertools import repeat
from time import perf_counter
from typing import Any

WARM_UP = 0.15
"""Share of a sample's time that is spent before the counting begins."""

BATCH = 16
"""Calls one at a time between two looks at the clock."""

Setup = dict[str, Any]


def told() -> Setup:
    """The next line; ends the process where there is none."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    said: Setup = json.loads(line)
    return said


def say(**facts: object) -> None:
    """One line to whoever runs the bench."""
    print(json.dumps(facts), flush=True)


def until_told_to_end() -> None:
    """For servers: wait for the end of file."""
    sys.stdin.read()


def commands() -> Iterator[tuple[int, bytes, float]]:
    """What a caller is to do next: (in flight, payload, seconds)."""
    while True:
        wanted = told()
        yield wanted["inflight"], b"x" * wanted["size"], wanted["seconds"]


def one_at_a_time(call: Callable[[bytes], bytes], payload: bytes, seconds: float) -> None:
    """Call again and again, and say how often that went. Raises ValueError for a wrong answer."""

    def spend(limit: float) -> tuple[int, float]:
        calls, begun = 0, perf_counter()
        while (elapsed := perf_counter() - begun) < limit:
            for _ in repeat(None, BATCH):
                if len(call(payload)) != len(payload):
                    raise ValueError("an answer of another length")
            calls += BATCH
        return calls, elapsed

    spend(seconds * WARM_UP)
    calls, elapsed = spend(seconds)
    say(calls=calls, elapsed=elapsed)


async def concurrently(call: Callable[[bytes], Awaitable[bytes]], inflight: int, payload: bytes, seconds: float) -> None:
    """As `one_at_a_time`, by `inflight` tasks each of which awaits its call before it makes the next."""
    import asyncio  # noqa: PLC0415  # a blocking caller has no use for it

    calls = 0

    async def one(until: float) -> None:
        nonlocal calls
        while perf_counter() < until:
            if len(await call(payload)) != len(payload):
                raise ValueError("an answer of another length")
            calls += 1

    async def spend(limit: float) -> float:
        begun = perf_counter()
        await asyncio.gather(*(one(begun + limit) for _ in range(inflight)))
        return perf_counter() - begun

    await spend(seconds * WARM_UP)
    calls = 0
    elapsed = await spend(seconds)
    say(calls=calls, elapsed=elapsed)


def run(roles: dict[str, Callable[[Setup], None]]) -> None:
    """Be what `sys.argv[1]` says."""
    roles[sys.argv[1]](told())
