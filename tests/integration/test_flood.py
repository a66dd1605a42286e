"""Floods of connections and of log lines, beside a bystander whose logins and calls must not notice.

In the realm all of 10.0.0.0/8 and 127.0.0.0/8 leads to this machine, so an attacker can have many addresses and networks.
"""

import contextlib
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from errno import EACCES, EAGAIN
from itertools import count

import pytest

from tests import realm
from tests.integration import stage
from tests.integration.raw import ANNOUNCE, AUTH, ERROR, PING, WALK, Ended, Raw, several

pytestmark = pytest.mark.needs_root

SILENT = 320
"""Connections that a flood holds: more than `limits.strangers`, whose default is 256."""
LOGINS = 20
"""Logins of the bystander during a flood."""

AGAIN = 2
"""Connections that a flood makes anew every 10 ms: up to 200 a second."""

CAT = "#!/bin/sh\nexec cat\n"


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with the usual limits."""
    made = realm.Daemon({"listen": {"tcp": ["0.0.0.0:0"]}})
    realm.install(made.tree / "tools/cat", CAT, 0o755)
    with made as running:
        yield running


class Flood(threading.Thread):
    """Opens `SILENT` connections that say nothing, and connects anew for those that the server closes, at a bounded rate.

    connected: how many it has made. sources: addresses to come from.
    """

    def __init__(self, daemon: realm.Daemon, sources: Iterator[str]) -> None:
        super().__init__(daemon=True)
        self.connected = 0
        self._daemon, self._sources = daemon, sources
        self._over = threading.Event()

    def _connect(self) -> socket.socket | None:
        sock = socket.socket()
        try:
            sock.settimeout(5)
            sock.bind((next(self._sources), 0))
            sock.connect(("127.0.0.1", self._daemon.tcp[1]))
            sock.setblocking(False)
        except OSError:
            sock.close()
            return None
        self.connected += 1
        return sock

    def run(self) -> None:
        held: list[socket.socket] = []
        while not self._over.is_set():
            alive = []
            for sock in held:
                try:
                    over = sock.recv(1) == b""
                except BlockingIOError:
                    over = False
                except OSError:
                    over = True
                if over:
                    sock.close()
                else:
                    alive.append(sock)
            held = alive
            room = SILENT - len(held)
            for _ in range(min(room, AGAIN) if self.connected > SILENT else room):
                if (new := self._connect()) is not None:
                    held.append(new)
            self._over.wait(0.01)
        for sock in held:
            sock.close()

    def end(self) -> None:
        """Close all its connections."""
        self._over.set()
        self.join(30)


@contextlib.contextmanager
def flood(daemon: realm.Daemon, sources: Iterator[str]) -> Iterator[Flood]:
    """A flood that has filled what it can fill."""
    thread = Flood(daemon, sources)
    thread.start()
    try:
        assert realm.until(lambda: thread.connected > SILENT, 30)
        yield thread
    finally:
        thread.end()


def log_in(client: Raw, user: str) -> None:
    """Log in, and make a call."""
    client.login(user)
    client.walk("tools/cat", 2)
    assert client.call(2, b"new").payload == b"new"


def tell(what: str, seconds: list[float], thread: Flood | None = None) -> None:
    """Print figures, for docs/limits.md (pytest shows them with -rP)."""
    made = "" if thread is None else f"; the flood made {thread.connected} connections"
    middle, slowest = statistics.median(seconds) * 1e3, max(seconds) * 1e3
    print(f"{what}: {len(seconds)} of {LOGINS} logins with a call, median {middle:.0f} ms, slowest {slowest:.0f} ms{made}")


def failed_logins(daemon: realm.Daemon, established: Raw, thread: Flood | None, what: str) -> list[str]:
    """What went wrong in `LOGINS` logins with a call each, and in as many calls on an established connection."""
    failed, seconds = [], []
    for number in range(LOGINS):
        source = f"10.250.{number}.7"
        began = time.monotonic()
        try:
            with Raw.tls(daemon.tcp, source) as client:
                log_in(client, "bob")
            seconds.append(time.monotonic() - began)
        except (Ended, OSError, AssertionError) as fault:
            failed.append(f"{source}: {fault!r}")
        assert established.call(2, b"%d" % number).payload == b"%d" % number
    if seconds:
        tell(what, seconds, thread)
    return failed


@pytest.fixture
def established(daemon: realm.Daemon) -> Iterator[Raw]:
    """A connection that was there before the flood: fid 2 is a program that copies."""
    with Raw.tls(daemon.tcp, "10.251.0.1") as client:
        client.login("alice")
        client.walk("tools/cat", 2)
        yield client


def loopback() -> Iterator[str]:
    """Addresses of 127.0.0.0/8, which any local user can bind."""
    return (f"127.{1 + each // 250 % 250}.{each % 250}.9" for each in count())


def networks() -> Iterator[str]:
    """Addresses each of which has a /24 of its own."""
    return (f"10.{1 + each // 250 % 200}.{each % 250}.9" for each in count())


def test_without_a_flood(daemon: realm.Daemon, established: Raw) -> None:
    assert failed_logins(daemon, established, None, "no flood") == []


def test_silent_connections_of_one_host_lock_nobody_out(daemon: realm.Daemon, established: Raw) -> None:
    with flood(daemon, loopback()) as thread:
        assert failed_logins(daemon, established, thread, "one host") == []


def test_silent_connections_from_many_networks_lock_nobody_out(daemon: realm.Daemon, established: Raw) -> None:
    with flood(daemon, networks()) as thread:
        assert failed_logins(daemon, established, thread, "a network for each connection") == []


MANY_UIDS = """
import os, socket, sys, time
held = []
for uid in range(100_000, 101_000):
    os.seteuid(uid)
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
    os.seteuid(0)
    if len(held) == 320:
        print("full", flush=True)
    if len(held) >= 320:
        time.sleep(0.01)
    held = held[-320:]
