"""SELinux contexts of everything the daemon starts and makes, and that whatever is wrong with them is refused.

All of it is asked of the installed service, under the kernel's enforcing policy.
"""

import contextlib
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EACCES
from pathlib import Path
from typing import Any

import pytest

from srpc_client import blocking
from tests.vm.guest.conftest import Shell, run
from tests.vm.guest.denials import Expected

ADDRESS, TREE, LINES = "unix:/run/srpc/srpc.sock", Path("/srv/rpc"), Path("/run/srpc/lines")
CONFIGURATION = Path("/etc/selinux/default")
USERS, SEUSERS = CONFIGURATION / "contexts/users", CONFIGURATION / "seusers"

DAEMON, GATE = "system_u:system_r:srpcd_t:s0", "system_u:system_r:srpc_gate_t:s0"
WORKERS = {
    "alice": "staff_u:staff_r:srpc_staff_worker_t:s0:c1",
    "bob": "user_u:user_r:srpc_user_worker_t:s0:c2",
    "carol": "unconfined_u:unconfined_r:srpc_unconfined_worker_t:s0-s0:c0.c1023",
}
"""As `semanage login` maps them, and the first role that they have; carol by `__default__`."""

SERVICE = """
import asyncio, json, os, socket, stat, sys
from srpc_client import serve

def labels(request):
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                peer = sock.getsockopt(socket.SOL_SOCKET, 31, 1024).rstrip(b"\\0").decode()  # SO_PEERSEC
        except OSError:
            continue
        if ":object_r:" in peer:
            found.append(peer)
    return json.dumps([request.caller.context, sorted(found)]).encode()

asyncio.run(serve({path: labels for path in sys.argv[2:]}, address=sys.argv[1]))
"""


# --- helpers ----------------------------------------------------------------------------------------------------------


def context_of(pid: int) -> str:
    """Of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")
    except OSError:
        return ""


def label_of(path: Path) -> str:
    """Of a file."""
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


def relabel(path: Path, label: str) -> None:
    """As chcon(1)."""
    os.setxattr(path, "security.selinux", label.encode() + b"\0", follow_symlinks=False)


def main_pid() -> int:
    """Of the service."""
    shown = subprocess.run(["systemctl", "show", "-P", "MainPID", "srpcd"], capture_output=True, text=True, check=True)
    return int(shown.stdout)


def running(word: str, argument: str = "") -> list[int]:
    """Processes of the daemon's that run a program of its, with this argument."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else []
            if any(each.endswith(word) for each in command) and argument in ("", *command):
                found.append(int(entry.name))
    return found


def worker(user: str) -> int:
    """The one worker of a user."""
    (pid,) = running("srpcd/worker/__main__.py", user)
    return pid


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def dial(user: str) -> blocking.Connection:
    """Log in with a password, by PAM as over the network."""
    return blocking.dial(ADDRESS, user=user, password=f"{user}'s own passphrase", mechanism="pam", timeout=60)


def errno_of(connection: blocking.Connection, path: str) -> int:
    """0, or why the call failed."""
    try:
        connection.call(path, b"", timeout=60)
    except OSError as fault:
        return fault.errno or -1
    return 0


class Journal:
    """What the daemon has written since this was made."""

    def __init__(self) -> None:
        self._since = f"@{time.time():.6f}"

    def text(self) -> str:
        """All of it."""
        command = ["journalctl", "-q", "-o", "cat", "-u", "srpcd", "--since", self._since]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def says(self, pattern: str, seconds: float = 20.0) -> bool:
        """Whether a line of it fits, in time."""
        return until(lambda: re.search(pattern, self.text()), seconds)


