"""Identity over time: names, uids and groups that change between authentication, attach, resume and refresh.

An authentication proves who is there at one moment. Each test changes the account database, or the ids of the calling
process, and then asks for more than what was proved.
"""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, EAGAIN, EKEYEXPIRED

import pytest

from tests import realm
from tests.integration.raw import ANNOUNCE, APPEND, ATTACH, AUTH, SECONDS, Ended, Frame, Raw

pytestmark = pytest.mark.needs_root

_addresses = realm.addresses()

ID = "#!/bin/sh\nexec id -u\n"
GROUPS = "#!/bin/sh\necho $(id -g): $(id -G | tr ' ' '\\n' | sort -n)\n"


def installed(daemon: realm.Daemon) -> realm.Daemon:
    """The daemon, with programs that say as whom they run."""
    realm.install(daemon.tree / "tools/id", ID, 0o755)
    realm.install(daemon.tree / "tools/groups", GROUPS, 0o755)
    realm.install(daemon.tree / "calc/id", ID, 0o750, gid=realm.group("calc"))
    return daemon


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon that does not refresh while a test runs: what attach and resume compare is all there is."""
    with installed(realm.Daemon({"authentication": {"refresh": 3600, "refusal": 0.1}})) as running:
        yield running


@pytest.fixture(scope="module")
def watchful(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon that refreshes all the time."""
    with installed(realm.Daemon({"authentication": {"refresh": 0.1, "refusal": 0.1}})) as running:
        yield running


@contextmanager
def account(name: str, groups: tuple[str, ...] = (), uid: int = -1) -> Iterator[realm.Account]:
    """An account for one test."""
    realm.add([realm.Account(name, groups, uid=uid)])
    try:
        yield realm.account(name)
    finally:
        with suppress(KeyError):  # the test has removed it
            realm.remove(name)


@contextmanager
def shared(name: str, other: realm.Account) -> Iterator[None]:
    """An account with the uid of another one, which comes first."""
    realm.share(name, other)
    try:
        yield
    finally:
        realm.remove(name)


@contextmanager
def extra_groups(*names: str) -> Iterator[None]:
    """Groups for one test."""
    for name in names:
        realm.add_group(name)
    try:
        yield
    finally:
        for name in names:
            realm.remove_group(name)


def call(client: Raw, fid: int, path: str) -> str:
    """What a program answers to the session of `fid`."""
    newfid = client.number()
    assert client.walk(path, newfid, fid=fid).kind == 6
    return client.call(newfid).payload.decode().strip()


def kill_worker(daemon: realm.Daemon, user: str) -> None:
    """End a worker, as its user can."""
    workers = daemon.processes("worker", user)
    for each in workers:
        os.kill(each.pid, signal.SIGKILL)
    assert realm.until(lambda: not any(map(realm.alive, workers)))


# --- an account whose uid changes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True], ids=["password", "peer"])
def test_an_afid_does_not_attach_as_a_uid_that_was_not_proved(daemon: realm.Daemon, local: bool) -> None:
    with account("moved"), connected(daemon, "moved", local) as client:
        client.login("moved", fid=1, afid=7)
        realm.change("moved", uid=realm.account("moved").uid + 4000)
        assert client.ask(ATTACH, afid=7, fid=2, uname="moved").errno == EACCES
        refused = daemon.wait_event("attach", user="moved", errno=EACCES)
        assert refused["outcome"] == "refused"
        assert "uid" in refused["reason"]


@pytest.mark.parametrize("local", [False, True], ids=["password", "peer"])
def test_a_session_is_not_resumed_as_a_uid_that_was_not_proved(daemon: realm.Daemon, local: bool) -> None:
    with account("resumed"), connected(daemon, "resumed", local) as client:
        client.login("resumed", fid=1, afid=7)
        assert call(client, 1, "tools/id") == str(realm.account("resumed").uid)
        assert client.walk("tools/id", 2).kind == 6
        realm.change("resumed", uid=realm.account("resumed").uid + 4000)
        kill_worker(daemon, "resumed")
        assert client.call(2).errno == EKEYEXPIRED
        refused = daemon.wait_event("attach", user="resumed", errno=EKEYEXPIRED)
        assert "uid" in refused["reason"]
        assert client.call(2).errno == EKEYEXPIRED  # the session has ended, and nothing is looked up for it again
        assert client.ask(ATTACH, afid=7, fid=99, uname="resumed").errno == EACCES


