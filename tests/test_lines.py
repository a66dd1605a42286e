"""Lines as the monitor makes them: who can connect one, what it is told, and what is left."""

import asyncio
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from errno import EACCES, EAGAIN, ECONNREFUSED, EMFILE, ENOENT
from pathlib import Path

import pytest

from srpcd.monitor.lines import Announcement, Endpoint, Line, Register
from srpcd.wire import frames
from srpcd.wire.limits import LINE_CONNECT_SECONDS

SERVICE, OTHER = 61234, 61235
"""Uids that no account has."""

NOBODY = -1


class Lines:
    """A register with an endpoint and its server. uid: of the service. came: what came of each line that was connected."""

    def __init__(self, directory: Path, uid: int) -> None:
        os.mkfifo(directory / "echo")
        self.uid = uid
        self.directory = directory / "lines"
        self.came: list[int] = []
        self.register: Register[str] = Register(str(self.directory), os.getuid(), False, self._connected)
        chain = [os.open(directory / name, os.O_PATH) for name in (".", "echo")]
        endpoint = self.register.endpoint("echo", chain, os.getuid())
        assert endpoint is not None
        self.endpoint: Endpoint[str] = endpoint
        self.server = Announcement(1, uid, lambda _line: None, lambda: None)

    def _connected(self, number: int, line: Line[str], fd: int) -> None:
        assert self.register.lines[number] is line
        self.came.append(fd)

    def make(self, worker: str = "worker") -> Path:
        """A line: its socket."""
        number = self.register.make_line(self.endpoint, self.server, worker, (20_000, 20_000, (), "", "alice"))
        return self.directory / str(self.uid) / str(number)

    async def after(self, count: int) -> None:
        """Wait until so many lines were connected."""
        async with asyncio.timeout(10):
            while len(self.came) < count:
                await asyncio.sleep(0.001)

    def names(self) -> list[str]:
        """Of the lines that can be connected."""
        return [path.name for path in self.directory.glob("*/*")]

    def close(self) -> None:
        for fd in [*self.endpoint.chain, *(fd for fd in self.came if fd != NOBODY)]:
            os.close(fd)
        self.register.close()


