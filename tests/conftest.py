"""Fixtures for all tests: the realm, daemons in it, and a look after each test at what it left behind."""

import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import realm
from tests.realm import daemon as daemons
from tests.realm import processes

# How long something takes says how busy the machine is. Where others wait for the outcome, it is the same every time.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("tests")

_left_out: dict[str, list[str]] = {}
_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """The markers that tests may use."""
    config.addinivalue_line("markers", "needs_root: runs in the realm, with its throwaway users; as root only")
    config.addinivalue_line("markers", "needs_ordinary_user: a daemon in personal mode is run by whoever runs the tests")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Enter the realm before anything starts a thread or makes a temporary file."""
    realm.enter()
    # SIGTERM ends the daemons too. A shell lets what it starts in the background ignore SIGINT, and tests send it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what can't be done here, and remember it for the end."""
    reason = ""
    if item.get_closest_marker("needs_root") or "private_realm" in getattr(item, "fixturenames", ()):
        reason = realm.missing()
    if item.get_closest_marker("needs_ordinary_user") and os.geteuid() == 0:
        reason = "needs an ordinary user: personal mode of whoever runs the tests (as root: the same by one of the realm's)"
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Collect what was left out, by reason.

    Python before 3.11.5 raises SystemError ("AST constructor recursion depth mismatch") where a source text is parsed while
    another one is: pytest parses the test's for its report, a garbage collection in between may run finalizers, and what
    shows their faults parses too. It would end the whole run.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        report = yield
    finally:
        if collects:
            gc.enable()
    if report.skipped and isinstance(report.longrepr, tuple):
        _left_out.setdefault(str(report.longrepr[2]).removeprefix("Skipped: "), []).append(item.nodeid)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out; pytest's own summary line follows."""
    if _left_out:
        terminalreporter.section("left out")
        for reason, items in _left_out.items():
            files = sorted({each.partition("::")[0] for each in items})
            more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
            terminalreporter.line(f"{reason}: {len(items)} test{'s' * (len(items) != 1)} of {', '.join(files[:3])}{more}")


@pytest.fixture(scope="session")
def place() -> realm.Place:
    """Where things are."""
    return realm.enter()


@pytest.fixture(scope="session")
def private_realm(place: realm.Place) -> realm.Place:
    """The realm with its users. A test that asks for it is left out where there can't be one."""
    return place


@pytest.fixture
def make_daemon(place: realm.Place) -> Iterator[Callable[..., realm.Daemon]]:
    """`make_daemon(config, …)` starts a `realm.Daemon` that is stopped after the test, with a look at what it leaves."""
    made: list[realm.Daemon] = []

    def make(*arguments: Any, **options: Any) -> realm.Daemon:
        daemon = realm.Daemon(*arguments, **options)
        made.append(daemon)
        return daemon.start()

    try:
        yield make
    finally:
        # All of them are ended, whatever is found at the first.
        faults = [fault for each in made if (fault := _stop(each))]
        if faults:
            pytest.fail("\n".join(faults))


def _stop(daemon: realm.Daemon) -> str:
    try:
        if daemon.running:
            daemon.stop()
    except AssertionError as fault:
        return str(fault)
    return ""


@pytest.fixture(scope="module")
def daemon(place: realm.Place) -> Iterator[realm.Daemon]:
    """One daemon for the tests of a module, with nothing in its tree but what they put there."""
    with realm.Daemon() as running:
        yield running


@pytest.fixture
def open_directory(place: realm.Place) -> Path:
    """A fresh directory that everybody can reach (those of `tmp_path` are closed for other users)."""
    path = place.temporary / f"t{next(_numbers)}"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    return path


def _own_processes() -> set[int]:
    """Descendants of this process, without the daemons that are meant to run and what they started."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the usual case, and cheap: none at all
        return set()
    expected = set()
    for daemon in daemons.running():
        expected |= {daemon.pid, *(each.pid for each in processes.descendants(daemon.pid))}
    found = [each for each in processes.descendants(os.getpid()) if each.pid not in expected]
    return {each.pid for each in found if processes.alive(each)}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test: no process of its own is left, and no descriptor."""
    started, processes_before, before = processes.still_running(), _own_processes(), realm.fds()
    yield
    forgotten = [process for process in processes.still_running() if process not in started]
    for process in forgotten:
        processes.kill_group(process)
        processes.finish(process)
    if forgotten:
        pytest.fail(f"the test left what it started: {[process.args for process in forgotten]}", pytrace=False)
    left: list[str] = []

    def settled() -> bool:
        left[:] = [str(processes.look(pid)) for pid in _own_processes() - processes_before]
        return not left

    if not processes.until(settled, 1.0):
        pytest.fail(f"the test left processes: {left}", pytrace=False)
    if len(realm.fds()) > len(before):
        gc.collect()  # cycles hold some until then
        after = realm.fds()
        if len(after) > len(before):
            new = [each for each in after if each not in before]
            pytest.fail(f"the test left {len(after) - len(before)} descriptors: {new or after}", pytrace=False)
