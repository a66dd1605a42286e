"""Trees of very different sizes: does a call notice how many endpoints there are beside its own?"""

import os
from itertools import islice
from pathlib import Path

from bench import plan, rounds
from bench.plan import Extent
from bench.results import Section
from bench.rounds import Progress
from bench.running import Program
from bench.stage import CALLER, LIMITS, SERVICE, Stage
from tests import realm

IN_DIRECTORY = 1000
"""Endpoints in one directory."""

ANNOUNCED = 100
"""Endpoints that are served, spread over the tree. (All may be called; of the others nobody has announced himself.)"""


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """One daemon for each size; lone calls by `blocking.dial`, in turn."""
    with stage.meanwhile():
        _measure(stage, extent, section, progress)


def _measure(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    callers = {}
    for size in extent.trees:
        progress(f"tree of {size:,} endpoints")
        callers[size] = _caller(stage, size)
    grid = section.grid(
        "tree",
        "64 bytes, one at a time, by size of the tree",
        "calls/s",
        ratios=tuple((plan.tree_name(size), plan.tree_name(extent.trees[0])) for size in extent.trees[1:]),
        note=f"Named pipes in directories of {IN_DIRECTORY:,}; {ANNOUNCED} of them, spread over the tree, are served by one "
        "service, as an announced endpoint holds descriptors in the monitor.",
    )
    for number, (size, caller) in rounds.interleaved(list(callers.items()), extent.fewer):
        for column, paths in ((plan.ONE_ENDPOINT, 1), (plan.IN_TURN, plan.TREES_IN_TURN)):
            progress(f"round {number + 1} of {extent.fewer}: tree of {size:,} endpoints, {column}")
            caller.ask({"paths": paths}, 20)
            answer = caller.sample(1, 64, extent.shorter)
            grid.add(plan.tree_name(size), column, answer["calls"] / answer["elapsed"])


def _caller(stage: Stage, size: int) -> Program:
    daemon: realm.Daemon = stage.keep(realm.Daemon({"log": {"level": "info"}, "limits": LIMITS}))
    owner = (realm.account(SERVICE).uid, realm.group("calc")) if stage.private else (os.getuid(), os.getgid())
    paths = []
    for start in range(0, size, IN_DIRECTORY):
        directory = stage.directory(daemon, f"d{start // IN_DIRECTORY:03d}")
        paths += [_pipe(directory, number, owner) for number in range(start, min(start + IN_DIRECTORY, size))]
    served = list(islice(paths, 0, None, max(1, size // ANNOUNCED)))
    stage.service(daemon, "blocking_service", {"handler": "plain", "paths": served})
    return stage.program("srpc_echo", "several", CALLER, {"paths": served, "dial": stage.dial(CALLER, daemon)})


def _pipe(directory: Path, number: int, owner: tuple[int, int]) -> str:
    pipe = directory / f"e{number:06d}"
    os.mkfifo(pipe)
    os.chown(pipe, *owner)
    pipe.chmod(0o620)
    return f"/{directory.name}/{pipe.name}"
