"""Control groups of the installed service: nobody's calls starve another's, and nothing outlives its worker."""

import contextlib
import os
import pwd
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srpc_client import blocking
from tests.vm.guest.test_contexts import TREE, Journal, Served, dial, until, worker

UNIT = Path("/sys/fs/cgroup/system.slice/srpcd.service")
CONFIG = Path("/etc/srpc/srpcd.toml")
DROP_IN = Path("/run/systemd/system/srpcd.service.d/test.conf")
LIMITS = '[users]\nmemory = "64M"\ntasks = 64\ncpu_weight = 50\n[limits]\nworker_idle = 1.0\n'

BOMB = """#!/usr/bin/python3 -I
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
HOG = """#!/usr/bin/python3 -I
kept = []
while True:
    kept.append(b"x" * (1 << 20))
"""
ESCAPE = """#!/bin/sh
setsid setsid sleep {seconds} </dev/null >&- 2>&- &
(setsid sh -c 'sleep {seconds} & sleep {seconds}' </dev/null >&- 2>&- &)
sleep 1
echo gone
"""
_SECONDS = 77_001

ROUNDS, ROUNDS_MAX, CALLS = 3, 8, 60
"""Of the measurement: rounds of so many calls, in turn with and without the others' attack; more where the machine itself is
disturbed."""


def group(user: str) -> Path:
    """The directory of a user's control group."""
    return UNIT / f"users/u{pwd.getpwnam(user).pw_uid}"


def value(directory: Path, name: str) -> str:
    """What a file of a control group says."""
    return (directory / name).read_text().strip()


def processes(directory: Path) -> list[int]:
    """All in a control group and below."""
    found = []
    for file in directory.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            found += [int(each) for each in file.read_text().split()]
    return found


def restart() -> None:
    """The daemon starts anew, and nobody has a worker."""
    subprocess.run(["systemctl", "restart", "srpcd"], check=True)


@pytest.fixture(scope="module", autouse=True)
def stage() -> Iterator[None]:
    """Limits that are met soon, and programs."""
    before = CONFIG.read_bytes()
    CONFIG.write_text(LIMITS)
    restart()
    directory = TREE / "limits"
    directory.mkdir(mode=0o755)
    for name, text in (
        ("bomb", BOMB),
        ("hog", HOG),
        ("escape", ESCAPE.format(seconds=_SECONDS)),
        ("cat", "#!/bin/sh\ncat\n"),
    ):
        file = directory / name
        file.write_text(text)
        file.chmod(0o755)
    yield
    subprocess.run(["rm", "-r", str(directory)], check=True)
    CONFIG.write_bytes(before)
    restart()


@pytest.fixture
def journal() -> Journal:
    """From now on."""
    return Journal()


@pytest.fixture
def served(journal: Journal) -> Iterator[Served]:
    """A service that says who calls."""
    directory = TREE / "groups"
    directory.mkdir(mode=0o755)
    made = Served(directory)
    try:
        assert journal.says("announce outcome=granted .*endpoint=/groups/who", 60)
        yield made
    finally:
        made.end()
        subprocess.run(["rm", "-r", str(directory)], check=True)


def test_each_part_has_its_place_and_its_weight() -> None:
    main = subprocess.run(["systemctl", "show", "-P", "MainPID", "srpcd"], capture_output=True, text=True, check=True)
    assert processes(UNIT / "monitor") == [int(main.stdout)]
    assert len(processes(UNIT / "gates")) == 2
    assert [int(value(UNIT / name, "cpu.weight")) for name in ("monitor", "gates", "authentication", "users")] == [
        1000,
        1000,
        300,
        100,
    ]
    assert value(UNIT, "cgroup.procs") == ""
    with dial("alice"), dial("bob"):
        for user in ("alice", "bob"):
            assert processes(group(user)) == [worker(user)]
            limits = [value(group(user), each) for each in ("memory.max", "memory.swap.max", "pids.max", "cpu.weight")]
            assert limits == [str(64 << 20), "0", "64", "50"]
            assert (group(user) / "memory.max").stat().st_uid == 0
    assert until(lambda: not group("alice").exists() and not group("bob").exists()), "with the last worker"


