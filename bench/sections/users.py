"""Many users, each with a live worker: what one call costs among them, and what they make together."""

from pathlib import Path
from typing import Any

from bench import plan, rounds
from bench.plan import Extent
from bench.results import Section, quantile
from bench.rounds import Progress
from bench.running import Broken, Missing, Program
from bench.stage import LIMITS, Stage, people
from tests import realm
from tests.realm.counters import pss

PATH, BUSY_PATH = "/bench/open", "/bench/busy"
WORKER_MB = 6
"""Memory that a user's worker, and what it takes elsewhere, is expected to need at most."""

CALLERS_A_SECOND = 400
"""So long is a sample of many users that each of them makes several calls."""

SETTLED = 30.0
"""Seconds for workers whose users are gone to end."""


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """A daemon of its own, and users who log in by password over TLS, each on a connection of his own."""
    number = _as_many_as_fit(extent.users[-1], section)
    users = [(name, realm.password(name)) for name in people("user", number)]
    with stage.meanwhile():
        limits = {**LIMITS, "worker_idle": 1.0, "workers": max(1024, number + 16)}
        daemon = stage.keep(realm.Daemon({"log": {"level": "info"}, "limits": limits}))
        stage.directory(daemon, "bench")
        service = stage.service(daemon, "blocking_service", {"handler": "plain", "path": PATH}, mode=0o622)
        setup = {"address": daemon.address, "pins": [daemon.pin], "path": PATH, "users": users}
        turns = stage.program("crowd", "turns", "alice", setup)
        _turns(daemon, service, turns, number, extent, section, progress)
        _at_once(stage, setup, number, extent, section, progress)
        _alone_again(daemon, turns, extent, section, progress)
    _beside(stage, extent, section, progress)


