"""All contenders and workloads in turn, again and again, so that whatever else the machine does falls on all alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bench.plan import Contender, Workload
from bench.results import Section
from bench.running import Missing, Program
from bench.stage import Stage

T = TypeVar("T")
Progress = Callable[[str], object]


def interleaved(things: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, thing): all of them in each round, every second time the other way round.

    A machine that gets slower, or warmer, does so for nobody in particular.
    """
    for number in range(rounds):
        for thing in things if number % 2 == 0 else list(reversed(things)):
            yield number, thing


def callers(stage: Stage, contenders: Sequence[Contender], section: Section) -> dict[Contender, Program]:
    """Start all callers; those that can't be are noted in the section. Raises Broken."""
    found: dict[Contender, Program] = {}
    for contender in contenders:
        try:
            found[contender] = stage.caller(contender)
        except Missing as fault:
            section.missing[contender.name] = str(fault)
    return found


def measure(
    running: dict[Contender, Program],
    workloads: Sequence[Workload],
    rounds: int,
    seconds: float,
    take: Callable[[Contender, Workload, dict[str, Any]], object],
    progress: Callable[[str], object],
) -> None:
    """Take one sample of each contender and workload in every round. Raises Broken.

    take: given each answer (`bench.programs.driver`). progress: told what comes next.
    """
    wanted = [
        (contender, workload)
        for workload in workloads
        for contender in running
        if workload.only is None or contender.name in workload.only
    ]
    for number, (contender, workload) in interleaved(wanted, rounds):
        progress(f"round {number + 1} of {rounds}: {contender.name}, {workload.name}")
        take(contender, workload, running[contender].sample(workload.inflight, workload.size, seconds))
