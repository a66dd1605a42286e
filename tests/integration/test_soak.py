"""Rounds and rounds of coming and going, polite and rude: nothing is left of them, and nothing grows.

SRPC_SOAK divides the number of rounds, for whoever is in a hurry: SRPC_SOAK=10 makes 100 of 1,000.
"""

import asyncio
import dataclasses
import os
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from errno import ECONNRESET, ENOENT, ENXIO, ESTALE
from pathlib import Path

import pytest

import srpc_client
from tests import realm
from tests.integration import stage
from tests.integration.raw import AUTH, Raw
from tests.realm import processes

pytestmark = pytest.mark.needs_root

PART = int(os.environ.get("SRPC_SOAK", "1"))
ROUNDS, ANNOUNCEMENTS = 1000 // PART, 200 // PART
FIRST = ROUNDS // 5
"""Rounds after which memory has grown to what it is going to be."""
GROWTH = 3 * 1024
"""KiB by which a process may grow in all rounds that follow."""

CALLER = """
import asyncio, itertools, random, socket, struct, sys
import srpc_client
H = struct.Struct("!iQQ")
address, user, rounds, rude = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

async def polite(number):
    async with await srpc_client.dial(address) as connection:
        payload = b"%d" % number
        assert await connection.call("/open/echo", payload) == payload

def frame(kind, seq, text):
    return H.pack(kind, seq, len(text)) + text

AUTH = frame(1, 1, b'{"afid":9,"uname":"%s","aname":"/","mechanism":"peer"}' % user.encode())
ATTACH = frame(3, 2, b'{"afid":9,"fid":1,"uname":"%s","aname":"/"}' % user.encode())
WALK = frame(5, 3, b'{"fid":1,"newfid":2,"path":"open/slow"}')
CALL = frame(13, 4, struct.pack("!QI", 2, 0) + b"60")

async def impolite(number):
    # Hangs up after each possible step, with the next one begun.
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address.removeprefix("unix:"))
        for request in (AUTH, ATTACH, WALK, CALL)[: number % 5]:
            await loop.sock_sendall(sock, request)
            if request is not (AUTH, ATTACH, WALK, CALL)[number % 5 - 1]:
                head = await loop.sock_recv(sock, 65536)
                assert head[:4] != b"\\xff\\xff\\xff\\xff", head
        await asyncio.sleep(random.random() * 0.05 if number % 5 == 1 else random.random() * 0.012)

async def several(what, numbers):
    for number in numbers:
        await what(number)

async def main():
    async with await srpc_client.dial(address) as connection:  # so that each endpoint has its line in any case
        await connection.call("/open/slow", b"0")
    one, two = iter(range(rounds)), iter(range(rude))
    await asyncio.gather(*(several(polite, one) for _ in range(6)), *(several(impolite, two) for _ in range(2)))

asyncio.run(main())
"""

SERVICE = """
import asyncio, sys
from srpc_client import serve

async def slow(request):
    await asyncio.sleep(float(request.payload))

asyncio.run(serve({"/open/echo": lambda request: request.payload, "/open/slow": slow}, address=sys.argv[1], mode=0o666))
"""

PASSING = """
import asyncio, sys
from srpc_client import serve
asyncio.run(serve({sys.argv[3]: lambda request: request.payload}, address=sys.argv[1], mode=0o666))
"""

ANNOUNCER = """
import asyncio, random, socket, struct, sys
import srpc_client
H = struct.Struct("!iQQ")
address, rounds = sys.argv[1], int(sys.argv[2])

async def polite(number):
    async with await srpc_client.announce(f"/open/s{number % 4}", address=address, mode=0o666):
        await asyncio.sleep(random.random() * 0.02)

async def handled(number):
    announcer = srpc_client.Announcer(address)
    await announcer.announce("/open/busy", mode=0o666, handler=lambda request: request.payload)
    await asyncio.sleep(random.random() * 0.06)
    await announcer.close()

async def impolite(number):
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address.removeprefix("unix:"))
        for seq in range(number % 3 + 1):
            body = b'{"fid":%d,"path":"/open/echo"}' % seq
            await loop.sock_sendall(sock, H.pack(19, seq, len(body)) + body)
        await asyncio.sleep(random.random() * 0.006)

async def several(what, numbers):
    for number in numbers:
        await what(number)

async def main():
    await asyncio.gather(*(several(what, range(rounds)) for what in (polite, handled, impolite)))

asyncio.run(main())
"""


@pytest.fixture
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    config = {"limits": {"worker_idle": 600}, "log": {"level": "info"}}
    with realm.Daemon(config) as running, ExitStack() as stack:
        stage.make_directory(running.tree / "open", "svc", "calc")
        stack.enter_context(stage.service(running, "/open/echo", "/open/slow", code=SERVICE))
        yield running


@dataclasses.dataclass(frozen=True)
class State:
    """What must not grow. processes: pid and role of the daemon's own. fds: how many, of each. lines: what is on disk."""

    processes: dict[int, str]
    fds: dict[int, int]
    lines: list[Path]


def look(daemon: realm.Daemon) -> State:
    """As it is now."""
    found = {each.pid: f"{each.role} {each.detail} {each.state if each.state == 'Z' else ''}" for each in daemon.processes()}
    fds = {}
    for pid in found:
        try:
            fds[pid] = len(realm.fds(pid))
        except OSError:
            fds[pid] = -1
    return State(found, fds, sorted(each for each in daemon.lines.rglob("*") if each.parent != daemon.lines))


