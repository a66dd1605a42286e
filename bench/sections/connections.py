"""How quickly connections come and go."""

from typing import Any

from bench import plan, rounds
from bench.plan import Contender, Extent, Workload
from bench.results import Section
from bench.rounds import Progress
from bench.stage import Stage

PING = Contender("sRPC: connect, TLS handshake, ping, close", ("srpc_echo", "connecting"), *plan.DIRECT)
GRPC = Contender("grpcio: channel, TLS handshake, one call, close", ("grpc_echo", "connecting"), *plan.GRPC_SERVER)
LOGIN = Contender("sRPC: the same with a login by password and one call", ("srpc_echo", "logging_in"), *plan.DIRECT)
LOCAL = Contender(
    "sRPC, Unix socket: connect, log in, one call, close", ("srpc_echo", "logging_in"), *plan.DIRECT, local=True
)
ALL = (PING, GRPC, LOGIN, LOCAL)
WORKLOADS = (plan.ONE, Workload("8 threads", 64, 8))


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """Connections per second, one after another and by eight threads of one client."""
    running = rounds.callers(stage, ALL, section)
    rates = section.grid(
        "connections",
        "Connections made and closed",
        "connections/s",
        ratios=((PING.name, GRPC.name),),
        note="A full handshake each time, without session tickets. A login runs PAM in a process of its own; the "
        "worker is there.",
    )

    def take(contender: Contender, workload: Workload, answer: dict[str, Any]) -> None:
        rates.add(contender.name, workload.name, answer["calls"] / answer["elapsed"])

    rounds.measure(running, WORKLOADS, extent.fewer, extent.shorter, take, progress)
