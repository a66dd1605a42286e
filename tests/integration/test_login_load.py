"""What a bystander's login takes while others keep the daemon busy with authentications that they do not mean to finish.

`pytest -s` on this file prints the figures of docs/limits.md.
"""

import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from srpcd import ipc
from srpcd.monitor import launch
from srpcd.wire.limits import CONVERSATIONS_MAX, PAM_WORKING_MAX
from tests import realm
from tests.integration import login_flood
from tests.integration.raw import APPEND, AUTH, Raw
from tests.realm.place import CHECKOUT

pytestmark = pytest.mark.needs_root

CONNECTIONS, ADDRESSES = 1000, 100
ATTACK = f"{CONNECTIONS} connections from {ADDRESSES} addresses"
LOGINS = 20

LIMITS = {
    "connections": 4096,
    "connections_per_address": 1024,
    "strangers": 4096,
    "strangers_per_address": 1024,
}


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One that has room for all these connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    try:
        with realm.Daemon({"limits": LIMITS, "log": {"level": "info"}}) as running:
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Figures(NamedTuple):
    """Seconds of each login and of each bare conversation."""

    logins: list[float]
    bare: list[float]

    def __str__(self) -> str:
        """Of all but the first, which comes while the attack begins."""
        kinds = ", ".join(
            f"{name} {1e3 * statistics.median(found[1:]):.0f} ms (most {1e3 * max(found[1:]):.0f} ms)"
            for name, found in (("login", self.logins), ("PAM alone", self.bare))
        )
        return f"{kinds}, first login {1e3 * self.logins[0]:.0f} ms"


def bare_conversation(user: str) -> float:
    """Seconds that an authentication child takes by itself, from its start to its outcome."""
    place = realm.enter()
    program = launch.launch_table(str(place.code), [str(each) for each in place.sites])["authenticate"]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    began = time.monotonic()
    spawned = launch.spawn((*program.command, *program.libraries), launch.Drop(None, {}))
    try:
        with here, spawned.socket as monitor, spawned.errors:
            monitor.setblocking(True)
            setup = ipc.AuthSetup("", os.getpid(), "pam", "srpcd", user, "")
            ipc.send_descriptors(monitor, setup, (there.fileno(),))
            there.close()
            assert isinstance(ipc.read_packet(monitor.fileno()), ipc.Waiting)
            assert isinstance(ipc.read_packet(here.fileno()), ipc.Prompts)
            ipc.write_packet(here.fileno(), ipc.Answer(realm.password(user).encode()))
            assert isinstance(ipc.read_packet(monitor.fileno()), ipc.Answered)
            ipc.send_descriptors(monitor, ipc.Proceed())
            outcome = ipc.read_packet(monitor.fileno())
            assert isinstance(outcome, ipc.Outcome)
            assert outcome.errno == 0, outcome
            return time.monotonic() - began
    finally:
        os.close(spawned.pidfd)
        os.waitpid(spawned.pid, 0)


def login(daemon: realm.Daemon, address: str) -> float:
    """Seconds of a login by password, on a connection that is there."""
    with Raw.tls(daemon.tcp, address) as client:
        client.sock.settimeout(300)
        began = time.monotonic()
        begun = client.ask(AUTH, afid=1, uname="alice")
        assert begun.kind == AUTH + 1, begun
        accepted = client.ask(APPEND, fid=1, data=realm.password("alice"))
        assert accepted.kind == APPEND + 1, accepted
        assert accepted.data == "1"
        return time.monotonic() - began


def measure(daemon: realm.Daemon) -> Figures:
    """Logins of a bystander, and bare conversations, in turns: the machine is as busy for both."""
    figures = Figures([], [])
    for number in range(LOGINS):
        figures.bare.append(bare_conversation("alice"))
        figures.logins.append(login(daemon, f"10.201.{number}.1"))
    return figures


@contextmanager
def flood(daemon: realm.Daemon, mode: str) -> Iterator[None]:
    """The attack, from when all of its connections are there until the end of the context."""
    command = [sys.executable, login_flood.__file__, str(daemon.tcp[1]), mode, str(CONNECTIONS), str(ADDRESSES)]
    process = realm.popen_as(None, command, env={"PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.poll() is None
    finally:
        process.kill()
        realm.finish(process)


def test_an_idle_daemon(daemon: realm.Daemon) -> None:
    figures = measure(daemon)
    print(f"\nidle: {figures}")


@pytest.mark.parametrize("mode", [login_flood.SILENT, login_flood.LATE])
def test_clients_that_do_not_answer_cost_a_bystander_next_to_nothing(daemon: realm.Daemon, mode: str) -> None:
    with flood(daemon, mode):
        figures = measure(daemon)
        children = len(daemon.processes("authenticate"))
    print(
        f"\n{CONNECTIONS} connections from {ADDRESSES} addresses, {login_flood.MODES[mode]}: {figures}; {children} children"
    )
    assert children <= CONVERSATIONS_MAX + PAM_WORKING_MAX
    assert statistics.median(figures.logins) <= 3 * statistics.median(figures.bare)


def test_a_login_succeeds_among_wrong_passwords(daemon: realm.Daemon) -> None:
    with flood(daemon, login_flood.WRONG):
        before = len(daemon.events("authentication", outcome="refused"))
        began = time.monotonic()
        figures = measure(daemon)
        refused = (len(daemon.events("authentication", outcome="refused")) - before) / (time.monotonic() - began)
    print(
        f"\n{CONNECTIONS} connections from {ADDRESSES} addresses, wrong passwords: {figures}; {refused:.0f} refused a second"
    )


def test_nothing_went_wrong_meanwhile(daemon: realm.Daemon) -> None:
    assert daemon.events("gate-restart") == []
    assert daemon.events("process-kill") == []
    assert [each for each in daemon.events("warning") if "failed" in each["text"]] == []
