"""A gate that was taken over gets nothing that its connections were not entitled to.

The gate is a real process under the real monitor; it runs what these tests send it (tests/hostile/gate.py).
"""

import os
from collections.abc import Iterator

import pytest

from srpcd import passing
from tests import realm
from tests.hostile.puppet import Puppet, hostile_daemon, run_over_tcp
from tests.integration import stage

pytestmark = pytest.mark.needs_root

PEER = "ask(ipc.Authenticate(conn, {afid}, 'peer', '{user}', '{aname}'), ipc.Verdict)[0].errno"
ATTACH = "type(ask(ipc.Attach({conn}, 1, {afid}, '{user}', '{aname}'), ipc.Attached, ipc.Refused)[0]).__name__"
EACCES = "13"


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with hostile_daemon("gate", config={"authentication": {"refusal": 0.2}}) as running:
        stage.make_directory(running.tree / "calc", "svc", "calc")
        yield running


@pytest.fixture
def alice(daemon: realm.Daemon) -> Iterator[Puppet]:
    with Puppet(daemon, "alice") as puppet:
        yield puppet


@pytest.fixture
def bob(daemon: realm.Daemon) -> Iterator[Puppet]:
    with Puppet(daemon, "bob") as puppet:
        yield puppet


def result(expression: str, **fields: object) -> str:
    return "heard.clear(); result = " + expression.format(**fields)


def gates(daemon: realm.Daemon, kind: str = "local") -> set[int]:
    return {each.pid for each in daemon.processes("gate") if kind in each.command}


def ended_for(daemon: realm.Daemon, puppet: Puppet, code: str) -> None:
    """The code ends the gate: it is killed as hostile, and another one is started."""
    before = gates(daemon)
    kills = len(daemon.events("process-kill"))
    assert puppet.run(code + "; time.sleep(5)") == "GONE"
    assert "violation" in daemon.wait_event("process-kill", count=kills + 1)["reason"]
    assert stage.eventually(lambda: gates(daemon) and not gates(daemon) & before, 15)


def test_it_gets_a_worker_of_whom_the_kernel_vouches_for(alice: Puppet) -> None:
    assert alice.run(result(PEER, afid=1, user="alice", aname="")) == "0"
    assert alice.run(result(ATTACH, conn="conn", afid=1, user="alice", aname="calc")) == "'Attached'"


def test_it_can_not_say_that_a_local_connection_is_somebody_else_s(alice: Puppet) -> None:
    assert alice.run(result(PEER, afid=1, user="bob", aname="")) == EACCES
    assert alice.run(result(PEER, afid=2, user="root", aname="")) == EACCES
    assert alice.run(result(ATTACH, conn="conn", afid=1, user="bob", aname="")) == "'Refused'"


def test_it_can_not_say_that_the_network_is_local(daemon: realm.Daemon) -> None:
    code = result("ask(ipc.Authenticate(conn, 1, 'peer', 'alice', ''), ipc.Verdict)[0].errno")
    assert run_over_tcp(daemon, code) == "95"


def test_it_gets_no_worker_without_an_authentication(alice: Puppet) -> None:
    assert alice.run(result(ATTACH, conn="conn", afid=1, user="alice", aname="")) == "'Refused'"


def test_an_afid_is_good_for_its_own_connection_only(alice: Puppet, bob: Puppet) -> None:
    assert alice.run(result(PEER, afid=1, user="alice", aname="")) == "0"
    number = alice.run("result = conn")
    assert bob.run(result(ATTACH, conn="conn", afid=1, user="alice", aname="")) == "'Refused'"
    alice.close()
    assert bob.run(f"result = ask(ipc.Attach({number}, 9, 1, 'alice', ''), ipc.Attached, ipc.Refused, seconds=.5)") == "None"


@pytest.mark.parametrize(("user", "aname"), [("bob", "calc"), ("alice", ""), ("alice", "calculator"), ("alice", "other")])
def test_an_afid_is_good_for_its_own_user_and_part_of_the_tree(alice: Puppet, user: str, aname: str) -> None:
    assert alice.run(result(PEER, afid=1, user="alice", aname="calc")) == "0"
    assert alice.run(result(ATTACH, conn="conn", afid=1, user=user, aname=aname)) == "'Refused'"
    assert alice.run(result(ATTACH, conn="conn", afid=1, user="alice", aname="calc/deeper")) == "'Attached'"


def test_a_wrong_password_stays_wrong_whatever_the_gate_says(alice: Puppet) -> None:
    code = """
heard.clear()
m, (child,) = ask(ipc.Authenticate(conn, 1, 'pam', 'bob', ''), ipc.Conversation)
select.select([child], [], [], 5)
ipc.write_packet(child, ipc.Answer(b'not it'))
result = wait(ipc.Verdict)[0].errno, type(ask(ipc.Attach(conn, 1, 1, 'bob', ''), ipc.Attached, ipc.Refused)[0]).__name__
"""
    assert alice.run(code) == "(13, 'Refused')"


def test_it_can_not_answer_the_monitor_in_the_place_of_the_pam_child(daemon: realm.Daemon, alice: Puppet) -> None:
    ended_for(
        daemon, alice, "ask(ipc.Authenticate(conn, 1, 'pam', 'bob', ''), ipc.Conversation); tell(ipc.Outcome(0, '', 0, 0))"
    )


