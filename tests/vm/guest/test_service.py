"""The service as systemd runs it: a restart refuses nobody and loses nothing, and what hangs or dies comes back."""

import asyncio
import contextlib
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from errno import ECONNREFUSED, ECONNRESET, EKEYEXPIRED, ENOENT, ENXIO, ESHUTDOWN
from pathlib import Path

import pytest

import srpc_client
from tests.vm.guest.test_contexts import TREE, Journal, main_pid, running, until

LOCAL, TCP = "/run/srpc/srpc.sock", ("127.0.0.1", 7443)
CONFIG, KEY = Path("/etc/srpc/srpcd.toml"), Path("/var/lib/srpc/key.pem")
DROP_IN = Path("/run/systemd/system/srpcd.service.d/test.conf")

SERVICE = """
import asyncio, sys
from collections import Counter
from srpc_client import serve
seen = Counter()

def echo(request):
    seen[request.payload] += 1
    return request.payload

async def slow(request):
    await asyncio.sleep(float(request.payload))
    return b"slept"

def most(request):
    return str(max(seen.values(), default=0)).encode()

asyncio.run(serve({"/service/echo": echo, "/service/slow": slow, "/service/most": most}, address="unix:" + sys.argv[1]))
"""

PAUSE, KNOCK = 0.05, 0.25
"""Seconds between two batches of calls of one client, and between two connections over each socket: so that the one
processor of the machine has time for log-ins and a restart too."""

DRAIN = 4.0
"""Seconds that calls in flight get at a restart: enough for those that are to be finished, and all of it is waited for."""

NO_ANSWER = {ESHUTDOWN, ECONNRESET, ENXIO, EKEYEXPIRED}
"""How a call may fail while the daemon is restarted: it drains, the connection is over, the service is not back yet, or the
session has gone with the worker."""


def systemctl(*words: str) -> str:
    """What it prints. Raises where it fails."""
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=True).stdout.strip()


def shown(name: str) -> str:
    """A property of the service."""
    return systemctl("show", "-P", name, "srpcd")


def pin() -> str:
    """Of the key that is in use."""
    assert until(lambda: "sha256:" in shown("StatusText"))  # which is not there while it starts
    return str(re.findall(r"sha256:[^\s;]+", shown("StatusText"))[0])


@pytest.fixture(scope="module", autouse=True)
def stage() -> Iterator[None]:
    """An endpoint that everybody may call, with a service behind it that outlives each daemon."""
    directory = TREE / "service"
    directory.mkdir(mode=0o755)
    owner = pwd.getpwnam("svc")
    for name in ("echo", "slow", "most"):
        os.mkfifo(directory / name)
        os.chown(directory / name, owner.pw_uid, owner.pw_gid)
        (directory / name).chmod(0o622)
    before = CONFIG.read_bytes()
    CONFIG.write_text(f"[limits]\ndrain = {DRAIN}\n")
    systemctl("restart", "srpcd")
    command = [sys.executable, "-c", SERVICE, LOCAL]
    journal = Journal()
    process = subprocess.Popen(command, user="svc", group=owner.pw_gid, extra_groups=[], cwd="/")
    assert journal.says("announce outcome=granted .*endpoint=/service/most", 60)
    yield
    process.kill()
    process.wait()
    CONFIG.write_bytes(before)
    subprocess.run(["rm", "-r", str(directory)], check=True)


@pytest.fixture
def journal() -> Journal:
    """From now on."""
    return Journal()


@pytest.fixture
def drop_in() -> Iterator[Callable[[str], None]]:
    """`drop_in(text)` adds to the unit until the end of the test, and starts the daemon anew."""

    def write(text: str) -> None:
        DROP_IN.parent.mkdir(exist_ok=True)
        DROP_IN.write_text(f"[Service]\n{text}\n")
        systemctl("daemon-reload")
        systemctl("restart", "srpcd")

    yield write
    DROP_IN.unlink()
    systemctl("daemon-reload")
    systemctl("restart", "srpcd")


async def dial(user: str, tls: bool, key: str = "") -> srpc_client.Connection:
    """By a password, over either transport. key: its pin, where the daemon may not be able to tell just now."""
    address, pins = (f"127.0.0.1:{TCP[1]}", key or pin()) if tls else (f"unix:{LOCAL}", None)
    secret = f"{user}'s own passphrase"
    return await srpc_client.dial(address, pins=pins, user=user, password=secret, mechanism="pam", timeout=60)


