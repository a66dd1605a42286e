"""Authentication end to end: a real daemon, real PAM, real TLS, and clients that do what they should not.

Delays and limits count by user and address, so each test comes from addresses of its own.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EACCES, EAGAIN, EINVAL, EKEYEXPIRED, EOPNOTSUPP, ETIMEDOUT
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from srpc_client import AuthenticationError, ConnectionLost, Prompt, blocking
from srpcd.wire.limits import CONVERSATIONS_MAX
from tests import realm
from tests.integration.raw import (
    APPEND,
    ATTACH,
    AUTH,
    CLUNK,
    ERROR,
    PING,
    STAT,
    Ended,
    Frame,
    Raw,
    first,
    frame,
    several,
)

pytestmark = pytest.mark.needs_root

REFUSAL = 0.2
"""Seconds of `authentication.refusal` in these tests."""

_addresses = realm.addresses()

ID = "#!/bin/sh\nexec id -un\n"


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with the usual PAM service, where nobody is let in by name. It looks for changed groups all the time."""
    tree = realm.Daemon({"authentication": {"refusal": REFUSAL, "refresh": 0.2, "peer_names": ["bobby"]}})
    realm.install(tree.tree / "tools/id", ID, 0o755)
    realm.install(tree.tree / "calc/id", ID, 0o750, gid=realm.group("calc"))
    realm.install(tree.tree / "calc/sub/id", ID, 0o755)
    realm.install(tree.tree / "calculator/id", ID, 0o755)
    with tree as running:
        yield running


