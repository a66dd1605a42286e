"""What a new user's first call costs once he is authenticated, and what a worker costs to start."""

import subprocess
from itertools import count
from time import perf_counter

from bench.plan import FIRST, Extent
from bench.results import Grid, Section
from bench.rounds import Progress
from bench.running import Broken
from bench.stage import CALLER, Stage, people
from srpc_client import blocking, requests
from srpcd.wire.messages import AppendReply
from tests import realm

PATH = "/bench/open"
_runs = count()


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """Users whom the daemon has never seen, one after another, each by the requests that a client library makes."""
    with stage.meanwhile():
        stage.service(stage.daemon, "blocking_service", {"handler": "plain", "path": PATH}, mode=0o622)
        _measure(stage, extent, section, progress)


def _measure(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    names = people(f"new{next(_runs)}-", extent.starts)
    grid = section.grid(
        "start",
        "A new user's first call, over TLS",
        "ms",
        label="step",
        note="Each user's very first session: no worker and no line of his is there.",
    )
    grid.add("processes that a user's second session makes", "number", _second_session(stage))
    for number, name in enumerate(names):
        progress(f"first call of new user {number + 1} of {len(names)}")
        _first_call(stage, name, grid)
        begun = perf_counter()
        subprocess.run([realm.PYTHON, "-I", "-S", "-c", "pass"], check=True)
        grid.add("an empty python3 -I -S, for comparison", "ms", (perf_counter() - begun) * 1000)


def _first_call(stage: Stage, name: str, grid: Grid) -> None:
    arguments = stage.dial(name)
    password = arguments.pop("password")
    arguments.pop("user")
    begun = last = perf_counter()

    def step(what: str) -> None:
        nonlocal last
        now = perf_counter()
        grid.add(what, "ms", (now - last) * 1000)
        last = now

    with blocking.connect(**arguments) as connection:
        step("connect, TLS handshake")
        afid, root, fid, again = (connection.new_fid() for _ in range(4))
        connection.request(requests.auth(afid, name), timeout=20)
        granted: AppendReply = connection.request(requests.append(afid, password), timeout=20)
        if granted.data != "1":
            raise Broken(f"{name} can't log in: {granted}")
        step("authentication (PAM)")
        begun = last
        connection.request(requests.attach(afid, root, name), timeout=20)
        step("attach: starts the worker")
        connection.request(requests.walk(root, fid, PATH.strip("/")), timeout=20)
        step("walk")
        connection.request(requests.call(fid, b"x" * 64), timeout=20)
        step("call: gets its line")
        grid.add(FIRST, "ms", (last - begun) * 1000)
        connection.request(requests.call(fid, b"x" * 64), timeout=20)
        step("second call")
        connection.request(requests.attach(afid, again, name), timeout=20)
        step("second attach: finds the worker")


def _second_session(stage: Stage) -> int:
    def lasting() -> set[int]:
        """The daemon's processes but for those that authenticate or look up an account, which end by themselves."""
        return {process.pid for process in stage.daemon.processes() if process.role in ("monitor", "gate", "worker")}

    with blocking.dial(**stage.dial(CALLER)) as first:
        first.stat("/")
        before = lasting()
        with blocking.dial(**stage.dial(CALLER)) as second:
            second.stat("/")
            return len(lasting() - before)
