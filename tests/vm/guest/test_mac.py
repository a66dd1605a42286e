"""The policy decides, per user and endpoint: by role, by category, by label, by boolean; and what it keeps apart.

Alice and bob have the same file permissions on everything here, and what they may do differs all the same. alice is
staff_u with the category c1, bob is user_u with c2.
"""

import contextlib
import grp
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from errno import EACCES, ENOENT, EPERM
from pathlib import Path

import pytest

from srpc_client import blocking
from tests.vm.guest.conftest import run
from tests.vm.guest.denials import Expected
from tests.vm.guest.test_contexts import (
    TREE,
    WORKERS,
    context_of,
    dial,
    errno_of,
    held,
    label_of,
    main_pid,
    relabel,
    until,
    worker,
)

pytestmark = pytest.mark.usefixtures("modules")

HERE = Path(__file__).parent
CODE = Path("/usr/local/lib/srpctest")
Named = tuple[str, blocking.Connection]
STAFF = "srpc_user_worker_t srpctest_staff_endpoint_t:fifo_file *"

SERVICE = """#!/usr/lib/srpc/bin/python3 -I
import asyncio
from srpc_client import serve

asyncio.run(serve({"/mac/staff": lambda request: request.caller.user.encode()}, mode=0o620, group="rpcusers"))
"""

WHERE = "#!/bin/sh\nexec cat /proc/thread-self/attr/current\n"
"""A program that says in which context it runs."""

RESIDENT = """#!/usr/lib/srpc/bin/python3 -I
import ctypes, json, os
from srpc_client.stdio import serve_stdio

libc = ctypes.CDLL(None, use_errno=True)

def attach(pid):
    if libc.ptrace(ctypes.c_long(16), ctypes.c_long(pid), None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

def run(path):
    pid = os.fork()
    if not pid:
        try:
            os.execv(path, [path])
        except OSError as fault:
            os._exit(fault.errno)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "execv")

ACTIONS = {"read": read, "write": write, "run": run, "attach": attach, "signal": lambda pid: os.kill(pid, 18)}

def attempt(request):
    what, whom = json.loads(request.payload)
    try:
        ACTIONS[what](whom)
    except OSError as fault:
        return json.dumps([os.getpid(), fault.errno]).encode()
    return json.dumps([os.getpid(), 0]).encode()

serve_stdio(attempt)
"""


def boolean(name: str, value: bool) -> None:
    """setsebool(8), until the next boot."""
    run("setsebool", name, "on" if value else "off")


def install(path: Path, text: str, kind: str = "", mode: int = 0o755) -> Path:
    """Write an executable; kind: its type, else the one that it gets by itself."""
    path.write_text(text)
    path.chmod(mode)
    if kind:
        relabel(path, f"system_u:object_r:{kind}:s0")
    return path


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory of the tree, where the service's account may announce."""
    CODE.mkdir(parents=True, exist_ok=True)
    directory = TREE / "mac"
    directory.mkdir(mode=0o755)
    shutil.chown(directory, "svc", "svc")
    yield directory
    shutil.rmtree(directory)
    shutil.rmtree(CODE)


@pytest.fixture(scope="module")
def endpoint(place: Path) -> Iterator[Path]:
    """What a service in a domain of its own has announced."""
    program = install(CODE / "service", SERVICE, "srpctest_service_exec_t")
    run("systemd-run", "-q", "--collect", "--unit=srpctest", "--uid=svc", "-pSupplementaryGroups=rpcusers", str(program))
    try:
        pipe = place / "staff"
        assert until(lambda: pipe.exists() and pipe.stat().st_mode & 0o777 == 0o620, 60)
        yield pipe
    finally:
        run("systemctl", "stop", "srpctest")


# --- who may call -----------------------------------------------------------------------------------------------------


def test_a_service_in_a_domain_of_its_own_makes_endpoints_of_its_own_type(endpoint: Path) -> None:
    shown = subprocess.run(["systemctl", "show", "-P", "MainPID", "srpctest"], capture_output=True, text=True, check=True)
    assert context_of(int(shown.stdout)) == "system_u:system_r:srpctest_service_t:s0"
    assert label_of(endpoint) == "system_u:object_r:srpctest_staff_endpoint_t:s0"
    with dial("bob") as bob:  # who may not call it may see what it is
        assert bob.stat("/mac/staff", timeout=60).context == "system_u:object_r:srpctest_staff_endpoint_t:s0"


