"""The faults of the research prototype, each with a test that it has not come back.

fault                                                            tests
root clones the tree at aname before the credential is checked   test_nothing_about_a_part_of_the_tree_is_told_…
its sanitize_path keeps ..                                       test_dots_…
half a privilege drop                                            test_a_worker_has_…, test_a_drop_…, test_root_gives_up_…
forked from a running event loop                                 test_a_worker_is_a_fresh_program_…
afids global to the daemon                                       test_an_afid_of_another_connection_…
a 64-bit length believed as it comes                             test_a_length_is_not_believed
assert on wire data                                              test_no_assert_…
an unknown type kills the connection's task                      test_an_unknown_type_…
PAM called on the event loop                                     test_pam_…
waiting by sleep(0) in a loop                                    test_nobody_waits_by_spinning, test_an_idle_daemon_…
one request at a time per connection                             test_requests_of_one_connection_…
the client logs payloads, passwords included                     test_the_client_writes_nothing_…
a private key in the repository                                  test_the_key_is_made_…, test_layers.py
a control directory of mode 0777                                 test_nobody_can_replace_…
a reply is read by whoever comes next after a timeout            test_a_late_reply_…
two callers' large writes interleave                             test_large_payloads_…
"""

import ast
import asyncio
import dataclasses
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from errno import EACCES, EINVAL, EMSGSIZE, ENXIO, EPROTO, ETIMEDOUT
from pathlib import Path

import pytest

import srpc_client
from srpc_client import CallTimeout, blocking
from tests import realm
from tests.integration.raw import ATTACH, AUTH, CALL, PING, WALK, Raw, call_body, frame, memory
from tests.realm import accounts
from tests.syntax import parse

ROOT = Path(__file__).resolve().parents[1]

_addresses = realm.addresses()

SERVICE = """
import asyncio, sys
from srpc_client import serve

async def slow(request):
    await asyncio.sleep(0.4)
    return b"late:" + request.payload

asyncio.run(serve({"/svc/echo": lambda request: request.payload, "/svc/slow": slow}, address=sys.argv[1], mode=0o622))
"""

CLIENT = """
import sys
from srpc_client import CallError, blocking
address, pin, user, password, payload = sys.argv[1:]
with blocking.dial(address, pins=[pin], user=user, password=password) as connection:
    assert connection.call("/svc/echo", payload.encode()) == payload.encode()
    for path in ("/nowhere", "/svc", "/silent"):
        try:
            connection.call(path, payload.encode())
        except CallError:
            pass
try:
    blocking.dial(address, pins=[pin], user=user, password=password + "x")
except OSError:
    pass
"""


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon with a service, an endpoint that nobody serves, and a directory that nobody but root may enter."""
    made = realm.Daemon({"authentication": {"refusal": 0.1}})
    (made.tree / "svc").mkdir()
    (made.tree / "svc").chmod(0o755)
    os.chown(made.tree / "svc", realm.account("svc").uid, realm.account("svc").gid)
    os.mkfifo(made.tree / "silent")
    (made.tree / "silent").chmod(0o666)
    realm.install(made.tree / "closed/inner/id", "#!/bin/sh\nexec id\n", 0o755)
    (made.tree / "closed").chmod(0o700)
    realm.install(made.tree / "tools/id", "#!/bin/sh\nexec id -Gn\n", 0o755)
    with made as running:
        service = realm.popen_as("svc", realm.python(SERVICE, f"unix:{running.local}"))
        try:
            running.wait_event("announce", 10, count=2, outcome="granted")
            yield running
        finally:
            realm.finish(service)


@pytest.fixture
def client(daemon: realm.Daemon) -> Iterator[Raw]:
    """A stranger's TLS connection."""
    with Raw.tls(daemon.tcp, next(_addresses)) as made:
        yield made


def sources(*packages: str) -> list[Path]:
    """The Python files of these packages."""
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


