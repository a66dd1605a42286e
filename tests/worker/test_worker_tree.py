"""Walk and stat: the kernel decides, whole path by whole path."""

import errno
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.worker.conftest import Bench, Gate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def failure(action: "Callable[[], object]") -> int:
    """Errno that the worker answers with."""
    try:
        action()
    except Exception as fault:
        number: int = fault.errno  # type: ignore[attr-defined]
        return number
    return 0


def test_directories_pipes_and_programs_are_found_with_their_inode(tree: Path, gate: "Gate") -> None:
    (tree / "calc").mkdir()
    os.mkfifo(tree / "calc/add")
    (tree / "wc").write_text("")
    (tree / "wc").chmod(0o755)
    (tree / "kept").write_text("")
    (tree / "kept").chmod(0o1755)
    for path, kind in (("", 0), ("calc", 0), ("calc/add", ipc.SERVICE), ("wc", ipc.PROGRAM), ("kept", ipc.RESIDENT)):
        found = (tree / path).stat()
        assert gate.walk(path) == (found.st_dev, found.st_ino, kind)


def test_what_is_no_endpoint_does_not_exist(tree: Path, gate: "Gate") -> None:
    (tree / "plain").write_text("not executable")
    (tree / "real").mkdir()
    (tree / "real/in").mkdir()
    (tree / "link").symlink_to("real")
    (tree / "out").symlink_to("/etc")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    for path in ("plain", "link", "link/in", "out", "out/passwd", "socket", "absent"):
        assert failure(lambda path=path: gate.walk(path)) == errno.ENOENT, path  # type: ignore[misc]
    assert gate.stat("").children == ("real",)


@needs_root
def test_devices_and_other_file_systems_do_not_exist(tree: Path, gate: "Gate") -> None:
    os.mknod(tree / "null", 0o20777, os.makedev(1, 3))
    (tree / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", tree / "mounted"], check=True)
    try:
        assert failure(lambda: gate.walk("null")) == errno.ENOENT
        assert failure(lambda: gate.walk("mounted")) == errno.ENOENT
        assert failure(lambda: gate.walk("mounted/x")) == errno.ENOENT
    finally:
        subprocess.run(["umount", tree / "mounted"], check=True)


@pytest.mark.parametrize("path", ["..", ".hidden", "a/..", "a//b", "/a", "a/", "a/.b", "a\0b"])
def test_a_path_that_no_client_can_have_named_is_invalid(gate: "Gate", path: str) -> None:
    assert failure(lambda: gate.walk(path)) == errno.EINVAL


@needs_root
def test_a_directory_that_is_closed_is_closed_at_the_next_walk(tree: Path, gate: "Gate") -> None:
    (tree / "a/b/c").mkdir(parents=True)
    gate.walk("a/b/c")
    (tree / "a").chmod(0o700)
    assert failure(lambda: gate.walk("a/b/c")) == errno.EACCES
    (tree / "a").chmod(0o755)
    gate.walk("a/b/c")


def test_a_symbolic_link_swapped_in_during_walks_is_never_followed(tree: Path, gate: "Gate") -> None:
    (tree / "a").mkdir()
    (tree / "a/x").mkdir()
    inside = (tree / "a/x").stat().st_ino
    (tree / "a_real").mkdir()
    (tree / "evil").symlink_to("/etc")
    os.rename(tree / "a", tree / "b")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(tree / "b", tree / "a")
            os.rename(tree / "a", tree / "b")
            os.rename(tree / "evil", tree / "a")
            os.rename(tree / "a", tree / "evil")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        failures, found = set(), set()
        for _ in range(1500):
            number = failure(lambda: found.add(gate.walk("a/x")[1]))
            failures.add(number)
        assert found <= {inside}
        assert failures <= {0, errno.ENOENT}
    finally:
        stop.set()
        thread.join()


def test_a_tree_that_is_replaced_is_found_within_a_second_or_so(tree: Path, gate: "Gate") -> None:
    (tree / "old").mkdir()
    gate.walk("old")
    aside = tree.with_name(tree.name + "-aside")
    os.rename(tree, aside)
    tree.mkdir(mode=0o755)
    tree.chmod(0o755)
    (tree / "new").mkdir()
    try:
        time.sleep(1.1)
        gate.walk("new")
        assert failure(lambda: gate.walk("old")) == errno.ENOENT
    finally:
        os.rmdir(aside / "old")
        os.rmdir(aside)


def test_stat_tells_what_ls_would(tree: Path, gate: "Gate") -> None:
    (tree / "d").mkdir()
    (tree / "d").chmod(0o755)
    os.mkfifo(tree / "d/pipe")
    (tree / "d/sub").mkdir()
    (tree / "d/run").write_text("")
    (tree / "d/run").chmod(0o710)
    (tree / "d/.dot").mkdir()
    (tree / "d/text").write_text("")
    os.mkdir(os.fsencode(tree / "d") + b"/\xff\xfe")
    found = gate.stat("d")
    real = (tree / "d").stat()
    assert found.children == ("pipe", "run", "sub")
    assert (found.mode, found.uid, found.gid, found.mtime) == (0o755, real.st_uid, real.st_gid, real.st_mtime_ns)
    assert (found.live, found.readable, found.more) == (True, True, False)
    try:
        assert found.user == (tree / "d").owner()
    except KeyError:
        assert found.user == str(real.st_uid)
    assert gate.stat("d/run").mode == 0o710


def test_a_time_that_no_message_can_hold_is_told_as_the_latest(tree: Path, gate: "Gate") -> None:
    """Whoever owns a file in the tree sets its time; the workers of those who look at it must not end by that."""
    (tree / "d").mkdir()
    for late in (10**20, -(10**18)):  # tmpfs and Btrfs keep the first as it is, others cut it
        os.utime(tree / "d", ns=(late, late))
        assert gate.stat("d").mtime == (2**63 - 1 if late > 0 else 0)


def test_a_user_without_a_name_is_told_by_number(tree: Path, gate: "Gate") -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tree / "d").mkdir()
    os.chown(tree / "d", 65177, 65178)
    found = gate.stat("d")
    assert (found.user, found.group) == ("65177", "65178")


