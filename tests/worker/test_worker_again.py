"""What was called before: each further call is checked in a shorter way, which has to see all that the first one sees."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc
from srpcd.wire import frames
from srpcd.worker.loop import Loop
from srpcd.worker.resolve import ROOT_SECONDS, Tree
from tests.worker.conftest import call_body

if TYPE_CHECKING:
    from tests.worker.conftest import Bench, Gate, Handler

OWN = 0o622 if os.geteuid() == 0 else 0o600
PATH = "a/b/echo"

Inode = tuple[int, int]
Served = tuple[Inode, "Handler"]


_readers: list[int] = []


def read(pipe: Path) -> None:
    """Hold a pipe open for reading until the test is over, as who serves it does."""
    _readers.append(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))


@pytest.fixture(autouse=True)
def readers() -> Iterator[None]:
    """Those of `read` end with the test."""
    yield
    while _readers:
        os.close(_readers.pop())


@pytest.fixture
def served(bench: "Bench", gate: "Gate") -> Served:
    """A pipe that somebody reads. It has been called twice."""
    (bench.tree / "a/b").mkdir(parents=True)
    inode, handler = bench.announced(gate, PATH)
    read(bench.tree / PATH)
    call(gate, inode, handler)
    return inode, handler


def call(gate: "Gate", inode: Inode, handler: "Handler") -> None:
    """A call that is answered."""
    tag = gate.start(PATH, b"again", inode)
    seq, payload = handler.request()
    handler.reply(seq, payload)
    assert gate.reply(tag) == b"\0\0\0\0again"


def no_permission(tree: Path) -> None:
    (tree / PATH).chmod(0o400)


def closed_above(tree: Path) -> None:
    (tree / "a").chmod(0)


def gone(tree: Path) -> None:
    (tree / PATH).rename(tree / "elsewhere")


def another_pipe(tree: Path) -> None:
    gone(tree)
    os.mkfifo(tree / PATH)
    (tree / PATH).chmod(0o666)


def another_pipe_that_is_read(tree: Path) -> None:
    another_pipe(tree)
    read(tree / PATH)


def a_program(tree: Path) -> None:
    gone(tree)
    (tree / PATH).write_text("kept")
    (tree / PATH).chmod(0o777)


def a_file(tree: Path) -> None:
    a_program(tree)
    (tree / PATH).chmod(0o666)


def a_link_to_it(tree: Path) -> None:
    gone(tree)
    (tree / PATH).symlink_to(tree / "elsewhere")


def a_link_on_the_way(tree: Path) -> None:
    (tree / "a").rename(tree / "other")
    (tree / "a").symlink_to("other")


def a_directory(tree: Path) -> None:
    gone(tree)
    (tree / PATH).mkdir()


CHANGES: dict[Callable[[Path], None], int] = {
    no_permission: errno.EACCES,
    closed_above: errno.EACCES,
    gone: errno.ENOENT,
    another_pipe: errno.ESTALE,
    another_pipe_that_is_read: errno.ESTALE,
    a_program: errno.ESTALE,
    a_file: errno.ENOENT,
    a_link_to_it: errno.ENOENT,
    a_link_on_the_way: errno.ENOENT,
    a_directory: errno.ESTALE,
}


@pytest.mark.parametrize(("change", "refusal"), CHANGES.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_change_binds_at_the_next_call(
    bench: "Bench", gate: "Gate", served: Served, change: Callable[[Path], None], refusal: int
) -> None:
    inode, handler = served
    change(bench.tree)
    for _ in range(2):
        assert gate.outcome(gate.start(PATH, b"", inode)) == refusal
    assert handler.silent(0.02)


def test_what_is_permitted_again_is_delivered_again(bench: "Bench", gate: "Gate", served: Served) -> None:
    inode, handler = served
    for _ in range(3):
        no_permission(bench.tree)
        assert gate.outcome(gate.start(PATH, b"", inode)) == errno.EACCES
        (bench.tree / PATH).chmod(OWN)
        call(gate, inode, handler)
        call(gate, inode, handler)


def test_nothing_is_left_open(bench: "Bench", gate: "Gate", served: Served) -> None:
    inode, handler = served
    before = bench.descriptors()
    for _ in range(5):
        call(gate, inode, handler)
    no_permission(bench.tree)
    assert gate.outcome(gate.start(PATH, b"", inode)) == errno.EACCES
    assert bench.descriptors() == before


def test_nothing_is_left_open_by_calls_on_many_endpoints_that_come_together(bench: "Bench", gate: "Gate") -> None:
    served = {}
    for number in range(100):  # more than may wait for being closed
        name = f"echo{number}"
        served[name] = bench.announced(gate, name)
        read(bench.tree / name)
    before = bench.descriptors()
    bodies = [call_body(name, *inode, b"all") for name, (inode, _handler) in served.items()]
    gate.send_raw(b"".join(frames.frame(ipc.CALL, 10_000 + tag, body) for tag, body in enumerate(bodies)))
    for _inode, handler in served.values():
        seq, payload = handler.request()
        handler.reply(seq, payload)
    assert {gate.receive()[:2] for _ in bodies} == {(ipc.CALLED, 10_000 + tag) for tag in range(100)}
    assert bench.descriptors() == before


def test_only_so_many_descriptors_wait_for_being_closed() -> None:
    loop = Loop()
    opened = [os.open("/", os.O_PATH) for _ in range(70)]
    for fd in opened:
        loop.close_later(fd)
    assert [is_open(fd) for fd in opened] == [True] * 64 + [False] * 6
    loop.turn()
    loop._alarm.close()
    assert not any(map(is_open, opened))


def is_open(fd: int) -> bool:
    """Whether it is a descriptor of this process."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- one look-up -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tree: Path) -> Iterator[tuple[Tree, Inode]]:
    """A tree with a pipe that somebody reads, and that pipe's device and inode."""
    (tree / "a/b").mkdir(parents=True)
    os.mkfifo(tree / PATH)
    read(tree / PATH)
    found = (tree / PATH).stat()
    looked = Tree(str(tree))
    yield looked, (found.st_dev, found.st_ino)
    ipc.close_all([fd for fd in (looked._root, looked._descriptors) if fd >= 0])


