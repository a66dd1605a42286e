"""What an administrator reads: one line per event, on standard error.

    text    connection conn=12 gate=tls peer=192.0.2.7
    json    {"time":"2025-01-31T12:00:00.123Z","level":"info","event":"connection","conn":12,"gate":"tls","peer":"192.0.2.7"}

The text form carries no time (the journal does) and names its level only where that is not `info`. Never a payload,
never a secret: this module knows neither, and nobody hands it any. The text form says errno by name, JSON by number.

| event          | when                                            | fields                                             |
| -------------- | ----------------------------------------------- | -------------------------------------------------- |
| start          | the daemon begins                               | version, mode, pid, tree                           |
| listen         | a socket listens                                | gate, address                                      |
| ready          | every gate serves                               | tcp (comma-separated), local, pin                  |
| stop           | the daemon ends, or could not start             | reason                                             |
| connection     | one was accepted, or is over (debug)            | state, conn, gate, peer                            |
| authentication | one has ended (errno and reason: why refused)   | outcome, conn, peer, user, mechanism, aname, errno |
| attach         | a session begins, or was not granted            | outcome, conn, peer, user, aname, errno, reason    |
| revoked        | an afid or session ended: its account changed   | what, conn, peer, user, reason                     |
| announce       | an endpoint is served from now on, or is not    | outcome, conn, uid, endpoint, errno, reason        |
| withdraw       | an announcement has ended                       | conn, peer, endpoint                               |
| refused        | the kernel or a rule refused walk, stat or call | operation, conn, peer, user, endpoint, errno       |
| refused        | the SELinux policy did, asked by the monitor    | operation, uid, endpoint, errno, reason            |
| process-start  | a gate, worker or other child runs              | role, name, pid                                    |
| sandbox        | a gate is in it; warning: without Landlock (0)  | name, pid, landlock (its version)                  |
| process-end    | it has ended                                    | role, name, pid, status                            |
| process-kill   | it was killed for what it did                   | role, name, pid, reason                            |
| process-stuck  | it was killed and does not end: it is given up  | role, name, pid, text                              |
| limit          | a bound was met                                 | which, outcome, peer, user, endpoint               |
| gate-restart   | a gate died and is started again                | gate, status, wait                                 |
| reload         | the configuration was read again, or refused    | outcome, reason, restart (keys that need one)      |
| cgroups        | users have no control groups                    | state, reason                                      |
| child-output   | a line of a child's standard error              | role, name, pid, text                              |
| warning        | something that an administrator should look at  | text, and what it is about                         |
| suppressed     | lines of one kind were left out (see below)     | origin, which, lines                               |
| log-dropped    | lines were lost: nobody read standard error     | lines                                              |

What peers cause is bounded (`srpcd.lograte`). Of the lines of one kind on behalf of one origin the first
`log.lines_per_minute` in a minute are written, and of all of them together `log.bytes_per_second`. `suppressed` says how
many were left out: once in a minute for each origin and kind (`which` is the event, with " refused" after it where the
outcome is that), and once in a minute for all origins together, without `origin` and `which`. These are never left out:
start, listen, ready, stop, sandbox, cgroups, reload, gate-restart, process-start and process-end of gates, process-kill,
process-stuck.

Fields say what a peer said, so a value can't leave its place: whatever is not a plain word is quoted as in JSON, with
everything escaped that is not printable (Unicode's sense: line ends, terminal controls, direction overrides, unpaired
surrogates), and cut at `VALUE_MAX`. Writing never waits and never raises: the daemon outlives whoever reads its log.
"""

import errno as _errno
import os
import select
import stat
import time
from collections.abc import Mapping
from socket import MSG_DONTWAIT, socket

from srpcd.lograte import LogRate

LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}

_SYSLOG = {"debug": 7, "info": 6, "warning": 4, "error": 3}

VALUE_MAX = 400
"""Characters of one value, before escapes. More is what a peer sends to fill a disk."""

