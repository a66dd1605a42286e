"""Resident programs: started at the first call, kept, and ended when idle, changed or broken."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc

if TYPE_CHECKING:
    from tests.worker.conftest import Bench, Failed, Gate

Program = Callable[..., str]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look at the worker's descriptors")

HEAD = """#!/usr/bin/python3 -I
import os, struct, sys, time
HEADER = struct.Struct("!iQQ")
def read(size):
    data = b""
    while len(data) < size:
        more = os.read(0, min(size - len(data), 65536))
        if not more:
            sys.exit(0)
        data += more
    return data
def frame():
    kind, seq, size = HEADER.unpack(read(20))
    return kind, seq, read(size)
def write(kind, seq, body):
    data = HEADER.pack(kind, seq, len(body)) + body
    while data:
        data = data[os.write(1, data):]
kind, seq, caller = frame()
assert (kind, seq) == (-2, 0)
"""

ECHO = (
    HEAD
    + """
while True:
    kind, seq, body = frame()
    if kind != 13:
        continue
    assert body[:8] == bytes(8)
    payload = body[12:]
    if payload == b"caller":
        payload = caller
    elif payload == b"pid":
        payload = str(os.getpid()).encode()
    elif payload == b"environment":
        payload = " ".join(sorted(os.environ)).encode()
    elif payload == b"hang":
        continue
    elif payload == b"error":
        write(-1, seq, b"handler's own")
        continue
    elif payload == b"nonsense":
        os.write(1, b"this is no frame, is it?")
    elif payload == b"exit":
        os.write(2, b"last words")
        sys.exit(3)
    write(14, seq, bytes(4) + payload)