@pytest.mark.parametrize(
    "message",
    [
        "ipc.Proved()",
        "ipc.Ready(0)",
        "ipc.LinesWanted('calc/echo', 1, 1)",
        "ipc.LineGone(1)",
        "ipc.Verdict(conn, 1, 0, '')",
        "ipc.Attach(conn + 1000, 1, 1, 'alice', '')",
        "ipc.Authenticate(0, 1, 'peer', 'alice', '')",
        "ipc.Authenticate(conn, 1, 'magic', 'alice', '')",
        "ipc.Attach(conn, 1, 1, 'alice', '../..')",
        "ipc.Announce(conn, 1, 'calc/../../etc/x')",
        "ipc.Announce(conn, 1, '/calc/x')",
    ],
)
def test_a_request_that_no_honest_gate_makes_ends_it(daemon: realm.Daemon, alice: Puppet, message: str) -> None:
    ended_for(daemon, alice, f"tell({message})")


@pytest.mark.parametrize("data", ["b'\\xff' * 100", "b'\\x09'", "b''.join([b'\\x09', b'\\xff' * 40])", "b'A' * 4096"])
def test_bytes_that_are_no_message_end_it(daemon: realm.Daemon, alice: Puppet, data: str) -> None:
    ended_for(daemon, alice, f"os.write(3, {data})")


def test_the_gate_of_the_network_can_not_announce(daemon: realm.Daemon) -> None:
    kills = len(daemon.events("process-kill"))
    assert run_over_tcp(daemon, "tell(ipc.Announce(conn, 1, 'calc/x')); time.sleep(5)") == "GONE"
    assert "violation" in daemon.wait_event("process-kill", count=kills + 1)["reason"]
    assert stage.eventually(lambda: gates(daemon, "tls"), 15)


def test_no_descriptor_gets_into_the_monitor(daemon: realm.Daemon, alice: Puppet) -> None:
    code = "import array; result = attempt(lambda: MONITOR.sendmsg([b'x'], [(1, 1, array.array('i', [0]))]))"
    if passing.kernel_refuses():  # EPERM
        assert alice.run(code) == "-1"
    else:
        ended_for(daemon, alice, code)


def test_an_announcement_is_made_with_the_rights_of_whoever_connected(daemon: realm.Daemon, bob: Puppet) -> None:
    fifo = daemon.tree / "calc/fifo"
    os.mkfifo(fifo)
    os.chown(fifo, realm.account("svc").uid, realm.group("calc"))
    fifo.chmod(0o622)  # bob may call it
    code = result("type(ask(ipc.Announce(conn, 1, 'calc/fifo'), ipc.Announced, ipc.Refused)[0]).__name__")
    try:
        with Puppet(daemon, "svc") as svc:
            assert bob.run(code) == "'Refused'"
            assert svc.run(code) == "'Announced'"
    finally:
        fifo.unlink()


def test_it_can_have_replaced_the_worker_of_nobody_but_whom_it_serves(
    daemon: realm.Daemon, alice: Puppet, bob: Puppet
) -> None:
    attach = "heard.clear(); m = ask(ipc.Attach(conn, 1, 1, '{user}', ''), ipc.Attached)[0]; result = m.session, m.link"
    resume = "type(ask(ipc.Resume(conn, 9, {session}, {link}), ipc.Attached, ipc.Refused)[0]).__name__"
    taken = {}
    for puppet, user in ((alice, "alice"), (bob, "bob")):
        assert puppet.run(result(PEER, afid=1, user=user, aname="")) == "0"
        taken[user] = eval(puppet.run(attach.format(user=user)))
    before = {user: {each.pid for each in stage.workers(daemon, user)} for user in ("alice", "bob")}
    session, link = taken["bob"]
    assert alice.run(result(resume, session=session, link=link)) == "'Refused'"
    session, link = taken["alice"]
    assert before == {user: {each.pid for each in stage.workers(daemon, user)} for user in ("alice", "bob")}
    assert alice.run(result(resume, session=session, link=link)) == "'Attached'"
    assert {each.pid for each in stage.workers(daemon, "alice")} != before["alice"]
    assert {each.pid for each in stage.workers(daemon, "bob")} == before["bob"]


def test_it_has_no_privilege_of_its_own(daemon: realm.Daemon, alice: Puppet) -> None:
    code = """
def attempt(work):
    try:
        return work()
    except OSError as fault:
        return fault.errno
result = [attempt(lambda: os.setresuid(0, 0, 0)), attempt(lambda: os.open('/etc/shadow', os.O_RDONLY)),
          attempt(lambda: os.open({key!r}, os.O_RDONLY)), attempt(lambda: os.listdir({lines!r})),
          attempt(lambda: os.kill(os.getppid(), 9)), attempt(lambda: os.open('/tmp/x', os.O_CREAT | os.O_WRONLY) and 27)]
"""
    found = alice.run(code.format(key=str(daemon.directory / "key.pem"), lines=str(daemon.lines)))
    assert found.startswith("[1, 13,"), found
    assert eval(found)[3:5] == [13, 1], found


def test_six_failures_end_the_connection(daemon: realm.Daemon, alice: Puppet) -> None:
    code = """
import itertools
for at in itertools.count():
    heard.clear()
    m, (child,) = ask(ipc.Authenticate(conn, at, 'pam', f'nobody{at}', ''), ipc.Conversation)
    select.select([child], [], [], 5)
    ipc.write_packet(child, ipc.Answer(b'wrong'))
    wait(ipc.Verdict)
"""
    assert alice.run(code) == "GONE"
    assert len(daemon.events("authentication", outcome="refused", mechanism="pam")) >= 6
