"""A gate that was taken over tries what it must not, and the kernel refuses it: without SELinux, by seccomp and Landlock.

Each attempt is made twice under the real monitor, by the same hostile gate (tests/hostile/gate.py): without the sandbox, to
show what else would stand in the way, and in it (`confine_gate`).
"""

import os
import platform
import shutil
from collections.abc import Iterator
from errno import EACCES, EPERM
from signal import SIGSYS

import pytest

from srpcd.gate import sandbox
from tests import realm
from tests.hostile.puppet import Puppet, hostile_daemon
from tests.integration import stage

pytestmark = pytest.mark.needs_root

ATTEMPTS = {
    "open the TLS key": ("os.open({key!r}, os.O_RDONLY)", -EACCES),
    "read /etc/shadow": ("os.open('/etc/shadow', os.O_RDONLY)", -EACCES),
    "read what everybody may read": ("os.close(os.open('/etc/passwd', os.O_RDONLY))", None),
    "read its own memory as a file": ("os.close(os.open('/proc/self/mem', os.O_RDWR))", -EACCES),
    "read the monitor's memory": ("os.open(f'/proc/{{parent}}/mem', os.O_RDONLY)", -EACCES),
    "write a file": ("os.close(os.open(f'/tmp/{{parent}}', os.O_CREAT | os.O_WRONLY))", None),
    "list the lines": ("os.listdir({lines!r})", -EACCES),
    "write into a user's line": ("os.open({line!r}, os.O_WRONLY | os.O_NONBLOCK)", -EACCES),
    "call an endpoint itself": ("os.close(os.open({endpoint!r}, os.O_WRONLY | os.O_NONBLOCK))", -EACCES),
    "connect out": ("Socket(2, 1).connect({tcp!r})", None),
    "connect to the daemon as a local user": ("Socket(1, 1).connect({local!r})", None),
    "fork": ("os.fork() or os._exit(0)", "a pid"),
    "setuid": ("os.setresuid(*os.getresuid())", None),
    "setuid to root": ("os.setresuid(0, 0, 0)", -EPERM),
    "setgroups": ("os.setgroups([])", -EPERM),
    "signal itself": ("os.kill(own, 0)", None),
    "signal the monitor": ("os.kill(parent, 0)", -EPERM),
    "be dumpable, and so be traced": ("libc.prctl(4, 1, 0, 0, 0)", 0),
    "make code": ("mmap.mmap(-1, 4096, flags=0x22, prot=7).close()", None),
    "give a descriptor to a local client": ("client.sendmsg([b''], [(1, 1, b'\\0\\0\\0\\0')])", 0),
    "take a descriptor of a local client": ("client.recvmsg(1, 100, 0x40)", -11),
    "make a descriptor out of nothing": ("os.close(os.memfd_create('x'))", None),
}
"""What it is, Python, and what comes of it without the sandbox."""

SYSCALLS = {"x86_64": {"ptrace": 101, "process_vm_readv": 310, "keyctl": 250}}
DEADLY = {
    "exec a shell": ("os.execv('/bin/sh', ['sh', '-c', 'exit 7'])", 7),
    "exec what is not there": ("os.execv('/none', ['none'])", -2),
    "ptrace the monitor": ("call({ptrace}, 16, parent, 0, 0)", -EPERM),
    "ptrace its own kind": ("call({ptrace}, 0, 0, 0, 0)", 0),
    "read another's memory": ("call({process_vm_readv}, parent, 0, 0, 0, 0, 0)", 0),
    "use the kernel's keyrings": ("call({keyctl}, 0, -3, 1) > 0", True),
}
"""The same for what ends the gate in its sandbox. A number above 0: the status with which the shell ends."""

HELPERS = """
parent, own = kept.setdefault('pids', (os.getppid(), os.getpid()))
"""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with hostile_daemon("gate") as running:
        stage.make_directory(running.tree / "calc", "svc", "calc", 0o750)
        line = running.lines / str(realm.account("svc").uid) / "1"
        line.parent.mkdir(0o700)
        line.mkdir(0o700)
        os.mkfifo(line / "recv", 0o600)
        try:
            yield running
        finally:
            shutil.rmtree(line.parent)


