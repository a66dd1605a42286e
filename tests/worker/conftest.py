"""A worker as a real process, with a monitor and a gate played by the test over real pipes, on a real tree.

As root the worker is dropped to a uid of its own (no such account is needed); as an ordinary user it is in personal mode.
"""

import ctypes
import errno
import fcntl
import os
import select
import shutil
import socket
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import srpcd
from srpcd import ipc
from srpcd.wire import frames

UID, GID, GROUP, UNUSED_GID = 65101, 65102, 65103, 65104
ROOT = os.geteuid() == 0
PYTHON = "/usr/bin/python3"
CODE = Path(srpcd.__file__).parent


def readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


class Frames:
    """Frames over two blocking descriptors."""

    def __init__(self, read: int, write: int, limits: dict[int, int]) -> None:
        self.fds = [read, write]
        self.limits = limits
        self._reader = frames.FrameReader(limits)
        self._ready: list[tuple[int, int, bytes]] = []

    def send(self, kind: int, seq: int, body: bytes = b"") -> None:
        self.send_raw(frames.frame(kind, seq, body))

    def send_raw(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fds[1], view) :]

    def receive(self, timeout: float = 5.0) -> tuple[int, int, bytes]:
        """The next frame. Raises TimeoutError, EOFError."""
        end = time.monotonic() + timeout
        while not self._ready:
            if not readable(self.fds[0], max(0.0, end - time.monotonic())):
                raise TimeoutError("no frame came")
            data = os.read(self.fds[0], 65536)
            if not data:
                raise EOFError
            self._ready += self._reader.feed(data)
        return self._ready.pop(0)

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes."""
        try:
            self._ready.insert(0, self.receive(seconds))
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Failed(Exception):
    """The worker answered with an error. body: the handler's own, or None."""

    def __init__(self, number: int, message: str, body: bytes | None) -> None:
        super().__init__(f"{errno.errorcode.get(number)}: {message}")
        self.errno = number
        self.message = message
        self.body = body


def result(kind: int, body: bytes) -> bytes:
    """A reply's body. Raises Failed."""
    if kind != ipc.WORKER_ERROR:
        return body
    number, origin = ipc.ERROR_HEAD.unpack_from(body)
    rest = body[ipc.ERROR_HEAD.size :]
    if origin == ipc.ORIGIN_HANDLER:
        raise Failed(number, "", rest)
    raise Failed(number, rest.decode(), None)


class Gate(Frames):
    """The test as a gate, with connection 1 open."""

    def __init__(self, read: int, write: int) -> None:
        super().__init__(read, write, ipc.FROM_WORKER)
        self.tag = 100
        self.send(ipc.OPEN, 1, b"192.0.2.7:1234")

    def request(self, kind: int, body: bytes, timeout: float = 5.0) -> bytes:
        self.tag += 1
        self.send(kind, self.tag, body)
        return self.reply(self.tag, timeout)

    def reply(self, tag: int, timeout: float = 5.0) -> bytes:
        """The reply that comes next, which must be that to `tag`."""
        answer, seq, body = self.receive(timeout)
        assert seq == tag
        return result(answer, body)

    def walk(self, path: str) -> tuple[int, int, int]:
        dev, ino, kind = ipc.WALKED_BODY.unpack(self.request(ipc.WALK, path.encode()))
        return dev, ino, kind

    def stat(self, path: str, after: str = "", limit: int = 1000, inode: tuple[int, int] | None = None) -> ipc.Stat:
        dev, ino = inode or self.walk(path)[:2]
        name = after.encode()
        body = ipc.STAT_HEAD.pack(dev, ino, limit, len(name)) + name + path.encode()
        found = ipc.Message.unpack(self.request(ipc.STAT, body))
        assert isinstance(found, ipc.Stat)
        return found

    def start(self, path: str, payload: bytes = b"", inode: tuple[int, int] | None = None, metadata: bytes = b"") -> int:
        """Send a call; returns its tag."""
        dev, ino = inode or self.walk(path)[:2]
        self.tag += 1
        self.send(ipc.CALL, self.tag, call_body(path, dev, ino, payload, metadata))
        return self.tag

    def call(self, path: str, payload: bytes = b"", inode: tuple[int, int] | None = None, timeout: float = 5.0) -> bytes:
        """A call, from walk to payload."""
        body = self.reply(self.start(path, payload, inode), timeout)
        assert body[:4] == b"\0\0\0\0"
        return body[4:]

    def outcome(self, tag: int, timeout: float = 5.0) -> int:
        """Errno with which a call ended, 0 for an answer."""
        try:
            self.reply(tag, timeout)
        except Failed as fault:
            return fault.errno
        return 0


