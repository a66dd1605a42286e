"""The client's protocol without I/O."""

from array import array
from errno import EACCES, ECANCELED, ECONNRESET, EMSGSIZE, EPROTO
from typing import Any

import pytest

from srpc_client import CallError, ConnectionLost, requests
from srpc_client.core import BUSY, FLUSHES_MAX, ClientCore
from srpcd.wire import frames, messages
from srpcd.wire.limits import METADATA_MAX, PAYLOAD_MAX


def sent(core: ClientCore[str]) -> list[tuple[int, int, bytes]]:
    return list(frames.FrameReader(frames.REQUESTS).feed(bytes(core.take())))


def reply(kind: int, seq: int, message: messages.Message) -> bytes:
    return frames.frame(kind, seq, messages.encode(message))


def call_reply(seq: int, payload: bytes, metadata: bytes = b"") -> bytes:
    return frames.frame(frames.CALL_REPLY, seq, messages.call_reply_body(payload, metadata))


def ask(core: ClientCore[str], request: requests.Send, waiter: str | None) -> int:
    return core.request(request.kind, request.body, waiter)


@pytest.fixture
def core() -> ClientCore[str]:
    return ClientCore()


def test_a_call_is_one_frame_as_the_protocol_says(core: ClientCore[str]) -> None:
    seq = core.call(7, b"payload", b"{}", "waiter")
    assert core.waiting == 20 + 12 + 9
    assert core.take() == frames.frame(frames.CALL, seq, messages.call_body(7, b"payload", b"{}"))
    assert core.waiting == 0
    assert core.take() == b""


def test_what_is_asked_before_a_take_goes_out_together(core: ClientCore[str]) -> None:
    core.call(7, b"1", b"", "a")
    ask(core, requests.ping(), "b")
    core.clunk(9)
    assert [kind for kind, _seq, _body in sent(core)] == [frames.CALL, frames.PING, frames.CLUNK]
    assert core.outstanding == 3


def test_replies_are_matched_by_seq_in_any_order_and_however_they_are_cut(core: ClientCore[str]) -> None:
    first, second = core.call(7, b"1", b"", "first"), core.call(7, b"2", b"", "second")
    data = call_reply(second, b"two", b"{}") + call_reply(first, b"one")
    done = []
    for at in range(len(data)):
        done += core.receive(data[at : at + 1])
    assert done == [("second", (b"two", b"{}"), None), ("first", (b"one", b""), None)]
    assert core.outstanding == 0


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (requests.auth(1, "alice"), frames.AUTH_REPLY, messages.AuthReply([messages.Prompt("secret", "Password: ")])),
        (requests.attach(1, 2, "alice"), frames.ATTACH_REPLY, messages.Qid("1:2", True)),
        (requests.walk(1, 2, "calc"), frames.WALK_REPLY, messages.Qid("1:3", False)),
        (requests.append(1, "x"), frames.APPEND_REPLY, messages.AppendReply("1")),
        (requests.clunk(1), frames.CLUNK_REPLY, messages.Empty()),
        (requests.ping(), frames.PING_REPLY, messages.PingReply("/srv/rpc")),
        (requests.announce(1, "/x"), frames.ANNOUNCE_REPLY, messages.AnnounceReply("beware")),
    ],
)
def test_each_reply_is_given_back_as_its_message(
    core: ClientCore[str], request_: requests.Send, kind: int, message: messages.Message
) -> None:
    seq = ask(core, request_, "waiter")
    assert core.receive(reply(kind, seq, message)) == [("waiter", message, None)]


def test_an_error_is_given_back_as_a_call_error(core: ClientCore[str]) -> None:
    seq = core.call(7, b"", b"", "waiter")
    [(waiter, answer, error)] = core.receive(messages.error_frame(seq, EACCES, "no"))
    assert (waiter, answer) == ("waiter", None)
    assert isinstance(error, CallError)
    assert (error.errno, error.code, error.message) == (EACCES, "EACCES", "no")
    assert str(error) == "EACCES: no"
    assert core.failure is None


def test_the_servers_last_words_are_told_however_the_connection_ends() -> None:
    for failure, says in (
        (None, "the server closed the connection and said EACCES: too many"),
        (
            ConnectionLost(message="the connection ended: reset"),
            "the connection ended: reset; the server's last words were EACCES",
        ),
    ):
        core: ClientCore[str] = ClientCore()
        core.call(7, b"", b"", "waiter")
        assert core.receive(messages.error_frame(0, EACCES, "too many")) == []
        assert core.lose(failure) == ["waiter"]
        assert core.lost().message.startswith(says)


