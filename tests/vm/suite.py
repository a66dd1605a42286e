"""`make test-vm`: the tests that run inside, each part in a machine of its own; results and logs come back."""

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm import image, machine, states

RESULTS = image.CACHE / "results"
INSIDE = "/root/srpc"
"""Where the tests lie in the machine: laid out as the checkout, without the product's code."""
TREES = ("tests", "docs", "systemd", "policy")
FILES = ("pyproject.toml", "README.md")
PRODUCT = "/usr/lib/srpc/lib/python3.11/site-packages"
"""Where the package puts the product's modules, and those that they need."""

PACE = 10
"""How many times longer than usual things may take (see tests/realm/processes.py)."""

LINGER = "test_a_service_can_not_delay_the_workers_of_its_callers_by_a_lingering_socket"
FUNCTIONAL = ("tests/integration/test_kernel_decides.py", f"tests/integration/test_hanging_peers.py::{LINGER}")
"""Of the functional suite what each run has: calls, allowed and refused; and what older kernels do in another way."""
LEFT_OUT = (
    "test_soak.py",
    # These run scripts as the monitor, a gate or a worker, which the policy is there to prevent. In their place there is:
    "test_pam_sessions.py",  # guest/test_sessions.py
    "test_hostile_gate.py",  # guest/test_confinement.py, and so for the others
    "test_hostile_gate_sandbox.py",
    "test_hostile_worker.py",
    "test_hanging_peers.py",
    "test_local_attacker.py",
    "test_systemd.py::test_it_is_not_ready_while_a_gate_is_not",
    # Nor does the policy let a socket of another kind reach the daemon, which is to look at it here.
    "test_systemd.py::test_a_socket_of_another_kind_is_refused",
    # How many calls share a system call is a matter of how quick the machine is.
    "test_cost_of_a_call.py::test_calls_in_flight_share_their_system_calls",
    "test_cost_of_a_call.py::test_calls_in_flight_share_their_waits",
)
"""Of the functional suite, in the machine."""
LIVES = ("test_deaths.py", "test_reload.py", "test_restart.py", "test_systemd.py")
"""About half of it, by the time that it takes: what begins, ends and is changed while others go on."""


def whole(lives: bool) -> tuple[str, ...]:
    """One half or the other of the functional suite, for the parts that run only when they are asked for."""
    directory = "tests/integration"
    out = LEFT_OUT if lives else (*LEFT_OUT, *LIVES)
    which = [f"{directory}/{name}" for name in LIVES] if lives else [directory]
    return (*which, *(f"--{'deselect' if '::' in name else 'ignore'}={directory}/{name}" for name in out))


AT_ONCE = 2
"""Machines that run at a time: each of them keeps a core busy."""

TIMEOUT, TIMEOUT_WHOLE = 1500.0, 7200.0
"""Seconds for one run of tests in a machine, then it is ended."""

LOGS = {
    "journal.txt": "journalctl --no-pager --no-hostname --output=short-precise",
    "audit.log": "cat /var/log/audit/audit.log",
    "processes.txt": "ps axfZ -o label,pid,user,stat,args",
}


@dataclass
class Part:
    """Tests for one machine.

    runs: what to tell pytest, each for one run of it. bare: the package is not installed, the tests do that. counts: what
    came of them, by pytest's words. timeout: seconds for each run. usual: it runs when nothing else is asked for.
    """

    name: str
    runs: tuple[tuple[str, ...], ...]
    bare: bool = False
    timeout: float = TIMEOUT
    usual: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


# These are about the whole system, and nothing for the realm's mount namespace, which the other conftest.py enters.
GUEST = ("--confcutdir=tests/vm/guest",)
PACKAGE, BROKEN = "tests/vm/guest/test_package.py", "tests/vm/guest/test_broken_policy.py"
SERVICE = ("tests/vm/guest/test_contexts.py", "tests/vm/guest/test_service.py")


def parts() -> list[Part]:
    """All there are, in the order in which they begin: the longest first, and beside it the one that needs no machine with
    the package, which the first has to wait for where there is none yet.
    """
    ignored = tuple(f"--ignore={name}" for name in (PACKAGE, BROKEN, *SERVICE))
    return [
        Part("service", ((*GUEST, *SERVICE),)),
        Part("package", ((*GUEST, PACKAGE),), bare=True),
        Part("system", ((*GUEST, "tests/vm/guest", *ignored),)),
        Part("functional", (FUNCTIONAL, (*GUEST, BROKEN))),
        Part("whole-lives", (whole(True),), timeout=TIMEOUT_WHOLE, usual=False),
        Part("whole-calls", (whole(False),), timeout=TIMEOUT_WHOLE, usual=False),
    ]


