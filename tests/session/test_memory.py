"""What a session keeps in memory is told to the gate, and can be made less."""

from errno import EAGAIN

import pytest

from srpcd.session.effects import Forward
from srpcd.wire import messages
from srpcd.wire.frames import CALL, CLUNK, WALK, frame
from srpcd.wire.limits import FIDS_TIGHT, LARGE, MIB, OUTSTANDING_TIGHT
from tests.session.peer import Peer


@pytest.fixture
def peer() -> Peer:
    made = Peer()
    made.ready()
    return made


def test_paths_of_fids_and_outstanding_requests_are_counted(peer: Peer) -> None:
    before = peer.session.held
    peer.walk("a" * 200, 4)
    one = peer.session.held
    assert one - before > 300
    peer.walk("b", 5)
    assert one < peer.session.held < one + 500
    forward = peer.call()
    assert peer.session.held > one + 500
    peer.session.called(forward, messages.call_reply_body(b""))
    assert peer.answer() is not None
    for fid in (4, 5):
        assert peer.ask(CLUNK, messages.Clunk(fid)) == {}
    assert peer.session.held == before
    peer.session.end()
    assert peer.session.held == 0


def test_a_message_in_progress_is_counted_until_the_session_ends(peer: Peer) -> None:
    session = peer.session
    assert (session.pinned, session.missing, session.expected) == (0, 0, 0)
    partials = session.partials
    data = frame(CALL, 100, messages.call_body(3, bytes(MIB)))
    session.receive(data[: 2 * LARGE])
    assert session.partials == partials + 1
    assert (session.missing, session.expected) == (len(data) - 2 * LARGE, MIB)
    assert LARGE < session.pinned <= 2 * LARGE
    session.end()
    assert (session.pinned, session.missing, session.expected) == (0, 0, 0)


def test_while_memory_is_short_there_are_fewer_fids(peer: Peer) -> None:
    session = peer.session
    session.tighten(True)
    for fid in range(4, 2 + FIDS_TIGHT):
        peer.walk("a", fid)
    assert peer.ask(WALK, messages.Walk(2, 5000, "a")) == EAGAIN
    session.tighten(False)
    peer.walk("a", 5000)


def test_while_memory_is_short_fewer_requests_may_be_outstanding(peer: Peer) -> None:
    session = peer.session
    session.tighten(True)
    for seq in range(1000, 1000 + OUTSTANDING_TIGHT):
        peer.send(CALL, messages.call_body(3, b""), seq)
    assert peer.ask(CALL, messages.call_body(3, b"")) == EAGAIN
    session.tighten(False)
    peer.send(CALL, messages.call_body(3, b""))
    assert len([each for each in session.effects if isinstance(each, Forward)]) == OUTSTANDING_TIGHT + 1