def test_the_pipe_of_the_fid_may_be_written(place: tuple[Tree, Inode]) -> None:
    looked, (dev, ino) = place
    assert looked.may_write(PATH.encode(), dev, ino)
    assert not looked.may_write(PATH.encode(), dev + 1, ino)
    assert not looked.may_write(PATH.encode(), dev, ino + 1)


@pytest.mark.parametrize("change", [each for each in CHANGES if each not in (no_permission, closed_above)])
def test_after_a_change_it_may_not(place: tuple[Tree, Inode], tree: Path, change: Callable[[Path], None]) -> None:
    looked, inode = place
    change(tree)
    assert not looked.may_write(PATH.encode(), *inode)


def test_another_file_with_its_number_is_not_the_pipe(place: tuple[Tree, Inode], tree: Path) -> None:
    looked, _inode = place
    a_file(tree)
    found = (tree / PATH).stat()
    assert not looked.may_write(PATH.encode(), found.st_dev, found.st_ino)
    assert (tree / PATH).read_text() == "kept"


def test_a_tree_that_is_gone_has_no_pipe(place: tuple[Tree, Inode], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, inode = place
    assert looked.may_write(PATH.encode(), *inode)
    tree.rename(tree.with_name(tree.name + "-away"))
    now = looked._looked + ROOT_SECONDS
    monkeypatch.setattr("srpcd.worker.resolve.monotonic", lambda: now)
    try:
        assert not looked.may_write(PATH.encode(), *inode)
    finally:
        tree.with_name(tree.name + "-away").rename(tree)
