"""Calls, their answers, and their cancellation."""

from errno import EACCES, EBADF, EBADMSG, ECANCELED, ECONNRESET, EILSEQ, EIO, EISDIR, EMSGSIZE

import pytest

from srpcd.session import effects
from srpcd.session.effects import Forward
from srpcd.wire import frames, limits, messages
from srpcd.wire.frames import ATTACH, CALL, CALL_REPLY, ERROR, FLUSH, FLUSH_REPLY, WALK
from tests.session.peer import Peer


@pytest.fixture
def peer() -> Peer:
    made = Peer()
    made.ready()
    return made


def test_a_call_is_forwarded_verbatim_and_answered_verbatim(peer: Peer) -> None:
    seq = peer.send(CALL, messages.call_body(3, b"\0payload", b'{"a":1}'))
    forward = peer.effect(Forward)
    assert (forward.kind, forward.session, forward.place.path) == (CALL, 100, b"calc/add")
    assert (forward.place.dev, forward.place.ino) == (1, 3)
    assert messages.split_call_reply(forward.body) == (b"\0payload", b'{"a":1}')
    assert peer.session.forwards() == [forward]
    reply = messages.call_reply_body(b"\xff", b"{}")
    peer.session.called(forward, reply)
    assert peer.replies() == [(CALL_REPLY, seq, reply)]
    assert peer.session.forwards() == []


def test_answers_may_come_in_any_order_and_each_but_once(peer: Peer) -> None:
    forwards = [peer.call() for _ in range(5)]
    for each in reversed(forwards):
        peer.session.called(each, bytes(4))
        peer.session.called(each, bytes(4))
        peer.session.failed(each, EIO)
        peer.session.handler_failed(each, b"{}")
    assert [seq for _, seq, _ in peer.replies()] == [each.seq for each in reversed(forwards)]


def test_a_late_answer_does_not_reach_who_uses_the_seq_now(peer: Peer) -> None:
    old = peer.call(seq=9)
    peer.session.failed(old, ECONNRESET)
    new = peer.call(seq=9)
    peer.session.called(old, messages.call_reply_body(b"old"))
    peer.session.called(new, messages.call_reply_body(b"new"))
    assert peer.replies() == [(ERROR, 9, ECONNRESET), (CALL_REPLY, 9, messages.call_reply_body(b"new"))]


def test_a_directory_can_not_be_called(peer: Peer) -> None:
    assert peer.ask(CALL, messages.call_body(2, b"")) == EISDIR
    assert peer.ask(frames.APPEND, messages.Append(2, "")) == EISDIR
    assert peer.ask(CALL, messages.call_body(77, b"")) == EBADF
    assert peer.ask(CALL, messages.call_body(1, b"")) == EBADF


def test_an_append_on_an_endpoint_is_a_call_with_text(peer: Peer) -> None:
    seq = peer.send(frames.APPEND, messages.Append(3, "ä"))
    forward = peer.effect(Forward)
    assert (forward.kind, forward.body) == (frames.APPEND, bytes(4) + "ä".encode())
    peer.session.called(forward, messages.call_reply_body("ö".encode(), b"{}"))
    assert peer.replies() == [(frames.APPEND_REPLY, seq, {"data": "ö"})]
    peer.send(frames.APPEND, messages.Append(3, ""))
    peer.session.called(peer.effect(Forward), messages.call_reply_body(b"\xff"))
    assert peer.answer() == EILSEQ
    assert peer.ask(frames.APPEND, messages.Append(3, "x" * (limits.PAYLOAD_MAX + 1))) == EMSGSIZE


@pytest.mark.parametrize(("character", "whole"), [("x", True), ("\1", False)])
def test_an_answer_in_text_takes_no_more_than_a_message_in_json(peer: Peer, character: str, whole: bool) -> None:
    seq = peer.send(frames.APPEND, messages.Append(3, ""))
    text = character * limits.PAYLOAD_MAX
    peer.session.called(peer.effect(Forward), messages.call_reply_body(text.encode()))
    assert sum(map(len, peer.session.out)) < limits.APPEND_REPLY_MAX + frames.HEADER.size
    assert peer.replies() == [(frames.APPEND_REPLY, seq, {"data": text}) if whole else (ERROR, seq, EMSGSIZE)]
    assert not peer.session.closed


@pytest.mark.parametrize("body", [b"", b"123", b"\0\0\0\1", b"\xff\xff\xff\xffxxxx", b"\0\1\0\1" + bytes(70000)])
@pytest.mark.parametrize("kind", [CALL, frames.APPEND])
def test_a_malformed_reply_is_an_error_of_that_call_alone(peer: Peer, body: bytes, kind: int) -> None:
    peer.send(kind, messages.call_body(3, b"") if kind == CALL else messages.Append(3, ""))
    peer.session.called(peer.effect(Forward), body)
    assert peer.answer() == EBADMSG
    assert not peer.session.closed


def test_a_handlers_error_is_passed_on_when_it_is_one(peer: Peer) -> None:
    for body, errno in [
        (b'{"errno":42,"code":"anything","message":"no luck"}', 42),
        (b'{"errno":0,"code":"","message":""}', EBADMSG),
        (b'{"errno":5}', EBADMSG),
        (b"\xff", EBADMSG),
        (b"[" * 60000, EBADMSG),
        (b'{"errno":5,"code":"","message":"' + b"\\u0001" * 10000 + b'"}', 5),
    ]:
        peer.session.handler_failed(peer.call(), body)
        assert sum(map(len, peer.session.out)) < limits.JSON_MAX
        assert peer.answer() == errno


