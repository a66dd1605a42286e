"""The other end of a line that would have its peer hang: a page that nobody can read, descriptors that are slow to release.

The attacker is an ordinary user with a FUSE file system of its own (tests/hostile/fusehang.c). The daemon and the honest
services are the product as it is.
"""

import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srpc_client import blocking
from tests import realm
from tests.hostile.puppet import HERE, Puppet, hostile_daemon, run_over_tcp
from tests.integration import stage
from tests.realm import mounts, processes

pytestmark = pytest.mark.needs_root

HOSTILE = """
import asyncio, subprocess, sys
from srpc_client import announce
address, _, path = sys.argv[1:4]

async def main():
    async with await announce(path, address=address, mode=0o622) as announcement:
        async for line in announcement.listen():
            first = await anext(line)
            attack(line._send, first.payload.decode())

def attack(fd, how):
    %s

asyncio.run(main())
"""

LINGER = """
import array, os, socket, struct
def lingering(seconds):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    tcp = socket.socket()
    tcp.connect(listener.getsockname())
    kept = listener.accept()[0], listener
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    tcp.setblocking(False)
    try:
        while True:
            tcp.send(bytes(65536))
    except BlockingIOError:
        pass
    tcp.setblocking(True)
    return tcp, kept

def send_along(fd, tcp):
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tcp.fileno()]))])
        except PermissionError:  # refused, from Linux 6.16 on
            return
    tcp.close()  # what was sent is the last one

kept = []
def attack_by_lingering(fd):
    kept.append(lingering(60))
    send_along(fd, kept[0][0])
"""


class Workshop:
    """Where the attacker has what it needs. device: fuse. program: fusehang. report: what it says."""

    def __init__(self, directory: Path) -> None:
        self.device = directory / "fuse"
        self.program = directory / "fusehang"
        self.report = directory / "report"
        self.report.touch()
        self.report.chmod(0o666)

    def command(self, how: str) -> list[str]:
        """To be run by the attacker, with the victim's line as standard output."""
        return [str(self.program), str(self.device), str(self.report), how]

    def said(self, word: str) -> bool:
        """Whether the attack has come so far. Skips where an attacker could not come so far here."""
        text = self.report.read_text()
        if "failed: no " in text:
            pytest.skip(f"the attack can't be made here: {text.strip()}")
        assert "failed" not in text
        return word in text


@pytest.fixture(scope="module")
def workshop(private_realm: realm.Place) -> Workshop:
    """On a file system that has devices, with what can't be had here skipped."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = private_realm.root / "workshop"
    directory.mkdir()
    mounts.mount("tmpfs", directory, "tmpfs", 0, "mode=755")
    made = Workshop(directory)
    done = subprocess.run([compiler, "-O1", "-o", made.program, HERE / "fusehang.c"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a C compiler with the kernel's headers: {done.stderr.splitlines()[0]}")
    made.program.chmod(0o755)
    try:
        os.mknod(made.device, 0o20666, os.makedev(10, 229))
        made.device.chmod(0o666)
        os.close(os.open(made.device, os.O_RDWR))
    except OSError as fault:
        pytest.skip(f"needs /dev/fuse: {fault.strerror}")
    return made


@pytest.fixture
def report(workshop: Workshop) -> Iterator[Workshop]:
    """The same, with nothing said yet; what runs of the attack is ended afterwards."""
    workshop.report.write_text("")
    yield workshop
    looked = [processes.look(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()]
    for each in (each for each in looked if each and str(workshop.program) in each.command):
        os.kill(each.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with realm.Daemon() as running:
        stage.make_directory(running.tree / "calc", "svc", "calc")
        stage.make_directory(running.tree / "bad", "svc2")
        with stage.service(running, "/calc/echo"):
            yield running


def in_background(call: Callable[[], object]) -> threading.Thread:
    """A call whose end nobody waits for."""

    def run() -> None:
        try:
            call()
        except OSError:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def answers(connection: blocking.Connection, count: int = 50) -> bool:
    """Whether calls of another endpoint are answered."""
    return all(b"x" in connection.call("/calc/echo", b"x", timeout=10) for _ in range(count))


@pytest.mark.parametrize("how", ["page", "descriptor"])
def test_a_service_can_not_hang_the_workers_of_its_callers(daemon: realm.Daemon, report: Workshop, how: str) -> None:
    attack = f"subprocess.Popen({report.command('')[:-1]!r} + [how], stdout=fd)"
    with (
        stage.service(daemon, "/bad/hang", user="svc2", group="", code=HOSTILE % attack),
        stage.dial(daemon, "alice") as alice,
        stage.dial(daemon, "alice") as other,
    ):
        assert answers(other)
        (worker,) = stage.workers(daemon, "alice")
        thread = in_background(lambda: alice.call("/bad/hang", how.encode(), timeout=30))
        assert stage.eventually(lambda: report.said("held"), 20)
        if how == "descriptor":
            assert stage.eventually(lambda: report.said("done"))
        assert answers(other)
        assert stage.workers(daemon, "alice") == [worker]
        assert answers(other)
    thread.join(30)


def test_a_service_can_not_delay_the_workers_of_its_callers_by_a_lingering_socket(daemon: realm.Daemon) -> None:
    code = LINGER + HOSTILE % "attack_by_lingering(fd)"
    with (
        stage.service(daemon, "/bad/hang", user="svc2", group="", code=code),
        stage.dial(daemon, "alice") as alice,
        stage.dial(daemon, "alice") as other,
    ):
        thread = in_background(lambda: alice.call("/bad/hang", b"x", timeout=5))
        for _ in range(10):
            assert answers(other)
        thread.join(30)
        assert answers(other)


@pytest.fixture(scope="module")
def taken_over(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon whose workers run what they are called with, and a service that both users may call."""
    with hostile_daemon("worker") as running:
        for how in WORKERS_WAYS:
            stage.make_directory(running.tree / how, "svc", "calc")
        with stage.service(running, *(f"/{how}/echo" for how in WORKERS_WAYS)):
            for how in WORKERS_WAYS:
                realm.grant(running.tree / how / "echo", "w", uid=realm.account("bob").uid)
            yield running


