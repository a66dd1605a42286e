"""A server that has the right key, or the right uid, and wants to hang, fill or lead astray the library. Both libraries."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from errno import E2BIG, EAGAIN, EPROTO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import srpc_client
from srpc_client import (
    AuthenticationError,
    CallError,
    CallTimeout,
    ConnectionLost,
    SrpcError,
    UntrustedServer,
    blocking,
    callers,
    procedures,
    requests,
    resolver,
    tls,
)
from srpc_client.blocking.pump import HIGH_WATER
from srpc_client.core import UNASKED_MAX, ClientCore
from srpcd.wire import frames, messages
from srpcd.wire.frames import HEADER
from srpcd.wire.limits import OUTSTANDING_MAX, PROMPTS_MAX
from srpcd.wire.messages import Prompt

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, Peer

ROOT = Path(__file__).parents[2]
OTHER_PIN = "sha256:" + "A" * 43 + "="


class Client:
    """One library or the other, behind the same few coroutines."""

    def __init__(self, blocks: bool) -> None:
        self.blocks = blocks

    async def dial(self, daemon: FakeDaemon, **options: Any) -> Any:
        options = {"user": "alice", "timeout": 60} | options
        if daemon.pin:
            options = {"pins": daemon.pin, "password": "secret"} | options
        return await self.do(blocking.dial if self.blocks else srpc_client.dial, daemon.address, **options)

    async def connect_late(self) -> None:
        """Connect to a host that is not reached."""
        await self.do(blocking.connect if self.blocks else srpc_client.connect, "calc.example", pins=OTHER_PIN, timeout=0.3)

    async def do(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of either library."""
        if self.blocks:
            return await asyncio.to_thread(function, *arguments, **options)
        return await function(*arguments, **options)

    async def close(self, connection: Any) -> None:
        done = connection.close()
        if inspect.isawaitable(done):
            await done


@pytest.fixture(params=["asyncio", "blocking"])
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param == "blocking")


def stat_reply(children: list[str] | None = None, **more: Any) -> messages.StatReply:
    facts: dict[str, Any] = {
        "qid": "1:2",
        "name": "d",
        "is_dir": True,
        "children": children,
        "more": False,
        "mode": 0o755,
        "uid": 0,
        "gid": 0,
        "user": "root",
        "group": "root",
        "context": None,
        "mtime": 0,
        "kind": "directory",
        "live": True,
    }
    return messages.StatReply(**facts | more)


def answer_stats(daemon: FakeDaemon, make: Callable[[messages.Stat], messages.StatReply]) -> None:
    """Every stat is answered by what `make` makes of it."""

    def answer(peer: Peer, seq: int, body: bytes) -> bool:
        peer.send(frames.STAT_REPLY, seq, make(messages.decode(messages.Stat, body)))
        return True

    daemon.on[frames.STAT] = answer


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pages",
    [
        [["b", "a"]],
        [["a", "a"]],
        [["a", "b"], ["b", "c"]],
        [["a", "b"], ["a", "c"]],
        [["b"], ["a"]],
        [[]],
        [["a"], []],
        [[""]],
        [["."]],
        [[".."]],
        [[".hidden"]],
        [["a/b"]],
        [["a\0b"]],
        [["é" * 128]],
    ],
    ids=str,
)
async def test_names_that_do_not_ascend_or_are_none_are_refused(local: FakeDaemon, client: Client, pages: Any) -> None:
    left = list(pages)
    answer_stats(local, lambda _: stat_reply(left.pop(0) if left else ["z"], more=True))
    connection = await client.dial(local)
    with pytest.raises(CallError, match="broke the protocol") as caught:
        await client.do(connection.list, "/calc")
    assert caught.value.errno == EPROTO
    await client.close(connection)


