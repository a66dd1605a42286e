"""What came out: samples in grids, and the medians, spreads, ratios and verdicts that are made of them."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.plan import Extent, Goal, Value, goals
from bench.programs.driver import bucket_ns


@dataclass(frozen=True)
class Spread:
    """Of several values: the median, the least and the greatest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


@dataclass
class Grid:
    """Samples of one kind in one unit: rows (contenders, mostly) by columns (workloads, mostly).

    ratios: pairs of rows whose ratio is shown. note: a sentence or more below the table. label: of the rows.
    """

    name: str
    title: str
    unit: str
    note: str = ""
    label: str = ""
    ratios: Sequence[tuple[str, str]] = ()
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, column: str, *values: float) -> None:
        """Add samples."""
        self.cells.setdefault(row, {}).setdefault(column, []).extend(values)

    def values(self, row: str, column: str) -> list[float]:
        """The samples, round by round; empty where it was not measured."""
        return self.cells.get(row, {}).get(column, [])

    def median(self, row: str, column: str) -> float | None:
        """None where it was not measured."""
        values = self.values(row, column)
        return statistics.median(values) if values else None

    @property
    def columns(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(column for row in self.cells.values() for column in row))


@dataclass
class Section:
    """What one part of the bench found. missing: row to why it was left out. failure: why it could not be finished.

    latencies: by contender, histograms (`bench.programs.driver.BUCKET`) of calls made one at a time.
    """

    name: str
    title: str
    grids: list[Grid] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    latencies: dict[str, Counter[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    def grid(self, name: str, title: str, unit: str, **more: Any) -> Grid:
        """Begin a grid."""
        made = Grid(name, title, unit, **more)
        self.grids.append(made)
        return made


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is met in this run. found: None where it could not be measured; `detail` then says why."""

    number: str
    goal: str
    found: float | None
    unit: str
    met: bool | None
    detail: str = ""


@dataclass
class Results:
    """One run. transport: what callers and servers had between them."""

    machine: dict[str, str]
    transport: str
    extent: Extent
    sections: list[Section] = field(default_factory=list)

    def grid(self, name: str) -> Grid | None:
        """The grid of this name, None where it was not measured."""
        return next((each for section in self.sections for each in section.grids if each.name == name), None)

    def values(self, value: Value) -> list[float]:
        """Samples; empty where it was not measured."""
        grid = self.grid(value.grid)
        return grid.values(value.row, value.column) if grid else []

    def verdicts(self) -> list[Verdict]:
        """All goals, met or not."""
        return [self._verdict(goal) for goal in goals(self.extent)]

    def _verdict(self, goal: Goal) -> Verdict:
        ours = self.values(goal.value)
        theirs = self.values(goal.against) if goal.against else [1.0]
        if not ours or not theirs:
            return Verdict(goal.number, goal.sentence, None, goal.unit, None, self._why(goal))
        found = statistics.median(ours) / statistics.median(theirs)
        met = found >= goal.bound if goal.least else found <= goal.bound
        detail = ""
        if goal.against and len(ours) == len(theirs) > 1:
            pairs = Spread.of(a / b for a, b in zip(ours, theirs, strict=True))
            detail = f"{pairs.least:.2f} to {pairs.most:.2f} by round"
        elif len(ours) > 1:
            spread = Spread.of(ours)
            detail = f"{spread.least:.3g} to {spread.most:.3g}"
        return Verdict(goal.number, goal.sentence, found, goal.unit or "times", met, detail)

    def _why(self, goal: Goal) -> str:
        rows = [goal.value.row, *([goal.against.row] if goal.against else [])]
        for section in self.sections:
            for row in rows:
                if row in section.missing:
                    return section.missing[row]
        wanted = {goal.value.grid, *([goal.against.grid] if goal.against else [])}
        failed = [each for each in self.sections if each.failure and not wanted <= {grid.name for grid in each.grids}]
        return "its section failed" if failed else "not measured in this run"

    def plain(self) -> dict[str, Any]:
        """As JSON has it: all samples, and what was made of them."""
        found = dataclasses.asdict(self)
        for section, plain in zip(self.sections, found["sections"], strict=True):
            plain["latencies"] = {name: dict(sorted(each.items())) for name, each in section.latencies.items()}
            plain["quantiles"] = {name: quantiles(each) for name, each in section.latencies.items()}
            for grid, written in zip(section.grids, plain["grids"], strict=True):
                written["summary"] = {
                    row: {column: dataclasses.asdict(Spread.of(values)) for column, values in columns.items()}
                    for row, columns in grid.cells.items()
                }
        found["goals"] = [dataclasses.asdict(each) for each in self.verdicts()]
        return found


QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def quantile(histogram: Mapping[int, int], part: float) -> float:
    """The latency (µs) below which `part` of the calls are."""
    below, wanted = 0, part * sum(histogram.values())
    for bucket in sorted(histogram):
        below += histogram[bucket]
        if below >= wanted:
            return bucket_ns(bucket) / 1000
    return 0.0


def quantiles(histogram: Mapping[int, int]) -> dict[str, float]:
    """Those of QUANTILES, in µs."""
    return {f"{part:g}": round(quantile(histogram, part), 2) for part in QUANTILES}