def _as_many_as_fit(wanted: int, section: Section) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    megabytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) // 1024
    fitting = min(wanted, megabytes // WORKER_MB)
    if fitting < wanted:
        section.notes.append(f"{megabytes:,} MB of memory are available here: {fitting:,} users instead of {wanted:,}.")
    return fitting


def _turns(
    daemon: realm.Daemon, service: Program, crowd: Program, number: int, extent: Extent, section: Section, progress: Progress
) -> None:
    section.grid(
        "turns",
        f"One call at a time, among {number:,} users",
        "µs",
        note="The median call of each sample, by `blocking.dial` over TLS; below it the mean. `alone`: before the others "
        "have come, and after they have gone. `taking turns`: each call is another user's, so his connection, worker and "
        "line have not been used since all others' were.",
    )
    served = section.grid("served", f"{number:,} users with a live worker each", "", note="PSS in MB (10^6 bytes).")
    _log_in(crowd, 1, progress)
    for round_ in range(extent.fewer):
        progress(f"round {round_ + 1} of {extent.fewer}: one user alone")
        _sample(crowd, 1, extent, section, plan.ALONE)
    try:
        served.add(plan.SERVED, plan.FOUND, _log_in(crowd, number, progress))
    except Broken as fault:
        lines = [line for line in daemon.log_text().splitlines() if f'"{fault.about}"' in line]
        raise Broken(
            f"{fault}; the service{service.said()}\nthe daemon's log about him:\n" + "\n".join(lines[-20:])
        ) from None
    for round_, (column, users) in rounds.interleaved(((plan.IDLE, 1), (plan.TURNS, number)), extent.fewer):
        progress(f"round {round_ + 1} of {extent.fewer}: {column}")
        _sample(crowd, users, extent, section, column)
    progress("memory of all workers")
    for process in daemon.processes():
        if process.role == "worker":
            served.add(plan.WORKER_PSS, plan.FOUND, pss(process.pid))
        elif process.role in ("monitor", "gate"):
            served.add(f"PSS of the {process.role} {process.detail}".strip() + ", MB", plan.FOUND, pss(process.pid))
    served.add("PSS of the service, MB", plan.FOUND, pss(service.pid))


def _sample(crowd: Program, users: int, extent: Extent, section: Section, column: str) -> None:
    answer = crowd.ask({"turns": users, "size": 64, "seconds": extent.shorter}, 60)
    grid = next(each for each in section.grids if each.name == "turns")
    histogram = {int(bucket): count for bucket, count in answer["latencies"].items()}
    grid.add(plan.USER, column, quantile(histogram, 0.5))
    grid.add(f"{plan.USER}, mean", column, answer["elapsed"] / answer["calls"] * 1e6)


def _log_in(crowd: Program, number: int, progress: Progress) -> int:
    """Log in so many users, in steps, so that no answer takes long. Returns how many were served. Raises Broken."""
    answer: dict[str, Any] = {}
    for each in [*range(50, number, 50), number]:
        progress(f"{each:,} of {number:,} users log in")
        answer = crowd.ask({"users": each}, 300)
        if answer["faults"]:
            first = answer["faults"][0]
            raise Broken(f"{len(answer['faults'])} users are not served, the first: {first}", first.partition(":")[0])
    return int(answer["users"])


def _at_once(stage: Stage, setup: dict[str, Any], number: int, extent: Extent, section: Section, progress: Progress) -> None:
    grid = section.grid(
        "at once",
        "Calls of many users at once",
        "calls/s",
        note="Each user makes his next call when his last is answered: so many are in flight, each on a connection of its "
        "own, all in one asyncio caller, which is one of the processes that share the cores.",
    )
    fair = section.grid("fair", "How even it is: calls of the user who got least, as a share of the most", "%")
    crowds = {"sRPC asyncio": stage.program("crowd", "at_once", "alice", setup)}
    try:
        target = stage.serving(plan.GRPC_AIO)[1]
        crowds[plan.GRPC_AIO.name] = stage.program("crowd", "grpc_at_once", "alice", target)
    except Missing as fault:
        section.missing[plan.GRPC_AIO.name] = str(fault)
    sizes = [each for each in extent.users if each <= number]
    for users in sizes:
        for crowd in crowds.values():
            _log_in(crowd, users, progress)
        for round_, (name, crowd) in rounds.interleaved(list(crowds.items()), extent.fewer):
            progress(f"round {round_ + 1} of {extent.fewer}: {users:,} users at once, {name}")
            seconds = max(extent.shorter, users / CALLERS_A_SECOND)
            answer = crowd.ask({"at_once": users, "size": 64, "seconds": seconds}, 120)
            grid.add(name, f"{users:,}", answer["calls"] / answer["elapsed"])
            if users > 1:
                fair.add(name, f"{users:,}", 100 * answer["least"] / max(1, answer["most"]))
    for crowd in crowds.values():
        crowd.end()


def _alone_again(daemon: realm.Daemon, crowd: Program, extent: Extent, section: Section, progress: Progress) -> None:
    progress("all others leave")
    crowd.ask({"users": 1}, 60)
    if not realm.until(lambda: len(daemon.processes("worker")) == 1, SETTLED, 0.5):
        raise Broken(f"{len(daemon.processes('worker'))} workers are there {SETTLED:.0f} s after their users have gone")
    for round_ in range(extent.fewer):
        progress(f"round {round_ + 1} of {extent.fewer}: one user alone again")
        _sample(crowd, 1, extent, section, plan.ALONE)


def _beside(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """One user's lone calls while another keeps 64 in flight at the same service."""
    grid = section.grid(
        "beside",
        "One call at a time beside another caller's 64 in flight",
        "µs",
        note="The median call. The other is an asyncio caller of the same server, in a process of its own.",
    )
    with stage.meanwhile():
        stage.service(stage.daemon, "blocking_service", {"handler": "plain", "path": BUSY_PATH}, mode=0o622)
        ours = [{"path": BUSY_PATH, "dial": stage.dial(user)} for user in ("alice", "bob")]
        pairs = {plan.AIO.name: [stage.program("srpc_echo", "asyncio", "alice", each) for each in ours]}
        try:
            target = stage.serving(plan.GRPC_AIO)[1]
            pairs[plan.GRPC_AIO.name] = [stage.program("grpc_echo", "aio_caller", "alice", target) for _ in range(2)]
        except Missing as fault:
            section.missing[plan.GRPC_AIO.name] = str(fault)
        for round_, (name, (one, busy)) in rounds.interleaved(list(pairs.items()), extent.fewer):
            progress(f"round {round_ + 1} of {extent.fewer}: {name} beside a busy caller")
            quiet = one.sample(1, 64, extent.shorter)
            busy.tell({"inflight": 64, "size": 64, "seconds": extent.shorter * 1.5})
            loud = one.sample(1, 64, extent.shorter)
            busy.answer(60)
            for column, answer in (("alone", quiet), ("beside 64 in flight", loud)):
                histogram = {int(bucket): count for bucket, count in answer["latencies"].items()}
                grid.add(name, column, quantile(histogram, 0.5))
