"""Plain programs: executed as the caller, once per call, within bounds, and only where nobody else could change them."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from srpcd import ipc
from srpcd.wire.limits import PAYLOAD_MAX
from tests.realm import processes

if TYPE_CHECKING:
    from tests.worker.conftest import Bench, Gate

OF_LIBC = 1 << 31 | 1 << 32
"""Signals 32 and 33 are the C library's own: its posix_spawn(3), by which make starts what it runs, ignores them."""

Program = Callable[..., str]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to whom trusted programs belong")


def failure(gate: "Gate", path: str, payload: bytes = b"", **more: Any) -> tuple[int, str]:
    """(errno, sentence) of a call that must fail."""
    try:
        gate.call(path, payload, **more)
    except Exception as fault:
        return fault.errno, fault.message  # type: ignore[attr-defined]
    raise AssertionError("the call succeeded")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ends(pid: int, seconds: float = 2.0) -> bool:
    """Whether a process ends within a time."""
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_standard_input_is_the_payload_and_standard_output_the_reply(gate: "Gate", program: Program) -> None:
    program("tools/upper", "#!/bin/sh\ntr a-z A-Z\n")
    assert gate.call("tools/upper", b"hello\0world") == b"HELLO\0WORLD"
    assert gate.call("tools/upper") == b""


def test_a_binary_is_a_program_too(tree: Path, gate: "Gate") -> None:
    shutil.copy("/bin/cat", tree / "cat")
    (tree / "cat").chmod(0o755)
    assert gate.call("cat", b"meow") == b"meow"


def test_metadata_is_not_given_to_plain_programs(gate: "Gate", program: Program) -> None:
    program("cat", "#!/bin/sh\ncat\n")
    assert gate.reply(gate.start("cat", b"payload", metadata=b'{"a":1}')) == b"\0\0\0\0payload"


def test_the_environment_is_clean_and_says_who_calls_what(gate: "Gate", program: Program) -> None:
    program("tools/env", "#!/bin/sh\ncat /proc/self/environ\n")
    found = dict(each.split("=", 1) for each in gate.call("tools/env").decode().split("\0") if each)
    found.pop("PWD", None)  # the shell's own
    found.pop("OLDPWD", None)
    found.pop("_", None)
    assert found == {
        "SRPC_ENDPOINT": "/tools/env",
        "SRPC_USER": 'some"body',
        "SRPC_PEER": "192.0.2.7:1234",
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/",
    }


def test_a_program_has_nothing_of_the_workers(gate: "Gate", program: Program) -> None:
    program(
        "look",
        "#!/usr/bin/python3 -I\n"
        "import os, signal\n"
        "paths = [f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd')]\n"
        "fds = [os.readlink(path) for path in paths if os.path.exists(path)]\n"
        "print(sorted('pipe' if each.startswith('pipe') else os.path.basename(each) for each in fds))\n"
        "status = open('/proc/self/status').read()\n"
        "print([line.split()[1] for line in status.splitlines() if line.startswith(('SigIgn', 'SigBlk'))])\n"
        "print(os.getcwd(), os.getpgid(0) == os.getpid(), os.getresuid()[0])\n",
    )
    fds, signals, rest = gate.call("look").decode().splitlines()
    # Four pipes, one of them its lifeline, through which nothing comes; and the script itself: the O_PATH descriptor that
    # was checked, and what the interpreter opened.
    assert set(eval(fds)) <= {"pipe", "look"}
    assert eval(fds).count("pipe") == 4
    # python ignores SIGPIPE (13) and SIGXFSZ (25) by itself, and nothing else is ignored
    assert [int(each, 16) & ~(1 << 12 | 1 << 24 | OF_LIBC) for each in eval(signals)] == [0, 0]
    assert rest == f"/ True {os.getuid() or 65101}"


def test_sigpipe_has_its_default_action(gate: "Gate", program: Program) -> None:
    program("pipe", "#!/bin/sh\ncat /proc/self/status | grep SigIgn\n")
    assert int(gate.call("pipe").split()[1], 16) & ~OF_LIBC == 0


def test_an_exit_status_is_an_error_with_the_end_of_standard_error(gate: "Gate", program: Program) -> None:
    program("bad", "#!/bin/sh\necho some output\necho what went wrong >&2\nexit 3\n")
    assert failure(gate, "bad") == (errno.EIO, "the program ended with status 3: what went wrong")


def test_only_the_end_of_a_long_standard_error_is_told(gate: "Gate", program: Program) -> None:
    program("bad", "#!/usr/bin/python3 -I\nimport sys\nsys.exit('x' * 300000 + 'the end')\n")
    number, message = failure(gate, "bad")
    assert number == errno.EIO
    assert message.endswith("xxxthe end")
    assert len(message.encode()) <= 4096


def test_a_program_that_is_killed_is_told_as_such(gate: "Gate", program: Program) -> None:
    program("dies", "#!/bin/sh\nkill -9 $$\n")
    number, message = failure(gate, "dies")
    assert number == errno.ECONNRESET
    assert "signal 9 (Killed)" in message


