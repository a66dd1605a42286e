"""A session, request by request: what it answers, what it wants done."""

from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    EBADMSG,
    ECANCELED,
    EEXIST,
    EILSEQ,
    EINVAL,
    EIO,
    EKEYEXPIRED,
    EMSGSIZE,
    ENAMETOOLONG,
    ENOENT,
    EPROTO,
    ESHUTDOWN,
)

import pytest

from srpcd.session import effects, session
from srpcd.session.effects import Forward
from srpcd.session.fids import MAXIMA, Fid
from srpcd.wire import frames, messages
from srpcd.wire.frames import ATTACH, CALL, CALL_REPLY, CLUNK, ERROR, FLUSH, HEADER, PING, STAT, WALK, frame
from tests.session.peer import Peer


@pytest.fixture
def peer() -> Peer:
    made = Peer()
    made.ready()
    return made


def stat(name: str = "x", children: list[str] | None = None) -> messages.StatReply:
    return messages.StatReply("1:1", name, True, children, False, 0o755, 0, 0, "root", "root", None, 0, "directory", True)


# --- the connection ----------------------------------------------------------------------------------------------------


def test_ping_tells_the_tree_on_the_local_socket_only() -> None:
    assert Peer(local=True).ask(PING) == {"tree": "/the/tree"}
    assert Peer().ask(PING) == {}


def test_it_knows_when_its_peer_is_in_the_middle_of_a_message(peer: Peer) -> None:
    data = frame(PING, 7)
    found = []
    for piece in (b"", data[:5], data[5:]):
        peer.session.receive(piece)
        found.append(peer.session.partial)
    assert found == [False, True, False]


@pytest.mark.parametrize(
    ("data", "errno"),
    [
        (frame(99, 7), EPROTO),
        (frame(frames.CALL_REPLY, 7, bytes(4)), EPROTO),
        (HEADER.pack(WALK, 7, 2**63), EMSGSIZE),
        (HEADER.pack(CALL, 7, 2**64 - 1), EMSGSIZE),
        (frame(WALK, 7, b"{"), EBADMSG),
        (frame(CALL, 7, b"short"), EBADMSG),
        (frame(CALL, 7, frames.CALL_HEAD.pack(3, 9)), EBADMSG),
        (frame(FLUSH, 7, b"1234567"), EBADMSG),
    ],
)
def test_broken_input_is_answered_once_and_ends_the_session(peer: Peer, data: bytes, errno: int) -> None:
    waiting = peer.call()
    peer.session.receive(data + frame(PING, 8))
    assert peer.effect(effects.Close).left == [waiting]
    assert peer.replies() == [(ERROR, 7, errno)]
    peer.session.called(waiting, bytes(4))
    peer.session.receive(frame(PING, 9))
    assert peer.replies() == []
    assert peer.session.closed


def test_requests_before_broken_input_in_the_same_read_are_still_answered() -> None:
    peer = Peer()
    peer.session.receive(frame(PING, 1) + frame(99, 2) + frame(PING, 3))
    assert peer.replies() == [(frames.PING_REPLY, 1, {}), (ERROR, 2, EPROTO)]


@pytest.mark.parametrize("kind", [CALL, PING, FLUSH])
def test_a_seq_that_is_outstanding_may_not_be_used_again(peer: Peer, kind: int) -> None:
    peer.call(seq=50)
    body = {CALL: messages.call_body(3, b""), PING: b"", FLUSH: bytes(8)}[kind]
    peer.send(kind, body, 50)
    assert peer.replies() == [(ERROR, 50, EPROTO)]
    assert peer.session.closed


def test_a_seq_may_be_used_again_when_it_was_answered(peer: Peer) -> None:
    for _ in range(3):
        peer.session.called(peer.call(seq=50), bytes(4))
        assert peer.replies() == [(CALL_REPLY, 50, bytes(4))]


def test_strangers_are_refused_in_the_table_already() -> None:
    peer = Peer()
    assert peer.ask(ATTACH, messages.Attach(1, 2, "alice")) == EACCES
    assert peer.ask(WALK, messages.Walk(1, 2, "")) == EBADF
    assert peer.ask(STAT, messages.Stat(1)) == EBADF
    assert peer.ask(CALL, messages.call_body(1, b"")) == EBADF
    assert peer.ask(frames.APPEND, messages.Append(1, "")) == EBADF
    assert peer.ask(CLUNK, messages.Clunk(1)) == EBADF
    assert not peer.session.known


def test_more_than_the_limit_of_outstanding_requests_is_refused_but_can_be_flushed() -> None:
    peer = Peer(outstanding=2)
    peer.ready()
    first, second = peer.call(), peer.call()
    assert peer.ask(CALL, messages.call_body(3, b"")) == EAGAIN
    assert peer.ask(WALK, messages.Walk(2, 9, "")) == EAGAIN
    assert peer.ask(PING) == {}
    flushes = [peer.send(FLUSH, frames.SEQ.pack(each.seq)) for each in (first, second)]
    assert peer.ask(FLUSH, frames.SEQ.pack(first.seq)) == EAGAIN
    peer.session.effects.clear()
    peer.session.failed(first, ECANCELED)
    peer.session.failed(second, ECANCELED)
    assert [seq for _, seq, _ in peer.replies()] == [first.seq, flushes[0], second.seq, flushes[1]]
    assert not peer.session.busy


