"""The daemon's end, by a signal or by a violent death, and what comes after it."""

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from errno import ECONNREFUSED, ECONNRESET, ENOENT, ESHUTDOWN
from itertools import count
from pathlib import Path

import pytest

import srpc_client
from srpc_client import Unreachable
from tests import realm
from tests.integration import stage
from tests.integration.raw import CALL, ERROR, Raw, call_body
from tests.realm import processes

pytestmark = pytest.mark.needs_root

CALLS = 50

LONG = 120.0
"""Seconds to wait for calls when the daemon ends, in tests in which it is not to wait that long."""

SERVICE = """
import asyncio, sys
from srpc_client import serve

async def hold(request):
    await asyncio.sleep(600)

async def slow(request):
    await asyncio.sleep(float(request.payload))
    return b"slept"

what = {"hold": hold, "slow": slow, "echo": lambda request: request.payload}
asyncio.run(serve({path: what[path.rpartition("/")[2]] for path in sys.argv[3:]}, address=sys.argv[1], group=sys.argv[2]))
"""

NEVER_OPENS = """
import asyncio, sys
from srpc_client import connect, requests
from srpc_client.endpoint import EndpointPipe

class Deaf:
    def done(self): return False
    def set_result(self, reply): pass
    def set_exception(self, fault): pass

async def main():
    connection = await connect(sys.argv[1])
    pipe = EndpointPipe((await connection.ping()).tree, sys.argv[3], 0o620, sys.argv[2])
    fid = connection.new_fid()
    await connection.request(requests.announce(fid, sys.argv[3]))
    connection.stream(requests.listen(fid), Deaf())
    await asyncio.sleep(600)

asyncio.run(main())
"""

HOLDS = """#!/usr/bin/python3 -I
import time
time.sleep(600)
"""

_seconds = count(200_000)
"""What a `sleep` of its own is found by in the list of processes."""

MakeDaemon = Callable[..., realm.Daemon]


def make(make_daemon: MakeDaemon, **limits: float) -> realm.Daemon:
    daemon = make_daemon({"limits": limits})
    stage.make_directory(daemon.tree / "calc", "svc", "calc")
    stage.make_directory(daemon.tree / "tools")
    return daemon


@contextmanager
def swept(seconds: int) -> Iterator[None]:
    """Whatever a test finds, its sleepers are gone afterwards."""
    try:
        yield
    finally:
        for each in stage.sleepers(seconds):
            os.kill(each.pid, signal.SIGKILL)
        assert processes.until(lambda: not stage.sleepers(seconds))


async def dial(daemon: realm.Daemon, user: str = "alice") -> srpc_client.Connection:
    return await srpc_client.dial(daemon.address, pins=daemon.pin, user=user, password=realm.password(user))


async def outcomes(calls: "Iterable[asyncio.Task[bytes]]", seconds: float = stage.WAIT_SECONDS) -> "Counter[int]":
    """How the calls end, by errno (0: answered)."""
    async with asyncio.timeout(seconds):
        results = await asyncio.gather(*calls, return_exceptions=True)
    for each in results:
        assert isinstance(each, bytes | OSError), repr(each)
    return Counter((each.errno or -1) if isinstance(each, OSError) else 0 for each in results)


def begin(
    connection: srpc_client.Connection, path: str, payload: bytes = b"", number: int = CALLS
) -> "list[asyncio.Task[bytes]]":
    return [asyncio.create_task(connection.call(path, payload)) for _ in range(number)]


# --- told to end ---------------------------------------------------------------------------------------------------------


