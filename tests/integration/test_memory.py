"""One user pins as much of a gate's memory as it can, with a hundred connections. Others log in and call meanwhile.

The figures of docs/limits.md come from here: `pytest -s tests/integration/test_memory.py`.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import realm
from tests.integration.raw import CALL, WALK, Raw, call_body, frame, memory, several

pytestmark = pytest.mark.needs_root

MIB = 1 << 20
CONNECTIONS = 100
BODY = struct.pack("!QI", 2, 0) + bytes(16 * MIB)

BUDGET = 256 * MIB
"""`limits.memory`, by default."""

MARGIN = 128 * MIB
"""Bytes that a gate may have beside its budget: a hundred connections, and what malloc gives back within a second."""

_addresses = realm.addresses()

SERVICE = """
import asyncio, sys
from srpc_client import serve
asyncio.run(serve({
    "/svc/echo": lambda request: request.payload,
    "/svc/big": lambda request: bytes(int(request.payload)),
}, address=sys.argv[1], mode=0o622))
"""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with the usual limits but for the times, so that nothing is ended before it was looked at."""
    made = realm.Daemon({"limits": {"stall": 120.0}})
    directory: Path = made.tree / "svc"
    directory.mkdir(mode=0o755)
    os.chown(directory, realm.account("svc").uid, realm.account("svc").gid)
    with made as running:
        process = realm.popen_as("svc", realm.python(SERVICE, f"unix:{running.local}"))
        try:
            running.wait_event("announce", 10, count=2, outcome="granted")
            yield running
        finally:
            realm.finish(process)


Connect = Callable[[str], Raw]


@pytest.fixture(params=["tls", "local"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(daemon: realm.Daemon, transport: str) -> Connect:
    """Log in as somebody, and walk to /svc/echo (fid 2) and /svc/big (fid 3)."""

    def made(user: str) -> Raw:
        if transport == "tls":
            client = Raw.tls(daemon.tcp, next(_addresses), receive_buffer=65536)
        else:
            client = Raw.local(daemon.local, user)
        client.login(user)
        assert client.walk("svc/echo", 2).kind == WALK + 1
        assert client.walk("svc/big", 3).kind == WALK + 1
        return client

    return made


class Bystander:
    """Another user, who logs in again and again, and makes small and large calls."""

    def __init__(self, connect: Connect, gate: int) -> None:
        self.calls = self.logins = 0
        self.slowest = 0.0
        self.most = 0
        self._connect = connect
        self._gate = gate
        self._fault: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                with self._connect("bob") as client:
                    self.logins += 1
                    for _ in range(10):
                        begun = time.monotonic()
                        assert client.call(2, b"small").payload == b"small"
                        self.slowest = max(self.slowest, time.monotonic() - begun)
                        self.calls += 1
                        self.most = max(self.most, memory(self._gate))
                    assert client.call(2, bytes(MIB)).payload == bytes(MIB)
        except Exception as fault:
            self._fault = fault

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        if self._fault is not None:
            raise self._fault


def pour(clients: list[Raw], data: bytes, quiet: float = 1.0) -> int:
    """Send `data` on each connection as far as the server takes it. Returns how many bytes all have sent."""
    waiting: dict[Raw, tuple[int, memoryview]] = {client: (0, memoryview(b"")) for client in clients}
    for client in clients:
        client.sock.setblocking(False)
    last, total = time.monotonic(), 0
    while waiting and time.monotonic() - last < quiet:
        for client, (at, ready) in list(waiting.items()):
            if not ready:
                if at == len(data):
                    del waiting[client]
                    continue
                ready = memoryview(client.sealed(data[at : at + MIB]))
                at = min(at + MIB, len(data))
            try:
                sent = client.sock.send(ready)
            except BlockingIOError:
                sent = 0
            except OSError:
                del waiting[client]
                continue
            waiting[client] = at, ready[sent:]
            total += sent
            if sent:
                last = time.monotonic()
        time.sleep(0.001)
    return total


def attack(connect: Connect, daemon: realm.Daemon, transport: str, act: Callable[[list[Raw]], object]) -> None:
    """Let alice do something with all connections, and look at the gate and at bob meanwhile and afterwards."""
    (gate,) = daemon.processes("gate", transport)
    with connect("bob") as warm:
        assert warm.call(2, bytes(MIB)).payload == bytes(MIB)
    before = memory(gate.pid)
    with several([connect("alice") for _ in range(CONNECTIONS)]) as clients, Bystander(connect, gate.pid) as bystander:
        act(clients)
        end = time.monotonic() + 30 * realm.PACE
        seen = bystander.logins
        while bystander.logins < seen + 5 and bystander._fault is None:
            assert time.monotonic() < end, "the bystander gets no further"
            time.sleep(0.01)
        most = max(bystander.most, memory(gate.pid))
        for client in clients:
            client.hang_up()
    print(
        f"\n{transport}: {before // MIB} MiB before, {most // MIB} at most; bystander: {bystander.logins} log-ins, "
        f"{bystander.calls} calls, the slowest {bystander.slowest * 1000:.0f} ms",
        end="",
    )
    assert most - before < BUDGET + MARGIN
    assert realm.until(lambda: memory(gate.pid) - before < 24 * MIB, 20), (
        f"{(memory(gate.pid) - before) // MIB} MiB are kept"
    )
    print(f"; {memory(gate.pid) // MIB} MiB afterwards", end="")
    assert daemon.events("gate-restart") == []


def test_calls_that_are_never_finished(daemon: realm.Daemon, connect: Connect, transport: str) -> None:
    """Each of them all but one byte."""

    def act(clients: list[Raw]) -> None:
        sent = pour(clients, frame(CALL, 1000, BODY)[:-1])
        assert sent > BUDGET // 3  # what the budget lets in was sent indeed

    attack(connect, daemon, transport, act)


def test_replies_that_are_never_read(daemon: realm.Daemon, connect: Connect, transport: str) -> None:
    def act(clients: list[Raw]) -> None:
        for client in clients:
            client.send(b"".join(frame(CALL, seq, call_body(3, b"%d" % (4 * MIB))) for seq in range(1000, 1008)))
        time.sleep(2)

    attack(connect, daemon, transport, act)
