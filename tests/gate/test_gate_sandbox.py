"""The gate's sandbox: what it refuses, each time beside what happens without it, and what it says where the kernel lacks it.

Each attempt is made by a process of its own kind (`PRELUDE`), outside and inside of the very same sandbox. Run by root, it
shows that even root is held. That nothing is refused which a gate needs is shown by all other tests in this directory:
their gates are ended by the first refusal (`world.STRICT`).
"""

import json
import platform
import signal
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from errno import EACCES, EPERM
from pathlib import Path
from typing import Any

import pytest

from srpcd import ipc
from srpcd.gate import sandbox
from tests.gate.world import World

ROOT = Path(__file__).resolve().parents[2]
PATH = [str(ROOT), *dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]

PRELUDE = f"""
import sys
sys.path[:0] = {PATH!r}
import ctypes, fcntl, mmap, os, resource, signal, socket, struct, threading
import json
from srpcd import confine
from srpcd.gate import sandbox
import pyseccomp

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)

def attempt(work):
    try:
        work()
    except OSError as fault:
        return -fault.errno
    except RuntimeError as fault:  # a thread
        return str(fault)
    return "done"

def call(name, *arguments):
    number = pyseccomp.resolve_syscall(0, name) if isinstance(name, str) else name
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result

def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

directory = sys.argv[1]
"""

# What an attacker would find in the process, or would have put there: made before the sandbox.
THINGS = """
key = directory + "/key.pem"
place = directory + "/new-" + sys.argv[2]
listener = socket.create_server(("127.0.0.1", 0))
there = listener.getsockname()
client = socket.create_connection(there)
accepted, _ = listener.accept()
fresh = socket.socket()
fresh2 = socket.socket()
fresh3 = socket.socket()
own, parent = os.getpid(), os.getppid()
local, peer = socket.socketpair()
socket.send_fds(peer, [b"x"], [0])
file = os.open("/proc/self/exe", os.O_RDONLY)
memory = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
other = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
UNSPEC = struct.pack("H14x", socket.AF_UNSPEC)
unspec = ctypes.create_string_buffer(UNSPEC)
zeros = ctypes.create_string_buffer(16)
reading, writing = os.pipe()

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
"""