def call_body(path: str, dev: int, ino: int, payload: bytes = b"", metadata: bytes = b"", conn: int = 1) -> bytes:
    name = path.encode()
    head = ipc.CALL_HEAD.pack(conn, dev, ino, len(name)) + name
    return head + frames.METADATA_LENGTH.pack(len(metadata)) + metadata + payload


class Handler(Frames):
    """The test as a service, at its end of a line."""

    def __init__(self, number: int, read: int, write: int) -> None:
        super().__init__(read, write, frames.LINE_REQUESTS)
        self.number = number

    def request(self, timeout: float = 5.0) -> tuple[int, bytes]:
        """The next call: (seq, payload)."""
        kind, seq, body = self.receive(timeout)
        assert kind == frames.CALL
        fid, metadata = frames.CALL_HEAD.unpack_from(body)
        assert fid == 0
        return seq, body[12 + metadata :]

    def reply(self, seq: int, payload: bytes) -> None:
        self.send(frames.CALL_REPLY, seq, b"\0\0\0\0" + payload)


class Bench:
    """One worker, its monitor, and one gate. tree: the endpoints."""

    def __init__(self, tree: Path, code: Path, **setup: int) -> None:
        self.tree = tree
        self.python = PYTHON
        self.monitor, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors, errors = os.pipe()
        self.peers: list[Frames] = []
        self.lines = 0
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (theirs.fileno(),)]
        script = code / "srpcd/worker/__main__.py"
        self.process = subprocess.Popen(
            [PYTHON, "-I", "-S", script, "somebody"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            close_fds=False,  # 3 is made by `drop`; all others are close-on-exec
            preexec_fn=lambda: drop(high),
        )
        self.started = (
            time.monotonic()
        )  # of the exec: how long a process as large as pytest takes to fork is not of interest
        for fd in (*high, errors):
            os.close(fd)
        theirs.close()
        self.uid = UID if ROOT else os.getuid()
        self.send(
            ipc.WorkerSetup(
                self.uid,
                GID if ROOT else os.getgid(),
                (GROUP,) if ROOT else tuple(os.getgroups()),
                "",
                not ROOT,
                os.getpid(),
                'some"body',
                str(tree),
                "/usr/bin:/bin",
                setup.get("call_timeout", 10_000),
                setup.get("children", 8),
                setup.get("resident_idle", 60_000),
            )
        )

    def send(self, message: ipc.Message, *fds: int) -> None:
        """As the monitor; the descriptors are closed here."""
        ipc.send_descriptors(self.monitor, message, fds)
        ipc.close_all(fds)

    def wait_for_reading(self, timeout: float = 5.0) -> None:
        """Wait until the worker has taken all that was sent. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while fcntl.ioctl(self.monitor, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            if time.monotonic() > end:
                raise TimeoutError("the worker reads nothing")
            time.sleep(0.001)

    def told(self, timeout: float = 5.0) -> ipc.Message:
        """What the worker tells the monitor next."""
        if not readable(self.monitor.fileno(), timeout):
            raise TimeoutError("the worker says nothing")
        message = ipc.receive_request(self.monitor)
        assert message is not None, self.standard_error()
        return message

    def standard_error(self) -> str:
        return os.read(self.errors, 65536).decode() if readable(self.errors, 0.1) else ""

    def gate(self) -> Gate:
        """Another gate."""
        here, there = ipc.socket_pair(socket.SOCK_STREAM)
        here.setblocking(True)
        self.send(ipc.Gate(len(self.peers) + 1), there.detach())
        fd = here.detach()
        gate = Gate(fd, os.dup(fd))
        self.peers.append(gate)
        return gate

    def line(self, inode: tuple[int, int]) -> Handler:
        """A new line for an endpoint, as the monitor makes it."""
        self.lines += 1
        ours, theirs = socket.socketpair()
        self.send(ipc.LineExpected(self.lines, *inode))
        self.send(ipc.Line(self.lines), theirs.detach())
        handler = Handler(self.lines, ours.fileno(), os.dup(ours.detach()))
        self.peers.append(handler)
        return handler

    def announced(self, gate: Gate, path: str = "echo") -> tuple[tuple[int, int], Handler]:
        """A pipe in the tree with somebody serving it, and a line to him that has carried a call."""
        pipe = self.tree / path
        if not pipe.exists():
            os.mkfifo(pipe)
            pipe.chmod(0o622 if ROOT else 0o600)
        dev, ino, kind = gate.walk(path)
        assert kind == ipc.SERVICE
        tag = gate.start(path, b"first", (dev, ino))
        assert self.told() == ipc.LinesWanted(path, dev, ino)
        handler = self.line((dev, ino))
        self.send(ipc.Lines(dev, ino, 0))
        seq, payload = handler.request()
        assert payload == b"first"
        handler.reply(seq, b"reply")
        assert gate.reply(tag) == b"\0\0\0\0reply"
        return (dev, ino), handler

    def descriptors(self) -> list[str]:
        """What the worker has open (root may look, though it is undumpable)."""
        directory = f"/proc/{self.process.pid}/fd"
        return sorted(os.readlink(f"{directory}/{fd}").partition(":")[0] for fd in os.listdir(directory))

    def close(self) -> None:
        self.monitor.close()
        try:
            self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.errors)
            for peer in self.peers:
                peer.close()


def drop(high: list[int]) -> None:
    """What the monitor does before the exec."""
    os.dup2(high[0], 3)
    libc = ctypes.CDLL(None, use_errno=True)
    if ROOT:
        for capability in range(64):
            libc.prctl(24, capability, 0, 0, 0)
        os.setgroups([GROUP])
        os.setresgid(GID, UNUSED_GID, GID)  # see srpcd.monitor.launch.become
        os.setresuid(UID, UID, UID)
    libc.prctl(38, 1, 0, 0, 0)


@pytest.fixture(scope="session")
def code() -> Iterator[Path]:
    """The worker's code where other users can read it, compiled."""
    base = Path(tempfile.mkdtemp(prefix="srpc-worker-code-"))
    base.chmod(0o755)
    modules = ("__init__.py", "alarm.py", "confine.py", "ipc.py", "libc.py", "openat2.py", "passing.py")
    for source in (*modules, "wire", "worker"):
        target = base / "srpcd" / source
        if (CODE / source).is_dir():
            shutil.copytree(CODE / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(CODE / source, target)
    for path in (base, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    subprocess.run([PYTHON, "-I", "-m", "compileall", "-q", base], check=True)
    yield base
    shutil.rmtree(base)


@pytest.fixture
def tree() -> Iterator[Path]:
    """An empty tree that the worker's user may search and read."""
    base = Path(tempfile.mkdtemp(prefix="srpc-worker-tree-"))
    base.chmod(0o755)
    yield base
    subprocess.run(["rm", "-rf", base], check=True)


@pytest.fixture
def start(tree: Path, code: Path) -> Iterator[Callable[..., Bench]]:
    """Start a worker: keyword arguments replace fields of WorkerSetup."""
    started: list[Bench] = []

    def begin(**setup: int) -> Bench:
        bench = Bench(tree, code, **setup)
        started.append(bench)
        assert bench.told() == ipc.Proved(), bench.standard_error()
        return bench

    yield begin
    for bench in started:
        bench.close()


@pytest.fixture
def bench(start: Callable[..., Bench]) -> Bench:
    """A worker that has proved its drop."""
    return start()


@pytest.fixture
def gate(bench: Bench) -> Gate:
    """The bench's gate."""
    return bench.gate()


@pytest.fixture
def program(tree: Path) -> Callable[..., str]:
    """Put a program into the tree; returns its path there."""

    def install(path: str, text: str, mode: int = 0o755) -> str:
        file = tree / path
        for parent in reversed(file.relative_to(tree).parents[:-1]):
            (tree / parent).mkdir(exist_ok=True)
            (tree / parent).chmod(0o755)
        file.write_text(text)
        file.chmod(mode)
        return path

    return install