async def test_calls_in_flight_are_finished_and_new_ones_refused(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon, drain=LONG)
    stage.program(daemon.tree / "tools/slow", "#!/bin/sh\nsleep 1\necho done\n")
    with stage.service(daemon, "/calc/slow", code=SERVICE):
        async with await dial(daemon) as alice, await dial(daemon) as idle:
            assert await alice.call("/calc/slow", b"0") == b"slept"
            calls = [*begin(alice, "/calc/slow", b"1.2"), *begin(alice, "/tools/slow", number=3)]
            await asyncio.sleep(0.2)
            stopping = asyncio.create_task(asyncio.to_thread(daemon.stop, LONG / 2))
            await asyncio.to_thread(daemon.wait_event, "stop")
            await asyncio.sleep(0.1)
            assert await outcomes(begin(alice, "/calc/slow", b"0", 3)) == {ESHUTDOWN: 3}
            assert await outcomes(begin(idle, "/calc/slow", b"0", 3)) == {ESHUTDOWN: 3}
            with pytest.raises(srpc_client.SrpcError) as refused:
                await dial(daemon)
            assert refused.value.errno in (ECONNREFUSED, ECONNRESET)
            assert await outcomes(calls) == {0: CALLS + 3}
            await stopping  # it does not wait longer than for the last call
            await asyncio.wait_for(idle.wait_closed(), stage.WAIT_SECONDS)


async def test_calls_that_take_too_long_get_an_error_in_time(make_daemon: MakeDaemon) -> None:
    seconds = next(_seconds)
    daemon = make(make_daemon, drain=1)
    stage.program(daemon.tree / "tools/nap", f"#!/bin/sh\nsleep {seconds} & sleep {seconds}\n")
    stage.program(daemon.tree / "tools/kept", HOLDS, 0o1755)
    with swept(seconds), stage.service(daemon, "/calc/hold", code=SERVICE):
        async with await dial(daemon) as alice:
            calls = [*begin(alice, "/calc/hold"), *begin(alice, "/tools/nap", number=3), *begin(alice, "/tools/kept")]
            while len(stage.sleepers(seconds)) < 6:
                await asyncio.sleep(0.02)
            begun = time.monotonic()
            stopping = asyncio.create_task(asyncio.to_thread(daemon.stop))
            assert await outcomes(calls) == {ESHUTDOWN: len(calls)}
            assert time.monotonic() - begun > 0.8
            await stopping
            assert not stage.sleepers(seconds)


async def test_on_the_wire_each_call_has_exactly_one_error(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon, drain=1)
    with stage.service(daemon, "/calc/hold", code=SERVICE), Raw.tls(daemon.tcp) as raw:
        raw.login("alice")
        assert raw.walk("calc/hold", 2).kind != ERROR
        calls = [raw.post(CALL, call_body(2)) for _ in range(CALLS)]
        stopping = asyncio.create_task(asyncio.to_thread(daemon.stop))
        frames = await asyncio.to_thread(raw.rest)
        assert sorted(each.seq for each in frames) == calls
        assert {each.errno for each in frames} == {ESHUTDOWN}
        await stopping


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM] * 3, [signal.SIGTERM, signal.SIGINT]])
async def test_other_signals_and_several_of_them(make_daemon: MakeDaemon, numbers: list[signal.Signals]) -> None:
    daemon = make(make_daemon, drain=5)
    with stage.service(daemon, "/calc/slow", code=SERVICE):
        async with await dial(daemon) as alice:
            assert await alice.call("/calc/slow", b"0") == b"slept"
            calls = begin(alice, "/calc/slow", b"1")
            await asyncio.sleep(0.2)
            for number in numbers:
                os.kill(daemon.pid, number)
                await asyncio.sleep(0.15)
            assert await outcomes(calls) == {0: CALLS}
            await asyncio.to_thread(daemon.stop)
    assert "Traceback" not in daemon.log_text()


def test_a_signal_at_any_moment_of_the_start(private_realm: realm.Place) -> None:
    daemon = realm.Daemon()
    for number in (signal.SIGTERM, signal.SIGINT):
        for pause in (0.1, 0.2, 0.23, 0.26, 0.3, 0.4, 0.6):
            daemon.begin()
            time.sleep(pause)
            faults = []
            try:
                daemon._end(number, 10)
            finally:
                log = daemon.log_text()
            # Until it handles signals itself it ends as any Python program does: by the signal, or with status 1 (SIGINT).
            allowed = (0,) if '"ready"' in log else (0, 1, -number) if number == signal.SIGINT else (0, -number)
            if daemon.wait(0) not in allowed:
                faults.append(f"status {daemon.wait(0)}")
            if daemon._left:
                faults.append(f"left {daemon._left}")
            if '"stop"' in log and daemon.local.exists():
                faults.append("the socket is left")
            if number == signal.SIGTERM and "Traceback" in log:
                faults.append("a traceback")
            assert not faults, f"{number.name} after {pause} s: {faults}; the log:\n{log}"
    daemon.start()
    daemon.stop()


