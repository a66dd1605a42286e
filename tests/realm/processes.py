"""Real processes as the realm's users, and what /proc says of processes."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.realm import accounts, place

PACE = float(os.environ.get("SRPC_TEST_PACE", "1"))
"""How many times longer than usual anything may take: in an emulated machine. It is in all timeouts of the realm."""

LIVE = {"R", "S", "D", "T", "t", "I"}

_started: list[subprocess.Popen[bytes]] = []


@dataclasses.dataclass(frozen=True)
class Process:
    """A process as /proc shows it.

    role: monitor, gate, worker, authenticate, or other (a program). detail: the gate's kind, the worker's user, else the
    command. start: tells it from a later one of the same pid. state: as it was when it was looked at; two looks at the same
    process are equal whatever it did.
    """

    pid: int
    parent: int
    start: int
    state: str = dataclasses.field(compare=False)
    role: str
    detail: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    command: tuple[str, ...]


def run_as(
    user: str | None,
    command: Sequence[str],
    *,
    input: bytes = b"",
    timeout: float = 30,
    check: bool = False,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a user of the realm, with his uid, gid and groups and no capability, as a login would have it.

    user: None: as whoever runs this. input: for its standard input. timeout: seconds. check: a status other than 0
    raises. env: added to the environment. What it printed is in `stdout` and `stderr`. It has a process group of its own,
    which is killed when the time is over.
    """
    process = popen_as(user, command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(input, timeout * PACE)
    except subprocess.TimeoutExpired:
        kill_group(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{command} took over {timeout} s and had said: {stdout!r} {stderr!r}") from None
    finally:
        forget(process)
    done = subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)
    if check and done.returncode:
        raise AssertionError(f"{command} as {user}: status {done.returncode}: {stdout!r} {stderr!r}")
    return done


def popen_as(
    user: str | None,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command as `run_as` does. Whoever calls this ends it (`finish`)."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/", **(env or {})}
    uid = gid = groups = None
    if user is not None and not (os.geteuid() == 0 and user == "root"):
        who = accounts.account(user)
        groups = [accounts.group(name) for name in who.groups] + ([who.gid] if who.own_group else [])
        uid, gid = who.uid, who.gid
        environment |= {"HOME": str(place.enter().root / "home" / user), "USER": user, "LOGNAME": user} | dict(env or {})
    process = subprocess.Popen(
        list(command),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        cwd="/",
        umask=0o022,
        user=uid,
        group=gid,
        extra_groups=groups,
        start_new_session=True,
    )
    _started.append(process)
    return process


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs Python code with srpcd, srpc_client and their packages on its path; `sys.argv[1:]`: arguments."""
    first = f"import sys; sys.path[:0] = {place.enter().path!r}; exec(sys.argv.pop(1))"
    return [place.PYTHON, "-I", "-c", first, code, *arguments]


def finish(process: subprocess.Popen[bytes], timeout: float = 5) -> int:
    """End a process that `popen_as` started, by SIGTERM and at last by SIGKILL. Returns its status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout * PACE)
        except subprocess.TimeoutExpired:
            kill_group(process)
    status = process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()
    forget(process)
    return status


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and all in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def forget(process: subprocess.Popen[bytes]) -> None:
    """It has ended, and was waited for."""
    with contextlib.suppress(ValueError):
        _started.remove(process)


def still_running() -> list[subprocess.Popen[bytes]]:
    """Processes of `popen_as` that nobody has finished."""
    return list(_started)


def until(condition: Callable[[], object], timeout: float = 5, step: float = 0.01) -> bool:
    """Wait until `condition()` holds; False where it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout * PACE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status; none where there is no such process."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
    except (FileNotFoundError, ProcessLookupError):
        return {}


def fds(pid: int | str = "self") -> list[str]:
    """What the descriptors of a process are, as `readlink` tells; of another user's process as root only."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the directory
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def look(pid: int) -> Process | None:
    """The process of this pid, None where there is none."""
    facts = status(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not facts:
        return None
    role, detail = _role(command)
    return Process(
        pid=pid,
        parent=int(stat[1]),
        start=int(stat[19]),
        state=stat[0].decode(),
        role=role,
        detail=detail,
        uid=int(facts["Uid"].split()[0]),
        gid=int(facts["Gid"].split()[0]),
        groups=tuple(int(each) for each in facts["Groups"].split()),
        command=tuple(command),
    )


def _role(command: Sequence[str]) -> tuple[str, str]:
    if "from srpcd import __main__ as daemon" in "".join(command):
        return "monitor", ""
    for at, word in enumerate(command):
        for role in ("gate", "worker"):
            if word.endswith(f"/{role}/__main__.py"):
                return role, command[at + 1] if at + 1 < len(command) else ""
        if word.endswith("/pamchild.py"):
            return "authenticate", ""
        if word.endswith("/srpcd") or (word == "srpcd" and command[at - 1] == "-m"):
            return "monitor", ""
    return "other", " ".join(command).strip()


def descendants(pid: int) -> list[Process]:
    """All processes below `pid`, those that have ended but were not waited for too."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := look(int(name))):
            children.setdefault(process.parent, []).append(process)
    found, wanted = [], [pid]
    while wanted:
        for child in children.get(wanted.pop(), []):
            found.append(child)
            wanted.append(child.pid)
    return found


def alive(process: Process) -> bool:
    """Whether this very process still runs. One that ended as an orphan of ours is waited for on the way."""
    now = look(process.pid)
    if now is None or now.start != process.start:
        return False
    if now.state in LIVE:
        return True
    if now.parent == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
        return False
    return now.state != "X" and now.parent != 1


if sys.flags.optimize:
    raise RuntimeError("tests say what they expect with assert: run them without -O")
