"""Resident programs: the handler's code on standard input and output, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from errno import ECANCELED, EIO, ENOENT
from pathlib import Path
from typing import Any

import pytest

from srpcd.wire import frames, messages

ALICE = frames.frame(frames.CALLER, 0, messages.encode(messages.Caller(1001, 1001, [], "alice", None, "/calc/add")))


def call(seq: int, payload: bytes = b"") -> bytes:
    return frames.frame(frames.CALL, seq, messages.call_body(0, payload))


class Program:
    """A resident program, as a worker starts it."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd="/"
        )
        self.reader = frames.FrameReader(frames.LINE_REPLIES)
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.order: list[int] = []

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self.process.stdin.write(view) :]

    def answer(self, seq: int) -> tuple[int, bytes]:
        assert self.process.stdout is not None
        while seq not in self.answers:
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, self.process.communicate()[1]
            for kind, answered, body in self.reader.feed(data):
                self.answers[answered] = kind, body
                self.order.append(answered)
        return self.answers[seq]

    def reply(self, seq: int) -> bytes:
        kind, body = self.answer(seq)
        assert kind == frames.CALL_REPLY, body
        return messages.split_call_reply(body)[0]

    def error(self, seq: int) -> messages.Error:
        kind, body = self.answer(seq)
        assert kind == frames.ERROR
        return messages.decode(messages.Error, body)

    def finish(self) -> tuple[int, str]:
        """Close its input; (exit status, standard error)."""
        _, said = self.process.communicate(timeout=5)
        return self.process.returncode, said.decode()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """Writes a program whose handler is given, and starts it."""
    made: list[Program] = []

    def start(code: str, tail: str = "serve_stdio(handler)") -> Program:
        path = tmp_path / f"program{len(made)}"
        head = f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        imports = "from srpc_client import CallError\nfrom srpc_client.stdio import serve_stdio\n"
        path.write_text(f"{head}{imports}{textwrap.dedent(code)}\n{tail}\n")
        path.chmod(0o755)
        made.append(Program(path))
        return made[-1]

    yield start
    for program in made:
        program.process.kill()
        for stream in (program.process.stdin, program.process.stdout, program.process.stderr):
            assert stream is not None
            stream.close()
        program.process.wait()


ADD = """
def handler(request):
    return str(sum(map(int, request.payload.split()))).encode()
"""

SLOW_ADD = """
import asyncio
async def handler(request):
    await asyncio.sleep(0.01)
    return str(sum(map(int, request.payload.split()))).encode()
"""


@pytest.mark.parametrize("code", [ADD, SLOW_ADD], ids=["synchronous", "asynchronous"])
def test_a_program_answers_and_ends_with_its_input(start: Callable[[str], Program], code: str) -> None:
    program = start(code)
    program.write(ALICE + b"".join(call(seq, b"%d 1" % seq) for seq in range(1, 301)))
    for seq in range(1, 301):
        assert program.reply(seq) == b"%d" % (seq + 1)
    program.write(call(301, b"1 2"))
    assert program.reply(301) == b"3"
    assert program.finish() == (0, "")


ECHO = """
def handler(request):
    return request.payload
"""

SLOW_ECHO = """
import asyncio
async def handler(request):
    await asyncio.sleep(0)
    return request.payload
"""


@pytest.mark.parametrize("code", [ECHO, SLOW_ECHO], ids=["synchronous", "asynchronous"])
def test_large_payloads_and_small_ones_come_back(start: Callable[[str], Program], code: str) -> None:
    program = start(code)
    payload = bytes(range(251)) * 40_000
    program.write(ALICE)
    for seq in range(1, 7, 2):
        program.write(call(seq, payload) + call(seq + 1, b"small"))
        assert program.reply(seq) == payload
        assert program.reply(seq + 1) == b"small"


def test_a_handler_knows_its_caller(start: Callable[[str], Program]) -> None:
    program = start(
        "def handler(request):\n    return f'{request.caller.user} {request.caller.uid} {request.caller.endpoint}'.encode()"
    )
    program.write(ALICE + call(1))
    assert program.reply(1) == b"alice 1001 /calc/add"


