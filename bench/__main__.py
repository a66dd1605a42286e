"""`python -m bench`: measure, show, and write document and JSON where that is wanted."""

import json
import sys
import time
import traceback
from pathlib import Path

import click

from bench import document, machine, plan, report
from bench.results import Results, Section
from bench.rounds import Progress
from bench.sections import NAMES, PARTS, Part
from bench.stage import Stage
from tests import realm


@click.command()
@click.option("--quick", is_flag=True, help="A short run: the figures scatter more.")
@click.option("--only", metavar="SECTIONS", help=f"Some of: {','.join(NAMES)}.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="How often everything is measured.")
@click.option("--seconds", type=click.FloatRange(0.05, 600), help="Length of one sample.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples here, too.")
@click.option("--write", is_flag=True, help="Write figures and plots into docs/performance.md.")
def main(quick: bool, only: str | None, rounds: int | None, seconds: float | None, file: Path | None, write: bool) -> None:
    """Measure sRPC and its peers side by side.

    The exit status is 0 unless something broke: no time is asserted, the goals are only reported on. A section that breaks
    is reported, and the others go on.
    """
    extent = plan.extent(plan.QUICK if quick else plan.FULL, rounds, seconds)
    names = only.split(",") if only else list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are only {', '.join(NAMES)}", param_hint="--only")
    file = file and file.resolve()
    results = run(extent, [part for part in PARTS if part.name in names])
    report.show(results, report.console())
    if file:
        file.write_text(json.dumps(results.plain(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if write:
        for written in document.write(results):
            print(f"written: {written}")
    for section in results.sections:
        if section.failure:
            print(f"\n{section.name} failed:\n{section.failure}", file=sys.stderr)
    sys.exit(1 if any(section.failure for section in results.sections) else 0)


def run(extent: plan.Extent, parts: list[Part]) -> Results:
    """All these sections, each whatever became of the others."""
    realm.enter()  # before there is a second thread, which a status line is
    results = Results(machine.describe(), "TLS" if realm.enter().private else "Unix sockets", extent)
    stage: Stage | None = None
    with report.console().status("") as status:
        try:
            for part in parts:
                section = Section(part.name, part.title)
                results.sections.append(section)
                if part.private and not realm.enter().private:
                    section.notes.append(f"{part.title}: {realm.missing()}.")
                    continue
                began = time.monotonic()
                try:
                    stage = stage or Stage().__enter__()
                    part.run(stage, extent, section, _progress(part.name, status.update))
                    results.machine.update(stage.versions)
                except Exception:  # whatever it is, the other sections may do without
                    section.failure = traceback.format_exc()
                    _over(stage)
                    stage = None
                section.seconds = time.monotonic() - began
        finally:
            _over(stage)
    return results


def _progress(name: str, update: Progress) -> Progress:
    begun = time.monotonic()

    def tell(what: str) -> None:
        update(f"{name}: {what}")
        if not sys.stdout.isatty():
            print(f"{time.monotonic() - begun:6.1f} s  {name}: {what}", file=sys.stderr)

    return tell


def _over(stage: Stage | None) -> None:
    """End what a section has left in an unknown state, whatever that says."""
    if stage is not None:
        try:
            stage.__exit__(*sys.exc_info())
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
