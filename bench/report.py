"""Tables for people."""

from rich.console import Console
from rich.table import Table

from bench.plan import CONTENDERS, GOALS, WORKLOADS
from bench.results import Results, Spread

CONSOLE_WIDTH = 110
"""Where the output is no terminal."""


def console() -> Console:
    """Where tables go."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=CONSOLE_WIDTH)


def show(results: Results, out: Console) -> None:
    """Print all of it."""
    out.print()
    out.print("[bold]Machine[/]: " + ", ".join(f"{name} {value}" for name, value in results.machine.items()))
    out.print(
        f"[bold]Method[/]: echo over {results.transport}; {results.rounds} rounds of"
        f" {results.seconds:g} s for each, interleaved; median (least to most)."
    )
    if results.transport != "TLS":
        out.print("[yellow]Without root there is no password to log in with, so no TLS: all contenders use Unix sockets.[/]")
    out.print(_rates(results))
    for why in sorted(set(results.missing.values())):
        out.print(f"[yellow]Left out: {', '.join(n for n, each in results.missing.items() if each == why)}: {why}.[/]")
    if results.missing:
        out.print("[yellow]`make bench` installs it; by hand: pip install -e '.\\[bench]'.[/]")
    if results.workers:
        out.print(_workers(results))
    out.print(_goals(results))


def _rates(results: Results) -> Table:
    table = Table(title="Echo of 64 bytes", title_justify="left")
    table.add_column("")
    for workload in WORKLOADS:
        table.add_column(f"{workload.name}\ncalls/s", justify="right")
        table.add_column("µs/call", justify="right")
        table.add_column("ratio", justify="right")
    for contender in CONTENDERS:
        row = [contender.name]
        for workload in WORKLOADS:
            rates = results.rates(contender.name, workload.name)
            if not rates:
                row += ["-", "-", "-"]
                continue
            spread = Spread.of(rates)
            row.append(f"{spread.median:,.0f} ({spread.least:,.0f} to {spread.most:,.0f})")
            row.append(f"{1e6 / spread.median:,.0f}")
            row.append(_against(results, contender.name, workload.name))
        table.add_row(*row)
    table.caption = (
        "ratio: blocking callers to grpcio synchronous, asyncio callers to grpc.aio; handlers: blocking.serve but where said"
    )
    table.caption_justify = "left"
    return table


def _against(results: Results, contender: str, workload: str) -> str:
    peers = {goal.contender: goal.against for goal in GOALS}
    peer = peers.get(contender.partition(",")[0], "")
    ratio = results.ratio(workload, contender, peer) if peer else None
    return f"{ratio[0]:.2f}" if ratio else ""


def _workers(results: Results) -> Table:
    cost = results.workers
    assert cost is not None
    table = Table(title="Workers", title_justify="left", show_header=False)
    cold, warm = Spread.of(cost.attach_cold), Spread.of(cost.attach_warm)
    table.add_row("processes that a user's second session made", f"{cost.more}")
    table.add_row("attach that starts a worker", f"{cold.median:.1f} ms ({cold.least:.1f} to {cold.most:.1f})")
    table.add_row("attach to a running worker", f"{warm.median:.1f} ms ({warm.least:.1f} to {warm.most:.1f})")
    table.add_row("start of a worker: the difference", f"{cost.start:.1f} ms")
    empty = Spread.of(cost.interpreter)
    table.add_row("an empty python3 -I -S, for comparison", f"{empty.median:.1f} ms ({empty.least:.1f} to {empty.most:.1f})")
    if cost.pss:
        pss = Spread.of(cost.pss)
        table.add_row(f"PSS of {len(cost.pss)} worker(s)", f"{pss.median:.2f} MB ({pss.least:.2f} to {pss.most:.2f})")
    else:
        table.add_row("PSS", cost.unread)
    return table


def _goals(results: Results) -> Table:
    table = Table(title="Goals, in this run", title_justify="left")
    for heading in ("", "goal", "measured", ""):
        table.add_column(heading)
    for verdict in results.verdicts():
        mark = {True: "[green]met[/]", False: "[bold red]NOT MET[/]", None: "[yellow]not measured[/]"}[verdict.met]
        shown = "" if verdict.measured is None else f"{verdict.measured:.4g} {verdict.unit}"
        table.add_row(mark, verdict.goal, shown, verdict.detail)
    return table
