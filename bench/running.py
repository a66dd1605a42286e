"""One process of a bench: started as a user of the realm, told what to do, and heard within bounds of time."""

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Self

from tests import realm

READY_SECONDS = 60.0
"""For a start, on a machine that does other things too."""

ANSWER_SECONDS = 60.0
"""Beyond a sample's own time, after which a caller counts as stuck."""


class Broken(Exception):
    """A process of the bench did not do as it was told; the message ends with what it wrote to its standard error.

    about: a name to look for in logs.
    """

    def __init__(self, message: str, about: str = "") -> None:
        super().__init__(message)
        self.about = about


class Missing(Exception):
    """What it needs is not installed here."""


def python(code: str, module: str, role: str) -> list[str]:
    """The command of a module of `bench.programs` in one of its roles. code: the directory that holds `bench`."""
    start = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from bench.programs.{module} import main; main()"
    return realm.python(start, code, role)


class Program:
    """A process that is told what to do as `bench.programs.driver` says. ready: what it said of itself at the start.

    name: for messages. user: None for whoever runs this. setup: its first line. Raises Missing, Broken. A context manager
    that ends it.
    """

    def __init__(self, name: str, command: Sequence[str], user: str | None, setup: dict[str, Any]) -> None:
        self.name = name
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self.process = realm.popen_as(
            user, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors.fileno()
        )
        try:
            said = self.ask(setup, READY_SECONDS)
        except BaseException:
            self.end()
            raise
        if "missing" in said:
            self.end()
            raise Missing(said["missing"])
        self.ready: dict[str, Any] = said["ready"]

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def sample(self, inflight: int, size: int, seconds: float) -> dict[str, Any]:
        """Let a caller call; see `bench.programs.driver`. Raises Broken."""
        wanted = {"inflight": inflight, "size": size, "seconds": seconds}  # in this order: the C programs read it so
        return self.ask(wanted, 2 * seconds + ANSWER_SECONDS)

    def ask(self, wanted: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Tell it a line, and return the one that it answers. timeout: seconds. Raises Broken."""
        self.tell(wanted)
        return self.answer(timeout)

    def tell(self, wanted: dict[str, Any]) -> None:
        """Tell it a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why

    def answer(self, timeout: float) -> dict[str, Any]:
        """The line that it answers. timeout: seconds. Raises Broken."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        out = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise Broken(f"{self.name} has not answered within {timeout:.0f} s{self.said()}")
            data = os.read(out, 65536)
            if not data:
                raise Broken(f"{self.name} has ended with status {self.process.wait(5)}{self.said()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def said(self) -> str:
        """What it wrote to its standard error, as the end of a message; empty where that is nothing."""
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace").strip()
        return f"; it said:\n{text[-3000:]}" if text else ""

    def end(self) -> None:
        """End it: by the end of file, else by signals."""
        if self.process.stdin and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        realm.finish(self.process)
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.end()
