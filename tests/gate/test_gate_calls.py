"""The real gate: calls go through, each answer to whom it belongs, on both kinds of connection."""

from collections.abc import Callable
from errno import EACCES, ECANCELED, ENOENT, ENXIO

import pytest

from srpcd import ipc
from srpcd.wire import frames, messages
from srpcd.wire.frames import AUTH, CALL, FLUSH, FLUSH_REPLY, PING, STAT
from tests.gate.world import World


def test_a_call_goes_through(world: World) -> None:
    client = world.connect()
    client.log_in()
    assert client.walk("calc/echo") == {"qid": "7:9", "is_dir": False}
    for payload in (b"", b"hello", bytes(100_000), bytes(3_000_000)):
        assert client.call(payload) == payload
    assert client.ask(CALL, messages.call_body(3, b"with metadata", b'{"a":1}')) == b'{"a":1}with metadata'
    assert client.ask(frames.APPEND, messages.Append(3, "text")) == {"data": "text"}


def test_tls_negotiates_1_3_the_protocol_and_a_hybrid_group(start: Callable[..., World]) -> None:
    world = start("tls")
    client = world.connect()
    assert client.tls is not None
    assert client.ask(PING) == {}
    assert client.tls.get_protocol_version_name() == "TLSv1.3"
    assert client.tls.get_alpn_proto_negotiated() == b"srpc/1"
    assert client.tls.get_group_name() in ("X25519MLKEM768", "x25519", "X25519")


@pytest.mark.parametrize("alpn", [b"", b"h2", b"srpc/2"])
def test_a_client_that_does_not_speak_the_protocol_is_hung_up_on(start: Callable[..., World], alpn: bytes) -> None:
    world = start("tls")
    client = world.connect(alpn=alpn)
    assert client.over()
    assert world.connect().ask(PING) == {}


def test_stat_is_translated(world: World) -> None:
    client = world.connect()
    client.log_in()
    assert client.walk("a/dir") == {"qid": "7:5", "is_dir": True}
    reply = client.ask(STAT, messages.Stat(3))
    assert reply == {
        "qid": "7:8",
        "name": "dir",
        "is_dir": True,
        "children": ["a", "b"],
        "more": False,
        "mode": 0o755,
        "uid": 1,
        "gid": 2,
        "user": "u",
        "group": "g",
        "context": None,
        "mtime": 3,
        "kind": "directory",
        "live": True,
    }
    assert client.ask(STAT, messages.Stat(2))["name"] == "/"


def test_what_the_kernel_refuses_is_answered_and_told_to_the_monitor(world: World) -> None:
    client = world.connect()
    client.log_in()
    assert client.walk("none") == ENOENT
    assert client.walk("closed") == EACCES
    assert world.heard(ipc.Refusal) == [ipc.Refusal(client.number, 100, "walk", "closed", EACCES, 0)]
    for _ in range(100):
        assert client.walk("closed") == EACCES
    assert client.ask(PING) is not None
    assert len(world.heard(ipc.Refusal)) <= 30
    client.walk("unknown")
    assert client.call() == ENXIO


