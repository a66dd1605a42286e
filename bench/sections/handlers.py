"""What answers a call: services of both kinds, resident programs, plain programs beside `subprocess.run`."""

from typing import Any

from bench import plan, rounds
from bench.plan import Contender, Extent, Workload
from bench.results import Section
from bench.rounds import Progress
from bench.stage import Stage

RATIOS = ((plan.RESIDENT.name, plan.SERVICE.name), (plan.PROGRAM.name, plan.SUBPROCESS.name))


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """64 bytes, one at a time and in flight, by kind of handler."""
    running = rounds.callers(stage, plan.HANDLERS, section)
    note = "Called by `blocking.dial`, but where the table says otherwise. A plain program is started anew for each call."
    rates = section.grid("handlers", "64 bytes, by kind of handler", "calls/s", ratios=RATIOS, note=note)

    def take(contender: Contender, workload: Workload, answer: dict[str, Any]) -> None:
        rates.add(contender.name, workload.name, answer["calls"] / answer["elapsed"])

    rounds.measure(running, plan.BY_HANDLER, extent.fewer, extent.shorter, take, progress)
