"""What is measured: who calls whom, how, and the goals that the medians are held against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """A caller and what it calls.

    name: for tables. caller: module and role (`bench.programs`). server: module and role of what answers; contenders with
    the same `server` and `options` share one. options: what that server is told besides where to listen.
    """

    name: str
    caller: tuple[str, str]
    server: tuple[str, str]
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Workload:
    """An echo of `size` bytes with `inflight` calls outstanding at any time."""

    name: str
    size: int
    inflight: int


@dataclass(frozen=True)
class Goal:
    """What the issue asks for. A ratio of medians of calls per second (contender over `against`), at least `bound`."""

    workload: str
    contender: str
    against: str
    bound: float


DIRECT = (("srpc_echo", "blocking_service"), (("handler", "plain"), ("path", "/bench/direct")))
PLAIN = (("srpc_echo", "service"), (("handler", "plain"), ("path", "/bench/plain")))
ASYNCIO = (("srpc_echo", "service"), (("handler", "asyncio"), ("path", "/bench/asyncio")))
"""Servers and their options: `blocking.serve`; `serve` on an asyncio loop, with either kind of handler."""

BLOCKING = Contender("sRPC blocking", ("srpc_echo", "blocking"), *DIRECT)
AIO = Contender("sRPC asyncio", ("srpc_echo", "asyncio"), *DIRECT)
BLOCKING_PLAIN = Contender("sRPC blocking, plain handler on a loop", ("srpc_echo", "blocking"), *PLAIN)
BLOCKING_ASYNCIO = Contender("sRPC blocking, asyncio handler", ("srpc_echo", "blocking"), *ASYNCIO)
AIO_ASYNCIO = Contender("sRPC asyncio, asyncio handler", ("srpc_echo", "asyncio"), *ASYNCIO)
GRPC_SYNC = Contender("grpcio synchronous", ("grpc_echo", "caller"), ("grpc_echo", "server"))
GRPC_AIO = Contender("grpc.aio", ("grpc_echo", "aio_caller"), ("grpc_echo", "aio_server"))

CONTENDERS = (BLOCKING, GRPC_SYNC, AIO, GRPC_AIO, BLOCKING_PLAIN, BLOCKING_ASYNCIO, AIO_ASYNCIO)
"""In the order in which they are measured: each beside the peer that it is compared with."""

ONE = Workload("one at a time", 64, 1)
MANY = Workload("64 in flight", 64, 64)

WORKLOADS = (ONE, MANY)

GOALS = (
    Goal(ONE.name, BLOCKING.name, GRPC_SYNC.name, 2.0),
    Goal(ONE.name, AIO.name, GRPC_AIO.name, 2.0),
    Goal(MANY.name, AIO.name, GRPC_AIO.name, 2.0),
)

START_MS = 25.0
"""A worker's start, from fork to proved: less than so many milliseconds."""

PSS_MB = 5.0
"""A worker's memory: less than so many megabytes (10^6 bytes) of proportional set size."""


@dataclass(frozen=True)
class Extent:
    """How much of it. rounds: how often everything is measured. seconds: of each sample. starts: of workers."""

    rounds: int
    seconds: float
    starts: int


FULL = Extent(7, 1.0, 15)
QUICK = Extent(3, 0.3, 5)