def test_a_program_need_not_read_its_input(gate: "Gate", program: Program) -> None:
    program("deaf", "#!/bin/sh\nexec <&-\necho done\n")
    assert gate.call("deaf", bytes(4 << 20)) == b"done\n"


def test_the_largest_payload_goes_both_ways(gate: "Gate", program: Program) -> None:
    program("cat", "#!/bin/sh\nexec cat\n")
    payload = os.urandom(1 << 20) * (PAYLOAD_MAX >> 20)
    assert gate.call("cat", payload, timeout=10) == payload


def test_too_much_output_ends_the_program(gate: "Gate", program: Program) -> None:
    program("endless", "#!/bin/sh\nexec cat /dev/zero\n")
    number, message = failure(gate, "endless")
    assert number == errno.EMSGSIZE
    assert str(PAYLOAD_MAX) in message


def test_the_call_ends_with_the_program_though_others_hold_its_output(gate: "Gate", program: Program) -> None:
    program("forks", "#!/bin/sh\nsleep 60 &\necho $!\n")
    begin = time.monotonic()
    child = int(gate.call("forks"))
    assert time.monotonic() - begin < 1
    assert ends(child)  # with the whole process group


def test_the_deadline_kills_the_whole_group(start: "Callable[..., Bench]", program: Program, tree: Path) -> None:
    gate = start(call_timeout=400).gate()
    program("slow", "#!/bin/sh\nsleep 60 &\necho $! >&2\nwait\n")
    assert failure(gate, "slow")[0] == errno.ETIMEDOUT
    assert not sleepers(os.getuid() or 65101)


def asleep(uid: int) -> list[processes.Process]:
    """Sleeps of this run that run now as a user."""
    found = [each for each in processes.descendants(os.getpid()) if each.uid == uid and processes.alive(each)]
    return [each for each in found if processes.status(each.pid).get("Name") == "sleep"]


def sleepers(uid: int) -> list[processes.Process]:
    """Sleeps of a user that do not end."""
    return [] if processes.until(lambda: not asleep(uid), 60) else asleep(uid)


def test_a_flush_kills_the_program(gate: "Gate", program: Program) -> None:
    program("slow", "#!/bin/sh\nexec sleep 61\n")
    tag = gate.start("slow")
    time.sleep(0.1)
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
    assert gate.outcome(tag) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 5, b"")
    assert not sleepers(os.getuid() or 65101)


def test_the_end_of_the_connection_kills_the_program(gate: "Gate", program: Program) -> None:
    program("slow", "#!/bin/sh\nexec sleep 62\n")
    gate.start("slow")
    time.sleep(0.1)
    gate.send(ipc.CLOSE, 1)
    assert gate.silent()
    assert not sleepers(os.getuid() or 65101)


@pytest.mark.parametrize("how", ["end of file", "SIGKILL"])
def test_programs_end_with_the_worker(bench: "Bench", gate: "Gate", program: Program, how: str) -> None:
    program("slow", "#!/bin/sh\nexec sleep 63\n")
    gate.start("slow")
    time.sleep(0.1)
    if how == "SIGKILL":
        bench.process.kill()
    else:
        bench.monitor.close()
    bench.process.wait(2)
    assert not sleepers(os.getuid() or 65101)


def test_what_a_program_forked_ends_with_the_worker_though_no_monitor_is_there(
    bench: "Bench", gate: "Gate", program: Program
) -> None:
    program("slow", "#!/bin/sh\ntrap '' HUP INT TERM PIPE IO\nsleep 63 &\nsleep 63\n")
    gate.start("slow")
    assert processes.until(lambda: len(asleep(os.getuid() or 65101)) == 2, 60)
    bench.process.kill()
    bench.process.wait(2)
    assert not sleepers(os.getuid() or 65101)


def test_a_program_that_reads_late_finds_all_of_a_large_payload(gate: "Gate", program: Program) -> None:
    payload = os.urandom(300_000)  # more than a pipe holds
    program("late", "#!/bin/sh\nsleep 0.2\nexec cat\n")
    assert gate.call("late", payload) == payload


def test_no_more_programs_run_than_are_allowed(start: "Callable[..., Bench]", program: Program) -> None:
    gate = start(children=2).gate()
    program("slow", "#!/bin/sh\nexec sleep 64\n")
    program("cat", "#!/bin/sh\ncat\n")
    tags = [gate.start("slow"), gate.start("slow")]
    number, message = failure(gate, "cat")
    assert (number, "2 programs" in message) == (errno.EAGAIN, True)
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tags[0]))
    assert gate.outcome(tags[0]) == errno.ECANCELED
    gate.receive()
    time.sleep(0.1)
    assert gate.call("cat", b"now") == b"now"


def test_what_can_not_be_executed_says_why(gate: "Gate", program: Program) -> None:
    program("interpreter", "#!/no/such/interpreter\n")
    program("nothing", "just text\n")
    assert failure(gate, "interpreter") == (
        errno.ENOEXEC,
        "the program can't be executed: the interpreter that its first line names does not exist",
    )
    assert failure(gate, "nothing")[0] == errno.ENOEXEC


