"""The log: no value leaves its place, and no reader of the log can stop the daemon."""

import json
import os
import pty
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpcd.log import LINE_MAX, VALUE_MAX, Log
from srpcd.lograte import LogRate

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


MakeLog = Callable[..., Log]


@pytest.fixture
def make_log() -> Iterator[MakeLog]:
    with ExitStack() as made:
        yield lambda *arguments, **options: made.enter_context(closing(Log(*arguments, **options)))


def write(fd: int, event: str, format: str, **fields: str | int) -> None:
    with closing(Log(fd, format)) as log:
        log.event("info", event, **fields)


def written(tmp_path: Path, value: str, format: str) -> bytes:
    with open(tmp_path / "log", "wb") as file:
        write(file.fileno(), "connection", format, before=1, value=value, after="end")
    return (tmp_path / "log").read_bytes()


def test_the_text_form_is_event_and_fields(pipe: Pipe, make_log: MakeLog) -> None:
    log = make_log(pipe[1])
    log.event("info", "attach", conn=3, user="alice", aname="/calc", worker=None, peer="[2001:db8::1]:7", text="two words")
    log.event("warning", "refused", empty="", errno=13)
    log.event("info", "refused", errno=4095)
    text = os.read(pipe[0], 4096).decode()
    assert text == (
        'attach conn=3 user=alice aname=/calc peer=[2001:db8::1]:7 text="two words"\n'
        'refused level=warning empty="" errno=EACCES\n'
        "refused errno=4095\n"
    )


def test_the_json_form_is_one_object_a_line(pipe: Pipe, make_log: MakeLog) -> None:
    make_log(pipe[1], "json").event("error", "authentication", user='mü"ller\\', conn=2**64 - 1, gone=None)
    line = os.read(pipe[0], 4096)
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {"level": "error", "event": "authentication", "user": 'mü"ller\\', "conn": 2**64 - 1}


def test_a_level_below_the_wanted_one_is_not_written(pipe: Pipe, make_log: MakeLog) -> None:
    log = make_log(pipe[1], level="warning")
    for level in ("debug", "info", "warning", "error"):
        log.event(level, level)
    assert os.read(pipe[0], 4096) == b"warning level=warning\nerror level=error\n"


FORGERIES = [
    "alice\nauthentication outcome=accepted user=root",
    "alice user=root",
    'alice" user=root "',
    "alice\\",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b2J",
    "\r\u2028\u2029\x85\x0b\x0c",
    "\u202egnp.exe\u2066",
    "zero\u200bwidth\ufeff",
    "\udcff\ud800",
    "\U000e0001\U0010ffff",
    "\0",
]


@pytest.mark.parametrize("value", FORGERIES)
@pytest.mark.parametrize("format", ["text", "json"])
def test_what_a_peer_said_forges_no_line_no_field_and_no_terminal_control(tmp_path: Path, value: str, format: str) -> None:
    line = written(tmp_path, value, format).decode()
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    if format == "json":
        assert json.loads(line)["value"] == value
        return
    head, _, rest = line.rstrip("\n").partition(" value=")
    assert head == "connection before=1"
    quoted, at = json.JSONDecoder().raw_decode(rest)
    assert (quoted, rest[at:]) == (value, " after=end")


@given(value=st.text(st.characters(), max_size=VALUE_MAX))
def test_any_text_comes_back_from_both_forms(value: str) -> None:
    reader, writer = os.pipe()
    try:
        for form in ("text", "json"):
            write(writer, "e", form, value=value)
        text, line, rest = os.read(reader, 3 * LINE_MAX).decode().split("\n")
    finally:
        os.close(reader)
        os.close(writer)
    assert (rest, text.isprintable()) == ("", True)
    found = text.partition("=")[2]
    restored = json.loads(line)["value"]
    cut = restored.endswith("…") and value.startswith(restored[:-1])
    assert restored == value or cut
    assert (json.loads(found) if found.startswith('"') else found) == restored or cut


@pytest.mark.parametrize("value", ["a" * 10**6, "\0" * 10**6, "ü" * 10**6, "\U000e0001" * 10**6])
@pytest.mark.parametrize("format", ["text", "json"])
def test_a_line_is_never_longer_than_the_kernel_writes_at_once(tmp_path: Path, value: str, format: str) -> None:
    with open(tmp_path / "log", "wb") as file:
        write(file.fileno(), "refused", format, **{f"field{n}": value for n in range(12)})
    line = (tmp_path / "log").read_bytes()
    assert len(line) <= LINE_MAX
    assert line.count(b"\n") == 1
    assert b"field11" in line
    if format == "json":
        json.loads(line)


