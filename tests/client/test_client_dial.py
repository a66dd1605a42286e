"""Connections and sessions: the asyncio ones and the blocking ones, against a fake daemon on real sockets."""

from __future__ import annotations

import asyncio
import getpass
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from errno import (
    EACCES,
    EAGAIN,
    ECANCELED,
    ECONNRESET,
    EINVAL,
    EISDIR,
    EKEYEXPIRED,
    EMSGSIZE,
    ENOENT,
    EPERM,
    ESTALE,
    ETIMEDOUT,
)
from typing import TYPE_CHECKING, Any

import pytest

import srpc_client
from srpc_client import AuthenticationError, CallError, CallTimeout, ConnectionLost, blocking, procedures, requests
from srpcd.wire import frames, messages
from srpcd.wire.errors import WireError
from srpcd.wire.messages import Prompt

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.conftest import FakeDaemon, MakeRemote


class Dialer:
    """The same operations on either kind of connection."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.made: list[Any] = []

    async def do(self, result: Any) -> Any:
        return await result if asyncio.iscoroutine(result) else result

    async def dial(self, daemon: FakeDaemon, **options: Any) -> Any:
        if daemon.pin:
            options = {"pins": daemon.pin, "user": "alice", "password": "secret", **options}
        else:
            options = {"user": "alice", **options}
        made = srpc_client.dial if self.kind == "asyncio" else blocking.dial
        if self.kind == "busy":
            options["busy_poll"] = 0.01
        connection = await self.do(made(daemon.address, **options))
        self.made.append(connection)
        return connection

    async def call(self, connection: Any, path: str, payload: bytes = b"", **options: Any) -> bytes:
        reply: bytes = await self.do(connection.call(path, payload, **options))
        return reply


@pytest.fixture(params=["asyncio", "blocking", "busy"])
async def dialer(request: pytest.FixtureRequest) -> AsyncIterator[Dialer]:
    dialer = Dialer(request.param)
    yield dialer
    for connection in dialer.made:
        await dialer.do(connection.close())


@pytest.fixture(params=["local", "remote"])
def daemon(request: pytest.FixtureRequest) -> FakeDaemon:
    daemon: FakeDaemon = request.getfixturevalue(request.param)
    return daemon


def refusal(errno: int, message: str = "") -> Any:
    def endpoint(_payload: bytes, _metadata: bytes) -> bytes:
        raise WireError(errno, message)

    return endpoint


async def test_a_mechanism_that_there_is_none_of_is_refused_before_anything_is_sent(
    daemon: FakeDaemon, dialer: Dialer
) -> None:
    with pytest.raises(ValueError, match="mechanism='foo': there are pam and peer"):
        await dialer.dial(daemon, mechanism="foo")
    assert daemon.received == []


async def test_a_closed_session_says_so(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    other = await dialer.do(connection.login("alice"))
    await dialer.call(connection, "/calc/add", b"1")
    await dialer.do(connection.session.close())
    for path in ("/calc/add", "/echo"):
        with pytest.raises(CallError, match="EBADF: the session was closed on this side: log in again"):
            await dialer.call(connection, path, b"1")
    assert await dialer.do(other.call("/calc/add", b"1")) == b"1"


async def test_a_walk_that_ends_after_its_session_leaves_no_fid(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address) as connection:
        call = asyncio.create_task(connection.call("/calc/add", b"1"))
        await asyncio.sleep(0)
        await connection.session.close()
        with pytest.raises(CallError, match="EBADF"):
            await call
        await connection.ping()
        assert local.count("walk") == 1
        assert local.count("clunk") in (2, 3)
        assert list(connection._book.places) == []


async def test_a_login_that_takes_too_long_is_not_told_of_a_call(daemon: FakeDaemon, dialer: Dialer) -> None:
    daemon.on[frames.AUTH] = lambda *_: True
    with pytest.raises(CallTimeout, match="connecting and logging in"):
        await dialer.dial(daemon, timeout=0.2)


@pytest.mark.parametrize(("payload", "metadata"), [(1 << 24 | 1, 0), (0, 1 << 16 | 1)])
async def test_what_is_too_long_is_told_in_the_same_words_on_the_first_call_and_later(
    local: FakeDaemon, dialer: Dialer, payload: int, metadata: int
) -> None:
    connection = await dialer.dial(local)
    said = set()
    for _known in (False, True):
        with pytest.raises(CallError) as caught:
            await dialer.call(connection, "/echo", bytes(payload), metadata=bytes(metadata))
        said.add(caught.value.message)
    what = (
        "16777217 bytes of payload: a call carries at most 16 MiB"
        if payload
        else "65537 bytes of metadata: a call carries at"
    )
    assert len(said) == 1
    assert said.pop().startswith(what)


# --- calls -------------------------------------------------------------------------------------------------------------


async def test_a_call_is_answered(daemon: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(daemon)
    assert await dialer.call(connection, "/calc/add", b"1 2") == b"3"
    assert await dialer.call(connection, "calc/add", b"3 4") == b"7"
    reply = await dialer.do(connection.session.exchange("/echo", b"payload", b'{"trace":1}'))
    assert (reply.payload, reply.metadata) == (b"payload", b'{"trace":1}')
    assert await dialer.do(connection.append("/calc/add", "5 6")) == "11"


async def test_a_path_is_walked_once(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    for number in range(5):
        assert await dialer.call(connection, "/calc/add", b"%d 1" % number) == b"%d" % (number + 1)
    assert local.count("walk") == 1
    assert local.count("call") == 5


async def test_the_largest_call_goes_through(daemon: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(daemon)
    payload = bytes(range(256)) * (64 * 1024)
    assert await dialer.call(connection, "/echo", payload) == payload


async def test_a_refused_call_says_why_and_the_connection_goes_on(daemon: FakeDaemon, dialer: Dialer) -> None:
    daemon.endpoints["secret"] = refusal(EACCES)
    connection = await dialer.dial(daemon)
    for path, errno in [("/secret", EACCES), ("/missing", ENOENT), ("a//b", EINVAL)]:
        with pytest.raises(CallError) as caught:
            await dialer.call(connection, path)
        assert caught.value.errno == errno
    assert await dialer.call(connection, "/calc/add", b"1 2") == b"3"


@pytest.mark.parametrize(
    ("ask", "path", "errno"),
    [
        (lambda c: c.call("/calc/refuses", b""), "/calc/refuses", EACCES),
        (lambda c: c.call("calc/refuses", b""), "calc/refuses", EACCES),
        (lambda c: c.session.exchange("/calc/refuses", b""), "/calc/refuses", EACCES),
        (lambda c: c.call("/missing", b""), "/missing", ENOENT),
        (lambda c: c.call("/calc/add", b"x" * (1 << 24 | 1)), "/calc/add", EMSGSIZE),
        (lambda c: c.call("/calc/never", b"", timeout=0.05), "/calc/never", ETIMEDOUT),
        (lambda c: c.append("/missing", "text"), "/missing", ENOENT),
        (lambda c: c.stat("/missing"), "/missing", ENOENT),
        (lambda c: c.list("/secret"), "/secret", EACCES),
    ],
)
async def test_an_error_carries_the_path_that_it_is_about(
    local: FakeDaemon, dialer: Dialer, ask: Callable[[Any], Any], path: str, errno: int
) -> None:
    local.endpoints |= {"calc/refuses": refusal(EACCES, "no"), "secret/x": refusal(EACCES)}
    local.unreadable.add("secret")
    connection = await dialer.dial(local)
    for _known in (False, True):
        with pytest.raises((CallError, CallTimeout)) as caught:
            await dialer.do(ask(connection))
        assert (caught.value.errno, caught.value.filename) == (errno, path)
        assert str(caught.value) == f"{caught.value.code}: {caught.value.message}: {path!r}"


async def test_each_of_many_calls_says_which_one_failed(local: FakeDaemon) -> None:
    local.endpoints |= {"calc/refuses": refusal(EACCES, "no")}
    async with await srpc_client.dial(local.address) as connection:
        calls = (connection.call(path, b"") for path in ("/calc/add", "/calc/refuses", "/missing"))
        found = await asyncio.gather(*calls, return_exceptions=True)
    assert [getattr(each, "filename", None) for each in found] == [None, "/calc/refuses", "/missing"]


@pytest.mark.parametrize(("path", "payload"), [("/calc/refuses", b""), ("/missing", b""), ("/echo", b"x" * (1 << 24 | 1))])
def test_the_first_error_of_many_blocking_calls_carries_their_path(local: FakeDaemon, path: str, payload: bytes) -> None:
    local.endpoints |= {"calc/refuses": refusal(EACCES, "no")}
    with blocking.dial(local.address) as connection, pytest.raises(CallError) as caught:
        list(connection.session.call_many(path, [payload]))
    assert caught.value.filename == path


def test_an_error_with_a_path_survives_pickling() -> None:
    fault = CallError(EACCES, "no")
    fault.filename = "/calc/add"
    copy = pickle.loads(pickle.dumps(fault))
    assert (type(copy), str(copy), copy.filename) == (CallError, "EACCES: no: '/calc/add'", "/calc/add")
    mismatch = pickle.loads(pickle.dumps(srpc_client.PinMismatch(found="sha256:x")))
    assert (mismatch.found, mismatch.filename) == ("sha256:x", None)


async def test_stat_and_list_tell_what_is_there(local: FakeDaemon, dialer: Dialer) -> None:
    for number in range(7):
        local.endpoints[f"many/{number}"] = lambda *_: b""
    connection = await dialer.dial(local)
    found = await dialer.do(connection.stat("/calc/add"))
    assert (found.name, found.kind, found.mode, found.is_dir) == ("add", "service", 0o620, False)
    assert (await dialer.do(connection.stat())).is_dir
    assert await dialer.do(connection.list("/many")) == [str(number) for number in range(7)]  # two a page
    assert await dialer.do(connection.list()) == ["calc", "echo", "many"]
    local.unreadable.add("calc")
    with pytest.raises(CallError, match="names may not be read") as caught:
        await dialer.do(connection.list("/calc"))
    assert caught.value.errno == EACCES


async def test_paths_are_below_the_sessions_aname(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local, aname="/calc")
    assert connection.session.aname == "/calc"
    assert await dialer.call(connection, "add", b"1 2") == b"3"


async def test_the_least_recently_used_fids_are_clunked(
    local: FakeDaemon, dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await dialer.dial(local)
    connection._book._capacity = 2
    for name in "abc":
        local.endpoints[name] = lambda *_: b""
    for path in ["a", "b", "a", "c", "a", "b"]:
        await dialer.call(connection, path)
    assert local.count("walk") == 4  # b twice
    await dialer.do(connection.ping())
    assert local.count("clunk") == 2
    assert len(local.peers[0].fids) == 3  # with the root's


async def test_the_protocols_own_requests_can_be_made(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    afid, root, fid = (connection.new_fid() for _ in range(3))
    assert await dialer.do(connection.request(requests.auth(afid, "alice", mechanism="peer"))) == messages.AuthReply()
    assert (await dialer.do(connection.request(requests.attach(afid, root, "alice")))).is_dir
    assert not (await dialer.do(connection.request(requests.walk(root, fid, "echo")))).is_dir
    assert (await dialer.do(connection.request(requests.stat(fid)))).name == "echo"
    assert await dialer.do(connection.request(requests.call(fid, b"x", b"{}"))) == (b"x", b"{}")
    assert await dialer.do(connection.request(requests.flush(12345))) is None
    assert await dialer.do(connection.request(requests.clunk(fid))) == messages.Empty()
    assert await dialer.do(connection.ping()) == messages.PingReply()


# --- who ---------------------------------------------------------------------------------------------------------------


async def test_on_a_local_socket_you_are_who_you_are(local: FakeDaemon, dialer: Dialer) -> None:
    local.local_users.add(getpass.getuser())
    connection = await dialer.dial(local, user=None)
    assert (connection.session.user, connection.session.mechanism) == (getpass.getuser(), "peer")
    with pytest.raises(AuthenticationError) as caught:
        await dialer.do(connection.login("mallory"))
    assert caught.value.errno == EACCES


async def test_a_wrong_password_is_an_authentication_error_and_leaves_nothing(remote: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(remote)
    remote.last_words = [Prompt("error", "Account locked.")]
    with pytest.raises(AuthenticationError, match=r"Account locked\.") as caught:
        await dialer.do(connection.login("alice", password="wrong"))
    assert caught.value.code == "EACCES"
    await dialer.do(connection.ping())
    assert len(remote.peers[0].afids) == 1


async def test_several_users_share_a_connection(remote: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(remote)
    bob = await dialer.do(connection.login("bob", password="hunter2"))
    assert (connection.session.user, bob.user) == ("alice", "bob")
    assert await dialer.do(bob.call("/calc/add", b"1 2")) == b"3"
    assert await dialer.call(connection, "/calc/add", b"3 4") == b"7"
    assert sorted(remote.peers[0].users.values()) == ["alice", "alice", "bob", "bob"]
    await dialer.do(bob.close())
    await dialer.do(connection.ping())
    assert len(remote.peers[0].fids) == 2
    assert await dialer.call(connection, "/calc/add", b"5 6") == b"11"


async def test_without_a_user_nobody_is_logged_in_over_tls(remote: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(remote, user=None, password=None)
    assert remote.received == []
    with pytest.raises(CallError, match="nobody is logged in"):
        await dialer.call(connection, "/echo")


CODES = [
    [Prompt("info", "Welcome"), Prompt("text", "Token serial: "), Prompt("secret", "Password: ")],
    [Prompt("secret", "One-time code: ")],
]


async def test_several_prompts_are_answered_in_their_order(remote: FakeDaemon, dialer: Dialer) -> None:
    remote.conversation = CODES
    remote.accounts["alice"] = ["T-1000", "secret", "123456"]
    asked: list[list[str]] = []

    def answer(prompts: Sequence[Prompt]) -> list[str]:
        asked.append([prompt.text for prompt in prompts])
        return ["T-1000"] if len(asked) == 1 else ["123456"]

    async def answer_later(prompts: Sequence[Prompt]) -> list[str]:
        await asyncio.sleep(0)
        return answer(prompts)

    connection = await dialer.dial(remote, prompt=answer_later if dialer.kind == "asyncio" else answer)
    assert connection.session.user == "alice"
    # the password was given, so that prompt is not shown; the code is not a second password
    assert asked == [["Welcome", "Token serial: "], ["One-time code: "]]


async def test_a_callback_alone_answers_everything(remote: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(remote, password=None, prompt=lambda _prompts: ["secret"])
    assert connection.session.user == "alice"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "asks for 'Token serial:'"),
        ({"prompt": lambda _prompts: []}, "1 prompts want an answer, and prompt= gave 0"),
    ],
)
async def test_prompts_that_nobody_answers_are_an_authentication_error(
    remote: FakeDaemon, dialer: Dialer, options: Any, sentence: str
) -> None:
    remote.conversation = CODES
    with pytest.raises(AuthenticationError, match=sentence):
        await dialer.dial(remote, **options)


async def test_what_a_callback_raises_reaches_who_logs_in(remote: FakeDaemon, dialer: Dialer) -> None:
    def hang_up(_prompts: Sequence[Prompt]) -> list[str]:
        raise KeyError("no token")

    connection = await dialer.dial(remote)
    with pytest.raises(KeyError, match="no token"):
        await dialer.do(connection.login("bob", prompt=hang_up))
    await dialer.do(connection.ping())
    assert len(remote.peers[0].afids) == 1


async def test_a_busy_server_is_tried_again_until_it_has_time(
    local: FakeDaemon, dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def busy(peer: Any, seq: int, _body: bytes) -> bool:
        if len(refused) < 2:
            refused.append(seq)
            return bool(peer.fail(seq, EAGAIN))
        return False

    local.on[frames.AUTH] = busy
    connection = await dialer.dial(local)
    assert len(refused) == 2
    assert await dialer.call(connection, "/calc/add", b"1 2") == b"3"

    local.on[frames.ATTACH] = lambda peer, seq, _body: peer.fail(seq, EAGAIN)
    with pytest.raises(CallTimeout):
        await dialer.do(connection.login("alice", timeout=0.15))
    monkeypatch.setattr(procedures, "PATIENCE", 0.15)
    with pytest.raises(CallError) as caught:
        await dialer.do(connection.login("alice"))
    assert caught.value.errno == EAGAIN


# --- giving up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [1e7, 1e20, float("inf")])
async def test_a_timeout_may_be_as_long_as_it_likes(daemon: FakeDaemon, dialer: Dialer, timeout: float) -> None:
    connection = await dialer.dial(daemon, timeout=timeout)
    assert await dialer.call(connection, "/echo", b"x", timeout=timeout) == b"x"


async def test_a_timeout_cancels_the_call_at_the_server(daemon: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(daemon)
    for _ in range(2):  # the first walks, the second has a fid already
        with pytest.raises(CallTimeout) as caught:
            await dialer.call(connection, "/calc/never", timeout=0.1)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.code == "ETIMEDOUT"
    assert await dialer.call(connection, "/calc/add", b"1 2", timeout=5) == b"3"
    assert daemon.count("flush") == 2
    assert daemon.peers[0].pending == {}
    assert connection._pump.core.outstanding == 0


async def test_an_answer_that_comes_after_its_caller_gave_up_meets_nobody_else(local: FakeDaemon, dialer: Dialer) -> None:
    late: list[int] = []

    def keep(_peer: Any, seq: int, _body: bytes) -> bool:
        late.append(seq)
        return len(late) == 1

    connection = await dialer.dial(local)
    await dialer.call(connection, "/echo", b"warm")
    local.on[frames.CALL] = keep
    local.on[frames.FLUSH] = lambda *_: True
    with pytest.raises(CallTimeout):
        await dialer.call(connection, "/echo", b"first", timeout=0.05)
    local.peers[0].send(frames.CALL_REPLY, late[0], messages.call_reply_body(b"first"))
    assert await dialer.call(connection, "/echo", b"second") == b"second"


async def test_the_time_for_a_call_counts_from_its_beginning(local: FakeDaemon, dialer: Dialer) -> None:
    local.on[frames.WALK] = lambda *_: True
    connection = await dialer.dial(local)
    begun = time.monotonic()
    with pytest.raises(CallTimeout):
        await dialer.call(connection, "/echo", timeout=0.1)
    assert time.monotonic() - begun < 1
    with pytest.raises(CallTimeout):
        await dialer.do(connection.stat("/echo", timeout=0.01))
    with pytest.raises(CallTimeout):
        await dialer.do(connection.request(requests.walk(1, 99, "x"), timeout=0.01))


# --- files and sessions that change --------------------------------------------------------------------------------------


async def test_a_replaced_file_is_walked_to_again(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    assert await dialer.call(connection, "/calc/add", b"1 2") == b"3"
    local.generation["calc/add"] = 1
    assert await dialer.call(connection, "/calc/add", b"3 4") == b"7"
    assert [payload for _path, payload, _ in local.calls] == [b"1 2", b"3 4"]
    local.generation["calc/add"] = 2
    found = await dialer.do(connection.append("/calc/add", "5 6"))
    assert found == "11"
    assert await dialer.call(connection, "/calc/add", b"7 8") == b"15"


async def test_a_handlers_own_estale_is_not_called_again(local: FakeDaemon, dialer: Dialer) -> None:
    local.endpoints["nfs"] = refusal(ESTALE, "the handler's own")
    connection = await dialer.dial(local)
    for count in (1, 2):
        with pytest.raises(CallError, match="the handler's own"):
            await dialer.call(connection, "/nfs")
        assert len(local.calls) == count


async def test_a_file_that_is_replaced_all_the_time_is_tried_twice(local: FakeDaemon, dialer: Dialer) -> None:
    def replaced(peer: Any, seq: int, _body: bytes) -> Any:
        local.generation["echo"] = local.generation.get("echo", 0) + 1
        return peer.fail(seq, ESTALE)

    connection = await dialer.dial(local)
    await dialer.call(connection, "/echo")
    local.on[frames.CALL] = replaced
    with pytest.raises(CallError) as caught:
        await dialer.call(connection, "/echo")
    assert caught.value.errno == ESTALE
    assert local.count("call") == 3


async def test_a_session_that_has_ended_is_attached_again_once(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    assert await dialer.call(connection, "/calc/add", b"1 2") == b"3"
    peer = local.peers[0]
    peer.expired.update(peer.fids)
    assert await dialer.call(connection, "/calc/add", b"3 4") == b"7"
    assert (local.count("auth"), local.count("attach")) == (1, 2)
    assert len(local.calls) == 2
    await dialer.do(connection.ping())
    assert len(peer.fids) == 2  # the old ones were clunked
    peer.expired.update(peer.fids)
    assert (await dialer.do(connection.stat("/calc"))).is_dir
    assert local.count("attach") == 3


async def test_a_session_that_may_not_be_attached_again_says_so(local: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(local)
    await dialer.call(connection, "/echo")
    peer = local.peers[0]
    peer.expired.update(peer.fids)
    peer.afids.clear()
    with pytest.raises(CallError, match="log in again") as caught:
        await dialer.call(connection, "/echo")
    assert caught.value.errno == EKEYEXPIRED


async def test_a_handlers_own_ekeyexpired_is_not_called_again(local: FakeDaemon, dialer: Dialer) -> None:
    local.endpoints["vault"] = refusal(EKEYEXPIRED, "the handler's own")
    connection = await dialer.dial(local)
    with pytest.raises(CallError, match="the handler's own"):
        await dialer.call(connection, "/vault")
    assert (len(local.calls), local.count("attach")) == (1, 1)


async def test_a_replaced_root_is_attached_to_again(local: FakeDaemon, dialer: Dialer) -> None:
    failed: list[int] = []

    def stale(peer: Any, seq: int, body: bytes) -> Any:
        walk = messages.decode(messages.Walk, body)
        if walk.fid == 2:  # the first root
            failed.append(seq)
            return peer.fail(seq, ESTALE)
        return False

    connection = await dialer.dial(local)
    local.on[frames.WALK] = stale
    assert await dialer.call(connection, "/echo", b"x") == b"x"
    assert (len(failed), local.count("attach")) == (1, 2)


# --- the end -----------------------------------------------------------------------------------------------------------


async def test_a_lost_connection_is_one_error_for_the_call_and_for_each_later_one(
    daemon: FakeDaemon, dialer: Dialer
) -> None:
    connection = await dialer.dial(daemon)
    threading.Timer(0.1, daemon.drop_connections).start()
    for _ in range(3):
        with pytest.raises(ConnectionLost) as caught:
            await dialer.call(connection, "/calc/never")
        assert caught.value.errno == ECONNRESET
    assert connection.closed
    assert len(daemon.calls) == 1  # never made again by us


async def test_a_server_that_breaks_the_protocol_loses_the_connection(daemon: FakeDaemon, dialer: Dialer) -> None:
    def confuse(peer: Any, seq: int, _body: bytes) -> bool:
        peer.send(frames.WALK_REPLY, seq, messages.Qid("1:1", True))
        return True

    daemon.on[frames.CALL] = confuse
    connection = await dialer.dial(daemon)
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        await dialer.call(connection, "/echo")


async def test_a_closed_connection_says_so(daemon: FakeDaemon, dialer: Dialer) -> None:
    connection = await dialer.dial(daemon)
    assert not connection.closed
    await dialer.do(connection.close())
    await dialer.do(connection.close())
    assert connection.closed
    with pytest.raises(ConnectionLost, match="on this side"):
        await dialer.call(connection, "/echo")
    await dialer.do(connection.session.close())


# --- asyncio only ------------------------------------------------------------------------------------------------------


async def test_calls_run_concurrently_and_are_answered_in_any_order(local: FakeDaemon) -> None:
    held: list[tuple[Any, int]] = []

    def hold(peer: Any, seq: int, body: bytes) -> bool:
        if body.endswith(b"first"):
            held.append((peer, seq))
            return True
        return False

    local.on[frames.CALL] = hold
    async with await srpc_client.dial(local.address, user="alice") as connection:
        first = asyncio.create_task(connection.call("/echo", b"first"))
        assert await connection.call("/echo", b"second") == b"second"
        async with asyncio.timeout(5):
            while not held:
                await asyncio.sleep(0.005)
        assert not first.done()
        peer, seq = held[0]
        peer.send(frames.CALL_REPLY, seq, messages.call_reply_body(b"late"))
        assert await first == b"late"


async def test_calls_of_one_turn_of_the_loop_go_out_together(remote: FakeDaemon) -> None:
    async with await srpc_client.dial(remote.address, pins=remote.pin, user="alice", password="secret") as connection:
        await connection.call("/echo", b"")
        sent: list[int] = []
        link = connection._pump._link
        real = link.send

        class Counted:
            fd = link.fd
            owes = False
            flush = staticmethod(link.flush)
            receive = staticmethod(link.receive)
            receive_into = staticmethod(link.receive_into)
            close = staticmethod(link.close)
            detach = staticmethod(link.detach)

            def send(self, data: bytes | memoryview) -> int:
                sent.append(len(data))
                return real(data)

        connection._pump._link = Counted()
        await asyncio.gather(*(connection.call("/echo", b"x") for _ in range(64)))
        assert len(sent) == 2  # the first alone, for its latency's sake; then all others


async def test_cancelling_a_task_cancels_its_call_at_the_server(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address, user="alice") as connection:
        await connection.call("/echo", b"")
        tasks = [asyncio.create_task(connection.call("/calc/never", b"%d" % number)) for number in range(100)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True))
        assert await connection.call("/calc/add", b"1 2") == b"3"
        async with asyncio.timeout(5):
            while connection._pump.core.outstanding:
                await connection.ping()
        assert local.peers[0].pending == {}
        assert local.count("flush") == 100


async def test_a_walk_that_succeeds_as_its_task_is_cancelled_leaves_no_fid(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address, user="alice") as connection:
        for delay in (0, 0.0001, 0.0002, 0.0005, 0.001, 0.002) * 5:
            task = asyncio.create_task(connection.request(requests.walk(2, connection.new_fid(), "echo")))
            await asyncio.sleep(delay)
            cancelled = task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            else:
                assert not cancelled
                await connection.request(requests.clunk(connection._book._next))
        for _ in range(3):
            await connection.ping()
        assert set(local.peers[0].fids) == {2}


async def test_thousands_of_calls_at_once_stay_below_the_servers_limit(local: FakeDaemon) -> None:
    most = 0

    def count(peer: Any, _seq: int, _body: bytes) -> bool:
        nonlocal most
        most = max(most, connection._pump.core.outstanding)
        return False

    async with await srpc_client.dial(local.address, user="alice") as connection:
        await connection.call("/echo", b"")
        local.on[frames.CALL] = count
        replies = await asyncio.gather(*(connection.call("/echo", b"%d" % number) for number in range(3000)))
        assert replies == [b"%d" % number for number in range(3000)]
        assert 500 < most < 1024


async def test_callers_wait_while_the_server_does_not_read(local: FakeDaemon) -> None:
    reading = threading.Event()
    local.on[frames.CALL] = lambda *_: not reading.wait(10)
    async with await srpc_client.dial(local.address, user="alice") as connection:
        place = await connection.request(requests.walk(2, 1000, "echo"))
        assert not place.is_dir
        tasks = [asyncio.create_task(connection.call("/echo", bytes(1024 * 1024))) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert connection._pump.crowded
        assert len(connection._pump._unsent) + connection._pump.core.waiting < 3 * 1024 * 1024
        waiting = asyncio.create_task(connection.ping())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        reading.set()
        assert [len(reply) for reply in await asyncio.gather(*tasks)] == [1024 * 1024] * 20
        await waiting


async def test_callers_who_wait_for_room_get_the_one_error_too(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address, user="alice") as connection:
        await connection.call("/echo", b"")
        tasks = [asyncio.create_task(connection.call("/calc/never", b"")) for _ in range(2500)]
        await asyncio.sleep(0.3)
        local.drop_connections()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {ConnectionLost}


async def test_two_tasks_that_walk_to_the_same_path_share_one_fid(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address, user="alice") as connection:
        assert await asyncio.gather(*(connection.call("/echo", b"x") for _ in range(10))) == [b"x"] * 10
        await connection.ping()
        assert len(local.peers[0].fids) == 2


async def test_many_calls_on_an_ended_session_attach_once(local: FakeDaemon) -> None:
    async with await srpc_client.dial(local.address, user="alice") as connection:
        await connection.call("/echo", b"")
        peer = local.peers[0]
        peer.expired.update(peer.fids)
        assert await asyncio.gather(*(connection.call("/echo", b"x") for _ in range(20))) == [b"x"] * 20
        await connection.ping()
        assert len(peer.fids) == 2


async def test_dialling_has_one_time_for_all_of_it(local: FakeDaemon) -> None:
    local.on[frames.AUTH] = lambda *_: True
    with pytest.raises(CallTimeout):
        await srpc_client.dial(local.address, user="alice", timeout=0.1)


# --- blocking only -----------------------------------------------------------------------------------------------------


def test_many_calls_are_in_flight_and_answered_in_order(daemon: FakeDaemon) -> None:
    with blocking.dial(
        daemon.address, pins=daemon.pin or None, user="alice", password="secret" if daemon.pin else None
    ) as connection:
        replies = connection.session.call_many("/echo", (b"%d" % number for number in range(2000)))
        assert list(replies) == [b"%d" % number for number in range(2000)]
        assert list(connection.session.call_many("/echo", [])) == []
        megabytes = [bytes([number]) * 1024 * 1024 for number in range(20)]
        assert list(connection.session.call_many("/echo", megabytes)) == megabytes


def test_many_calls_need_a_window(local: FakeDaemon) -> None:
    with (
        blocking.dial(local.address, user="alice") as connection,
        pytest.raises(ValueError, match="window=0"),
    ):
        list(connection.session.call_many("/echo", [b"x"], window=0))


def test_the_first_error_of_many_ends_them_and_cancels_the_rest(local: FakeDaemon) -> None:
    local.endpoints["mixed"] = lambda payload, _: (
        None if payload > b"3" else refusal(EPERM)(b"", b"") if payload == b"3" else b""
    )
    with blocking.dial(local.address, user="alice") as connection:
        replies = connection.session.call_many("/mixed", [b"1", b"2", b"3", b"4", b"5"])
        assert [next(replies), next(replies)] == [b"", b""]
        with pytest.raises(CallError) as caught:
            next(replies)
        assert caught.value.errno == EPERM
        connection.ping()
        assert local.peers[0].pending == {}


def test_many_calls_find_a_replaced_file(local: FakeDaemon) -> None:
    with blocking.dial(local.address, user="alice") as connection:
        replies = connection.session.call_many("/echo", [b"%d" % number for number in range(500)], window=8)
        got = []
        for reply in replies:
            got.append(reply)
            if len(got) == 100:
                local.generation["echo"] = 1
        assert sorted(got) == sorted(b"%d" % number for number in range(500))
        assert got == [b"%d" % number for number in range(500)]


class Polled:
    """A poll object that notes how long it was to wait."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.timeouts: list[float | None] = []

    def poll(self, timeout: float | None = None) -> Any:
        self.timeouts.append(timeout)
        return self.inner.poll() if timeout is None else self.inner.poll(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_an_answer_that_comes_soon_is_not_slept_for_if_that_was_asked_for(local: FakeDaemon) -> None:
    def slow(payload: bytes, _metadata: bytes) -> bytes:
        time.sleep(0.05)
        return payload

    local.endpoints["slow"] = slow
    with blocking.dial(local.address, user="alice", busy_poll=60) as connection:
        pump = connection._pump
        polled: Any = Polled(pump._poll)
        pump._poll = polled

        def waits(path: str) -> set[float | None]:
            polled.timeouts.clear()
            assert connection.call(path, b"1 2") in (b"3", b"1 2")
            return set(polled.timeouts)

        assert waits("/calc/add") == {0}
        pump._busy_poll = 0.001
        assert None in waits("/slow")
        assert waits("/slow") == {None}  # that it takes longer is known now
        pump._busy_poll = 60
        assert waits("/slow") == {None}
        assert waits("/slow") == {0}  # and so is that it does not
        pump._busy_poll = 0.001
        with pytest.raises(CallTimeout):
            connection.call("/calc/never", b"", timeout=0.02)
    with blocking.dial(local.address, user="alice") as connection:
        polled = connection._pump._poll = Polled(connection._pump._poll)  # type: ignore[assignment]
        connection.call("/calc/add", b"1 2")
        assert set(polled.timeouts) == {None}


def test_a_second_thread_is_refused(local: FakeDaemon) -> None:
    with blocking.dial(local.address, user="alice") as connection:
        connection.call("/echo", b"")
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                connection.call("/calc/never", b"", timeout=0.5)
            except CallTimeout as fault:
                errors.append(fault)

        thread = threading.Thread(target=wait)
        thread.start()
        local.wait_for(lambda: local.calls[-1][0] == "calc/never")
        with pytest.raises(RuntimeError, match="another thread"):
            connection.call("/echo", b"")
        thread.join(5)
        assert len(errors) == 1
        assert connection.call("/echo", b"x") == b"x"


def test_a_connection_stays_with_the_process_that_made_it(daemon: FakeDaemon) -> None:
    proof: dict[str, Any] = {"pins": daemon.pin, "password": "secret"} if daemon.pin else {}
    with blocking.dial(daemon.address, user="alice", **proof) as connection:
        assert connection.call("/echo", b"before") == b"before"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                connection.call("/echo", b"child")
            except ConnectionLost as fault:
                connection.close()
                status = 0 if "fork" in fault.message else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert connection.call("/echo", b"after") == b"after"
        assert (b"child", b"") not in [(payload, metadata) for _path, payload, metadata in daemon.calls]


def test_an_interrupt_cancels_the_call(local: FakeDaemon) -> None:
    main = threading.get_ident()

    def interrupt(*_: bytes) -> None:
        threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT)).start()

    local.endpoints["slow"] = interrupt
    with blocking.dial(local.address, user="alice") as connection:
        with pytest.raises(KeyboardInterrupt):
            connection.call("/slow", b"")
        assert connection.call("/echo", b"x") == b"x"
        assert local.count("flush") == 1


