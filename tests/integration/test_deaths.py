"""Processes that die, hang or run away, with calls outstanding: each call ends once, and nobody else notices."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from errno import EACCES, EAGAIN, ECANCELED, ECONNRESET, ENXIO, ESTALE, ETIMEDOUT
from pathlib import Path

import pytest

import srpc_client
from srpc_client import CallTimeout, ConnectionLost
from tests import realm
from tests.integration import stage
from tests.integration.raw import CALL, ERROR, PING, Raw, call_body
from tests.realm import processes

pytestmark = pytest.mark.needs_root

CALLS = 50
"""Calls in flight when something dies."""

SERVICE = """
import asyncio, json, sys
from srpc_client import serve
held = told = 0

async def hold(request):
    global held, told
    held += 1
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        told += request.cancelled
        raise
    finally:
        held -= 1

async def slow(request):
    await asyncio.sleep(float(request.payload))
    return b"slept"

def state(request):
    return json.dumps([held, told]).encode()

def echo(request):
    return request.payload

def size(request):
    return str(len(request.payload)).encode()

what = {"hold": hold, "slow": slow, "state": state, "echo": echo, "size": size}
asyncio.run(serve({path: what[path.rpartition("/")[2]] for path in sys.argv[3:]},
                  address=sys.argv[1], group=sys.argv[2] or None, mode=0o666 if "/open/" in sys.argv[3] else 0o620))
"""

NAP = "#!/bin/sh\nexec sleep {seconds}\n"

RESIDENT = """#!/usr/bin/python3 -I
import struct, sys, os
H = struct.Struct("!iQQ")
stdin, stdout, held = sys.stdin.buffer, sys.stdout.buffer, 0
while head := stdin.read(20):
    kind, seq, length = H.unpack(head)
    body = stdin.read(length)
    if kind == 13:
        payload = body[12 + struct.unpack("!I", body[8:12])[0]:]
        if payload == b"hold":
            held += 1
            continue
        answer = f"{os.getpid()} {held}".encode()
        stdout.write(H.pack(14, seq, 4 + len(answer)) + bytes(4) + answer)
        stdout.flush()
"""

_seconds = iter(range(100_000, 200_000))
"""What a `sleep` of its own is found by in the list of processes."""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    limits = {"worker_idle": 30, "call_timeout": 300, "programs_per_worker": 80}
    with realm.Daemon({"limits": limits}) as running:
        stage.make_directory(running.tree / "open", "svc", "calc")
        stage.make_directory(running.tree / "tools")
        stage.program(running.tree / "tools/cat", "#!/bin/sh\nexec cat\n")
        stage.program(running.tree / "tools/kept", RESIDENT, 0o1755)
        with serving(running, "open", "hold", "slow", "state", "echo"):
            yield running


@contextmanager
def serving(daemon: realm.Daemon, directory: str, *names: str) -> Iterator[subprocess.Popen[bytes]]:
    """A service process for a directory of its own. In "open" everybody may call, elsewhere alice's group."""
    stage.make_directory(daemon.tree / directory, "svc", "calc")
    with stage.service(daemon, *(f"/{directory}/{name}" for name in names), code=SERVICE) as process:
        yield process


@contextmanager
def program(daemon: realm.Daemon, name: str, text: str, mode: int = 0o755) -> Iterator[str]:
    """A program for one test; its path."""
    file = stage.program(daemon.tree / "tools" / name, text, mode)
    try:
        yield f"/tools/{name}"
    finally:
        file.unlink()


def kill(pids: "Iterable[int]", number: int = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)


# --- asynchronous clients ------------------------------------------------------------------------------------------------


async def dial(daemon: realm.Daemon, user: str) -> srpc_client.Connection:
    return await srpc_client.dial(daemon.address, pins=daemon.pin, user=user, password=realm.password(user))


def begin(
    connection: srpc_client.Connection, path: str, payload: bytes = b"", count: int = CALLS
) -> "list[asyncio.Task[bytes]]":
    """Calls in flight."""
    return [asyncio.create_task(connection.call(path, payload)) for _ in range(count)]


