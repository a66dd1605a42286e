"""Which connections may stay when there is no room for all: decisions, without I/O.

There are two pools, so that nobody without an account can push an authenticated connection out.

**Unauthenticated connections.** A new connection always gets in. When its address has as many as one address may have, an
older one of that address is closed. When the pool is full, an older one of the origin that has most is closed: of the prefix
with most, and in that prefix of the address with most (`origins`). So a flood closes its own connections, and an origin that
has none is never refused. (OpenSSH's `MaxStartups` refuses *new* connections at random when there are many, so it refuses
everybody's; its `PerSourceMaxStartups` refuses those of one source, behind which there may be several clients.)

Two rules choose among the connections of the largest origin, where an honest client may stand beside an attacker (one
NAT; or a flood of so many networks that each has one connection):

- Connections with an authentication under way and those without are two groups, and one of the larger group is closed. So a
  person who types a password is safe from silent connections, and a client in its handshake from those that began to
  authenticate and stopped. A flood that does both leaves each group half the room.
- In the group a random one of the older half is closed. A client that needs a moment has the time in which half of the group
  is replaced. One that needs longer still has a chance, where "the oldest" would leave none.

**Authenticated connections**, and those that serve, count by user. When there are as many as may be (in all, or at one
address), and one user has at least two more than the user who comes, the newest of that user is closed: the older ones have
work in flight. Else the new one is refused, with a reason. So one user can't take the room of others, and users with about
as much as each other do not take turns in closing each other's.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from srpcd.config import Limits
from srpcd.monitor.origins import Origin


class Candidate(Protocol):
    """A connection, as far as the decisions look at it."""

    @property
    def origin(self) -> Origin:
        """Where it comes from."""

    @property
    def authenticating(self) -> object | None:
        """Not None while an authentication is under way."""


C = TypeVar("C", bound=Candidate)


class Admission(Generic[C]):
    """The connections of one front."""

    def __init__(self, limits: Limits, close: Callable[[C, str], None], choose: Callable[[Sequence[C]], C]) -> None:
        """Start without connections.

        Args:
            limits: `connections` and `strangers`, each with its bound for one address. May be replaced at any time. A
                lower bound closes nothing by itself: it counts for what comes.
            close: called with a connection that has to make room, and the name of the limit. It has been removed already.
            choose: picks one at random, in a way that no peer can foresee.
        """
        self.limits = limits
        self._close = close
        self._choose = choose
        self._unauthenticated: dict[C, None] = {}  # the oldest first
        self._addresses: Counter[str] = Counter()  # how many of these an address has
        self._authenticated: dict[C, str] = {}  # by which user; the oldest first

    def arrive(self, connection: C) -> None:
        """Let a new connection in, and close another one where there is no room."""
        limits, waiting, address = self.limits, self._unauthenticated, connection.origin.address
        if self._addresses[address] >= limits.strangers_per_address:
            neighbours = [each for each in waiting if each.origin.address == address]
            self._make_room(neighbours, connection, "strangers_per_address")
        elif len(waiting) >= limits.strangers:
            self._make_room(list(waiting), connection, "strangers")
        waiting[connection] = None
        self._addresses[address] += 1

    def authenticated(self, connection: C, user: str) -> bool:
        """Count a connection as a user's from now on. Returns False where there is no room: it stays what it was."""
        if connection in self._authenticated:
            return True
        if connection not in self._unauthenticated:  # closed meanwhile
            return False
        limits, address = self.limits, connection.origin.address
        neighbours = {each: whose for each, whose in self._authenticated.items() if each.origin.address == address}
        for name, found, limit in (
            ("connections_per_address", neighbours, limits.connections_per_address),
            ("connections", self._authenticated, limits.connections),
        ):
            if len(found) >= limit:
                count = Counter(found.values())
                largest, most = count.most_common(1)[0]
                if most < count[user] + 2:
                    return False
                self._remove([each for each, whose in found.items() if whose == largest][-1], name)
                break  # this made room for the other bound too
        self.leave(connection)
        self._authenticated[connection] = user
        return True

    def leave(self, connection: C) -> None:
        """Forget a connection that is over, also one that has been closed by this."""
        self._authenticated.pop(connection, None)
        if connection in self._unauthenticated:
            del self._unauthenticated[connection]
            address = connection.origin.address
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def _make_room(self, candidates: list[C], newcomer: C, limit: str) -> None:
        """Close an unauthenticated connection. The newcomer counts for its origin, but is not closed itself."""
        candidates = _largest(candidates, [each.origin.prefix for each in candidates], newcomer.origin.prefix)
        candidates = _largest(candidates, [each.origin.address for each in candidates], newcomer.origin.address)
        busy = [each.authenticating is not None for each in candidates]
        candidates = _largest(candidates, busy, newcomer.authenticating is not None)
        self._remove(self._choose(candidates[: (len(candidates) + 1) // 2]), limit)

    def _remove(self, connection: C, limit: str) -> None:
        self.leave(connection)
        self._close(connection, limit)


def _largest(candidates: list[C], groups: Sequence[Hashable], more: Hashable) -> list[C]:
    """The candidates of the group, or groups, with most. groups: whose each of them is. more: one more of that group."""
    count: Counter[Hashable] = Counter(groups)
    count[more] += 1
    most = max(count.values())  # of a group with candidates: one that has none counts 1
    if most == 1:
        return candidates
    return [each for each, group in zip(candidates, groups, strict=True) if count[group] == most]
