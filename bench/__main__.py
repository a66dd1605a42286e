"""`python -m bench`: measure, show, and write JSON where that is wanted."""

import json
import sys
from pathlib import Path

import click

from bench import machine, plan, report, rounds, workers
from bench.results import Results
from bench.running import Broken
from bench.stage import Stage
from srpc_client import SrpcError
from tests.realm import DaemonFault


@click.command()
@click.option("--quick", is_flag=True, help="A short run: the figures scatter more.")
@click.option("--rounds", "wanted_rounds", type=click.IntRange(1, 1000), help="How often everything is measured.")
@click.option("--seconds", type=click.FloatRange(0.05, 600), help="Length of one sample.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples here, too.")
def main(quick: bool, wanted_rounds: int | None, seconds: float | None, file: Path | None) -> None:
    """Measure sRPC and its peers side by side.

    The exit status is 0 unless something broke: no time is asserted, the goals are only reported on.
    """
    extent = plan.QUICK if quick else plan.FULL
    extent = plan.Extent(wanted_rounds or extent.rounds, seconds or extent.seconds, extent.starts)
    file = file and file.resolve()
    try:
        results = run(extent)
    except (Broken, DaemonFault, SrpcError) as fault:
        print(fault, file=sys.stderr)
        sys.exit(1)
    report.show(results, report.console())
    if file:
        file.write_text(json.dumps(results.plain(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run(extent: plan.Extent) -> Results:
    """Everything. Raises Broken, DaemonFault."""
    facts = machine.describe()
    # Not before the namespace is private may there be a second thread, and a status line is one.
    with Stage() as stage, report.console().status("workers") as status:
        results = Results(facts, stage.transport, extent.rounds, extent.seconds)
        results.workers = workers.cost(stage, extent.starts)
        status.update("start of servers and callers")
        running, results.missing = rounds.callers(stage, plan.CONTENDERS)
        results.samples = rounds.measure(running, plan.WORKLOADS, extent, status.update)
    return results


if __name__ == "__main__":
    main()