class Load:
    """Clients that call without a pause, and others that connect without a pause.

    answered, failed: calls; by errno. lost: dials that failed, by errno. knocks: connections made. faults: what connecting
    was answered with otherwise.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.failed: Counter[int] = Counter()
        self.lost: Counter[int] = Counter()
        self.knocks = 0
        self.faults: list[OSError] = []
        self._over = False
        self._pin = pin()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Load":
        callers = [self._call(user, tls) for user, tls in (("alice", True), ("bob", True), ("alice", False), ("bob", False))]
        self._tasks = [asyncio.create_task(each) for each in (*callers, self._knock())]
        await self.more(100, 60)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), 90)

    async def more(self, calls: int, seconds: float) -> None:
        """Wait until that many more were answered."""
        wanted = self.answered + calls
        async with asyncio.timeout(seconds):
            while self.answered < wanted:
                await asyncio.sleep(0.05)

    async def _call(self, user: str, tls: bool) -> None:
        number = 0
        while not self._over:
            try:
                async with await dial(user, tls, self._pin) as connection:
                    lost = False
                    while not self._over and not lost:
                        await asyncio.sleep(PAUSE)
                        payloads = [f"{user} {tls} {number + at}".encode() for at in range(8)]
                        number += len(payloads)
                        calls = [connection.call("/service/echo", each, timeout=60) for each in payloads]
                        for sent, result in zip(payloads, await asyncio.gather(*calls, return_exceptions=True), strict=True):
                            lost |= self._ended(sent, result)
            except OSError as fault:
                self.lost[fault.errno or -1] += 1
                await asyncio.sleep(0.1)

    def _ended(self, sent: bytes, result: object) -> bool:
        """Count the end of a call; whether it is one after which another connection is needed."""
        if not isinstance(result, OSError):
            assert result == sent, "each call has its own answer"
            self.answered += 1
            return False
        self.failed[result.errno or -1] += 1
        return result.errno in (ESHUTDOWN, ECONNRESET, EKEYEXPIRED)

    async def _knock(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._over:
            for family, address in ((socket.AF_INET, TCP), (socket.AF_UNIX, LOCAL)):
                with socket.socket(family) as sock:
                    sock.setblocking(False)
                    try:
                        await asyncio.wait_for(loop.sock_connect(sock, address), 60)
                        self.knocks += 1
                    except OSError as fault:
                        self.faults.append(fault)
            await asyncio.sleep(KNOCK)


async def systemctl_soon(*words: str) -> None:
    """The same, while others go on."""
    process = await asyncio.create_subprocess_exec("systemctl", *words)
    assert await process.wait() == 0


def check(load: Load) -> None:
    """Nobody was refused, and every call ended once."""
    assert load.faults == []
    assert load.knocks > 20
    assert set(load.failed) <= NO_ANSWER, load.failed
    assert not {ECONNREFUSED, ENOENT} & set(load.lost), load.lost
    print(f"{load.answered} answered, {dict(load.failed)} failed, {dict(load.lost)} dials lost, {load.knocks} connections")


async def test_a_restart_under_load_refuses_nobody_and_ends_every_call_once() -> None:
    before = main_pid()
    async with Load() as load, await dial("alice", True) as slow:
        calls = [
            asyncio.create_task(slow.call("/service/slow", seconds, timeout=60)) for seconds in [b"0.5"] * 5 + [b"60"] * 5
        ]
        await asyncio.sleep(0.2)
        await systemctl_soon("restart", "srpcd")
        assert main_pid() != before
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[:5] == [b"slept"] * 5, "what can be finished is finished"
        assert [getattr(each, "errno", 0) for each in results[5:]] == [ESHUTDOWN] * 5
        await load.more(100, 90)
        check(load)
    async with await dial("alice", False) as alice:
        assert await alice.call("/service/most", b"", timeout=60) == b"1", "no call was made twice"


async def test_a_killed_daemon_is_back_by_itself_and_nobody_is_refused() -> None:
    before, restarts = main_pid(), int(shown("NRestarts"))
    old = running("srpcd/gate/__main__.py") + running("srpcd/worker/__main__.py")
    async with Load() as load:
        os.kill(before, signal.SIGKILL)
        await asyncio.sleep(0.5)
        async with asyncio.timeout(60):
            while shown("ActiveState") != "active" or main_pid() == before:
                await asyncio.sleep(0.1)
        await load.more(100, 90)
        check(load)
    assert int(shown("NRestarts")) == restarts + 1
    assert not any(Path(f"/proc/{each}").exists() for each in old), "nothing of it is left"


async def test_a_gate_that_hangs_is_replaced(journal: Journal) -> None:
    (hung,) = running("srpcd/gate/__main__.py", "tls")
    before = main_pid()
    async with await dial("alice", True) as alice, await dial("bob", False) as bob:
        os.kill(hung, signal.SIGSTOP)
        call = asyncio.create_task(alice.call("/service/echo", b"lost", timeout=60))
        while not call.done():
            assert await bob.call("/service/echo", b"kept", timeout=60) == b"kept"
        with pytest.raises(OSError, match="ECONNRESET"):
            await call
    assert journal.says(r'process-kill .*name=tls .*reason="does not answer"')
    assert until(lambda: running("srpcd/gate/__main__.py", "tls") not in ([], [hung]))
    assert journal.says("ready ", 60)
    async with await dial("alice", True) as alice:
        assert await alice.call("/service/echo", b"again", timeout=60) == b"again"
    assert main_pid() == before


async def test_a_daemon_that_hangs_is_ended_by_the_watchdog(drop_in: Callable[[str], None], journal: Journal) -> None:
    assert shown("WatchdogUSec") == "30s"
    drop_in("WatchdogSec=5s")
    before = main_pid()
    os.kill(before, signal.SIGSTOP)
    assert until(lambda: shown("ActiveState") == "active" and main_pid() not in (0, before), 60)
    assert journal.says("Watchdog timeout", 0)
    async with await dial("alice", True) as alice:
        assert until(lambda: journal.says("announce outcome=granted .*/service/echo", 0))
        assert await alice.call("/service/echo", b"back", timeout=60) == b"back"


def test_a_configuration_that_is_wrong_is_refused_and_the_old_one_stays(journal: Journal) -> None:
    good, before = CONFIG.read_bytes(), main_pid()
    CONFIG.write_text("[limits]\nworkers = 0\n")
    try:
        assert subprocess.run(["systemctl", "reload", "srpcd"], capture_output=True).returncode != 0
        assert shown("ActiveState") == "active"
        os.kill(before, signal.SIGHUP)  # past the check of the unit's ExecReload
        assert journal.says("reload level=error outcome=refused reason=.*limits.workers")
        assert "the configuration is still the old one" in shown("StatusText")
    finally:
        CONFIG.write_bytes(good)
    systemctl("reload", "srpcd")
    assert journal.says("reload outcome=done")
    assert until(lambda: "old one" not in shown("StatusText") and shown("SubState") == "running")
    assert main_pid() == before


async def test_another_key_takes_effect_at_a_reload_and_disturbs_nobody(journal: Journal) -> None:
    old, before = pin(), main_pid()
    async with await dial("alice", True) as alice:
        for file in (KEY, KEY.with_name("cert.pem")):
            file.unlink()
        systemctl("reload", "srpcd")
        assert journal.says("reload outcome=done", 60)
        assert until(lambda: pin() != old)
        assert await alice.call("/service/echo", b"still", timeout=60) == b"still"
        async with await dial("bob", True) as bob:
            assert await bob.call("/service/echo", b"new", timeout=60) == b"new"
        assert len(running("srpcd/gate/__main__.py", "tls")) == 2
    assert until(lambda: len(running("srpcd/gate/__main__.py", "tls")) == 1)
    assert KEY.stat().st_mode & 0o777 == 0o600
    assert main_pid() == before


def test_systemd_keeps_the_sockets_that_the_daemon_bound_itself(drop_in: Callable[[str], None]) -> None:
    systemctl("stop", "srpcd.socket", "srpcd")
    systemctl("mask", "--runtime", "srpcd.socket")
    try:
        drop_in("RestrictAddressFamilies=AF_INET AF_INET6\nIPAddressDeny=")
        assert shown("NFileDescriptorStore") == "3"
        before = main_pid()
        systemctl("restart", "--no-block", "srpcd")
        end = time.monotonic() + 60
        while shown("SubState") != "running" or main_pid() == before:
            for address in (TCP, ("::1", TCP[1])):
                with contextlib.closing(socket.create_connection(address, 30)):
                    pass
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(LOCAL)
            time.sleep(PAUSE)
            assert time.monotonic() < end
        assert shown("NFileDescriptorStore") == "3"
    finally:
        systemctl("stop", "srpcd")
        systemctl("unmask", "--runtime", "srpcd.socket")
        systemctl("start", "srpcd.socket")


def test_the_journal_knows_how_serious_each_line_is(journal: Journal) -> None:
    systemctl("restart", "srpcd")
    command = ["journalctl", "-q", "-o", "json", "-u", "srpcd", "--since", journal._since]
    lines = [json.loads(each) for each in subprocess.run(command, capture_output=True, check=True).stdout.splitlines()]
    own = {each["MESSAGE"].split()[0]: each["PRIORITY"] for each in lines if each.get("_COMM") == "srpcd"}
    assert own["start"] == own["ready"] == "6"
    assert not any(each.startswith("<") for each in own)