ATTEMPTS = {
    "open a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "open the TLS key": "os.open(key, os.O_RDONLY)",
    "open a directory": "os.listdir('/')",
    "open without reading": "os.open('/etc', os.O_PATH)",
    "make a file": "os.open(place, os.O_CREAT | os.O_WRONLY, 0o600)",
    "make a directory": "os.mkdir(place + 'd')",
    "make a pipe with a name": "os.mkfifo(place + 'p')",
    "make a link": "os.symlink('/', place + 'l')",
    "rename": "os.rename(directory + '/moved-' + sys.argv[2], place + 'r')",
    "remove": "os.unlink(directory + '/removed-' + sys.argv[2])",
    "change a mode": "os.chmod(directory, 0o755)",
    "see whether a file is there": "os.stat('/etc')",
    "look through a descriptor": "os.fstat(file)",
    "read a link": "os.readlink('/proc/self/exe')",
    "change directory": "os.chdir('/')",
    "make a socket, TCP": "socket.socket(socket.AF_INET)",
    "make a socket, UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "make a socket, Unix": "socket.socket(socket.AF_UNIX)",
    "make a socket, netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "make a pair of sockets": "socket.socketpair()",
    "connect out": "fresh.connect(there)",
    "connect by sending (TCP fast open)": "fresh2.sendto(b'x', socket.MSG_FASTOPEN, there)",
    "make a client's connection another's": "call('connect', accepted.fileno(), ctypes.addressof(unspec), 16)",
    "bind": "fresh3.bind(('127.0.0.1', 0))",
    "listen": "listener.listen(5)",
    "accept": "listener.accept()",
    "send a descriptor to a local client": "socket.send_fds(local, [b'x'], [0])",
    "take a descriptor from a local client": "socket.recv_fds(local, 10, 1)",
    "send by sendmsg": "local.sendmsg([b'x'])",
    "send by sendmmsg": "call('sendmmsg', local.fileno(), 0, 0, 0)",
    "take by recvmmsg": "call('recvmmsg', local.fileno(), 0, 0, 0, 0)",
    "set an option of a socket": "local.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)",
    "ask who is at the other end": "local.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)",
    "lock a filter on a socket": "local.setsockopt(socket.SOL_SOCKET, 44, 1)",
    "fork": "fork()",
    "start a thread": "threading.Thread(target=int).start()",
    "send a signal to itself": "os.kill(own, 0)",
    "send a signal to its parent": "os.kill(parent, 0)",
    "handle a signal": "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    "set its user ids": "os.setresuid(*os.getresuid())",
    "set its group ids": "os.setresgid(*os.getresgid())",
    "be dumpable again": "confine.prctl(4, 1)",
    "change a limit": "call('prlimit64', 0, resource.RLIMIT_CORE, ctypes.addressof(zeros), 0)",
    "change its priority": "os.setpriority(os.PRIO_PROCESS, 0, 0)",
    "choose its processors": "os.sched_setaffinity(0, os.sched_getaffinity(0))",
    "map memory executable": "mmap.mmap(-1, 4096, flags=0x22, prot=7)",
    "map memory executable, not writable": "mmap.mmap(-1, 4096, flags=0x22, prot=5)",
    "map memory shared": "mmap.mmap(-1, 4096, flags=0x21, prot=3)",
    "map a file executable": "call('mmap', 0, 4096, 5, 2, file, 0)",
    "map a file": "call('mmap', 0, 4096, 1, 2, file, 0)",
    "map over what is there": "call('mmap', address(memory), 4096, 3, 0x32, -1, 0)",
    "make memory executable": "call('mprotect', address(memory), 4096, 7)",
    "make memory writable": "call('mprotect', address(memory), 4096, 3)",
    "make memory executable by a key": "call('pkey_mprotect', address(memory), 4096, 7, -1)",
    "move memory over what is there": "call('mremap', address(memory) + 4096, 4096, 4096, 3, address(other))",
    "let what is readable be executable": "call('personality', 0x0400000 | call('personality', 0xffffffff))",
    "make a file in memory": "os.memfd_create('x')",
    "make a pipe": "os.pipe()",
    "make an event descriptor": "os.eventfd(0)",
    "duplicate a descriptor": "os.dup(0)",
    "put a descriptor at another's number": "os.dup2(0, 99)",
    "look at a descriptor's flags": "fcntl.fcntl(0, fcntl.F_GETFD)",
    "ask a terminal or a socket": "fcntl.ioctl(local, 0x541b, bytes(4))",
    "splice": "call('tee', reading, writing, 0, 0)",
    "make shared memory": "call('shmget', 0, 4096, 0o1600) and None",
    "make a message queue": "call('msgget', 0, 0o600)",
    "weaken the sandbox with another filter": "call('seccomp', 2, 0, ctypes.addressof(unspec))",
    "ask for the system's name": "os.uname()",
}
"""By what it is called: Python. In a sandbox each fails with EPERM; outside each works."""

OUTSIDE = {"send by sendmmsg": "done", "take by recvmmsg": "done", "make memory executable by a key": ("done", -22, -38)}
"""What an attempt outside gives, where that depends on the machine."""

ALL = f"""
import sys
{THINGS}
version = sandbox.enter() if sys.argv[2] == "inside" else 0
found = {{name: attempt(lambda: eval(code)) for name, code in {ATTEMPTS!r}.items()}}
os.write(1, json.dumps(found).encode())
os._exit(0)
"""

DEADLY = """
found = {}
for name in sandbox.DEADLY:
    pid = os.fork()
    if pid == 0:
        if sys.argv[2] == "inside":
            sandbox.enter()
        attempt(lambda: call(name, -1, -1, -1, -1, -1))
        os._exit(0)
    found[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(found))
"""

EVERYTHING_ELSE = """
known = {335, 336}  # x86-64's uretprobe and uprobe, which the kernel keeps from filters: good for its own trampolines only
known |= {pyseccomp.resolve_syscall(0, name) for name in [*dict(sandbox.ALLOWED), *sandbox.DEADLY]}
sandbox.enter()
found = {}
for number in range(700):
    if number not in known:
        found.setdefault(attempt(lambda: call(number, -1, -1, -1, -1, -1, -1)), []).append(number)
os.write(1, json.dumps(found).encode())
os._exit(0)
"""


def run(code: str, *arguments: str, status: int = 0) -> str:
    """What such a process prints; it ends with this status."""
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done
    return done.stdout


