"""What is measured: who calls whom, how, how long, and the goals that the medians are held against."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Contender:
    """A caller and what it calls.

    name: for tables. caller: module and role (`bench.programs`), or "native" and a program and its role. server: likewise
    what answers, ("", "") for none; contenders with the same `server` and `options` share one. options: what that server
    is told besides where to listen. local: over a Unix socket, and not over TLS.
    """

    name: str
    caller: tuple[str, str]
    server: tuple[str, str]
    options: tuple[tuple[str, str], ...] = ()
    local: bool = False


@dataclass(frozen=True)
class Workload:
    """An echo of `size` bytes with `inflight` calls outstanding at any time. only: contenders that it is for (None: all)."""

    name: str
    size: int
    inflight: int
    only: tuple[str, ...] | None = None


KIB, MIB = 1024, 1024 * 1024

# --- who ---------------------------------------------------------------------------------------------------------------

DIRECT = (("srpc_echo", "blocking_service"), (("handler", "plain"), ("path", "/bench/direct")))
PLAIN = (("srpc_echo", "service"), (("handler", "plain"), ("path", "/bench/plain")))
ASYNCIO = (("srpc_echo", "service"), (("handler", "asyncio"), ("path", "/bench/asyncio")))
"""Servers and their options: `blocking.serve`; `serve` on an asyncio loop, with either kind of handler."""

BLOCKING = Contender("sRPC blocking", ("srpc_echo", "blocking"), *DIRECT)
AIO = Contender("sRPC asyncio", ("srpc_echo", "asyncio"), *DIRECT)
BLOCKING_LOCAL = Contender("sRPC blocking, Unix socket", ("srpc_echo", "blocking"), *DIRECT, local=True)
AIO_LOCAL = Contender("sRPC asyncio, Unix socket", ("srpc_echo", "asyncio"), *DIRECT, local=True)
GRPC_SERVER = (("grpc_echo", "server"),)
GRPC_SYNC = Contender("grpcio synchronous", ("grpc_echo", "caller"), *GRPC_SERVER)
GRPC_AIO = Contender("grpc.aio", ("grpc_echo", "aio_caller"), ("grpc_echo", "aio_server"))
CPP_SYNC = Contender("gRPC C++ synchronous", ("native", "grpc_sync caller"), ("native", "grpc_sync server"))
CPP_ASYNC = Contender("gRPC C++ asynchronous", ("native", "grpc_callback caller"), ("native", "grpc_callback server"))
VARLINK = Contender("asyncvarlink, Unix socket", ("varlink_echo", "caller"), ("varlink_echo", "server"), local=True)
RELAY = Contender("six bare hops in C, no TLS", ("native", "relay"), ("", ""))

BUSY = Contender("sRPC blocking, busy_poll=2e-4", ("srpc_echo", "busy"), *DIRECT)
PATIENT = Contender("sRPC asyncio, a refused call is made again", ("srpc_echo", "patient"), *DIRECT)

ECHOES = (BLOCKING, GRPC_SYNC, CPP_SYNC, AIO, GRPC_AIO, CPP_ASYNC, BLOCKING_LOCAL, AIO_LOCAL, VARLINK, RELAY)
"""In the order in which they are measured: each near the peers that it is compared with."""

LONE = (BUSY, *ECHOES)
"""For lone calls: with a caller, too, who does not sleep while he waits."""

BULK = (BLOCKING, GRPC_SYNC, CPP_SYNC, AIO, GRPC_AIO, CPP_ASYNC, BLOCKING_LOCAL, VARLINK, RELAY)
"""For payloads."""

ON_LOOP = Contender("plain handler on an asyncio loop", ("srpc_echo", "blocking"), *PLAIN)
COROUTINE = Contender("asyncio handler", ("srpc_echo", "blocking"), *ASYNCIO)
COROUTINES = Contender("asyncio handler, asyncio caller", ("srpc_echo", "asyncio"), *ASYNCIO)
SERVICE = Contender("plain handler, blocking.serve", ("srpc_echo", "blocking"), *DIRECT)
RESIDENT = Contender("resident program, plain handler", ("srpc_echo", "blocking"), ("program", "resident"))
RESIDENT_AIO = Contender("resident program, asyncio handler", ("srpc_echo", "blocking"), ("program", "resident_asyncio"))
PROGRAM = Contender("plain program (cat)", ("srpc_echo", "blocking"), ("program", "cat"))
SUBPROCESS = Contender("subprocess.run of the same cat, no sRPC", ("once", "caller"), ("program", "cat"))

HANDLERS = (SERVICE, RESIDENT, ON_LOOP, COROUTINE, RESIDENT_AIO, COROUTINES, PROGRAM, SUBPROCESS)
KEPT = tuple(each.name for each in (SERVICE, RESIDENT, ON_LOOP, COROUTINE, RESIDENT_AIO, COROUTINES))
"""Handlers that are not started anew for each call."""

# --- what --------------------------------------------------------------------------------------------------------------

ONE = Workload("one at a time", 64, 1)
FLIGHTS = tuple(Workload(f"{number} in flight", 64, number) for number in (16, 64, 256))
MANY = FLIGHTS[1]
PAYLOADS = (  # a call carries 16 MiB at most, and protobuf adds some bytes; asyncvarlink took minutes for as much
    Workload("1 KB", KIB, 1),
    Workload("64 KB", 64 * KIB, 1),
    Workload("1 MB", MIB, 1),
    Workload("1 MB, 8 in flight", MIB, 8),
    Workload("16 MB", 16 * MIB - 64, 1, tuple(each.name for each in BULK if each is not VARLINK)),
)
BIG, HUGE = PAYLOADS[2], PAYLOADS[4]
IN_FLIGHT = "{} in flight"
PEAKS, BOUND_MB = "gate, worker and service together", 512.0
BY_HANDLER = (ONE, Workload(MANY.name, 64, 64, KEPT))

TREES_IN_TURN = 10
"""Endpoints that a caller of a tree calls in turn: the smallest tree has no more."""

ONE_ENDPOINT, IN_TURN = "one endpoint", f"{TREES_IN_TURN} endpoints in turn"

RATIOS = (
    (BLOCKING.name, GRPC_SYNC.name),
    (BUSY.name, GRPC_SYNC.name),
    (BLOCKING.name, CPP_SYNC.name),
    (AIO.name, GRPC_AIO.name),
    (AIO.name, CPP_ASYNC.name),
    (BLOCKING_LOCAL.name, VARLINK.name),
    (AIO_LOCAL.name, VARLINK.name),
    (BLOCKING.name, RELAY.name),
)
"""Rows of the first table, and what each is compared with: like with like."""

RATIOS_IN_FLIGHT = (
    (BLOCKING.name, GRPC_AIO.name),
    (AIO.name, GRPC_AIO.name),
    (BLOCKING.name, CPP_ASYNC.name),
    (AIO.name, CPP_ASYNC.name),
    (BLOCKING_LOCAL.name, VARLINK.name),
    (AIO_LOCAL.name, VARLINK.name),
    (BLOCKING.name, RELAY.name),
)
"""Likewise: with calls in flight threads are nobody's best, so all are compared with the asynchronous peers."""

