"""Parts of the monitor by themselves, where what an attacker needs is a moment that no test of the whole can choose."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from errno import EACCES, EKEYEXPIRED, ETIMEDOUT
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from srpcd import ipc, passing
from srpcd.log import Log
from srpcd.monitor import accounts, children, launch
from srpcd.monitor import monitor as module
from srpcd.monitor.credentials import Credentials
from srpcd.monitor.endpoints import Endpoints
from srpcd.monitor.limiter import FairLimiter
from srpcd.monitor.lines import Endpoint
from srpcd.monitor.logins import Logins
from srpcd.monitor.monitor import Monitor
from srpcd.monitor.origins import of_uid
from srpcd.monitor.probe import Proof
from srpcd.monitor.requests import State


def zombie(pid: int) -> bool:
    """Whether a child of ours has ended and its number can't be given to anybody else."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


async def test_a_dead_workers_number_stays_taken_until_its_session_was_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could name the session of somebody who was started meanwhile, all of which would be killed."""
    seen: list[bool] = []

    async def sweep(sessions: set[int]) -> None:
        await asyncio.sleep(0.1)
        seen.extend(zombie(pid) for pid in sessions)

    monkeypatch.setattr(module, "sweep_sessions", sweep)
    monitor: Any = SimpleNamespace(workers={}, groups=None, _dead=set(), _sweep=None, endpoints=Mock())
    monitor._sweep_dead = lambda: Monitor._sweep_dead(monitor)
    spawned = launch.spawn(("/bin/true",), launch.Drop(None, {}))
    worker = children.Worker(spawned, "alice", Log(2, level="error"), lambda *_: None)
    worker.begin(launch.Identity(20_000, 20_000, ()), "alice", "")
    worker.gone.add_done_callback(lambda _: Monitor._worker_gone(monitor, worker))
    assert await worker.gone == 0
    await asyncio.sleep(0.05)
    await monitor._sweep
    assert seen == [True]
    assert not zombie(worker.pid)


async def test_a_worker_for_whom_somebody_waits_is_not_idle() -> None:
    """It may be there, and the attach that it was started for not yet, when its idle time is over."""
    retired: list[object] = []
    limits = SimpleNamespace(limits=SimpleNamespace(worker_idle=-0.09))
    monitor: Any = SimpleNamespace(config=limits, retire=retired.append)
    monitor._idle = lambda worker: Monitor._idle(monitor, worker)
    worker: Any = SimpleNamespace(state=State.SERVING, connections=set(), wanted=1, idle=None)
    monitor._idle(worker)
    await asyncio.sleep(0.1)
    assert retired == []
    worker.wanted = 0
    await asyncio.sleep(0.1)
    assert retired == [worker]


async def test_a_session_that_ends_while_it_gets_another_worker_is_over() -> None:
    """Else it would be kept, with its worker, for as long as the connection lasts, and no gate would know of it."""
    sent: list[Any] = []
    gate = Mock(send=sent.append)
    old: Any = SimpleNamespace(gates={}, kill=None)
    connection: Any = Mock(gate=gate, number=1, over=False, pending=0, sessions={})
    connection.sessions[7] = children.Session(Credentials("alice", 20_000, None), old, time.monotonic() + 60)
    monitor: Any = SimpleNamespace(told=lambda *_, **__: None, _end_session=lambda *_: None, _link=lambda *_: None)
    monitor.run = lambda _connection, work: tasks.append(asyncio.create_task(work))
    tasks: list[asyncio.Task[None]] = []

    async def worker(_connection: object, _user: str) -> Any:
        del connection.sessions[7]
        return SimpleNamespace(connections=set())

    monitor._worker = worker
    Monitor._grant(monitor, connection, 2, connection.sessions[7].credentials, "", (7, connection.sessions[7].expires, 3))
    await asyncio.gather(*tasks)
    assert sent == [ipc.Refused(1, 2, EKEYEXPIRED, "")]
    assert connection.sessions == {}


async def test_accounts_are_looked_up_a_bounded_number_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a process of root's, for as long as a directory service takes."""
    running: dict[str, int] = {}
    most: dict[str, int] = {}

    async def look_up(user: str, _daemon: str) -> None:
        running[user] = running.get(user, 0) + 1
        most[user] = max(most.get(user, 0), running[user])
        await asyncio.sleep(0.01)
        running[user] -= 1

    monkeypatch.setattr(accounts, "look_up", look_up)
    logins: Any = SimpleNamespace(_monitor=SimpleNamespace(own=launch.Identity(0, 0, ())), _look_ups=FairLimiter(4, 2))
    origins: list[Any] = [SimpleNamespace(origin=of_uid(1)), SimpleNamespace(origin=of_uid(2))]
    await asyncio.gather(*(Logins.look_up(logins, each.origin.address, each) for each in origins for _ in range(20)))
    assert most == {"uid:1": 2, "uid:2": 2}


@pytest.mark.parametrize("changed", [False, True])
async def test_what_changed_while_a_right_was_proved_is_looked_at_again(changed: bool) -> None:
    """A user can stop his probe between its proof and its answer; the look at what changed may come just then."""
    endpoint: Any = type("Endpoint", (), {})()
    vars(endpoint).update(changed=time.monotonic() - 1, callers=set(), servers=[], lines={}, key=(1, 2, "echo"))
    doubted: list[object] = []

    async def probe(*_: object) -> Proof:
        await asyncio.sleep(0.01)
        if changed:
            endpoint.changed = time.monotonic()
        return Proof(0, [])

    endpoints: Any = SimpleNamespace(_probe=probe, _doubt=lambda *pair: doubted.append(pair))
    endpoints._register = SimpleNamespace(endpoint=lambda *_: endpoint)
    identity = launch.Identity(20_000, 20_000, ())
    worker: Any = type("Worker", (), {"send": lambda *_: None})()  # hashable, which a SimpleNamespace is not
    vars(worker).update(identity=identity, log_origin="", waiting=1, state=None, endpoints=set())
    await Endpoints._lines_wanted(endpoints, worker, "echo", (1, 2))
    assert doubted == ([(worker, endpoint)] if changed else [])