def test_the_role_of_the_caller_decides_and_a_boolean_binds_from_the_next_call_on(
    endpoint: Path, expected_denials: Expected
) -> None:
    found = endpoint.stat()
    assert found.st_mode & 0o777 == 0o620
    assert {"alice", "bob"} <= set(grp.getgrgid(found.st_gid).gr_mem)
    with dial("alice") as alice, dial("bob") as bob:
        assert alice.call("/mac/staff", b"", timeout=60) == b"alice"
        with expected_denials(STAFF) as denied:
            assert errno_of(bob, "/mac/staff") == EACCES
        (first, *_) = denied
        assert (first.source, first.permissions) == (WORKERS["bob"], ("write",))
        assert first.target == "system_u:object_r:srpctest_staff_endpoint_t:s0"
        boolean("srpctest_call_user", True)
        try:
            assert bob.call("/mac/staff", b"", timeout=60) == b"bob"
            with expected_denials(STAFF):
                with held(main_pid()):
                    boolean("srpctest_call_user", False)
                    assert errno_of(bob, "/mac/staff") == EACCES
                assert until(lambda: not context_of_worker("bob"))  # it had a line
            assert alice.call("/mac/staff", b"", timeout=60) == b"alice"
        finally:
            boolean("srpctest_call_user", False)


def context_of_worker(user: str) -> str:
    """Of the one worker of a user; empty where there is none."""
    try:
        return context_of(worker(user))
    except ValueError:
        return ""


def test_the_callers_category_decides_and_chcon_binds_from_the_next_call_on(
    endpoint: Path, expected_denials: Expected
) -> None:
    own = label_of(endpoint)
    boolean("srpctest_call_user", True)
    try:
        with dial("alice") as alice, dial("bob") as bob:
            assert alice.call("/mac/staff", b"", timeout=60) == b"alice"
            assert bob.call("/mac/staff", b"", timeout=60) == b"bob"
            _only(endpoint, "c1", ("alice", alice), ("bob", bob), expected_denials)
            _only(endpoint, "c2", ("bob", bob), ("alice", alice), expected_denials)
    finally:
        relabel(endpoint, own)
        boolean("srpctest_call_user", False)


def _only(endpoint: Path, category: str, may: Named, may_not: Named, expected_denials: Expected) -> None:
    """Give the endpoint a category: one may call it then, one may not."""
    own = label_of(endpoint).rpartition(":")[0] if label_of(endpoint).count(":") > 3 else label_of(endpoint)
    with expected_denials("srpc_*_worker_t srpctest_staff_endpoint_t:fifo_file *") as denied:
        with held(main_pid()):
            run("chcon", "-l", f"s0:{category}", str(endpoint))
            assert errno_of(may_not[1], "/mac/staff") == EACCES
        assert until(lambda: not context_of_worker(may_not[0]))  # it had a line
    assert {each.source for each in denied} == {WORKERS[may_not[0]]}
    assert denied[0].target == f"{own}:{category}"
    assert until(lambda: errno_of(may[1], "/mac/staff") == 0)  # the line is made anew, with the label of now


