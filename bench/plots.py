"""The plots of the document, by matplotlib: each a function of the results, left out where its section was."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from bench import plan
from bench.programs.driver import bucket_ns
from bench.results import Grid, Results, Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_SECTION = {
    "lone": {"latency": "Latency of one call at a time: share of calls that took at most so long"},
    "flight": {"flight": "Calls per second by calls in flight"},
    "payload": {"payload": "Megabytes per second by payload"},
    "tree": {"endpoints": "Calls per second by endpoints in the tree"},
    "users": {"users": "Calls per second by users at once, and one user's call among many"},
}
"""By section: the file's name, and the text in the place of the picture."""

COLOURS = {
    plan.BLOCKING.name: ("#0b5fa5", "-"),
    plan.BUSY.name: ("#0b5fa5", "--"),
    plan.AIO.name: ("#2a9d8f", "-"),
    plan.BLOCKING_LOCAL.name: ("#0b5fa5", ":"),
    plan.AIO_LOCAL.name: ("#2a9d8f", ":"),
    plan.GRPC_SYNC.name: ("#c1121f", "-"),
    plan.GRPC_AIO.name: ("#f4a261", "-"),
    plan.CPP_SYNC.name: ("#6a4c93", "-"),
    plan.CPP_ASYNC.name: ("#b185db", "-"),
    plan.VARLINK.name: ("#8a8a00", ":"),
    plan.RELAY.name: ("#888888", "--"),
}
"""By contender, the same in all plots; dotted: a Unix socket."""

