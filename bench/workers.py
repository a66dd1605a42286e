"""What a worker costs: how many processes there are, how long a start takes, how much memory one has."""

import os
import signal
import subprocess
from pathlib import Path
from time import perf_counter, sleep

from bench.results import WorkerCost
from bench.running import Broken
from bench.stage import CALLER, Stage
from srpc_client import blocking, requests
from tests import realm

OTHERS = ("bob", "svc", "svc2")
"""Users of the realm who may log in, besides CALLER."""

SETTLE = 0.05
"""Seconds after a worker's end: what the daemon clears away then is not part of the next start."""


def cost(stage: Stage, starts: int) -> WorkerCost:
    """Measure it, before other processes of the bench share pages with the workers. starts: how many. Raises Broken."""
    more = _second_session(stage)
    cold, warm = _attaches(stage, starts)
    floor = tuple(_empty_interpreter() for _ in range(starts))
    try:
        return WorkerCost(more, cold, warm, floor, _memory(stage))
    except PermissionError:
        return WorkerCost(more, cold, warm, floor, (), "only root may look at a worker's memory: it is undumpable")


def _workers(stage: Stage) -> set[int]:
    return {process.pid for process in stage.daemon.processes("worker")}


def _lasting(stage: Stage) -> set[int]:
    """The daemon's processes but for those that authenticate or look up an account, which end by themselves."""
    return {process.pid for process in stage.daemon.processes() if process.role in ("monitor", "gate", "worker")}


def _second_session(stage: Stage) -> int:
    with blocking.dial(**stage.dial()) as first:
        first.stat("/")
        before = _lasting(stage)
        with blocking.dial(**stage.dial()) as second:
            second.stat("/")
            return len(_lasting(stage) - before)


def _attaches(stage: Stage, starts: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ms of attaches without and with a running worker, in turn.

    One authentication is good for all of them: nothing of PAM is in here. A worker that was killed is started anew by the
    next attach. Both kinds ask for the account and its groups, and end with a walk in the worker.
    """
    cold, warm = [], []
    arguments = stage.dial()
    user = arguments.pop("user", None)
    password = arguments.pop("password", None)
    with blocking.connect(**arguments) as connection:
        session = connection.login(user, password=password)
        afid, name = session._state.afid, session.user

        def attach() -> float:
            fid = connection.new_fid()
            begun = perf_counter()
            connection.request(requests.attach(afid, fid, name), timeout=20)
            took = perf_counter() - begun
            connection.request(requests.clunk(fid), timeout=20)
            return took * 1000

        for _ in range(starts):
            running = _workers(stage)
            ends = len(stage.daemon.events("process-end", role="worker"))
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            stage.daemon.wait_event("process-end", 5, ends + len(running), role="worker")
            sleep(SETTLE)
            cold.append(attach())
            warm.append(attach())
        if len(_workers(stage)) != 1:
            raise Broken("there is not one worker for one user")
    return tuple(cold), tuple(warm)


def _empty_interpreter() -> float:
    """ms that the system's interpreter takes to do nothing, started as a worker's is: no worker can start faster."""
    begun = perf_counter()
    subprocess.run([realm.PYTHON, "-I", "-S", "-c", "pass"], check=True)
    return (perf_counter() - begun) * 1000


def _memory(stage: Stage) -> tuple[float, ...]:
    """MB of each worker, when several run and each has done something. Raises PermissionError."""
    found = []
    users = (CALLER, *OTHERS) if stage.private else (CALLER,)
    connections = []
    try:
        for user in users:
            connection = blocking.dial(**stage.dial(user))
            connections.append(connection)
            connection.list("/")
        for pid in sorted(_workers(stage)):
            found.append(pss(pid))
    finally:
        for connection in connections:
            connection.close()
    return tuple(found)


def pss(pid: int) -> float:
    """MB (10^6 bytes) of proportional set size, as /proc/PID/smaps_rollup has it. Raises PermissionError."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise Broken("the kernel does not say the PSS of processes")
