"""Announcing and listening."""

from errno import EBADF, EBUSY, ECANCELED, EEXIST, EINVAL, EISDIR, ENOENT, EOPNOTSUPP, ESHUTDOWN

import pytest

from srpcd.session import effects
from srpcd.wire import frames, messages
from srpcd.wire.frames import ANNOUNCE, CLUNK, ERROR, LISTEN, LISTEN_REPLY
from srpcd.wire.limits import LINES_MAX
from tests.session.peer import Peer


@pytest.fixture
def peer() -> Peer:
    return Peer(local=True)


def announce(peer: Peer, fid: int = 1, number: int = 70, warning: str = "") -> None:
    peer.send(ANNOUNCE, messages.Announce(fid, "/calc/add"))
    effect = peer.effect(effects.Announce)
    assert effect.path == "calc/add"
    peer.session.announced(effect.request, number, warning)
    assert peer.answer() == {"warning": warning or None}


def test_announcing_needs_no_authentication_but_the_local_socket(peer: Peer) -> None:
    announce(peer, warning="mind the mode")
    assert peer.session.serving
    network = Peer()
    assert network.ask(ANNOUNCE, messages.Announce(1, "calc/add")) == EOPNOTSUPP
    assert network.ask(LISTEN, messages.Listen(1)) == EOPNOTSUPP


@pytest.mark.parametrize(("path", "errno"), [("", EISDIR), ("/", EISDIR), ("../x", EINVAL), ("a//b", EINVAL)])
def test_what_can_not_be_announced_is_refused(peer: Peer, path: str, errno: int) -> None:
    assert peer.ask(ANNOUNCE, messages.Announce(1, path)) == errno


def test_an_announcement_that_the_monitor_refuses_frees_its_fid(peer: Peer) -> None:
    peer.send(ANNOUNCE, messages.Announce(1, "none"))
    request = peer.effect(effects.Announce).request
    assert peer.ask(ANNOUNCE, messages.Announce(1, "other")) == EEXIST
    assert peer.ask(LISTEN, messages.Listen(1)) == EBADF
    peer.session.refused(request, ENOENT)
    assert peer.answer() == ENOENT
    assert not peer.session.serving
    announce(peer)


def test_a_listen_is_answered_once_for_each_line_also_for_earlier_ones(peer: Peer) -> None:
    announce(peer)
    peer.session.line(70, 1)
    peer.session.line(99, 1000)
    assert peer.replies() == []
    seq = peer.send(LISTEN, messages.Listen(1))
    peer.session.line(70, 2)
    peer.session.line(70, 2**64 - 1)
    assert peer.replies() == [(LISTEN_REPLY, seq, {"line": line}) for line in (1, 2, 2**64 - 1)]
    assert not peer.session.busy


def test_lines_for_a_service_that_never_listens_do_not_collect(peer: Peer) -> None:
    announce(peer)
    for line in range(LINES_MAX + 10):
        peer.session.line(70, line)
    peer.send(LISTEN, messages.Listen(1))
    assert [body["line"] for *_, body in peer.replies()] == list(range(10, LINES_MAX + 10))


def test_an_announcement_is_listened_to_once(peer: Peer) -> None:
    announce(peer)
    peer.send(LISTEN, messages.Listen(1))
    assert peer.ask(LISTEN, messages.Listen(1)) == EBUSY
    assert peer.ask(LISTEN, messages.Listen(2)) == EBADF


def test_clunking_withdraws_and_ends_the_listen_first(peer: Peer) -> None:
    announce(peer)
    listen = peer.send(LISTEN, messages.Listen(1))
    clunk = peer.send(CLUNK, messages.Clunk(1))
    assert peer.effect(effects.Withdraw).announcement == 70
    assert peer.replies() == [(ERROR, listen, ECANCELED), (frames.CLUNK_REPLY, clunk, {})]
    peer.session.line(70, 5)
    assert peer.replies() == []
    assert not peer.session.serving
    announce(peer, number=71)
    assert peer.ask(CLUNK, messages.Clunk(1)) == {}


def test_a_listen_is_not_cancelled_by_a_flush(peer: Peer) -> None:
    announce(peer)
    listen = peer.send(LISTEN, messages.Listen(1))
    assert peer.ask(frames.FLUSH, frames.SEQ.pack(listen)) is None
    peer.session.line(70, 5)
    assert peer.answer() == {"line": 5}


def test_a_drained_announcement_goes_on_until_the_end(peer: Peer) -> None:
    announce(peer)
    listen = peer.send(LISTEN, messages.Listen(1))
    peer.session.drain()
    assert peer.ask(ANNOUNCE, messages.Announce(2, "x")) == ESHUTDOWN
    peer.session.line(70, 5)
    assert peer.answer() == {"line": 5}
    peer.session.expire()
    assert peer.replies() == [(ERROR, listen, ESHUTDOWN)]
