"""What was taken over is held by the kernel: code that runs in each domain tries what that domain must not do.

The code gets there as an attacker's would, through the installed package: hostile programs lie over those of gate and worker
(the same as in tests/hostile, mounted over the files, with their labels), and are started by the real daemon under the
real unit; a hostile program endpoint; and a daemon that is the real one but for running, when it serves, what comes in on
its local socket.

What systemd's unit and file permissions would refuse anyway is out of the way here, as far as that goes: restrictions of the
unit are lifted (`LIFTED`), and there are files for everybody to read with the labels of those that are not (`BAIT`). So it
is SELinux that refuses, and its record names the domain. Gates are tried in their sandbox too, which needs no SELinux.
"""

import contextlib
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EACCES, EAGAIN, ENXIO, EPERM
from pathlib import Path
from typing import NamedTuple

import pytest

from srpc_client import blocking
from tests.vm.guest.conftest import run
from tests.vm.guest.denials import Expected
from tests.vm.guest.test_contexts import Journal, Served, held, main_pid

PRODUCT = Path("/usr/lib/srpc/lib/python3.11/site-packages")
HOSTILE = Path(__file__).parents[2] / "hostile"
LOCAL = "/run/srpc/srpc.sock"
TREE = Path("/srv/rpc")
UNIT = Path("/run/systemd/system/srpcd.service.d/lifted.conf")
LIFTED = """[Service]
SystemCallFilter=
RestrictAddressFamilies=
IPAddressDeny=
RestrictNamespaces=no
ProtectSystem=no
ProtectHome=no
ProtectProc=default
ProtectKernelTunables=no
PrivateDevices=no
PrivateTmp=no
"""
BAIT = Path("/etc/srpc-bait")
LABELS = {"key": "srpc_key_t", "shadow": "shadow_t", "home": "user_home_t"}
"""Files of everybody's in BAIT."""

WORKERS = {"alice": "srpc_staff_worker_t", "bob": "srpc_user_worker_t", "carol": "srpc_unconfined_worker_t"}

PRELUDE = f"""
import ctypes, os, mmap
from _socket import socket as Socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def attempt(work):
    try:
        return work()
    except OSError as fault:
        return -fault.errno

def call(number, *arguments):
    result = libc.syscall(*(ctypes.c_long(each) for each in (number, *arguments)))
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result

def refusal(work):
    result = attempt(work)
    return result if isinstance(result, int) and result < 0 else 0

def child(work):
    pid = os.fork()
    if pid == 0:
        os._exit(-refusal(work))
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def write(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        return os.write(fd, text)
    finally:
        os.close(fd)

def as_alice():
    os.setgroups([])
    os.setresgid(*3 * ({pwd.getpwnam("alice").pw_gid},))
    os.setresuid(*3 * ({pwd.getpwnam("alice").pw_uid},))
"""


class Attempt(NamedTuple):
    """code: an expression. rule: of the denial, behind the domain; empty: something else refuses it first."""

    code: str
    rule: str
    errno: int = EACCES


READS = {
    "open the TLS key": Attempt("os.open('/var/lib/srpc/key.pem', 0)", "var_lib_t:dir search"),
    "open a key that everybody may read": Attempt(f"os.open('{BAIT}/key', 0)", "srpc_key_t:file *"),
    "read /etc/shadow": Attempt("os.open('/etc/shadow', 0)", ""),
    "read what is labelled as shadow": Attempt(f"os.open('{BAIT}/shadow', 0)", "shadow_t:file read"),
    "read what is labelled as a home": Attempt(f"os.open('{BAIT}/home', 0)", "user_home_t:file read"),
}
NO_PROGRAMS = {
    "exec a shell": Attempt("child(lambda: os.execv('/bin/sh', ['sh', '-c', 'exit 0']))", "shell_exec_t:file execute*"),
    "exec another program": Attempt("child(lambda: os.execv('/usr/bin/true', ['true']))", "bin_t:file execute_no_trans"),
}
"""Not for programs: they may use others, in their own domain."""