@pytest.fixture
def journal() -> Journal:
    """From now on."""
    return Journal()


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """A process stands still. The monitor, in whose place nobody else then ends a worker: so it is the kernel that refuses
    the worker's next call, and not the monitor that happened to be quicker.
    """
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(autouse=True)
def service() -> Iterator[None]:
    """The daemon serves, and nobody has a worker. (It is not started anew: that takes longer than most of these tests.)"""
    subprocess.run(["systemctl", "start", "srpcd"], check=True)
    for pid in running("srpcd/worker/__main__.py"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]  # the monitor has seen it
    yield
    subprocess.run(["systemctl", "reset-failed", "srpcd"], check=False)


@pytest.fixture
def changed() -> Iterator[Callable[[Path, Callable[[str], str]], None]]:
    """`changed(file, change)` writes what `change` makes of a file's text, until the end of the test."""
    before: dict[Path, bytes] = {}

    def change(file: Path, what: Callable[[str], str]) -> None:
        before.setdefault(file, file.read_bytes())
        text = what(before[file].decode())
        assert text.encode() != before[file]
        _write(file, text.encode())

    yield change
    for file, data in before.items():
        _write(file, data)


def _write(file: Path, data: bytes) -> None:
    with file.open("r+b") as stream:  # in its place, with its label
        stream.truncate()
        stream.write(data)


class Served:
    """An endpoint in the tree, with a service behind it that says what it knows of its caller and its lines."""

    def __init__(self, directory: Path) -> None:
        self.pipe = directory / "who"
        self.path = f"/{directory.name}/who"
        os.mkfifo(self.pipe)
        owner = pwd.getpwnam("svc")
        os.chown(self.pipe, owner.pw_uid, owner.pw_gid)
        self.pipe.chmod(0o622)
        command = [sys.executable, "-c", SERVICE, "unix:/run/srpc/srpc.sock", self.path]
        self.process = subprocess.Popen(command, user="svc", group=owner.pw_gid, extra_groups=[], cwd="/")

    def ask(self, connection: blocking.Connection) -> tuple[str, list[str]]:
        """(the caller's context as the service was told it, contexts of the other ends of its lines)."""
        context, labels = eval(connection.call(self.path, b"", timeout=60).replace(b"null", b"None"))
        return context, labels

    def end(self) -> None:
        """End the service."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory in the tree."""
    made = TREE / "contexts"
    subprocess.run(["rm", "-rf", str(made)], check=True)
    made.mkdir()
    made.chmod(0o755)
    yield made
    subprocess.run(["rm", "-rf", str(made)], check=True)


@pytest.fixture
def served(directory: Path, journal: Journal) -> Iterator[Served]:
    """The same, announced."""
    made = Served(directory)
    assert journal.says("announce outcome=granted .*endpoint=/contexts/who", 60)
    yield made
    made.end()


# --- processes --------------------------------------------------------------------------------------------------------


def test_each_process_runs_in_the_domain_that_is_meant_for_it() -> None:
    seen: list[str] = []

    def asked(_prompts: Any) -> list[str]:
        seen.extend(context_of(pid) for pid in running("srpcd/monitor/pamchild.py"))
        return ["alice's own passphrase"]

    assert context_of(main_pid()) == DAEMON
    gates = running("srpcd/gate/__main__.py")
    assert [context_of(pid) for pid in gates] == [GATE, GATE]
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocking.dial(ADDRESS, user="alice", prompt=asked, mechanism="pam", timeout=60))
        assert seen == ["system_u:system_r:srpc_auth_t:s0"]
        for user in ("bob", "carol"):
            stack.enter_context(dial(user))
        assert {user: context_of(worker(user)) for user in WORKERS} == WORKERS
        for pid in (main_pid(), *gates, *map(worker, WORKERS)):
            # Nobody has a context left that the next program or file would get.
            for name in ("exec", "fscreate", "keycreate", "sockcreate"):
                assert Path(f"/proc/{pid}/attr/{name}").read_text().rstrip("\0\n") == ""


