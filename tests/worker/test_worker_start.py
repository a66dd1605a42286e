"""How a worker starts, what it is then, and how it ends."""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpcd import ipc

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop to another user and to look at him")

HEAVY = {
    "asyncio",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "json",
    "logging",
    "msgspec",
    "re",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "typing",
}


def test_a_worker_imports_nothing_heavy(code: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(code)!r}); import srpcd.worker.__main__, srpcd.worker.serve;"
        "print(*sys.modules, sep='\\n')"
    )
    loaded = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert not HEAVY & set(loaded.split())


@needs_root
def test_a_worker_is_undumpable_and_who_it_was_told_to_be(bench: "Bench") -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{bench.process.pid}/status").read_text().splitlines() if "\t" in line
    )
    assert set(status["Uid"].split()) == {str(bench.uid)}
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    # The kernel gives /proc/PID/mem of a process that is not dumpable to root.
    assert Path(f"/proc/{bench.process.pid}/mem").stat().st_uid == 0


@needs_root
def test_a_worker_that_is_not_who_it_was_told_to_be_ends_before_it_serves(
    tree: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.worker import conftest  # noqa: PLC0415

    monkeypatch.setattr(conftest, "GROUP", 65199)
    bench = conftest.Bench(tree, code)
    try:
        assert ipc.receive_request(bench.monitor) is None
    except BlockingIOError:
        pass
    bench.close()


def test_end_of_file_from_the_monitor_ends_the_worker(bench: "Bench") -> None:
    bench.monitor.close()
    assert bench.process.wait(2) == 0