def test_an_account_made_anew_with_another_uid_is_another_account(daemon: realm.Daemon) -> None:
    with account("anew") as old, connected(daemon, "anew", local=False) as client:
        client.login("anew", fid=1, afid=7)
        realm.remove("anew")
        assert client.ask(ATTACH, afid=7, fid=2, uname="anew").errno == EACCES
        realm.add([realm.Account("anew", uid=old.uid + 4000)])
        assert client.ask(ATTACH, afid=7, fid=2, uname="anew").errno == EACCES


def test_a_uid_that_another_name_has_now_gives_the_old_name_nothing(daemon: realm.Daemon) -> None:
    with account("former") as old, connected(daemon, "former", local=False) as client:
        client.login("former", fid=1, afid=7)
        assert client.walk("tools/id", 2).kind == 6
        realm.remove("former")
        with account("latter", uid=old.uid) as new:
            assert new.uid == old.uid
            assert client.ask(ATTACH, afid=7, fid=3, uname="former").errno == EACCES
            assert client.ask(ATTACH, afid=7, fid=3, uname="latter").errno == EACCES
            kill_worker(daemon, "former")
            assert client.call(2).errno == EKEYEXPIRED


def test_refresh_ends_afids_and_sessions_of_an_account_that_has_gone(watchful: realm.Daemon) -> None:
    """An account made anew with the same name and uid can't be told from the old one: the look in between counts."""
    with account("gone"), connected(watchful, "gone", local=False) as client:
        client.login("gone", fid=1, afid=7)
        assert client.walk("tools/id", 2).kind == 6
        old = realm.remove("gone")
        watchful.wait_event("revoked", user="gone", what="afid")
        watchful.wait_event("revoked", user="gone", what="session")
        realm.add([old])
        assert realm.account("gone").uid == old.uid
        assert client.call(2).errno == EKEYEXPIRED
        assert client.ask(ATTACH, afid=7, fid=3, uname="gone").errno == EACCES


def test_refresh_ends_afids_and_sessions_of_an_account_with_another_uid(watchful: realm.Daemon) -> None:
    with account("renumbered") as old, connected(watchful, "renumbered", local=False) as client:
        client.login("renumbered", fid=1, afid=7)
        assert client.walk("tools/id", 2).kind == 6
        realm.change("renumbered", uid=old.uid + 4000)
        watchful.wait_event("revoked", user="renumbered", what="afid")
        watchful.wait_event("revoked", user="renumbered", what="session")
        assert client.call(2).errno == EKEYEXPIRED
        assert realm.until(lambda: not watchful.processes("worker", "renumbered"))
        realm.change("renumbered", uid=old.uid)  # and back: what was dropped stays dropped
        assert client.ask(ATTACH, afid=7, fid=3, uname="renumbered").errno == EACCES


def test_refresh_ends_the_sessions_of_an_account_that_may_not_be_used_any_more(watchful: realm.Daemon) -> None:
    with account("closed"), connected(watchful, "closed", local=False) as client:
        client.login("closed", fid=1, afid=7)
        assert client.walk("tools/id", 2).kind == 6
        realm.change("closed", shell="/usr/sbin/nologin")
        assert "login shell" in watchful.wait_event("revoked", user="closed", what="session")["reason"]
        assert client.call(2).errno == EKEYEXPIRED
        assert client.ask(ATTACH, afid=7, fid=3, uname="closed").errno == EACCES


@contextmanager
def connected(daemon: realm.Daemon, user: str, local: bool) -> Iterator[Raw]:
    """A connection by TLS, or one that a process of the user's makes to the local socket."""
    with Raw.local(daemon.local, user) if local else Raw.tls(daemon.tcp, next(_addresses)) as client:
        yield client


# --- a process with other ids than its account -------------------------------------------------------------------------

AS = """
import _socket, array, ctypes, os, sys
path, uid, euid, gid, egid, unshare, *groups = [each if at == 0 else int(each) for at, each in enumerate(sys.argv[1:])]
pair, sock = _socket.socket(fileno=0), _socket.socket(_socket.AF_UNIX)
os.setgroups(groups)
os.setresgid(gid, egid, egid)
os.setresuid(uid, euid, euid)
if unshare and ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(77)
sock.connect(path)
pair.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))])
"""