WORKERS_WAYS = ("page", "descriptor", "linger")
LINE = """
found = os.stat(os.path.join(setup.tree, path))
tell(ipc.LinesWanted(path, found.st_dev, found.st_ino))
fd = wait(ipc.Line)[1][0]
"""
ASK = """
from srpcd.wire import frames
os.write(fd, frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 0) + b'hi'))
select.select([fd], [], [], 10)
result = os.read(fd, 4096)[24:]
"""


@pytest.mark.parametrize("how", WORKERS_WAYS)
def test_a_worker_can_not_hang_the_services_that_it_calls(taken_over: realm.Daemon, report: Workshop, how: str) -> None:
    with stage.dial(taken_over, "alice") as alice, stage.dial(taken_over, "bob") as bob:
        if how == "linger":
            code = f"{LINGER}\nglobals()['kept'] = kept\nattack_by_lingering(fd)\nresult = 1"
        else:
            # One group: else what it starts is closed off, and makes no user namespace.
            code = "import subprocess\nos.setresgid(*[os.getgid()] * 3)\n"
            code += f"subprocess.Popen({report.command(how)!r}, stdout=fd)\nresult = 1"
        line = f"path = '{how}/echo'{LINE}"
        assert alice.call("/x", (line + code).encode(), timeout=20) == b"1"
        if how != "linger":
            assert stage.eventually(lambda: report.said("held" if how == "page" else "done"), 20)
        answered = bob.call("/y", (line + ASK).encode(), timeout=20)
        assert answered.startswith(b"b'bob:"), answered


CHANNELS = {"monitor": "MONITOR.fileno()", "standard error": "2", "gate": "next(iter(gates))"}
ATTEMPTS = int(os.environ.get("SRPC_TEST_ATTEMPTS", "1"))
"""How often each attack on monitor and gate is made."""


@pytest.mark.parametrize("how", WORKERS_WAYS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_a_worker_can_hang_neither_the_monitor_nor_a_gate(
    taken_over: realm.Daemon, report: Workshop, channel: str, how: str
) -> None:
    monitor, gates = taken_over.pid, taken_over.processes("gate")
    for _ in range(ATTEMPTS):
        report.report.write_text("")
        with stage.dial(taken_over, "alice") as alice:
            if how == "linger":
                code = f"{LINGER}\nglobals()['kept'] = kept\nattack_by_lingering({CHANNELS[channel]})"
            else:
                code = f"import subprocess\nos.setresgid(*[os.getgid()] * 3)\nfd = {CHANNELS[channel]}\n"
                code += f"subprocess.Popen({report.command(how)!r}, stdout=fd)"
            thread = in_background(functools.partial(alice.call, "/x", code.encode(), timeout=5))
            if how != "linger":
                assert stage.eventually(lambda: report.said("held" if how == "page" else "done"), 20)
            for _ in range(3):
                with stage.dial(taken_over, "bob") as bob:
                    assert bob.call("/y", b"result = 'here'", timeout=20) == b"'here'"
            thread.join(30)
    assert taken_over.pid == monitor
    assert {each.pid for each in taken_over.processes("gate")} == {each.pid for each in gates}


def test_a_gate_that_hangs_in_the_kernel_is_replaced(private_realm: realm.Place, report: Workshop) -> None:
    """Not even SIGKILL ends it. Its connections are lost; the listening sockets are the monitor's."""
    hang = f"""
import subprocess
os.setresgid(*[os.getgid()] * 3)
reading, writing = os.pipe()
subprocess.Popen({report.command("page")!r}, stdout=writing)
while "done" not in open({str(report.report)!r}).read():
    time.sleep(0.05)
os.read(reading, 1)
"""
    with hostile_daemon("gate") as daemon:
        before = {each.pid for each in daemon.processes("gate")}
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.local))
            sock.sendall(hang.encode())
            assert stage.eventually(lambda: report.said("done"), 20)
            stuck = daemon.wait_event("process-stuck", 40, role="gate", name="local")["pid"]
            assert stuck in before
        assert run_over_tcp(daemon, "result = 1") == "1"
        with Puppet(daemon, "alice") as alice:
            assert alice.run("result = 'another one'") == "'another one'"
        hung = processes.look(stuck)
        assert hung is not None
        assert hung.state == "D"
        for each in [each for each in map(processes.look, map(int, filter(str.isdigit, os.listdir("/proc")))) if each]:
            if str(report.program) in each.command:
                os.kill(each.pid, signal.SIGKILL)
