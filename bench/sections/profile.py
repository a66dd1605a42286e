"""Where a call's time goes: hop by hop, in user code and in the kernel, in system calls and context switches."""

import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from bench import plan
from bench.plan import Contender, Extent, Workload
from bench.results import Grid, Section
from bench.rounds import Progress
from bench.running import Program
from bench.stage import Stage
from tests.realm.counters import SystemCalls, cpu_seconds, switches, times, untraceable

SECONDS = 3.0
"""Of one sample: the kernel divides user from system time by looking 100 times a second."""

TRACED = 0.5
"""Of one sample under strace, which makes each system call many times slower."""

FREQUENCY = 5000
"""Samples per second and core."""

LIBRARIES = (
    ("kernel", ("[kernel", "[guest.kernel", "[unknown")),
    ("OpenSSL", ("_rust.abi3", "libssl", "libcrypto")),
    ("ctypes", ("libffi", "_ctypes", "_cffi")),
    ("C library", ("libc.so", "libc-", "ld-linux", "libm.", "[vdso", "libpthread")),
    ("Python", ("python", "libpython", "msgspec", ".cpython")),
)
"""Where samples fall, by parts of the name of the mapped file; cryptography carries its OpenSSL in `_rust`."""


def run(stage: Stage, extent: Extent, section: Section, progress: Progress) -> None:
    """The call path of `blocking.dial` over TLS to `blocking.serve`, one call at a time and 64 in flight."""
    for workload in (plan.ONE, plan.MANY):
        _workload(stage, plan.BLOCKING, workload, section, progress)


def _workload(stage: Stage, contender: Contender, workload: Workload, section: Section, progress: Progress) -> None:
    caller = stage.caller(contender)
    caller.sample(workload.inflight, workload.size, 0.2)
    parties = stage.parties(contender)
    progress(f"profile, {workload.name}: processor time")
    spent = _time(caller, workload, parties, section)
    reason = untraceable()
    if reason:
        section.missing["system calls"] = reason
    else:
        progress(f"profile, {workload.name}: system calls")
        _calls(caller, workload, parties, section)
    if shutil.which("perf"):
        progress(f"profile, {workload.name}: samples")
        _samples(caller, workload, parties, spent, section)
    else:
        section.missing["where the samples fall"] = "needs perf: apt-get install linux-perf"


def _time(caller: Program, workload: Workload, parties: dict[str, int], section: Section) -> Grid:
    before = {name: (times(pid), cpu_seconds(pid), switches(pid)) for name, pid in parties.items()}
    answer = caller.sample(workload.inflight, workload.size, SECONDS)
    calls = answer["all"]
    grid = section.grid(
        f"hops, {workload.name}",
        f"Processor time and waiting, {workload.name}",
        "µs per call",
        label="process",
        note=f"A call took {answer['elapsed'] / answer['calls'] * 1e6:.1f} µs. `waited`: ready to run, for a core. What is "
        "left of a lone call are wake-ups.",
    )
    turns = section.grid(
        f"switches, {workload.name}",
        f"Context switches, {workload.name}",
        "per call",
        label="process",
        note="`waited`: had nothing to do. `forced`: had to make room for another process.",
    )
    for name, pid in parties.items():
        was, used, turned = before[name]
        now, spent, after = times(pid), (cpu_seconds(pid) - used) * 1e6 / calls, switches(pid)
        ticks = now.user - was.user + now.system - was.system
        user = (now.user - was.user) / ticks if ticks else 0.0
        grid.add(name, "user code", spent * user)
        grid.add(name, "kernel", spent * (1 - user) if ticks else 0.0)
        grid.add(name, "in all", spent)
        grid.add(name, "waited", (now.waited - was.waited) * 1e6 / calls)
        turns.add(name, "waited", (after.voluntary - turned.voluntary) / calls)
        turns.add(name, "forced", (after.forced - turned.forced) / calls)
    for column in ("user code", "kernel", "in all"):
        grid.add("all", column, sum(grid.values(name, column)[0] for name in parties))
    return grid


def _calls(caller: Program, workload: Workload, parties: dict[str, int], section: Section) -> None:
    with SystemCalls(parties) as traced:
        calls = caller.sample(workload.inflight, workload.size, TRACED)["all"]
    grid = section.grid(
        f"system calls, {workload.name}",
        f"System calls, {workload.name}",
        "per call",
        label="process",
        note="Counted by strace, which slows everybody down: with many in flight the batches differ a little from others.",
    )
    for name, counts in traced.counts.items():
        grid.add(name, "in all", sum(counts.values()) / calls)
        for system_call, count in counts.most_common():
            if count / calls >= 0.005:
                grid.add(name, system_call, count / calls)


def _samples(caller: Program, workload: Workload, parties: dict[str, int], spent: Grid, section: Section) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = str(Path(directory, "perf.data"))
        wanted = ",".join(str(pid) for pid in parties.values())
        record = [
            "perf",
            "record",
            "-q",
            "-e",
            "cpu-clock",
            "-F",
            str(FREQUENCY),
            "-o",
            file,
            "-p",
            wanted,
            "--",
            "sleep",
            "60",
        ]
        with subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as recording:
            caller.sample(workload.inflight, workload.size, SECONDS)
            recording.terminate()
            _out, said = recording.communicate(timeout=30)
        script = ["perf", "script", "-i", file, "-F", "pid,ip,dso"]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
    if not done.stdout:
        section.missing["where the samples fall"] = f"perf can't sample here: {(said.decode() + done.stderr).strip()[-200:]}"
        return
    names = {str(pid): name for name, pid in parties.items()}
    found: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        pid, _, rest = line.strip().partition(" ")
        if pid in names:
            found.setdefault(names[pid], Counter())[_library(rest.rpartition("(")[2].rstrip(")"))] += 1
    grid = section.grid(
        f"samples, {workload.name}",
        f"What the processor time is for, {workload.name}",
        "µs per call",
        label="process",
        note="By perf, by the file that the code belongs to: the processor time measured above, divided as the samples are.",
    )
    for name, counts in found.items():
        in_all = spent.median(name, "in all") or 0.0
        for library, _parts in LIBRARIES:
            grid.add(name, library, in_all * counts[library] / counts.total())
        grid.add(name, "other", in_all * counts["other"] / counts.total())


def _library(file: str) -> str:
    name = file.rpartition("/")[2]
    return next((library for library, parts in LIBRARIES if any(part in name for part in parts)), "other")
