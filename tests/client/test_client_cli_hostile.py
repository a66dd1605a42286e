"""The `srpc` command and a server that has the right key or uid, and wants to hang it, fill it, or command its terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from srpc_client.cli import show
from srpc_client.text import lines_of, plain
from srpcd.wire import frames, messages
from srpcd.wire.messages import Prompt
from tests.client.test_client_hostile import answer_stats, stat_reply

if TYPE_CHECKING:
    from tests.client.conftest import FakeDaemon, Peer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "srpc_client.cli"]
SECONDS = 60
"""For what must end by itself. Nothing here takes so long, unless it never ends."""

EVIL = "\x1b]0;title\x07\x9b2J\u202e\r"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
        "LOGNAME": "alice",
    }


class Command:
    """One `srpc`, at a terminal of its own or without one."""

    def __init__(self, environment: dict[str, str], arguments: tuple[str, ...], terminal: bool) -> None:
        self.terminal = -1
        self.seen = b""
        if terminal:
            self.terminal, other = pty.openpty()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _AT_TERMINAL, *COMMAND, *arguments],
                stdin=other,
                stdout=other,
                stderr=other,
                env=environment,
                start_new_session=True,
            )
            os.close(other)
        else:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )

    def expect(self, text: bytes) -> None:
        """Read from the terminal until this is there."""
        while text not in self.seen:
            assert self._read(), self.seen

    def _read(self) -> bool:
        """Read once from the terminal. Returns False when no process has the other end any more."""
        ready, _, _ = select.select([self.terminal], [], [], SECONDS)
        assert ready, self.seen
        try:
            more = os.read(self.terminal, 4096)
        except OSError:  # EIO
            return False
        self.seen += more
        return bool(more)

    def end(self) -> tuple[int, str]:
        """Wait for its end. Returns its status, and what it said on standard error or at the terminal."""
        if self.terminal >= 0:
            while self._read():
                pass
            said = self.seen
            status = self.process.wait(SECONDS)
        else:
            status = self.process.wait(SECONDS)
            assert self.process.stderr is not None
            said = self.process.stderr.read()
        return status, said.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.terminal >= 0:
            os.close(self.terminal)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


_AT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""

Start = Callable[..., Command]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    started: list[Command] = []

    def start(*arguments: str, terminal: bool = False, **more: str) -> Command:
        started.append(Command(environment | more, arguments, terminal))
        return started[-1]

    yield start
    for each in started:
        each.close()


# --- trees that do not end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_directory_that_contains_itself_is_no_tree(local: FakeDaemon, start: Start, form: tuple[str, ...]) -> None:
    answer_stats(local, lambda _: stat_reply(["again", "and-again"]))
    local.every_qid = "1:2"
    status, said = start("-a", local.address, "tree", *form).end()
    assert (status, said) == (
        1,
        "srpc: /again is one of the directories that it lies in: the server makes its tree up (ELOOP)\n",
    )


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_tree_without_end_is_given_up(local: FakeDaemon, start: Start, form: tuple[str, ...]) -> None:
    """Each directory is another one, so that only the count ends it."""
    inode = 0

    def make(_: messages.Stat) -> messages.StatReply:
        nonlocal inode
        inode += 1
        return stat_reply([f"{each:03}" for each in range(20)], qid=f"1:{inode}")

    answer_stats(local, make)
    local.every_qid = "1:2"
    status, said = start("-a", local.address, "tree", *form).end()
    assert status == 1
    assert "over 10000 files" in said
    assert local.count("stat") < 2 * show.ENTRIES_MAX


def test_depth_has_a_bound(local: FakeDaemon, start: Start) -> None:
    status, said = start("-a", local.address, "tree", "--depth", "65").end()
    assert status == 2
    assert "64" in said
    answer_stats(local, lambda _: stat_reply(["d"], qid=f"1:{local.count('stat')}"))
    local.every_qid = "1:2"
    deep = start("-a", local.address, "tree", "--depth", "64", "--json")
    assert deep.process.stdout is not None
    found = json.loads(deep.process.stdout.read())
    depth = 0
    while "children" in found:
        (found,), depth = found["children"], depth + 1
    assert depth == 64


def test_ls_describes_no_more_than_is_kept(local: FakeDaemon, start: Start) -> None:
    def page(stat: messages.Stat) -> messages.StatReply:
        begin = int(stat.after or "0")
        return stat_reply([f"{begin + each:09}" for each in range(1, 1001)], more=begin < show.ENTRIES_MAX)

    answer_stats(local, page)
    status, said = start("-a", local.address, "ls", "-l").end()
    assert (status, local.count("walk")) == (1, 1)
    assert "-l describes at most 10000" in said


def test_a_time_that_is_no_time_is_no_traceback(local: FakeDaemon, start: Start) -> None:
    answer_stats(local, lambda _: stat_reply([], mtime=10**30))
    status, said = start("-a", local.address, "ls", "-l").end()
    assert status == 3
    assert "broke the protocol" in said
    assert "Traceback" not in said


# --- the time of --timeout, and Ctrl-C, in each phase ----------------------------------------------------------------------


@pytest.fixture
def phase(request: pytest.FixtureRequest, tmp_path: Path, start: Start) -> Callable[..., Command]:
    """Starts a command that hangs in the phase that is named, and waits until it does."""

    def begin(name: str, *options: str) -> Command:
        return _PHASES[name](request, tmp_path, start, options)

    return begin


def _listening(request: pytest.FixtureRequest) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    request.addfinalizer(listener.close)
    return listener


def _pin(request: pytest.FixtureRequest) -> str:
    return "sha256:" + "A" * 43 + "="


def _resolving(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, time\n"
        "real = socket.getaddrinfo\n"
        "def wait(*arguments, **options):\n"
        "    if options.get('flags') == socket.AI_NUMERICHOST: return real(*arguments, **options)\n"
        "    os.write(1, b'resolving\\n')\n"
        "    while True: time.sleep(1000)\n"
        "socket.getaddrinfo = wait\n"
    )
    path = f"{tmp_path}:{ROOT}"
    command = start("-a", "calc.example", "--pin", _pin(request), *options, "ls", PYTHONPATH=path)
    assert command.process.stdout is not None
    assert command.process.stdout.readline() == b"resolving\n"
    return command


def _connecting(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    request.addfinalizer(listener.close)
    for _ in range(3):
        filler = socket.socket()
        request.addfinalizer(filler.close)
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    command = start("-a", f"127.0.0.1:{listener.getsockname()[1]}", "--pin", _pin(request), *options, "ls")
    _wait_for_sleep(command)
    return command


def _handshaking(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    listener = _listening(request)
    command = start("-a", f"127.0.0.1:{listener.getsockname()[1]}", "--pin", _pin(request), *options, "ls")
    connected, _ = listener.accept()
    request.addfinalizer(connected.close)
    assert connected.recv(1) == b"\x16"
    return command


def _asked(
    request: pytest.FixtureRequest, start: Start, options: tuple[str, ...], kind: int, *arguments: str, **daemon: Any
) -> Command:
    local: FakeDaemon = request.getfixturevalue("local")
    local.on[kind] = lambda *_: True
    command = start("-a", local.address, *options, *arguments)
    local.wait_for(lambda: local.count(frames.NAMES[kind]), SECONDS)
    return command


def _authenticating(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    return _asked(request, start, options, frames.AUTH, "ls")


def _attaching(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    return _asked(request, start, options, frames.ATTACH, "ls")


def _walking(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    return _asked(request, start, options, frames.WALK, "tree")


def _listing(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    local: FakeDaemon = request.getfixturevalue("local")

    def page(stat: messages.Stat) -> messages.StatReply:
        time.sleep(0.002)
        return stat_reply([f"{int(stat.after or '0') + 1:09}"], more=True)

    answer_stats(local, page)
    command = start("-a", local.address, *options, "ls")
    local.wait_for(lambda: local.count("stat") > 100, SECONDS)
    return command


def _in_a_tree(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    local: FakeDaemon = request.getfixturevalue("local")

    def slowly(_: messages.Stat) -> messages.StatReply:
        time.sleep(0.02)
        return stat_reply([f"{each:03}" for each in range(1000)], qid=f"1:{local.count('stat')}")

    answer_stats(local, slowly)
    local.every_qid = "1:2"
    command = start("-a", local.address, *options, "tree")
    local.wait_for(lambda: local.count("stat") > 20, SECONDS)
    return command


def _calling(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    return _asked(request, start, options, frames.CALL, "call", "/echo", "x")


def _reading(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    local: FakeDaemon = request.getfixturevalue("local")
    command = start("-a", local.address, *options, "call", "/echo")
    _wait_for_sleep(command)
    return command


def _printing(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    """Its standard output is full, and no process reads it."""
    local: FakeDaemon = request.getfixturevalue("local")
    local.endpoints["much"] = lambda *_: bytes(1 << 20)
    command = start("-a", local.address, *options, "call", "/much", "x")
    local.wait_for(lambda: local.calls, SECONDS)
    _wait_for_sleep(command)
    return command


def _prompting(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    remote: FakeDaemon = request.getfixturevalue("remote")
    command = start("-a", remote.address, "--pin", remote.pin, *options, "ls", terminal=True)
    command.expect(b"Password: ")
    return command


def _prompting_aloud(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    remote: FakeDaemon = request.getfixturevalue("remote")
    remote.conversation = [[Prompt("text", "Code: ")]]
    command = start("-a", remote.address, "--pin", remote.pin, *options, "ls", terminal=True)
    command.expect(b"Code: ")
    return command


def _confirming(request: pytest.FixtureRequest, tmp_path: Path, start: Start, options: tuple[str, ...]) -> Command:
    remote: FakeDaemon = request.getfixturevalue("remote")
    command = start("-a", remote.address, *options, "ls", terminal=True)
    command.expect(b"[y/N]")
    return command


_PHASES: dict[str, Callable[..., Command]] = {
    "resolving": _resolving,
    "connecting": _connecting,
    "TLS handshake": _handshaking,
    "authenticating": _authenticating,
    "attaching": _attaching,
    "prompting": _prompting,
    "prompting aloud": _prompting_aloud,
    "confirming": _confirming,
    "walking": _walking,
    "listing": _listing,
    "in a tree": _in_a_tree,
    "calling": _calling,
    "reading": _reading,
    "printing": _printing,
}
_BEFORE_LOGIN = {
    *("resolving", "connecting", "TLS handshake", "authenticating", "attaching"),
    *("prompting", "prompting aloud", "confirming"),
}


def _wait_for_sleep(command: Command) -> None:
    """Until it waits, with all its modules loaded: so that it is in the phase that is meant."""
    deadline = time.monotonic() + SECONDS
    quiet = 0
    before = -1
    while quiet < 10:
        assert time.monotonic() < deadline
        with open(f"/proc/{command.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        spent = int(fields[11]) + int(fields[12])
        quiet = quiet + 1 if fields[0] == "S" and spent == before and spent > 5 else 0
        before = spent
        time.sleep(0.03)


@pytest.mark.parametrize("name", _PHASES)
def test_ctrl_c_ends_the_command_with_one_sentence(phase: Callable[..., Command], name: str) -> None:
    command = phase(name)
    if command.terminal >= 0:
        os.write(command.terminal, b"\x03")
    else:
        command.process.send_signal(signal.SIGINT)
    status, said = command.end()
    assert status == 130, said
    assert said.rstrip().endswith("srpc: given up")
    assert "Traceback" not in said
    assert "Exception" not in said


@pytest.mark.parametrize("name", _PHASES)
def test_the_timeout_is_for_the_command_as_a_whole(phase: Callable[..., Command], name: str) -> None:
    status, said = phase(name, "--timeout", "3").end()
    assert said.rstrip().endswith("(ETIMEDOUT)"), said
    assert status == (3 if name in _BEFORE_LOGIN else 1)
    assert "Traceback" not in said


def test_the_timeout_holds_for_the_pin_too(start: Start, request: pytest.FixtureRequest) -> None:
    listener = _listening(request)
    status, said = start("-a", f"127.0.0.1:{listener.getsockname()[1]}", "--timeout", "0.5", "pin").end()
    assert (status, "did not answer in time (ETIMEDOUT)" in said) == (3, True)


def test_a_command_that_can_not_even_complain_is_ended(start: Start, local: FakeDaemon) -> None:
    """Its standard error is full, and no process reads it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        pass
    os.set_blocking(write, True)
    local.on[frames.CALL] = lambda *_: True
    with subprocess.Popen(
        [*COMMAND, "-a", local.address, "--timeout", "1", "call", "/echo", "x"], stderr=write, cwd=ROOT
    ) as process:
        assert process.wait(SECONDS) == -signal.SIGALRM
    os.close(read)
    os.close(write)