def results(directory: Path, side: str, code: str) -> dict[str, Any]:
    """What the attempts give, outside or inside."""
    for name in ("key.pem", f"moved-{side}", f"removed-{side}"):
        (directory / name).write_text("")
    found = json.loads(run(code, str(directory), side))
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("outside"), "outside", ALL)


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("inside"), "inside", ALL)


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {side: results(tmp_path_factory.mktemp(side), side, DEADLY) for side in ("outside", "inside")}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_a_gate_has_no_use_for_is_refused(name: str, outside: dict[str, Any], inside: dict[str, Any]) -> None:
    expected = OUTSIDE.get(name, "done")
    assert outside[name] in (expected if isinstance(expected, tuple) else (expected,))
    assert inside[name] in (-EPERM, "can't start new thread")


@pytest.mark.parametrize("name", sandbox.DEADLY)
def test_what_only_an_attacker_does_ends_the_gate(name: str, deadly: dict[str, dict[str, Any]]) -> None:
    assert deadly["outside"][name] == 0
    assert deadly["inside"][name] == -signal.SIGSYS


def test_every_other_system_call_is_refused() -> None:
    """Those of the future too: nothing that the list does not name gets through."""
    found = json.loads(run(EVERYTHING_ELSE, ""))
    assert list(found) == [str(-EPERM)], found
    assert len(found[str(-EPERM)]) > 600


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor: it has the conventions tried here")
@pytest.mark.parametrize("convention", ["x32", "i386"])
def test_a_call_by_another_convention_ends_the_gate(convention: str) -> None:
    # mov $20, %eax (getpid); int $0x80; ret
    code = """
code = mmap.mmap(-1, 4096, flags=0x22, prot=7)
code[:8] = bytes.fromhex("b814000000cd80c3")
getpid = ctypes.CFUNCTYPE(ctypes.c_int)(address(code))
convention, side = sys.argv[1:]
if side == "inside":
    sandbox.enter()
if convention == "i386":
    os._exit(0 if getpid() == os.getpid() else 1)
attempt(lambda: call(0x40000000 | 39))
os._exit(0)
"""
    run(code, convention, "outside")
    run(code, convention, "inside", status=-signal.SIGSYS)


def test_what_a_gate_works_with_goes_on() -> None:
    code = """
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if here.fileno() != sandbox.MONITOR:
    os.dup2(here.fileno(), sandbox.MONITOR)
local, peer = socket.socketpair()
from OpenSSL import rand
socket.send_fds(there, [b"m"], [0])
reading, writing = os.pipe()
import select
poll = select.epoll()
sandbox.enter()
assert peer.send(b"ab") == 2 and local.recv(9) == b"ab"
assert os.write(writing, b"c") == 1 and os.read(reading, 9) == b"c"
data, fds, _flags, _address = socket.recv_fds(socket.socket(fileno=sandbox.MONITOR), 9, 1)
assert data == b"m" and len(fds) == 1
poll.register(local, select.EPOLLIN)
assert poll.poll(0) == []
os.set_blocking(reading, False)
large = bytearray(50_000_000)
large *= 2
del large
rand.add(b"x" * 32, 32)  # makes OpenSSL ask the kernel for more
assert len(os.urandom(4)) == 4
os.close(reading)
local.shutdown(2)
print("went on")
"""
    # The interpreter's own end too: whoever leaves `main` by an exception comes there.
    assert run(code, "") == "went on\n"


# --- Landlock alone, which is the second lock behind the first ---------------------------------------------------------

BEHIND = {
    "open a file": (1, EACCES),
    "open the TLS key": (1, EACCES),
    "open a directory": (1, EACCES),
    "make a file": (1, EACCES),
    "make a directory": (1, EACCES),
    "make a pipe with a name": (1, EACCES),
    "make a link": (1, EACCES),
    "rename": (1, EACCES),
    "remove": (1, EACCES),
    "connect out": (4, EACCES),
    "send a signal to its parent": (6, EPERM),
}
"""The version since which Landlock refuses it, and how."""


@pytest.mark.parametrize("name", BEHIND)
def test_landlock_refuses_by_itself_what_its_version_knows(name: str, tmp_path: Path, outside: dict[str, Any]) -> None:
    code = f"{THINGS}\nsandbox._filter = lambda: None\nversion = sandbox._landlock_version()\n"
    code += f"version and sandbox._restrict(version)\nfound = attempt(lambda: {ATTEMPTS[name]})\n"
    found = results(tmp_path, "inside", code + "print(json.dumps({'version': version, 'found': found}))")
    since, errno = BEHIND[name]
    if found["version"] < since:
        pytest.skip(f"needs a kernel with Landlock's interface of version {since} or later")
    assert outside[name] == "done"
    assert found["found"] == -errno