@pytest.fixture
async def lines(tmp_path: Path) -> AsyncIterator[Lines]:
    """Of a service of this process's own uid."""
    made = Lines(tmp_path, os.getuid())
    yield made
    made.close()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def errno_as(uid: int, work: Callable[[], object]) -> int:
    """The errno of something that a process of another user does; 0 if it goes through."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            status = 0
        except OSError as fault:
            status = fault.errno or 255
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_the_first_frame_says_who_calls_and_the_monitor_keeps_nothing(lines: Lines) -> None:
    path, before = lines.make(), len(os.listdir("/proc/self/fd"))
    assert lines.names() == [path.name]
    with connect(path) as service:
        await lines.after(1)
        first = service.recv(4096)
        kind, seq, length = frames.HEADER.unpack_from(first)
        assert (kind, seq, length) == (frames.CALLER, 0, len(first) - frames.HEADER.size)
        assert b'"user":"alice"' in first
        assert lines.names() == []
        assert lines.endpoint.had("worker")
        assert len(os.listdir("/proc/self/fd")) == before + 1  # the listening socket is gone; these are the line's two ends
        os.close(lines.came.pop())
        assert service.recv(1) == b""


@pytest.mark.needs_root
async def test_a_line_is_connected_by_its_service_alone() -> None:
    directory = Path(tempfile.mkdtemp(prefix="srpc-lines-"))
    directory.chmod(0o755)
    lines = Lines(directory, SERVICE)
    try:
        path = lines.make()
        attempts: list[Callable[[], object]] = [
            lambda: connect(path),
            lambda: os.listdir(path.parent),
            lambda: os.stat(path),
            lambda: os.unlink(path),
            lambda: socket.socket(socket.AF_UNIX).bind(str(path.parent / "99")),
        ]
        assert [errno_as(OTHER, each) for each in attempts] == [EACCES] * 5
        assert [errno_as(SERVICE, each) for each in attempts[1:2] + attempts[3:]] == [EACCES] * 3
        with connect(path) as root:  # can go anywhere, and is not the service
            while True:
                await asyncio.sleep(0.001)
                try:
                    assert root.recv(1, socket.MSG_DONTWAIT) == b""
                    break
                except BlockingIOError:
                    continue
        assert lines.came == []
        assert not lines.endpoint.had("worker")

        def serve() -> None:
            with connect(path) as sock:
                if b'"user":"alice"' not in sock.recv(4096):
                    raise PermissionError(EACCES, "no first frame")

        assert await asyncio.to_thread(errno_as, SERVICE, serve) == 0
        await lines.after(1)
        assert lines.came[0] != NOBODY
    finally:
        lines.close()
        shutil.rmtree(directory)


async def test_a_line_is_connected_once(lines: Lines) -> None:
    path = lines.make()
    with connect(path) as first, socket.socket(socket.AF_UNIX) as second:
        second.setblocking(False)
        with pytest.raises(BlockingIOError) as full:
            second.connect(str(path))
        assert full.value.errno == EAGAIN
        await lines.after(1)
        assert first.recv(4096)
        with pytest.raises(FileNotFoundError):
            connect(path)
    assert len(lines.came) == 1


async def test_who_has_looked_the_socket_up_before_finds_nobody_there_afterwards(lines: Lines) -> None:
    path = lines.make()
    held = os.open(path, os.O_PATH)
    try:
        with connect(path):
            await lines.after(1)
            with pytest.raises(ConnectionRefusedError) as caught:
                connect(Path(f"/proc/self/fd/{held}"))
            assert caught.value.errno == ECONNREFUSED
    finally:
        os.close(held)


@pytest.mark.parametrize("how", [socket.SHUT_RD, None])
async def test_a_service_that_takes_no_first_frame_gets_no_line(lines: Lines, how: int | None) -> None:
    path = lines.make()
    with connect(path) as service:
        if how is None:
            service.close()
        else:
            service.shutdown(how)
        await lines.after(1)
    assert lines.came == [NOBODY]
    assert lines.names() == []
    assert not lines.endpoint.had("worker")


async def test_a_line_that_no_service_connects_ends(lines: Lines) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first = int(lines.make("one").name)
    second = int(lines.make("two").name)
    now = time.monotonic()
    assert lines.register.late(now) == []
    assert lines.register.late(now + LINE_CONNECT_SECONDS) == [first, second]
    path = lines.directory / str(lines.uid)
    for number in (first, second):
        assert lines.register.end_line(number) is not None
        with pytest.raises(FileNotFoundError) as caught:  # also where the worker has died
            connect(path / str(number))
        assert caught.value.errno == ENOENT
    assert lines.register.late(now + LINE_CONNECT_SECONDS) == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert lines.endpoint.lines == {}


async def test_a_line_that_was_connected_is_not_late(lines: Lines) -> None:
    with connect(lines.make()):
        await lines.after(1)
        assert lines.register.late(time.monotonic() + LINE_CONNECT_SECONDS) == []


async def test_the_sockets_that_wait_for_one_service_are_bounded(lines: Lines) -> None:
    lines.register._room = 4 * 10
    made: list[Path] = []

    def make_many() -> None:
        while len(made) < 100:
            made.append(lines.make(f"worker {len(made)}"))

    with pytest.raises(OSError, match="too many lines") as caught:
        make_many()
    assert caught.value.errno == EMFILE
    assert 5 < len(made) < 15  # the endpoint's own descriptors count too
    with connect(made[0]):
        await lines.after(1)
    lines.make("another")  # there is room again


async def test_what_a_service_sends_before_it_is_accepted_carries_no_descriptor(lines: Lines) -> None:
    with connect(lines.make()) as service:
        try:
            socket.send_fds(service, [b"x"], [0])
        except PermissionError:
            refused = True
        else:
            refused = False
        await lines.after(1)
        before = len(os.listdir("/proc/self/fd"))
        with socket.socket(fileno=os.dup(lines.came[0])) as worker:
            if refused:
                with pytest.raises(BlockingIOError):
                    worker.recv(1)
            else:  # before Linux 6.16
                worker.recv(1)
                assert len(os.listdir("/proc/self/fd")) == before + 1


async def test_names_that_a_crash_left_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "lines" / "0" / "7"
    left.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(left))
    lines = Lines(tmp_path, os.getuid())
    assert list(lines.directory.rglob("*")) == []
    lines.close()
    assert not lines.directory.exists()