def test_a_daemon_that_is_not_started_in_its_domain_says_what_to_do(tmp_path: Path) -> None:
    by_hand = ["/usr/sbin/srpcd", "--set", f"paths.runtime={tmp_path}"]
    by_interpreter = ["/usr/lib/srpc/bin/python3", "-I", *by_hand]
    for command in (by_hand, by_interpreter):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, command
        said = done.stdout + done.stderr
        assert re.search(r"SELinux is on, and this process runs as \S+:unconfined_t:\S+, not in the domain srpcd_t", said), (
            said
        )
        assert "systemctl start srpcd" in said
        assert "restorecon" in said
    assert list(tmp_path.iterdir()) == []


def test_workers_and_gates_end_with_a_monitor_that_is_killed() -> None:
    with dial("alice"):
        pids = [worker("alice"), *running("srpcd/gate/__main__.py")]
        os.kill(main_pid(), signal.SIGKILL)
        assert until(lambda: not any(context_of(pid) in (GATE, WORKERS["alice"]) for pid in pids))


# --- whose context ----------------------------------------------------------------------------------------------------


WRONG = {
    "a login shell's domain": "staff_r:staff_t:s0",
    "the daemon's own domain": "system_r:srpcd_t:s0",
    "a type that there is none of": "staff_r:srpc_nonesuch_worker_t:s0 sysadm_r:srpc_sysadm_worker_t:s0",
    "a domain of another role": "user_r:srpc_user_worker_t:s0 sysadm_r:srpc_sysadm_worker_t:s0",
}
"""For the daemon's domain in her SELinux user's file. What comes behind the first one does not count."""


@pytest.mark.parametrize("what", WRONG)
def test_without_a_context_that_is_a_workers_there_is_no_worker(
    what: str, changed: Callable[[Path, Callable[[str], str]], None], journal: Journal
) -> None:
    changed(USERS / "staff_u", lambda text: f"{text}system_r:srpcd_t:s0\t{WRONG[what]}\n")
    with pytest.raises(OSError) as refused:  # noqa: PT011
        dial("alice").close()
    assert refused.value.errno == EACCES
    assert running("srpcd/worker/__main__.py") == []
    assert journal.says("authentication .*outcome=refused .*user=alice .*reason=.no SELinux context")


def test_an_administrator_can_give_an_selinux_user_another_role(
    changed: Callable[[Path, Callable[[str], str]], None],
) -> None:
    changed(USERS / "staff_u", lambda text: f"{text}system_r:srpcd_t:s0\tsysadm_r:srpc_sysadm_worker_t:s0\n")
    with dial("alice"):
        assert context_of(worker("alice")) == "staff_u:sysadm_r:srpc_sysadm_worker_t:s0:c1"


def test_no_file_of_the_policys_names_the_daemon() -> None:
    assert "srpcd_t" not in (CONFIGURATION / "contexts/default_contexts").read_text()


def test_a_mapping_that_is_invalid_or_can_not_be_read_gives_no_worker(
    changed: Callable[[Path, Callable[[str], str]], None], journal: Journal
) -> None:
    changed(SEUSERS, lambda text: text.replace("bob:user_u:s0:c2", "bob:nonesuch_u:s0:c2"))
    with pytest.raises(OSError):  # noqa: PT011
        dial("bob").close()
    assert journal.says("authentication .*outcome=refused .*user=bob .*reason=.no SELinux context")
    mode = SEUSERS.stat().st_mode
    hidden = SEUSERS.with_name("seusers.hidden")
    SEUSERS.rename(hidden)
    try:
        with pytest.raises(OSError):  # noqa: PT011
            dial("alice").close()
        assert journal.says("authentication .*outcome=refused .*user=alice .*reason=.no SELinux context")
    finally:
        hidden.rename(SEUSERS)
    assert SEUSERS.stat().st_mode == mode