"""
)


@pytest.fixture
def echo(program: Program) -> str:
    """The path of an echo program."""
    return program("kept/echo", ECHO, 0o1755)


def failure(gate: "Gate", path: str, payload: bytes) -> tuple[int, str]:
    """(errno, sentence) of a call that must fail."""
    try:
        gate.call(path, payload)
    except Exception as fault:
        return fault.errno, fault.message  # type: ignore[attr-defined]
    raise AssertionError("the call succeeded")


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within a time (if its parent died too, it may stay as a zombie)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_one_process_answers_all_calls(gate: "Gate", echo: str) -> None:
    assert gate.call(echo, b"hello") == b"hello"
    assert gate.call(echo, b"pid") == gate.call(echo, b"pid")


def test_its_first_frame_says_who_calls(bench: "Bench", gate: "Gate", echo: str) -> None:
    told = json.loads(gate.call(echo, b"caller"))
    assert told["uid"] == bench.uid
    assert told["user"] == 'some"body'
    assert told["context"] is None
    assert told["endpoint"] == "/kept/echo"
    assert set(told) == {"uid", "gid", "groups", "user", "context", "endpoint"}


def test_its_environment_names_no_peer(gate: "Gate", echo: str) -> None:
    assert gate.call(echo, b"environment") == b"HOME LANG PATH SRPC_ENDPOINT SRPC_USER"


def test_its_own_error_goes_through_unread(gate: "Gate", echo: str) -> None:
    try:
        gate.call(echo, b"error")
    except Exception as fault:
        failed: Failed = fault  # type: ignore[assignment]
        assert (failed.errno, failed.body) == (errno.EIO, b"handler's own")


def test_the_largest_payload_goes_both_ways(gate: "Gate", echo: str) -> None:
    payload = os.urandom(1 << 20) * 16
    assert gate.call(echo, payload, timeout=20) == payload


def test_many_calls_at_once_are_all_answered(gate: "Gate", echo: str) -> None:
    inode = gate.walk(echo)[:2]
    tags = [gate.start(echo, str(number).encode(), inode) for number in range(300)]
    assert [gate.reply(tag)[4:] for tag in tags] == [str(number).encode() for number in range(300)]


def test_killed_it_fails_its_calls_once_and_the_next_call_starts_another(gate: "Gate", echo: str) -> None:
    pid = int(gate.call(echo, b"pid"))
    tags = {gate.start(echo, b"hang"), gate.start(echo, b"hang")}
    gate.call(echo, b"there")
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        kind, tag, body = gate.receive()
        assert kind == ipc.WORKER_ERROR
        assert ipc.ERROR_HEAD.unpack_from(body)[0] == errno.ECONNRESET
        assert b"signal 9" in body
        tags.remove(tag)
    assert gate.silent()
    assert int(gate.call(echo, b"pid")) != pid


def test_what_it_said_when_it_died_at_its_start_is_told(gate: "Gate", program: Program) -> None:
    program("broken", "#!/bin/sh\necho cannot find my data >&2\nexit 4\n", 0o1755)
    number, message = failure(gate, "broken", b"")
    assert number == errno.ECONNRESET
    assert message.startswith("the program ended with status 4: cannot find my data")


def test_one_that_can_not_be_executed_says_why(gate: "Gate", program: Program) -> None:
    program("broken", "#!/no/such/interpreter\n", 0o1755)
    assert failure(gate, "broken", b"")[0] == errno.ENOEXEC


def test_one_that_breaks_the_protocol_is_killed(gate: "Gate", echo: str) -> None:
    pid = int(gate.call(echo, b"pid"))
    number, message = failure(gate, echo, b"nonsense")
    assert number == errno.ECONNRESET
    assert "broke the protocol" in message
    assert gone(pid, 2)


def test_a_change_of_the_file_starts_a_new_process_and_the_old_one_finishes(
    tree: Path, gate: "Gate", program: Program
) -> None:
    slow = HEAD + "while True:\n    kind, seq, body = frame()\n    time.sleep(0.4)\n    write(14, seq, bytes(4) + b'old')\n"
    path = program("kept", slow, 0o1755)
    inode = gate.walk(path)[:2]
    tag = gate.start(path, b"", inode)
    time.sleep(0.15)
    (tree / path).write_text(ECHO)  # in place: the same inode
    (tree / path).chmod(0o1755)
    other = gate.start(path, b"new", inode)
    answers = {}
    for _ in range(2):
        _kind, seq, body = gate.receive()
        answers[seq] = body[4:]
    assert answers == {tag: b"old", other: b"new"}


def test_it_ends_when_nobody_has_called_it_for_a_while(start: "Callable[..., Bench]", program: Program) -> None:
    gate = start(resident_idle=300).gate()
    path = program("echo", ECHO, 0o1755)
    pid = int(gate.call(path, b"pid"))
    assert not gone(pid, 0.2)
    assert int(gate.call(path, b"pid")) == pid
    assert gone(pid, 1)
    assert int(gate.call(path, b"pid")) != pid


def test_one_that_does_not_end_by_itself_is_killed(start: "Callable[..., Bench]", program: Program) -> None:
    gate = start(resident_idle=100).gate()
    stubborn = ECHO.replace("sys.exit(0)", "time.sleep(60)")
    pid = int(gate.call(program("echo", stubborn, 0o1755), b"pid"))
    assert not gone(pid, 1)
    assert gone(pid, 2.5)


def test_it_ends_with_the_worker(bench: "Bench", gate: "Gate", echo: str) -> None:
    pid = int(gate.call(echo, b"pid"))
    bench.process.kill()
    bench.process.wait()
    assert gone(pid, 2)


def test_a_call_can_be_flushed_and_the_process_stays(gate: "Gate", echo: str) -> None:
    pid = int(gate.call(echo, b"pid"))
    tag = gate.start(echo, b"hang")
    gate.send(ipc.FLUSH, 5, ipc.FLUSH_BODY.pack(tag))
    assert gate.outcome(tag) == errno.ECANCELED
    assert gate.receive() == (ipc.FLUSHED, 5, b"")
    assert int(gate.call(echo, b"pid")) == pid


def test_permission_is_asked_of_the_kernel_at_each_call(tree: Path, gate: "Gate", echo: str) -> None:
    inode = gate.walk(echo)[:2]
    gate.call(echo, b"")
    (tree / echo).chmod(0o1644)
    assert gate.outcome(gate.start(echo, b"", inode)) == errno.EACCES
    (tree / echo).chmod(0o1755)
    gate.call(echo, b"", inode)
    (tree / "kept").chmod(0o1757)
    assert failure(gate, echo, b"")[0] == errno.EACCES
    (tree / "kept").chmod(0o755)


def test_another_file_at_its_path_is_stale(tree: Path, gate: "Gate", echo: str) -> None:
    inode = gate.walk(echo)[:2]
    gate.call(echo, b"")
    kept = (tree / echo).rename(tree / "elsewhere")
    assert gate.outcome(gate.start(echo, b"", inode)) == errno.ENOENT
    (tree / echo).write_text(ECHO)
    (tree / echo).chmod(0o1777)  # nor may anybody else have written it; but it is another one first
    assert gate.outcome(gate.start(echo, b"", inode)) == errno.ESTALE
    (tree / echo).unlink()
    (tree / echo).mkdir()
    assert gate.outcome(gate.start(echo, b"", inode)) == errno.ESTALE
    (tree / echo).rmdir()
    kept.rename(tree / echo)
    gate.call(echo, b"", inode)


def test_idle_residents_make_room_for_others(start: "Callable[..., Bench]", program: Program) -> None:
    gate = start(children=1).gate()
    gate.call(program("echo", ECHO, 0o1755), b"")
    program("cat", "#!/bin/sh\ncat\n")
    assert failure(gate, "cat", b"")[0] == errno.EAGAIN
    time.sleep(0.2)
    assert gate.call("cat", b"now") == b"now"


@needs_root
def test_nothing_is_left_open_after_many_restarts(bench: "Bench", gate: "Gate", echo: str) -> None:
    inode = gate.walk(echo)[:2]
    before = bench.descriptors()
    for _ in range(20):
        assert gate.outcome(gate.start(echo, b"exit", inode)) == errno.ECONNRESET
    gate.walk("")
    assert bench.descriptors() == before
