"""PAM sessions of workers, with real PAM: opened before the worker's program runs, closed when it has ended."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from errno import EACCES, ETIMEDOUT
from pathlib import Path

import pytest

from tests import realm
from tests.integration.stage import WAIT_SECONDS, dial, errno_of, eventually, program, workers
from tests.realm import processes
from tests.realm.place import compile_module

pytestmark = pytest.mark.needs_root

ID = "#!/bin/sh\nexec id -un\n"

RECORD = """#!/bin/sh
echo "$PAM_TYPE $PAM_USER $PAM_SERVICE $PAM_TTY ${PAM_RHOST:-none} $(id -u) $(ls /proc/$PPID/fd | tr '\\n' ,)" >>%s
"""

NO_SESSION = "no PAM session"


class Stage:
    """A PAM service of its own, and what pam_exec wrote down."""

    def __init__(self, place: realm.Place, name: str) -> None:
        self.service = f"srpcd-{name}"
        self.directory = place.temporary / self.service
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.record = self.directory / "record"
        self.script = realm.install(self.directory / "script", RECORD % self.record, 0o755)
        self.recording = f"session required pam_exec.so {self.script}"

    def write(self, *lines: str) -> None:
        """The service's file: anybody with a password, and these lines."""
        file = Path("/etc/pam.d", self.service)
        file.write_text("\n".join(["auth required pam_unix.so", "account required pam_unix.so", *lines, ""]))
        file.chmod(0o644)

    def recorded(self) -> list[list[str]]:
        """What the script has written so far: type, user, service, tty, host, uid, descriptors of the caller."""
        return [line.split(" ") for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def types(self) -> list[str]:
        """open_session, close_session …"""
        return [line[0] for line in self.recorded()]


@pytest.fixture
def stage(private_realm: realm.Place, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A service with a session that is written down."""
    made = Stage(private_realm, f"s{abs(hash(request.node.name)) % 10**8}")
    made.write(made.recording)
    yield made
    Path("/etc/pam.d", made.service).unlink()


@pytest.fixture
def start(stage: Stage, make_daemon: Callable[..., realm.Daemon]) -> Callable[..., realm.Daemon]:
    """Starts a daemon that uses the service and ends unused workers soon. Keyword arguments are keys of `limits`."""

    def begin(**limits: float) -> realm.Daemon:
        settings = {"authentication": {"pam_service": stage.service}, "limits": {"worker_idle": 2.0, **limits}}
        daemon: realm.Daemon = make_daemon(settings)
        program(daemon.tree / "id", ID)
        return daemon

    return begin


def keepers(daemon: realm.Daemon, count: int) -> list[processes.Process]:
    """Wait until this many forks of the daemon are left, which then are those that keep sessions.

    Every other process of the daemon begins as a fork too, and a child that has failed takes a moment to end.
    """
    found: list[processes.Process] = []

    def settled() -> bool:
        found[:] = [each for each in daemon.processes("child") if each.state != "Z"]
        return len(found) == count

    assert eventually(settled), found
    return found


def limit(pid: int, name: str) -> tuple[str, str]:
    """(soft, hard) of a process's limit."""
    line = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith(name))
    soft, hard = line.removeprefix(name).split()[:2]
    return soft, hard


def test_a_session_is_open_from_before_the_worker_until_after_it(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    daemon = start()
    with dial(daemon, "alice") as connection:
        assert connection.call("/id", b"") == b"alice\n"
        (opened,) = stage.recorded()
        assert opened[:6] == ["open_session", "alice", stage.service, "srpc", "127.0.0.1", "0"]
        keepers(daemon, 1)
    assert eventually(lambda: stage.types() == ["open_session", "close_session"])
    assert stage.recorded()[1][:6] == ["close_session", "alice", stage.service, "srpc", "127.0.0.1", "0"]
    keepers(daemon, 0)


def test_all_connections_of_a_user_share_a_worker_and_its_session(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    daemon = start()
    with dial(daemon, "alice") as one, dial(daemon, "alice") as two, dial(daemon, "bob") as other:
        for connection in (one, two, other):
            connection.call("/id", b"")
        assert [line[1] for line in stage.recorded()] == ["alice", "bob"]
        keepers(daemon, 2)
    assert eventually(lambda: sorted(stage.types()) == ["close_session"] * 2 + ["open_session"] * 2)


def test_a_local_caller_comes_from_nowhere(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    daemon = start()
    code = "import sys; from srpc_client import blocking\nwith blocking.dial(sys.argv[1]) as c: print(c.call('/id', b''))"
    assert b"alice" in realm.run_as("alice", realm.python(code, f"unix:{daemon.local}"), check=True).stdout
    assert stage.recorded()[0][4] == "none"


def test_where_no_session_is_asked_for_nobody_stays_behind(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    stage.write("# session required pam_deny.so", "password required pam_deny.so")
    daemon = start()
    with dial(daemon, "alice") as connection:
        assert connection.call("/id", b"") == b"alice\n"
        keepers(daemon, 0)


def test_limits_of_the_session_hold_for_worker_and_programs(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    conf = stage.directory / "limits.conf"
    conf.write_text("alice soft nofile 64\nalice hard nofile 100\nalice - stack 4096\nbob - nofile 3000\n")
    stage.write(f"session required pam_limits.so conf={conf}", stage.recording)
    daemon = start()
    program(daemon.tree / "limits", "#!/bin/sh\nulimit -Sn; ulimit -Hn; ulimit -s\n")
    with dial(daemon, "alice") as alice, dial(daemon, "bob") as bob:
        assert alice.call("/limits", b"").split() == [b"64", b"100", b"4096"]
        assert limit(workers(daemon, "alice")[0].pid, "Max open files") == ("64", "100")
        assert limit(workers(daemon, "alice")[0].pid, "Max core file size") == ("0", "0")
        assert bob.call("/limits", b"").split()[:2] == [b"3000", b"3000"]
    assert limit(daemon.pid, "Max open files")[0] not in ("64", "3000")


def test_a_session_raises_no_limit_above_the_workers_own(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    conf = stage.directory / "limits.conf"
    conf.write_text("* - nofile 5000\n* - core 100\n")
    stage.write(f"session required pam_limits.so conf={conf}")
    daemon = start()
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        worker = workers(daemon, "alice")[0].pid
        assert limit(worker, "Max open files") == ("4096", "4096")
        assert limit(worker, "Max core file size") == ("0", "0")


def test_the_environment_of_the_session_reaches_neither_worker_nor_program(
    stage: Stage, start: Callable[..., realm.Daemon]
) -> None:
    (stage.directory / "environment").write_text("LD_PRELOAD=/evil.so\nSRPC_USER=root\nPYTHONPATH=/evil\n")
    stage.write(f"session required pam_env.so envfile={stage.directory}/environment readenv=1", stage.recording)
    daemon = start()
    program(daemon.tree / "env", "#!/bin/sh\nexec env\n")
    with dial(daemon, "alice") as connection:
        given = connection.call("/env", b"").decode()
        assert "evil" not in given
        assert "SRPC_USER=alice" in given
        assert b"evil" not in Path(f"/proc/{workers(daemon, 'alice')[0].pid}/environ").read_bytes()
    assert stage.recorded()


def test_loginuid_is_the_callers(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    if not _loginuid_can_be_set():
        pytest.skip("needs a login uid that is not set yet and may be: this process has one, or the kernel no audit")
    stage.write("session required pam_loginuid.so")
    daemon = start()
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        assert Path(f"/proc/{workers(daemon, 'alice')[0].pid}/loginuid").read_text() == str(realm.account("alice").uid)
        assert Path(f"/proc/{daemon.pid}/loginuid").read_text() == "4294967295"


def _loginuid_can_be_set() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            file = Path("/proc/self/loginuid")
            unset = file.read_text() == "4294967295"
            file.write_text("0")
            os._exit(0 if unset else 1)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_module_that_refuses_is_named_and_the_worker_is_not_started(
    stage: Stage, start: Callable[..., realm.Daemon]
) -> None:
    tried = stage.directory / "tried"
    realm.install(stage.script, f"#!/bin/sh\necho >>{tried}\nexit 3\n", 0o755)
    daemon = start()
    with pytest.raises(OSError, match=NO_SESSION) as refused:
        dial(daemon, "alice").close()
    assert refused.value.errno == EACCES
    said = daemon.wait_event("child-output", role="worker", name="alice")["text"]
    assert NO_SESSION in said
    assert "pam_open_session" in said
    assert f"pam_exec({stage.service}:session)" in said
    assert str(stage.script) in said
    assert tried.read_text() == "\n"  # once
    keepers(daemon, 0)
    assert daemon.processes("worker") == []


def test_what_was_opened_before_a_module_refused_is_not_left(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    stage.write("auth optional pam_exec.so " + str(stage.script), stage.recording, "session required pam_deny.so")
    daemon = start()
    with pytest.raises(OSError, match=NO_SESSION) as refused:
        dial(daemon, "alice").close()
    assert refused.value.errno == EACCES
    assert "open_session" in stage.types()
    keepers(daemon, 0)


@pytest.mark.parametrize("line", ["session required pam_nonesuch.so", "@include nonesuch", "session include nonesuch"])
def test_a_service_that_is_broken_gives_no_session(stage: Stage, start: Callable[..., realm.Daemon], line: str) -> None:
    stage.write()
    daemon = start()
    connection = dial(daemon, "bob")  # PAM reads all of it for an authentication too: break it after that
    try:
        stage.write(line)
        assert eventually(lambda: connection.call("/id", b"") == b"bob\n")
        os.kill(workers(daemon, "bob")[0].pid, signal.SIGKILL)
        assert eventually(lambda: errno_of(connection, "/id") and daemon.events("child-output"))
        assert NO_SESSION in daemon.wait_event("child-output", role="worker", name="bob")["text"]
    finally:
        connection.close()


def test_a_module_that_asks_gets_no_answer(stage: Stage, start: Callable[..., realm.Daemon], open_directory: Path) -> None:
    module = compile_module(open_directory / "pam_session.so")
    if module is None:
        pytest.skip("needs a C compiler, for a PAM module that asks in a session")
    stage.write(f"session required {module} ask")
    daemon = start()
    with pytest.raises(OSError, match=NO_SESSION) as refused:
        dial(daemon, "alice").close()
    assert refused.value.errno == EACCES
    assert not daemon.events("process-kill"), "it ends by itself, and not when the time for its start is over"
    assert "pam_open_session" in daemon.wait_event("child-output", role="worker")["text"]


def test_what_a_module_holds_open_stays_with_the_keeper_and_nobody_else(
    stage: Stage, start: Callable[..., realm.Daemon], open_directory: Path
) -> None:
    module = compile_module(open_directory / "pam_session.so")
    if module is None:
        pytest.skip("needs a C compiler, for a PAM module that holds a file")
    held = stage.directory / "held"
    held.touch()
    stage.write(f"session required {module} hold={held}", stage.recording)
    daemon = start()
    program(daemon.tree / "fds", "#!/bin/sh\nexec ls -l /proc/self/fd/\n")
    with dial(daemon, "alice") as connection:
        assert b"held" not in connection.call("/fds", b"")
        (keeper,) = keepers(daemon, 1)
        assert str(held) not in realm.fds(workers(daemon, "alice")[0].pid)
        assert str(held) not in realm.fds(daemon.pid)
        # Nothing that others wait for: no socket, and of pipes only the one that tells the monitor of its end.
        kinds = {each.partition(":")[0] for each in realm.fds(keeper.pid)}
        assert kinds == {"/dev/null", str(held), "anon_inode", "pipe"}
        assert len([each for each in realm.fds(keeper.pid) if each.startswith("pipe:")]) == 1
    keepers(daemon, 0)


def test_what_modules_start_gets_nothing_of_the_daemons(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    seen = stage.directory / "fds"
    realm.install(stage.script, f"#!/bin/sh\nls -l /proc/$$/fd >>{seen}\n", 0o755)
    daemon = start()
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
    assert "socket:" not in seen.read_text()
    assert "pidfd" not in seen.read_text()


@pytest.mark.parametrize("how", ["killed", "group", "terminated"])
def test_the_session_is_closed_however_the_worker_ends(stage: Stage, start: Callable[..., realm.Daemon], how: str) -> None:
    daemon = start(worker_idle=60.0)
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        worker, keeper = workers(daemon, "alice")[0], keepers(daemon, 1)[0]
        assert os.getsid(keeper.pid) == keeper.pid != os.getsid(worker.pid)
        assert stage.types() == ["open_session"]
        if how == "killed":
            os.kill(worker.pid, signal.SIGKILL)
        elif how == "group":
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            os.kill(worker.pid, signal.SIGTERM)
        assert eventually(lambda: stage.types() == ["open_session", "close_session"])
    assert eventually(lambda: not processes.alive(keeper))


def test_the_user_can_neither_end_nor_trace_nor_stop_the_keeper(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    daemon = start()
    code = """#!/usr/bin/python3 -I
import os, signal, sys
pid = int(sys.stdin.read())
attempts = [lambda number=number: os.kill(pid, number) for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)]
attempts += [lambda name=name: open(f"/proc/{pid}/{name}", "rb") for name in ("mem", "environ", "maps")]
for each in attempts:
    try:
        each()
    except PermissionError:
        print("no")
"""
    program(daemon.tree / "attack", code)
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        pid = keepers(daemon, 1)[0].pid
        assert connection.call("/attack", b"%d" % pid).split() == [b"no"] * 6
        assert processes.status(pid)["Uid"].split() == ["0"] * 4
        assert processes.status(pid)["State"][0] in "RS"


def test_the_session_is_closed_though_the_monitor_is_killed(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    daemon = start(worker_idle=60.0)
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        daemon.kill()
    assert eventually(lambda: stage.types() == ["open_session", "close_session"])


def test_the_daemon_waits_for_sessions_to_be_closed_when_it_ends(stage: Stage, start: Callable[..., realm.Daemon]) -> None:
    realm.install(stage.script, f'#!/bin/sh\n[ "$PAM_TYPE" = open_session ] || sleep 0.5\n{RECORD % stage.record}', 0o755)
    daemon = start(worker_idle=60.0)
    with dial(daemon, "alice") as connection:
        connection.call("/id", b"")
        daemon.stop()
        assert stage.types() == ["open_session", "close_session"]  # at that very moment


def test_a_module_that_hangs_holds_up_its_user_alone_and_not_for_ever(
    stage: Stage, start: Callable[..., realm.Daemon]
) -> None:
    script = f'#!/bin/sh\n[ "$PAM_USER" = bob ] || exit 0\necho $$ >>{stage.directory}/pids\nexec sleep 60\n'
    realm.install(stage.script, script, 0o755)
    daemon = start(worker_idle=60.0)
    try:
        begun = time.monotonic()
        with dial(daemon, "alice") as alice:
            with pytest.raises(OSError, match="in time") as refused:
                dial(daemon, "bob", timeout=WAIT_SECONDS).close()
            assert refused.value.errno == ETIMEDOUT  # and not EAGAIN, at which a client would try again
            assert time.monotonic() - begun > 9  # START_SECONDS
            assert alice.call("/id", b"") == b"alice\n"
            assert daemon.wait_event("process-kill", role="worker", name="bob")["reason"] == "did not start in time"
            assert eventually(lambda: daemon.processes("worker", "bob") == [])
            keepers(daemon, 1)
    finally:
        pids = (stage.directory / "pids").read_text().split()
        for pid in pids:  # what a module started is the administrator's
            os.kill(int(pid), signal.SIGKILL)
    assert len(pids) == 1


def test_a_users_own_daemon_opens_no_sessions(stage: Stage, make_daemon: Callable[..., realm.Daemon]) -> None:
    daemon = make_daemon({"authentication": {"pam_service": stage.service}}, user="alice")
    program(daemon.tree / "id", ID)
    os.chown(daemon.tree / "id", realm.account("alice").uid, realm.account("alice").gid)
    code = "import sys; from srpc_client import blocking\nwith blocking.dial(sys.argv[1]) as c: print(c.call('/id', b''))"
    assert b"alice" in realm.run_as("alice", realm.python(code, f"unix:{daemon.local}"), check=True).stdout
    assert stage.recorded() == []
