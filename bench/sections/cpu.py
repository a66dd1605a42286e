"""Processor time of a call, by process: the same million calls cost so many seconds."""

from bench import plan, rounds
from bench.plan import Extent
from bench.results import Section
from bench.rounds import Progress
from bench.stage import Stage
from tests.realm.counters import cpu_seconds


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """CPU seconds per million calls: one at a time, 64 in flight, a megabyte at a time."""
    running = rounds.callers(stage, plan.LONE, section)
    note = "User and kernel time together, of all threads. `monitor` is not on a call's path and shows what it does besides."
    for workload in (plan.ONE, plan.MANY, plan.BIG):
        title = f"Processor time, {workload.name}"
        grid = section.grid(f"cpu, {workload.name}", title, "s per million calls", note=note)
        for number, (contender, caller) in rounds.interleaved(list(running.items()), extent.fewer):
            progress(f"round {number + 1} of {extent.fewer}: processor time of {contender.name}, {workload.name}")
            parties = stage.parties(contender)
            before = {name: cpu_seconds(pid) for name, pid in parties.items()}
            calls = caller.sample(workload.inflight, workload.size, extent.shorter)["all"]
            used = {name: (cpu_seconds(pid) - before[name]) / calls * 1e6 for name, pid in parties.items()}
            grid.add(contender.name, "in all", sum(used.values()))
            for name, seconds in used.items():
                grid.add(contender.name, name, seconds)
