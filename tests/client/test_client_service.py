"""Announcing, listening and serving, against a fake daemon and lines that the test makes as the monitor would."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EACCES, EAGAIN, ECANCELED, EEXIST, EINVAL, EIO, ENOENT, EOPNOTSUPP, EPERM
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import srpc_client
import srpc_client.line
from srpc_client import Announcement, CallError, Request, SrpcError
from srpc_client.callers import LINES_PER_CALLER
from srpc_client.endpoint import EndpointPipe, open_line
from srpc_client.errors import UntrustedServer
from srpcd import passing
from srpcd.wire import frames, messages
from srpcd.wire.limits import MIB

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, FakeLine, MakeLine


@asynccontextmanager
async def announced(local: FakeDaemon, tree: Path, path: str = "/calc/add") -> AsyncIterator[Announcement]:
    async with await srpc_client.announce(path, address=local.address, tree=str(tree)) as announcement:
        await until(local.listening.is_set)
        yield announcement


async def until(condition: object, seconds: float = 5) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def in_thread(function: object, *arguments: object) -> object:
    assert callable(function)
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def first_line(local: FakeDaemon, announcement: Announcement, number: int = 1) -> srpc_client.Line:
    local.tell_line(number)
    async with asyncio.timeout(5):
        async for line in announcement.listen():
            return line
    raise AssertionError


# --- the pipe ----------------------------------------------------------------------------------------------------------


async def test_announcing_makes_the_pipe_with_the_mode_that_was_asked_for_and_withdrawing_removes_it(
    local: FakeDaemon, tree: Path
) -> None:
    async with await srpc_client.announce("/calc/add", mode=0o640, group=os.getgid(), address=local.address, tree=str(tree)):
        found = (tree / "calc/add").lstat()
        assert stat.S_ISFIFO(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert local.announced == ["/calc/add"]
    assert not (tree / "calc/add").exists()
    assert local.count("clunk") == 1


@pytest.mark.parametrize("kind", ["asyncio", "blocking"])
@pytest.mark.parametrize(
    ("handlers", "options", "fault", "says"),
    [
        ({}, {}, ValueError, "nothing to serve"),
        ({"/calc/add": lambda _: b"", "/calc/sub": "sub"}, {}, TypeError, "the handler of /calc/sub is a str"),
        ({"/calc/add": lambda _: b""}, {"mode": 0o60660}, ValueError, "mode=0o60660: a pipe has a mode from 0 to 0o777"),
        ({"/calc/add": lambda _: b""}, {"mode": -1}, ValueError, "mode=-0o1"),
    ],
)
async def test_what_can_not_be_served_is_refused_before_anything_is_made(
    local: FakeDaemon, tree: Path, kind: str, handlers: Any, options: Any, fault: type[Exception], says: str
) -> None:
    options |= {"address": local.address, "tree": str(tree)}

    async def serve() -> None:
        if kind == "blocking":
            srpc_client.blocking.serve(handlers, until=lambda: True, **options)
        else:
            await asyncio.wait_for(srpc_client.serve(handlers, **options), 1)

    with pytest.raises(fault, match=says):
        await serve()
    assert list((tree / "calc").iterdir()) == []
    assert local.announced == []


async def test_announcing_refuses_a_mode_and_a_handler_that_are_none(local: FakeDaemon, tree: Path) -> None:
    with pytest.raises(ValueError, match="0o60660"):
        await srpc_client.announce("/calc/add", mode=0o60660, address=local.address, tree=str(tree))
    async with srpc_client.Announcer(local.address, tree=str(tree)) as announcer:
        with pytest.raises(TypeError, match="the handler of /calc/add is a int"):
            await announcer.announce("/calc/add", handler=3)  # type: ignore[arg-type]


def test_a_resident_program_without_a_handler_says_so_at_once() -> None:
    with pytest.raises(TypeError, match="the handler is a NoneType"):
        srpc_client.serve_stdio(None)  # type: ignore[arg-type]


async def test_the_default_mode_lets_the_group_call_and_nobody_else(local: FakeDaemon, tree: Path) -> None:
    async with announced(local, tree):
        assert stat.S_IMODE((tree / "calc/add").stat().st_mode) == 0o620


async def test_a_worker_finds_a_reader_on_the_pipe(local: FakeDaemon, tree: Path) -> None:
    async with announced(local, tree):
        os.close(os.open(tree / "calc/add", os.O_WRONLY | os.O_NONBLOCK))  # ENXIO without a reader


async def test_a_pipe_that_is_there_keeps_its_mode_and_stays(local: FakeDaemon, tree: Path) -> None:
    os.mkfifo(tree / "calc/add")
    (tree / "calc/add").chmod(0o606)
    async with await srpc_client.announce("calc/add", mode=0o640, address=local.address, tree=str(tree)):
        assert stat.S_IMODE((tree / "calc/add").stat().st_mode) == 0o606
    assert (tree / "calc/add").exists()


async def test_withdrawing_leaves_a_pipe_that_somebody_put_in_the_place(local: FakeDaemon, tree: Path) -> None:
    async with announced(local, tree):
        (tree / "calc/add").unlink()
        os.mkfifo(tree / "calc/add")
    assert (tree / "calc/add").exists()


async def test_a_pipe_may_be_kept(local: FakeDaemon, tree: Path) -> None:
    async with await srpc_client.announce("/calc/add", keep=True, address=local.address, tree=str(tree)):
        pass
    assert (tree / "calc/add").exists()


@pytest.mark.parametrize(
    ("path", "errno"),
    [
        ("/missing/add", ENOENT),
        ("/calc/file", EEXIST),
        ("/calc", EEXIST),
        ("/link/add", None),
        ("/calc/dangling", EEXIST),
        ("/", EINVAL),
        ("/calc/../calc/add", EINVAL),
        ("/calc/.hidden", EINVAL),
    ],
)
async def test_what_can_not_be_an_endpoint_is_refused_with_a_sentence(
    local: FakeDaemon, tree: Path, path: str, errno: int | None
) -> None:
    (tree / "calc/file").write_text("x")
    (tree / "link").symlink_to("calc")
    (tree / "calc/dangling").symlink_to("nowhere")
    with pytest.raises(SrpcError) as caught:
        await srpc_client.announce(path, address=local.address, tree=str(tree))
    if errno is not None:
        assert caught.value.errno == errno
    assert len(caught.value.message) > 20
    assert local.announced == []


async def test_a_group_that_is_not_there_is_named(local: FakeDaemon, tree: Path) -> None:
    with pytest.raises(SrpcError, match="no group 'nosuchgroup'"):
        await srpc_client.announce("/calc/add", group="nosuchgroup", address=local.address, tree=str(tree))
    assert not (tree / "calc/add").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody in no group")
def test_who_is_not_in_the_group_is_told_so() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as tree:  # where somebody else can get to
        os.chmod(tree, 0o777)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                EndpointPipe(tree, "/add", 0o620, 0)
            except SrpcError as fault:
                os.write(write, str(fault).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with open(read, encoding="utf-8") as said:
            sentence = said.read()
        assert sentence.startswith(f"EPERM: {tree}/add: this process is not a member of the group root")
        assert os.listdir(tree) == []


async def test_a_refused_announcement_takes_its_pipe_with_it(local: FakeDaemon, tree: Path) -> None:
    local.on[frames.ANNOUNCE] = lambda peer, seq, _body: peer.fail(seq, EACCES)
    with pytest.raises(CallError) as caught:
        await srpc_client.announce("/calc/add", address=local.address, tree=str(tree))
    assert caught.value.errno == EACCES
    assert not (tree / "calc/add").exists()


async def test_endpoints_are_not_announced_on_another_host() -> None:
    with pytest.raises(SrpcError) as caught:
        await srpc_client.announce("/calc/add", address="calc.example")
    assert caught.value.errno == EOPNOTSUPP


async def test_the_daemon_says_where_its_tree_is(local: FakeDaemon, tree: Path) -> None:
    with pytest.raises(SrpcError, match="give tree="):
        await srpc_client.announce("/calc/add", address=local.address)
    local.tree = str(tree)
    async with await srpc_client.announce("/calc/add", address=local.address):
        assert (tree / "calc/add").is_fifo()


async def test_what_the_daemon_remarks_is_logged(local: FakeDaemon, tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    local.warning = "the group may call and serve"
    async with announced(local, tree) as announcement:
        assert announcement.warning == local.warning
    assert "the group may call and serve" in caplog.text


# --- lines -------------------------------------------------------------------------------------------------------------


async def test_a_line_says_who_calls_and_takes_requests_and_replies(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    worker = make_line(7)
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement, 7)
        assert (line.caller.user, line.caller.uid, line.caller.gid) == ("alice", 1001, 1001)
        assert (line.caller.groups, line.caller.context, line.caller.endpoint) == ([1001, 2000], None, "/calc/add")
        worker.call(1, b"1 2", b'{"trace":1}')
        worker.call(2, b"3 4")
        first = await anext(line)
        second = await anext(line)
        assert (first.payload, first.metadata, second.payload) == (b"1 2", b'{"trace":1}', b"3 4")
        assert first.caller is line.caller
        second.reply(b"7", b"{}")
        first.reply(b"3")
        assert await in_thread(worker.reply, 1) == b"3"
        assert worker.answers[2] == (frames.CALL_REPLY, messages.call_reply_body(b"7", b"{}"))


async def test_a_cancelled_request_says_so_and_is_still_to_be_answered(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    worker = make_line()
    told: list[str] = []
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement)
        worker.call(5, b"slow")
        request = await anext(line)
        request.on_cancel(lambda: told.append("cancelled"))
        assert not request.cancelled
        worker.flush(5)
        worker.flush(99)  # not outstanding: nothing happens
        await until(lambda: request.cancelled)
        assert told == ["cancelled"]
        request.reply(b"too late")
        assert await in_thread(worker.reply, 5) == b"too late"


async def test_a_request_is_answered_once(local: FakeDaemon, tree: Path, make_line: MakeLine) -> None:
    worker = make_line()
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement)
        worker.call(1, b"")
        request = await anext(line)
        request.fail(EPERM, "not on Sundays")
        with pytest.raises(RuntimeError):
            request.reply(b"3")
        error = await in_thread(worker.error, 1)
        assert isinstance(error, messages.Error)
        assert (error.errno, error.code, error.message) == (EPERM, "EPERM", "not on Sundays")


async def test_a_caller_who_goes_cancels_his_requests_and_ends_his_line(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    worker = make_line()
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement)
        worker.call(1, b"")
        request = await anext(line)
        worker.hang_up()
        async with asyncio.timeout(5):
            assert [each async for each in line] == []
        assert line.closed
        assert request.cancelled
        request.reply(b"to nobody")


async def test_a_caller_who_does_not_take_his_replies_is_not_read_any_more(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    worker = make_line()
    served = 0

    def big(_request: Request) -> bytes:
        nonlocal served
        served += 1
        return bytes(256 * 1024)

    async with srpc_client.Announcer(local.address, tree=str(tree)) as announcer:
        await announcer.announce("/calc/add", handler=big)
        await until(local.listening.is_set)
        local.tell_line(1)
        for seq in range(1, 201):
            worker.call(seq, b"x")
        await asyncio.sleep(0.3)
        assert 4 <= served <= 12  # HIGH_WATER, a pipe's content, and one more; not 200
        for seq in range(1, 201):
            assert len(await in_thread(worker.reply, seq)) == 256 * 1024  # type: ignore[arg-type]
        assert served == 200


@pytest.mark.parametrize(
    "data",
    [
        frames.frame(frames.CALL, 1, messages.call_body(0, b"")),
        frames.frame(frames.CALLER, 0, b"{}"),
        frames.frame(frames.CALLER, 0, b'{"uid":"0","gid":0,"groups":null,"user":"root","context":null,"endpoint":"/x"}'),
        frames.frame(frames.WALK, 1, b"{}"),
        frames.HEADER.pack(frames.CALL, 1, 2**63),
    ],
)
async def test_a_line_that_does_not_begin_with_its_caller_is_closed_and_the_service_goes_on(
    local: FakeDaemon, tree: Path, make_line: MakeLine, data: bytes
) -> None:
    bad, _good = make_line(1, None), make_line(2)
    bad.write(data)
    async with announced(local, tree) as announcement:
        local.tell_line(1)
        line = await first_line(local, announcement, 2)
        assert line.caller.user == "alice"
        await until(lambda: not bad.read())


async def test_a_line_of_another_endpoint_is_closed_whoever_told_its_number(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    """A gate that was taken over tells it, to have calls on one endpoint of a service reach the handler of another."""
    other = messages.Caller(1001, 1001, [1001], "alice", None, "/calc/harmless")
    bad, _good = make_line(1, other), make_line(2)
    bad.call(1, b"1 2")
    async with announced(local, tree, "calc/add") as announcement:
        local.tell_line(1)
        line = await first_line(local, announcement, 2)
        assert line.caller.endpoint == "/calc/add"
        await until(lambda: not bad.read())
    assert not bad.answers


async def test_the_oldest_line_is_closed_of_a_caller_who_has_too_many(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    """Only a worker that was taken over keeps lines open that it says are gone. Lines of others stay."""
    bob = messages.Caller(1002, 1002, [1002], "bob", None, "/calc/add")
    others, lines = make_line(1, bob), [make_line(number) for number in range(2, LINES_PER_CALLER + 3)]
    async with announced(local, tree) as announcement:
        await first_line(local, announcement, 1)
        for line in lines[:-1]:
            await first_line(local, announcement, line.number)
        assert len(announcement._lines) == LINES_PER_CALLER + 1
        await first_line(local, announcement, lines[-1].number)
        await until(lambda: not lines[0].read())
        assert all(each.read() for each in (others, *lines[1:]))


# --- handlers ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(local: FakeDaemon, tree: Path, worker: FakeLine, handler: object) -> AsyncIterator[None]:
    assert callable(handler)
    task = asyncio.create_task(srpc_client.serve({"/calc/add": handler}, address=local.address, tree=str(tree)))
    try:
        await until(lambda: local.listening.is_set() or task.done())
        local.tell_line(worker.number)
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_handlers_are_functions_or_coroutine_functions(local: FakeDaemon, tree: Path, make_line: MakeLine) -> None:
    def add(request: Request) -> bytes:
        return str(sum(map(int, request.payload.split()))).encode()

    async def slow(request: Request) -> bytes:
        await asyncio.sleep(0)
        return add(request)

    for number, handler in enumerate([add, slow], 1):
        local.listening.clear()
        worker = make_line(number)
        async with serving(local, tree, worker, handler):
            for seq in range(1, 101):
                worker.call(seq, b"%d 1" % seq)
            for seq in range(1, 101):
                assert await in_thread(worker.reply, seq) == b"%d" % (seq + 1)
    assert not (tree / "calc/add").exists()


async def test_asynchronous_handlers_run_concurrently_and_answer_in_any_order(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    gate = asyncio.Event()

    async def handler(request: Request) -> bytes:
        if request.payload == b"first":
            await gate.wait()
        else:
            gate.set()
        return request.payload

    worker = make_line()
    async with serving(local, tree, worker, handler):
        worker.call(1, b"first")
        worker.call(2, b"second")
        assert await in_thread(worker.reply, 2) == b"second"
        assert await in_thread(worker.reply, 1) == b"first"


async def test_asynchronous_handlers_hold_a_bounded_amount_of_one_callers_payload(
    local: FakeDaemon, tree: Path, make_line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a caller who sends much to a slow handler has the service keep 256 times 16 MiB for him alone."""
    monkeypatch.setattr(srpc_client.line, "HELD_MAX", MIB)
    begun, go = [0], asyncio.Event()

    async def handler(request: Request) -> bytes:
        begun[0] += 1
        await go.wait()
        return b"%d" % len(request.payload)

    worker = make_line()
    async with serving(local, tree, worker, handler):
        half = messages.call_body(0, bytes(MIB // 2))
        calls = b"".join(frames.frame(frames.CALL, seq, half) for seq in range(1, 13))
        writing = asyncio.create_task(in_thread(worker.write, calls))
        await until(lambda: begun[0] == 3)
        await asyncio.sleep(0.2)
        assert begun[0] == 3
        go.set()
        for seq in range(1, 13):
            assert await in_thread(worker.reply, seq) == b"%d" % (MIB // 2)
        await writing


@pytest.mark.parametrize("goes", [False, True])
async def test_a_caller_is_heard_when_his_handlers_never_end_and_more_waits(
    goes: bool, local: FakeDaemon, tree: Path, make_line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a call is cancelled stands behind what waits for it to end: unread, the line would be of no use ever again."""
    monkeypatch.setattr(srpc_client.line, "HELD_MAX", MIB)
    monkeypatch.setattr(srpc_client.line, "DEAF_MAX", 0.3)
    seen: list[str] = []

    async def handler(request: Request) -> bytes:
        if not request.payload:
            return b"at once"
        seen.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")
        return b""

    worker = make_line()
    async with serving(local, tree, worker, handler):
        large = messages.call_body(0, bytes(MIB + 1))
        for seq in range(1, 3):
            await in_thread(worker.write, frames.frame(frames.CALL, seq, large))
        await until(lambda: seen == ["begun"])
        if goes:
            worker.hang_up()
            await until(lambda: "ended" in seen)
            return
        worker.call(3, b"")
        error = await in_thread(worker.error, 3)
        assert isinstance(error, messages.Error)
        assert error.errno == EAGAIN
        for seq in range(1, 3):
            worker.flush(seq)
        for seq in range(1, 3):
            await in_thread(worker.error, seq)
        assert seen == ["begun", "ended"]
        worker.call(4, b"")
        assert await in_thread(worker.reply, 4) == b"at once"


async def test_an_error_of_a_handler_reaches_its_caller_and_any_other_exception_only_the_log(
    local: FakeDaemon, tree: Path, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> bytes | None:
        match request.payload:
            case b"mine":
                raise CallError(ENOENT, "no such number")
            case b"bug":
                raise KeyError("the password is hunter2")
            case b"os":
                raise FileNotFoundError("/etc/shadow")
            case b"nothing":
                return None
        return "text"  # type: ignore[return-value]

    worker = make_line()
    async with serving(local, tree, worker, handler):
        for seq, payload in enumerate([b"mine", b"bug", b"os", b"nothing", b"text"], 1):
            worker.call(seq, payload)
        error = await in_thread(worker.error, 1)
        assert isinstance(error, messages.Error)
        assert (error.errno, error.message) == (ENOENT, "no such number")
        for seq in (2, 3, 5):
            error = await in_thread(worker.error, seq)
            assert isinstance(error, messages.Error)
            assert error.errno == EIO
            assert "hunter2" not in error.message
            assert "shadow" not in error.message
        assert await in_thread(worker.reply, 4) == b""
    assert "hunter2" in caplog.text


async def test_cancelling_a_call_cancels_its_asynchronous_handler(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    seen: list[str] = []

    async def handler(_request: Request) -> bytes:
        seen.append("begun")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return b""

    worker = make_line()
    async with serving(local, tree, worker, handler):
        worker.call(1, b"")
        await until(lambda: seen == ["begun"])
        worker.flush(1)
        error = await in_thread(worker.error, 1)
        assert isinstance(error, messages.Error)
        assert error.errno == ECANCELED
        worker.write(
            frames.frame(frames.CALL, 2, messages.call_body(0, b"")) + frames.frame(frames.FLUSH, 0, frames.SEQ.pack(2))
        )  # cancelled before it was begun
        error = await in_thread(worker.error, 2)
        assert isinstance(error, messages.Error)
        assert error.errno == ECANCELED
    assert seen == ["begun", "cancelled"]


async def test_a_withdrawn_handler_finishes_the_calls_that_it_has(
    local: FakeDaemon, tree: Path, make_line: MakeLine
) -> None:
    async def handler(request: Request) -> bytes:
        await asyncio.sleep(0.1)
        return request.payload

    worker = make_line()
    async with serving(local, tree, worker, handler):
        worker.call(1, b"x")
        await in_thread(worker.reply, 1)
        for seq in range(2, 50):
            worker.call(seq, b"y")
        await asyncio.sleep(0.02)
    for seq in range(2, 50):
        assert worker.reply(seq) == b"y"
    await until(lambda: not worker.read())


# --- the daemon goes and comes back ------------------------------------------------------------------------------------


async def test_an_announcement_comes_back_when_the_daemon_does(
    local: FakeDaemon, tree: Path, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = local.address.removeprefix("unix:")
    async with announced(local, tree) as announcement:
        await in_thread(local.stop)
        os.unlink(path)
        await until(lambda: not announcement.registered)
        (tree / "calc/add").unlink()  # and somebody tidied up
        local.listening.clear()
        await asyncio.sleep(0.3)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        local.listener = listener
        local.start()
        await until(local.listening.is_set)
        assert local.announced == ["/calc/add"] * 2
        assert (tree / "calc/add").is_fifo()
        make_line(3)
        line = await first_line(local, announcement, 3)
        assert line.caller.user == "alice"
    assert not (tree / "calc/add").exists()


async def test_an_announcement_that_the_daemon_ends_is_made_again(local: FakeDaemon, tree: Path) -> None:
    async with announced(local, tree) as announcement:
        local.listening.clear()
        peer = local.peers[0]
        for seq in list(peer.listens.values()):
            peer.fail(seq, ECANCELED)
        await until(local.listening.is_set)
        await until(lambda: announcement.registered)
        assert local.announced == ["/calc/add"] * 2


async def test_several_announcements_share_a_connection(local: FakeDaemon, tree: Path) -> None:
    async with srpc_client.Announcer(local.address, tree=str(tree)) as announcer:
        await announcer.announce("/calc/add")
        await announcer.announce("/calc/mul")
        assert len(local.peers) == 1
        assert sorted(each.name for each in (tree / "calc").iterdir()) == ["add", "mul"]
    assert list((tree / "calc").iterdir()) == []


async def test_listening_ends_with_the_announcement(local: FakeDaemon, tree: Path, make_line: MakeLine) -> None:
    worker = make_line()
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement)
        listening = asyncio.create_task(anext(announcement.listen(), None))
        await asyncio.sleep(0)
        await announcement.close()
        assert await listening is None
        assert line.closed
        await until(lambda: not worker.read())


# --- hostile directories -----------------------------------------------------------------------------------------------


def _symlink(line: FakeLine) -> None:
    line.path.rename(line.path.with_name("elsewhere"))
    line.path.symlink_to("elsewhere")


def _regular_file(line: FakeLine) -> None:
    line.path.unlink()
    line.path.write_bytes(frames.frame(frames.CALLER, 0, b"{}"))


def _symlinked_directory(line: FakeLine) -> None:
    directory = line.path.parent
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to("elsewhere")


def _foreign_socket(line: FakeLine) -> None:
    os.chown(line.path, 12345, -1)


def _foreign_directory(line: FakeLine) -> None:
    os.chown(line.path.parent, 12345, -1)


@pytest.mark.parametrize("spoil", [_symlink, _regular_file, _symlinked_directory, _foreign_socket, _foreign_directory])
async def test_a_line_that_the_daemon_can_not_have_made_is_not_connected(
    local: FakeDaemon, make_line: MakeLine, spoil: Callable[[FakeLine], None]
) -> None:
    if spoil in (_foreign_socket, _foreign_directory) and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    line = make_line()
    spoil(line)
    with pytest.raises(UntrustedServer):
        open_line(local.address.removeprefix("unix:"), 1)
    assert line.socket is None


@pytest.mark.needs_root
async def test_a_line_at_which_somebody_else_listens_is_left(local: FakeDaemon, make_line: MakeLine) -> None:
    """The file may be root's, and the process behind it not: it could pass for any caller."""
    line = make_line()
    line.path.unlink()
    impostor = os.fork()
    if impostor == 0:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(line.path))
        os.seteuid(12345)
        listener.listen()
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(impostor, os.WUNTRACED)
    try:
        with pytest.raises(UntrustedServer, match="uid 12345"):
            open_line(local.address.removeprefix("unix:"), 1)
    finally:
        os.kill(impostor, signal.SIGKILL)
        os.waitpid(impostor, 0)


async def test_a_line_that_can_not_be_trusted_is_passed_over(
    local: FakeDaemon, tree: Path, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    bad, _good = make_line(1), make_line(2)
    _symlink(bad)
    async with announced(local, tree) as announcement:
        local.tell_line(1)
        line = await first_line(local, announcement, 2)
        assert line.caller.user == "alice"
        assert len(announcement._lines) == 1
    assert "EPERM" in caplog.text


@pytest.mark.parametrize("old", [False, True], ids=["from Linux 6.16 on", "before"])
async def test_a_caller_that_sends_a_descriptor_along_gets_no_more_than_an_end(
    local: FakeDaemon, tree: Path, make_line: MakeLine, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    if old:
        monkeypatch.setattr(passing, "refuse_descriptors", lambda _sock: False)
    worker = make_line()
    async with announced(local, tree) as announcement:
        line = await first_line(local, announcement)
        worker.call(1, b"honest")
        assert (await anext(line)).payload == b"honest"
        assert worker.socket is not None
        before = len(os.listdir("/proc/self/fd"))
        try:
            socket.send_fds(worker.socket, [b"x"], [0])
        except PermissionError:  # refused
            assert not old
            return
        async with asyncio.timeout(5):
            await line.wait_closed()
        assert len(os.listdir("/proc/self/fd")) < before


async def test_a_line_whose_caller_has_gone_already_is_passed_over(
    local: FakeDaemon, tree: Path, make_line: MakeLine, caplog: pytest.LogCaptureFixture
) -> None:
    make_line(1).hang_up()
    make_line(2)
    async with announced(local, tree) as announcement:
        local.tell_line(1)
        local.tell_line(77)  # never made
        line = await first_line(local, announcement, 2)
        assert line.caller.user == "alice"
    assert "its caller has gone" in caplog.text