Axes = Any


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw what there are figures for. Returns the files; none where matplotlib is missing. directory: is made."""
    if not any(results.grid(name) for name in ("lone", "flight", "payload", "tree", "at once")):
        return []
    try:
        import matplotlib as mpl  # noqa: PLC0415  # late: its numpy starts threads, and the realm is entered without
    except ImportError:
        return []
    mpl.rcParams.update(
        {
            "svg.hashsalt": "srpc",  # the same figures make the same file
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    directory.mkdir(exist_ok=True)
    makers: dict[str, Callable[[Results], "Figure | None"]] = {
        "latency": _latency,
        "flight": _flight,
        "payload": _payload,
        "endpoints": _endpoints,
        "users": _users,
    }
    drawn = []
    for name, make in makers.items():
        figure = make(results)
        if figure is not None:
            path = directory / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            drawn.append(path)
    return drawn


def _figure(columns: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7.5, 3.8))
    return figure, [figure.add_subplot(1, columns, at + 1) for at in range(columns)]


def _style(name: str) -> dict[str, str]:
    colour, line = COLOURS.get(name, ("#444444", "-"))
    return {"color": colour, "linestyle": line, "label": name}


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _latency(results: Results) -> "Figure | None":
    section = next((each for each in results.sections if each.latencies), None)
    if section is None:
        return None
    figure, (axes,) = _figure()
    for name, histogram in section.latencies.items():
        total, below, x, y = sum(histogram.values()), 0, [], []
        for bucket in sorted(histogram):
            below += histogram[bucket]
            x.append(bucket_ns(bucket) / 1000)
            y.append(below / total)
            if below > 0.999 * total:
                break
        axes.plot(x, y, linewidth=1.3, **_style(name))
    axes.set(xscale="log", xlabel="µs", ylabel="share of calls", ylim=(0, 1.01))
    axes.xaxis.set_major_formatter(_plain())
    _legend(axes)
    return figure


def _lines(axes: Axes, grid: Grid, x: dict[str, float]) -> None:
    """A line for each row of a grid, with its spread. x: column to its place."""
    for row in grid.cells:
        columns = [column for column in x if grid.values(row, column)]
        spreads = [Spread.of(grid.values(row, column)) for column in columns]
        if not columns:
            continue
        below, above = [each.median - each.least for each in spreads], [each.most - each.median for each in spreads]
        axes.errorbar(
            [x[column] for column in columns],
            [each.median for each in spreads],
            yerr=[below, above],
            marker="o",
            markersize=3,
            linewidth=1.3,
            elinewidth=0.7,
            **_style(row),
        )


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415

    return FuncFormatter(lambda value, _at: f"{value:,.10g}")


def _flight(results: Results) -> "Figure | None":
    grid, lone = results.grid("flight"), results.grid("lone")
    if grid is None:
        return None
    both = Grid("both", "", "")
    for each in (lone, grid):
        for row, columns in each.cells.items() if each else ():
            for column, values in columns.items():
                both.add(row, column, *values)
    figure, (axes,) = _figure()
    _lines(axes, both, {workload.name: workload.inflight for workload in (plan.ONE, *plan.FLIGHTS)})
    axes.set(xscale="log", yscale="log", xlabel="calls in flight", ylabel="calls/s")
    axes.set_xticks([1, 16, 64, 256])
    axes.xaxis.set_major_formatter(_plain())
    axes.yaxis.set_major_formatter(_plain())
    axes.minorticks_off()
    _legend(axes)
    return figure


def _payload(results: Results) -> "Figure | None":
    grid = results.grid("payload")
    if grid is None:
        return None
    figure, (axes,) = _figure()
    _lines(axes, grid, {workload.name: workload.size / plan.KIB for workload in plan.PAYLOADS if workload.inflight == 1})
    axes.set(xscale="log", yscale="log", xlabel="payload", ylabel="MB/s")
    axes.set_xticks([1, 64, 1024, 16 * 1024], ["1 KB", "64 KB", "1 MB", "16 MB"])
    axes.yaxis.set_major_formatter(_plain())
    axes.minorticks_off()
    _legend(axes)
    return figure


def _endpoints(results: Results) -> "Figure | None":
    grid = results.grid("tree")
    if grid is None:
        return None
    figure, (axes,) = _figure()
    turned = Grid("turned", "", "")
    sizes = {plan.tree_name(size): float(size) for size in results.extent.trees}
    for row, columns in grid.cells.items():
        for column, values in columns.items():
            turned.add(column, row, *values)
    colours = dict(zip(turned.cells, ("#0b5fa5", "#c1121f"), strict=False))
    for row in turned.cells:
        spreads = [Spread.of(turned.values(row, name)) for name in sizes if turned.values(row, name)]
        found = [sizes[name] for name in sizes if turned.values(row, name)]
        below, above = [each.median - each.least for each in spreads], [each.most - each.median for each in spreads]
        axes.errorbar(
            found, [each.median for each in spreads], yerr=[below, above], marker="o", color=colours[row], label=row
        )
    axes.set(xscale="log", xlabel="endpoints in the tree", ylabel="calls/s, one at a time")
    axes.yaxis.set_major_formatter(_plain())
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(_plain())
    _legend(axes)
    return figure


def _users(results: Results) -> "Figure | None":
    grid, turns = results.grid("at once"), results.grid("turns")
    if grid is None or turns is None:
        return None
    figure, (left, right) = _figure(2)
    _lines(left, grid, {f"{users:,}": float(users) for users in results.extent.users})
    left.set(xscale="log", xlabel="users at once", ylabel="calls/s")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_formatter(_plain())
    left.yaxis.set_major_formatter(_plain())
    left.legend(frameon=False)
    columns = [column for column in (plan.ALONE, plan.IDLE, plan.TURNS) if turns.values(plan.USER, column)]
    spreads = [Spread.of(turns.values(plan.USER, column)) for column in columns]
    below, above = [each.median - each.least for each in spreads], [each.most - each.median for each in spreads]
    right.bar(range(len(columns)), [each.median for each in spreads], yerr=[below, above], color="#0b5fa5", width=0.6)
    right.set_xticks(range(len(columns)), [fill(column, 11) for column in columns])
    right.set(ylabel="µs, median call of one user")
    figure.subplots_adjust(wspace=0.3)
    return figure