def lines_until_full(log: Log) -> int:
    count = 0
    while not log.dropped and count < 10_000:
        log.event("info", "refused", number=count, text="x" * 300)
        count += 1
    return count - 1


def test_a_full_pipe_loses_lines_and_counts_them_and_stops_nobody(pipe: Pipe, make_log: MakeLog) -> None:
    log = make_log(pipe[1])
    begin = time.monotonic()
    fitted = lines_until_full(log)
    for _ in range(4):
        log.event("info", "refused")
    assert time.monotonic() - begin < 2
    assert os.get_blocking(pipe[1]), "others who have the stream see no change"
    text = b""
    while select.select([pipe[0]], [], [], 0)[0]:
        text += os.read(pipe[0], 65536)
    assert text.count(b"\n") == fitted
    log.event("info", "refused", number=0)
    assert os.read(pipe[0], 4096) == b"log-dropped level=warning lines=5\nrefused number=0\n"
    assert log.dropped == 0


def test_a_full_socket_stops_nobody_and_half_a_line_stays_alone(make_log: MakeLog) -> None:
    # journald's standard error is a stream socket.
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        log = make_log(writer.fileno())
        lines_until_full(log)
        reader.setblocking(False)
        text = reader.recv(1 << 20)
        log.event("info", "refused", number=0)
        text += reader.recv(1 << 20)
    lines = text.decode().splitlines()
    assert lines[-1] == "refused number=0"
    assert lines[-2].startswith("log-dropped ")


def test_a_terminal_that_nobody_reads_stops_nobody(make_log: MakeLog) -> None:
    master, slave = pty.openpty()
    try:
        log = make_log(slave)
        begin = time.monotonic()
        for _ in range(2000):
            log.event("info", "refused", text="x" * 390)
        assert log.dropped
        assert time.monotonic() - begin < 5
    finally:
        os.close(master)
        os.close(slave)


def test_a_broken_or_closed_stream_is_only_counted(tmp_path: Path, make_log: MakeLog) -> None:
    reader, writer = os.pipe()
    log = make_log(writer)
    os.close(reader)
    log.event("error", "stop")
    assert log.dropped == 1
    os.close(writer)
    closed = make_log(writer)
    closed.event("error", "stop")
    assert closed.dropped == 1


def test_a_full_disk_is_only_counted(tmp_path: Path, make_log: MakeLog) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        log = make_log(full.fileno())
        log.event("error", "stop")
        assert log.dropped == 1


def test_it_opens_at_most_one_descriptor_and_gives_it_back(pipe: Pipe) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = Log(pipe[1])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    log.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.fstat(pipe[1])


def test_what_peers_cause_is_bounded_and_what_the_daemon_does_is_not(tmp_path: Path, make_log: MakeLog) -> None:
    with open(tmp_path / "log", "wb") as file:
        log = make_log(file.fileno(), rate=LogRate(2, 1 << 30))
        for number in range(5):
            log.event("info", "gate-restart")
            log.peer_event("192.0.2.7", "warning", "authentication", outcome="refused", conn=number)
            log.peer_event("192.0.2.7", "info", "authentication", outcome="accepted", conn=number)
            log.peer_event("uid:1000", "info", "refused", 10, conn=number)
            log.peer_event("uid:1000", "debug", "connection", conn=number)
        log.report_suppressed()
        assert b"suppressed" not in (tmp_path / "log").read_bytes()
        log.report_suppressed(last=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.count("gate-restart") == 5
    assert [line for line in lines if "outcome" in line] == [
        f"authentication{level} outcome={outcome} conn={number}"
        for number in range(2)
        for level, outcome in ((" level=warning", "refused"), ("", "accepted"))
    ]
    assert lines[-3:] == [
        'suppressed level=warning origin=192.0.2.7 which="authentication refused" lines=3',
        "suppressed level=warning origin=192.0.2.7 which=authentication lines=3",
        "suppressed level=warning origin=uid:1000 which=refused lines=53",
    ]


def test_all_peers_together_are_bounded(tmp_path: Path, make_log: MakeLog) -> None:
    with open(tmp_path / "log", "wb") as file:
        log = make_log(file.fileno(), rate=LogRate(2, 1024))
        for number in range(1000):
            for _ in range(3):
                log.peer_event(f"origin{number}", "info", "refused", text="x" * 200)
        log.event("info", "stop")
        log.report_suppressed(last=True)
    lines = (tmp_path / "log").read_text().splitlines()
    written = [line for line in lines if line.startswith("refused")]
    assert sum(map(len, written)) < 12 * 1024
    assert "stop" in lines
    left = [int(line.rpartition("=")[2]) for line in lines if line.startswith("suppressed")]
    assert len(written) + sum(left) == 3000