def test_chmod_binds_at_the_next_call(tree: Path, gate: "Gate", program: Program) -> None:
    program("tools/cat", "#!/bin/sh\ncat\n")
    inode = gate.walk("tools/cat")[:2]
    assert gate.call("tools/cat", b"1", inode) == b"1"
    (tree / "tools/cat").chmod(0o644)
    assert failure(gate, "tools/cat", inode=inode)[0] == errno.EACCES
    (tree / "tools/cat").chmod(0o755)
    assert gate.call("tools/cat", b"2", inode) == b"2"
    (tree / "tools").chmod(0o600)
    assert failure(gate, "tools/cat", inode=inode)[0] == errno.EACCES
    (tree / "tools").chmod(0o755)


@needs_root
def test_who_may_not_execute_it_may_not_call_it(tree: Path, gate: "Gate", program: Program) -> None:
    program("cat", "#!/bin/sh\ncat\n", 0o750)
    assert failure(gate, "cat")[0] == errno.EACCES
    os.chown(tree / "cat", 0, 65103)  # a supplementary group of the worker's
    assert gate.call("cat", b"let in") == b"let in"


def test_another_program_at_the_path_is_stale(tree: Path, gate: "Gate", program: Program) -> None:
    program("cat", "#!/bin/sh\ncat\n")
    inode = gate.walk("cat")[:2]
    program("other", "#!/bin/sh\necho evil\n")
    os.rename(tree / "other", tree / "cat")
    assert failure(gate, "cat", inode=inode)[0] == errno.ESTALE


@pytest.mark.parametrize(
    ("spoil", "who"),
    [
        (lambda tree: (tree / "a").chmod(0o775), "/a: writable for its group (mode 0775)"),
        (lambda tree: (tree / "a/b").chmod(0o757), "/a/b: writable for others (mode 0757)"),
        (lambda tree: (tree / "a/b").chmod(0o1777), "/a/b: writable for its group and others (mode 1777)"),
        (lambda tree: (tree / "a/b/cat").chmod(0o775), "/a/b/cat: writable for its group (mode 0775)"),
        (lambda tree: (tree / "a/b/cat").chmod(0o4755), "/a/b/cat: set-user-id"),
        (lambda tree: (tree / "a/b/cat").chmod(0o2755), "/a/b/cat: set-user-id"),
        (lambda tree: tree.chmod(0o777), "/: writable"),
    ],
)
def test_a_program_that_others_could_change_is_not_executed(
    tree: Path, gate: "Gate", program: Program, spoil: Callable[[Path], None], who: str
) -> None:
    program("a/b/cat", "#!/bin/sh\ncat\n")
    assert gate.call("a/b/cat", b"x") == b"x"
    spoil(tree)
    number, message = failure(gate, "a/b/cat")
    assert number == errno.EACCES
    assert message.startswith(who)


@needs_root
@pytest.mark.parametrize("path", ["", "a", "a/cat"])
def test_a_program_that_is_not_roots_is_not_executed(tree: Path, gate: "Gate", program: Program, path: str) -> None:
    program("a/cat", "#!/bin/sh\ncat\n")
    os.chown(tree / path, 65101, -1)
    number, message = failure(gate, "a/cat")
    assert number == errno.EACCES
    assert message.startswith(f"/{path}: belongs to uid 65101, not to root")


@needs_root
def test_an_acl_that_lets_somebody_write_is_seen_by_its_mask(tree: Path, gate: "Gate", program: Program) -> None:
    program("a/cat", "#!/bin/sh\ncat\n")
    # version 2; user::rwx, user:65177:rwx, group::r-x, mask::rwx, other::r-x
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, 65177), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)]
    access = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, bits, who in entries
    )
    try:
        os.setxattr(tree / "a", "system.posix_acl_access", access)
    except OSError as fault:
        pytest.skip(f"no ACLs here: {fault}")
    number, message = failure(gate, "a/cat")
    assert number == errno.EACCES
    assert message.startswith("/a: writable for its group (mode 0775)")


def test_a_program_behind_a_symbolic_link_does_not_exist(tree: Path, gate: "Gate", program: Program) -> None:
    program("a/cat", "#!/bin/sh\ncat\n")
    (tree / "link").symlink_to("a")
    (tree / "cat").symlink_to("a/cat")
    inode = gate.walk("a/cat")[:2]
    for path in ("link/cat", "cat"):
        assert failure(gate, path, inode=inode)[0] == errno.ENOENT


@needs_root
def test_nothing_is_left_open_after_300_calls(bench: "Bench", gate: "Gate", program: Program) -> None:
    program("true", "#!/bin/sh\n")
    inode = gate.walk("true")[:2]
    gate.call("true", b"", inode)
    gate.walk("")
    before = bench.descriptors()
    for _ in range(60):
        tags = {gate.start("true", b"", inode) for _ in range(5)}
        for _ in range(5):
            kind, tag, _body = gate.receive()
            assert kind == ipc.CALLED
            tags.remove(tag)
    gate.walk("")
    assert bench.descriptors() == before
