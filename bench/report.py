"""Tables, for people at a terminal and for the document: the same cells in both."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from bench.results import Grid, Results, Section, Spread

CONSOLE_WIDTH = 150
"""Where the output is no terminal."""


NO_TLS = (
    "Without root there is no password to log in with, so no TLS: all contenders use Unix sockets, whatever they are called."
)


@dataclass(frozen=True)
class Table:
    """Text. note: below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def console() -> Console:
    """Where tables go."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=CONSOLE_WIDTH)


# --- cells -------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """With three digits that mean something, and thousands apart."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def spread(values: list[float]) -> str:
    """The median, and between which values it lies where there are several."""
    if not values:
        return "-"
    found = Spread.of(values)
    if found.least == found.most:
        return number(found.median)
    return f"{number(found.median)} ({number(found.least)} to {number(found.most)})"


def tables(section: Section) -> Iterator[Table]:
    """All grids of a section, each with its ratios."""
    for grid in section.grids:
        if grid.cells:
            yield _cells(grid)
        ratios = [(ours, theirs) for ours, theirs in grid.ratios if ours in grid.cells and theirs in grid.cells]
        if ratios:
            yield _ratios(grid, ratios)


def _cells(grid: Grid) -> Table:
    columns = grid.columns
    rows = [[row, *(spread(grid.values(row, column)) for column in columns)] for row in grid.cells]
    unit = f" ({grid.unit})" if grid.unit and [grid.unit] != columns else ""
    return Table(f"{grid.title}{unit}", [grid.label, *columns], rows, grid.note)


def _ratios(grid: Grid, ratios: list[tuple[str, str]]) -> Table:
    rows = []
    for ours, theirs in ratios:
        cells = []
        for column in grid.columns:
            mine, other = grid.median(ours, column), grid.median(theirs, column)
            cells.append(f"{mine / other:.2f}" if mine and other else "-")
        rows.append([f"{ours} / {theirs}", *cells])
    return Table("Ratios of these medians", ["", *grid.columns], rows)


def goals(results: Results) -> Table:
    """Goal by goal, what was found."""
    rows = []
    for verdict in results.verdicts():
        found = "-" if verdict.found is None else f"{number(verdict.found)} {verdict.unit}"
        met = {True: "met", False: "NOT MET", None: "not measured"}[verdict.met]
        rows.append([verdict.number, verdict.goal, found, met, verdict.detail])
    return Table("Goals", ["", "goal", "found", "", "spread"], rows, "Ratios are those of the medians of one run.")


def left_out(section: Section) -> Iterator[str]:
    """Sentences about what is missing from a section."""
    for why in dict.fromkeys(section.missing.values()):
        yield f"Left out: {', '.join(name for name, each in section.missing.items() if each == why)}: {why}."
    yield from section.notes
    if section.failure:
        yield f"This section could not be finished: {section.failure.strip().splitlines()[-1]}"


def machine(results: Results) -> str:
    """One sentence."""
    return ", ".join(f"{name} {value}" for name, value in results.machine.items())


# --- a terminal --------------------------------------------------------------------------------------------------------


def show(results: Results, out: Console) -> None:
    """Print all of it."""
    out.print(f"\n[bold]Machine[/]: {escape(machine(results))}")
    if results.transport != "TLS":
        out.print(f"[yellow]{NO_TLS}[/]")
    for section in results.sections:
        out.print(f"\n[bold]{section.title}[/] ({section.name}, {section.seconds:.0f} s)")
        for table in tables(section):
            _print(table, out)
        for sentence in left_out(section):
            out.print(f"[yellow]{escape(sentence)}[/]")
    out.print()
    _print(goals(results), out)


def _print(table: Table, out: Console) -> None:
    shown = Shown(title=escape(table.title), title_justify="left", caption=escape(table.note), caption_justify="left")
    for at, heading in enumerate(table.header):
        shown.add_column(escape(heading), justify="left" if at == 0 or not _is_number(table, at) else "right")
    for row in table.rows:
        bad = "NOT MET" in row
        shown.add_row(*(escape(cell) for cell in row), style="bold red" if bad else None)
    out.print(shown)


def _is_number(table: Table, at: int) -> bool:
    return all(row[at][:1].isdigit() or row[at] in ("", "-") for row in table.rows)


# --- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table as the document has it, with its title and note."""
    aligned = [" ---: " if at and _is_number(table, at) else " --- " for at in range(len(table.header))]
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.header)} |", f"|{'|'.join(aligned)}|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)
