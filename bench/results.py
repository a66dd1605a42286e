"""What came out: samples, and the medians, spreads and ratios that are made of them."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.plan import GOALS, PSS_MB, START_MS, Goal


@dataclass(frozen=True)
class Sample:
    """Calls per second of one contender with one workload in one round."""

    contender: str
    workload: str
    round: int
    rate: float


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


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is met in this run. measured: None where it could not be measured; `detail` then says why."""

    goal: str
    measured: float | None
    unit: str
    met: bool | None
    detail: str = ""


@dataclass(frozen=True)
class WorkerCost:
    """What workers cost.

    more: processes that the second session of a user made. attach_cold, attach_warm: ms of an attach that starts a
    worker, and of one that finds it running. interpreter: ms of an
    empty `python3 -I -S`, for comparison. pss: MB of each worker, empty where it could not be read, and `unread` why.
    """

    more: int
    attach_cold: tuple[float, ...]
    attach_warm: tuple[float, ...]
    interpreter: tuple[float, ...]
    pss: tuple[float, ...]
    unread: str = ""

    @property
    def start(self) -> float:
        """ms that the start of a worker takes: what it adds to an attach."""
        return statistics.median(self.attach_cold) - statistics.median(self.attach_warm)


@dataclass
class Results:
    """One run. transport: what callers and servers had between them. missing: contender to why it was left out."""

    machine: dict[str, str]
    transport: str
    rounds: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    workers: WorkerCost | None = None

    def rates(self, contender: str, workload: str) -> list[float]:
        """Calls per second, round by round."""
        return [each.rate for each in self.samples if (each.contender, each.workload) == (contender, workload)]

    def ratio(self, workload: str, contender: str, against: str) -> tuple[float, Spread] | None:
        """(ratio of the medians, spread of the ratios round by round); None where one of the two was not measured."""
        ours, theirs = self.rates(contender, workload), self.rates(against, workload)
        if not ours or not theirs:
            return None
        pairs = Spread.of(a / b for a, b in zip(ours, theirs, strict=True))
        return statistics.median(ours) / statistics.median(theirs), pairs

    def verdicts(self, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
        """All goals, met or not."""
        found = []
        for goal in goals:
            sentence = f"{goal.workload}: {goal.contender} at least {goal.bound:g} times {goal.against}"
            ratio = self.ratio(goal.workload, goal.contender, goal.against)
            if ratio is None:
                why = self.missing.get(goal.against) or self.missing.get(goal.contender, "not measured")
                found.append(Verdict(sentence, None, "times", None, why))
            else:
                detail = f"{ratio[1].least:.2f} to {ratio[1].most:.2f} by round"
                found.append(Verdict(sentence, ratio[0], "times", ratio[0] >= goal.bound, detail))
        if self.workers:
            cost = self.workers
            found.append(Verdict("second session of a user: no new process", cost.more, "processes", cost.more == 0))
            sentence = f"a worker starts in under {START_MS:g} ms"
            detail = f"an empty interpreter: {statistics.median(cost.interpreter):.1f} ms"
            found.append(Verdict(sentence, cost.start, "ms", cost.start < START_MS, detail))
            sentence = f"a worker costs under {PSS_MB:g} MB (PSS)"
            if cost.pss:
                most = max(cost.pss)
                found.append(Verdict(sentence, most, "MB", most < PSS_MB, f"the largest of {len(cost.pss)}"))
            else:
                found.append(Verdict(sentence, None, "MB", None, cost.unread))
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON has it: all samples, and what was made of them."""
        found = dataclasses.asdict(self)
        found["summary"] = [
            {"contender": contender, "workload": workload, **dataclasses.asdict(Spread.of(self.rates(contender, workload)))}
            for contender, workload in dict.fromkeys((each.contender, each.workload) for each in self.samples)
        ]
        found["goals"] = [dataclasses.asdict(each) for each in self.verdicts()]
        return found