HUNG = {
    "service": lambda daemon, service: [service.pid],
    "worker": lambda daemon, service: [each.pid for each in daemon.processes("worker")],
    "gate": lambda daemon, service: [each.pid for each in daemon.processes("gate", "tls")],
    "everything": lambda daemon, service: [each.pid for each in daemon.processes() if each.role != "monitor"],
}


@pytest.mark.parametrize("what", HUNG)
async def test_it_ends_though_something_hangs(make_daemon: MakeDaemon, what: str) -> None:
    seconds = next(_seconds)
    daemon = make(make_daemon, drain=1)
    stage.program(daemon.tree / "tools/nap", f"#!/bin/sh\nsleep {seconds} & sleep {seconds}\n")
    with swept(seconds), stage.service(daemon, "/calc/slow", code=SERVICE) as service:
        async with await dial(daemon) as alice:
            assert await alice.call("/calc/slow", b"0") == b"slept"
            calls = [*begin(alice, "/calc/slow", b"60"), *begin(alice, "/tools/nap", number=1)]
            while len(stage.sleepers(seconds)) < 2:
                await asyncio.sleep(0.02)
            stopped = HUNG[what](daemon, service)
            assert stopped
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.to_thread(daemon.stop)
                assert not stage.sleepers(seconds), daemon.log_text()
                assert set(await outcomes(calls)) <= {ESHUTDOWN, ECONNRESET}
            finally:
                if what == "service":
                    os.kill(service.pid, signal.SIGCONT)


async def test_nothing_holds_it_up_when_nothing_is_in_flight(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon, drain=LONG)
    with stage.service(daemon, "/calc/slow", code=SERVICE), ExitStack() as stack:
        stranger = stack.enter_context(socket.create_connection(daemon.tcp))
        stack.enter_context(Raw.tls(daemon.tcp))
        async with await dial(daemon) as alice:
            assert await alice.call("/calc/slow", b"0") == b"slept"
            await asyncio.to_thread(daemon.stop, LONG / 2)
            stranger.settimeout(stage.WAIT_SECONDS)
            assert stranger.recv(1) == b""


async def test_what_programs_left_in_the_background_ends_with_the_daemon(make_daemon: MakeDaemon) -> None:
    seconds = next(_seconds)
    daemon = make(make_daemon)
    stage.program(daemon.tree / "tools/leaves", f"#!/bin/bash\nset -m\nsleep {seconds} >&- 2>&- &\necho done\n")
    with swept(seconds):
        async with await dial(daemon) as alice:
            assert await alice.call("/tools/leaves", b"") == b"done\n"
        await asyncio.to_thread(daemon.stop)
        assert not stage.sleepers(seconds)


# --- killed --------------------------------------------------------------------------------------------------------------


async def test_a_killed_monitor_takes_everything_along_and_another_one_starts(make_daemon: MakeDaemon) -> None:
    seconds = next(_seconds)
    daemon = make(make_daemon)
    stage.program(daemon.tree / "tools/nap", f"#!/bin/sh\nexec sleep {seconds}\n")
    stage.program(daemon.tree / "tools/kept", HOLDS, 0o1755)
    with swept(seconds), stage.service(daemon, "/calc/hold", "/calc/echo", code=SERVICE) as service:
        async with await dial(daemon) as alice, await dial(daemon, "bob") as bob:
            calls = [*begin(alice, "/calc/hold"), *begin(alice, "/tools/nap", number=5), *begin(bob, "/tools/kept")]
            while len(stage.sleepers(seconds)) < 5:
                await asyncio.sleep(0.02)
            pin, address = daemon.pin, daemon.address
            daemon.kill()  # and what is left of it would be told
            assert await outcomes(calls) == {ECONNRESET: len(calls)}
            assert alice.closed
            assert bob.closed
            assert not stage.sleepers(seconds)
            with pytest.raises(Unreachable):
                await srpc_client.dial(address, pins=pin, user="alice", password=realm.password("alice"))
            assert daemon.local.exists()
        await asyncio.to_thread(daemon.start)
        assert daemon.pin == pin
        await asyncio.to_thread(daemon.wait_event, "announce", 8, 2, outcome="granted")  # by itself
        assert service.poll() is None
        async with await dial(daemon) as alice:
            assert await alice.call("/calc/echo", b"back") == b"back"
        await asyncio.to_thread(daemon.stop)


