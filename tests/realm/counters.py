"""What the kernel counts of a process: processor time, context switches, memory, and (by strace) its system calls.

None of it depends on the clock on the wall; processor time and memory still depend on the machine.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.realm import processes

_CPUCLOCK_SCHED = 2
_TICKS = os.sysconf("SC_CLK_TCK")
ATTACH_SECONDS = 10.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, its ended threads included, to the nanosecond. Raises OSError where it is gone."""
    return time.clock_gettime((~pid) << 3 | _CPUCLOCK_SCHED)  # clock_getcpuclockid(3) makes the number so


class Times(NamedTuple):
    """Seconds of processor time. waited: for a processor, while there was something to do."""

    user: float
    system: float
    waited: float


def times(pid: int) -> Times:
    """How a process's processor time divides; user and system are exact in their sum only, the kernel samples which it is.

    Raises OSError where it is gone.
    """
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    waited = sum(int(Path(task, "schedstat").read_bytes().split()[1]) for task in _tasks(pid))
    return Times(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS, waited / 1e9)


class Switches(NamedTuple):
    """Context switches. voluntary: it had to wait. forced: another process was given the processor."""

    voluntary: int
    forced: int


def switches(pid: int) -> Switches:
    """Of all threads of a process that still run. Raises OSError where it is gone."""
    voluntary = forced = 0
    for task in _tasks(pid):
        for line in Path(task, "status").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            voluntary += int(value) if name == "voluntary_ctxt_switches" else 0
            forced += int(value) if name == "nonvoluntary_ctxt_switches" else 0
    return Switches(voluntary, forced)


def _tasks(pid: int) -> list[str]:
    return [f"/proc/{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")]


def pss(pid: int) -> float:
    """MB (10^6 bytes) of proportional set size. Raises PermissionError: only root may look at an undumpable process."""
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") * 1024 / 1e6


class Peak:
    """The most memory (resident) that a process has from here on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def megabytes(self) -> float:
        """MB (10^6 bytes)."""
        return _kilobytes(f"/proc/{self._pid}/status", "VmHWM") * 1024 / 1e6


def _kilobytes(file: str, field: str) -> int:
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"{file} has no {field}")


def untraceable() -> str:
    """Why system calls can't be counted here; empty where they can."""
    if not shutil.which("strace"):
        return "needs strace"
    if os.geteuid() != 0:
        return "needs root: the daemon's processes are undumpable, and nobody else may trace them"
    return ""


class SystemCalls:
    """Counts system calls by strace(1) while the context lasts. After it, `counts`: by name of process, by system call.

    pids: by any name. Raises RuntimeError where a process can't be traced.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._tracers: dict[str, subprocess.Popen[bytes]] = {}
        self._directory = Path(tempfile.mkdtemp(prefix="strace-"))
        self.counts: dict[str, Counter[str]] = {}

    def __enter__(self) -> Self:
        try:
            for name, pid in self._pids.items():
                command = ["strace", "-f", "-c", "-o", str(self._directory / name), "-p", str(pid)]
                with (self._directory / f"{name}.said").open("wb") as said:
                    self._tracers[name] = processes.popen_as(None, command, stderr=said.fileno())
            for name, pid in self._pids.items():
                if not processes.until(lambda pid=pid: processes.status(pid).get("TracerPid", "0") != "0", ATTACH_SECONDS):  # type: ignore[misc]
                    said_ = (self._directory / f"{name}.said").read_text(errors="replace")
                    raise RuntimeError(f"strace does not attach to {name}, process {pid}: {said_}")
            time.sleep(0.05)  # the other threads of each
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for tracer in self._tracers.values():
            tracer.send_signal(signal.SIGINT)
        for name, tracer in self._tracers.items():
            try:
                tracer.wait(ATTACH_SECONDS)
            finally:
                processes.finish(tracer)
            self.counts[name] = _summary(self._directory / name)
        shutil.rmtree(self._directory, ignore_errors=True)


def _summary(file: Path) -> Counter[str]:
    """The table that `strace -c` writes: % time, seconds, usecs/call, calls, errors (or blank), syscall."""
    found: Counter[str] = Counter()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        words = line.split()
        if len(words) in (5, 6) and words[3].isdigit() and words[-1] != "total":
            found[words[-1]] += int(words[3])
    return found