@needs_root
def test_a_directory_that_may_not_be_read_has_no_children_and_says_so(tree: Path, gate: "Gate") -> None:
    (tree / "d/e").mkdir(parents=True)
    assert gate.stat("d").children == ("e",)
    (tree / "d").chmod(0o711)
    found = gate.stat("d")
    assert (found.readable, found.children) == (False, ())
    gate.walk("d/e")


@needs_root
def test_stat_tells_the_label_that_a_file_has_if_any(tree: Path, gate: "Gate") -> None:
    (tree / "d").mkdir()
    assert gate.stat("").context == "" or Path("/sys/fs/selinux/enforce").exists()
    label = "system_u:object_r:srpc_tree_t:s0:c1"
    try:
        os.setxattr(tree / "d", "security.selinux", label.encode() + b"\0")
    except OSError:
        pytest.skip("needs a file system for temporary files that keeps labels, and a policy that knows this one")
    assert gate.stat("d").context == label


def test_stat_of_another_file_than_the_fids_is_stale(tree: Path, gate: "Gate") -> None:
    (tree / "d").mkdir()
    dev, ino, _kind = gate.walk("d")
    (tree / "d").rename(tree / "e")
    (tree / "d").mkdir()
    assert failure(lambda: gate.stat("d", inode=(dev, ino))) == errno.ESTALE


def test_whether_a_service_is_live_is_asked_of_the_monitor(tree: Path, bench: "Bench", gate: "Gate") -> None:
    os.mkfifo(tree / "echo")
    dev, ino, _kind = gate.walk("echo")
    for live in (True, False):
        gate.send(ipc.STAT, 7, ipc.STAT_HEAD.pack(dev, ino, 10, 0) + b"echo")
        asked = bench.told()
        assert isinstance(asked, ipc.IsLive)
        assert (asked.dev, asked.ino) == (dev, ino)
        bench.send(ipc.Live(asked.request, live))
        found = ipc.Message.unpack(gate.reply(7))
        assert isinstance(found, ipc.Stat)
        assert found.live is live


def test_a_service_is_not_live_if_the_monitor_does_not_answer(tree: Path, gate: "Gate") -> None:
    os.mkfifo(tree / "echo")
    begin = time.monotonic()
    assert gate.stat("echo").live is False
    assert 0.9 < time.monotonic() - begin < 1.5


def test_a_stat_that_waits_for_the_monitor_can_be_flushed(tree: Path, gate: "Gate") -> None:
    os.mkfifo(tree / "echo")
    dev, ino, _kind = gate.walk("echo")
    gate.send(ipc.STAT, 7, ipc.STAT_HEAD.pack(dev, ino, 10, 0) + b"echo")
    gate.send(ipc.FLUSH, 8, ipc.FLUSH_BODY.pack(7))
    assert gate.outcome(7) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 8, b"")


def test_names_come_in_pages_sorted_by_their_bytes(tree: Path, gate: "Gate") -> None:
    names = ["Z", "a", "b", "zz", "ä", "漢", "😀"]
    for name in names:
        (tree / name).mkdir()
    got: list[str] = []
    while True:
        page = gate.stat("", after=got[-1] if got else "", limit=2)
        got += page.children
        if not page.more:
            break
    assert got == sorted(names, key=str.encode)


def test_a_name_that_is_new_in_a_directory_just_listed_is_not_missed(tree: Path, gate: "Gate") -> None:
    for number in range(50):
        (tree / f"d{number:03}").mkdir()
        assert len(gate.stat("").children) == number + 1


def test_paging_through_100000_names_is_cheap(tree: Path, gate: "Gate") -> None:
    big = tree / "big"
    big.mkdir()
    directory = os.open(big, os.O_RDONLY)
    for number in range(100_000):
        if number % 50_000 == 0:  # a file has 65,000 links at most
            source = f"f{number}"
            os.close(os.open(source, os.O_CREAT | os.O_WRONLY, 0o755, dir_fd=directory))
        else:
            os.link(source, f"f{number}", src_dir_fd=directory, dst_dir_fd=directory)
    os.close(directory)
    time.sleep(0.15)  # so that the listing is not taken for one that may still change
    begin = time.monotonic()
    count, after = 0, ""
    while True:
        page = gate.stat("big", after=after)
        count += len(page.children)
        if not page.more:
            break
        after = page.children[-1]
    assert count == 100_000
    assert time.monotonic() - begin < 2.5
