"""How a process of a bench is told what to do: JSON lines on its standard input, answers on its standard output.

    ◄ {"setup": …}                                       first, once
    ► {"ready": …}                                       what others need to know to use it, or {"missing": "why not"}
    ◄ {"inflight": 64, "size": 64, "seconds": 1.0}       callers only
    ► {"calls": 12345, "all": 14000, "elapsed": 1.0003, "latencies": {"590": 17}}

`calls` were made in `elapsed` seconds; `all` counts those of the warm-up too. `latencies` is a histogram (`bucket`) where
one call was made at a time. End of file on the standard input ends the process, so nothing is left when the bench is
killed. The loops that count are here and the same for all (native/told.h has them again); a contender brings one call.
"""

import json
import sys
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from math import exp, log
from time import perf_counter, perf_counter_ns
from typing import Any

WARM_UP = 0.15
"""Share of a sample's time that is spent before the counting begins."""

BUCKET = 0.02
"""Width of a histogram's bucket: of the logarithm of a latency in nanoseconds, so 2 %."""

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


def histogram(latencies: Iterable[int]) -> Counter[int]:
    """How many latencies (ns) there are in each bucket."""
    return Counter(int(log(each or 1) / BUCKET) for each in latencies)


def bucket_ns(bucket: int) -> float:
    """The latency (ns) in the middle of a bucket."""
    return exp((bucket + 0.5) * BUCKET)


def commands() -> Iterator[tuple[int, bytes, float]]:
    """What a caller is to do next: (in flight, payload, seconds)."""
    while True:
        wanted = told()
        yield wanted["inflight"], b"x" * wanted["size"], wanted["seconds"]


def one_at_a_time(call: Callable[[bytes], bytes], payload: bytes, seconds: float) -> None:
    """Call again and again, and say how often that went. Raises ValueError for a wrong answer."""

    def spend(limit: float) -> tuple["array[int]", float]:
        took = array("Q")
        begun = last = perf_counter_ns()
        end = begun + int(limit * 1e9)
        while last < end:
            answer = call(payload)
            now = perf_counter_ns()
            took.append(now - last)
            last = now
            if len(answer) != len(payload):
                raise ValueError("an answer of another length")
        return took, (last - begun) / 1e9

    before, _ = spend(seconds * WARM_UP)
    took, elapsed = spend(seconds)
    say(calls=len(took), all=len(before) + len(took), elapsed=elapsed, latencies=histogram(took))


async def concurrently(
    call: Callable[[bytes], Awaitable[Any]],
    inflight: int,
    payload: bytes,
    seconds: float,
    length: Callable[[Any], int] = len,
    more: Callable[[], dict[str, Any]] = dict,
) -> None:
    """As `one_at_a_time`, by `inflight` tasks each of which awaits its call before it makes the next.

    length: of the payload in an answer. more: what else is to be said of the sample.
    """
    import asyncio  # noqa: PLC0415  # a blocking caller has no use for it

    took, calls = array("Q"), 0

    async def one(until: float) -> None:
        nonlocal calls
        while perf_counter() < until:
            if length(await call(payload)) != len(payload):
                raise ValueError("an answer of another length")
            calls += 1

    async def lone(until: float) -> None:
        nonlocal calls
        end, last = int(until * 1e9), perf_counter_ns()
        while last < end:
            answer = await call(payload)
            now = perf_counter_ns()
            took.append(now - last)
            last = now
            if length(answer) != len(payload):
                raise ValueError("an answer of another length")
            calls += 1

    async def spend(limit: float) -> float:
        begun = perf_counter()
        if inflight == 1:
            await lone(begun + limit)
        else:
            await asyncio.gather(*(one(begun + limit) for _ in range(inflight)))
        return perf_counter() - begun

    await spend(seconds * WARM_UP)
    before, calls = calls, 0
    took = array("Q")
    elapsed = await spend(seconds)
    say(calls=calls, all=before + calls, elapsed=elapsed, latencies=histogram(took), **more())


def by_threads(call: Callable[[bytes], bytes], inflight: int, payload: bytes, seconds: float) -> None:
    """As `one_at_a_time`, by `inflight` threads."""
    from threading import Thread  # noqa: PLC0415

    made = []
    for limit in (seconds * WARM_UP, seconds):
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
        made.append(sum(counts))
    say(calls=made[1], all=sum(made), elapsed=elapsed, latencies={})


def run(roles: dict[str, Callable[[Setup], None]]) -> None:
    """Be what `sys.argv[1]` says."""
    roles[sys.argv[1]](told())