@pytest.mark.parametrize("held_up", [0, ETIMEDOUT])
async def test_no_refusal_is_put_off_by_what_changes_again_and_again(held_up: int) -> None:
    """A user can hold up his own probes, and change an endpoint of his own meanwhile: that one alone is doubted anew."""
    worker: Any = object.__new__(children.Worker)
    identity = launch.Identity(20_000, 20_000, ())
    vars(worker).update(identity=identity, doubted={}, endpoints=set(), state=None)
    own: Endpoint[Any] = Endpoint((1, 1, "own"), [], 0, False)
    other: Endpoint[Any] = Endpoint((1, 2, "other"), [], 0, False)
    worker.doubted.update({own: None, other: None})

    async def probe(_identity: object, _origin: object, path: str, *_: object) -> Proof:
        await asyncio.sleep(0.01)
        if path == "other":
            return Proof(EACCES, [])
        own.changed += 1
        return Proof(held_up, [])

    settled: list[tuple[str, int]] = []
    endpoints: Any = SimpleNamespace(_probe=probe)
    endpoints._settled_caller = lambda _worker, endpoint, errno: settled.append((endpoint.path, errno))
    task = asyncio.create_task(Endpoints._settle(endpoints, worker))
    await asyncio.sleep(0.2)
    task.cancel()
    assert ("other", EACCES) in settled
    assert (("own", ETIMEDOUT) in settled) == bool(held_up)


async def test_where_there_is_a_line_is_proved_first() -> None:
    """A user may hold up each of his probes for a second, also of hundreds of endpoints that nobody serves."""
    worker: Any = object.__new__(children.Worker)
    vars(worker).update(identity=launch.Identity(20_000, 20_000, ()), doubted={}, endpoints=set(), state=None)
    endpoints_: list[Endpoint[Any]] = [Endpoint((1, number, str(number)), [], 0, False) for number in range(5)]
    endpoints_[3].given.add((1, worker))
    worker.doubted.update(dict.fromkeys(endpoints_))
    settled: list[str] = []

    async def probe(*_: object) -> Proof:
        return Proof(ETIMEDOUT, [])

    endpoints: Any = SimpleNamespace(_probe=probe)
    endpoints._settled_caller = lambda _worker, endpoint, _errno: settled.append(endpoint.path)
    await Endpoints._settle(endpoints, worker)
    assert settled == ["3", "0", "1", "2", "4"]


def sleeping_child() -> tuple[children.Child, socket.socket, socket.socket]:
    """A child that does nothing, with its own ends of the message socket and of standard error."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors, their_errors = socket.socketpair()
    pid, pidfd = launch.fork(lambda: time.sleep(60))
    spawned = launch.Spawned(pid, pidfd, here, errors)
    return children.Child(spawned, "alice", Log(2, level="error"), Mock()), there, their_errors


async def test_whoever_reads_too_slowly_is_ended_however_steadily_he_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others cause waits for him, descriptors too; a little read now and then is no excuse."""
    monkeypatch.setattr(children, "_UNREAD_SECONDS", 0.5)
    child, there, their_errors = sleeping_child()
    there.setblocking(False)
    end = time.monotonic() + 10
    while not child.gone.done() and time.monotonic() < end:
        for number in range(400):
            child.send(ipc.LineOver(number))
        with contextlib.suppress(BlockingIOError):
            for _ in range(250):
                ipc.receive(there)
        await asyncio.sleep(0.05)
    assert await asyncio.wait_for(child.gone, 1) == -signal.SIGKILL
    there.close()
    their_errors.close()


async def test_a_child_that_sends_descriptors_on_standard_error_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel that can't refuse them: their release delays the monitor, so the first is the last."""
    monkeypatch.setattr(passing, "SO_PASSRIGHTS", 9999)
    child, there, their_errors = sleeping_child()
    their_errors.send(b"a line\n")
    await asyncio.sleep(0.1)
    assert not child.gone.done()
    socket.send_fds(their_errors, [b"x"], [there.fileno()])
    assert await asyncio.wait_for(child.gone, 60) == -signal.SIGKILL
    there.close()
    their_errors.close()


async def test_a_killed_child_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a process hangs in the kernel. What waits for its end (another gate, the daemon's own end) goes on."""
    monkeypatch.setattr(children, "_STUCK_SECONDS", 0.1)
    child, there, their_errors = sleeping_child()
    with monkeypatch.context() as patched:
        patched.setattr(signal, "pidfd_send_signal", lambda *_: None)
        child.kill("does not answer")
    assert await asyncio.wait_for(child.gone, 5) is None
    assert child.proved.result() is False
    child.send(ipc.Ping())
    child.kill("once more")
    os.kill(child.pid, signal.SIGKILL)  # and once it does end, it is taken off the process table
    while Path(f"/proc/{child.pid}").exists():
        await asyncio.sleep(0.01)
    there.close()
    their_errors.close()