def test_the_type_of_the_endpoint_decides(endpoint: Path, expected_denials: Expected) -> None:
    own = label_of(endpoint)
    with dial("alice") as alice:
        assert alice.call("/mac/staff", b"", timeout=60) == b"alice"
        try:
            with expected_denials("srpc_staff_worker_t srpctest_other_endpoint_t:fifo_file *"):
                with held(main_pid()):
                    run("chcon", "-t", "srpctest_other_endpoint_t", str(endpoint))
                    assert errno_of(alice, "/mac/staff") == EACCES
                assert until(lambda: not context_of_worker("alice"))
        finally:
            relabel(endpoint, own)
        assert until(lambda: errno_of(alice, "/mac/staff") == 0)


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A directory of programs."""
    directory = TREE / "macp"
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


def test_a_program_runs_in_the_domain_of_its_label_with_its_callers_user_role_and_level(programs: Path) -> None:
    own = install(programs / "own", WHERE, "srpctest_one_exec_t")
    default = install(programs / "default", WHERE)
    assert label_of(default).split(":")[2] == "srpc_program_exec_t"  # by itself
    with dial("alice") as alice, dial("bob") as bob:
        assert alice.call("/macp/own", b"", timeout=60) == b"staff_u:staff_r:srpctest_one_t:s0:c1\0"
        assert bob.call("/macp/own", b"", timeout=60) == b"user_u:user_r:srpctest_one_t:s0:c2\0"
        assert bob.call("/macp/default", b"", timeout=60) == b"user_u:user_r:srpc_program_t:s0:c2\0"
        assert alice.stat("/macp/own", timeout=60).context == label_of(own)


def test_a_file_that_keeps_another_label_is_no_program(programs: Path, expected_denials: Expected) -> None:
    install(programs / "moved", WHERE, "bin_t")
    with dial("alice") as alice, expected_denials("srpc_staff_worker_t bin_t:file execute_no_trans"):
        assert errno_of(alice, "/macp/moved") == EACCES


def test_a_python_program_does_not_execute_its_callers_pth_files(programs: Path) -> None:
    """Not even one that is not started with -I: they would run in the endpoint's domain, by the caller's choice."""
    text = "#!/usr/bin/python3\nimport site, sys\nprint(hasattr(sys, 'taken_over'), site.getusersitepackages())\n"
    program = install(programs / "pth", text)
    entry = pwd.getpwnam("carol")
    version = "python{}.{}".format(*sys.version_info)
    directory = Path(entry.pw_dir, ".local/lib", version, "site-packages")
    command = f"mkdir -p {directory}; echo 'import sys; sys.taken_over = True' >{directory}/mine.pth; {program}"
    try:
        hers = subprocess.run(["runuser", "-l", "carol", "-c", command], capture_output=True, text=True, check=True)
        assert hers.stdout == f"True {directory}\n"  # in her own shell, where it is her own affair
        with dial("carol") as carol:
            said, where = carol.call("/macp/pth", b"", timeout=60).decode().split()
        assert said == "False"
        assert not where.startswith(entry.pw_dir)
    finally:
        shutil.rmtree(Path(entry.pw_dir, ".local"))


@pytest.fixture
def residents(programs: Path) -> Iterator[Callable[[str], Path]]:
    """Two resident programs, each in a domain of its own, with a file of its own that has all permissions."""
    data = {}
    for name in ("one", "two"):
        install(programs / name, RESIDENT, f"srpctest_{name}_exec_t", 0o1755)
        data[name] = install(Path("/var/lib", f"srpctest-{name}"), "x", f"srpctest_{name}_data_t", 0o666)
    yield data.__getitem__
    for file in data.values():
        file.unlink()


def test_two_resident_programs_of_one_user_can_not_touch_each_other(
    residents: Callable[[str], Path], programs: Path, expected_denials: Expected
) -> None:
    with dial("alice") as alice:

        def attempt(program: str, what: str, whom: object) -> tuple[int, int]:
            """(the program's process, errno)."""
            request = json.dumps([what, str(whom) if isinstance(whom, Path) else whom])
            pid, errno = json.loads(alice.call(f"/macp/{program}", request.encode(), timeout=60))
            return pid, errno

        pids = {name: attempt(name, "read", residents(name)) for name in ("one", "two")}
        assert [errno for _pid, errno in pids.values()] == [0, 0]
        one, two = (pid for pid, _errno in pids.values())
        assert context_of(one) == "staff_u:staff_r:srpctest_one_t:s0:c1"
        assert context_of(two) == "staff_u:staff_r:srpctest_two_t:s0:c1"
        alices = worker("alice")
        assert {os.stat(f"/proc/{pid}").st_uid for pid in (one, two, alices)} == {pwd.getpwnam("alice").pw_uid}
        attempts: list[tuple[str, object]] = [("read", residents("two")), ("write", residents("two"))]
        attempts += [("read", programs / "two"), ("run", programs / "two")]
        for pid in (two, alices):
            attempts += [("attach", pid), ("signal", pid)]
            attempts += [("write", Path(f"/proc/{pid}/{name}")) for name in ("fd/0", "fd/1", "mem")]
            attempts += [("read", Path(f"/proc/{pid}/{name}")) for name in ("fd/0", "environ")]
        with expected_denials("srpctest_one_t *"):
            found = [(*each, attempt("one", *each)[1]) for each in attempts]
        # ENOENT: whom it may not trace, it does not see in /proc (the unit's ProtectProc=).
        assert [each for each in found if each[2] not in (EACCES, EPERM, ENOENT)] == []
        assert attempt("two", "read", residents("two")) == (two, 0)  # it lives
        assert worker("alice") == alices


# --- what no process of the daemon's may do ----------------------------------------------------------------------------

EVERYBODY = frozenset({"shadow", "home", "network", "ptrace", "kill", "memory", "tree", "line", "booleans", "context"})
"""Attempts that are refused in every domain."""

DOMAINS = {
    "system_u:system_r:srpcd_t:s0": {"bus", "shell", "command"},
    "system_u:system_r:srpc_gate_t:s0": {"key", "bus", "shell", "command", "setuid"},
    "system_u:system_r:srpc_auth_t:s0": {"key", "bus", "shell", "command", "setuid"},
    WORKERS["alice"]: {"key", "bus", "shell", "command", "setuid"},
    WORKERS["bob"]: {"key", "bus", "shell", "command", "setuid"},
    WORKERS["carol"]: {"key", "bus", "shell", "command", "setuid"},
    "staff_u:staff_r:srpc_program_t:s0:c1": {"key", "bus", "setuid"},
    "staff_u:staff_r:srpctest_one_t:s0:c1": {"key", "bus", "setuid"},
}
"""By context: what is refused there besides. The rest is what that process is for."""


@pytest.fixture(scope="module")
def attempts(place: Path) -> Iterator[Callable[[str], dict[str, int]]]:
    """`attempts(context)`: the errno of each attempt, made there by root with all capabilities."""
    program = CODE / "attempt"
    shutil.copy(HERE / "attempt.py", program)
    relabel(program, "system_u:object_r:srpctest_attempt_exec_t:s0")
    runtime = Path("/run/srpctest")
    runtime.mkdir()
    line = runtime / "line"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(line))
    listener.listen()
    line.chmod(0o666)
    relabel(line, "system_u:object_r:srpctest_other_endpoint_t:s0")
    victim = subprocess.Popen(["sleep", "3600"])

    def attempt(context: str) -> dict[str, int]:
        command = f"{program} {victim.pid}"
        if context:
            command = f"runcon {context} {command}"
        # By a shell of the system's, which opens what they inherit: Debian's policy keeps descriptors of one SELinux user's
        # from another's processes. (The `cat` is for the pipe, which this process would make otherwise.)
        between = ["runcon", "system_u:system_r:unconfined_t:s0", "sh", "-c", f"{command} </dev/null 2>&1 | cat"]
        done = subprocess.run(between, capture_output=True, text=True)
        with contextlib.suppress(OSError):
            (TREE / "attempt").rmdir()
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        found: dict[str, int] = json.loads(done.stdout)
        return found

    yield attempt
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    listener.close()
    shutil.rmtree(runtime)


def test_the_attempts_go_through_where_nothing_confines_them(
    attempts: Callable[[str], dict[str, int]], expected_denials: Expected
) -> None:
    with expected_denials(
        "unconfined_t unconfined_t:process *"
    ):  # Debian's policy on an administrator's shell: the last two
        found = attempts("")
    assert {name: errno for name, errno in found.items() if errno and name not in ("memory", "context")} == {}


@pytest.mark.parametrize("context", DOMAINS)
def test_what_no_process_of_the_daemons_may_do_is_refused(
    context: str, attempts: Callable[[str], dict[str, int]], expected_denials: Expected
) -> None:
    with expected_denials(f"{context.split(':')[2]} *"):
        found = attempts(context)
    refused = EVERYBODY | DOMAINS[context]
    assert {name: found[name] in (EACCES, EPERM) for name in found} == {name: name in refused for name in found}