def test_a_listen_is_answered_many_times_until_its_error(core: ClientCore[str]) -> None:
    seq = ask(core, requests.listen(3), "listener")
    assert core.outstanding == 0  # it does not count: it stays for good
    for line in (1, 2, 3):
        assert core.receive(reply(frames.LISTEN_REPLY, seq, messages.ListenReply(line))) == [
            ("listener", messages.ListenReply(line), None)
        ]
    [(_, _, error)] = core.receive(messages.error_frame(seq, ECANCELED))
    assert error is not None
    assert core.lose() == []


# --- giving up ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_call_is_flushed_and_its_answer_dropped(core: ClientCore[str]) -> None:
    seq = core.call(7, b"", b"", "waiter")
    core.take()
    core.cancel(seq)
    core.cancel(seq)  # a second time changes nothing
    [(kind, flush, body)] = sent(core)
    assert (kind, body) == (frames.FLUSH, frames.SEQ.pack(seq))
    assert core.receive(messages.error_frame(seq, ECANCELED) + frames.frame(frames.FLUSH_REPLY, flush)) == []
    assert core.outstanding == 0
    core.cancel(seq)  # and one that is answered is gone
    assert core.waiting == 0


def test_a_seq_is_never_used_twice(core: ClientCore[str]) -> None:
    seqs = []
    for _ in range(100):
        seq = core.call(7, b"", b"", "waiter")
        core.cancel(seq)
        seqs += [seq for _kind, seq, _body in sent(core)]
    assert len(set(seqs)) == len(seqs)


@pytest.mark.parametrize("request_", [requests.walk(1, 42, "calc"), requests.attach(1, 42, "alice")])
def test_a_fid_that_is_made_after_all_is_clunked(core: ClientCore[str], request_: requests.Send) -> None:
    seq = ask(core, request_, "waiter")
    core.cancel(seq, request_.fid)
    core.take()
    assert core.receive(reply(request_.kind + 1, seq, messages.Qid("1:2", True))) == []
    assert sent(core)[-1][0::2] == (frames.CLUNK, messages.encode(messages.Clunk(42)))


def test_a_fid_that_was_not_made_is_not_clunked(core: ClientCore[str]) -> None:
    seq = ask(core, requests.walk(1, 42, "calc"), "waiter")
    core.cancel(seq, 42)
    core.take()
    assert core.receive(messages.error_frame(seq, ECANCELED)) == []
    assert core.waiting == 0


def test_an_attach_is_not_flushed(core: ClientCore[str]) -> None:
    seq = ask(core, requests.attach(1, 2, "alice"), "waiter")
    core.take()
    core.cancel(seq, 2)
    assert core.waiting == 0


def test_few_flushes_are_on_their_way_at_once(core: ClientCore[str]) -> None:
    seqs = [core.call(7, b"", b"", "waiter") for _ in range(300)]
    core.take()
    for seq in seqs:
        core.cancel(seq)
    flushes = sent(core)
    assert len(flushes) == FLUSHES_MAX
    answered = 0
    while flushes:
        answered += len(flushes)
        data = b""
        for at, (_kind, seq, body) in enumerate(flushes):
            data += messages.error_frame(frames.SEQ.unpack(body)[0], ECANCELED)
            # a server that refuses a flush has still answered it
            data += messages.error_frame(seq, ECANCELED) if at % 2 else frames.frame(frames.FLUSH_REPLY, seq)
        core.receive(data)
        flushes = sent(core)
    assert answered == 300
    assert core.outstanding == 0


def test_a_call_that_was_answered_while_its_flush_waited_is_not_flushed(core: ClientCore[str]) -> None:
    seqs = [core.call(7, b"", b"", "waiter") for _ in range(FLUSHES_MAX + 1)]
    for seq in seqs:
        core.cancel(seq)
    flushes = [each for each in sent(core) if each[0] == frames.FLUSH]
    core.receive(call_reply(seqs[-1], b"") + frames.frame(frames.FLUSH_REPLY, flushes[0][1]))
    assert core.waiting == 0


def test_it_is_busy_before_the_server_would_say_so(core: ClientCore[str]) -> None:
    for _ in range(BUSY - 1):
        core.call(7, b"", b"", "waiter")
    assert not core.busy
    core.call(7, b"", b"", "waiter")
    assert core.busy