def test_a_changed_mapping_gets_another_worker(changed: Callable[[Path, Callable[[str], str]], None]) -> None:
    with dial("alice"):
        old = worker("alice")
        changed(SEUSERS, lambda text: text.replace("alice:staff_u:s0:c1", "alice:staff_u:s0:c1,c3"))
        with dial("alice"):
            contexts = {context_of(pid) for pid in running("srpcd/worker/__main__.py", "alice")}
            assert contexts == {WORKERS["alice"], WORKERS["alice"] + ",c3"}
            assert context_of(old) == WORKERS["alice"]


def test_a_mapping_for_this_service_alone_counts() -> None:
    """As for logins: a file of the user's name, with a line for the service (selinux_logins(5))."""
    file = CONFIGURATION / "logins/bob"
    file.parent.mkdir(exist_ok=True)
    file.write_text("srpcd:user_u:s0:c7\n*:user_u:s0:c8\n")
    run("restorecon", "-R", str(file.parent))
    try:
        with dial("bob"):
            assert context_of(worker("bob")) == "user_u:user_r:srpc_user_worker_t:s0:c7"
    finally:
        file.unlink()


# --- endpoints and lines ----------------------------------------------------------------------------------------------


def test_the_service_is_told_its_callers_context_and_lines_carry_the_endpoints_label(served: Served) -> None:
    own = label_of(served.pipe)
    assert own.split(":")[2] == "srpc_endpoint_t"
    with dial("alice") as alice, dial("bob") as bob:
        for count, (user, connection) in enumerate((("alice", alice), ("bob", bob)), 1):
            context, lines = served.ask(connection)
            assert context == WORKERS[user]
            # The kernel gives an accepted socket the level of the one that has connected: the low end of the service's.
            assert lines == [":".join((*own.split(":")[:3], "s0"))] * count
    for each in (LINES, *LINES.iterdir()):
        assert label_of(each).split(":")[2] == "srpc_runtime_t"


RESIDENT = """#!/usr/bin/python3 -I
import struct, sys
header = struct.Struct("!iQQ")
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
first = stdin.read(header.unpack(stdin.read(20))[2])
while head := stdin.read(20):
    _kind, seq, length = header.unpack(head)
    stdin.read(length)
    own = open("/proc/self/attr/current", "rb").read().rstrip(b"\\0\\n")
    stdout.write(header.pack(14, seq, 4 + len(first) + 1 + len(own)) + bytes(4) + first + b" " + own)
    stdout.flush()
"""


def test_a_resident_program_is_told_its_callers_context_and_keeps_user_role_and_level(directory: Path) -> None:
    program = directory / "kept"
    program.write_text(RESIDENT)
    program.chmod(0o1755)
    assert label_of(program).split(":")[2] == "srpc_program_exec_t"
    with dial("alice") as alice:
        told, _, own = alice.call("/contexts/kept", b"", timeout=60).decode().rpartition(" ")
        assert f'"context":"{WORKERS["alice"]}"' in told
        assert own == WORKERS["alice"].replace("srpc_staff_worker_t", "srpc_program_t")


@pytest.mark.usefixtures("modules")
def test_another_label_of_the_endpoint_is_another_of_its_lines(served: Served, journal: Journal) -> None:
    with dial("alice") as alice:
        served.ask(alice)
        before, label = worker("alice"), "system_u:object_r:srpctest_staff_endpoint_t:s0"
        relabel(served.pipe, label)
        assert until(lambda: served.ask(alice)[1] == [label])
        assert worker("alice") == before  # it still may call: nothing was killed for that
        assert "process-kill" not in journal.text()


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("how", ["category", "type", "directory"])
def test_chcon_binds_from_the_next_call_on_and_ends_a_worker_that_has_a_line(
    how: str, served: Served, journal: Journal, expected_denials: Expected
) -> None:
    with dial("bob") as bob:
        served.ask(bob)
        pid = worker("bob")
        target = {
            "category": "srpc_endpoint_t:fifo_file",
            "type": "srpctest_staff_endpoint_t:fifo_file",
            "directory": "*:dir",
        }
        with expected_denials(f"srpc_user_worker_t {target[how]} *") as found:
            with held(main_pid()):
                if how == "category":
                    relabel(served.pipe, f"{label_of(served.pipe)}:c1")  # bob has c2
                elif how == "type":
                    relabel(served.pipe, "system_u:object_r:srpctest_staff_endpoint_t:s0")
                else:
                    relabel(served.pipe.parent, "system_u:object_r:srpc_tree_t:s0:c1")
                assert errno_of(bob, served.path) == EACCES
            assert until(lambda: not context_of(pid))
        assert found[0].source == WORKERS["bob"]
        assert journal.says("process-kill .*role=worker name=bob .*may no longer call /contexts/who")
        assert journal.says(r"refused operation=call .*endpoint=/contexts/who .*SELinux: user_u:user_r:srpc_user_worker_t")