async def test_a_directory_without_end_is_given_up(
    local: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cost 1.4 GB in nine seconds."""
    monkeypatch.setattr(procedures, "NAMES_MAX", 5000)
    asked = 0

    def page(stat: messages.Stat) -> messages.StatReply:
        nonlocal asked
        asked += 1
        begin = int(stat.after or "0")
        return stat_reply([f"{begin + each:09}" for each in range(1, 1001)], more=True)

    answer_stats(local, page)
    connection = await client.dial(local)
    with pytest.raises(CallError, match="over 5000 names") as caught:
        await client.do(connection.list, "/calc")
    assert (caught.value.errno, asked) == (E2BIG, 5)
    await client.close(connection)


async def test_a_timeout_holds_for_all_pages_together(local: FakeDaemon, client: Client) -> None:
    def page(stat: messages.Stat) -> messages.StatReply:
        return stat_reply([f"{int(stat.after or '0') + 1:09}"], more=True)

    answer_stats(local, page)
    connection = await client.dial(local)
    with pytest.raises(CallTimeout):
        await client.do(connection.list, "/calc", timeout=0.3)
    await client.close(connection)


@pytest.mark.parametrize(
    "fact",
    [
        {"mtime": 1 << 63},
        {"mtime": 10**400},
        {"mode": 1 << 40},
        {"mode": -1},
        {"uid": 1 << 32},
        {"gid": -1},
        {"user": "x" * 257},
        {"group": "x" * 257},
        {"context": "x" * 4097},
        {"qid": "1" * 65},
        {"name": "x" * 256},
        {"children": ["x" * 256]},
        {"children": [f"{each:05}" for each in range(1001)]},
    ],
    ids=lambda fact: next(iter(fact)),
)
async def test_facts_beyond_their_bounds_end_the_connection(local: FakeDaemon, client: Client, fact: Any) -> None:
    """Some can't even be turned into text, and the library keeps them."""
    answer_stats(local, lambda _: stat_reply(**{"children": []} | fact))
    connection = await client.dial(local)
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        await client.do(connection.stat, "/calc")
    await client.close(connection)


# --- logging in --------------------------------------------------------------------------------------------------------


async def test_a_login_that_asks_without_end_is_given_up(remote: FakeDaemon, client: Client) -> None:
    def ask_again(peer: Peer, seq: int, _body: bytes) -> bool:
        peer.send(frames.APPEND_REPLY, seq, messages.AppendReply("", [Prompt("text", "And now? ")]))
        return True

    remote.on[frames.APPEND] = ask_again
    with pytest.raises(AuthenticationError, match="has asked 64 times") as caught:
        await client.dial(remote, password=None, prompt=lambda prompts: ["no"] * len(prompts))
    assert caught.value.errno == EPROTO
    assert remote.count("append") == procedures.STEPS_MAX


@pytest.mark.parametrize(
    "prompts",
    [[Prompt("info", "x")] * (PROMPTS_MAX + 1), [Prompt("secret", "x" * 4097)]],
    ids=["too many", "too long"],
)
async def test_prompts_beyond_their_bounds_end_the_connection(remote: FakeDaemon, client: Client, prompts: Any) -> None:
    def ask(peer: Peer, seq: int, _body: bytes) -> bool:
        peer.send(frames.AUTH_REPLY, seq, messages.AuthReply(prompts))
        return True

    remote.on[frames.AUTH] = ask
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        await client.dial(remote)


@pytest.mark.parametrize("kind", [frames.AUTH, frames.APPEND, frames.ATTACH])
async def test_a_login_that_is_never_answered_ends_with_its_timeout(remote: FakeDaemon, client: Client, kind: int) -> None:
    remote.on[kind] = lambda *_: True
    with pytest.raises(CallTimeout):
        await client.dial(remote, timeout=0.5)


# --- replies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "length"),
    [(frames.CALL_REPLY, 16 << 20), (frames.STAT_REPLY, 4 << 20), (frames.APPEND_REPLY, 90 << 20), (frames.LISTEN_REPLY, 9)],
)
async def test_a_reply_of_a_type_that_was_never_asked_for_ends_the_connection_at_its_header(
    local: FakeDaemon, client: Client, kind: int, length: int
) -> None:
    """Nothing of its body has come yet, so nothing of it can have been kept."""

    def answer(peer: Peer, seq: int, _body: bytes) -> bool:
        peer.raw(HEADER.pack(kind, seq, length))
        return True

    local.on[frames.AUTH] = answer
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        await client.dial(local)


async def test_the_reply_to_a_prompt_is_short(remote: FakeDaemon, client: Client) -> None:
    def answer(peer: Peer, seq: int, _body: bytes) -> bool:
        peer.raw(HEADER.pack(frames.APPEND_REPLY, seq, 1 << 20))
        return True

    remote.on[frames.APPEND] = answer
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        await client.dial(remote)


