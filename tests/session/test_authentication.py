"""Authentication: what is asked, what is answered, and what an afid is good for."""

from errno import EACCES, EAGAIN, EBADF, ECANCELED, EEXIST, EINVAL, EOPNOTSUPP, ETIMEDOUT

import pytest

from srpcd.session import effects
from srpcd.session.fids import MAXIMA, Afid
from srpcd.wire import frames, limits, messages
from srpcd.wire.frames import APPEND, ATTACH, AUTH, CLUNK, ERROR
from srpcd.wire.messages import Prompt
from tests.session.peer import CODE, HELLO, SECRET, Peer


def begin(peer: Peer, afid: int = 1, uname: str = "alice", aname: str = "/") -> int:
    peer.send(AUTH, messages.Auth(afid, uname, aname))
    return peer.effect(effects.Authenticate).afid


def append(peer: Peer, data: str = "x", afid: int = 1) -> int:
    return peer.send(APPEND, messages.Append(afid, data))


def test_a_good_password_makes_the_connection_known() -> None:
    peer = Peer()
    assert not peer.session.known
    peer.authenticate()
    assert peer.session.known


def test_a_connection_takes_large_messages_only_when_it_is_known() -> None:
    peer = Peer()
    big = frames.HEADER.pack(frames.CALL, 9, limits.STRANGER_MAX + 1)
    peer.session.receive(big)
    assert peer.session.closed
    peer = Peer()
    peer.authenticate()
    peer.session.receive(big)
    assert not peer.session.closed


def test_a_refused_password_is_data_0_and_the_afid_wants_no_more() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [SECRET])
    assert peer.answer() == {"prompts": [{"style": "secret", "text": "Password:"}]}
    append(peer)
    peer.session.verdict(number, EACCES, "reason")
    assert peer.answer() == {"data": "0", "prompts": []}
    assert not peer.session.known
    assert peer.ask(APPEND, messages.Append(1, "again")) == EINVAL
    peer.session.verdict(number, 0)
    assert not peer.session.known
    assert peer.ask(CLUNK, messages.Clunk(1)) == {}


def test_why_a_connection_will_be_ended_is_an_error_that_answers_no_request() -> None:
    peer = Peer()
    peer.session.warned(EACCES, "too many failed logins")
    assert peer.replies() == [(ERROR, 0, EACCES)]
    for seq in (0, 1):
        peer.send(AUTH, messages.Auth(seq, "alice"), seq=seq)
    peer.session.warned(EACCES, "too many failed logins")
    assert peer.replies() == [(ERROR, 2, EACCES)]
    peer.session.end()
    peer.session.warned(EACCES, "too many failed logins")
    assert peer.replies() == []


def test_several_prompts_of_one_step_take_one_append_each() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [HELLO, SECRET, CODE])
    assert len(peer.answer()["prompts"]) == 3
    append(peer, "first")
    assert peer.effect(effects.Answer).answer == b"first"
    assert peer.answer() == {"data": "", "prompts": []}
    seq = append(peer, "second")
    assert peer.effect(effects.Answer).answer == b"second"
    assert peer.ask(APPEND, messages.Append(1, "too early")) == EAGAIN
    peer.session.prompted(number, [CODE])
    assert peer.replies() == [(frames.APPEND_REPLY, seq, {"data": "", "prompts": [{"style": "text", "text": "Code:"}]})]
    append(peer, "third")
    peer.session.verdict(number, 0)
    assert peer.answer() == {"data": "1", "prompts": []}


def test_prompts_that_want_nothing_wait_for_the_next_reply() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [HELLO])
    assert peer.replies() == []
    peer.session.prompted(number, [SECRET])
    assert [each["text"] for each in peer.answer()["prompts"]] == ["hello", "Password:"]
    append(peer)
    peer.session.prompted(number, [HELLO])
    assert peer.replies() == []
    peer.session.verdict(number, EACCES)
    assert peer.answer() == {"data": "0", "prompts": [{"style": "info", "text": "hello"}]}


def test_prompts_that_nobody_waits_for_come_with_the_next_reply() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [SECRET, SECRET])
    peer.replies()
    peer.session.prompted(number, [CODE])
    assert peer.replies() == []
    append(peer)
    assert peer.answer() == {"data": "", "prompts": [{"style": "text", "text": "Code:"}]}


@pytest.mark.parametrize(
    "prompts", [[Prompt("secret", "x")] * 100, [Prompt("info", "\x01" * limits.HELD_MAX)] * 2 + [SECRET]]
)
def test_prompts_beyond_all_measure_are_dropped_and_the_reply_fits(prompts: list[Prompt]) -> None:
    peer = Peer()
    peer.session.prompted(begin(peer), prompts)
    assert sum(map(len, peer.session.out)) <= limits.JSON_MAX
    assert 1 <= len(peer.answer()["prompts"]) <= limits.PROMPTS_MAX


def test_an_authentication_that_asks_nothing_is_accepted_by_the_auth_itself() -> None:
    peer = Peer(local=True)
    peer.send(AUTH, messages.Auth(1, "alice", mechanism="peer"))
    effect = peer.effect(effects.Authenticate)
    assert (effect.mechanism, effect.uname, effect.aname) == ("peer", "alice", "")
    peer.session.verdict(effect.afid, 0)
    assert peer.answer() == {"prompts": []}
    assert peer.ask(APPEND, messages.Append(1, "x")) == EINVAL
    peer.attach()


