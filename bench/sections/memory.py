"""What waits: memory of idle connections and of idle workers."""

from bench import plan
from bench.plan import Contender, Extent
from bench.results import Grid, Section
from bench.rounds import Progress
from bench.running import Missing
from bench.stage import CALLER, Stage
from srpc_client import blocking
from tests.realm.counters import pss

OTHERS = ("bob", "svc", "svc2")
"""Users of the realm who may log in, besides CALLER."""

TLS = Contender("sRPC, TLS, nobody logged in yet", ("srpc_echo", "holding"), *plan.DIRECT)
LOCAL = Contender("sRPC, Unix socket, logged in", ("srpc_echo", "holding"), *plan.DIRECT, local=True)
GRPC = Contender("grpcio synchronous", ("grpc_echo", "holding"), *plan.GRPC_SERVER)


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """Proportional set size: of workers of several users, and what each further idle connection adds."""
    workers = section.grid("pss", "Memory of processes", "MB", label="process", note="PSS, 10^6 bytes.")
    _workers(stage, workers)
    grid = section.grid(
        "held",
        f"Memory of an idle connection, of {extent.held}",
        "KB",
        note="What the PSS of the server's processes grows by, for each. Buffers in the kernel are not in it.",
    )
    for contender in (TLS, LOCAL, GRPC):
        progress(f"idle connections: {contender.name}")
        try:
            _held(stage, contender, extent.held, grid)
        except Missing as fault:
            section.missing[contender.name] = str(fault)


def _workers(stage: Stage, grid: Grid) -> None:
    connections = []
    try:
        for user in (CALLER, *OTHERS):
            connection = blocking.dial(**stage.dial(user))
            connections.append(connection)
            connection.list("/")
        for process in stage.daemon.processes():
            if process.role in ("monitor", "gate", "worker"):
                name = f"gate, {process.detail}" if process.role == "gate" else process.role
                grid.add(name, "MB", pss(process.pid))
    finally:
        for connection in connections:
            connection.close()


def _held(stage: Stage, contender: Contender, number: int, grid: Grid) -> None:
    caller = stage.caller(contender)
    if contender.caller[0] == "srpc_echo":
        kind = "local" if contender.local else "tls"
        parties = {"gate": stage.daemon.processes("gate", kind)[0].pid, "monitor": stage.daemon.pid}
    else:
        server = stage.server(contender)
        assert server is not None
        parties = {"server": server.pid}
    caller.ask({"held": 8}, 60)  # what the first ones load or allocate is not theirs alone
    before = {name: pss(pid) for name, pid in parties.items()}
    caller.ask({"held": 8 + number}, 120)
    for name, pid in parties.items():
        grid.add(contender.name, name, (pss(pid) - before[name]) * 1000 / number)
    caller.ask({"held": 0}, 60)