@pytest.fixture(scope="module")
def hurried(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One with short times and small numbers. Accounts are let in by name, and PAM writes down what it sees."""
    if realm.PACE > 1:
        pytest.skip("its times are a second or two, in which a slow machine does not get through a log-in")
    record = private_realm.temporary / "pam-record"
    Path("/etc/pam.d/srpcd-record").write_text(
        f"auth required pam_unix.so\naccount optional pam_exec.so log={record} /usr/bin/env\naccount required pam_unix.so\n"
    )
    tree = realm.Daemon(
        {
            "authentication": {
                "pam_service": "srpcd-record",
                "refusal": 0.2,
                "allow": ["erin", "sysacct", "toor", "nobody", "_srpcd"],
                "timeout": 1.0,
                "afid_age": 1.0,
                "session_age": 1.0,
            },
            "limits": {"authentication_timeout": 2.0, "strangers_per_address": 4},
        }
    )
    realm.install(tree.tree / "tools/id", ID, 0o755)
    with tree as running:
        yield running


@pytest.fixture(scope="module")
def twostep(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    """One whose PAM service asks three things in three steps."""
    if private_realm.module is None:
        pytest.skip("needs a C compiler, for the PAM module that asks several questions")
    with realm.Daemon({"authentication": {"pam_service": "srpcd-2p", "refusal": REFUSAL, "timeout": 2.0}}) as running:
        yield running


@pytest.fixture
def connect(daemon: realm.Daemon) -> Iterator[Callable[..., Raw]]:
    """`connect(source="")` makes a TLS connection that is closed after the test."""
    with ExitStack() as made:

        def make(source: str = "", to: realm.Daemon = daemon) -> Raw:
            return made.enter_context(Raw.tls(to.tcp, source or next(_addresses)))

        yield make


def idle_children(daemon: realm.Daemon) -> bool:
    """Whether no authentication is under way."""
    return not daemon.processes("authenticate")


# --- who is let in, and who is not -------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """answer: the reply to the last append. seconds: how long it took. again: what one more append got.
    right: of those in AGAIN, the verdict when the same connection then authenticates alice with her password."""

    answer: Frame
    seconds: float
    again: Frame
    right: Frame | None


WRONG: dict[str, tuple[str, str | None]] = {
    "wrong-password": ("bob", "not bob's"),
    "unknown-user": ("nobody-of-this-name", "a guess"),
    "locked": ("carol", None),
    "expired": ("dave", None),
    "password-must-change": ("frank", None),
    "no-shell": ("erin", None),
    "system-account": ("sysacct", None),
    "root-with-the-right-password": ("root", None),
    "another-name-for-uid-0": ("toor", None),
    "the-overflow-uid": ("nobody", None),
    "the-daemon's-own-account": ("_srpcd", None),
    "empty": ("bob", ""),
    "one-megabyte": ("bob", "x" * (1 << 20)),
    "nul-inside": ("alice", realm.password("alice") + "\0"),
    "nul-only": ("bob", "\0"),
    "513-bytes": ("bob", "y" * 513),
    "512-bytes": ("bob", "z" * 512),
    "not-ascii": ("bob", "pässwörd ☂"),
    "user-with-a-slash": ("../bob", "a guess"),
    "user-in-another-case": ("BOB", realm.password("bob")),
    "user-with-a-space": ("bob ", realm.password("bob")),
    "user-with-a-newline": ("bob\n", realm.password("bob")),
    "uid-as-name": ("0", realm.password("root")),
    "name-of-256-bytes": ("b" * 256, "a guess"),
}


AGAIN = ("wrong-password", "unknown-user", "locked", "empty", "one-megabyte", "nul-inside")

TOLD = ("expired", "password-must-change")
"""Whoever knows the password is told by pam_unix's account check what he has to see to."""


@pytest.fixture(scope="module")
def refusals(daemon: realm.Daemon) -> dict[str, Refusal]:
    """All of WRONG, at the same time."""
    with several([Raw.tls(daemon.tcp, next(_addresses)) for _ in WRONG]) as connections:
        asked = [
            each.post(AUTH, {"afid": 1, "uname": user, "aname": "/"})
            for each, (user, _) in zip(connections, WRONG.values(), strict=True)
        ]
        answers = dict.fromkeys(WRONG, (0.0, 0))
        waiting = dict(zip(connections, zip(WRONG, asked, strict=True), strict=True))
        while waiting:
            # There are places for a few only: whoever is asked is to answer, or the others never have their turn.
            for each in first(waiting):
                name, seq = waiting.pop(each)
                begun = each.answer(seq)
                assert begun.kind == AUTH + 1, (name, begun)
                assert [prompt["style"] for prompt in begun.json["prompts"]] == ["secret"], name
                user, password = WRONG[name]
                data = realm.password(user) if password is None else password
                answers[name] = time.monotonic(), each.post(APPEND, {"fid": 1, "data": data})
        found = {}
        for each, (name, (since, seq)) in zip(connections, answers.items(), strict=True):
            found[name] = each.answer(seq), time.monotonic() - since
        again = {name: each.ask(APPEND, fid=1, data="x") for each, name in zip(connections, WRONG, strict=True)}
        right = {name: connections[list(WRONG).index(name)].authenticate(2, "alice") for name in AGAIN}
    return {name: Refusal(*found[name], again[name], right.get(name)) for name in WRONG}


def test_refusals_look_the_same_and_come_at_a_fixed_deadline(refusals: dict[str, Refusal]) -> None:
    assert {name: refusal.answer.json["data"] for name, refusal in refusals.items()} == dict.fromkeys(WRONG, "0")
    assert {name: refusal.seconds for name, refusal in refusals.items() if refusal.seconds < REFUSAL} == {}
    usual = refusals["wrong-password"].answer.body
    assert {name: refusal.answer.body for name, refusal in refusals.items() if name not in TOLD} == dict.fromkeys(
        [name for name in WRONG if name not in TOLD], usual
    )
    for name in TOLD:
        assert all(prompt["style"] in ("info", "error") for prompt in refusals[name].answer.json["prompts"])


def test_after_a_refusal_the_connection_is_good_for_another_attempt(refusals: dict[str, Refusal]) -> None:
    assert {name: refusal.again.errno for name, refusal in refusals.items()} == dict.fromkeys(WRONG, EINVAL)  # used up
    assert {name: each.right.data for name, each in refusals.items() if each.right} == dict.fromkeys(AGAIN, "1")


def test_the_right_password_opens_the_tree(connect: Callable[..., Raw]) -> None:
    client = connect()
    client.login("alice")
    assert client.walk("tools/id", 2).kind == 6
    assert client.call(2).payload == b"alice\n"


def test_a_refused_afid_is_good_for_nothing(connect: Callable[..., Raw]) -> None:
    client = connect()
    assert client.authenticate(1, "bob", "wrong").data == "0"
    assert client.ask(ATTACH, afid=1, fid=2, uname="bob").errno == EACCES


def test_a_user_name_that_pam_does_not_even_ask_about_is_refused_at_the_deadline(connect: Callable[..., Raw]) -> None:
    client = connect()
    began = time.monotonic()
    assert client.ask(AUTH, afid=1, uname="-bob").errno == EACCES
    assert time.monotonic() - began >= REFUSAL
    assert client.authenticate(1, "alice").data == "1"


def test_a_user_name_that_can_be_none_is_refused_before_pam(connect: Callable[..., Raw]) -> None:
    client = connect()
    for uname in ("", "a\0b", "b" * 257, "ü" * 129):
        assert client.ask(AUTH, afid=1, uname=uname).errno == EINVAL
    assert client.authenticate(1, "alice").data == "1"


@pytest.mark.parametrize("user", ["erin", "sysacct"])
def test_accounts_without_a_shell_and_system_accounts_are_let_in_where_they_are_named(
    hurried: realm.Daemon, user: str
) -> None:
    with Raw.tls(hurried.tcp, next(_addresses)) as client:
        client.login(user)
        assert client.walk("tools/id", 2).kind == 6
        assert client.call(2).payload == f"{user}\n".encode()


@pytest.mark.parametrize("user", ["root", "toor", "nobody", "_srpcd"])
def test_root_the_overflow_uid_and_the_daemons_own_are_refused_though_named(hurried: realm.Daemon, user: str) -> None:
    with Raw.tls(hurried.tcp, next(_addresses)) as client:
        assert client.authenticate(1, user).data == "0"


# --- the local socket --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["alice", "erin", "sysacct"])
def test_the_kernel_vouches_for_who_is_at_the_local_socket(daemon: realm.Daemon, user: str) -> None:
    with Raw.local(daemon.local, user) as client:
        client.login(user)
        assert client.walk("tools/id", 2).kind == 6
        assert client.call(2).payload == f"{user}\n".encode()


def test_nobody_is_somebody_else_at_the_local_socket(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "bob") as client:
        for uname in ("alice", "root", "nobody-of-this-name", "toor"):
            refused = client.ask(AUTH, afid=1, uname=uname, mechanism="peer")
            assert refused.errno == EACCES
            assert client.ask(ATTACH, afid=1, fid=2, uname=uname).errno == EACCES
        client.login("bob")


def test_somebody_else_s_password_works_at_the_local_socket_too(daemon: realm.Daemon) -> None:
    with Raw.local(daemon.local, "bob") as client:
        assert client.authenticate(1, "alice").data == "1"
        assert client.ask(ATTACH, afid=1, fid=2, uname="alice").kind == ATTACH + 1


@pytest.mark.parametrize(("user", "uname"), [(None, "root"), (None, "toor"), ("_srpcd", "_srpcd"), ("dave", "dave")])
def test_root_the_daemon_s_own_and_expired_accounts_are_refused_locally_too(
    daemon: realm.Daemon, user: str | None, uname: str
) -> None:
    with Raw.local(daemon.local, user) as client:
        assert client.ask(AUTH, afid=1, uname=uname, mechanism="peer").errno == EACCES


@pytest.mark.parametrize("uname", ["root", "toor"])
def test_root_s_right_password_is_refused_locally_too(daemon: realm.Daemon, uname: str) -> None:
    with Raw.local(daemon.local, "svc") as client:
        assert client.authenticate(1, uname).data == "0"


def test_there_is_no_peer_over_tls(connect: Callable[..., Raw]) -> None:
    client = connect()
    assert client.ask(AUTH, afid=1, uname="alice", mechanism="peer").errno == EOPNOTSUPP
    client.login("alice")


# --- a conversation of several prompts ---------------------------------------------------------------------------------


def converse(client: Raw, user: str, *answers: str) -> list[Frame]:
    """Begin an authentication and give these answers; all replies."""
    replies = [client.ask(AUTH, afid=1, uname=user)]
    return replies + [client.ask(APPEND, fid=1, data=answer) for answer in answers]


def shown(reply: Frame) -> list[tuple[str, str]]:
    """The prompts of a reply."""
    return [(prompt["style"], prompt["text"]) for prompt in reply.json["prompts"]]


def test_a_conversation_of_several_steps_comes_through_as_pam_leads_it(twostep: realm.Daemon) -> None:
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        begun, first, second, third = converse(client, "alice", realm.password("alice"), "246810", "ecila")
        assert [style for style, _ in shown(begun)] == ["secret"]
        assert first.data == ""
        assert shown(first) == [("info", "Look at your token."), ("text", "Verification code: ")]
        assert second.data == ""
        assert shown(second) == [("secret", "Secret: ")]
        assert third.data == "1"
        assert client.ask(ATTACH, afid=1, fid=2, uname="alice").kind == ATTACH + 1
    assert realm.until(lambda: idle_children(twostep))


@pytest.mark.parametrize(
    "answers",
    [
        ("wrong", "246810", "bob"),
        (realm.password("bob"), "246811", "bob"),
        (realm.password("bob"), "", "bob"),
        (realm.password("bob"), "246810", "alice"),
        (realm.password("bob"), "246810\0", "bob"),
        (realm.password("bob"), "246810", "b" * 600),
    ],
    ids=["password", "code", "no-code", "secret", "nul-in-the-code", "long-secret"],
)
def test_one_wrong_answer_among_several_refuses_at_the_deadline(twostep: realm.Daemon, answers: tuple[str, ...]) -> None:
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        client.ask(AUTH, afid=1, uname="bob")
        for answer in answers:
            began = time.monotonic()
            reply = client.ask(APPEND, fid=1, data=answer)
            if reply.data:
                break
        assert reply.data == "0"
        assert time.monotonic() - began >= REFUSAL
        assert client.ask(APPEND, fid=1, data="more").errno == EINVAL
        assert client.ask(ATTACH, afid=1, fid=2, uname="bob").errno == EACCES


def test_answers_that_never_come_end_the_conversation_at_its_time(twostep: realm.Daemon) -> None:
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        converse(client, "alice", realm.password("alice"))
        assert twostep.processes("authenticate")
        refused = twostep.wait_event("authentication", 10, user="alice", errno=ETIMEDOUT)
        assert refused["outcome"] == "refused"
        assert realm.until(lambda: idle_children(twostep))
        assert client.ask(APPEND, fid=1, data="246810").errno == ETIMEDOUT
        assert client.ask(ATTACH, afid=1, fid=2, uname="alice").errno == EACCES


def test_a_conversation_does_not_outlive_its_connection_nor_its_afid(twostep: realm.Daemon) -> None:
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        converse(client, "alice", realm.password("alice"))
        assert twostep.processes("authenticate")
        assert client.ask(CLUNK, fid=1).kind == CLUNK + 1
        assert realm.until(lambda: idle_children(twostep), 1)
        converse(client, "alice", realm.password("alice"))
        assert twostep.processes("authenticate")
        client.hang_up()
        assert realm.until(lambda: idle_children(twostep), 1)


def test_two_answers_at_once_do_not_get_ahead_of_pam(twostep: realm.Daemon) -> None:
    """The second is refused while the first is looked at, and is no answer to the next prompt."""
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        client.ask(AUTH, afid=1, uname="alice")
        first, second = client.number(), client.number()
        answers = [frame(APPEND, seq, {"fid": 1, "data": realm.password("alice")}) for seq in (first, second)]
        client.send(b"".join(answers))  # in one piece: PAM may be done before the next one is written
        assert client.answer(second).kind == ERROR
        assert client.answer(first).data == ""
        assert client.ask(APPEND, fid=1, data="246810").data == ""
        assert client.ask(APPEND, fid=1, data="ecila").data == "1"


def test_the_library_answers_prompts_by_a_callback(twostep: realm.Daemon) -> None:
    asked: list[tuple[str, str]] = []

    def answer(prompts: Any) -> list[str]:
        asked.extend((prompt.style, prompt.text) for prompt in prompts)
        return [known[prompt.text] for prompt in prompts if prompt.style in ("secret", "text")]

    known = {"Password: ": realm.password("alice"), "Verification code: ": "246810", "Secret: ": "ecila"}
    with blocking.dial(twostep.address, pins=[twostep.pin], user="alice", prompt=answer) as connection:
        assert connection.stat("/").is_dir
    texts = [text for _style, text in asked]
    assert [text for text in texts if text in known] == list(known)
    assert "Look at your token." in texts
    assert Prompt("info", "x").style == "info"
    known["Verification code: "] = "1"
    with pytest.raises(AuthenticationError) as refused:
        blocking.dial(twostep.address, pins=[twostep.pin], user="alice", prompt=answer)
    assert refused.value.errno == EACCES


def test_a_password_alone_is_not_enough_where_more_is_asked(twostep: realm.Daemon) -> None:
    with pytest.raises(AuthenticationError):
        blocking.dial(twostep.address, pins=[twostep.pin], user="bob", password=realm.password("bob"))
    assert realm.until(lambda: idle_children(twostep))


def test_pam_is_told_from_where_the_user_comes(hurried: realm.Daemon, private_realm: realm.Place) -> None:
    source = next(_addresses)
    with Raw.tls(hurried.tcp, source) as client:
        client.login("alice")
    record = (private_realm.temporary / "pam-record").read_text()
    seen = {name: value for name, _, value in (line.partition("=") for line in record.splitlines())}
    assert f"PAM_RHOST={source}\n" in record
    assert "PAM_USER=alice\n" in record
    assert seen["PAM_SERVICE"] == "srpcd-record"


# --- failures ----------------------------------------------------------------------------------------------------------


def test_six_failures_end_the_connection(connect: Callable[..., Raw]) -> None:
    client = connect()
    for count in range(5):
        assert client.authenticate(count, f"stranger{count}", "x").data == "0"
    assert client.ask(AUTH, afid=5, uname="stranger5").kind == AUTH + 1
    seq = client.post(APPEND, {"fid": 5, "data": "x"})
    answer, why = client.rest()  # and then the end
    assert (answer.seq, answer.data) == (seq, "0")
    assert (why.kind, why.seq, why.errno) == (ERROR, 0, EACCES)
    assert why.json["message"] == "too many failed logins on this connection"


def test_the_library_says_why_the_connection_ended(daemon: realm.Daemon) -> None:
    with blocking.connect(daemon.address, pins=[daemon.pin]) as connection:
        for count in range(6):
            with pytest.raises(AuthenticationError):
                connection.login(f"guess{count}", password="x")
        with pytest.raises(ConnectionLost, match="said EACCES: too many failed logins on this connection"):
            connection.login("alice", password=realm.password("alice"))


def test_one_s_own_success_in_between_gives_no_new_tries(connect: Callable[..., Raw]) -> None:
    client = connect()
    for count in range(3):
        assert client.authenticate(count, f"unforgiven{count}", "x").data == "0"
    assert client.authenticate(10, "alice").data == "1"
    for count in range(3, 6):
        assert client.authenticate(count, f"unforgiven{count}", "x").data == "0"
    client.post(AUTH, {"afid": 11, "uname": "alice"})
    assert not [each for each in client.rest() if each.kind == AUTH + 1]


def test_clunking_the_afid_does_not_hide_a_failure(connect: Callable[..., Raw], daemon: realm.Daemon) -> None:
    """Whoever does not wait for the refusal, because a right password is answered sooner, has failed all the same."""
    client = connect()

    def try_once(count: int) -> bool:
        """Whether the server still listened."""
        try:
            if client.ask(AUTH, afid=count, uname=f"impatient{count}").kind != AUTH + 1:
                return False
            client.post(APPEND, {"fid": count, "data": "x"})
            assert realm.until(lambda: idle_children(daemon))  # PAM has decided
            client.ask(CLUNK, fid=count)
        except (Ended, ConnectionError):
            return False
        return True

    assert not all(try_once(count) for count in range(8))


def test_each_failure_is_logged_though_nobody_waits_for_the_refusal(
    connect: Callable[..., Raw], daemon: realm.Daemon
) -> None:
    client = connect()
    assert client.ask(AUTH, afid=1, uname="unheard").kind == AUTH + 1
    client.post(APPEND, {"fid": 1, "data": "x"})
    assert realm.until(lambda: idle_children(daemon))
    client.hang_up()
    daemon.wait_event("authentication", REFUSAL + 0.8, user="unheard", outcome="refused")


def test_a_connection_has_one_authentication_under_way(connect: Callable[..., Raw], daemon: realm.Daemon) -> None:
    client = connect()
    assert client.ask(AUTH, afid=1, uname="alice").kind == AUTH + 1
    assert client.ask(AUTH, afid=2, uname="bob").errno == EAGAIN
    assert client.ask(APPEND, fid=1, data=realm.password("alice")).data == "1"
    assert client.authenticate(2, "bob").data == "1"
    assert realm.until(lambda: idle_children(daemon))


def test_a_connection_has_one_authentication_under_way_after_clunks_too(connect: Callable[..., Raw]) -> None:
    """The end of one that was clunked must not be taken for the end of the next."""
    client = connect()
    assert client.ask(AUTH, afid=0, uname="alice").kind == AUTH + 1
    for number in range(1, 6):
        clunk, auth = frame(CLUNK, 500, {"fid": number - 1}), frame(AUTH, 501, {"afid": number, "uname": "alice"})
        client.send(clunk + auth)
        assert client.answer(501).kind == AUTH + 1
        assert client.ask(AUTH, afid=99, uname="bob").errno == EAGAIN


def fail(connections: list[Raw], user: str) -> float:
    """One failure on each, all at once. Returns when the last answer was given."""
    asked = [each.post(AUTH, {"afid": 1, "uname": user}) for each in connections]
    for each, seq in zip(connections, asked, strict=True):
        assert each.answer(seq).kind == AUTH + 1
    since = time.monotonic()
    asked = [each.post(APPEND, {"fid": 1, "data": "wrong"}) for each in connections]
    for each, seq in zip(connections, asked, strict=True):
        assert each.answer(seq).data == "0"
    return since


def test_failures_delay_the_next_try_of_the_same_user_from_the_same_address_and_nobody_else(daemon: realm.Daemon) -> None:
    source = next(_addresses)
    with several([Raw.tls(daemon.tcp, source) for _ in range(3)]) as connections:
        since = fail(connections, "bob")
        late, other = connections[:2]
        waiting = late.post(AUTH, {"afid": 2, "uname": "bob"})
        assert other.authenticate(3, "alice").data == "1"
        with Raw.tls(daemon.tcp, next(_addresses)) as elsewhere:
            assert elsewhere.authenticate(1, "bob").data == "1"
        assert late.answer(waiting).kind == AUTH + 1
        assert time.monotonic() - since >= 1.0
        assert late.ask(APPEND, fid=2, data=realm.password("bob")).data == "1"
        # A success is the end of it.
        began = time.monotonic()
        assert other.authenticate(4, "bob").data == "1"
        assert time.monotonic() - began < 1.0


def test_authentications_beyond_the_places_wait_and_end_well(daemon: realm.Daemon) -> None:
    source = next(_addresses)
    sources = [source] * 9 + [next(_addresses) for _ in range(9)]
    with several([Raw.tls(daemon.tcp, each) for each in sources]) as connections:
        asked = {each: each.post(AUTH, {"afid": 1, "uname": "alice"}) for each in connections}
        answered: dict[Raw, int] = {}
        while asked:
            for each in first(asked):
                assert each.answer(asked.pop(each)).kind == AUTH + 1
                answered[each] = each.post(APPEND, {"fid": 1, "data": realm.password("alice")})
        assert {each.answer(seq).data for each, seq in answered.items()} == {"1"}


def test_one_address_does_not_take_all_places_and_its_silent_clients_give_way(daemon: realm.Daemon) -> None:
    source, most = next(_addresses), CONVERSATIONS_MAX // 4
    with several([Raw.tls(daemon.tcp, source) for _ in range(most + 2)]) as crowd:
        asked = {each: each.post(AUTH, {"afid": 1, "uname": f"crowd{number}"}) for number, each in enumerate(crowd)}
        while len(asked) > 2:
            for each in first(asked):
                assert each.answer(asked.pop(each)).kind == AUTH + 1
        silent = [each for each in crowd if each not in asked]
        with Raw.tls(daemon.tcp, next(_addresses)) as other:
            assert other.authenticate(1, "bob").data == "1"
        assert len(daemon.processes("authenticate")) <= most
        gone = [daemon.wait_event("authentication", 60, number, errno=EAGAIN)["user"] for number in (1, 2)]
        for each, seq in asked.items():
            assert each.answer(seq).kind == AUTH + 1
        for name in gone:
            each = crowd[int(name.removeprefix("crowd"))]
            silent.remove(each)
            late = each.ask(APPEND, fid=1, data="late")
            assert late.errno == EAGAIN
            assert "others wait" in late.json["message"]
            assert each.ask(CLUNK, fid=1).kind == CLUNK + 1
        assert silent[0].ask(APPEND, fid=1, data="wrong").data == "0"
    assert realm.until(lambda: idle_children(daemon))


# --- what an afid is good for ------------------------------------------------------------------------------------------


def test_an_afid_is_good_on_its_connection_only(connect: Callable[..., Raw]) -> None:
    source = next(_addresses)
    owner, thief = connect(source), connect(source)
    owner.login("alice", fid=1, afid=7)
    assert thief.ask(ATTACH, afid=7, fid=1, uname="alice").errno == EACCES
    thief.login("bob", fid=1, afid=8)
    assert thief.ask(ATTACH, afid=7, fid=2, uname="alice").errno == EACCES
    assert thief.ask(ATTACH, afid=8, fid=2, uname="alice").errno == EACCES
    owner.close()
    assert thief.ask(ATTACH, afid=7, fid=2, uname="alice").errno == EACCES
    later = connect(source)
    assert later.ask(ATTACH, afid=7, fid=1, uname="alice").errno == EACCES


GOOD_FOR = [
    ("/calc", "/calc", 0),
    ("/calc", "calc", 0),
    ("/calc", "/calc/sub", 0),
    ("/calc", "/", EACCES),
    ("/calc", "", EACCES),
    ("/calc", "/calculator", EACCES),
    ("/calc", "/cal", EACCES),
    ("/calc", "/tools", EACCES),
    ("/calc", "/calc/..", EINVAL),
    ("/calc", "/calc/../tools", EINVAL),
    ("/calc", "/calc/", EINVAL),
    ("/calc", "//calc", EINVAL),
    ("/calc", "/calc/./sub", EINVAL),
    ("calc", "/calc", 0),
    ("calc", "/", EACCES),
    ("", "/calc", 0),
    ("", "/", 0),
    ("/calc/sub", "/calc", EACCES),
    ("/calc/sub", "/calc/sub", 0),
]
"""aname of the afid, aname of the attach, errno."""


def test_an_afid_is_good_at_its_aname_and_below(connect: Callable[..., Raw]) -> None:
    client = connect()
    afids = {aname: number for number, aname in enumerate(dict.fromkeys(aname for aname, _, _ in GOOD_FOR), 100)}
    assert {client.authenticate(afid, "alice", aname=aname).data for aname, afid in afids.items()} == {"1"}
    found = [
        (aname, attached, client.ask(ATTACH, afid=afids[aname], fid=fid, uname="alice", aname=attached).errno)
        for fid, (aname, attached, _) in enumerate(GOOD_FOR)
    ]
    assert found == GOOD_FOR


def test_an_aname_is_refused_before_anything_is_done_with_it(connect: Callable[..., Raw]) -> None:
    client = connect()
    for aname in ("/..", "../etc", "/calc/../..", "/calc//sub", "/.hidden", "/calc\0", "//"):
        assert client.ask(AUTH, afid=1, uname="alice", aname=aname).errno == EINVAL
    client.login("alice")


def test_an_afid_is_of_no_use_before_it_is_accepted_nor_after_clunk(connect: Callable[..., Raw]) -> None:
    client = connect()
    assert client.ask(ATTACH, afid=1, fid=2, uname="alice").errno == EACCES
    client.ask(AUTH, afid=1, uname="alice")
    assert client.ask(ATTACH, afid=1, fid=2, uname="alice").errno == EACCES
    assert client.ask(APPEND, fid=1, data=realm.password("alice")).data == "1"
    assert client.ask(ATTACH, afid=1, fid=2, uname="alice").kind == ATTACH + 1
    assert client.ask(CLUNK, fid=1).kind == CLUNK + 1
    assert client.ask(ATTACH, afid=1, fid=3, uname="alice").errno == EACCES
    assert client.walk("tools/id", 4, fid=2).kind == 6  # what was attached with it goes on


def test_an_afid_ages_and_so_do_sessions(hurried: realm.Daemon) -> None:
    with Raw.tls(hurried.tcp, next(_addresses)) as client:
        client.login("alice", fid=1, afid=9)
        began = time.monotonic()
        assert client.walk("tools/id", 2).kind == 6
        assert client.call(2).payload == b"alice\n"
        assert realm.until(lambda: client.call(2).errno == EKEYEXPIRED, 5, 0.05)
        assert time.monotonic() - began >= 0.9
        assert client.ask(STAT, fid=1).errno == EKEYEXPIRED
        assert client.walk("tools", 3).errno == EKEYEXPIRED
        assert client.ask(ATTACH, afid=9, fid=4, uname="alice").errno == EACCES  # the afid is as old
        client.login("alice", fid=5, afid=8)
        assert client.walk("tools/id", 6, fid=5).kind == 6
        assert client.call(6).payload == b"alice\n"


def test_an_authentication_that_is_never_finished_ends_and_so_does_its_connection(hurried: realm.Daemon) -> None:
    with Raw.tls(hurried.tcp, next(_addresses)) as client, Raw.tls(hurried.tcp, next(_addresses)) as silent:
        began = time.monotonic()
        assert client.ask(AUTH, afid=1, uname="svc").kind == AUTH + 1
        assert hurried.processes("authenticate")
        hurried.wait_event("authentication", 10, user="svc", errno=ETIMEDOUT)
        assert realm.until(lambda: idle_children(hurried))
        assert client.ask(APPEND, fid=1, data=realm.password("svc")).errno == ETIMEDOUT
        while time.monotonic() - began < 1.8:  # talking does not help a stranger
            assert client.post(PING)
            assert client.next().kind == PING + 1
            time.sleep(0.05)
        assert client.over()
        assert silent.over()
        assert time.monotonic() - began >= 1.8


def test_one_connection_too_many_of_a_host_closes_an_older_silent_one(hurried: realm.Daemon) -> None:
    with several(
        [Raw.tls(hurried.tcp, f"127.0.0.{each}") for each in range(3, 7)]
    ) as strangers:  # all of these are one host
        assert strangers[0].ask(AUTH, afid=1, uname="alice").kind == AUTH + 1
        with Raw.tls(hurried.tcp, "127.0.0.7") as fifth:
            closed = hurried.wait_event("limit", which="strangers_per_address", outcome="closed")
            assert [each.over(0.05) for each in strangers].count(True) == 1
            assert any(closed["peer"].startswith(f"127.0.0.{each}:") for each in (4, 5))
            assert fifth.authenticate(1, "bob").data == "1"
        assert strangers[0].ask(APPEND, fid=1, data=realm.password("alice")).data == "1"


# --- several users on one connection -----------------------------------------------------------------------------------


def test_several_users_share_a_connection_and_each_call_is_made_as_whose_fid_it_is(connect: Callable[..., Raw]) -> None:
    client = connect()
    client.login("alice", fid=1, afid=101)
    client.login("bob", fid=2, afid=102)
    assert client.authenticate(103, "carol").data == "0"
    assert client.ask(ATTACH, afid=103, fid=3, uname="carol").errno == EACCES
    assert client.ask(ATTACH, afid=102, fid=3, uname="alice").errno == EACCES
    for fid, user in ((1, "alice"), (2, "bob")):
        assert client.walk("tools/id", 10 + fid, fid=fid).kind == 6
        assert client.call(10 + fid).payload == f"{user}\n".encode()
    assert client.walk("calc/id", 21, fid=1).kind == 6
    assert client.walk("calc/id", 22, fid=2).kind == 6
    assert client.call(21).payload == b"alice\n"
    assert client.call(22).errno == EACCES
    assert client.walk("tools/id", 11, fid=2).kind == ERROR  # a number is one for all of them
    for fid in (1, 11, 21, 101):
        assert client.ask(CLUNK, fid=fid).kind == CLUNK + 1
    assert client.call(12).payload == b"bob\n"


def test_a_group_that_a_user_loses_is_lost_for_open_sessions_too(connect: Callable[..., Raw]) -> None:
    groups = realm.account("svc2").groups
    realm.change("svc2", groups=("calc",))
    try:
        client = connect()
        client.login("svc2", fid=1, afid=9)
        assert client.walk("calc/id", 2).kind == 6
        assert client.call(2).payload == b"svc2\n"
        realm.change("svc2", groups=())
        assert realm.until(lambda: client.call(2).kind == ERROR, 5, 0.05)
        assert client.call(2).errno in (EKEYEXPIRED, EACCES)
        assert client.ask(ATTACH, afid=9, fid=3, uname="svc2").kind == ATTACH + 1
        assert client.walk("calc/id", 4, fid=3).kind == 6
        assert client.call(4).errno == EACCES
    finally:
        realm.change("svc2", groups=groups)


def test_whoever_shares_a_uid_is_called_by_his_own_name_all_the_same(daemon: realm.Daemon) -> None:
    """Services are told the name too, and programs: it must not depend on who of them came first."""
    realm.install(daemon.tree / "tools/name", '#!/bin/sh\necho "$SRPC_USER"\n', 0o755)
    files = Path("/etc/passwd"), Path("/etc/shadow")
    before = [each.read_text() for each in files]
    for file, text in zip(files, before, strict=True):
        line = next(each for each in text.splitlines() if each.startswith("bob:"))
        file.write_text(f"{text}bobby{line.removeprefix('bob')}\n")
    try:
        with Raw.local(daemon.local, "bob") as client:
            for number, name in enumerate(("bob", "bobby", "bob"), 1):
                assert client.ask(AUTH, afid=number, uname=name, mechanism="peer").kind == AUTH + 1
                assert client.ask(ATTACH, afid=number, fid=10 * number, uname=name).kind == ATTACH + 1
                assert client.walk("tools/name", 10 * number + 1, fid=10 * number).kind == 6
                assert client.call(10 * number + 1).payload == f"{name}\n".encode()
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


# --- what is written down ----------------------------------------------------------------------------------------------


def test_no_secret_and_no_payload_is_ever_logged(daemon: realm.Daemon, refusals: dict[str, Refusal]) -> None:
    assert refusals
    marked = "a-password-like-no-other-5d1c"
    with Raw.tls(daemon.tcp, next(_addresses)) as client:
        assert client.authenticate(5, "bob", marked).data == "0"
        client.login("alice")
        assert client.walk("tools/id", 2).kind == 6
        client.call(2, b"a-payload-like-no-other-77ab")
        client.ask(APPEND, fid=2, data="a-text-like-no-other-90ef")
    with Raw.tls(daemon.tcp, next(_addresses)) as client:
        client.post(APPEND, b'{"fid": 1, "data": "a-broken-password-like-no-other')
        assert [each.kind for each in client.rest()] == [ERROR]
    daemon.wait_event("authentication", user="bob", outcome="refused")
    log = daemon.log_text()
    secrets = {password or realm.password(user) for user, password in WRONG.values()} | {realm.password("alice"), marked}
    secrets -= {"", "\0", "a guess"}
    for secret in [*secrets, "like-no-other", "broken-password", "x" * 100]:
        assert secret not in log
        assert secret.encode("unicode_escape").decode() not in log


def test_no_secret_stands_on_a_command_line_or_in_an_environment(twostep: realm.Daemon) -> None:
    with Raw.tls(twostep.tcp, next(_addresses)) as client:
        converse(client, "alice", realm.password("alice"))
        (child,) = twostep.processes("authenticate")
        for name in ("cmdline", "environ"):
            with open(f"/proc/{child.pid}/{name}", "rb") as file:
                assert realm.password("alice").encode() not in file.read()
        # Nor can the user read it out of the child: it is root's, and not dumpable.
        tried = realm.run_as("alice", ["/bin/cat", f"/proc/{child.pid}/environ"])
        assert tried.returncode != 0
    assert realm.until(lambda: idle_children(twostep))


def test_an_outcome_is_one_line_with_user_address_and_reason(connect: Callable[..., Raw], daemon: realm.Daemon) -> None:
    source = next(_addresses)
    client = connect(source)
    assert client.authenticate(1, "dave").data == "0"
    (line,) = [each for each in daemon.events("authentication", user="dave") if each["peer"].startswith(f"{source}:")]
    assert (line["outcome"], line["errno"], line["mechanism"]) == ("refused", EACCES, "pam")
    assert "expired" in line["reason"]


def test_the_daemon_is_quiet_about_it(daemon: realm.Daemon) -> None:
    """Nothing of the above makes a process of the daemon complain or die."""
    assert daemon.events("child-output") == []
    assert daemon.events("gate-restart") == []
    assert [each for each in daemon.events("process-kill") if "violation" in each["reason"]] == []


def test_this_process_is_root_and_never_was_anybody_else() -> None:
    """The users of these tests are other processes: what the kernel tells the daemon is not arranged by us."""
    assert os.getresuid() == (0, 0, 0)
    assert subprocess.run(["id", "-u"], capture_output=True, check=True).stdout == b"0\n"
