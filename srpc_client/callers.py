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

L = TypeVar("L")

_log = logging.getLogger("srpc_client")


class Callers(Generic[L]):
    """The lines of one endpoint, by caller. path: as announced, for the log. close: ends a line, and so calls `gone`."""

    def __init__(self, path: str, close: Callable[[L], None]) -> None:
        self._path = path
        self._close = close
        self._lines: dict[tuple[object, ...], list[L]] = {}

    def came(self, caller: Caller, line: L) -> None:
        """A line has said who calls. Where that is one too many, the caller's oldest is closed."""
        lines = self._lines.setdefault(_key(caller), [])
        lines.append(line)
        if len(lines) > LINES_PER_CALLER:
            _log.warning("%s: %s has too many lines, the oldest is closed", self._path, caller.user)
            self._close(lines[0])

    def gone(self, caller: Caller | None, line: L) -> None:
        """A line has ended. caller: None if it never said."""
        if caller is not None and (lines := self._lines.get(_key(caller))) is not None:
            lines.remove(line)
            if not lines:
                del self._lines[_key(caller)]


def _key(caller: Caller) -> tuple[object, ...]:
    # A user's processes may have fewer groups than its account. Those can't have the lines of the others closed.
    return caller.uid, caller.user, caller.context, caller.gid, tuple(caller.groups or ())