async def test_an_append_to_an_endpoint_is_answered_at_full_length(remote: FakeDaemon, client: Client) -> None:
    remote.endpoints["text"] = lambda payload, _: payload
    connection = await client.dial(remote)
    text = "x" * 1_000_000
    assert await client.do(connection.append, "/text", text) == text
    await client.close(connection)


@pytest.mark.parametrize("repeat", [1, UNASKED_MAX + 1])
async def test_errors_that_answer_nothing_are_counted(local: FakeDaemon, client: Client, repeat: int) -> None:
    """One says why the server closes. Without end they would keep the client awake."""

    def answer(peer: Peer, seq: int, _body: bytes) -> bool:
        peer.raw(messages.error_frame(0, EAGAIN, "x" * 4000) * repeat)
        peer.send(frames.PING_REPLY, seq, messages.PingReply())
        return True

    connection = await client.dial(local)
    local.on[frames.PING] = answer
    if repeat == 1:
        await client.do(connection.ping)
    else:
        with pytest.raises(ConnectionLost, match="errors that answer no request"):
            await client.do(connection.ping)
    await client.close(connection)


async def test_a_reply_byte_by_byte_does_not_outlast_a_timeout(remote: FakeDaemon, client: Client) -> None:
    over = threading.Event()

    def trickle(_payload: bytes, _metadata: bytes) -> None:
        peer = remote.peers[-1]
        for byte in HEADER.pack(frames.CALL_REPLY, 10_000, 1 << 20) + bytes(1 << 20):
            if over.wait(0.01):
                return
            peer.raw(bytes([byte]))

    remote.endpoints["calc/never"] = trickle
    connection = await client.dial(remote)
    with pytest.raises(CallTimeout):
        await client.do(connection.call, "/calc/never", b"", timeout=0.5)
    over.set()
    await client.close(connection)


async def test_an_error_is_shown_so_that_a_terminal_does_not_obey_it(local: FakeDaemon, client: Client) -> None:
    def answer(peer: Peer, seq: int, _body: bytes) -> bool:
        return peer.fail(seq, EAGAIN, "\x1b]0;title\x07 two\nlines \u202e" + "x" * 5000)

    local.on[frames.CALL] = answer
    connection = await client.dial(local)
    with pytest.raises(CallError) as caught:
        await client.do(connection.call, "/echo", b"")
    assert str(caught.value).startswith(r"EAGAIN: \x1b]0;title\x07 two" "\nlines \\u202ex")
    assert len(caught.value.message) == 4096
    await client.close(connection)


# --- a server that does not answer, or does not read ---------------------------------------------------------------------


async def test_requests_that_are_never_answered_do_not_collect(local: FakeDaemon, client: Client) -> None:
    """The server answers neither the calls, which are given up, nor the flushes of them."""
    connection = await client.dial(local)
    await client.do(connection.call, "/echo", b"")
    local.on[frames.CALL] = local.on[frames.FLUSH] = lambda *_: True

    def many() -> None:
        for _ in range(OUTSTANDING_MAX + 1):
            try:
                connection.call("/echo", b"", timeout=0.0001)
            except CallTimeout:
                pass

    if client.blocks:
        with pytest.raises(CallError, match="are not answered yet") as caught:
            await asyncio.to_thread(many)
        assert caught.value.errno == EAGAIN
    else:
        calls = [connection.call("/echo", b"", timeout=0.2) for _ in range(3 * OUTSTANDING_MAX)]
        assert all(isinstance(each, CallTimeout) for each in await asyncio.gather(*calls, return_exceptions=True))
    assert len(connection._pump.core._outstanding) <= OUTSTANDING_MAX + 1
    await client.close(connection)


async def test_clunks_that_are_never_answered_do_not_collect_beyond_the_bound(local: FakeDaemon, client: Client) -> None:
    local.on[frames.CLUNK] = lambda *_: True
    connection = await client.dial(local)

    async def walk_and_clunk() -> None:
        for _ in range(2 * OUTSTANDING_MAX):
            fid = connection.new_fid()
            await client.do(connection.request, requests.walk(2, fid, "echo"), timeout=2)
            connection._pump.core.clunk(fid)

    with pytest.raises(SrpcError) as caught:
        await walk_and_clunk()
    assert caught.value.errno in (EAGAIN, CallTimeout().errno)
    await client.close(connection)  # and the end does not wait for them


