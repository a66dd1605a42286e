"""All contenders and workloads in turn, again and again, so that whatever else the machine does falls on all alike."""

from collections.abc import Callable, Sequence

from bench.plan import Contender, Extent, Workload
from bench.results import Sample
from bench.running import Missing, Program
from bench.stage import Stage

ANSWER_SECONDS = 60.0
"""Beyond a sample's own time, after which a caller counts as stuck."""


def callers(stage: Stage, contenders: Sequence[Contender]) -> tuple[dict[str, Program], dict[str, str]]:
    """Start all callers. Returns them by contender's name, and why those are missing that are. Raises Broken."""
    found: dict[str, Program] = {}
    missing: dict[str, str] = {}
    for contender in contenders:
        try:
            found[contender.name] = stage.caller(contender)
        except Missing as fault:
            missing[contender.name] = str(fault)
    return found, missing


def measure(
    running: dict[str, Program],
    workloads: Sequence[Workload],
    extent: Extent,
    progress: Callable[[str], object],
) -> list[Sample]:
    """Take one sample of each contender and workload in every round. progress: told what comes next. Raises Broken.

    Every second round goes the other way round: a machine that gets slower, or warmer, does so for nobody in particular.
    """
    samples = []
    for number in range(extent.rounds):
        order = list(running)
        if number % 2:
            order.reverse()
        for workload in workloads:
            for name in order:
                progress(f"round {number + 1} of {extent.rounds}: {name}, {workload.name}")
                wanted = {"inflight": workload.inflight, "size": workload.size, "seconds": extent.seconds}
                answer = running[name].ask(wanted, 2 * extent.seconds + ANSWER_SECONDS)
                samples.append(Sample(name, workload.name, number, answer["calls"] / answer["elapsed"]))
    return samples
