"""A worker that was taken over gets nothing that its user could not have.

The worker is a real process under the real monitor, behind a real gate; it runs what these tests call it with
(tests/hostile/worker.py). The service and the lines are real.
"""

import os
import threading
import time
from collections.abc import Iterator
from errno import EACCES, ECONNRESET, ENOENT, EPERM, ESTALE
from pathlib import Path
from typing import Any

import pytest

from srpc_client import blocking
from srpcd import passing
from tests import realm
from tests.hostile.puppet import hostile_daemon
from tests.integration import stage
from tests.realm import processes

pytestmark = pytest.mark.needs_root

ATTEMPT = """
def attempt(work):
    try:
        return work()
    except OSError as fault:
        return -fault.errno

def want(path, dev=None, ino=None):
    found = os.stat(os.path.join(setup.tree, path)) if dev is None else None
    tell(ipc.LinesWanted(path, found.st_dev if found else dev, found.st_ino if found else ino))
    answer = wait(ipc.Lines)
    return answer[0].errno if answer else None

def line(path):
    # The number of a new line, and its socket.
    assert want(path) == 0
    inode = os.stat(os.path.join(setup.tree, path)).st_ino
    while (found := wait(ipc.LineExpected)) and found[0].ino != inode:
        pass
    number = found[0].line
    while (found := wait(ipc.Line)) and found[0].line != number:
        pass
    return number, found[1][0]
"""
WATCHED = """
import asyncio, sys
from srpc_client import announce

async def main():
    async with await announce("/calc/watched", address=sys.argv[1], group="calc") as announcement:
        async for line in announcement.listen():
            asyncio.get_running_loop().create_task(serve(line))

async def serve(line):
    async for request in line:
        request.reply(f"{line.caller.user} {request.payload.decode()}".encode())

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with hostile_daemon("worker") as running:
        stage.make_directory(running.tree / "calc", "svc", "calc")
        with stage.service(running, "/calc/echo", "/calc/slow"):
            yield running


@pytest.fixture
def alice(daemon: realm.Daemon) -> Iterator[blocking.Connection]:
    with stage.dial(daemon, "alice") as connection:
        yield connection


@pytest.fixture
def bob(daemon: realm.Daemon) -> Iterator[blocking.Connection]:
    with stage.dial(daemon, "bob") as connection:
        yield connection


def run(connection: blocking.Connection, code: str) -> object:
    """What `result` is after the worker has run the code."""
    text = connection.call("/x", (ATTEMPT + code).encode(), timeout=15).decode()
    if text.startswith("Traceback"):
        pytest.fail(text)
    return eval(text)


def test_it_gets_a_line_where_its_user_may_call(alice: blocking.Connection) -> None:
    assert run(alice, "result = want('calc/echo')") == 0


def test_it_gets_no_line_where_its_user_may_not_call(bob: blocking.Connection) -> None:
    assert run(bob, "result = want('calc/echo')") == EACCES


def test_it_gets_no_line_to_an_inode_that_it_made_up(alice: blocking.Connection) -> None:
    assert run(alice, "result = want('calc/echo', 1, 2)") == ESTALE


def test_it_gets_no_line_to_what_is_no_pipe(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    file = daemon.tree / "plain"
    file.write_text("x")
    file.chmod(0o666)
    link = daemon.tree / "link"
    link.symlink_to("calc/echo")
    try:
        assert run(alice, "result = want('plain')") == ENOENT
        assert run(alice, "result = want('link')") != 0
        assert run(alice, "result = want('calc')") == ENOENT
    finally:
        file.unlink()
        link.unlink()


def test_it_can_not_enter_the_directories_of_lines(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    uid = realm.account("svc").uid
    code = f"""
lines = {str(daemon.lines)!r}
def connect(name):
    sock = Socket(1, 1)
    try:
        sock.connect(name)
    finally:
        sock.close()
result = [attempt(lambda: os.listdir(lines)), attempt(lambda: os.listdir(lines + '/{uid}'))]
result += sorted({{attempt(lambda: connect(f'{{lines}}/{uid}/{{n}}')) for n in range(30)}})
"""
    assert run(alice, code) == [-EACCES, -EACCES, -EACCES]


def test_a_service_is_never_told_that_the_caller_is_somebody_else(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    """The first frame is the monitor's; a second one, which only the worker can have written, ends the line."""
    code = """
from srpcd.wire import frames
number, sock = line('calc/watched')
call = lambda seq, text: frames.frame(frames.CALL, seq, frames.CALL_HEAD.pack(0, 0) + text)
os.write(sock, call(1, b'honest'))
select.select([sock], [], [], 5)
first = os.read(sock, 4096)
forged = frames.caller_frame(0, 0, (0,), 'root', '', '/calc/watched')
attempt(lambda: os.write(sock, forged + call(2, b'forged')))
select.select([sock], [], [], 5)
result = first[24:], attempt(lambda: os.read(sock, 4096))
"""
    before = len(daemon.events("announce", outcome="granted"))
    process = realm.popen_as("svc", realm.python(WATCHED, f"unix:{daemon.local}"))
    try:
        daemon.wait_event("announce", 10, before + 1, outcome="granted")
        found = run(alice, code)
        assert isinstance(found, tuple)
        assert found[0] == b"alice honest"
        assert found[1] in (b"", -ECONNRESET)
    finally:
        process.kill()
        realm.finish(process)


