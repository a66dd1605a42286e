"""How much of the log peers may cause: decisions, without I/O and without a clock.

Two bounds:

- **By origin and kind.** Of the lines of one kind on behalf of one origin (an address, a uid, a user), the first
  `lines_per_minute` in a minute are written. The rest is counted, and the count is written when the minute is over. The
  minute begins with the first line. Kinds have separate counts, so that a flood of one kind hides no other: a brute-force
  attack stays in the log for tools like fail2ban, whatever else comes from there.
- **In all.** Origins can be many, so what they cause together may not be more than `bytes_per_second`, with a burst of
  `BURST_SECONDS`. What the daemon says of itself (start, stop, ready, gate-restart …) is charged too, and never left out.
"""

from typing import NamedTuple

WINDOW_SECONDS = 60.0
"""How long one count lasts. A flood's end is in the log at most so much later."""

WINDOWS_MAX = 4096
"""Counts (of an origin and kind) that are remembered, about 1 MiB. At one more the oldest ends early. An attacker with more
origins than that gets more lines than `lines_per_minute` for each, but not more than `bytes_per_second` for all."""

BURST_SECONDS = 10.0
"""Seconds of `bytes_per_second` that may be written at once: many users at the start of a working day. Together with the
default rate this stays below the 10,000 lines in 30 seconds after which journald drops lines of a service itself, important
ones too (RateLimitBurst in journald.conf(5))."""

OVERHEAD_BYTES = 128
"""Added to the size of each line. A journal stores a time, a host and a unit beside it, so short lines cost too."""


class Suppressed(NamedTuple):
    """Lines that were left out. origin, kind: whose, of what."""

    origin: str
    kind: str
    lines: int


class _Window:
    """The count of one origin and kind. begun: seconds of the caller's clock."""

    __slots__ = ("begun", "suppressed", "written")

    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.written = 0
        self.suppressed = 0


class LogRate:
    """Counts lines. `now` is the time by the caller's monotonic clock, in seconds."""

    def __init__(self, lines_per_minute: int, bytes_per_second: int) -> None:
        self.configure(lines_per_minute, bytes_per_second)
        self._windows: dict[tuple[str, str], _Window] = {}  # the one that began first is first
        self._over: list[Suppressed] = []
        self._saved = BURST_SECONDS * bytes_per_second  # bytes that may be written now
        self._at = 0.0  # when that was reckoned
        self._unpaid = 0
        self._unpaid_since = 0.0

    def configure(self, lines_per_minute: int, bytes_per_second: int) -> None:
        """Go by these bounds from now on."""
        self._lines, self._bytes = lines_per_minute, bytes_per_second

    def admits(self, origin: str, kind: str, now: float, unreported: int = 0) -> bool:
        """Whether one more line of this kind is within the origin's bound; if not, count it.

        unreported: lines of the same kind that were left out before they came here. They are counted with it.
        """
        self._expire(now)
        window = self._windows.get((origin, kind))
        if window is None:
            if len(self._windows) >= WINDOWS_MAX:
                self._end(next(iter(self._windows)))
            window = self._windows[origin, kind] = _Window(now)
        window.suppressed += unreported
        if window.written >= self._lines:
            window.suppressed += 1
            return False
        window.written += 1
        return True

    def pays(self, size: int, now: float, lines: int = 1) -> bool:
        """Charge a line of `size` bytes to the bound of all. Returns False, and counts `lines`, where it is over that."""
        self._refill(now)
        if self._saved >= size + OVERHEAD_BYTES:
            self._saved -= size + OVERHEAD_BYTES
            return True
        if not self._unpaid:
            self._unpaid_since = now
        self._unpaid += lines
        return False

    def charge(self, size: int, now: float) -> None:
        """Charge a line that is written in any case."""
        self._refill(now)
        self._saved = max(0.0, self._saved - size - OVERHEAD_BYTES)

    def suppressed(self, now: float, last: bool = False) -> list[Suppressed]:
        """What was left out in the minutes that are over; each is returned once. last: in all minutes."""
        self._expire(float("inf") if last else now)
        over, self._over = self._over, []
        return over

    def unpaid(self, now: float, last: bool = False) -> int:
        """How many lines `pays` has refused, at most once in a minute; each is counted once. last: at once."""
        if not last and now - self._unpaid_since < WINDOW_SECONDS:
            return 0
        unpaid, self._unpaid = self._unpaid, 0
        return unpaid

    def _refill(self, now: float) -> None:
        self._saved = min(BURST_SECONDS * self._bytes, self._saved + (now - self._at) * self._bytes)
        self._at = now

    def _expire(self, now: float) -> None:
        while self._windows and now - next(iter(self._windows.values())).begun >= WINDOW_SECONDS:
            self._end(next(iter(self._windows)))

    def _end(self, key: tuple[str, str]) -> None:
        window = self._windows.pop(key)
        if window.suppressed:
            self._over.append(Suppressed(*key, window.suppressed))