def process(
    daemon: realm.Daemon,
    user: str,
    groups: Sequence[int],
    *,
    gid: int = -1,
    egid: int = -1,
    ruid: int = -1,
    unshare: bool = False,
) -> Raw:
    """A connection by a process with the uid of `user` and these supplementary groups.

    gid: -1: the account's. egid: -1: as gid. ruid: the real uid, where it is not the effective one. unshare: it makes a
    user namespace first.
    """
    who = realm.account(user)
    gid = who.gid if gid < 0 else gid
    numbers = [ruid if ruid >= 0 else who.uid, who.uid, gid, egid if egid >= 0 else gid, int(unshare), *groups]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [realm.PYTHON, "-I", "-S", "-c", AS, str(daemon.local), *map(str, numbers)]
        running = realm.popen_as(None, command, stdin=theirs.fileno())
        try:
            theirs.close()
            ours.settimeout(SECONDS)
            _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
        finally:
            status = running.wait(SECONDS)
            realm.finish(running)
    if status == 77:
        pytest.skip("needs user namespaces that an ordinary user may make")
    if not fds:
        raise Ended(f"a process could not connect: status {status}")
    return Raw(socket.socket(fileno=fds[0]))


def claim(client: Raw, uname: str, afid: int = 1000) -> Frame:
    """Authenticate by the mechanism `peer`."""
    return client.ask(AUTH, afid=afid, uname=uname, mechanism="peer")


def refused(daemon: realm.Daemon, user: str, reason: str) -> bool:
    """Whether the last authentication of a user was refused for this reason, by the log."""
    return reason in daemon.wait_event("authentication", user=user, outcome="refused")["reason"]


def numbers(gid: int, *groups: int) -> str:
    """What the program `groups` prints."""
    return f"{gid}: {' '.join(map(str, sorted({gid, *groups})))}"