def test_it_can_not_end_the_line_of_another_worker(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    realm.grant(daemon.tree / "calc/echo", "w", uid=realm.account("bob").uid)
    echo = """
from srpcd.wire import frames
sock = line('calc/echo')[1] if 'mine' not in setup.__dict__ else setup.__dict__['mine']
setup.__dict__['mine'] = sock
os.write(sock, frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 0) + b'hi'))
select.select([sock], [], [], 5)
result = os.read(sock, 4096)[24:]
"""
    try:
        with stage.dial(daemon, "bob") as bob:
            assert bytes(run(bob, echo)).startswith(b"bob:")  # type: ignore[call-overload]
            run(alice, "for n in range(1, 100): (tell(ipc.LineGone(n)), time.sleep(.002))")
            assert bytes(run(bob, echo)).startswith(b"bob:")  # type: ignore[call-overload]
    finally:
        realm.strip(daemon.tree / "calc/echo")


def keep_line(connection: blocking.Connection) -> processes.Process:
    """A worker that was taken over, with a line."""
    assert run(connection, "setup.__dict__['kept'] = line('calc/echo'); result = 1") == 1
    found = processes.look(int(str(run(connection, "result = os.getpid()"))))
    assert found is not None
    assert processes.alive(found)
    return found


def test_a_line_that_it_keeps_after_the_right_was_taken_away_is_of_no_use_for_long(
    alice: blocking.Connection, daemon: realm.Daemon
) -> None:
    pipe = daemon.tree / "calc/echo"
    mode = pipe.stat().st_mode & 0o777
    taken = keep_line(alice)
    try:
        pipe.chmod(0o600)
        assert stage.eventually(lambda: not processes.alive(taken), 5)
    finally:
        pipe.chmod(mode)


def test_nor_is_one_that_it_says_is_gone(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    """The monitor forgets such a line, but the socket may be open at both ends as before."""
    pipe = daemon.tree / "calc/echo"
    mode = pipe.stat().st_mode & 0o777
    taken = keep_line(alice)
    assert run(alice, "tell(ipc.LineGone(setup.__dict__['kept'][0])); result = 1") == 1
    time.sleep(0.2)
    try:
        pipe.chmod(0o600)
        assert stage.eventually(lambda: not processes.alive(taken), 5)
    finally:
        pipe.chmod(mode)


FEW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
BLOCKING_ECHO = """
import sys
from srpc_client import blocking

def echo(request):
    return f"{request.caller.user}:{request.caller.uid}:".encode() + request.payload

blocking.serve({path: echo for path in sys.argv[3:]}, address=sys.argv[1], group=sys.argv[2])
"""
HOARD = """
from srpcd.wire import frames
kept = setup.__dict__.setdefault('hoard', [])
for n in range(60):
    number, sock = line('calc/few')
    kept.append(sock)
    os.write(sock, frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 0)))
    select.select([sock], [], [], 1)
    tell(ipc.LineGone(number))
result = len(kept) >= 60
"""


@pytest.mark.parametrize("code", [stage.ECHO_SERVICE.replace('"slow": slow', '"few": echo'), BLOCKING_ECHO])
def test_it_can_not_use_up_the_descriptors_of_a_service_with_lines_that_it_says_are_gone(
    alice: blocking.Connection, daemon: realm.Daemon, code: str
) -> None:
    with stage.service(daemon, "/calc/few", code=FEW + code), stage.dial(daemon, "svc2") as other:
        realm.grant(daemon.tree / "calc/few", "w", uid=realm.account("svc2").uid)
        assert run(alice, HOARD) is True
        echo = """
from srpcd.wire import frames
sock = line('calc/few')[1]
os.write(sock, frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 0) + b'hi'))
select.select([sock], [], [], 5)
result = attempt(lambda: os.read(sock, 4096)[24:])
"""
        assert str(run(other, echo)).startswith("b'svc2:")


STOP = """
for n in range(12):
    attempt(lambda: os.mkfifo(f'{setup.tree}/bobs/{n}'))
    assert want(f'bobs/{n}') == 0
over, stopped = time.monotonic() + 9, set()
while time.monotonic() < over:
    with open('/proc/loadavg') as file:
        last = int(file.read().split()[-1])
    for pid in range(last, last + 3):
        if pid != os.getpid() and attempt(lambda: os.kill(pid, 19)) is None:
            stopped.add(pid)
result = len(stopped)
"""


def test_it_can_not_delay_that_for_others_by_stopping_its_own_users_probes(
    alice: blocking.Connection, bob: blocking.Connection, daemon: realm.Daemon
) -> None:
    stage.make_directory(daemon.tree / "bobs", "bob")
    pipe = daemon.tree / "calc/echo"
    mode = pipe.stat().st_mode & 0o777
    stopped: list[Any] = []
    thread = threading.Thread(target=lambda: stopped.append(run(bob, STOP)))
    thread.start()
    try:
        time.sleep(2.0)
        taken = keep_line(alice)
        pipe.chmod(0o600)
        assert stage.eventually(lambda: not processes.alive(taken), 4)
    finally:
        pipe.chmod(mode)
        thread.join()
    assert stopped[0]  # else it has not tried


@pytest.mark.parametrize(
    "message",
    [
        "ipc.Ready(0)",
        "ipc.Proved()",
        "ipc.Attach(1, 1, 1, 'bob', '')",
        "ipc.Authenticate(1, 1, 'peer', 'bob', '')",
        "ipc.Announce(1, 1, 'calc/echo')",
        "ipc.Outcome(0, '', 0, 0)",
        "ipc.LinesWanted('../etc/passwd', 1, 1)",
        "ipc.LinesWanted('calc/../calc/echo', 1, 1)",
        "ipc.LinesWanted('/calc/echo', 1, 1)",
    ],
)
def test_a_request_that_no_honest_worker_makes_ends_it(daemon: realm.Daemon, message: str) -> None:
    kills = len(daemon.events("process-kill", role="worker", name="alice"))
    with stage.dial(daemon, "alice") as connection:
        with pytest.raises(OSError, match="ECONNRESET"):
            run(connection, f"tell({message}); time.sleep(5)")
        assert "violation" in daemon.wait_event("process-kill", count=kills + 1, role="worker", name="alice")["reason"]
        assert run(connection, "result = 'another one'") == "another one"


def test_it_can_not_become_anybody_or_read_what_is_root_s(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    code = f"""
import ctypes
result = [attempt(lambda: os.setresuid(0, 0, 0)), attempt(lambda: os.setgroups([0])),
          attempt(lambda: os.open('/etc/shadow', os.O_RDONLY)), attempt(lambda: os.kill({daemon.pid}, 15)),
          attempt(lambda: os.listdir('/proc/{daemon.pid}/fd'))]
"""
    assert run(alice, code) == [-EPERM, -EPERM, -EACCES, -EPERM, -EACCES]


def test_no_descriptor_gets_from_it_to_the_monitor_or_a_gate(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    code = """
import array
targets = [MONITOR, *(Socket(fileno=os.dup(gate)) for gate in gates)]
result = {attempt(lambda: each.sendmsg([b'x'], [(1, 1, array.array('i', [0]))])) for each in targets}
"""
    if passing.kernel_refuses():
        assert run(alice, code) == {-EPERM}
    else:  # the monitor drops the descriptor, and ends the sender
        kills = len(daemon.events("process-kill"))
        with pytest.raises(OSError, match="ECONNRESET"):
            run(alice, code + "; time.sleep(5)")
        assert "descriptors" in daemon.wait_event("process-kill", count=kills + 1)["reason"]


def test_no_page_of_a_file_gets_from_it_to_the_monitor_or_a_gate(alice: blocking.Connection) -> None:
    """A page that its file system keeps locked would hold up a pipe's reader for ever. A socket's gets a copy.

    The page can be changed after it was sent: what arrives of it stays as it was.
    """
    code = """
import ctypes, stat
targets = [MONITOR.fileno(), 2, *gates]
result = {stat.S_ISSOCK(os.fstat(each).st_mode) for each in targets}, len(targets)
"""
    found: Any = run(alice, code)
    assert found[0] == {True}
    assert found[1] >= 3


def memory(pid: int) -> int:
    """Resident, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_it_can_not_make_the_monitor_remember_answers_without_end(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    """It asks as fast as it can, and reads just enough that nobody can say it does not; then it is heard again."""
    code = """
os.set_blocking(3, False)
over, asked, look = time.monotonic() + 4, 0, 0
while time.monotonic() < over:
    try:
        tell(ipc.IsLive(asked, 1, 1))
        asked += 1
    except BlockingIOError:
        time.sleep(.001)
    if time.monotonic() > look:
        [listen(0) for _ in range(250)]
        look = time.monotonic() + .5
while listen(.5):
    pass
heard.clear()
tell(ipc.IsLive(0, 1, 1))
result = type(wait(ipc.Live)[0]).__name__
"""
    before = memory(daemon.pid)
    assert run(alice, code) == "Live"
    assert memory(daemon.pid) - before < 6 << 20
