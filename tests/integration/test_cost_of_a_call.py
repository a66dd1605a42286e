"""What a call costs in system calls and context switches: counted, so that no clock and no busy neighbour is in it.

The numbers are those of the call path as it is, over TLS with everything on. Who makes a hop dearer finds it here, and who
makes one cheaper brings its number down. `python -m bench --only profile` shows which system calls they are.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests import realm
from tests.integration import stage
from tests.realm import processes
from tests.realm.counters import SystemCalls, switches, untraceable

pytestmark = pytest.mark.needs_root

PATH = "/cost/echo"

LONE = {"caller": 4, "gate": 7, "worker": 9, "service": 3}
"""System calls of one call when no other is on its way: `blocking.dial` to `blocking.serve`."""
WAITS = {"caller": 1, "gate": 2, "worker": 2, "service": 1}
"""How often each has to wait in such a call: once for each hop that it reads from."""
TOLERANCE = 0.2
"""Per call: what the processes do besides (timers, and the command to begin) is spread over all calls."""

IN_FLIGHT = {"caller": 0.063, "gate": 0.110, "worker": 0.141, "service": 0.047}
"""System calls of one call with 64 in flight: calls that arrive together share them, and all 64 do."""
WAITS_IN_FLIGHT = 0.095
"""Waits of one call with 64 in flight, of all processes together."""
SHARE = 1.25
"""What may be more of these: how many arrive together is the scheduler's choice."""

LONE_CALLS, MANY_CALLS, WINDOW = 1500, 12800, 64

CALLER = """
import sys
from srpc_client import blocking
address, pin, user, password, path = sys.argv[1:]
payload = b"x" * 64
with blocking.dial(address, pins=pin, user=user, password=password) as connection:
    assert connection.call(path, payload) == payload
    print("ready", flush=True)
    for line in sys.stdin:
        count, inflight = map(int, line.split())
        if inflight == 1:
            answers = [connection.call(path, payload) for _ in range(count)]
        else:
            answers = list(connection.session.call_many(path, [payload] * count, inflight))
        assert answers == [payload] * count
        print("done", flush=True)
"""

SERVICE = """
import sys
from srpc_client import blocking
blocking.serve({sys.argv[3]: lambda request: request.payload}, address=sys.argv[1], group=sys.argv[2])
"""


@dataclass(frozen=True)
class Path:
    """The processes of a call path, and the caller to be told."""

    caller: "subprocess.Popen[bytes]"
    pids: dict[str, int]

    def calls(self, count: int, inflight: int) -> None:
        """Let it make so many calls."""
        assert self.caller.stdin is not None
        assert self.caller.stdout is not None
        self.caller.stdin.write(f"{count} {inflight}\n".encode())
        self.caller.stdin.flush()
        assert self.caller.stdout.readline() == b"done\n"


@pytest.fixture(scope="module")
def path(daemon: realm.Daemon, private_realm: realm.Place) -> Iterator[Path]:
    """A caller, alice, and a service, each a process of its own, and the daemon between them."""
    stage.make_directory(daemon.tree / "cost", "svc", "calc")
    arguments = (daemon.address, daemon.pin, "alice", realm.password("alice"), PATH)
    with stage.service(daemon, PATH, code=SERVICE) as service:
        caller = realm.popen_as("alice", realm.python(CALLER, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert caller.stdout is not None
            assert caller.stdout.readline() == b"ready\n"
            gate, worker = daemon.processes("gate", "tls")[0], stage.workers(daemon, "alice")[0]
            yield Path(caller, {"caller": caller.pid, "gate": gate.pid, "worker": worker.pid, "service": service.pid})
        finally:
            processes.finish(caller)


def system_calls(path: Path, count: int, inflight: int) -> dict[str, float]:
    """Of each process, per call."""
    if reason := untraceable():
        pytest.skip(reason)
    with SystemCalls(path.pids) as traced:
        path.calls(count, inflight)
    return {name: sum(calls.values()) / count for name, calls in traced.counts.items()}


def waits(path: Path, count: int, inflight: int) -> dict[str, float]:
    """How often each process went to sleep, per call."""
    before = {name: switches(pid).voluntary for name, pid in path.pids.items()}
    path.calls(count, inflight)
    return {name: (switches(pid).voluntary - before[name]) / count for name, pid in path.pids.items()}


def test_a_lone_call_makes_so_many_system_calls_in_each_process(path: Path) -> None:
    found = system_calls(path, LONE_CALLS, 1)
    # At least a read and a write in each of them: else nothing was counted.
    assert all(2 <= found[name] <= most + TOLERANCE for name, most in LONE.items()), (found, LONE)


def test_a_lone_call_waits_once_at_each_hop(path: Path) -> None:
    found = waits(path, LONE_CALLS, 1)
    # Fewer than there are hops is possible: what comes while a process is kept from its core needs no waiting.
    assert all(found[name] <= most + TOLERANCE for name, most in WAITS.items()), (found, WAITS)
    assert sum(found.values()) > 1, found


def test_calls_in_flight_share_their_system_calls(path: Path) -> None:
    found = system_calls(path, MANY_CALLS, WINDOW)
    assert all(0 < found[name] <= most * SHARE for name, most in IN_FLIGHT.items()), (found, IN_FLIGHT)


def test_calls_in_flight_share_their_waits(path: Path) -> None:
    found = waits(path, MANY_CALLS, WINDOW)
    assert 0 < sum(found.values()) <= WAITS_IN_FLIGHT * SHARE, found
