"""The realm itself: its accounts log in as they should, its users are who they are, and nothing of it is outside."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import realm
from tests.realm import Place, mounts, processes
from tests.realm.place import CHECKOUT, PAM_SERVICES

pytestmark = pytest.mark.needs_root

NESTED = """
import os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from tests import realm
place = realm.enter()
print("entered", flush=True)
sys.stdin.readline()
"""

LISTING = """
import os
def facts(path):
    found = os.lstat(path)
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith("user.")]
    link = os.readlink(path) if os.path.islink(path) else ""
    attributes = sorted((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, link, attributes
def listing(top):
    paths = [os.path.join(parent, name) for parent, below, names in os.walk(top) for name in [*below, *names]]
    return {path: facts(path) for path in paths}
"""

LOGIN = """
import json, pam
who = pam.pam()
accepted = who.authenticate(sys.argv[1], sys.argv[2], service=sys.argv[3])
print(json.dumps([accepted, who.code]))
"""

SUCCESS, AUTH_ERR, USER_UNKNOWN, NEW_AUTHTOK_REQD, ACCT_EXPIRED = 0, 7, 10, 12, 13

LOGINS = [
    ("alice", "", "srpcd", SUCCESS),
    ("bob", "", "srpcd", SUCCESS),
    ("carol", "", "srpcd", AUTH_ERR),
    ("dave", "", "srpcd", ACCT_EXPIRED),
    ("erin", "", "srpcd", SUCCESS),  # her shell is the daemon's business
    ("frank", "", "srpcd", NEW_AUTHTOK_REQD),
    ("svc", "", "srpcd", SUCCESS),
    ("svc2", "", "srpcd", SUCCESS),
    ("sysacct", "", "srpcd", SUCCESS),
    ("toor", "", "srpcd", SUCCESS),
    ("root", "", "srpcd", SUCCESS),
    ("nobody", "", "srpcd", SUCCESS),
    ("_srpcd", "", "srpcd", AUTH_ERR),
    ("alice", "wrong", "srpcd", AUTH_ERR),
    ("stranger", "wrong", "srpcd", USER_UNKNOWN),
    ("alice", "", "srpcd-common", SUCCESS),
    ("alice", "wrong", "srpcd-common", AUTH_ERR),
    ("bob", "anything", "srpcd-open", SUCCESS),
    ("dave", "anything", "srpcd-open", ACCT_EXPIRED),
    ("bob", "", "srpcd-closed", AUTH_ERR),
]


@contextmanager
def nested(code: str, stdin: int = subprocess.PIPE, first: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that enters a realm of its own, for which ours is the outside, and then runs `code` when told to go on.

    first: code that it runs before it enters.
    """
    command = [sys.executable, "-c", first + NESTED + code, str(CHECKOUT)]
    process = realm.popen_as(None, command, env=dict(os.environ), stdin=stdin, stdout=subprocess.PIPE)
    try:
        assert said(process) == "entered"
        yield process
    finally:
        realm.finish(process)


@contextmanager
def apart(code: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The same with a PID namespace of its own."""
    with nested(code, **options) as process:
        if not realm.descendants(process.pid):
            pytest.skip("needs the right to mount a /proc of its own: a PID namespace for each run")
        yield process


def said(process: subprocess.Popen[bytes]) -> str:
    """The next line that a nested process prints."""
    assert process.stdout
    return process.stdout.readline().decode().rstrip("\n")


def go_on(process: subprocess.Popen[bytes]) -> list[str]:
    """Let a nested process run its code; what it prints, by lines."""
    return process.communicate(b"\n", 30 * processes.PACE)[0].decode().splitlines()


def test_each_account_logs_in_through_pam_as_it_should(private_realm: Place) -> None:
    # All at once: a refusal takes pam_unix two seconds.
    started = []
    for user, password, service, _ in LOGINS:
        command = realm.python(LOGIN, user, password or realm.password(user), service)
        started.append(realm.popen_as("root", command, stdout=subprocess.PIPE))
    found = []
    for process in started:
        stdout, _ = process.communicate(timeout=20)
        realm.finish(process)
        found.append(json.loads(stdout))
    assert found == [[code == SUCCESS, code] for *_, code in LOGINS]


def test_the_module_with_several_prompts_is_there(private_realm: Place) -> None:
    if not private_realm.module:
        pytest.skip("needs a C compiler: a PAM conversation of several prompts")
    assert "pam_twostep.so" in Path("/etc/pam.d/srpcd-2p").read_text()


@pytest.mark.parametrize("user", ["alice", "bob", "svc", "sysacct"])
def test_a_process_of_a_user_is_that_user_and_no_more(private_realm: Place, user: str) -> None:
    who = realm.account(user)
    facts = realm.run_as(user, ["/bin/cat", "/proc/self/status"], check=True).stdout.decode()
    status = {key: value.split() for key, _, value in (line.partition(":") for line in facts.splitlines())}
    assert status["Uid"] == [str(who.uid)] * 4
    assert status["Gid"] == [str(who.gid)] * 4
    assert sorted(map(int, status["Groups"])) == sorted([who.gid, *(realm.group(each) for each in who.groups)])
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind][0], 16) == 0


def test_what_a_user_sees_of_the_code_is_the_copy(private_realm: Place) -> None:
    code = "import srpcd.ipc, OpenSSL, msgspec; print(srpcd.ipc.__file__, srpcd.ipc.__cached__)"
    place, compiled = realm.run_as("bob", realm.python(code), check=True).stdout.decode().split()
    assert place == str(private_realm.code / "srpcd/ipc.py")
    assert os.path.exists(compiled)


def test_groups_can_be_changed(private_realm: Place) -> None:
    before = realm.account("bob").groups
    try:
        realm.change("bob", groups=("calc",))
        assert b"(calc)" in realm.run_as("root", ["/usr/bin/id", "bob"], check=True).stdout
    finally:
        realm.change("bob", groups=before)
    assert b"(calc)" not in realm.run_as("root", ["/usr/bin/id", "bob"], check=True).stdout


def test_an_acl_grants_one_user_and_can_be_taken_away(open_directory: Path, private_realm: Place) -> None:
    file = open_directory / "file"
    file.write_text("text")
    file.chmod(0o640)
    realm.grant(file, "r", uid=realm.account("bob").uid)
    assert realm.run_as("bob", ["/bin/cat", str(file)]).stdout == b"text"
    assert realm.run_as("alice", ["/bin/cat", str(file)]).returncode
    realm.grant(file, "", uid=realm.account("bob").uid)
    assert realm.run_as("bob", ["/bin/cat", str(file)]).returncode
    realm.strip(file)
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listxattr(file) == []


def test_nothing_of_it_is_outside(private_realm: Place) -> None:
    """Here our realm is the outside of another one."""
    files = [Path("/etc", name) for name in ("passwd", "shadow", "group", "shells")]
    directories = private_realm.root, "/etc", "/etc/pam.d"
    mountinfo = Path("/proc/self/mountinfo")

    def state() -> list[object]:
        return [mountinfo.read_text(), *map(Path.read_text, files), *(sorted(os.listdir(each)) for each in directories)]

    before = state()
    with nested(f"print([open('{mountinfo}').read()])") as process:
        assert state() == before
        assert ast.literal_eval(go_on(process)[0]) != before[:1]
    assert state() == before


def test_accounts_that_are_added_outside_do_not_end_those_of_the_realm(private_realm: Place) -> None:
    """useradd(8) renames a new passwd over the old one, which detaches mounts on the old file in all namespaces."""
    look = "import pwd; print(pwd.getpwnam('alice').pw_dir, 'late' in [each.pw_name for each in pwd.getpwall()])"
    passwd = Path("/etc/passwd")
    before = passwd.read_text()
    with nested(look) as process:
        try:
            kept = [line for line in before.splitlines() if "alice" not in line]
            mounts.replace(passwd, "\n".join([*kept, "late:x:9:9:::", ""]))
            shown = go_on(process)
        finally:
            mounts.replace(passwd, before)
    assert shown == [f"{private_realm.root}/home/alice False"]


def test_the_copy_of_etc_keeps_what_the_original_has(private_realm: Place) -> None:
    """Modes, owners, times, ACLs and links. The original is our own copy, and the copy is that of a realm inside ours."""
    odd = Path("/etc/odd")
    odd.mkdir(0o750)
    (odd / "link").symlink_to("../nowhere")
    os.chown(odd / "link", 0, realm.group("calc"), follow_symlinks=False)
    (odd / "file").write_text("content")
    os.chown(odd / "file", realm.account("bob").uid, realm.group("calc"))
    (odd / "file").chmod(0o4710)
    realm.grant(odd / "file", "r", uid=realm.account("alice").uid)
    os.mkfifo(odd / "pipe")
    (odd / "mounted").mkdir()
    mounts.tmpfs(odd / "mounted")
    try:
        (odd / "mounted/below").write_text("below")
        look = "print(open('/etc/odd/file').read(), open('/etc/odd/mounted/below').read())\nprint(listing('/etc'))\n"
        with nested(LISTING + look) as process:
            contents, listed = go_on(process)
        scope: dict[str, Any] = {}
        exec(f"{LISTING}found = listing('/etc')", scope)
    finally:
        mounts.unmount(odd / "mounted")
        shutil.rmtree(odd)
    assert contents == "content below"
    copied, original = ast.literal_eval(listed), scope["found"]
    assert original.pop("/etc/odd/pipe")
    for name in ("passwd", "shadow", "group", "shells", "pam.d", *(f"pam.d/{name}" for name in PAM_SERVICES)):
        # These are written anew.
        copied.pop(f"/etc/{name}", None)
        original.pop(f"/etc/{name}", None)
    assert copied == original


def test_a_run_sees_its_own_processes_only_and_has_loopback(private_realm: Place) -> None:
    code = "print([name for name in os.listdir('/proc') if name.isdigit()])\nimport socket\n"
    code += "print([name for _, name in socket.if_nameindex()], socket.create_server(('127.0.0.1', 0)).getsockname()[0])"
    with apart(code) as process:
        assert go_on(process) == ["['1', '2']", "['lo'] 127.0.0.1"]


def test_a_user_of_one_run_signals_no_process_of_another_with_the_same_number(private_realm: Place) -> None:
    uid = realm.account("bob").uid
    code = f"os.setuid({uid})\ntry: os.kill(-1, signal.SIGKILL)\nexcept ProcessLookupError: print('nobody')"
    bystander = realm.popen_as("bob", ["/bin/sleep", "600"])
    try:
        with apart(code) as process:
            assert go_on(process) == ["nobody"]
        assert bystander.poll() is None
    finally:
        realm.finish(bystander)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(7)", 7),
        ("pass", 0),
        ("raise SystemExit", 0),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.1); sys.exit(3)", 3),  # init heeds no signals of its own tests
    ],
)
def test_a_run_ends_as_its_tests_do(private_realm: Place, code: str, status: int) -> None:
    with apart(code) as process:
        go_on(process)
        assert process.returncode == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_to_the_process_that_was_started_is_the_tests(private_realm: Place, number: signal.Signals) -> None:
    code = f"signal.signal({number:d}, lambda *_: sys.exit(5))\nprint('ready', flush=True)\nwhile True: signal.pause()"
    with apart(code) as process:
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert said(process) == "ready"
        process.send_signal(number)
        assert process.wait(60) == 5


def test_an_interrupt_from_the_terminal_comes_once(private_realm: Place) -> None:
    """Each process of the terminal's foreground group gets it, and none is to pass it on."""
    code = """
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(time.monotonic()))
print("ready", flush=True)
while not interrupts or time.monotonic() < interrupts[-1] + 0.5:
    time.sleep(0.01)
print(len(interrupts), flush=True)
"""
    terminal, other_end = os.openpty()
    try:
        # The session that it leads gets the terminal.
        with apart(code, stdin=other_end, first="import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n") as process:
            os.write(terminal, b"\n")
            assert said(process) == "ready"
            os.write(terminal, b"\x03")
            assert said(process) == "1"
            assert process.wait(60) == 0
    finally:
        os.close(terminal)
        os.close(other_end)


@pytest.mark.parametrize("how", ["the tests end", "the process that was started is killed"])
def test_nothing_outlives_a_run(private_realm: Place, how: str) -> None:
    code = """
subprocess.Popen(["/usr/bin/setsid", "/bin/sleep", "600"])
print("ready", flush=True)
sys.stdin.readline()
os._exit(0)
"""
    with apart(code) as process:
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert said(process) == "ready"
        assert processes.until(lambda: [each for each in realm.descendants(process.pid) if "600" in each.command], 60)
        below = realm.descendants(process.pid)
        if how == "the tests end":
            go_on(process)
        else:
            process.kill()
        assert processes.until(lambda: not any(map(realm.alive, below)), 60)


def test_a_command_that_takes_too_long_is_ended(private_realm: Place) -> None:
    with pytest.raises(AssertionError, match="took over"):
        realm.run_as("alice", ["/bin/sh", "-c", "sleep 60 & wait"], timeout=0.3)
    assert processes.until(lambda: not [each for each in realm.descendants(os.getpid()) if processes.alive(each)])