def run(only: Sequence[str], keep: bool, arguments: Sequence[str]) -> int:
    """Run the tests. Returns the status.

    only: names of parts, "whole" for both of those, "all" for all; none: the usual ones. keep: leave the machines up.
    arguments: for pytest.
    """
    started = time.monotonic()
    built = package()
    chosen = [each for each in parts() if (_names(each) & {*only} if only else each.usual)]
    if not chosen:
        raise machine.MachineFault(f"no such part; there are {', '.join(each.name for each in parts())}")
    for part in chosen:
        shutil.rmtree(RESULTS / part.name, ignore_errors=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for part in chosen:
            pool.submit(_run, part, built, keep, arguments)
    total: dict[str, int] = {}
    for part in chosen:
        for word, count in part.counts.items():
            total[word] = total.get(word, 0) + count
        for fault in part.faults:
            print(f"{part.name}: {fault}", file=sys.stderr)
    print(f"results and logs: {RESULTS.relative_to(image.CHECKOUT)}")
    failed = any(part.faults for part in chosen) or not total.get("passed")
    words = ", ".join(f"{total[word]} {word}" for word in ("failed", "passed", "skipped", "errors") if total.get(word))
    print(f" {words or 'no tests ran'} in {time.monotonic() - started:.2f}s ".center(80, "="))
    return int(failed)


def _names(part: Part) -> set[str]:
    return {part.name, part.name.partition("-")[0], "all"}


def package() -> Path:
    """The newest package that `make deb` has built. Raises MachineFault where there is none."""
    found = sorted((image.CHECKOUT / "dist").glob("srpc_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise machine.MachineFault("there is no package in dist: make deb")
    return found[-1]


def _run(part: Part, package: Path, keep: bool, more: Sequence[str]) -> None:
    results = RESULTS / part.name
    results.mkdir(parents=True)
    vm = machine.Machine(f"test-{part.name}")
    try:
        vm.down()
        vm.up(states.booted() if part.bare else states.installed(package))
        for tree in TREES:
            vm.put(image.CHECKOUT / tree, f"{INSIDE}/{tree}", exclude=("__pycache__", "./tmp"))
        for file in FILES:
            vm.put(image.CHECKOUT / file, f"{INSIDE}/{file}")
        vm.put(package, f"{INSIDE}/dist/{package.name}")
        for number, arguments in enumerate(part.runs, 1):
            _pytest(part, vm, results, str(number), (*arguments, *more))
    except Exception as fault:  # in a thread, where nobody else would hear of it
        part.faults.append(f"{type(fault).__name__}: {fault}")
    finally:
        _end(part, vm, results, keep)


def _pytest(part: Part, vm: machine.Machine, results: Path, name: str, arguments: Sequence[str]) -> None:
    junit, output = f"junit-{name}.xml", results / f"output-{name}.txt"
    options = f"-p no:cacheprovider -p tests.vm.guest.denials --junitxml={junit}"
    words = " ".join(map(machine.quoted, arguments))
    settings = f"PYTHONPATH={PRODUCT}:/{image.SITE} PYTHONDONTWRITEBYTECODE=1 CI=1 SRPC_TEST_PACE={PACE}"
    status = _stream(
        part, vm, f"cd {INSIDE} && {settings} /usr/bin/python3 -X faulthandler -m pytest {options} {words}", output
    )
    if status:
        part.faults.append(f"pytest's status is {status}")
    vm.get(f"{INSIDE}/{junit}", results / junit)
    for word, count in _counts(output).items():
        part.counts[word] = part.counts.get(word, 0) + count


def _end(part: Part, vm: machine.Machine, results: Path, keep: bool) -> None:
    """Bring the logs out, however it went, and end the machine."""
    try:
        if vm.running:
            for name, command in LOGS.items():
                with open(results / name, "wb") as file:
                    vm.ssh([command], stdout=file, stderr=subprocess.STDOUT, timeout=60)
    except (OSError, subprocess.SubprocessError) as fault:
        part.faults.append(f"no logs: {fault}")
    if keep:
        _say(part, f"it is kept: python -m tests.vm run {vm.name} -- COMMAND")
    else:
        vm.down()
    if vm.serial.exists():
        shutil.copy(vm.serial, results / "serial.log")


def _stream(part: Part, vm: machine.Machine, command: str, log: Path) -> int:
    """Run a command, and show what it prints as it comes; its status, 124 where it took too long."""
    process = vm.popen([command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    late = threading.Timer(part.timeout, process.kill)
    late.start()
    try:
        with open(log, "wb") as file:
            for line in process.stdout or ():
                file.write(line)
                _say(part, line.decode(errors="replace").rstrip())
        status = process.wait()
    finally:
        late.cancel()
    return status if status >= 0 else 124


def _say(part: Part, text: str) -> None:
    print(f"{part.name}| {text}", flush=True)


def _counts(output: Path) -> dict[str, int]:
    """What pytest's last line says."""
    last = [
        line for line in output.read_text(errors="replace").splitlines() if re.fullmatch(r"=+ .* in [0-9.]+s.* =+", line)
    ]
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last[-1] if last else "")}