# --- before anybody has authenticated ----------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_nothing_about_a_part_of_the_tree_is_told_or_done_before_the_user_is_known(client: Raw) -> None:
    """An aname is looked up by the worker, as the user, after all: until then they are all alike."""
    begun = [client.ask(AUTH, afid=1, uname="alice", aname="/closed/inner")]
    client.ask(11, fid=1)
    for aname in ("/closed", "/nowhere", "/tools/id", "/"):
        begun.append(client.ask(AUTH, afid=1, uname="alice", aname=aname))
        client.ask(11, fid=1)
    assert len({each.body for each in begun}) == 1
    assert client.ask(ATTACH, afid=1, fid=2, uname="alice", aname="/closed/inner").errno == EACCES
    assert client.authenticate(3, "alice", aname="/closed/inner").data == "1"
    refused = client.ask(ATTACH, afid=3, fid=4, uname="alice", aname="/closed/inner")
    assert refused.errno == EACCES  # by the kernel: root could have entered it


@pytest.mark.needs_root
def test_dots_lead_nowhere(client: Raw) -> None:
    for aname in ("..", "/..", "/tools/..", "/tools/../closed", "."):
        assert client.ask(AUTH, afid=1, uname="alice", aname=aname).errno == EINVAL
    client.login("alice")
    for path in ("..", "tools/..", "tools/../closed", "../../etc/passwd"):
        assert client.walk(path, 2).errno == EINVAL
        assert client.ask(ATTACH, afid=1000, fid=2, uname="alice", aname=path).errno == EINVAL


# --- the drop ----------------------------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_a_worker_has_its_user_s_own_groups_though_a_group_has_his_name(
    client: Raw, daemon: realm.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = realm.account("svc2")
    renamed = dataclasses.replace(who, name="calc", own_group=False)
    with monkeypatch.context() as patched:
        patched.setitem(accounts._hashes, "calc", accounts._hashes["alice"])
        patched.setitem(accounts._accounts, "svc2", renamed)
        realm.change("alice")  # writes all of them
    try:
        assert realm.group("calc") != who.gid
        assert client.authenticate(1, "calc", realm.password("alice")).data == "1"
        assert client.ask(ATTACH, afid=1, fid=2, uname="calc").kind == ATTACH + 1
        (worker,) = daemon.processes("worker", "calc")
        status = realm.status(worker.pid)
        assert status["Uid"].split() == [str(who.uid)] * 4
        assert status["Gid"].split() == [str(who.gid)] * 4
        assert status["Groups"].split() == [str(who.gid)]
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
    finally:
        realm.change("alice")


@pytest.mark.needs_root
@pytest.mark.parametrize("wrong", ["uid", "gid", "groups"])
def test_a_drop_that_is_not_what_was_asked_for_is_found_out(private_realm: realm.Place, wrong: str) -> None:
    """Nothing is taken on trust: the program that was started proves each id, and that there is no way back."""
    who = realm.account("bob")
    told: dict[str, object] = {"uid": who.uid, "gid": who.gid, "groups": [who.gid]}
    told[wrong] = [who.gid, 0] if wrong == "groups" else 0 if wrong == "gid" else who.uid + 1
    arguments = ", ".join(map(str, told.values()))
    code = f"from srpcd import confine; confine.close_off(); confine.prove({arguments}, '', True, True)"
    done = realm.run_as("bob", realm.python(code))
    assert done.returncode == 1
    assert b"NotConfined" in done.stderr


def test_root_gives_up_groups_before_ids_and_all_three_of_each() -> None:
    """Seen in the source, since the wrong order fails only where nobody looks: with capabilities that are kept."""
    found = {}
    for file in sources("srpcd"):
        if calls := re.findall(r"\bos\.(set(?:groups|(?:e|re|res)?[ug]id))\(", file.read_text()):
            found[str(file.relative_to(ROOT))] = calls
    assert found.pop("srpcd/confine.py") == ["setresgid", "setresuid"]  # the real group for all; and what has to fail
    assert "srpcd/monitor/launch.py" in found
    assert [calls for calls in found.values() if calls != ["setgroups", "setresgid", "setresuid"]] == []


@pytest.mark.needs_root
def test_a_worker_is_a_fresh_program_with_nothing_of_the_daemon_in_it(client: Raw, daemon: realm.Daemon) -> None:
    client.login("bob")
    (worker,) = daemon.processes("worker", "bob")
    assert "-S" in worker.command
    assert "-I" in worker.command
    environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    assert {each.partition(b"=")[0] for each in environment if each} <= {b"PATH", b"LANG"}
    mapped = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "libssl" not in mapped
    assert "libpam" not in mapped
    assert not [each for each in realm.fds(worker.pid) if "key.pem" in each or "srpcd.toml" in each]
    # A fork would have the same addresses as the monitor.
    assert libc(worker.pid) != libc(daemon.pid)


