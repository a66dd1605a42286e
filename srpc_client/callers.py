"""Which lines are whose: how many of them one caller may keep open at a service."""

from typing import Generic, TypeVar

from srpc_client.handling import Caller

LINES_PER_CALLER = 8
"""Lines of one caller to one endpoint. His worker has one; another one may be about to end, or serve older sessions while
the daemon has read another configuration. More are open only where a worker that was taken over keeps those open that it
says are gone: then they would use up this process's descriptors, and nobody else could call."""

L = TypeVar("L")


class Callers(Generic[L]):
    """The lines of one endpoint, by caller."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str, str | None], list[L]] = {}

    def came(self, caller: Caller, line: L) -> L | None:
        """A line has said who calls. Returns the caller's oldest one where that is too many: to be closed."""
        lines = self._lines.setdefault(_key(caller), [])
        lines.append(line)
        return lines[0] if len(lines) > LINES_PER_CALLER else None

    def gone(self, caller: Caller | None, line: L) -> None:
        """A line has ended. caller: None if it never said."""
        if caller is not None and (lines := self._lines.get(_key(caller))) is not None:
            lines.remove(line)
            if not lines:
                del self._lines[_key(caller)]


def _key(caller: Caller) -> tuple[int, str, str | None]:
    return caller.uid, caller.user, caller.context
