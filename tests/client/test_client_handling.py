"""The handler's side of a line without I/O, and what is loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from errno import EIO, EMSGSIZE, EPROTO
from typing import Any

import pytest

import srpc_client
from srpc_client.handling import Caller, HandlerCore, Request
from srpcd.wire import frames, messages
from srpcd.wire.errors import ProtocolError
from srpcd.wire.limits import ERROR_MESSAGE_MAX, LINE_OUTSTANDING_MAX, METADATA_MAX, PAYLOAD_MAX

ALICE = frames.frame(
    frames.CALLER, 0, messages.encode(messages.Caller(1001, 1001, [1001], "alice", "user_u:user_r:x:s0", "/calc/add"))
)


def call(seq: int, payload: bytes = b"", metadata: bytes = b"") -> bytes:
    return frames.frame(frames.CALL, seq, messages.call_body(0, payload, metadata))


def flush(seq: int) -> bytes:
    return frames.frame(frames.FLUSH, 0, frames.SEQ.pack(seq))


def written(core: HandlerCore) -> list[tuple[int, int, bytes]]:
    return list(frames.FrameReader(frames.LINE_REPLIES).feed(bytes(core.take())))


@pytest.fixture
def core() -> HandlerCore:
    core = HandlerCore()
    assert core.receive(ALICE) == []
    return core


def test_the_first_frame_says_who_calls(core: HandlerCore) -> None:
    caller = core.caller
    assert caller is not None
    assert (caller.user, caller.uid, caller.gid, caller.groups) == ("alice", 1001, 1001, [1001])
    assert (caller.context, caller.endpoint) == ("user_u:user_r:x:s0", "/calc/add")
    assert repr(caller) == "Caller('alice', uid=1001, gid=1001, endpoint='/calc/add')"


def test_requests_come_out_however_their_bytes_are_cut() -> None:
    core = HandlerCore()
    requests: list[Request] = []
    for byte in ALICE + call(1, b"one", b"{}") + call(2, b"two"):
        requests += core.receive(bytes([byte]))
    assert [(each.seq, each.payload, each.metadata) for each in requests] == [(1, b"one", b"{}"), (2, b"two", b"")]
    assert core.outstanding == 2


def test_a_reply_is_what_the_worker_reads(core: HandlerCore) -> None:
    one, two, three = core.receive(call(1) + call(2) + call(3))
    three.reply(memoryview(array("I", [1, 2])))
    two.reply(bytearray(b"second"), b"{}")
    one.reply(memoryview(b"first"))
    assert core.waiting
    assert written(core) == [
        (frames.CALL_REPLY, 3, messages.call_reply_body(array("I", [1, 2]).tobytes())),
        (frames.CALL_REPLY, 2, messages.call_reply_body(b"second", b"{}")),
        (frames.CALL_REPLY, 1, messages.call_reply_body(b"first")),
    ]
    assert (core.outstanding, core.waiting, core.take()) == (0, 0, b"")


@pytest.mark.parametrize(
    ("errno", "message", "found"),
    [
        (13, "no", (13, "no")),
        (0, "odd", (EIO, "odd")),
        (99999, "odd", (EIO, "odd")),
        (2, "caf\udce9.txt", (2, "caf?.txt")),
        (2, "", (2, "no such endpoint or directory")),
    ],
)
def test_a_failure_is_an_error_that_a_worker_accepts(
    core: HandlerCore, errno: int, message: str, found: tuple[int, str]
) -> None:
    core.receive(call(1))[0].fail(errno, message)
    [(kind, seq, body)] = written(core)
    error = messages.decode(messages.Error, body)
    assert (kind, seq, error.errno, error.message) == (frames.ERROR, 1, *found)


def test_a_long_sentence_is_cut_to_what_an_error_holds(core: HandlerCore) -> None:
    core.receive(call(1))[0].fail(5, "\N{SNOWMAN}" * 100_000)
    [(_kind, _seq, body)] = written(core)
    assert len(messages.decode(messages.Error, body).message.encode()) <= ERROR_MESSAGE_MAX


@pytest.mark.parametrize(("payload", "metadata"), [(PAYLOAD_MAX + 1, 0), (0, METADATA_MAX + 1)])
def test_a_reply_that_is_too_large_is_an_error_for_the_caller(core: HandlerCore, payload: int, metadata: int) -> None:
    core.receive(call(1))[0].reply(bytes(payload), bytes(metadata))
    [(kind, _seq, body)] = written(core)
    assert kind == frames.ERROR
    assert messages.decode(messages.Error, body).errno == EMSGSIZE


def test_a_flush_marks_its_request_and_nothing_else(core: HandlerCore) -> None:
    one, two = core.receive(call(1) + call(2))
    told: list[str] = []
    one.on_cancel(lambda: told.append("one"))
    core.receive(flush(1) + flush(1) + flush(77))
    assert (one.cancelled, two.cancelled, told) == (True, False, ["one"])
    one.on_cancel(lambda: told.append("late"))
    assert told == ["one", "late"]
    one.reply(b"")
    assert core.receive(flush(1) + call(1)) != []  # the seq is free again


def test_the_end_of_a_line_cancels_what_is_outstanding(core: HandlerCore) -> None:
    one, two = core.receive(call(1) + call(2))
    two.reply(b"unread")
    core.end()
    assert (one.cancelled, two.cancelled) == (True, False)
    one.reply(b"to nobody")
    assert core.take() == b""


@pytest.mark.parametrize(
    "data",
    [
        ALICE,  # a second one
        call(1) + call(1),
        b"".join(call(seq) for seq in range(LINE_OUTSTANDING_MAX + 1)),
        frames.frame(frames.CALL, 1, b"\0" * 11),
        frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, 5) + b"abc"),
        frames.frame(frames.CALL, 1, frames.CALL_HEAD.pack(0, METADATA_MAX + 1) + bytes(METADATA_MAX + 1)),
        frames.frame(frames.FLUSH, 1, b"\0"),
        frames.frame(frames.PING, 1),
        frames.HEADER.pack(frames.CALL, 1, 2**64 - 1),
    ],
)
def test_what_no_worker_sends_ends_the_line(core: HandlerCore, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        core.receive(data)


@pytest.mark.parametrize(
    "change",
    [
        {"uid": "1001"},
        {"uid": True},
        {"gid": 1.5},
        {"groups": [1, "2"]},
        {"groups": 5},
        {"user": None},
        {"context": 1},
        {"endpoint": []},
        None,
    ],
)
def test_a_caller_who_is_not_told_properly_is_no_caller(change: dict[str, Any] | None) -> None:
    facts = {"uid": 1, "gid": 1, "groups": None, "user": "a", "context": None, "endpoint": "/x"}
    assert Caller.parse(json.dumps(facts).encode()).groups is None
    if change is None:
        del facts["user"]
    else:
        facts |= change
    with pytest.raises(ProtocolError) as caught:
        Caller.parse(json.dumps(facts).encode())
    assert caught.value.errno == EPROTO


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_first_frame_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        Caller.parse(body[: frames.LINE_REQUESTS[frames.CALLER]])


# --- what is loaded ----------------------------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_resident_program_loads_little() -> None:
    names = loaded("from srpc_client.stdio import serve_stdio\nfrom srpc_client import serve_stdio, CallError, Request")
    assert not names & {
        "OpenSSL",
        "cryptography",
        "msgspec",
        "asyncio",
        "json",
        "logging",
        "typing",
        "dataclasses",
        "inspect",
    }


def test_the_blocking_client_does_not_load_asyncio() -> None:
    assert "asyncio" not in loaded("from srpc_client import blocking")


def test_all_names_of_the_package_are_there() -> None:
    for name in srpc_client.__all__:
        assert getattr(srpc_client, name) is not None
    assert srpc_client.blocking.dial.__module__ != srpc_client.dial.__module__
    with pytest.raises(AttributeError, match="nonsense"):
        srpc_client.nonsense  # noqa: B018
