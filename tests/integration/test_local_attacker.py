"""A user with a local shell and the protocol document, allowed on the same endpoint, against another user's line.

Everything here is the product as it is; the attacker is a process of bob's.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import realm
from tests.integration import stage

pytestmark = pytest.mark.needs_root

ATTACK = """
import os, socket, sys
tree, lines, svc = sys.argv[1:4]
def attempt(work):
    try:
        return work()
    except OSError as fault:
        return -fault.errno
found = [attempt(lambda: os.listdir(lines)), attempt(lambda: os.listdir(f"{lines}/{svc}"))]
for number in range(40):
    name = f"{lines}/{svc}/{number}"
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_PATH, os.O_WRONLY | os.O_CREAT):
        found.append(attempt(lambda: os.open(name, flags | os.O_NONBLOCK)))
    with socket.socket(socket.AF_UNIX) as sock:
        found.append(attempt(lambda: sock.connect(name) or 0))
        found.append(attempt(lambda: sock.bind(f"{lines}/{svc}/{1000 + number}") or 0))
    found.append(attempt(lambda: os.unlink(name) or 0))
    found.append(attempt(lambda: os.rename(name, f"{lines}/{svc}/x") or 0))
found.append(attempt(lambda: os.mkdir(f"{lines}/{os.getuid()}")))
found.append(attempt(lambda: os.mkdir(f"{lines}/{svc}/99")))
print(repr([each for each in found if not isinstance(each, int) or each >= 0]))
"""

FORGE = """
import os, sys
from srpcd.wire import frames
pipe = os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
forged = frames.caller_frame(0, 0, (0,), "alice", "", "/calc/echo")
call = frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 0) + b"as alice")
for _ in range(100):
    try:
        os.write(pipe, forged + call)
    except BlockingIOError:
        break
try:
    print("read", os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK))
except OSError as fault:
    print(fault.errno)
"""


GRAB = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
pattern, seen, found, taken = sys.argv[1].encode(), {str(os.getpid())}, [], []
libc.syscall.restype = ctypes.c_long
print("ready", flush=True)
def attempt(pid):
    try:
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)  # as in the attack: what is stopped stays as it is
    except OSError:
        return
    found.append(pid)
    for fd in range(6):
        got = libc.syscall(438, pidfd, fd, 0)
        if got >= 0:
            taken.append(f"descriptor {fd}")
            os.close(got)
    if libc.ptrace(0x4206, pid, None, None) == 0:  # PTRACE_SEIZE
        taken.append("traced")
    for name in ("mem", "maps", "fd/3", "environ"):
        try:
            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
            taken.append(name)
        except OSError:
            pass
    os.kill(pid, signal.SIGCONT)
    os.close(pidfd)
while not os.path.exists(sys.argv[2]):
    for name in os.listdir("/proc"):
        if name.isdigit() and name not in seen:
            try:
                command = open(f"/proc/{name}/cmdline", "rb").read()
            except OSError:
                continue
            if pattern in command:
                attempt(int(name))
                seen.add(name)
print(len(found), *sorted(set(taken)))
"""
"""Stop one's own new workers as early as they can be found, and take what they have. Says how many, and what was taken."""

STARTS = 25
"""Workers that the attacker waits for. Before there was a defence, it won against nearly each of them."""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with realm.Daemon() as running:
        stage.make_directory(running.tree / "calc", "svc", "calc")
        with stage.service(running, "/calc/echo"):
            realm.grant(running.tree / "calc/echo", "w", uid=realm.account("bob").uid)
            yield running


def test_nothing_of_a_line_can_be_opened_removed_or_replaced_by_another_user(daemon: realm.Daemon) -> None:
    with stage.dial(daemon, "alice") as alice, stage.dial(daemon, "bob") as bob:
        assert stage.errno_of(alice, "/calc/echo") == 0
        assert stage.errno_of(bob, "/calc/echo") == 0
        arguments = (str(daemon.tree), str(daemon.lines), str(realm.account("svc").uid))
        done = realm.run_as("bob", realm.python(ATTACK, *arguments))
        assert done.stdout.strip() == b"[]", done
        assert alice.call("/calc/echo", b"still").startswith(b"alice:")