async def outcomes(calls: "Iterable[Awaitable[bytes]]", seconds: float = stage.WAIT_SECONDS) -> "Counter[int]":
    """How the calls end, by errno (0: answered), within this time."""
    async with asyncio.timeout(seconds):
        results = await asyncio.gather(*calls, return_exceptions=True)
    for each in results:
        assert isinstance(each, bytes | OSError), repr(each)
    return Counter((each.errno or -1) if isinstance(each, OSError) else 0 for each in results)


async def reach(condition: Callable[[], object], seconds: float = stage.WAIT_SECONDS) -> None:
    """Wait until it holds, or what is to be awaited for it."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.02)


async def held(connection: srpc_client.Connection, directory: str = "open") -> int:
    """Calls that the service holds."""
    return int(json.loads(await connection.call(f"/{directory}/state", b""))[0])


async def told(connection: srpc_client.Connection, directory: str = "open") -> int:
    """Calls of which the service was told that they are cancelled."""
    return int(json.loads(await connection.call(f"/{directory}/state", b""))[1])


@asynccontextmanager
async def undisturbed(daemon: realm.Daemon, user: str = "bob", path: str = "/open/echo") -> AsyncIterator[None]:
    """Somebody else's calls go on, one after the other, all of them answered, and none slowly."""
    async with await dial(daemon, user) as connection:
        await connection.call(path, b"first")
        done, longest, over = 0, 0.0, asyncio.Event()

        async def go_on() -> None:
            nonlocal done, longest
            while not over.is_set():
                begun = time.monotonic()
                assert await connection.call(path, b"again", timeout=5) == b"again"
                done, longest = done + 1, max(longest, time.monotonic() - begun)
                await asyncio.sleep(0.002)

        task = asyncio.create_task(go_on())
        try:
            yield
            await asyncio.sleep(0.1)
        finally:
            over.set()
            await task
        assert done > 5
        assert longest < 1.0 * realm.PACE, f"a call of somebody who has nothing to do with it took {longest:.2f} s"


# --- handlers ------------------------------------------------------------------------------------------------------------