def test_other_limits_hold_for_those_who_are_here(journal: Journal) -> None:
    with dial("alice") as alice:
        assert alice.call("/limits/cat", b"x", timeout=60) == b"x"
        CONFIG.write_text(LIMITS.replace("64M", "100M").replace("= 64", "= 80"))
        try:
            subprocess.run(["systemctl", "reload", "srpcd"], check=True)
            assert journal.says("reload outcome=done")
            assert [value(group("alice"), each) for each in ("memory.max", "pids.max")] == [str(100 << 20), "80"]
            assert alice.call("/limits/cat", b"x", timeout=60) == b"x"
        finally:
            CONFIG.write_text(LIMITS)
            subprocess.run(["systemctl", "reload", "srpcd"], check=True)
        assert until(lambda: value(group("alice"), "pids.max") == "64")


def sleepers() -> list[int]:
    """The processes `sleep` of the program that would escape."""
    found = subprocess.run(["pgrep", "-f", f"^sleep {_SECONDS}$"], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def test_a_program_that_makes_itself_a_daemon_ends_with_its_worker() -> None:
    with dial("bob") as bob:
        assert bob.call("/limits/escape", b"", timeout=60) == b"gone\n"
        assert len(sleepers()) == 3, "the call is over, and it has left its session"
        assert set(sleepers()) < set(processes(group("bob")))
    assert until(lambda: not sleepers())
    assert until(lambda: not group("bob").exists())


@contextlib.contextmanager
def attack(connection: blocking.Connection, path: str, begun: Callable[[], object]) -> Iterator[None]:
    """Somebody calls this, over and over, until the end of the block. begun: whether it has its effect."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                connection.call(path, b"", timeout=120)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert until(begun, 60)
        yield
    finally:
        over.set()
        subprocess.run(["pkill", "-KILL", "-U", "bob"], check=False)  # his worker too: a bomb does not end by itself
        thread.join(60)


def median(connection: blocking.Connection, path: str) -> float:
    """Seconds of one call, the median of some."""
    times = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        connection.call(path, b"", timeout=60)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@pytest.mark.parametrize("attacker", ["bomb", "hog"])
def test_what_one_user_starts_leaves_another_ones_calls_as_quick_as_they_were(served: Served, attacker: str) -> None:
    begun = {
        "bomb": lambda: int(value(group("bob"), "pids.current")) >= 60,
        "hog": lambda: "oom_kill 0" not in value(group("bob"), "memory.events"),
    }[attacker]
    quiet: list[float] = []
    loud: list[float] = []
    with dial("alice") as alice:
        served.ask(alice)
        median(alice, served.path)  # caches
        while len(quiet) < ROUNDS or (len(quiet) < ROUNDS_MAX and min(loud) >= 2 * min(quiet)):
            quiet.append(median(alice, served.path))
            with dial("bob") as bob, attack(bob, f"/limits/{attacker}", begun):
                loud.append(median(alice, served.path))
            assert until(lambda: not group("bob").exists(), 60)
    ratio = min(loud) / min(quiet)  # of the rounds in which the machine itself was disturbed least
    times = ["/".join(f"{1e3 * each:.1f}" for each in found) for found in (quiet, loud)]
    print(f"{attacker}: {ratio:.2f} times; quiet {times[0]} ms, loud {times[1]} ms")
    assert ratio < 2.0
    assert processes(UNIT / "gates")
    assert subprocess.run(["systemctl", "show", "-P", "NRestarts", "srpcd"], capture_output=True, text=True).stdout == "0\n"


def test_a_unit_that_delegates_nothing_does_not_start(journal: Journal) -> None:
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text("[Service]\nDelegate=no\nRestart=no\n")
    try:
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        assert subprocess.run(["systemctl", "restart", "srpcd"], capture_output=True).returncode != 0
        assert journal.says("stop level=error reason=.*not delegated; give the unit `Delegate=cpu memory pids`")
    finally:
        DROP_IN.unlink()
        os.rmdir(DROP_IN.parent)
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        restart()