LINE_MAX = 4096
"""Bytes of one line: PIPE_BUF, so that the kernel writes it whole or not at all."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@%+,=[]*~")

Value = str | int | None


class Log:
    """Writes events.

    stream: descriptor of standard error or the like. format: "text" or "json". level: the lowest of LEVELS to write.
    journal: the stream is the journal's: each line begins with the level as syslog numbers them (sd-daemon(3)).
    rate: the bounds of what peers cause; None: practically none.
    """

    def __init__(
        self, stream: int, format: str = "text", level: str = "info", journal: bool = False, rate: LogRate | None = None
    ) -> None:
        self.dropped = 0
        """Lines lost since the last that could be written."""
        self.rate = rate or LogRate(1_000_000, 1 << 30)
        self.configure(format, level)
        self._journal = journal
        self._torn = False  # half a line went out: the next begins on a line of its own
        self._stream = stream
        self._socket, self._fd = _unblocked(stream)

    def configure(self, format: str, level: str) -> None:
        """Write in this form, from this level on."""
        self._json = format == "json"
        self._lowest = LEVELS[level]

    def event(self, level: str, event: str, /, **fields: Value) -> None:
        """Write one event, whatever was written before. Not for what a peer can cause again and again.

        level: of LEVELS. event, fields: as in the table above; a field that is None is left out.
        """
        if LEVELS[level] >= self._lowest:
            data = self._line(level, event, fields)
            self.rate.charge(len(data), time.monotonic())
            self._put(data)

    def peer_event(self, origin: str, level: str, event: str, unreported: int = 0, /, **fields: Value) -> None:
        """Write one event that a peer can cause as often as it likes, or count it where there were too many.

        Args:
            origin: whom it counts for: an address or network, a uid, "user:NAME", "gate:NAME".
            level, event, fields: as for `event`.
            unreported: number of events of the same kind and origin that the caller has no line for.
        """
        if LEVELS[level] < self._lowest:
            return
        now = time.monotonic()
        kind = f"{event} refused" if fields.get("outcome") == "refused" else event
        admitted = self.rate.admits(origin, kind, now, unreported)
        self.report_suppressed()
        if admitted:
            data = self._line(level, event, fields)
            if self.rate.pays(len(data), now):
                self._put(data)

    def report_suppressed(self, last: bool = False) -> None:
        """Write what was left out in minutes that are over. To be called about once a second. last: in all minutes."""
        now = time.monotonic()
        for origin, which, lines in self.rate.suppressed(now, last):
            data = self._line("warning", "suppressed", {"origin": origin, "which": which, "lines": lines})
            if self.rate.pays(len(data), now, lines):
                self._put(data)
        if lines := self.rate.unpaid(now, last):
            self.event("warning", "suppressed", lines=lines)

    def _put(self, data: bytes) -> None:
        if self.dropped:
            data = self._line("warning", "log-dropped", {"lines": self.dropped}) + data
        if self._torn:
            data = b"\n" + data
        # Two lines may be over PIPE_BUF together, but then they are torn at worst, and that is seen to.
        written = self._write(data)
        if written == len(data):
            self.dropped, self._torn = 0, False
        else:
            self.dropped += 1
            self._torn = self._torn or written > 0

    def close(self) -> None:
        """Give up the descriptor that was opened for it; the stream that was handed over stays open."""
        if self._socket:
            self._socket.close()
        elif self._fd != self._stream:
            os.close(self._fd)

    def _line(self, level: str, event: str, fields: Mapping[str, Value]) -> bytes:
        longest = VALUE_MAX
        while True:
            text = (self._as_json if self._json else self._as_text)(level, event, fields, longest)
            line = (f"<{_SYSLOG[level]}>{text}\n" if self._journal else f"{text}\n").encode()
            if len(line) <= LINE_MAX or not longest:
                return line
            longest //= 2

    def _as_text(self, level: str, event: str, fields: Mapping[str, Value], longest: int) -> str:
        parts = [event] if level == "info" else [event, f"level={level}"]
        for name, value in fields.items():
            if isinstance(value, str):
                plain = value and _PLAIN.issuperset(value)
                parts.append(f"{name}={_cut(value, longest) if plain else _quote(value, longest)}")
            elif value is not None:
                parts.append(f"{name}={_errno.errorcode.get(value, value) if name == 'errno' else int(value)}")
        return " ".join(parts)

    def _as_json(self, level: str, event: str, fields: Mapping[str, Value], longest: int) -> str:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
        parts = [f'"time":"{stamp}"', f'"level":"{level}"', f'"event":"{event}"']
        for name, value in fields.items():
            if isinstance(value, str):
                parts.append(f'"{name}":{_quote(value, longest)}')
            elif value is not None:
                parts.append(f'"{name}":{int(value)}')
        return "{" + ",".join(parts) + "}"

    def _write(self, data: bytes) -> int:
        """Bytes that went out; 0 where nobody takes them at the moment, or ever will."""
        try:
            if self._socket:
                return self._socket.send(data, MSG_DONTWAIT)
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            return os.write(self._fd, data) if poll.poll(0) else 0
        except OSError:
            return 0


def is_journal(stream: int, environment: Mapping[str, str]) -> bool:
    """Whether the stream is what systemd connected to its journal: $JOURNAL_STREAM names it (systemd.exec(5))."""
    facts = os.fstat(stream)
    return environment.get("JOURNAL_STREAM") == f"{facts.st_dev}:{facts.st_ino}"


def _unblocked(stream: int) -> tuple[socket | None, int]:
    """The stream as one that does not block the writer, without making it so for others who have it (a terminal).

    A socket is told at each send. A pipe or terminal is opened once more, not blocking. A file never blocks. Where
    opening is not allowed, poll(2) before the write must do: it says whether a pipe takes PIPE_BUF bytes.
    """
    try:
        mode = os.fstat(stream).st_mode
        if stat.S_ISSOCK(mode):
            return socket(fileno=os.dup(stream)), -1
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return None, os.open(f"/proc/self/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    return None, stream


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"


def _quote(text: str, longest: int) -> str:
    """A JSON string, in which every character is printable."""
    parts = []
    for each in _cut(text, longest):
        if each in '"\\':
            parts.append("\\" + each)
        elif each.isprintable():
            parts.append(each)
        elif (number := ord(each)) < 0x10000:
            parts.append(f"\\u{number:04x}")
        else:
            parts.append(f"\\u{0xD800 + (number - 0x10000 >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}")
    return '"' + "".join(parts) + '"'