# --- how much ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """How much of it.

    rounds, seconds: of lone calls; fewer, shorter: of everything else. users: at once; the largest is how many live
    workers there are. trees: endpoints. starts: new users whose first call is timed. held: idle connections.
    """

    name: str
    rounds: int
    seconds: float
    fewer: int
    shorter: float
    users: tuple[int, ...]
    trees: tuple[int, ...]
    starts: int
    held: int


FULL = Extent("full", 9, 0.8, 5, 0.6, (1, 10, 100, 1000), (10, 1000, 100_000), 31, 200)
QUICK = Extent("quick", 3, 0.3, 3, 0.25, (1, 10, 100), (10, 1000), 5, 50)


def extent(base: Extent, rounds: int | None, seconds: float | None) -> Extent:
    """`base`, with another number of rounds or length of samples where they are given."""
    return replace(
        base,
        rounds=rounds or base.rounds,
        fewer=rounds or base.fewer,
        seconds=seconds or base.seconds,
        shorter=seconds or base.shorter,
    )


# --- the goals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """The samples of one row and column of a grid (`bench.results`)."""

    grid: str
    row: str
    column: str


@dataclass(frozen=True)
class Goal:
    """The median of `value`, over that of `against` where that is given, is at least (or at most) `bound`.

    number: which of the goals it belongs to. unit: of the bound; "" for a ratio.
    """

    number: str
    sentence: str
    value: Value
    against: Value | None
    bound: float
    least: bool = True
    unit: str = ""


def _faster(number: str, grid: str, column: str, ours: str, theirs: str, bound: float, what: str = "") -> Goal:
    """Calls per second, or the like, are at least `bound` times the peer's."""
    sentence = f"{what or column}: {ours} at least {bound:g} times {theirs}"
    return Goal(number, sentence, Value(grid, ours, column), Value(grid, theirs, column), bound)