@pytest.mark.parametrize("errno", [EACCES, EAGAIN, ETIMEDOUT])
def test_an_authentication_that_does_not_begin_is_an_error_and_frees_the_afid(errno: int) -> None:
    peer = Peer()
    number = begin(peer)
    assert peer.ask(AUTH, messages.Auth(1, "bob")) == EEXIST
    assert peer.ask(APPEND, messages.Append(1, "x")) == EBADF
    assert peer.ask(CLUNK, messages.Clunk(1)) == EBADF
    peer.session.verdict(number, errno)
    assert peer.answer() == errno
    peer.authenticate()


def test_peer_is_no_mechanism_for_the_network() -> None:
    assert Peer().ask(AUTH, messages.Auth(1, "alice", mechanism="peer")) == EOPNOTSUPP


@pytest.mark.parametrize("uname", ["", "a\0b", "x" * 257, "ä" * 129])
def test_what_can_be_no_user_name_is_refused(uname: str) -> None:
    assert Peer().ask(AUTH, messages.Auth(1, uname)) == EINVAL


def test_a_verdict_that_comes_before_all_answers_is_told_at_the_next_append() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [SECRET, CODE])
    peer.replies()
    append(peer)
    peer.session.effects.clear()
    assert peer.answer()["data"] == ""
    peer.session.verdict(number, EACCES)
    assert peer.replies() == []
    append(peer)
    assert peer.answer()["data"] == "0"
    assert peer.session.effects == []


def test_an_authentication_that_runs_out_of_time_is_an_error_of_the_append() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [SECRET])
    peer.replies()
    peer.session.verdict(number, ETIMEDOUT, "too late")
    assert peer.ask(APPEND, messages.Append(1, "x")) == ETIMEDOUT
    assert peer.ask(APPEND, messages.Append(1, "x")) == EINVAL


def test_a_secret_is_cut_where_it_is_too_long_anyway() -> None:
    peer = Peer()
    peer.session.prompted(begin(peer), [SECRET])
    append(peer, "ä" * 2**19)
    assert len(peer.effect(effects.Answer).answer) == limits.PASSWORD_MAX + 1


def test_clunking_an_afid_ends_its_authentication_and_cancels_the_append() -> None:
    peer = Peer()
    number = begin(peer)
    peer.session.prompted(number, [SECRET])
    peer.replies()
    waiting = append(peer)
    peer.session.effects.clear()
    clunk = peer.send(CLUNK, messages.Clunk(1))
    assert peer.effect(effects.ForgetAfid).afid == number
    assert peer.replies() == [(ERROR, waiting, ECANCELED), (frames.CLUNK_REPLY, clunk, {})]
    peer.session.prompted(number, [SECRET])
    peer.session.verdict(number, 0)
    assert peer.replies() == []
    assert not peer.session.known


def test_a_clunked_afid_is_good_for_nothing_but_its_sessions_go_on() -> None:
    peer = Peer()
    peer.ready()
    assert peer.ask(CLUNK, messages.Clunk(1)) == {}
    peer.session.effects.clear()
    assert peer.ask(ATTACH, messages.Attach(1, 9, "alice")) == EACCES
    peer.call()


def test_there_are_at_most_so_many_afids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAXIMA, Afid, 2)
    peer = Peer()
    begin(peer, 1)
    begin(peer, 2)
    assert peer.ask(AUTH, messages.Auth(3, "alice")) == EAGAIN


def test_numbers_that_the_monitor_is_told_are_never_used_twice() -> None:
    peer = Peer()
    numbers = [begin(peer, afid) for afid in range(10)]
    assert len(set(numbers)) == 10


@pytest.mark.parametrize(
    ("afid", "uname", "aname"),
    [(1, "bob", "/calc"), (9, "alice", "/calc"), (1, "alice", "/"), (1, "alice", "/tools"), (1, "alice", "/calculator")],
)
def test_an_afid_is_good_for_its_user_and_its_part_of_the_tree_only(afid: int, uname: str, aname: str) -> None:
    peer = Peer()
    peer.authenticate(aname="/calc")
    assert peer.ask(ATTACH, messages.Attach(afid, 2, uname, aname)) == EACCES


@pytest.mark.parametrize("aname", ["/calc", "calc", "/calc/deeper", "calc/a/b"])
def test_an_afid_is_good_for_attaching_at_its_aname_or_below(aname: str) -> None:
    peer = Peer()
    number = peer.authenticate(aname="calc")
    peer.send(ATTACH, messages.Attach(1, 2, "alice", aname))
    effect = peer.effect(effects.Attach)
    assert (effect.afid, effect.uname, effect.aname) == (number, "alice", aname.removeprefix("/"))


@pytest.mark.parametrize("aname", ["..", "/calc/..", "//calc", "/calc//x", "/.x"])
def test_an_unclean_aname_is_refused(aname: str) -> None:
    peer = Peer()
    peer.authenticate()
    assert peer.ask(ATTACH, messages.Attach(1, 2, "alice", aname)) == EINVAL
    assert peer.ask(AUTH, messages.Auth(5, "alice", aname)) == EINVAL


def test_an_afid_that_is_not_accepted_yet_can_not_be_attached_with() -> None:
    peer = Peer()
    peer.authenticate("bob", afid=7)
    peer.session.prompted(begin(peer), [SECRET])
    peer.replies()
    assert peer.ask(ATTACH, messages.Attach(1, 2, "alice")) == EACCES
    assert peer.ask(ATTACH, messages.Attach(7, 7, "bob")) == EEXIST