"""
"""Each of the uids that a user has for its user namespaces (subuid(5)) opens a connection that says nothing."""


def test_silent_connections_of_many_uids_lock_no_other_user_out(daemon: realm.Daemon) -> None:
    process = realm.popen_as("root", realm.python(MANY_UIDS, str(daemon.local)), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"full\n"
        seconds = []
        for _ in range(LOGINS):
            with Raw.local(daemon.local, "bob") as client:
                began = time.monotonic()
                log_in(client, "bob")
                seconds.append(time.monotonic() - began)
        tell("many uids on the local socket", seconds)
    finally:
        process.kill()
        realm.finish(process)


@pytest.fixture(scope="module")
def small(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with few connections, and the log bounded as it usually is."""
    limits = {"connections": 8, "connections_per_address": 4}
    log = {"lines_per_minute": 10, "level": "info"}
    made = realm.Daemon(
        {"listen": {"tcp": ["0.0.0.0:0"]}, "limits": limits, "log": log, "authentication": {"refusal": 0.001}}
    )
    realm.install(made.tree / "tools/cat", CAT, 0o755)
    stage.make_directory(made.tree / "closed", mode=0o700)
    with made as running:
        yield running


@pytest.mark.parametrize(("sources", "limit"), [(["10.1.1.1"] * 4, "connections_per_address"), (range(8), "connections")])
def test_a_user_who_takes_all_connections_makes_room_for_others(
    small: realm.Daemon, sources: Sequence[str | int], limit: str
) -> None:
    names = [each if isinstance(each, str) else f"10.1.{each}.9" for each in sources]
    with several([Raw.tls(small.tcp, each) for each in names]) as held:
        for each in held:
            each.login("alice")
        with Raw.tls(small.tcp, names[-1]) as bob, Raw.tls(small.tcp, names[-1]) as another:
            bob.login("bob")
            (reason,) = held[-1].rest()  # the newest
            assert (reason.kind, reason.errno) == (ERROR, EAGAIN)
            assert "make room" in reason.json["message"]
            bob.walk("tools/cat", 2)
            assert bob.call(2, b"x").payload == b"x"
            reply = another.authenticate(1, "alice")
            assert (reply.kind, reply.errno) == (ERROR, EAGAIN), "alice has more than bob already"
            assert "as many connections as there may be" in reply.json["message"]
        for each in held[:-1]:
            assert each.answer(each.post(PING)).kind == PING + 1
    small.wait_event("limit", which=limit, outcome="closed")


def test_a_service_is_refused_where_its_account_has_as_much_as_it_may_have(small: realm.Daemon) -> None:
    svc = realm.account("svc")
    endpoint = stage.make_directory(small.tree / "svc", "svc") / "echo"
    os.mkfifo(endpoint, 0o600)
    os.chown(endpoint, svc.uid, svc.gid)
    with several([Raw.local(small.local, "svc") for _ in range(5)]) as services:
        for each in services[:4]:
            assert each.ask(ANNOUNCE, fid=1, path="svc/echo").kind == ANNOUNCE + 1
        refused = services[4].ask(ANNOUNCE, fid=1, path="svc/echo")
        assert refused.errno == EAGAIN
        assert "as many connections as there may be" in refused.json["message"]
        assert services[0].answer(services[0].post(PING)).kind == PING + 1


# --- the log -----------------------------------------------------------------------------------------------------------


def test_of_one_kind_and_user_the_log_has_so_many_lines_in_a_minute(small: realm.Daemon) -> None:
    before = small.log.stat().st_size
    for number in range(30):
        with Raw.local(small.local, "carol") as client:
            client.login("carol")
            for _ in range(2):
                assert client.ask(WALK, fid=1, newfid=2, path="closed/x").errno == EACCES
            client.ask(AUTH, afid=5, uname=f"nobody{number}", mechanism="peer")
    for event, facts in (
        ("authentication", {"user": "carol"}),
        ("authentication", {"peer": f"uid:{realm.account('carol').uid}", "outcome": "refused"}),
        ("attach", {"user": "carol"}),
        ("refused", {"user": "carol"}),
    ):
        assert len(small.events(event, **facts)) == 10, event
    size = small.log.stat().st_size - before
    print(f"30 logins, 60 refused walks, 30 refused logins: {size} bytes of log with lines_per_minute = 10")
    assert size < 20_000


def test_what_was_left_out_is_said_at_the_end(private_realm: realm.Place) -> None:
    with realm.Daemon({"log": {"lines_per_minute": 5, "level": "info"}}) as daemon:
        for _ in range(12):
            with Raw.local(daemon.local, "bob") as client:
                client.login("bob")
    assert len(daemon.events("authentication")) == 5
    assert daemon.events("suppressed", origin="user:bob", which="authentication", lines=7)
    assert daemon.events("suppressed", origin="user:bob", which="attach", lines=7)
    assert len(daemon.events("process-start", role="gate")) == len(daemon.events("process-end", role="gate")) == 2
    assert len(daemon.events("stop")) == 1