def test_what_another_caller_writes_into_the_endpoint_s_pipe_reaches_nobody(daemon: realm.Daemon) -> None:
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/calc/echo", b"1").startswith(b"alice:")
        done = realm.run_as("bob", realm.python(FORGE, str(daemon.tree / "calc/echo")))
        assert done.stdout.split() == [b"13"], done
        for text in (b"2", b"3"):
            assert alice.call("/calc/echo", text).endswith(b":" + text)


def test_a_caller_can_not_serve_what_he_may_only_call(daemon: realm.Daemon) -> None:
    code = """
import asyncio, sys
from srpc_client import announce
async def main():
    for path in ("/calc/echo", "/calc/other", "/other", "/calc"):
        try:
            await announce(path, address=sys.argv[1])
            print("announced", path)
        except OSError as fault:
            print(fault.errno)
asyncio.run(main())
"""
    done = realm.run_as("bob", realm.python(code, f"unix:{daemon.local}"))
    assert b"announced" not in done.stdout, done
    assert len(done.stdout.split()) == 4, done


def test_a_worker_can_be_taken_over_by_its_user_at_no_moment_of_its_start(
    private_realm: realm.Place, open_directory: Path
) -> None:
    """The exec of the worker's program is the moment: until then it is root's, and from then on it looks like the user's."""
    with realm.Daemon({"limits": {"worker_idle": 0.2}}) as daemon:
        end = open_directory / "end"
        code = realm.python(GRAB, "worker/__main__.py", str(end))
        attacker = realm.popen_as("alice", code, stdout=subprocess.PIPE)
        try:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"ready\n"
            for number in range(STARTS):
                with stage.dial(daemon, "alice") as alice:
                    assert alice.stat("/").is_dir
                daemon.wait_event("process-end", 20, number + 1, role="worker")
            end.touch()
            found, *taken = attacker.stdout.read().decode().split(maxsplit=1)
        finally:
            realm.finish(attacker)
        assert taken == []
        assert int(found) >= STARTS // 2


TOUCH = """
import ctypes, os, resource, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def attempt(work):
    try:
        return work()
    except OSError:
        return None
for pid in map(int, sys.argv[1:]):
    done = []
    pidfd = os.pidfd_open(pid)
    for number in (0, signal.SIGCONT):
        if attempt(lambda: signal.pidfd_send_signal(pidfd, number) or True):
            done.append("signal")
    for name in ("mem", "maps", "environ", "fd/0", "io", "stack", "syscall", "auxv", "root", "cwd"):
        if attempt(lambda: os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY)) or True):
            done.append(name)
    if any(libc.syscall(438, pidfd, fd, 0) >= 0 for fd in range(8)):
        done.append("descriptors")
    if libc.ptrace(0x4206, pid, None, None) == 0:
        done.append("trace")
    if libc.syscall(312, os.getpid(), pid, 0, 3, 3) >= 0:
        done.append("kcmp")
    if attempt(lambda: resource.prlimit(pid, resource.RLIMIT_CPU)):
        done.append("limits")
    if attempt(lambda: os.setpriority(os.PRIO_PROCESS, pid, 5) or True):
        done.append("priority")
    print(*sorted(set(done)) or "-")
"""
"""What an ordinary user can do to each of these processes."""


def test_a_local_user_can_signal_and_limit_its_own_worker_and_touch_nothing_else(daemon: realm.Daemon) -> None:
    with stage.dial(daemon, "alice") as alice, stage.dial(daemon, "bob") as bob:
        assert alice.stat("/").is_dir
        assert bob.stat("/").is_dir
        (own,), (other,) = stage.workers(daemon, "bob"), stage.workers(daemon, "alice")
        everything = [own.pid, other.pid, daemon.pid, *(each.pid for each in daemon.processes("gate"))]
        done = realm.run_as("bob", realm.python(TOUCH, *map(str, everything)))
        assert done.stdout.decode().splitlines() == ["limits priority signal", *["-"] * (len(everything) - 1)], done
        assert bob.stat("/").is_dir