@pytest.fixture(scope="module")
def generous(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """A daemon that gives a process all groups of its account."""
    config = {"authentication": {"refusal": 0.1, "peer_groups": "account", "peer_names": ["generous2"]}}
    with installed(realm.Daemon(config)) as running:
        yield running


def test_a_process_gets_no_group_back_that_it_has_dropped(daemon: realm.Daemon) -> None:
    calc, staff = realm.group("calc"), realm.group("staff2")
    with account("dropper", ("calc", "staff2")) as who:
        for kept in ((), (staff,), (calc, staff)):
            with process(daemon, "dropper", kept) as client:
                client.login("dropper")
                assert call(client, 1, "tools/groups") == numbers(who.gid, *kept)
                assert client.walk("calc/id", 2).kind == 6
                assert client.call(2).errno == (0 if calc in kept else EACCES)


def test_a_process_gets_no_group_that_its_account_has_not(daemon: realm.Daemon) -> None:
    calc = realm.group("calc")
    with account("joined") as who:
        for egid in (who.gid, calc):  # a set-group-ID program runs with another effective gid
            with process(daemon, "joined", (calc, who.gid), egid=egid) as client:
                client.login("joined")
                assert call(client, 1, "tools/groups") == numbers(who.gid)


def test_the_effective_gid_is_the_primary_one_where_the_process_has_not_the_accounts(daemon: realm.Daemon) -> None:
    calc, staff = realm.group("calc"), realm.group("staff2")
    with account("secondary", ("calc", "staff2")):
        with process(daemon, "secondary", (staff,), gid=calc) as client:
            client.login("secondary")
            assert call(client, 1, "tools/groups") == numbers(calc, staff)
        with process(daemon, "secondary", (), gid=calc) as client:
            client.login("secondary")
            assert call(client, 1, "tools/groups") == numbers(calc)


def test_a_process_without_a_gid_of_its_account_is_refused(daemon: realm.Daemon) -> None:
    with account("foreign", ("calc",)):
        for gid in (0, realm.group("staff2")):
            with process(daemon, "foreign", (realm.group("calc"),), gid=gid) as client:
                assert claim(client, "foreign").errno == EACCES
    assert refused(daemon, "foreign", "primary group")


def test_a_process_gets_all_groups_of_its_account_where_the_administrator_says_so(generous: realm.Daemon) -> None:
    with account("generous", ("calc",)) as who, process(generous, "generous", (), gid=realm.group("staff2")) as client:
        client.login("generous")
        assert call(client, 1, "tools/groups") == numbers(who.gid, realm.group("calc"))


def test_a_password_gives_all_groups_at_the_local_socket_too(daemon: realm.Daemon) -> None:
    with account("typed", ("calc",)) as who, process(daemon, "typed", ()) as client:
        assert client.authenticate(7, "typed").data == "1"
        assert client.ask(ATTACH, afid=7, fid=1, uname="typed").kind == ATTACH + 1
        assert call(client, 1, "tools/groups") == numbers(who.gid, realm.group("calc"))


def test_processes_with_the_same_groups_share_a_worker_and_others_do_not(daemon: realm.Daemon) -> None:
    with account("sharing", ("calc",)) as who:
        full = (realm.group("calc"), who.gid)
        with process(daemon, "sharing", full) as one, process(daemon, "sharing", full) as two:
            one.login("sharing")
            two.login("sharing")
            assert len(daemon.processes("worker", "sharing")) == 1
            with process(daemon, "sharing", ()) as three:
                three.login("sharing")
                assert len(daemon.processes("worker", "sharing")) == 2


def test_the_workers_of_one_uid_are_bounded(daemon: realm.Daemon) -> None:
    """A process that may choose its groups has 2^n sets to choose from, and each gets a worker."""
    groups = ("calc", "staff2", "third", "fourth")
    with extra_groups("third", "fourth"), account("many", groups) as who:
        sets = [[realm.group(name) for at, name in enumerate(groups) if number >> at & 1] for number in range(9)]
        clients = []
        try:
            for kept in sets:
                client = process(daemon, "many", kept)
                clients.append(client)
                assert claim(client, "many").kind == AUTH + 1
                attached = client.ask(ATTACH, afid=1000, fid=1, uname="many")
                assert attached.errno == (EAGAIN if kept is sets[8] else 0)
            clients.pop(0).close()  # a worker that nobody uses makes room
            assert realm.until(lambda: clients[-1].ask(ATTACH, afid=1000, fid=clients[-1].number(), uname="many").errno == 0)
            with Raw.local(daemon.local, "bob") as other:
                other.login("bob")
            assert call(clients[2], 1, "tools/groups") == numbers(who.gid, *sets[3])  # those that are there go on
        finally:
            for client in clients:
                client.close()


def test_a_group_that_an_account_loses_goes_from_the_sessions_of_its_processes(watchful: realm.Daemon) -> None:
    calc, staff = realm.group("calc"), realm.group("staff2")
    with account("loser", ("calc", "staff2")) as who, process(watchful, "loser", (calc, who.gid)) as client:
        client.login("loser", fid=1, afid=7)
        assert call(client, 1, "tools/groups") == numbers(who.gid, calc)
        assert client.walk("calc/id", 2).kind == 6
        realm.change("loser", groups=("staff2",))
        watchful.wait_event("revoked", user="loser", what="session")
        assert client.call(2).errno == EKEYEXPIRED
        assert realm.until(lambda: not watchful.processes("worker", "loser"))
        assert client.ask(ATTACH, afid=7, fid=50, uname="loser").kind == ATTACH + 1
        assert call(client, 50, "tools/groups") == numbers(who.gid)
        assert staff not in (calc, who.gid)


def test_a_group_that_an_account_gains_is_not_for_processes_that_have_it_not(watchful: realm.Daemon) -> None:
    calc = realm.group("calc")
    with account("gainer") as who, process(watchful, "gainer", (who.gid,)) as client:
        client.login("gainer", fid=1, afid=7)
        assert client.walk("tools/groups", 2).kind == 6
        with connected(watchful, "gainer", local=False) as remote:
            remote.login("gainer", fid=1, afid=7)
            realm.change("gainer", groups=("calc",))
            watchful.wait_event("revoked", user="gainer", what="session")  # the one by password may have it now
        assert client.call(2).payload.decode().strip() == numbers(who.gid)
        assert client.ask(ATTACH, afid=7, fid=50, uname="gainer").kind == ATTACH + 1
        assert call(client, 50, "tools/groups") == numbers(who.gid)
        with process(watchful, "gainer", (who.gid, calc)) as later:
            later.login("gainer")
            assert call(later, 1, "tools/groups") == numbers(who.gid, calc)


def test_a_set_user_id_program_acts_as_its_owner_with_the_groups_of_its_caller(daemon: realm.Daemon) -> None:
    """SO_PEERCRED gives the effective uid; the groups are those of the process that executed the program."""
    calc = realm.group("calc")
    caller = realm.account("alice")
    with account("owner", ("calc",)) as owner:
        groups = (calc, realm.group("staff2"), caller.gid)
        with process(daemon, "owner", groups, gid=caller.gid, ruid=caller.uid) as client:
            assert claim(client, "alice").errno == EACCES
            assert claim(client, "owner").errno == EACCES  # it has not the owner's primary group
            assert refused(daemon, "owner", "primary group")
        with process(daemon, "owner", groups, gid=caller.gid, egid=owner.gid, ruid=caller.uid) as client:
            client.login("owner")  # set-user-ID and set-group-ID
            assert call(client, 1, "tools/id") == str(owner.uid)
            assert call(client, 1, "tools/groups") == numbers(owner.gid, calc)


def test_a_user_namespace_changes_nothing(daemon: realm.Daemon) -> None:
    """The kernel translates ids for the process that asks, which is the daemon: mapped ones and others are as outside."""
    with account("spaced", ("calc",)) as who, process(daemon, "spaced", (who.gid,), unshare=True) as client:
        assert claim(client, "root").errno == EACCES
        assert claim(client, "nobody").errno == EACCES
        client.login("spaced")
        assert call(client, 1, "tools/groups") == numbers(who.gid)


# --- several names of one uid ------------------------------------------------------------------------------------------


def test_of_accounts_that_share_a_uid_a_process_may_name_the_first(daemon: realm.Daemon) -> None:
    with account("first") as first, shared("second", first), Raw.local(daemon.local, "first") as client:
        assert claim(client, "second").errno == EACCES
        assert refused(daemon, "second", "another account comes first")
        assert claim(client, "first").kind == AUTH + 1
        assert client.authenticate(2, "second").data == "1"  # a password proves a name
        assert client.ask(ATTACH, afid=2, fid=3, uname="second").kind == ATTACH + 1


def test_of_accounts_that_share_a_uid_a_process_may_name_those_that_are_configured(generous: realm.Daemon) -> None:
    with account("generous1") as first, shared("generous2", first), shared("generous3", first), ExitStack() as made:
        client = made.enter_context(Raw.local(generous.local, "generous1"))
        client.login("generous2")
        assert claim(client, "generous3", 2).errno == EACCES


def test_a_name_that_is_no_longer_the_first_of_its_uid_attaches_no_more(watchful: realm.Daemon) -> None:
    with account("elder") as elder, Raw.local(watchful.local, "elder") as client:
        client.login("elder", fid=1, afid=7)
        assert client.walk("tools/id", 2).kind == 6
        realm.remove("elder")
        with shared("usurper", elder):
            realm.add([elder])
            watchful.wait_event("revoked", user="elder", what="session")
            assert client.call(2).errno == EKEYEXPIRED
            assert client.ask(ATTACH, afid=7, fid=3, uname="elder").errno == EACCES


# --- between the first step of an authentication and the last ----------------------------------------------------------


def test_an_account_that_changes_in_the_middle_of_a_conversation_is_refused(private_realm: realm.Place) -> None:
    if private_realm.module is None:
        pytest.skip("needs a C compiler, for the PAM module that asks several questions")
    config = {"authentication": {"pam_service": "srpcd-2p", "refusal": 0.1}}
    with account("slow") as slow, realm.Daemon(config) as twostep, Raw.tls(twostep.tcp, next(_addresses)) as client:
        assert client.ask(AUTH, afid=1, uname="slow").kind == AUTH + 1
        assert client.ask(APPEND, fid=1, data=realm.password("slow")).data == ""  # the password is proved
        realm.change("slow", uid=slow.uid + 4000)
        assert client.ask(APPEND, fid=1, data="246810").data == ""
        assert client.ask(APPEND, fid=1, data="wols").data == "0"
        assert refused(twostep, "slow", "changed meanwhile")
        assert client.ask(ATTACH, afid=1, fid=2, uname="slow").errno == EACCES


# --- a daemon of one's own ---------------------------------------------------------------------------------------------


def test_a_users_own_daemon_gives_no_group_to_a_process_that_has_dropped_it(private_realm: realm.Place) -> None:
    with account("lonely", ("calc",)) as who, realm.Daemon({"listen": {"tcp": []}}, user="lonely") as own:
        with process(own, "lonely", (who.gid,)) as client:
            assert claim(client, "lonely").errno == EACCES
            assert refused(own, "lonely", "lacks groups")
            os.mkfifo(own.tree / "pipe", 0o600)
            os.chown(own.tree / "pipe", who.uid, realm.group("calc"))
            assert client.ask(ANNOUNCE, fid=1, path="/pipe").errno == EACCES
        with Raw.local(own.local, "lonely") as client:
            client.login("lonely")
            assert client.ask(ANNOUNCE, fid=2, path="/pipe").kind == ANNOUNCE + 1
