"""Which lines are whose: how many of them one caller may keep open at a service."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from srpc_client.handling import Caller

LINES_PER_CALLER = 8
"""Lines of one caller to one endpoint. Its worker has one; another worker may be about to end, or serve older sessions while
the daemon has read another configuration. More are open only where a worker that was taken over keeps those open that it
says are gone: then they would use up this process's descriptors, and no other caller could call. A caller is a user with
one set of groups."""

SILENT_LINES_MAX = 256
"""Lines to one endpoint that have not said yet who calls. The daemon has written that before it tells of the line, so there
are some only for a moment, unless numbers of lines are told without end: they too would use up the descriptors."""

L = TypeVar("L")

_log = logging.getLogger("srpc_client")


class Callers(Generic[L]):
    """The lines of one endpoint, by caller. path: as announced, for the log. close: ends a line, and so calls `gone`."""

    def __init__(self, path: str, close: Callable[[L], None]) -> None:
        self._path = path
        self._close = close
        self._lines: dict[tuple[object, ...], list[L]] = {}
        self._silent: dict[L, None] = {}  # oldest first

    def opened(self, line: L) -> None:
        """A line is open. Where too many are that have not said who calls, the oldest of those is closed."""
        self._silent[line] = None
        if len(self._silent) > SILENT_LINES_MAX:
            _log.warning("%s: too many lines do not say who calls, the oldest is closed", self._path)
            self._close(next(iter(self._silent)))

    def came(self, caller: Caller, line: L) -> None:
        """A line has said who calls. Where that is one too many, the caller's oldest is closed."""
        self._silent.pop(line, None)
        lines = self._lines.setdefault(_key(caller), [])
        lines.append(line)
        if len(lines) > LINES_PER_CALLER:
            _log.warning("%s: %s has too many lines, the oldest is closed", self._path, caller.user)
            self._close(lines[0])

    def gone(self, caller: Caller | None, line: L) -> None:
        """A line has ended. caller: None if it never said."""
        self._silent.pop(line, None)
        if caller is not None and (lines := self._lines.get(_key(caller))) is not None:
            lines.remove(line)
            if not lines:
                del self._lines[_key(caller)]


def _key(caller: Caller) -> tuple[object, ...]:
    # A user's processes may have fewer groups than its account. Those can't have the lines of the others closed.
    return caller.uid, caller.user, caller.context, caller.gid, tuple(caller.groups or ())