@pytest.mark.parametrize(
    ("version", "files", "others"),
    [(1, 13, ()), (2, 14, ()), (3, 15, ()), (4, 15, (3,)), (5, 16, (3,)), (6, 16, (3, 3)), (99, 16, (3, 3))],
)
def test_each_version_of_landlock_is_asked_for_all_that_it_has(version: int, files: int, others: tuple[int, ...]) -> None:
    assert sandbox.handled(version) == struct.pack(f"={1 + len(others)}Q", (1 << files) - 1, *others)


# --- kernels that lack something ---------------------------------------------------------------------------------------

REFUSE = """
def refuse(errno, *names):
    lacking = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in names:
        lacking.add_rule(pyseccomp.ERRNO(errno), name)
    lacking.load()
"""


@pytest.mark.parametrize("errno", ["ENOSYS", "EOPNOTSUPP"])
def test_a_kernel_without_landlock_gets_the_other_half(errno: str) -> None:
    code = f"""
import errno
{REFUSE}
refuse(errno.{errno}, 'landlock_create_ruleset')
version = sandbox.enter()
os.write(1, repr((version, attempt(lambda: os.open('/', 0)))).encode())
"""
    assert run(code, "") == f"(0, {-EPERM})"


@pytest.mark.parametrize("call", ["landlock_create_ruleset", "landlock_restrict_self", "seccomp"])
def test_there_is_no_gate_where_the_sandbox_fails(code: Path, call: str) -> None:
    names = (call, "prctl") if call == "seccomp" else (call,)  # libseccomp falls back on prctl
    lacking = f"import sys; sys.path += sys.argv[2:]\nimport pyseccomp, runpy, os\n{REFUSE}\n"
    enter = "import sys\nfrom srpcd.gate import sandbox\nreal = sandbox._filter\n"
    enter += f"def late():\n    made = real()\n    refuse(1, *{names!r})\n    return made\nsandbox._filter = late\n"
    lacking += f"sys.path[:0] = [{str(code)!r}]\n{enter}"
    lacking += f"runpy.run_path({str(code / 'srpcd/gate/__main__.py')!r}, run_name='__main__')\n"
    (code / "lacking.py").write_text(lacking)
    (code / "lacking.py").chmod(0o644)
    world = World(code, "local", program="lacking.py")
    try:
        assert world.exit_code() == 1
        assert world.said == []
    finally:
        assert "srpcd/gate/sandbox.py" in world.close()


def test_a_second_thread_would_not_be_held() -> None:
    code = """
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
try:
    sandbox.enter()
except confine.NotConfined as fault:
    print(fault)
stop.set()
"""
    assert "second thread" in run(code, "")


# --- the gate itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(code: Path) -> Iterator[Callable[[str], World]]:
    """A gate as it is, in the real sandbox: kind."""
    worlds: list[World] = []

    def make(kind: str) -> World:
        worlds.append(World(code, kind, program="srpcd/gate/__main__.py"))
        return worlds[-1]

    yield make
    for world in worlds:
        if not world.stderr.closed:
            assert world.close() == ""


@pytest.mark.parametrize("kind", ["local", "tls"])
def test_a_gate_is_in_its_sandbox_before_it_says_that_it_serves(plain: Callable[[str], World], kind: str) -> None:
    world = plain(kind)
    (ready,) = world.heard(ipc.Ready)
    facts = dict(line.split(":\t", 1) for line in Path(f"/proc/{world.pid}/status").read_text().splitlines())
    assert facts["Seccomp"] == "2"
    assert facts["Threads"] == "1"
    assert ready.landlock == sandbox._landlock_version()
    world.connect().log_in()


def test_a_gate_can_still_say_where_its_fault_is(plain: Callable[[str], World]) -> None:
    world = plain("local")
    world.heard(ipc.Ready)
    world.monitor.send(b"\xff")
    assert world.exit_code() == 1
    said = world.close()
    assert "srpcd/gate/channel.py" in said
    assert "MessageError" in said


def test_the_strict_gate_of_the_other_tests_dies_of_a_refusal(code: Path) -> None:
    world = World(code, "local")
    world.heard(ipc.Ready)
    world.monitor.send(b"\xff")  # its fault is reported, with a look for the source file
    assert world.exit_code() == -signal.SIGSYS
    assert "MessageError" not in world.close()