ALL = {
    "make code (what the unit forbids)": Attempt("mmap.mmap(-1, 4096, flags=0x22, prot=7)", "", EPERM),
    "ptrace": Attempt("child(lambda: call(101, 16, {target}, 0, 0))", "unconfined_t:process ptrace"),
    "signal somebody": Attempt("os.kill({target}, 0)", "unconfined_t:process signull"),
    "be another domain": Attempt(
        "write('/proc/thread-self/attr/current', b'unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023')",
        "{domain}:process setcurrent",
    ),
    "reach a process by an abstract socket": Attempt(
        "Socket(1, 1).connect('\\0srpc-test')", "unconfined_t:unix_stream_socket connectto"
    ),
    "make a namespace for mounts": Attempt("call(272, 0x20000)", "", EPERM),
}
UNPRIVILEGED = {
    "connect out": Attempt("Socket(2, 1).connect(('127.0.0.1', 22))", "{domain}:tcp_socket create"),
    "connect a user's line": Attempt("Socket(1, 1).connect({line!r})", "srpc_runtime_t:dir search"),
    "be root": Attempt("os.setresuid(0, 0, 0)", "", EPERM),
    "be another user": Attempt("os.setresuid(1, 1, 1)", "", EPERM),
    "be in another group": Attempt("os.setgroups([0])", "", EPERM),
}
OWN = {
    "gate": {"call an endpoint": Attempt("os.open({endpoint!r}, os.O_WRONLY | os.O_NONBLOCK)", "srpc_tree_t:dir search")},
    "worker": {"announce": Attempt("os.mkfifo('{tree}/open/x')", "srpc_tree_t:dir write")},
    "program": {"signal its worker": Attempt("os.kill(os.getppid(), 0)", "{worker}:process signull")},
    "monitor": {
        "connect out": Attempt("Socket(2, 1).connect(('127.0.0.1', 22))", "ssh_port_t:tcp_socket name_connect"),
        "read /etc/shadow": Attempt("os.open('/etc/shadow', 0)", "shadow_t:file read"),
        "read what is labelled as shadow": READS["read what is labelled as shadow"],
        "read a user's file as that user": Attempt(
            "child(lambda: (as_alice(), os.open('{bait}/home', 0)))", "user_home_t:file read"
        ),
        "be a user in his own domain": Attempt(
            "child(lambda: (write('/proc/thread-self/attr/exec', b'staff_u:staff_r:staff_t:s0'), as_alice(), "
            "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])))",
            "shell_exec_t:file execute*",
        ),
        "change its configuration": Attempt("os.open('/etc/srpc/srpcd.toml', os.O_WRONLY)", "srpc_conf_t:file write"),
        "change its programs": Attempt("os.open('{product}/srpcd/ipc.py', os.O_WRONLY)", "lib_t:file write"),
        "put something into the tree": Attempt("os.mkdir('{tree}/x')", "srpc_tree_t:dir write"),
        "load a module into the kernel": Attempt("call(313, 0, 0, 0)", "", EPERM),
        "open a raw socket": Attempt("Socket(2, 3, 1)", "{domain}:rawip_socket create"),
    },
}  # fmt: skip
MAIN = ("open a key that everybody may read", "read what is labelled as a home", "ptrace", "connect out")
ATTEMPTS = {
    "gate": READS | NO_PROGRAMS | ALL | UNPRIVILEGED | OWN["gate"],
    "worker": READS | NO_PROGRAMS | ALL | UNPRIVILEGED | OWN["worker"],
    "program": READS | ALL | UNPRIVILEGED | OWN["program"],
    "monitor": NO_PROGRAMS | ALL | OWN["monitor"],
}
ELSEWHERE = {
    f"{role}: {name}": attempt
    for role, attempts in ATTEMPTS.items()
    for name, attempt in attempts.items()
    if attempt.rule and "domain" not in name
}
"""What SELinux refuses, but for changes of the domain, which an administrator's shell may not do either."""


# --- the stage --------------------------------------------------------------------------------------------------------


def label(path: Path, kind: str = "", like: Path | None = None) -> None:
    """Give a file a type, or the whole label of another."""
    value = os.getxattr(like, "security.selinux") if like else f"system_u:object_r:{kind}:s0\0".encode()
    os.setxattr(path, "security.selinux", value)


def restart() -> None:
    """A daemon that starts anew, with nobody's worker."""
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "restart", "srpcd"], check=True)