def test_a_server_that_never_answers_a_clunk_does_not_hold_the_end_up(start: Start, local: FakeDaemon) -> None:
    local.on[frames.CLUNK] = lambda *_: True
    command = start("-a", local.address, "call", "/calc/add", "1 2")
    assert command.end() == (0, "")


# --- what the terminal gets --------------------------------------------------------------------------------------------


def test_a_reply_does_not_command_the_terminal(local: FakeDaemon, start: Start) -> None:
    payload = f"{EVIL}one\n\ttwo\u3000three".encode() + b"\xff"
    local.endpoints["evil"] = lambda *_: payload
    command = start("-a", local.address, "call", "/evil", "x", terminal=True)
    assert command.end() == (0, "\\x1b]0;title\\x07\\x9b2J\\u202e\\rone\r\n\ttwo\u3000three\\xff\r\n")
    plain_command = start("-a", local.address, "call", "/evil", "x")
    assert plain_command.end() == (0, "")
    assert plain_command.process.stdout is not None
    assert plain_command.process.stdout.read() == payload


def test_a_reply_goes_to_the_terminal_as_it_is_if_that_is_asked_for(local: FakeDaemon, start: Start) -> None:
    local.endpoints["colour"] = lambda *_: b"\x1b[31mred\x1b[0m"
    command = start("-a", local.address, "call", "--raw", "/colour", "x", terminal=True)
    assert command.end() == (0, "\x1b[31mred\x1b[0m")