async def test_what_programs_forked_ends_with_a_killed_monitor(make_daemon: MakeDaemon) -> None:
    seconds = next(_seconds)
    daemon = make(make_daemon)
    stage.program(daemon.tree / "tools/forks", f"#!/bin/sh\nsleep {seconds} & sleep {seconds}\n")
    with swept(seconds):
        async with await dial(daemon) as alice:
            calls = begin(alice, "/tools/forks", number=10)
            while len(stage.sleepers(seconds)) < 20:
                await asyncio.sleep(0.02)
            daemon.kill()
            assert await outcomes(calls) == {ECONNRESET: 10}


async def test_lines_that_a_killed_daemon_left_are_removed_at_the_next_start(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon)
    before = set(realm.fds())
    with stage.service(daemon, "/calc/deaf", code=NEVER_OPENS):
        async with await dial(daemon) as alice:
            calls = begin(alice, "/calc/deaf", number=2)
            mine = daemon.lines / str(realm.account("svc").uid)
            await _later(lambda: _sockets(mine))
            daemon.kill()
            assert await outcomes(calls) == {ECONNRESET: 2}
            assert len(_sockets(mine)) == 1, "nobody was left to remove it"
        planted = daemon.lines / "0" / "planted"
        planted.mkdir(parents=True)
        daemon.start()
        assert list(daemon.lines.rglob("*")) == []
        assert daemon.local.stat().st_mode & 0o777 == 0o666
        daemon.stop()
    assert len(set(realm.fds()) - before) == 0


def _sockets(directory: Path) -> list[Path]:
    return list(directory.glob("*"))


async def _later(condition: Callable[[], object], seconds: float = stage.WAIT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_announcements_come_back_after_every_restart(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon)
    with stage.service(daemon, "/calc/echo", code=SERVICE) as service:
        for way in (daemon.kill, daemon.stop, daemon.kill):
            way()
            assert (daemon.tree / "calc/echo").exists() or way == daemon.stop
            daemon.start()
            await asyncio.to_thread(daemon.wait_event, "announce", 8, outcome="granted")
            async with await dial(daemon) as alice:
                assert await alice.call("/calc/echo", b"back") == b"back"
        assert service.poll() is None


def test_a_service_that_is_started_before_the_daemon_says_so(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon)
    daemon.stop()
    done = realm.run_as("svc", realm.python(SERVICE, f"unix:{daemon.local}", "calc", "/calc/echo"), timeout=10)
    assert done.returncode == 1
    assert b"Unreachable" in done.stderr
    assert os.strerror(ENOENT).encode() in done.stderr or b"ENOENT" in done.stderr
    daemon.start()


async def test_a_monitor_that_is_killed_while_sessions_begin(make_daemon: MakeDaemon) -> None:
    daemon = make(make_daemon)
    for pause in (0.0, 0.02, 0.05, 0.1):
        dialling = [asyncio.create_task(dial(daemon, user)) for user in ("alice", "bob", "alice", "bob")]
        await asyncio.sleep(pause)
        daemon.kill()
        async with asyncio.timeout(stage.WAIT_SECONDS):
            for each in await asyncio.gather(*dialling, return_exceptions=True):
                assert isinstance(each, srpc_client.Connection | OSError), repr(each)
                if isinstance(each, srpc_client.Connection):
                    await each.close()
        daemon.start()


def test_a_second_daemon_in_the_same_directories_does_not_start(make_daemon: MakeDaemon) -> None:
    first = make(make_daemon)
    second = realm.Daemon(directory=first.directory)
    with pytest.raises(realm.DaemonFault, match="another daemon runs"):
        second.start()
    with stage.service(first, "/calc/echo", code=SERVICE), stage.dial(first, "alice") as alice:
        assert stage.errno_of(alice, "/calc/echo") == 0