USER = "sRPC blocking, one user's call"
ALONE, IDLE, TURNS = "alone", "all others idle beside", "all taking turns"
SERVED, WORKER_PSS, FOUND = "users served", "PSS of a worker, MB", "found"
FIRST = "first call of a new user: all three"


def tree_name(size: int) -> str:
    """The row of a tree."""
    return f"{size:,} endpoints"


def goals(extent: Extent) -> tuple[Goal, ...]:
    """All goals; those about many users and endpoints are about as many as the run has."""
    users, trees = extent.users[-1], (extent.trees[0], extent.trees[-1])

    def user(column: str, bound: float, sentence: str) -> Goal:
        return Goal("4", sentence, Value("turns", USER, column), Value("turns", USER, ALONE), bound, least=False)

    return (
        _faster("1", "lone", ONE.name, BLOCKING.name, GRPC_SYNC.name, 3.0),
        _faster("1", "lone", ONE.name, BLOCKING.name, CPP_SYNC.name, 0.45),
        _faster("1", "lone", ONE.name, AIO.name, GRPC_AIO.name, 2.5),
        _faster("1", "lone", ONE.name, BLOCKING_LOCAL.name, VARLINK.name, 1.0),
        _faster("2", "flight", MANY.name, AIO.name, GRPC_AIO.name, 10.0),
        _faster("2", "flight", MANY.name, AIO.name, CPP_ASYNC.name, 1.0),
        _faster("2", "flight", MANY.name, BLOCKING.name, GRPC_AIO.name, 10.0),
        _faster("2", "flight", MANY.name, BLOCKING.name, CPP_ASYNC.name, 1.0),
        _faster("3", "payload", BIG.name, BLOCKING.name, GRPC_SYNC.name, 2.0),
        _faster("3", "payload", BIG.name, AIO.name, GRPC_AIO.name, 2.0),
        Goal(
            "3",
            f"16 MB payloads, 16 in flight: gate, worker and service together never have more than {BOUND_MB:.0f} MB",
            Value("peaks", PEAKS, IN_FLIGHT.format(16)),
            None,
            BOUND_MB,
            least=False,
            unit="MB",
        ),
        Goal(
            "4",
            f"{users:,} users with a live worker each: all served",
            Value("served", SERVED, FOUND),
            None,
            users,
            unit="users",
        ),
        Goal(
            "4",
            f"{users:,} users: less than 5 MB (PSS) per worker",
            Value("served", WORKER_PSS, FOUND),
            None,
            5.0,
            False,
            "MB",
        ),
        user(IDLE, 1.2, f"a call of one active user with {users - 1:,} idle ones beside takes at most 1.2 times as long"),
        user(TURNS, 2.2, f"a call when all {users:,} take turns takes at most 2.2 times as long"),
        Goal(
            "4",
            f"a call in a tree of {trees[1]:,} endpoints takes at most 1.2 times as long as in one of {trees[0]:,}",
            Value("tree", tree_name(trees[0]), IN_TURN),
            Value("tree", tree_name(trees[1]), IN_TURN),
            1.2,
            least=False,
        ),
        Goal(
            "5",
            "first call of a new user, after authentication: under 30 ms",
            Value("start", FIRST, "ms"),
            None,
            30.0,
            False,
            "ms",
        ),
        Goal(
            "6",
            "a call of a resident program takes at most 1.1 times as long as one of a service",
            Value("handlers", SERVICE.name, ONE.name),
            Value("handlers", RESIDENT.name, ONE.name),
            1.1,
            least=False,
        ),
        Goal(
            "6",
            "a call of a plain program takes at most 1.3 times as long as subprocess.run of it",
            Value("handlers", SUBPROCESS.name, ONE.name),
            Value("handlers", PROGRAM.name, ONE.name),
            1.3,
            least=False,
        ),
    )