def test_nothing_that_a_server_says_commands_the_terminal(local: FakeDaemon, remote: FakeDaemon, start: Start) -> None:
    def refuse(peer: Peer, seq: int, _body: bytes) -> bool:
        return peer.fail(seq, 13, EVIL)

    local.endpoints[f"{EVIL}name"] = lambda *_: b""
    said = [
        start("-a", local.address, *each, terminal=True).end()
        for each in (["ls"], ["ls", "-l"], ["tree"], ["tree", "--json"])
    ]
    local.on[frames.CALL] = refuse
    said.append(start("-a", local.address, "call", "/echo", "x", terminal=True).end())
    answer_stats(local, lambda _: stat_reply([], name=EVIL, user=EVIL, group=EVIL, context=EVIL))
    said += [start("-a", local.address, *each, terminal=True).end() for each in (["stat"], ["stat", "--json"], ["tree"])]
    remote.on[frames.AUTH] = refuse
    said.append(start("-a", remote.address, "--pin", remote.pin, "ls", terminal=True).end())
    for _status, text in said:
        assert "title" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(_colourless(text))


def _colourless(text: str) -> str:
    """Without the colours that `tree` itself makes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_prompt_does_not_command_the_terminal(remote: FakeDaemon, start: Start) -> None:
    remote.conversation = [[Prompt("info", f"{EVIL}info"), Prompt("text", f"{EVIL}code "), Prompt("secret", f"{EVIL}word ")]]
    remote.accounts["alice"] = ["1", "2"]
    command = start("-a", remote.address, "--pin", remote.pin, "call", "/echo", "x", terminal=True)
    command.expect(b"code ")
    os.write(command.terminal, b"1\n")
    command.expect(b"word ")
    os.write(command.terminal, b"2\n")
    status, said = command.end()
    assert status == 0
    assert said.count("\\x1b]0;title") == 3
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said)


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        (b"plain", "plain"),
        ("Grüße\n\tÇa va\u00a0?".encode(), "Grüße\n\tÇa va\u00a0?"),
        (b"a\rb\x00\x7f\x1b", r"a\rb\x00\x7f\x1b"),
        (b"\xff\xc3", r"\xff\xc3"),
        ("\u2028\u200b\ufeff\U000e0001".encode(), r"\u2028\u200b\ufeff\U000e0001"),
    ],
)
def test_a_payload_is_shown_as_lines(payload: bytes, shown: str) -> None:
    assert lines_of(payload) == shown


def test_a_name_is_shown_on_one_line() -> None:
    assert plain("a\nb\u00a0\ud800") == r"a\nb\xa0\ud800"