async def test_payloads_that_are_never_read_do_not_collect(local: FakeDaemon, client: Client) -> None:
    connection = await client.dial(local)
    await client.do(connection.call, "/echo", b"")
    stop = threading.Event()

    def wait(_payload: bytes, _metadata: bytes) -> None:  # its thread reads nothing meanwhile
        stop.wait(60)

    local.endpoints["echo"] = wait
    payload = bytes(2 << 20)
    for _ in range(20):
        with pytest.raises(CallTimeout):
            await client.do(connection.call, "/echo", payload, timeout=0.05)
    assert len(connection._pump._unsent) + connection._pump.core.waiting < HIGH_WATER + 2 * len(payload)
    stop.set()
    await client.close(connection)


# --- reaching it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def deaf_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names are looked up until the test is over."""
    over = threading.Event()
    real = socket.getaddrinfo

    def wait(*arguments: Any, **options: Any) -> Any:
        if options.get("flags") == socket.AI_NUMERICHOST:
            return real(*arguments, **options)
        over.wait(60)
        raise socket.gaierror(-2, "at last")

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    yield
    over.set()
    for thread in threading.enumerate():
        if thread.name == "srpc resolver":
            thread.join(10)


@pytest.mark.usefixtures("deaf_resolver")
async def test_a_name_that_is_looked_up_without_end_is_given_up(client: Client) -> None:
    with pytest.raises(srpc_client.Unreachable, match="did not answer in time"):
        await client.connect_late()


_ASK = """
import asyncio, socket, srpc_client, threading
real = socket.getaddrinfo
def wait(*arguments, **options):
    return real(*arguments, **options) if options.get("flags") == socket.AI_NUMERICHOST else threading.Event().wait()
socket.getaddrinfo = wait
try:
    asyncio.run(srpc_client.connect("calc.example", pins="sha256:" + "A" * 43 + "=", timeout=0.1))
except srpc_client.Unreachable as fault:
    print(fault.message)
"""


def test_a_resolver_does_not_hold_up_the_end_of_the_process() -> None:
    """asyncio's own look-up runs in a thread that asyncio.run and the interpreter wait for."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stdout == "calc.example:7443 did not answer in time\n"


async def test_one_timeout_is_for_all_addresses_of_a_name(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for sock in (first, second):  # its queue is full: nothing answers another connection
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", full.getsockname())
        monkeypatch.setattr(resolver, "look_up", lambda _where, done: done([entry] * 1000))
        with pytest.raises(srpc_client.Unreachable, match="did not answer in time"):
            await client.connect_late()


async def test_a_certificate_that_can_not_be_read_is_no_proof(
    remote: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL takes some that the library for certificates refuses, with errors that are none of ours."""

    class Odd(Exception):
        pass

    def refuse(_certificate: object) -> str:
        raise Odd("an algorithm of next year")

    monkeypatch.setattr(tls, "pin_of", refuse)
    with pytest.raises(UntrustedServer, match="can't be read: an algorithm of next year"):
        await client.dial(remote)
    assert remote.bytes_received == 0


# --- services ----------------------------------------------------------------------------------------------------------


def test_lines_that_do_not_say_who_calls_do_not_collect() -> None:
    closed: list[int] = []

    def close(line: int) -> None:
        closed.append(line)
        kept.gone(None, line)

    kept: callers.Callers[int] = callers.Callers("/calc/add", close)
    caller: Any = messages.Caller(1, 1, None, "alice", None, "/calc/add")
    kept.opened(-1)
    kept.came(caller, -1)
    for line in range(callers.SILENT_LINES_MAX + 3):
        kept.opened(line)
    assert closed == [0, 1, 2]


# --- without I/O -------------------------------------------------------------------------------------------------------


def test_the_core_keeps_nothing_of_what_was_not_asked_for() -> None:
    core: ClientCore[str] = ClientCore()
    core.request(frames.PING, b"", "ping")
    assert core.receive(HEADER.pack(frames.APPEND_REPLY, 1, 90 << 20) + bytes(1000)) == []
    assert core.failure is not None
    assert core.large == 0