def test_a_handlers_own_error_is_passed_on(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("error")
    assert client.call() == 42


def test_answers_come_in_the_order_in_which_they_are_ready(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("late")
    client.walk("echo", 4)
    seqs = [client.request(CALL, messages.call_body(3, str(n).encode())) for n in range(10)]
    assert client.call(b"overtakes", 4) == b"overtakes"
    world.until(lambda: len(world.workers[1].late) == 10)
    world.release(-1)
    answers = [client.frame() for _ in seqs]
    assert [(seq, body[4:]) for _, seq, body in answers] == [(seqs[n], str(n).encode()) for n in reversed(range(10))]


def test_a_batch_of_calls_is_written_to_the_worker_and_answered_in_one_go(local: World) -> None:
    client = local.connect()
    client.log_in()
    client.walk("echo")
    batch = b"".join(frames.frame(CALL, 100 + n, messages.call_body(3, b"x" * 50)) for n in range(64))
    client.send(batch)
    assert [client.frame()[1] for _ in range(64)] == list(range(100, 164))


def test_two_users_on_one_connection_have_their_own_workers(world: World) -> None:
    client = world.connect()
    client.log_in("alice", 1, 2)
    client.log_in("bob", 11, 12)
    client.walk("late", 3, 2)
    client.walk("late", 13, 12)
    client.request(CALL, messages.call_body(3, b"from alice"))
    client.request(CALL, messages.call_body(13, b"from bob"))
    world.until(lambda: all(len(world.workers[n].late) == 1 for n in (1, 2)))
    assert world.workers[1].late[0][1][4:] == b"from alice"
    assert world.workers[2].late[0][1][4:] == b"from bob"
    assert [kind for kind, *_ in world.workers[2].got][:2] == [ipc.OPEN, ipc.WALK]
    world.release()
    assert {client.frame()[2][4:] for _ in range(2)} == {b"from alice", b"from bob"}


def test_two_connections_of_one_user_share_a_worker_but_no_answers(world: World) -> None:
    first, second = world.connect(), world.connect()
    for client in (first, second):
        client.log_in()
        client.walk("late")
        client.request(CALL, messages.call_body(3, b"of %d" % client.number))
    world.until(lambda: len(world.workers[1].late) == 2)
    world.release(-1)
    assert first.frame()[2][4:] == b"of %d" % first.number
    assert second.frame()[2][4:] == b"of %d" % second.number
    opened = [(tag, body) for kind, tag, body in world.workers[1].got if kind == ipc.OPEN]
    assert opened == [(first.number, b"127.0.0.1:9"), (second.number, b"127.0.0.1:9")]


def test_a_flush_reaches_the_worker_and_the_calls_error_comes_first(world: World) -> None:
    client = world.connect()
    client.log_in()
    client.walk("late")
    call = client.request(CALL, messages.call_body(3, b""))
    flush = client.request(FLUSH, frames.SEQ.pack(call))
    kind, seq, body = client.frame()
    assert (kind, seq) == (frames.ERROR, call)
    assert messages.decode(messages.Error, body).errno == ECANCELED
    assert client.frame() == (FLUSH_REPLY, flush, b"")


def test_a_wrong_password_is_refused_and_the_right_one_still_taken(world: World) -> None:
    client = world.connect()
    assert client.ask(AUTH, messages.Auth(1, "alice"))["prompts"] == [
        {"style": "info", "text": "hello"},
        {"style": "secret", "text": "Password:"},
    ]
    assert client.ask(frames.APPEND, messages.Append(1, "wrong")) == {
        "data": "0",
        "prompts": [{"style": "info", "text": "go away"}],
    }
    assert client.ask(frames.ATTACH, messages.Attach(1, 2, "alice")) == EACCES
    client.log_in("alice", 5, 6)


def test_a_conversation_of_several_steps_works(world: World) -> None:
    client = world.connect()
    client.ask(AUTH, messages.Auth(1, "two"))
    assert client.ask(frames.APPEND, messages.Append(1, "owt"))["prompts"] == [{"style": "text", "text": "Code:"}]
    assert client.ask(frames.APPEND, messages.Append(1, "123456"))["data"] == "1"
    assert client.ask(frames.ATTACH, messages.Attach(1, 2, "two"))["is_dir"]


def test_peer_authentication_asks_nothing(local: World) -> None:
    client = local.connect()
    assert client.ask(AUTH, messages.Auth(1, "me", mechanism="peer")) == {"prompts": []}
    assert client.ask(frames.ATTACH, messages.Attach(1, 2, "me"))["is_dir"]
    assert client.ask(AUTH, messages.Auth(3, "you", mechanism="peer")) == EACCES


def test_a_clunked_afid_is_forgotten_by_the_monitor_and_its_child_hung_up_on(local: World) -> None:
    client = local.connect()
    client.ask(AUTH, messages.Auth(1, "alice"))
    assert client.ask(frames.CLUNK, messages.Clunk(1)) == {}
    assert local.heard(ipc.ForgetAfid)[0].conn == client.number
    local.until(lambda: not local.conversing())


def test_a_service_announces_and_is_told_its_lines(local: World) -> None:
    client = local.connect()
    assert client.ask(frames.ANNOUNCE, messages.Announce(1, "none")) == ENOENT
    assert client.ask(frames.ANNOUNCE, messages.Announce(1, "calc/add")) == {"warning": "mind"}
    listen = client.request(frames.LISTEN, messages.Listen(1))
    for line in (7, 8):
        local.tell(ipc.NewLine(client.number, 55, line))
        kind, seq, body = client.frame()
        assert (kind, seq) == (frames.LISTEN_REPLY, listen)
        assert messages.decode(messages.ListenReply, body).line == line
    client.request(frames.CLUNK, messages.Clunk(1))
    assert [client.frame()[0] for _ in range(2)] == [frames.ERROR, frames.CLUNK_REPLY]
    assert local.heard(ipc.Withdraw) == [ipc.Withdraw(client.number, 55)]