async def test_a_killed_service_ends_its_calls_and_a_new_one_is_called(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice, undisturbed(daemon):
        with serving(daemon, "calc1", "hold", "state") as service:
            calls = begin(alice, "/calc1/hold")
            others = begin(alice, "/open/slow", b"1")
            await reach(lambda: _is(held(alice, "calc1"), CALLS))
            service.kill()
            assert await outcomes(calls) == {ECONNRESET: CALLS}
            # Permitted, and nobody serves: at once after the death the line may still be on its way out.
            assert set(await outcomes(begin(alice, "/calc1/hold", count=3))) <= {ENXIO, ECONNRESET}
        with serving(daemon, "calc1", "hold", "state"):
            assert await held(alice, "calc1") == 0
        assert await outcomes(others) == {0: CALLS}


async def test_a_service_that_is_restarted_within_a_second_is_waited_for(daemon: realm.Daemon) -> None:
    if realm.PACE > 1:
        pytest.skip("a slow machine does not start a service within that second, which is the same everywhere")
    async with await dial(daemon, "alice") as alice:
        with serving(daemon, "calc2", "state") as service:
            assert await held(alice, "calc2") == 0
            before = len(daemon.events("withdraw", endpoint="/calc2/state"))
            service.kill()
            daemon.wait_event("withdraw", 5, before + 1, endpoint="/calc2/state")
        call = asyncio.create_task(alice.call("/calc2/state", b""))
        await asyncio.sleep(0.1)
        with serving(daemon, "calc2", "state"):
            assert await call == b"[0, 0]"


def _connected_lines(daemon: realm.Daemon) -> int:
    """How many lines services have connected. The accepted end keeps the name in the kernel's list."""
    listed = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sum(fields[5] == "03" and fields[7].startswith(f"{daemon.lines}/") for fields in listed if len(fields) > 7)


async def test_of_two_processes_that_serve_an_endpoint_one_may_die(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice:
        with serving(daemon, "calc3", "slow") as first, serving(daemon, "calc3", "slow"):
            before = _connected_lines(daemon)
            await alice.call("/calc3/slow", b"0")
            await reach(lambda: _connected_lines(daemon) == before + 2)
            calls = begin(alice, "/calc3/slow", b"0.7", CALLS)
            await asyncio.sleep(0.2)
            first.kill()
            ended = await outcomes(calls)
            assert set(ended) == {0, ECONNRESET}, ended
            assert ended[0] >= CALLS // 3
            assert await alice.call("/calc3/slow", b"0") == b"slept"


async def test_a_killed_program_ends_its_own_call(daemon: realm.Daemon) -> None:
    seconds = next(_seconds)
    with program(daemon, "nap", NAP.format(seconds=seconds)) as path:
        async with await dial(daemon, "alice") as alice, undisturbed(daemon, path="/tools/cat"):
            calls = begin(alice, path, count=20)
            await reach(lambda: len(stage.sleepers(seconds)) == 20)
            kill([stage.sleepers(seconds)[7].pid])
            done, others = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert await outcomes(done) == {ECONNRESET: 1}
            await asyncio.sleep(0.1)
            assert not any(call.done() for call in others)
            kill([each.pid for each in stage.sleepers(seconds)])
            assert await outcomes(others) == {ECONNRESET: 19}
            assert await alice.call("/tools/cat", b"next") == b"next"


async def test_a_killed_resident_program_ends_its_calls_and_is_started_again(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice, undisturbed(daemon):
        pid = int((await alice.call("/tools/kept", b"")).split()[0])
        calls = begin(alice, "/tools/kept", b"hold")
        await reach(lambda: _holds(alice, CALLS))
        kill([pid])
        assert await outcomes(calls) == {ECONNRESET: CALLS}
        assert int((await alice.call("/tools/kept", b"")).split()[0]) != pid


async def _holds(connection: srpc_client.Connection, count: int) -> bool:
    return int((await connection.call("/tools/kept", b"")).split()[1]) == count


async def _is(number: Awaitable[int], wanted: int) -> bool:
    return await number == wanted


def _kill_service(daemon: realm.Daemon, service: "subprocess.Popen[bytes]") -> None:
    service.kill()


def _kill_worker(daemon: realm.Daemon, service: "subprocess.Popen[bytes]") -> None:
    kill([each.pid for each in stage.workers(daemon, "alice")])


def _kill_resident(daemon: realm.Daemon, service: "subprocess.Popen[bytes]") -> None:
    residents = [each.pid for each in daemon.processes("other") if each.command[:2] == ("/usr/bin/python3", "-I")]
    assert residents
    kill(residents)


def _kill_program(daemon: realm.Daemon, service: "subprocess.Popen[bytes]") -> None:
    kill([each.pid for each in daemon.processes("other") if "777777" in each.command])


VICTIMS = {
    "service": ("calc4/hold", b"", _kill_service),
    "worker": ("calc4/hold", b"", _kill_worker),
    "resident program": ("tools/kept", b"hold", _kill_resident),
    "program": ("tools/nap4", b"", _kill_program),
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_on_the_wire_each_call_has_exactly_one_error(daemon: realm.Daemon, victim: str) -> None:
    path, payload, strike = VICTIMS[victim]
    with (
        serving(daemon, "calc4", "hold", "state") as service,
        program(daemon, "nap4", NAP.format(seconds=777777)),
        Raw.tls(daemon.tcp) as raw,
    ):
        raw.login("alice")
        assert raw.walk(path, 2).kind != ERROR
        assert raw.walk("calc4/state", 3).kind != ERROR
        asked = {raw.post(CALL, call_body(2, payload)) for _ in range(CALLS)}
        if victim in ("service", "worker"):
            assert stage.eventually(lambda: json.loads(raw.call(3).payload)[0] == CALLS)
        elif victim == "program":
            assert stage.eventually(lambda: len(stage.sleepers(777777)) == CALLS)
        else:
            assert stage.eventually(lambda: int(raw.call(2).payload.split()[1]) >= CALLS)
        strike(daemon, service)
        frames = [raw.next() for _ in asked]
        assert {each.seq for each in frames} == asked
        assert {(each.kind, each.errno) for each in frames} == {(ERROR, ECONNRESET)}
        time.sleep(0.3)
        ping = raw.post(PING)
        assert raw.next().seq == ping, "nothing else has come meanwhile"


# --- workers -------------------------------------------------------------------------------------------------------------


async def test_a_killed_worker_ends_its_calls_and_the_next_one_starts_another(daemon: realm.Daemon) -> None:
    seconds = next(_seconds)
    with program(daemon, "nap", NAP.format(seconds=seconds)) as path:
        async with await dial(daemon, "alice") as first, await dial(daemon, "alice") as second, undisturbed(daemon) as _:
            calls = [*begin(first, "/open/hold"), *begin(second, "/open/hold")]
            calls += [*begin(first, path, count=5), *begin(second, "/tools/kept", b"hold")]
            await reach(lambda: _is(held(second), 2 * CALLS))
            await reach(lambda: _holds(first, CALLS))
            await reach(lambda: len(stage.sleepers(seconds)) == 5)
            (worker,) = stage.workers(daemon, "alice")
            below = processes.descendants(worker.pid)
            assert len(below) == 6
            kill([worker.pid])
            assert await outcomes(calls) == {ECONNRESET: len(calls)}
            assert await outcomes([first.call("/open/echo", b"1"), second.call("/open/echo", b"2")]) == {0: 2}
            await reach(lambda: not any(map(processes.alive, below)))
            (another,) = stage.workers(daemon, "alice")
            assert another.pid != worker.pid
            await reach(lambda: _is(held(second), 0))  # the service knows that nobody waits


async def test_workers_may_be_killed_again_and_again(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice:
        for number in range(8):
            assert await alice.call("/open/echo", b"%d" % number) == b"%d" % number
            kill([each.pid for each in stage.workers(daemon, "alice")])
            # Straight away, while neither gate nor monitor may have seen it: an error or an answer, no hanging.
            assert set(await outcomes(begin(alice, "/open/echo", count=10))) <= {0, ECONNRESET}


async def test_a_worker_that_is_killed_while_a_session_begins(daemon: realm.Daemon) -> None:
    for pause in (0.0, 0.01, 0.02, 0.03, 0.05):
        await _alone(daemon)
        dialling = asyncio.create_task(dial(daemon, "alice"))
        async with asyncio.timeout(stage.WAIT_SECONDS):
            while not (found := stage.workers(daemon, "alice")):
                await asyncio.sleep(0.001)
            await asyncio.sleep(pause)
            kill([each.pid for each in found if processes.alive(each)])
            (result,) = await asyncio.gather(dialling, return_exceptions=True)
            if isinstance(result, srpc_client.Connection):
                assert set(await outcomes([result.call("/open/echo", b"")])) <= {0, ECONNRESET}
                await result.close()
            else:
                assert isinstance(result, OSError), repr(result)
                assert result.errno == ECONNRESET
        async with await dial(daemon, "alice") as alice:
            assert await alice.call("/open/echo", b"works") == b"works"


async def _alone(daemon: realm.Daemon) -> None:
    """Nobody has a worker."""
    kill([each.pid for each in daemon.processes("worker")])
    await reach(lambda: not daemon.processes("worker"))


# --- what programs leave -------------------------------------------------------------------------------------------------


FORKING = {
    "in its group": "sleep {0} & sleep {0}\n",
    "in a group of its own": "set -m; sleep {0} & sleep {0}\n",
    "that ignores signals": "trap '' TERM HUP INT; sleep {0} & sleep {0}\n",
}


@pytest.mark.parametrize("how", FORKING)
async def test_a_killed_worker_takes_along_what_its_programs_forked(daemon: realm.Daemon, how: str) -> None:
    seconds = next(_seconds)
    with program(daemon, "forks", "#!/bin/bash\n" + FORKING[how].format(seconds)) as path:
        async with await dial(daemon, "alice") as alice:
            call = begin(alice, path, count=1)
            await reach(lambda: len(stage.sleepers(seconds)) == 2)
            kill([each.pid for each in stage.workers(daemon, "alice")])
            assert await outcomes(call) == {ECONNRESET: 1}
            await reach(lambda: not stage.sleepers(seconds))


@pytest.mark.parametrize("how", FORKING)
async def test_a_program_that_is_cancelled_ends_whatever_it_ignores(daemon: realm.Daemon, how: str) -> None:
    seconds = next(_seconds)
    with program(daemon, "forks", "#!/bin/bash\n" + FORKING[how].format(seconds)) as path:
        async with await dial(daemon, "alice") as alice:
            with pytest.raises(CallTimeout):
                await alice.call(path, b"", timeout=0.4)
            left = 0 if how != "in a group of its own" else 2  # a group of its own is only found with its worker's session
            await reach(lambda: len(stage.sleepers(seconds)) == left)
            kill([each.pid for each in stage.workers(daemon, "alice")])
            await reach(lambda: not stage.sleepers(seconds))


async def test_what_a_program_leaves_in_the_background_ends_with_it(daemon: realm.Daemon) -> None:
    seconds = next(_seconds)
    with program(daemon, "leaves", f"#!/bin/sh\nsleep {seconds} &\necho done\n") as path:
        async with await dial(daemon, "alice") as alice:
            assert await alice.call(path, b"", timeout=5) == b"done\n"  # though its standard output is held open
            await reach(lambda: not stage.sleepers(seconds))


async def test_a_program_that_closes_its_output_and_goes_on_ends_its_call_when_it_ends(daemon: realm.Daemon) -> None:
    with program(daemon, "closes", "#!/bin/sh\necho said\nexec >&- 2>&-\nsleep 0.5\n") as path:
        async with await dial(daemon, "alice") as alice:
            begun = time.monotonic()
            assert await alice.call(path, b"", timeout=5) == b"said\n"
            assert time.monotonic() - begun >= 0.5


async def test_a_program_that_makes_itself_a_daemon_is_its_caller_s_own_affair(daemon: realm.Daemon) -> None:
    """The call ends with the program. What it put into another session is found by nobody, and has what the caller has."""
    seconds = next(_seconds)
    with program(daemon, "daemonizes", f"#!/bin/sh\nsetsid sleep {seconds} >&- 2>&- </dev/null &\necho started\n") as path:
        async with await dial(daemon, "alice") as alice:
            assert await alice.call(path, b"", timeout=5) == b"started\n"
            assert await outcomes([alice.call("/open/echo", b"1")]) == {0: 1}
        for each in stage.sleepers(seconds):  # whether it was fast enough to leave the group is a matter of luck
            assert each.uid == realm.account("alice").uid
            kill([each.pid])
        await reach(lambda: not stage.sleepers(seconds))


# --- gates ---------------------------------------------------------------------------------------------------------------


def _gate(daemon: realm.Daemon, kind: str) -> processes.Process:
    (found,) = [each for each in daemon.processes("gate", kind) if processes.alive(each)]
    return found


async def test_a_killed_gate_ends_its_connections_and_comes_back(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "bob") as bob:
        bob.login("bob")
        assert bob.walk("open/slow", 2).kind != ERROR
        async with await dial(daemon, "alice") as alice, await dial(daemon, "bob") as other:
            before = await told(alice)
            calls = [*begin(alice, "/open/hold"), *begin(other, "/open/hold"), *begin(other, "/open/slow", b"60")]
            await reach(lambda: _is(held(alice), 2 * CALLS))
            local = bob.post(CALL, call_body(2, b"1.5"))
            gate = _gate(daemon, "tls")
            restarts = len(daemon.events("gate-restart"))
            kill([gate.pid])
            assert await outcomes(calls) == {ECONNRESET: len(calls)}
            for call in calls:
                assert isinstance(call.exception(), ConnectionLost)
            with pytest.raises(ConnectionLost):
                await alice.call("/open/echo", b"")
        daemon.wait_event("gate-restart", 5, restarts + 1, gate="tls")
        assert bob.answer(local).payload == b"slept"
    async with asyncio.timeout(stage.WAIT_SECONDS):
        while True:
            try:
                alice = await dial(daemon, "alice")
                break
            except OSError:  # it listens all the time, but whom the gate had not yet taken is dropped
                await asyncio.sleep(0.05)
    async with alice:
        await reach(lambda: _is(held(alice), 0))
        assert await told(alice) >= before + 2 * CALLS
    assert _gate(daemon, "tls").pid != gate.pid


async def test_the_death_of_the_local_gate_leaves_calls_from_the_network_alone(daemon: realm.Daemon) -> None:
    announced = len(daemon.events("announce", outcome="granted"))
    async with await dial(daemon, "alice") as alice:
        calls = begin(alice, "/open/slow", b"1")
        await asyncio.sleep(0.1)
        with Raw.local(daemon.local, "bob") as bob:
            kill([_gate(daemon, "local").pid])
            assert bob.over(5)
        assert await outcomes(calls) == {0: CALLS}
        # The service has come back by itself, through the new gate; until then calls wait for a second.
        daemon.wait_event("announce", 5, announced + 4, outcome="granted")
        assert await alice.call("/open/echo", b"back") == b"back"


async def test_a_gate_may_die_while_somebody_authenticates(daemon: realm.Daemon) -> None:
    dialling = [asyncio.create_task(dial(daemon, "alice")) for _ in range(6)]
    await asyncio.sleep(0.03)
    kill([_gate(daemon, "tls").pid])
    async with asyncio.timeout(stage.WAIT_SECONDS):
        for each in await asyncio.gather(*dialling, return_exceptions=True):
            if isinstance(each, srpc_client.Connection):
                await each.close()
            else:
                assert isinstance(each, OSError), repr(each)
    await reach(lambda: not daemon.processes("authenticate"))
    await _until_it_serves(daemon)


async def _until_it_serves(daemon: realm.Daemon) -> None:
    async def serves() -> bool:
        try:
            async with await dial(daemon, "alice") as alice:
                return await alice.call("/open/echo", b"x") == b"x"
        except OSError:
            return False

    await reach(serves)


# --- hung, not dead ------------------------------------------------------------------------------------------------------


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_hung_service_holds_up_nobody_else(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice, undisturbed(daemon), undisturbed(daemon, "alice"):
        with serving(daemon, "calc5", "echo") as service:
            assert await alice.call("/calc5/echo", b"x") == b"x"
            with stopped(service.pid):
                calls = [asyncio.create_task(alice.call("/calc5/echo", b"x", timeout=0.7)) for _ in range(CALLS)]
                assert await outcomes(calls) == {ETIMEDOUT: CALLS}
            assert await alice.call("/calc5/echo", b"works", timeout=5) == b"works"


async def test_a_hung_service_with_its_pipe_full_holds_up_nobody_else(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice, undisturbed(daemon), undisturbed(daemon, "alice"):
        with serving(daemon, "calc6", "size") as service:
            assert await alice.call("/calc6/size", b"x") == b"1"
            with stopped(service.pid):
                payload = bytes(1 << 20)
                calls = [asyncio.create_task(alice.call("/calc6/size", payload, timeout=1.5)) for _ in range(40)]
                ended = await outcomes(calls)
                assert ended[ETIMEDOUT] >= 30, ended
                assert set(ended) <= {ETIMEDOUT, EAGAIN}
            assert await alice.call("/calc6/size", payload, timeout=5) == b"1048576"


async def test_a_hung_worker_is_its_user_s_trouble_alone(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice, undisturbed(daemon):
        await alice.call("/open/echo", b"x")
        (worker,) = stage.workers(daemon, "alice")
        with stopped(worker.pid):
            calls = [asyncio.create_task(alice.call("/open/echo", b"x", timeout=0.7)) for _ in range(CALLS)]
            assert await outcomes(calls) == {ETIMEDOUT: CALLS}
        assert await alice.call("/open/echo", b"works", timeout=5) == b"works"


async def test_a_hung_gate_holds_up_its_own_connections_alone(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "bob") as bob:
        bob.login("bob")
        assert bob.walk("open/echo", 2).kind != ERROR
        async with await dial(daemon, "alice") as alice:
            await alice.call("/open/echo", b"x")
            with stopped(_gate(daemon, "tls").pid):
                calls = [asyncio.create_task(alice.call("/open/echo", b"x", timeout=0.7)) for _ in range(CALLS)]
                assert bob.call(2, b"bob").payload == b"bob"
                assert await outcomes(calls) == {ETIMEDOUT: CALLS}
                assert bob.call(2, b"bob").payload == b"bob"
            assert await alice.call("/open/echo", b"works", timeout=5) == b"works"


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
    pipes = []
    for path in sys.argv[3:]:
        pipes.append(EndpointPipe((await connection.ping()).tree, path, 0o620, sys.argv[2]))
        fid = connection.new_fid()
        await connection.request(requests.announce(fid, path))
        connection.stream(requests.listen(fid), Deaf())
    await asyncio.sleep(600)

asyncio.run(main())
"""


IDLE = min(realm.PACE, 3.0)
"""Seconds that a worker of `impatient` stays without anybody attached: a second, but longer than a log-in takes."""


@pytest.fixture
def impatient(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon that gives calls a second, and workers IDLE without anybody attached."""
    with realm.Daemon({"limits": {"call_timeout": 1, "worker_idle": IDLE}}) as running:
        stage.make_directory(running.tree / "open", "svc", "calc")
        stage.make_directory(running.tree / "tools")
        with serving(running, "open", "hold", "slow", "state", "echo"):
            yield running


async def test_the_daemon_s_own_timeout_ends_calls_and_tells_handlers(impatient: realm.Daemon) -> None:
    seconds = next(_seconds)
    with program(impatient, "nap", NAP.format(seconds=seconds)) as nap, program(impatient, "kept", RESIDENT, 0o1755) as kept:
        async with await dial(impatient, "alice") as alice:
            calls = [*begin(alice, "/open/hold"), *begin(alice, nap, count=5), *begin(alice, kept, b"hold")]
            assert await outcomes(calls) == {ETIMEDOUT: 2 * CALLS + 5}
            await reach(lambda: _is(held(alice), 0))
            assert await told(alice) == CALLS
            await reach(lambda: not stage.sleepers(seconds))


async def test_a_service_that_never_opens_its_line_lets_calls_time_out(impatient: realm.Daemon) -> None:
    stage.make_directory(impatient.tree / "deaf", "svc", "calc")
    with stage.service(impatient, "/deaf/one", code=NEVER_OPENS) as service:
        async with await dial(impatient, "alice") as alice, undisturbed(impatient), undisturbed(impatient, "alice"):
            assert await outcomes(begin(alice, "/deaf/one")) == {ETIMEDOUT: CALLS}
            large = [asyncio.create_task(alice.call("/deaf/one", bytes(100_000))) for _ in range(3)]
            assert await outcomes(large) == {ETIMEDOUT: 3}
            calls = begin(alice, "/deaf/one")
            await asyncio.sleep(0.2)
            service.kill()
            assert set(await outcomes(calls)) <= {ENXIO, ETIMEDOUT}  # no service has got them
    await reach(lambda: not list((impatient.lines / str(realm.account("svc").uid)).glob("*")))


async def test_a_line_that_waits_for_its_service_ends_with_the_callers_permission(daemon: realm.Daemon) -> None:
    """Else a service that takes its time would give a worker a line that its user may not have any more."""
    stage.make_directory(daemon.tree / "late", "svc", "calc")
    mine = daemon.lines / str(realm.account("svc").uid)
    before = set(mine.glob("*"))
    with stage.service(daemon, "/late/one", code=NEVER_OPENS):
        async with await dial(daemon, "alice") as alice:
            (call,) = begin(alice, "/late/one", count=1)
            await reach(lambda: set(mine.glob("*")) - before)
            (daemon.tree / "late/one").chmod(0o600)
            await reach(lambda: not set(mine.glob("*")) - before)
            assert set(await outcomes([call])) <= {ENXIO, EACCES}
            assert await outcomes([alice.call("/open/echo", b"x")]) == {0: 1}  # the worker had no line, and lives


async def test_a_worker_ends_when_idle_and_not_before(impatient: realm.Daemon) -> None:
    async with await dial(impatient, "alice") as alice:
        await alice.call("/open/echo", b"x")
        (worker,) = stage.workers(impatient, "alice")
        async with await dial(impatient, "alice") as second:
            await second.call("/open/echo", b"x")
        await asyncio.sleep(2.5 * IDLE)  # attached, though it does nothing
        assert [each.pid for each in stage.workers(impatient, "alice")] == [worker.pid]
        assert await alice.call("/open/echo", b"still") == b"still"
    await asyncio.sleep(0.5 * IDLE)
    assert [each.pid for each in stage.workers(impatient, "alice")] == [worker.pid]  # it might be wanted again
    async with await dial(impatient, "alice") as alice:
        assert await alice.call("/open/echo", b"same") == b"same"
        await asyncio.sleep(1.2 * IDLE)
        assert [each.pid for each in stage.workers(impatient, "alice")] == [worker.pid]
    begun = time.monotonic()
    await reach(lambda: not stage.workers(impatient, "alice"))
    assert time.monotonic() - begun > 0.8 * IDLE
    ended = impatient.wait_event("process-end", role="worker", name="alice")
    assert ended["status"] == 0
    async with await dial(impatient, "alice") as alice:
        assert await alice.call("/open/echo", b"again") == b"again"


async def test_an_idle_worker_takes_along_what_its_programs_left(impatient: realm.Daemon) -> None:
    seconds = next(_seconds)
    with program(impatient, "leaves", f"#!/bin/bash\nset -m\nsleep {seconds} >&- 2>&- &\necho done\n") as path:
        async with await dial(impatient, "alice") as alice:
            assert await alice.call(path, b"", timeout=5) == b"done\n"
        try:
            await reach(lambda: not stage.workers(impatient, "alice"))
            await reach(lambda: not stage.sleepers(seconds))
        finally:
            kill([each.pid for each in stage.sleepers(seconds)])


# --- clients that give up ------------------------------------------------------------------------------------------------


async def test_a_timeout_reaches_the_handler(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice:
        before = await told(alice)
        with pytest.raises(CallTimeout):
            await alice.call("/open/hold", b"", timeout=0.3)
        await reach(lambda: _is(told(alice), before + 1))
        assert await held(alice) == 0


async def test_a_cancelled_task_reaches_the_handler(daemon: realm.Daemon) -> None:
    async with await dial(daemon, "alice") as alice:
        before = await told(alice)
        calls = begin(alice, "/open/hold")
        await reach(lambda: _is(held(alice), CALLS))
        for call in calls[::2]:
            call.cancel()
        await reach(lambda: _is(told(alice), before + CALLS // 2))
        assert await held(alice) == CALLS // 2
        for call in calls[1::2]:
            call.cancel()
        await reach(lambda: _is(held(alice), 0))


@pytest.mark.parametrize("how", ["goodbye", "reset", "half close"])
async def test_a_disconnect_reaches_the_handlers(daemon: realm.Daemon, how: str) -> None:
    seconds = next(_seconds)
    async with await dial(daemon, "alice") as alice:
        before = await told(alice)
        with program(daemon, "nap", NAP.format(seconds=seconds)) as path, Raw.tls(daemon.tcp) as raw:
            raw.login("alice")
            for fid, name in ((2, "open/hold"), (3, path[1:]), (4, "tools/kept")):
                assert raw.walk(name, fid).kind != ERROR
            for _ in range(CALLS):
                raw.post(CALL, call_body(2))
            raw.post(CALL, call_body(3))
            raw.post(CALL, call_body(4, b"hold"))
            await reach(lambda: _is(held(alice), CALLS))
            await reach(lambda: stage.sleepers(seconds))
            if how == "reset":
                raw.hang_up()
            elif how == "half close":
                raw.half_close()
            else:
                raw.close()
            await reach(lambda: _is(told(alice), before + CALLS))
            await reach(lambda: not stage.sleepers(seconds))
        assert await alice.call("/tools/kept", b"") != b""


def test_a_flush_has_the_call_s_error_first_and_then_its_own_reply(daemon: realm.Daemon) -> None:
    with Raw.tls(daemon.tcp) as raw:
        raw.login("alice")
        assert raw.walk("open/hold", 2).kind != ERROR
        calls = [raw.post(CALL, call_body(2)) for _ in range(10)]
        flushes = [raw.post(15, call.to_bytes(8, "big")) for call in calls]
        frames = [raw.next() for _ in range(20)]
        assert {each.seq for each in frames} == {*calls, *flushes}
        order = [each.seq for each in frames]
        for call, flush in zip(calls, flushes, strict=True):
            assert order.index(call) < order.index(flush)
        assert {each.errno for each in frames if each.kind == ERROR} == {ECANCELED}


async def test_somebody_who_may_not_call_is_told_so_by_a_new_worker_too(daemon: realm.Daemon) -> None:
    with serving(daemon, "calc7", "echo"):
        async with await dial(daemon, "bob") as bob:
            for _ in range(2):
                assert await outcomes([bob.call("/calc7/echo", b"")]) == {EACCES: 1}
                kill([each.pid for each in stage.workers(daemon, "bob")])
                assert set(await outcomes([bob.call("/open/echo", b"")])) <= {0, ECONNRESET, ESTALE}
