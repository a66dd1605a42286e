"""Echo calls beside the peers: one at a time, in flight, with payloads."""

from collections import Counter
from typing import Any

from bench import plan, rounds
from bench.plan import Contender, Extent, Workload
from bench.results import Section, quantile
from bench.rounds import Progress
from bench.stage import Stage
from tests.realm.counters import Peak


def lone(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """64 bytes, one at a time: calls per second, and how the latencies are distributed."""
    running = rounds.callers(stage, plan.LONE, section)
    rates = section.grid("lone", "64 bytes, one at a time", "calls/s", ratios=plan.RATIOS)

    def take(contender: Contender, workload: Workload, answer: dict[str, Any]) -> None:
        rates.add(contender.name, workload.name, answer["calls"] / answer["elapsed"])
        found = section.latencies.setdefault(contender.name, Counter())
        found.update({int(bucket): count for bucket, count in answer["latencies"].items()})

    rounds.measure(running, [plan.ONE], extent.rounds, extent.seconds, take, progress)
    spread = section.grid(
        "latency", "Latency of these calls", "µs", note="All rounds together, each call timed by its caller."
    )
    for name, histogram in section.latencies.items():
        for part, heading in ((0.01, "1 %"), (0.5, "median"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %")):
            spread.add(name, heading, quantile(histogram, part))


def flight(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """64 bytes, with several in flight: calls per second."""
    running = rounds.callers(stage, plan.ECHOES, section)
    rates = section.grid("flight", "64 bytes, several in flight on one connection", "calls/s", ratios=plan.RATIOS_IN_FLIGHT)

    def take(contender: Contender, workload: Workload, answer: dict[str, Any]) -> None:
        rates.add(contender.name, workload.name, answer["calls"] / answer["elapsed"])

    rounds.measure(running, plan.FLIGHTS, extent.fewer, extent.shorter, take, progress)


def payload(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """Larger payloads: megabytes per second, and what the processes on the way need for the largest."""
    running = rounds.callers(stage, plan.BULK, section)
    note = "Megabytes (10^6 bytes) of payload per second and direction: an echo moves each byte there and back."
    rates = section.grid("payload", "Payloads", "MB/s", ratios=plan.RATIOS, note=note)

    def take(contender: Contender, workload: Workload, answer: dict[str, Any]) -> None:
        rates.add(contender.name, workload.name, answer["calls"] / answer["elapsed"] * workload.size / 1e6)

    rounds.measure(running, plan.PAYLOADS, extent.fewer, extent.shorter, take, progress)
    if stage.private and plan.BLOCKING in running:
        _peaks(stage, section, progress)


def _peaks(stage: Stage, section: Section, progress: Progress) -> None:
    """How far each process on the way grows at most while the largest payloads pass through it."""
    caller = stage.caller(plan.PATIENT)
    grid = section.grid(
        "peaks",
        "Memory while 16 MB payloads pass",
        "MB",
        note="Peak resident memory (VmHWM, reset before) of each process on the way; the caller is asyncio's. A worker lets "
        "no more than 32 MB wait for one handler: calls beyond that are refused with EAGAIN, and made again here.",
        label="process",
    )
    for inflight in (1, 4, 16):
        column = plan.IN_FLIGHT.format(inflight)
        progress(f"memory with 16 MB payloads, {column}")
        peaks = {name: Peak(pid) for name, pid in stage.parties(plan.PATIENT).items()}
        answer = caller.sample(inflight, plan.HUGE.size, 1.0)
        for name, peak in peaks.items():
            grid.add(name, column, peak.megabytes())
        grid.add(plan.PEAKS, column, sum(peaks[name].megabytes() for name in ("gate", "worker", "service")))
        grid.add("calls refused with EAGAIN, for each that was answered", column, answer["refused"] / answer["all"])