# --- fids --------------------------------------------------------------------------------------------------------------


def test_a_walk_joins_the_whole_path(peer: Peer) -> None:
    assert peer.walk("tools", 10, is_dir=True).place.path == b"tools"
    assert peer.walk("ä/b", 11, fid=10).place.path == "tools/ä/b".encode()
    assert peer.walk("", 12, fid=11).place.path == "tools/ä/b".encode()
    assert peer.walk("below/an/endpoint", 13, fid=11).place.path == "tools/ä/b/below/an/endpoint".encode()


@pytest.mark.parametrize("path", ["..", "/etc", "a//b", "a/../b", ".x", "a\0"])
def test_a_walk_of_an_unclean_path_is_refused_and_the_fid_stays_free(peer: Peer, path: str) -> None:
    assert peer.ask(WALK, messages.Walk(2, 9, path)) == EINVAL
    peer.walk("x", 9)


def test_a_path_that_grows_too_long_is_refused(peer: Peer) -> None:
    long = "/".join(["x" * 200] * 8)
    peer.walk(long, 9)
    assert peer.ask(WALK, messages.Walk(9, 10, long)) == ENAMETOOLONG


def test_a_walk_from_a_fid_that_is_none_or_to_one_that_is_in_use_is_refused(peer: Peer) -> None:
    assert peer.ask(WALK, messages.Walk(9, 10, "x")) == EBADF
    assert peer.ask(WALK, messages.Walk(1, 10, "x")) == EBADF
    assert peer.ask(WALK, messages.Walk(2, 3, "x")) == EEXIST
    assert peer.ask(WALK, messages.Walk(2, 2, "x")) == EEXIST
    assert peer.ask(WALK, messages.Walk(2, 1, "x")) == EEXIST


def test_a_failed_walk_frees_its_number_and_a_pending_one_keeps_it(peer: Peer) -> None:
    seq = peer.send(WALK, messages.Walk(2, 9, "x"))
    forward = peer.effect(Forward)
    assert peer.ask(WALK, messages.Walk(2, 9, "y")) == EEXIST
    assert peer.ask(CLUNK, messages.Clunk(9)) == EBADF
    assert peer.ask(STAT, messages.Stat(9)) == EBADF
    peer.session.failed(forward, ENOENT)
    assert peer.replies() == [(ERROR, seq, ENOENT)]
    peer.walk("y", 9)


def test_there_are_at_most_so_many_fids_and_clunking_one_makes_room(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAXIMA, Fid, 3)
    peer.walk("a", 10)
    assert peer.ask(WALK, messages.Walk(2, 11, "b")) == EAGAIN
    assert peer.ask(CLUNK, messages.Clunk(10)) == {}
    peer.walk("b", 11)
    assert peer.ask(CALL, messages.call_body(10, b"")) == EBADF


def test_a_call_goes_on_when_its_fid_is_clunked(peer: Peer) -> None:
    forward = peer.call()
    assert peer.ask(CLUNK, messages.Clunk(3)) == {}
    peer.session.called(forward, bytes(4))
    assert peer.answer() == bytes(4)


def test_stat_is_forwarded_with_its_page_and_answered(peer: Peer) -> None:
    peer.send(STAT, messages.Stat(2, "after", 10))
    forward = peer.effect(Forward)
    assert (forward.kind, forward.body, forward.limit, forward.place.path) == (STAT, b"after", 10, b"")
    peer.session.stated(forward, stat(children=["a"]))
    assert peer.answer()["children"] == ["a"]
    peer.session.stated(forward, stat())
    assert peer.replies() == []
    assert peer.ask(STAT, messages.Stat(2, "x" * 256)) == ENAMETOOLONG


@pytest.mark.parametrize(("reply", "errno"), [(stat("\udcff"), EILSEQ), (stat(children=["\x01" * 1000] * 1000), EMSGSIZE)])
def test_a_stat_that_can_not_be_sent_is_an_error(peer: Peer, reply: messages.StatReply, errno: int) -> None:
    peer.send(STAT, messages.Stat(2))
    peer.session.stated(peer.effect(Forward), reply)
    assert peer.answer() == errno


# --- sessions ----------------------------------------------------------------------------------------------------------


def test_several_users_share_a_connection_each_with_its_own_session(peer: Peer) -> None:
    peer.authenticate("bob", afid=11)
    peer.attach("bob", afid=11, fid=12, session=200)
    peer.walk("calc/add", 13, fid=12)
    assert peer.call(3).session == 100
    assert peer.call(13).session == 200
    assert peer.ask(ATTACH, messages.Attach(11, 14, "alice")) == EACCES
    assert peer.ask(ATTACH, messages.Attach(1, 14, "bob")) == EACCES