def libc(pid: int) -> str:
    """Where the C library lies in a process."""
    return next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "libc.so" in line).split("-")[0]


# --- afids, lengths, types ---------------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_an_afid_of_another_connection_is_of_no_use(client: Raw, daemon: realm.Daemon) -> None:
    client.login("alice", fid=1, afid=7)
    with Raw.tls(daemon.tcp, next(_addresses)) as thief:
        assert thief.ask(ATTACH, afid=7, fid=1, uname="alice").errno == EACCES
        thief.login("bob", fid=2, afid=8)
        assert thief.ask(ATTACH, afid=7, fid=1, uname="alice").errno == EACCES
        assert client.ask(ATTACH, afid=8, fid=3, uname="bob").errno == EACCES


@pytest.mark.needs_root
def test_a_length_is_not_believed(client: Raw, daemon: realm.Daemon) -> None:
    (gate,) = daemon.processes("gate", "tls")
    before = memory(gate.pid)
    client.send(frame(AUTH, 5, length=2**63))
    (answer,) = client.rest()
    assert (answer.errno, answer.seq) == (EMSGSIZE, 5)
    assert memory(gate.pid) - before < 16 << 20


def test_no_assert_decides_anything_in_the_daemon() -> None:
    """With -O there are none. The one that is left tells the type checker what the line before has made sure."""
    found = [
        f"{file.relative_to(ROOT)}: {ast.unparse(node)}"
        for file in sources("srpcd")
        for node in ast.walk(parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert set(found) <= {"srpcd/session/authentication.py: assert seq is not None"}


@pytest.mark.needs_root
def test_an_unknown_type_gets_an_error_and_ends_that_connection_alone(client: Raw, daemon: realm.Daemon) -> None:
    (gate,) = daemon.processes("gate", "tls")
    with Raw.tls(daemon.tcp, next(_addresses)) as other:
        other.login("bob")
        client.send(frame(99, 6))
        (answer,) = client.rest()
        assert (answer.errno, answer.seq) == (EPROTO, 6)
        assert other.answer(other.post(PING)).kind == PING + 1
    assert daemon.processes("gate", "tls") == [gate]


# --- waiting -----------------------------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_pam_runs_in_a_process_of_its_own_and_holds_nobody_up(client: Raw, daemon: realm.Daemon) -> None:
    assert client.ask(AUTH, afid=1, uname="alice").kind == AUTH + 1  # PAM waits for the password now
    (child,) = daemon.processes("authenticate")
    assert "libpam.so" in Path(f"/proc/{child.pid}/maps").read_text()
    for process in daemon.processes():
        if process.pid != child.pid:
            assert "libpam" not in Path(f"/proc/{process.pid}/maps").read_text(), process
    with Raw.tls(daemon.tcp, next(_addresses)) as other:
        other.login("bob")
        assert other.answer(other.post(PING)).kind == PING + 1


def test_nobody_waits_by_spinning() -> None:
    spinning = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources("srpcd", "srpc_client")
        for node in ast.walk(parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node) in ("asyncio.sleep(0)", "time.sleep(0)", "sleep(0)")
    ]
    assert spinning == []


@pytest.mark.needs_root
def test_an_idle_daemon_and_one_that_waits_use_no_processor_time(client: Raw, daemon: realm.Daemon) -> None:
    client.login("alice")
    assert client.walk("silent", 2).kind == WALK + 1
    waiting = client.post(CALL, call_body(2))
    assert client.ask(AUTH, afid=50, uname="bob").kind == AUTH + 1
    before = {each.pid: ticks(each.pid) for each in daemon.processes()}
    time.sleep(0.6)
    spent = sum(ticks(pid) - before[pid] for pid in before)
    assert spent / os.sysconf("SC_CLK_TCK") < 0.3
    assert client.answer(waiting).errno == ENXIO


def ticks(pid: int) -> int:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.needs_root
def test_requests_of_one_connection_run_concurrently(client: Raw) -> None:
    client.login("alice")
    assert client.walk("silent", 2).kind == WALK + 1
    assert client.walk("svc/echo", 3).kind == WALK + 1
    slow = client.post(CALL, call_body(2))
    fast = [client.post(CALL, call_body(3, struct.pack("!I", number))) for number in range(20)]
    first = [client.next() for _ in range(20)]
    assert sorted(each.seq for each in first) == fast
    assert client.answer(slow).errno == ENXIO


# --- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_the_client_writes_nothing_about_what_it_sends(daemon: realm.Daemon) -> None:
    payload = "a-payload-like-no-other-41"
    command = realm.python(CLIENT, daemon.address, daemon.pin, "alice", realm.password("alice"), payload)
    done = realm.run_as("bob", command, env={"PYTHONDEVMODE": "1", "PYTHONASYNCIODEBUG": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    log = daemon.log_text()
    assert payload not in log
    assert realm.password("alice") not in log


def test_no_part_of_the_client_but_its_command_line_prints() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources("srpc_client")
        if "cli" not in file.relative_to(ROOT).parts and file.name != "__main__.py"
        for node in ast.walk(parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert found == []


@pytest.mark.needs_root
def test_the_key_is_made_at_first_start_and_is_root_s_alone(daemon: realm.Daemon) -> None:
    key = daemon.directory / "keys/key.pem"
    facts = key.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert facts.st_uid == 0
    assert b"PRIVATE KEY" in key.read_bytes()
    with realm.Daemon() as other:
        assert other.pin != daemon.pin
    assert list(ROOT.glob("srpc*/**/*.pem")) == []
    assert realm.run_as("_srpcd", ["/bin/cat", str(key)]).returncode != 0


# --- the directories of the daemon -------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_nobody_can_replace_the_socket_or_anything_beside_it(client: Raw, daemon: realm.Daemon) -> None:
    client.login("alice")
    assert client.walk("svc/echo", 2).kind == WALK + 1
    assert client.call(2, b"x").payload == b"x"  # so there is a line
    for path in [daemon.runtime, *daemon.runtime.rglob("*")]:
        facts = path.lstat()
        assert facts.st_uid == 0, path
        if not stat.S_ISSOCK(facts.st_mode):
            assert facts.st_mode & 0o002 == 0, path
    for user in ("alice", "svc", "_srpcd"):
        for command in (["rm", "-f", str(daemon.local)], ["mv", str(daemon.local), f"{daemon.local}.old"]):
            assert realm.run_as(user, command).returncode != 0
        made = realm.run_as(user, ["mkfifo", str(daemon.lines / "own"), str(daemon.runtime / "own")])
        assert made.returncode != 0
    assert not (daemon.runtime / "own").exists()
    assert not (daemon.lines / "own").exists()
    with Raw.local(daemon.local, "bob") as local:
        local.login("bob")


# --- replies and large writes ------------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_a_late_reply_is_nobody_else_s(daemon: realm.Daemon) -> None:
    with blocking.dial(daemon.address, pins=[daemon.pin], user="alice", password=realm.password("alice")) as connection:
        for number in range(3):
            with pytest.raises(CallTimeout) as late:
                connection.call("/svc/slow", b"%d" % number, timeout=0.1)
            assert late.value.errno == ETIMEDOUT
            assert connection.call("/svc/echo", b"own %d" % number) == b"own %d" % number
        time.sleep(0.4)
        assert connection.call("/svc/slow", b"last") == b"late:last"
        assert connection.call("/svc/echo", b"end") == b"end"


@pytest.mark.needs_root
async def test_large_payloads_of_many_callers_do_not_mix(daemon: realm.Daemon) -> None:
    """All of them are far over PIPE_BUF, and meet in the same gate, the same service, and two by two the same line."""

    async def use(user: str, mark: int) -> None:
        password = realm.password(user)
        async with await srpc_client.dial(daemon.address, pins=[daemon.pin], user=user, password=password) as connection:
            payloads = [bytes([mark + number]) * (300_000 + 7919 * number) for number in range(8)]
            replies = await asyncio.gather(*(connection.call("/svc/echo", payload) for payload in payloads))
            assert replies == payloads

    await asyncio.gather(use("alice", 0), use("alice", 50), use("bob", 100), use("bob", 150))
