"""One process of a bench: started as a user of the realm, told what to do, and heard within bounds of time."""

import json
import os
import select
import subprocess
import tempfile
import time
from typing import Any, Self

from tests import realm

READY_SECONDS = 60.0
"""For a start, on a machine that does other things too."""


class Broken(Exception):
    """A process of the bench did not do as it was told; the message ends with what it wrote to its standard error."""


class Missing(Exception):
    """What it needs is not installed here."""


class Program:
    """A module of `bench.programs` in one of its roles. ready: what it said of itself at the start.

    code: the directory that holds the package `bench`. user: None for whoever runs this. setup: its first line.
    Raises Missing, Broken. A context manager that ends it.
    """

    def __init__(self, code: str, module: str, role: str, user: str | None, setup: dict[str, Any]) -> None:
        self.name = f"{module} {role}"
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        start = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from bench.programs.{module} import main; main()"
        self.process = realm.popen_as(
            user,
            realm.python(start, code, role),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.fileno(),
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

    def ask(self, wanted: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Tell it a line, and return the one that it answers. timeout: seconds. Raises Broken."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it says why below
        deadline = time.monotonic() + timeout
        out = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise Broken(f"{self.name} has not answered within {timeout:.0f} s{self._said()}")
            data = os.read(out, 65536)
            if not data:
                raise Broken(f"{self.name} has ended with status {self.process.wait(5)}{self._said()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _said(self) -> str:
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