@pytest.mark.parametrize(("errno", "told"), [(EACCES, EACCES), (0, EIO), (4096, EIO), (65535, EIO)])
def test_an_errno_that_is_none_becomes_eio(peer: Peer, errno: int, told: int) -> None:
    peer.session.failed(peer.call(), errno)
    assert peer.answer() == told


def test_a_flushed_call_gets_its_own_error_before_the_flush_its_reply(peer: Peer) -> None:
    forward = peer.call()
    first = peer.send(FLUSH, frames.SEQ.pack(forward.seq))
    assert peer.effect(effects.Flush).forward is forward
    second = peer.send(FLUSH, frames.SEQ.pack(forward.seq))
    assert peer.session.effects == []
    peer.session.failed(forward, ECANCELED)
    assert peer.replies() == [
        (ERROR, forward.seq, ECANCELED),
        (FLUSH_REPLY, first, None),
        (FLUSH_REPLY, second, None),
    ]


def test_a_call_that_was_answered_while_its_flush_was_on_the_way_keeps_its_answer(peer: Peer) -> None:
    forward = peer.call()
    flush = peer.send(FLUSH, frames.SEQ.pack(forward.seq))
    peer.session.called(forward, bytes(4))
    assert peer.replies() == [(CALL_REPLY, forward.seq, bytes(4)), (FLUSH_REPLY, flush, None)]


def test_a_flush_of_what_is_not_outstanding_or_not_cancellable_is_answered_at_once(peer: Peer) -> None:
    assert peer.ask(FLUSH, frames.SEQ.pack(12345)) is None
    attach = peer.send(ATTACH, messages.Attach(1, 9, "alice"))
    request = peer.effect(effects.Attach).request
    assert peer.ask(FLUSH, frames.SEQ.pack(attach)) is None
    peer.session.attached(request, 100)
    forward = peer.effect(Forward)
    assert peer.ask(FLUSH, frames.SEQ.pack(attach)) is None
    peer.session.walked(forward, 1, 1, True)
    assert peer.replies() == [(ATTACH + 1, attach, {"qid": "1:1", "is_dir": True})]


def test_a_flushed_walk_frees_its_fid(peer: Peer) -> None:
    walk = peer.send(WALK, messages.Walk(2, 9, "x"))
    forward = peer.effect(Forward)
    flush = peer.send(FLUSH, frames.SEQ.pack(walk))
    peer.session.effects.clear()
    peer.session.failed(forward, ECANCELED)
    assert peer.replies() == [(ERROR, walk, ECANCELED), (FLUSH_REPLY, flush, None)]
    peer.walk("x", 9)


# --- large payloads ----------------------------------------------------------------------------------------------------

BIG = bytes(range(256)) * 1024


@pytest.mark.parametrize("into_room", [False, True])
def test_a_large_call_is_forwarded_with_its_payload_apart(peer: Peer, into_room: bool) -> None:
    data = frames.frame(CALL, 50, messages.call_body(3, BIG, b'{"a":1}')) + frames.frame(frames.PING, 51)
    begun = 100
    peer.session.receive(data[:begun])
    assert peer.session.large == len(BIG) + 12 + 7 - (begun - 20)
    assert peer.session.effects == []
    if into_room:
        while peer.session.large:
            with peer.session.room() as room:
                count = len(room)
                room[:] = data[begun : begun + count]
            peer.session.filled(count)
            begun += count
            peer.session.receive(b"" if peer.session.large else data[begun:])
    else:
        peer.session.receive(data[begun:])
    forward = peer.effect(Forward)
    assert (forward.kind, forward.seq, forward.payload) == (CALL, 50, BIG)
    assert messages.split_call_reply(forward.body) == (b"", b'{"a":1}')
    assert forward.size == len(BIG) + 4 + 7
    assert [(kind, seq) for kind, seq, _ in peer.replies()] == [(frames.PING_REPLY, 51)]


def test_a_large_call_of_no_fid_is_refused_and_the_next_one_goes_through(peer: Peer) -> None:
    data = frames.frame(CALL, 50, messages.call_body(77, BIG))
    peer.session.receive(data[:100])
    peer.session.receive(data[100:])
    assert peer.replies() == [(ERROR, 50, EBADF)]
    assert peer.call().payload == b""


def test_a_payload_that_is_too_large_ends_the_connection_though_it_came_apart(peer: Peer) -> None:
    data = frames.frame(CALL, 50, messages.call_body(3, bytes(limits.PAYLOAD_MAX + 1)))
    peer.session.receive(data[:100])
    peer.session.receive(data[100:])
    assert peer.replies() == [(ERROR, 50, EMSGSIZE)]
    peer.effect(effects.Close)
    assert peer.session.closed


def test_a_large_answer_is_passed_on_without_a_copy(peer: Peer) -> None:
    forward = peer.call(seq=60)
    reply = messages.call_reply_body(BIG, b"{}")
    peer.session.called(forward, reply)
    *_, last = peer.session.out
    assert isinstance(last, memoryview)
    assert last.obj is reply
    assert peer.replies() == [(CALL_REPLY, 60, reply)]