def test_a_boolean_binds_from_the_next_call_on_and_ends_a_worker_that_has_a_line(
    served: Served, journal: Journal, expected_denials: Expected
) -> None:
    """Nothing of the endpoint has changed, no time stamp tells it."""
    with dial("alice") as alice:
        served.ask(alice)
        pid = worker("alice")
        try:
            with expected_denials("srpc_staff_worker_t srpc_endpoint_t:fifo_file *") as found:
                with held(main_pid()):
                    run("setsebool", "srpc_call_default", "off")
                    assert errno_of(alice, served.path) == EACCES
                assert until(lambda: not context_of(pid))
            assert found[0].source == WORKERS["alice"]
            assert journal.says("process-kill .*role=worker name=alice .*may no longer call /contexts/who")
        finally:
            run("setsebool", "srpc_call_default", "on")
        assert until(lambda: errno_of(alice, served.path) == 0)


def test_permissive_mode_lets_pass_what_enforcing_mode_does_not(served: Served, expected_denials: Expected) -> None:
    relabel(served.pipe, f"{label_of(served.pipe)}:c1")
    with dial("bob") as bob, expected_denials("srpc_user_worker_t srpc_endpoint_t:fifo_file *"):
        assert errno_of(bob, served.path) == EACCES
        subprocess.run(["setenforce", "0"], check=True)
        try:
            assert served.ask(bob)[0] == WORKERS["bob"]
            pid = worker("bob")
            assert context_of(pid) == WORKERS["bob"]
        finally:
            subprocess.run(["setenforce", "1"], check=True)
        assert until(lambda: not context_of(pid))  # who got a line meanwhile is asked about anew


ANNOUNCE = """
import asyncio, sys
from srpc_client import requests
from srpc_client.service import Announcer

async def announce():
    # As the library does, without having opened the pipe, which would refuse it already.
    connection, _tree = await Announcer(sys.argv[1])._connected()
    await connection.request(requests.announce(1, sys.argv[2]))

asyncio.run(announce())
"""


def test_who_may_not_read_the_endpoint_by_policy_can_not_announce_it(
    directory: Path, journal: Journal, shell: Shell
) -> None:
    """Its mode lets alice: the pipe is her own. What staff_t may read is another matter."""
    pipe = directory / "hers"
    os.mkfifo(pipe)
    owner = pwd.getpwnam("alice")
    os.chown(pipe, owner.pw_uid, owner.pw_gid)
    pipe.chmod(0o622)
    path = ":".join(filter(None, sys.path))
    done = shell(
        "alice", f"PYTHONPATH={path} {sys.executable} - unix:/run/srpc/srpc.sock /contexts/hers <<'END'\n{ANNOUNCE}\nEND\n"
    )
    assert "EACCES" in done.stderr
    assert journal.says(rf"announce outcome=refused .*uid={owner.pw_uid} endpoint=/contexts/hers .*errno=EACCES", 60)
    assert journal.says(r"refused operation=serve .*SELinux: staff_u:staff_r:staff_t:\S+ has no .*open read")