def journal() -> str:
    """All that the daemon has said."""
    return subprocess.run(["journalctl", "-qocat", "-usrpcd"], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def in_the_place_of(program: Path, text: str) -> Iterator[None]:
    """Another program where a program of ours was, with its label; the daemon is started anew."""
    other = PRODUCT.parents[2] / f"hostile-{program.parent.name}"
    other.write_text(text)
    other.chmod(0o755)
    label(other, like=program)
    subprocess.run(["mount", "--bind", other, program], check=True)
    try:
        restart()
        yield
    finally:
        subprocess.run(["systemctl", "stop", "srpcd"], check=True)
        subprocess.run(["umount", program], check=True)
        other.unlink()


@pytest.fixture(scope="module", autouse=True)
def stage() -> Iterator[None]:
    """What the module's text says: nothing of the unit in the way, and what attackers would like to have."""
    UNIT.parent.mkdir(parents=True, exist_ok=True)
    UNIT.write_text(LIFTED)
    BAIT.mkdir()
    BAIT.chmod(0o755)
    for name, kind in LABELS.items():
        (BAIT / name).write_text("secret")
        (BAIT / name).chmod(0o644)
        label(BAIT / name, kind)
    for name in ("open", "endpoint"):
        (TREE / name).mkdir()
        (TREE / name).chmod(0o777 if name == "open" else 0o755)
    os.mkfifo(TREE / "endpoint/pipe")
    (TREE / "endpoint/pipe").chmod(0o666)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0srpc-test")
    listener.listen()
    try:
        yield
    finally:
        listener.close()
        UNIT.unlink()
        subprocess.run(["rm", "-rf", BAIT, TREE / "open", TREE / "endpoint"], check=True)
        restart()


@contextlib.contextmanager
def somebody(user: str) -> Iterator[int]:
    """A process of this user's outside of sRPC, that has no capability: its pid."""
    entry = pwd.getpwnam(user)
    ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    command = ["setpriv", *ids, "--bounding-set=-all", "--inh-caps=-all", "sleep", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def line() -> Iterator[Path]:
    """A line, as the monitor makes it for a service: of carol's, who has none."""
    directory = Path(f"/run/srpc/lines/{pwd.getpwnam('carol').pw_uid}")
    directory.mkdir(0o700, exist_ok=True)
    path = directory / "1"
    with socket.socket(socket.AF_UNIX) as listener:
        if not path.exists():
            listener.bind(str(path))
            listener.listen()
            label(path, "srpc_endpoint_t")
        yield path
    subprocess.run(["rm", "-rf", directory], check=True)


@contextlib.contextmanager
def being(user: str) -> Iterator[None]:
    """Whoever connects meanwhile is this user, for all that the kernel tells of him."""
    entry, groups = pwd.getpwnam(user), os.getgroups()
    os.initgroups(user, entry.pw_gid)  # its sessions have those groups that the process has
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@contextlib.contextmanager
def local(user: str) -> Iterator[socket.socket]:
    """A connection to the local socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        with being(user):
            sock.connect(LOCAL)
        sock.settimeout(60)
        yield sock


def converse(sock: socket.socket, code: str) -> str:
    """Have a hostile gate or monitor run code; what `result` is then, "GONE" where it ended of it."""
    answer = b""
    try:
        sock.sendall(code.encode())
        while not answer.endswith(b"\0\n"):
            data = sock.recv(65536)
            if not data:
                return "GONE"
            answer += data
    except ConnectionError:
        return "GONE"
    return answer[:-2].decode()


Run = Callable[[str], str]
"""Runs code where an attacker is; what `result` is then, as repr."""


def calling(stack: contextlib.ExitStack, user: str, path: str) -> Run:
    """Runs code by calling an endpoint with it."""
    with being(user):
        connection = stack.enter_context(blocking.dial(f"unix:{LOCAL}", user=user, timeout=60))
    return lambda code: connection.call(path, code.encode(), timeout=60).decode()


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


PLACES: dict[str, object] = {"tree": TREE, "bait": BAIT, "product": PRODUCT, "endpoint": str(TREE / "endpoint/pipe")}


class Taken:
    """A process that was taken over. domain: that it runs in. user: whose it is. worker: a program's worker's domain."""

    def __init__(self, run: Run, domain: str, stack: contextlib.ExitStack, user: str, worker: str = "") -> None:
        self.run = run
        self.domain = domain
        self._names = PLACES | {"domain": domain, "worker": worker, "line": str(stack.enter_context(line()))}
        self._names["target"] = stack.enter_context(somebody(user))

    def tries(self, attempt: Attempt, expected: Expected) -> None:
        """The attempt is refused, and where SELinux is what refuses, its record says in which domain."""
        rules = [f"{self.domain} {attempt.rule.format(**self._names)}"] if attempt.rule else []
        with expected(*rules) as found:
            result = self.run(f"{PRELUDE}\nresult = attempt(lambda: {attempt.code.format(**self._names)})")
        assert result == repr(-attempt.errno)
        assert all(f":{self.domain}:" in each.source for each in found)


# --- the domains ------------------------------------------------------------------------------------------------------


def hostile(role: str) -> str:
    """A program of tests/hostile as the daemon starts an installed one."""
    return (
        f"#!/usr/bin/python3 -IS\nimport sys\nsys.argv.insert(1, {str(PRODUCT)!r})\n" + (HOSTILE / f"{role}.py").read_text()
    )


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, object]:
    """What comes of the attempts in an administrator's shell."""
    with somebody("root") as target, line() as pipe:
        names = PLACES | {"target": target, "line": str(pipe)}
        codes = {name: attempt.code.format(**names) for name, attempt in ELSEWHERE.items()}
        code = f"{PRELUDE}\nprint({{name: refusal(lambda: eval(code)) for name, code in {codes!r}.items()}})"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    for made in ("x", "open/x"):
        subprocess.run(["rm", "-rf", TREE / made], check=True)
    found = eval(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", ELSEWHERE)
def test_nothing_but_selinux_is_in_the_way_of_root(elsewhere: dict[str, object], name: str) -> None:
    assert elsewhere[name] in (0, -ENXIO)  # ENXIO: may write, but nobody reads


@pytest.fixture(scope="class")
def gate() -> Iterator[Taken]:
    with in_the_place_of(PRODUCT / "srpcd/gate/__main__.py", hostile("gate")), contextlib.ExitStack() as stack:
        sock = stack.enter_context(local("alice"))
        yield Taken(lambda code: converse(sock, code), "srpc_gate_t", stack, "_srpcl")


class TestGate:
    """srpc_gate_t."""

    @pytest.mark.parametrize("name", ATTEMPTS["gate"])
    def test_selinux_refuses(self, gate: Taken, name: str, expected_denials: Expected) -> None:
        gate.tries(ATTEMPTS["gate"][name], expected_denials)

    @pytest.mark.parametrize("name", [name for name in ATTEMPTS["gate"] if "namespace" not in name])
    def test_its_sandbox_refuses_before_selinux_is_asked(self, gate: Taken, name: str, expected_denials: Expected) -> None:
        assert gate.run("confine_gate(); result = 1") == "1"
        gate.tries(Attempt(ATTEMPTS["gate"][name].code, "", EPERM), expected_denials)

    def test_to_execute_a_shell_ends_it(self, gate: Taken) -> None:
        assert gate.run("confine_gate(); os.execv('/bin/sh', ['sh', '-c', 'exit 7'])") == "GONE"
        assert until(lambda: "gate-restart level=error gate=local status=-31" in journal())


LINE = """
tell(ipc.LinesWanted(path, found.st_dev, found.st_ino))
fd = setup.__dict__['kept'] = wait(ipc.Line, seconds=30)[1][0]
"""
USES = """
from srpcd.wire import frames
flush = frames.frame(frames.FLUSH, 0, frames.SEQ.pack(1))  # of no call: it means nothing
out, into = os.pipe()
os.write(into, flush)
result = [attempt(lambda: os.write(fd, flush)), attempt(lambda: Socket(fileno=os.dup(fd)).send(flush)),
          attempt(lambda: os.splice(out, fd, len(flush))), attempt(lambda: os.read(fd, 1))]
"""


@pytest.fixture
def served(workers: dict[str, Taken]) -> Iterator[Served]:
    """An endpoint with a service, at the daemon whose workers are taken over."""
    assert workers
    log = Journal()
    made = Served(TREE / "open")
    assert log.says("announce outcome=granted .*endpoint=/open/who", 60)
    yield made
    made.end()
    made.pipe.unlink()


@pytest.fixture(scope="class")
def workers() -> Iterator[dict[str, Taken]]:
    with in_the_place_of(PRODUCT / "srpcd/worker/__main__.py", hostile("worker")), contextlib.ExitStack() as stack:
        yield {user: Taken(calling(stack, user, "/x"), domain, stack, user) for user, domain in WORKERS.items()}


class TestWorker:
    """srpc_*_worker_t: all of it as alice, and what matters most as the others."""

    @pytest.mark.parametrize("name", ATTEMPTS["worker"])
    def test_selinux_refuses(self, workers: dict[str, Taken], name: str, expected_denials: Expected) -> None:
        workers["alice"].tries(ATTEMPTS["worker"][name], expected_denials)

    @pytest.mark.parametrize("name", MAIN)
    @pytest.mark.parametrize("user", ["bob", "carol"])
    def test_selinux_refuses_other_roles(
        self, workers: dict[str, Taken], user: str, name: str, expected_denials: Expected
    ) -> None:
        workers[user].tries(ATTEMPTS["worker"][name], expected_denials)

    def test_a_line_that_it_has_is_of_no_use_from_the_moment_on_when_the_rule_has_gone(
        self, workers: dict[str, Taken], served: Served, expected_denials: Expected
    ) -> None:
        """By no way, while the monitor can't end it."""
        taken = workers["alice"]
        code = f"{PRELUDE}path, found = {served.path[1:]!r}, os.stat({str(served.pipe)!r})\n{LINE}{USES}"
        found = taken.run(code)
        assert found == repr([28, 28, 28, -EAGAIN])
        try:
            with expected_denials("srpc_staff_worker_t srpc_endpoint_t:unix_stream_socket *"), held(main_pid()):
                run("setsebool", "srpc_call_default", "off")
                found = taken.run(f"{PRELUDE}fd = setup.__dict__['kept']\n{USES}")
                assert found == repr([-EACCES] * 4)
        finally:
            run("setsebool", "srpc_call_default", "on")


PROGRAM = """#!/usr/bin/python3 -I
import sys, traceback
scope = {}
try:
    exec(sys.stdin.read(), scope)
    print(repr(scope["result"]), end="")
except BaseException:
    print(traceback.format_exc(), end="")
"""


@pytest.fixture(scope="class")
def programs() -> Iterator[dict[str, Taken]]:
    program = TREE / "endpoint/run"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    restart()
    with contextlib.ExitStack() as stack:
        yield {
            user: Taken(calling(stack, user, "/endpoint/run"), "srpc_program_t", stack, user, WORKERS[user])
            for user in ("alice", "bob")
        }


class TestProgram:
    """srpc_program_t: all of it as alice, and what matters most as bob."""

    @pytest.mark.parametrize("name", ATTEMPTS["program"])
    def test_selinux_refuses(self, programs: dict[str, Taken], name: str, expected_denials: Expected) -> None:
        programs["alice"].tries(ATTEMPTS["program"][name], expected_denials)

    @pytest.mark.parametrize("name", [*MAIN, "signal its worker"])
    def test_selinux_refuses_other_roles(self, programs: dict[str, Taken], name: str, expected_denials: Expected) -> None:
        programs["bob"].tries(ATTEMPTS["program"][name], expected_denials)


MONITOR = """#!/usr/lib/srpc/bin/python3 -I
import sys
import traceback
from srpcd.__main__ import main
from srpcd.monitor.front import Front

def welcome(self, gate, sock, duplicate, peer):
    duplicate.close()
    sock.settimeout(20)
    scope = {"result": None}
    try:
        exec(sock.recv(65536).decode(), scope)
        answer = repr(scope["result"])
    except BaseException:
        answer = traceback.format_exc()
    sock.sendall(answer.encode() + b"\\0\\n")

Front._welcome = welcome
sys.exit(main())
"""


@pytest.fixture(scope="class")
def monitor() -> Iterator[Taken]:
    def run(code: str) -> str:
        with local("alice") as sock:
            return converse(sock, code)

    with in_the_place_of(PRODUCT.parents[2] / "bin/srpcd", MONITOR), contextlib.ExitStack() as stack:
        yield Taken(run, "srpcd_t", stack, "root")


class TestMonitor:
    """srpcd_t, when it serves: with the capabilities that it keeps."""

    @pytest.mark.parametrize("name", ATTEMPTS["monitor"])
    def test_selinux_refuses(self, monitor: Taken, name: str, expected_denials: Expected) -> None:
        monitor.tries(ATTEMPTS["monitor"][name], expected_denials)