def test_an_ended_session_answers_what_is_outstanding_and_its_fids_are_expired(peer: Peer) -> None:
    peer.attach(fid=20, session=200)
    call = peer.call()
    peer.send(WALK, messages.Walk(2, 9, "x"))
    walk = peer.effect(Forward)
    peer.session.over(100)
    peer.session.over(100)
    peer.session.called(call, bytes(4))
    peer.session.walked(walk, 1, 1, False)
    assert [body for *_, body in peer.replies()] == [bytes(4), EKEYEXPIRED]
    assert peer.ask(CALL, messages.call_body(3, b"")) == EKEYEXPIRED
    assert peer.ask(STAT, messages.Stat(2)) == EKEYEXPIRED
    assert peer.ask(WALK, messages.Walk(2, 9, "x")) == EKEYEXPIRED
    assert peer.ask(CLUNK, messages.Clunk(3)) == {}
    peer.walk("x", 9, fid=20)
    peer.attach(fid=30, session=100)


def test_sessions_that_nothing_belongs_to_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SESSIONS_KEPT", 2)
    peer = Peer()
    peer.ready()
    peer.attach(fid=11, session=101)
    assert peer.ask(CLUNK, messages.Clunk(11)) == {}
    peer.send(ATTACH, messages.Attach(1, 12, "alice"))
    peer.session.attached(peer.effect(effects.Attach).request, 102)
    forward, forgotten = peer.session.effects
    assert isinstance(forward, Forward)
    assert isinstance(forgotten, effects.ForgetSession)
    assert forgotten.session == 101
    peer.session.effects.clear()
    peer.session.walked(forward, 1, 1, True)
    assert peer.answer()["is_dir"]
    peer.call()


def test_an_attach_that_the_monitor_refuses_frees_its_fid(peer: Peer) -> None:
    peer.send(ATTACH, messages.Attach(1, 9, "alice"))
    request = peer.effect(effects.Attach).request
    peer.session.refused(request, EACCES, "no")
    assert peer.answer() == EACCES
    peer.session.refused(request, EACCES)
    peer.session.attached(request, 1)
    peer.session.announced(request, 1)
    assert peer.replies() == []
    peer.attach(fid=9)


def test_an_attach_whose_place_is_not_there_frees_its_fid(peer: Peer) -> None:
    peer.send(ATTACH, messages.Attach(1, 9, "alice", "/gone"))
    effect = peer.effect(effects.Attach)
    assert effect.aname == "gone"
    peer.session.attached(effect.request, 100)
    forward = peer.effect(Forward)
    assert (forward.kind, forward.place.path) == (ATTACH, b"gone")
    peer.session.failed(forward, ENOENT)
    assert peer.answer() == ENOENT
    peer.attach(fid=9)


# --- the end -----------------------------------------------------------------------------------------------------------


def test_a_draining_session_takes_nothing_new_and_finishes_what_it_has(peer: Peer) -> None:
    forward = peer.call()
    peer.session.drain()
    assert peer.ask(CALL, messages.call_body(3, b"")) == ESHUTDOWN
    assert peer.ask(WALK, messages.Walk(2, 9, "")) == ESHUTDOWN
    assert peer.ask(frames.AUTH, messages.Auth(9, "bob")) == ESHUTDOWN
    assert peer.ask(PING) == {}
    assert peer.ask(CLUNK, messages.Clunk(3)) == {}
    assert peer.session.busy
    peer.session.called(forward, bytes(4))
    assert peer.answer() == bytes(4)
    assert not peer.session.busy


def test_a_verdict_while_draining_does_not_open_the_session_again() -> None:
    peer = Peer()
    peer.send(frames.AUTH, messages.Auth(1, "alice"))
    number = peer.effect(effects.Authenticate).afid
    peer.session.drain()
    peer.session.verdict(number, 0)
    assert peer.answer() == {"prompts": []}
    assert peer.session.known
    assert peer.ask(ATTACH, messages.Attach(1, 2, "alice")) == ESHUTDOWN


def test_expiring_answers_everything_that_is_outstanding(peer: Peer) -> None:
    forwards = [peer.call() for _ in range(3)]
    peer.send(ATTACH, messages.Attach(1, 9, "alice"))
    peer.effect(effects.Attach)
    assert peer.session.expire() == forwards
    assert [body for *_, body in peer.replies()] == [ESHUTDOWN] * 4
    assert peer.session.expire() == []
    peer.session.called(forwards[0], bytes(4))
    assert peer.replies() == []


def test_an_ended_session_says_which_requests_nobody_awaits(peer: Peer) -> None:
    forwards = [peer.call() for _ in range(3)]
    assert peer.session.end() == forwards
    peer.session.failed(forwards[0], EIO)
    peer.session.walked(forwards[1], 1, 1, True)
    assert peer.replies() == []
    assert not peer.session.busy


def test_effects_can_be_read_in_a_debugger_without_secrets(peer: Peer) -> None:
    assert "x" * 5 not in repr(peer.call(payload=b"x" * 5))
    assert repr(effects.Answer(1, b"secret")) == "Answer(afid=1)"
    assert repr(effects.Withdraw(3)) == "Withdraw(announcement=3)"
