"""Which request is allowed when, in one table.

A connection is a *stranger* until somebody has authenticated on it, *known* from then on, and *draining* when the daemon
shuts down; it came in on the network's listener or on the local one. A row says for each of these with which errno the
request is refused (0: it is not), how long its body may be, how the body is decoded, and what share of the connection's
outstanding requests it may use. The rest of the session reads its limits and decoders from here and from nowhere else.
"""

from enum import IntEnum
from errno import EACCES, EBADF, EOPNOTSUPP, ESHUTDOWN
from typing import NamedTuple

from srpcd.wire import messages
from srpcd.wire.frames import (
    ANNOUNCE,
    APPEND,
    ATTACH,
    AUTH,
    CALL,
    CLUNK,
    FLUSH,
    LISTEN,
    PING,
    REQUESTS,
    STAT,
    STRANGER_REQUESTS,
    WALK,
)


class State(IntEnum):
    """How far a connection is."""

    STRANGER = 0
    KNOWN = 1
    DRAINING = 2


class Rule(NamedTuple):
    """One request.

    body: type of its JSON body; None: it has a body of its own.
    stranger, known, draining: errno with which it is refused in that state; 0: allowed.
    network: errno with which it is refused on the network's listener; 0: allowed.
    share: how many times the limit of outstanding requests may be reached before one more is refused (EAGAIN); 0: it is
        answered at once and never waits, so it needs no place. A flush has two, so that whoever is at the limit can
        still cancel.
    cancellable: whether a flush of it does anything.
    """

    body: type[messages.Message] | None
    stranger: int
    known: int
    draining: int
    network: int
    share: int
    cancellable: bool


# fmt: off
RULES: dict[int, Rule] = {
    #              body                stranger  known  draining   network      share  cancellable
    AUTH: Rule(messages.Auth, 0, 0, ESHUTDOWN, 0, 1, False),
    ATTACH: Rule(messages.Attach, EACCES, 0, ESHUTDOWN, 0, 1, False),
    WALK: Rule(messages.Walk, EBADF, 0, ESHUTDOWN, 0, 1, True),
    STAT: Rule(messages.Stat, EBADF, 0, ESHUTDOWN, 0, 1, True),
    APPEND: Rule(messages.Append, 0, 0, ESHUTDOWN, 0, 1, True),
    CLUNK: Rule(messages.Clunk, 0, 0, 0, 0, 0, False),
    CALL: Rule(None, EBADF, 0, ESHUTDOWN, 0, 1, True),
    FLUSH: Rule(None, 0, 0, 0, 0, 2, False),
    PING: Rule(None, 0, 0, 0, 0, 0, False),
    ANNOUNCE: Rule(messages.Announce, 0, 0, ESHUTDOWN, EOPNOTSUPP, 1, False),
    LISTEN: Rule(messages.Listen, 0, 0, ESHUTDOWN, EOPNOTSUPP, 1, False),
}
# fmt: on
"""What a server is asked. A type that is not here ends the connection."""

LIMITS: dict[State, dict[int, int]] = {
    State.STRANGER: {kind: STRANGER_REQUESTS[kind] for kind in RULES},
    State.KNOWN: {kind: REQUESTS[kind] for kind in RULES},
}
"""Largest body by state and type. A draining connection keeps the limits that it had."""


def refusals(state: State, local: bool) -> dict[int, int]:
    """The errno with which each type of request is refused in `state`, 0 where it is allowed.

    local: whether the connection came in on the local listener.
    """
    column = state.name.lower()
    return {kind: (0 if local else rule.network) or getattr(rule, column) for kind, rule in RULES.items()}