def test_a_cancelled_call_at_the_server_is_an_error_here(local: FakeDaemon) -> None:
    local.endpoints["dir"] = refusal(EISDIR)
    local.endpoints["cancelled"] = refusal(ECANCELED)
    with blocking.dial(local.address, user="alice") as connection:
        for path, errno in [("/dir", EISDIR), ("/cancelled", ECANCELED)]:
            with pytest.raises(CallError) as caught:
                connection.call(path, b"")
            assert caught.value.errno == errno


def test_one_call_is_one_write_and_one_read(make_remote: MakeRemote) -> None:
    remote = make_remote()
    with blocking.dial(remote.address, pins=remote.pin, user="alice", password="secret") as connection:
        connection.call("/echo", b"")
        link = connection._pump._link
        counts = {"send": 0, "receive": 0}

        class Counted:
            fd = link.fd
            owes = False
            flush = staticmethod(link.flush)
            receive_into = staticmethod(link.receive_into)
            close = staticmethod(link.close)
            detach = staticmethod(link.detach)

            def send(self, data: bytes | memoryview) -> int:
                counts["send"] += 1
                return link.send(data)

            def receive(self) -> bytes | None:
                counts["receive"] += 1
                return link.receive()

        connection._pump._link = Counted()
        for _ in range(50):
            connection.call("/echo", b"x")
        assert counts == {"send": 50, "receive": 50}


def test_a_full_backlog_of_the_local_socket_is_waited_for(tmp_path: Path) -> None:
    """Any local user can fill it. A connect that does not block is refused then (EAGAIN)."""
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(srpc_client.Unreachable) as caught:
            blocking.connect(f"unix:{path}", timeout=0.1)
        assert caught.value.errno == ETIMEDOUT
        made: list[blocking.Connection] = []
        connecting = threading.Thread(target=lambda: made.append(blocking.connect(f"unix:{path}", timeout=60)))
        connecting.start()
        while connecting.is_alive():
            listener.accept()[0].close()
            connecting.join(1)
        made[0].close()
