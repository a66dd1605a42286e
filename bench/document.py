"""docs/performance.md: what the bench found is written between its markers; the rest is written by hand and stays."""

from collections.abc import Iterator
from pathlib import Path

from bench import plots, report
from bench.results import Results

FILE = Path(__file__).resolve().parent.parent / "docs/performance.md"
BEGIN, END = "<!-- figures: begin (written by `make bench`) -->", "<!-- figures: end -->"


BUSY = 0.7
"""Load (proc_loadavg(5)) above which the figures are not those of a quiet machine."""


class NoPlace(Exception):
    """The document has no place for the figures."""


def write(results: Results, file: Path = FILE) -> list[Path]:
    """Write figures and plots. Returns the files that were written. Raises NoPlace, OSError."""
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise NoPlace(f"{file} has no lines '{BEGIN}' and '{END}'")
    drawn = plots.draw(results, file.parent / "plots")
    body = "\n\n".join(_parts(results, {path.stem: path for path in drawn}, file.parent))
    file.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    return [file, *drawn]


def _parts(results: Results, drawn: dict[str, Path], directory: Path) -> Iterator[str]:
    extent = results.extent
    yield "## Figures of one run"
    yield f"{report.machine(results)[:1].upper()}{report.machine(results)[1:]}."
    if results.transport != "TLS":
        yield f"**{report.NO_TLS}**"
    if float(results.machine["load before"]) > BUSY:
        yield "**The machine had other work at that time, as its load says: these are not the figures of a quiet one.**"
    yield (
        f"{extent.rounds} rounds of {extent.seconds:g} s for lone calls, {extent.fewer} of {extent.shorter:g} s for the "
        "rest; tables show the median of the rounds, and the least and the greatest in brackets."
    )
    yield "### Goals, and what was found"
    yield report.markdown(report.goals(results))
    for section in results.sections:
        yield f"### {section.title}"
        for name, caption in plots.OF_SECTION.get(section.name, {}).items():
            if name in drawn:
                yield f"![{caption}]({drawn[name].relative_to(directory)})"
        for table in report.tables(section):
            yield report.markdown(table)
        yield from report.left_out(section)