# --- what must not be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        call_reply(99, b""),
        call_reply(0, b""),
        frames.frame(frames.WALK_REPLY, 1, b'{"qid":"1:2","is_dir":true}'),
        frames.frame(frames.CALL_REPLY, 1, b"\0\0"),
        frames.frame(frames.CALL_REPLY, 1, b"\0\0\0\5abc"),
        frames.frame(frames.CALL, 1, b""),
        frames.frame(999, 1),
        frames.HEADER.pack(frames.CALL_REPLY, 1, 2**63),
        frames.frame(frames.ERROR, 1, b"no json"),
        frames.frame(frames.ERROR, 1, b'{"errno":0,"code":"","message":""}'),
        frames.frame(frames.ERROR, 99, b"no json"),
    ],
)
def test_a_server_that_breaks_the_protocol_fails_the_connection_and_each_call_once(
    core: ClientCore[str], data: bytes
) -> None:
    core.call(7, b"", b"", "one")
    answered = core.call(7, b"", b"", "two")
    assert core.receive(call_reply(answered, b"fine") + data) == [("two", (b"fine", b""), None)]
    assert isinstance(core.failure, ConnectionLost)
    assert "protocol" in core.failure.message
    assert core.lose() == ["one"]
    assert core.lose() == []


def test_the_servers_last_words_are_the_reason(core: ClientCore[str]) -> None:
    core.call(7, b"", b"", "waiter")
    assert core.receive(messages.error_frame(0, EPROTO, "that was too much")) == []
    assert core.failure is None
    assert core.lose() == ["waiter"]
    error = core.lost()
    assert isinstance(error, ConnectionLost)
    assert error.errno == ECONNRESET
    assert "that was too much" in error.message


def test_nothing_can_be_asked_for_on_a_connection_that_is_over(core: ClientCore[str]) -> None:
    seq = core.call(7, b"", b"", "waiter")
    core.lose(ConnectionLost(message="gone"))
    with pytest.raises(ConnectionLost, match="gone"):
        core.call(7, b"", b"", "waiter")
    with pytest.raises(ConnectionLost, match="gone"):
        ask(core, requests.ping(), "waiter")
    core.clunk(3)
    core.cancel(seq)
    assert core.take() == b""
    assert core.lost() is not core.lost()  # a raised exception is nobody else's


@pytest.mark.parametrize(("payload", "metadata"), [(PAYLOAD_MAX + 1, 0), (0, METADATA_MAX + 1)])
def test_what_is_too_large_is_refused_here(core: ClientCore[str], payload: int, metadata: int) -> None:
    with pytest.raises(CallError) as caught:
        core.call(7, bytes(payload), bytes(metadata), "waiter")
    assert caught.value.errno == EMSGSIZE
    with pytest.raises(CallError) as caught:
        ask(core, requests.walk(1, 2, "x" * 100_000), "waiter")
    assert caught.value.errno == EMSGSIZE
    assert (core.outstanding, core.waiting) == (0, 0)


@pytest.mark.parametrize(("payload", "metadata"), [("text", b""), (b"", "{}"), (None, b""), (3, b"")])
def test_what_is_not_bytes_is_refused_here_and_takes_no_place(core: ClientCore[str], payload: Any, metadata: Any) -> None:
    with pytest.raises(TypeError, match="is bytes, not"):
        core.call(7, payload, metadata, "waiter")
    assert (core.outstanding, core.waiting) == (0, 0)


def test_what_looks_like_bytes_is_sent(core: ClientCore[str]) -> None:
    core.call(7, memoryview(b"payload"), bytearray(b"{}"), "waiter")  # type: ignore[arg-type]
    core.call(7, memoryview(array("I", [1, 2])), b"", "waiter")  # type: ignore[arg-type]
    assert [body[12:] for _kind, _seq, body in sent(core)] == [b"{}payload", array("I", [1, 2]).tobytes()]


def test_text_that_is_not_unicode_is_refused_here() -> None:
    with pytest.raises(CallError, match="Unicode"):
        requests.walk(1, 2, "\udc80")


def test_bytes_are_not_sent_in_the_place_of_text() -> None:
    with pytest.raises(TypeError, match="a password, an answer"):
        requests.append(1, b"secret")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="user is text, not bytes"):
        requests.auth(1, b"alice")  # type: ignore[arg-type]


def test_a_flush_names_a_seq() -> None:
    assert requests.flush(5) == (frames.FLUSH, frames.SEQ.pack(5), 0)
    assert requests.call(1, b"p", b"m") == (frames.CALL, messages.call_body(1, b"p", b"m"), 0)


def test_errors_are_os_errors_with_a_sentence() -> None:
    error = CallError(EACCES)
    assert issubclass(CallError, OSError)
    assert (error.errno, error.code) == (EACCES, "EACCES")
    assert error.message == "permission denied by the kernel"