def test_printing_does_not_break_a_frame_and_reading_does_not_eat_one(start: Callable[[str], Program]) -> None:
    program = start(
        """
        import os, subprocess
        def handler(request):
            print("debug")
            os.write(1, b"raw")
            subprocess.run(["/bin/cat"], check=True)
            subprocess.run(["/bin/echo", "child"], check=True)
            return b"fine"
        """
    )
    program.write(ALICE + call(1) + call(2))
    assert program.reply(1) == program.reply(2) == b"fine"
    status, said = program.finish()
    assert status == 0
    assert said.count("raw") == said.count("child") == said.count("debug") == 2


def test_errors_are_the_callers_and_tracebacks_are_not(start: Callable[[str], Program]) -> None:
    program = start(
        f"""
        def handler(request):
            if request.payload == b"mine":
                raise CallError({ENOENT}, "no such number")
            raise ValueError("the password is hunter2")
        """
    )
    program.write(ALICE + call(1, b"mine") + call(2, b"bug"))
    assert (program.error(1).errno, program.error(1).message) == (ENOENT, "no such number")
    assert program.error(2).errno == EIO
    assert "hunter2" not in program.error(2).message
    status, said = program.finish()
    assert status == 0
    assert "hunter2" in said
    assert "Traceback" in said


def test_asynchronous_calls_run_concurrently_and_are_cancelled(start: Callable[[str], Program]) -> None:
    program = start(
        """
        import asyncio
        async def handler(request):
            await asyncio.sleep(60 if request.payload == b"slow" else 0)
            return request.payload
        """
    )
    program.write(ALICE + call(1, b"slow") + call(2, b"quick"))
    assert program.reply(2) == b"quick"
    program.write(frames.frame(frames.FLUSH, 0, frames.SEQ.pack(1)))
    assert program.error(1).errno == ECANCELED
    program.write(call(3, b"slow"))
    assert program.finish()[0] == 0  # though one is still at it


def test_a_call_that_is_cancelled_before_its_turn_is_not_made(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start(
        f"""
        def handler(request):
            open({str(tmp_path / "made")!r}, "a").write(request.payload.decode())
            return b""
        """
    )
    program.write(ALICE + call(1, b"a") + call(2, b"b") + frames.frame(frames.FLUSH, 0, frames.SEQ.pack(2)))
    assert program.reply(1) == b""
    assert program.error(2).errno == ECANCELED
    assert (tmp_path / "made").read_text() == "a"


def test_a_slow_handler_does_not_keep_the_replies_before_it(start: Callable[[str], Program]) -> None:
    program = start("import time\ndef handler(request):\n    time.sleep(float(request.payload))\n    return b''")
    program.write(ALICE + call(1, b"0.01") + call(2, b"30"))
    begun = time.monotonic()
    program.reply(1)
    assert time.monotonic() - begun < 10


def test_the_largest_replies_go_through(start: Callable[[str], Program]) -> None:
    program = start("def handler(request):\n    return request.payload * 2")
    payload = os.urandom(4 * 1024 * 1024)
    program.write(ALICE + call(1, payload))
    assert program.reply(1) == payload * 2


@pytest.mark.parametrize("code", [ADD, SLOW_ADD], ids=["synchronous", "asynchronous"])
def test_a_worker_that_goes_away_ends_the_program(start: Callable[[str], Program], code: str) -> None:
    program = start(code)
    program.write(ALICE + call(1, b"1 2"))
    assert program.reply(1) == b"3"
    assert program.process.stdout is not None
    program.process.stdout.close()
    program.write(call(2, b"1 2"))
    assert program.process.wait(5) == 0


def test_a_person_who_starts_it_by_hand_is_told_what_it_is(start: Callable[[str], Program]) -> None:
    program = start(ADD)
    program.write(b"what do you do, little program?")
    status, said = program.process.wait(5), ""
    assert program.process.stderr is not None
    said = program.process.stderr.read().decode()
    assert status == 1
    assert "started by srpcd" in said
    assert "Traceback" not in said


def _fast_enough(measure: Any) -> bool:
    return any(measure() for _ in range(3))


def test_it_starts_quickly(start: Callable[[str], Program]) -> None:
    def measure() -> bool:
        begun = time.monotonic()
        program = start(ADD)
        program.write(ALICE + call(1, b"1 2"))
        program.reply(1)
        return time.monotonic() - begun < 0.5

    assert _fast_enough(measure)
