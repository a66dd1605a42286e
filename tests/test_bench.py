"""What the bench makes of its samples. (That it measures at all is seen when it is run.)"""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from bench import document, machine, plan, report
from bench.plan import QUICK, Goal, Value
from bench.programs.driver import BUCKET, bucket_ns, histogram
from bench.results import Results, Section, Spread, quantile
from bench.sections import PARTS

OURS, THEIRS = Value("speed", "ours", "one"), Value("speed", "theirs", "one")


@pytest.fixture
def results() -> Results:
    section = Section("speed", "Speed")
    grid = section.grid("speed", "Calls", "calls/s", ratios=(("ours", "theirs"),), note="A note.")
    grid.add("ours", "one", 30.0, 10.0, 20.0)
    grid.add("theirs", "one", 10.0, 10.0, 11.0)
    return Results(machine.describe(), "TLS", QUICK, [section])


@pytest.mark.parametrize(
    ("bound", "least", "met"), [(2.0, True, True), (2.1, True, False), (2.0, False, True), (1.9, False, False)]
)
def test_a_ratio_is_that_of_two_medians_and_is_held_against_its_bound(
    results: Results, bound: float, least: bool, met: bool
) -> None:
    verdict = results._verdict(Goal("1", "fast", OURS, THEIRS, bound, least))
    assert (verdict.found, verdict.met) == (2.0, met)
    assert verdict.detail == "1.00 to 3.00 by round"


def test_a_goal_without_a_peer_is_about_the_median_itself(results: Results) -> None:
    verdict = results._verdict(Goal("5", "short", OURS, None, 20.0, least=False, unit="ms"))
    assert (verdict.found, verdict.met, verdict.unit) == (20.0, True, "ms")


def test_what_was_not_measured_is_neither_met_nor_missed_and_says_why(results: Results) -> None:
    results.sections[0].missing["theirs"] = "is not installed"
    del results.sections[0].grids[0].cells["theirs"]
    verdict = results._verdict(Goal("1", "fast", OURS, THEIRS, 2.0))
    assert (verdict.found, verdict.met, verdict.detail) == (None, None, "is not installed")


def test_every_goal_is_about_something_that_is_measured() -> None:
    rows = {
        "lone": plan.LONE,
        "flight": plan.ECHOES,
        "payload": plan.BULK,
        "handlers": plan.HANDLERS,
    }
    columns = {
        "lone": [plan.ONE],
        "flight": plan.FLIGHTS,
        "payload": plan.PAYLOADS,
        "handlers": plan.BY_HANDLER,
    }
    for goal in plan.goals(plan.FULL):
        for value in [goal.value, *([goal.against] if goal.against else [])]:
            if value.grid in rows:
                assert value.row in {each.name for each in rows[value.grid]}, goal
                assert value.column in {each.name for each in columns[value.grid]}, goal
            else:
                assert value.grid in {"peaks", "served", "turns", "tree", "start"}, goal


def test_quantiles_come_out_of_a_histogram_within_a_bucket() -> None:
    latencies = [100_000] * 90 + [1_000_000] * 10
    found = histogram(latencies)
    assert found.total() == 100
    assert quantile(found, 0.5) == pytest.approx(100, rel=BUCKET)
    assert quantile(found, 0.99) == pytest.approx(1000, rel=BUCKET)
    assert all(bucket_ns(bucket) > 0 for bucket in found)


def test_numbers_keep_three_digits_that_mean_something() -> None:
    assert [report.number(each) for each in (0, 0.0123, 1.234, 12.34, 1234.5)] == ["0", "0.012", "1.23", "12.3", "1,234"]
    assert report.spread([2.0]) == "2.00"
    assert report.spread([1.0, 2.0, 3.0]) == "2.00 (1.00 to 3.00)"
    assert Spread.of([3.0, 1.0]) == Spread(2.0, 1.0, 3.0)


def test_the_document_is_written_between_its_markers_only(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    before = document.FILE.read_text(encoding="utf-8")
    file.write_text(before, encoding="utf-8")
    results.sections[0].failure = "Traceback …\nBroken: the gate has ended"
    document.write(results, file)
    after = file.read_text(encoding="utf-8")
    assert after.partition(document.BEGIN)[0] == before.partition(document.BEGIN)[0]
    assert after.partition(document.END)[2] == before.partition(document.END)[2]
    figures = after.partition(document.BEGIN)[2].partition(document.END)[0]
    assert "| ours | 20.0 (10.0 to 30.0) |" in figures
    assert "| ours / theirs | 2.00 |" in figures
    assert "This section could not be finished: Broken: the gate has ended" in figures
    document.write(results, file)
    assert file.read_text(encoding="utf-8") == after


def test_a_document_without_a_place_for_the_figures_is_left_alone(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(document.NoPlace):
        document.write(results, file)
    assert file.read_text(encoding="utf-8") == "nothing\n"


def test_json_has_every_sample_and_what_was_made_of_them(results: Results) -> None:
    results.sections[0].latencies["ours"] = Counter({500: 3})
    plain = results.plain()
    (section,) = plain["sections"]
    assert section["grids"][0]["cells"]["ours"]["one"] == [30.0, 10.0, 20.0]
    assert section["grids"][0]["summary"]["ours"]["one"] == dataclasses.asdict(Spread(20.0, 10.0, 30.0))
    assert section["latencies"] == {"ours": {500: 3}}
    assert [goal["number"] for goal in plain["goals"]] == [goal.number for goal in plan.goals(QUICK)]


def test_sections_have_names_of_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