def memory(daemon: realm.Daemon) -> dict[int, int]:
    """Resident KiB that are not files, by pid."""
    return {each.pid: int(realm.status(each.pid)["RssAnon"].split()[0]) for each in daemon.processes()}


def settled(daemon: realm.Daemon) -> State:
    """As it is when nothing is under way any more."""
    state, since = look(daemon), time.monotonic()
    while time.monotonic() < since + 1.0:
        time.sleep(0.1)
        if (now := look(daemon)) != state:
            state, since = now, time.monotonic()
    return state


def check(daemon: realm.Daemon, before: State) -> None:
    """All is as it was before, soon."""
    processes.until(lambda: look(daemon) == before, stage.WAIT_SECONDS, 0.1)
    now = look(daemon)
    assert now.processes == before.processes
    kinds = {pid: Counter(each.rpartition(":")[0] or each for each in realm.fds(pid)) for pid in now.fds}
    assert now.fds == before.fds, kinds
    assert now.lines == before.lines


def rounds(daemon: realm.Daemon, count: int) -> None:
    """Of alice so many, an eighth as many again that end in the middle of something, and a few of bob over TLS."""
    process = realm.popen_as(
        "alice",
        realm.python(CALLER, f"unix:{daemon.local}", "alice", str(count), str(count // 8)),
        stderr=subprocess.PIPE,
    )
    try:
        asyncio.run(_by_tls(daemon, max(1, count // 25)))
        _stdout, stderr = process.communicate(timeout=10 * stage.WAIT_SECONDS)
        assert process.returncode == 0, stderr.decode()
    finally:
        realm.finish(process)


async def _by_tls(daemon: realm.Daemon, count: int) -> None:
    for number in range(count):
        async with await srpc_client.dial(
            daemon.address, pins=daemon.pin, user="bob", password=realm.password("bob")
        ) as connection:
            assert await connection.call("/open/echo", b"bob") == b"bob"
            assert await connection.call("/open/slow", b"0") == b""
            if number % 3 == 0:
                call = asyncio.create_task(connection.call("/open/slow", b"60"))
                await asyncio.sleep(0.005)
                connection.lose()
                with pytest.raises(srpc_client.ConnectionLost):
                    await call
        rude = Raw.tls(daemon.tcp)
        if number % 2:
            rude.post(AUTH, {"afid": 1, "uname": "bob", "aname": "/"})
        rude.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        rude.hang_up()


def test_connections_leave_nothing(daemon: realm.Daemon) -> None:
    rounds(daemon, 20)
    before = settled(daemon)
    assert sorted(each.split()[0] for each in before.processes.values()) == ["gate", "gate", "monitor", "worker", "worker"]
    rounds(daemon, FIRST)
    check(daemon, before)
    grown = memory(daemon)
    rounds(daemon, ROUNDS - FIRST)
    check(daemon, before)
    growth = {before.processes[pid]: now - grown[pid] for pid, now in memory(daemon).items()}
    assert max(growth.values()) < GROWTH, growth
    assert not daemon.events("process-kill")
    assert not daemon.events("child-output")
    assert len(daemon.events("attach", outcome="granted", user="alice")) >= ROUNDS


def test_announcements_leave_nothing(daemon: realm.Daemon) -> None:
    rounds(daemon, 20)
    announcements(daemon, 10)
    before = settled(daemon)
    tree = sorted(daemon.tree.rglob("*"))
    answered = announcements(daemon, ANNOUNCEMENTS // 4)
    check(daemon, before)
    grown = memory(daemon)
    answered += announcements(daemon, ANNOUNCEMENTS - ANNOUNCEMENTS // 4)
    check(daemon, before)
    assert answered, "no call met one of the endpoints that came and went"
    growth = {before.processes[pid]: now - grown[pid] for pid, now in memory(daemon).items()}
    assert max(growth.values()) < GROWTH, growth
    assert sorted(daemon.tree.rglob("*")) == tree
    assert not daemon.events("process-kill")
    assert not daemon.events("child-output")


def test_an_endpoint_that_is_removed_right_after_its_first_call_is_let_go_of(daemon: realm.Daemon) -> None:
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/open/echo", b"") == b""
        before = settled(daemon)
        with stage.service(daemon, "/open/passing", code=PASSING):
            assert alice.call("/open/passing", b"x") == b"x"
            (daemon.tree / "open/passing").unlink()
        check(daemon, before)


def announcements(daemon: realm.Daemon, count: int) -> int:
    """As svc, as often, in three ways at once, while alice calls what comes and goes. Returns the number of answers."""
    process = realm.popen_as("svc", realm.python(ANNOUNCER, f"unix:{daemon.local}", str(count)), stderr=subprocess.PIPE)
    try:
        answered = asyncio.run(_call_until_it_ends(daemon, process))
        _stdout, stderr = process.communicate(timeout=10 * stage.WAIT_SECONDS)
        assert process.returncode == 0, stderr.decode()
    finally:
        realm.finish(process)
    return answered


async def _call_until_it_ends(daemon: realm.Daemon, process: "subprocess.Popen[bytes]") -> int:
    answered = 0
    async with await srpc_client.dial(
        daemon.address, pins=daemon.pin, user="alice", password=realm.password("alice")
    ) as connection:
        while process.poll() is None:
            try:
                async with asyncio.timeout(10):
                    assert await connection.call("/open/busy", b"x") == b"x"
                answered += 1
            except OSError as fault:
                if fault.errno not in (ENXIO, ENOENT, ESTALE, ECONNRESET):
                    raise
            await asyncio.sleep(0.002)
    return answered