@pytest.fixture(scope="module")
def found(daemon: realm.Daemon) -> dict[str, tuple[str, str]]:
    """What comes of all attempts in one gate, without the sandbox and then in it."""
    outside, inside = {}, {}
    with Puppet(daemon, "alice") as puppet:
        for name, (attempt, _) in ATTEMPTS.items():
            outside[name] = puppet.run(code(daemon, attempt))
        assert puppet.run("confine_gate(); result = 'in'") == "'in'"
        for name, (attempt, _) in ATTEMPTS.items():
            inside[name] = puppet.run(code(daemon, attempt))
        assert puppet.run("result = 'alive'") == "'alive'"
    return {name: (outside[name], inside[name]) for name in ATTEMPTS}


@pytest.fixture
def fresh(daemon: realm.Daemon) -> Iterator[Puppet]:
    """A gate that is in no sandbox yet: one that was is ended first."""
    with Puppet(daemon, "alice") as puppet:
        inside = puppet.run("result = 'sandbox' in kept; result and os._exit(0)")
    if inside == "GONE":
        restarted(daemon)
    with Puppet(daemon, "alice") as puppet:
        yield puppet


def restarted(daemon: realm.Daemon) -> None:
    """Wait until there is a gate again that takes connections."""

    def there() -> bool:
        with Puppet(daemon, "alice") as puppet:
            return puppet.run("result = 'sandbox' in kept") == "False"

    assert stage.eventually(there, 15)


def code(daemon: realm.Daemon, attempt: str) -> str:
    """What the hostile gate is to run: the result is what the attempt gives."""
    names = {
        "key": str(daemon.directory / "keys/key.pem"),
        "lines": str(daemon.lines),
        "line": f"{daemon.lines}/{realm.account('svc').uid}/1",
        "endpoint": str(daemon.tree / "calc/nothing"),
        "tcp": daemon.tcp,
        "local": str(daemon.local),
    }
    return f"{HELPERS}\nresult = attempt(lambda: {attempt.format(**names, **SYSCALLS.get(platform.machine(), {}))})"


@pytest.mark.parametrize("name", ATTEMPTS)
def test_it_is_refused(found: dict[str, tuple[str, str]], name: str) -> None:
    without, (outside, inside) = ATTEMPTS[name][1], found[name]
    assert int(outside) > 0 if without == "a pid" else outside == repr(without)
    assert inside == repr(-EPERM)


@pytest.mark.skipif(platform.machine() not in SYSCALLS, reason="needs an x86-64 processor: numbers of system calls")
@pytest.mark.parametrize("name", DEADLY)
def test_it_ends_the_gate(daemon: realm.Daemon, fresh: Puppet, name: str) -> None:
    attempt, without = DEADLY[name]
    ends = len(daemon.events("process-end", role="gate"))
    outside = fresh.run(code(daemon, attempt))
    if outside == "GONE":
        status = daemon.wait_event("process-end", count=ends + 1, role="gate")["status"]
        ends += 1
        assert status == without
        restarted(daemon)
    else:
        assert outside == repr(without)
    with Puppet(daemon, "alice") as puppet:
        assert puppet.run("confine_gate(); result = 'in'") == "'in'"
        assert puppet.run(code(daemon, attempt)) == "GONE"
    assert daemon.wait_event("process-end", count=ends + 1, role="gate")["status"] == -SIGSYS


def test_what_it_was_given_goes_on_working(fresh: Puppet) -> None:
    """The sandbox takes nothing from the attacker that an honest gate needs: it can still attach who is really there."""
    attach = "heard.clear(); result = ask(ipc.Authenticate(conn, 1, 'peer', 'alice', ''), ipc.Verdict)[0].errno"
    assert fresh.run("confine_gate()") == "None"
    assert fresh.run(attach) == "0"
    granted = "m, fds = ask(ipc.Attach(conn, 1, 1, 'alice', ''), ipc.Attached, ipc.Refused); result = len(fds)"
    assert fresh.run(granted) == "1"


@pytest.mark.parametrize("user", [None, "alice"], ids=["system", "personal"])
def test_every_gate_is_in_the_sandbox_and_the_daemon_says_what_the_kernel_gives(
    private_realm: realm.Place, user: str | None
) -> None:
    with realm.Daemon(user=user) as daemon:
        found = daemon.events("sandbox")
        assert {realm.status(each.pid)["Seccomp"] for each in daemon.processes("gate")} == {"2"}
    assert sorted(each["name"] for each in found) == ["local", "tls"]
    version = sandbox._landlock_version()
    assert {(each["landlock"], each["level"]) for each in found} == {(version, "info" if version else "warning")}
