"""Who gets the next of a bounded number of places, so that no origin keeps the others out.

A place stands for what costs root something: a process, the processor. A *claim* holds a place or waits for one. It counts
for *groups*, the names of its origin (`origins.Origin.groups`): an address and its prefix, or a uid. *Suspects*, origins
with recent failures, are one more group together.

1. A claim gets a place while more places are free than each of its groups holds. So one group holds half of the places at
   most, and n groups hold n/(n + 1) of them: there is a free place for an origin that has none, until there are nearly as
   many origins as places. (Dynamic thresholds, which switches use to share a buffer: Choudhury and Hahne, 1998.)
2. Of the claims that wait, that of the best origin is next: without failures before suspects; then the prefix that holds
   least, and in it the address that holds least; then the one that was served longest ago. Claims of one origin are served
   in their order.
3. A claim that holds a place and does not use it, because it waits for a client or for another place, can be *evicted*: its
   place is handed to one that waits. That happens at once where the origin that loses holds more than the one that gains has
   afterwards (or is more suspect). Where they are equal it happens after a time of silence, and only so often, because each
   time costs a new process. The longest silent claim of the
   largest origin goes. A group that holds its share already gets the place of one of its own claims only.

This module does no I/O. It knows the time only as a number that it is told.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf

Groups = tuple[str, ...]

SUSPECTS = "suspects"
_REMEMBERED = 4096
"""Groups of which it is known when they were served."""

Rank = tuple[int, int, int]
"""How suspect an origin is, how much its widest group holds, how much its narrowest group holds."""


class Claim:
    """A place, or the wait for one.

    groups: the narrowest first. granted: called when it gets a place. evicted: called when it has lost it to another claim.
    """

    def __init__(self, groups: Groups, granted: Callable[[], None], evicted: Callable[[], None] = lambda: None) -> None:
        self.groups = groups
        self.granted = granted
        self.evicted = evicted
        self.counted: Groups = ()
        """Groups that its place counts for; empty: it holds none."""
        self.silent: float | None = None
        """Seconds on the caller's clock since when it waits for a client. Infinite: it waits for something else. None: it
        uses its place, and can't be evicted."""


class FairLimiter:
    """A number of places."""

    def __init__(self, total: int, each: int, suspicion: Callable[[Groups], int] = lambda _groups: 0) -> None:
        """Begin with all places free.

        Args:
            total: number of places.
            each: number of places that the narrowest group may hold at most.
            suspicion: how suspect an origin is; 0: it is not.
        """
        self._total = self._free = total
        self._each = each
        self._suspicion = suspicion
        self._held: Counter[str] = Counter()
        self._holders: dict[Claim, None] = {}
        self._waiting: dict[Groups, deque[Claim]] = {}
        self._served: OrderedDict[str, int] = OrderedDict()
        self._grants = 0

    @asynccontextmanager
    async def turn(self, groups: Groups) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        granted = asyncio.Event()
        claim = Claim(groups, granted.set)
        self.add(claim)
        try:
            await granted.wait()
            yield
        finally:
            self.remove(claim)

    def add(self, claim: Claim) -> None:
        """Let a claim wait for a place, which it may get at once."""
        self._waiting.setdefault(claim.groups, deque()).append(claim)
        self._grant()

    def remove(self, claim: Claim) -> None:
        """Take back a claim, whether it holds a place, waits for one, or neither."""
        if claim in self._holders:
            self._leave(claim)
            self._grant()
        elif claim in self._waiting.get(claim.groups, ()):
            self._withdraw(claim)

    def evict_for(self, groups: Groups) -> None:
        """Hand places of claims that do not use them to an origin that waits, and that holds less or is less suspect."""
        while groups in self._waiting and self._evict(groups, -inf):
            pass

    def evict_silent(self, silent_before: float, most: int) -> None:
        """Hand places of claims that do not use them to those that wait, also from origins that are equal.

        Args:
            silent_before: only claims that are silent since then, or for longer, go for equal ones.
            most: number of places to hand over.
        """
        for groups in sorted(self._waiting, key=self._order)[: 4 * most]:  # what this costs is bounded too
            if most and self._evict(groups, silent_before):
                most -= 1

    def _evict(self, groups: Groups, silent_before: float) -> bool:
        victim = self._victim(groups, silent_before)
        if victim is not None:
            self._leave(victim)
            self._enter(self._waiting[groups][0])
            victim.evicted()
        return victim is not None

    def _grant(self) -> None:
        while self._free:
            allowed = [groups for groups in self._waiting if not self._blocking(groups)]
            if not allowed:
                return
            self._enter(self._waiting[min(allowed, key=self._order)][0])

    def _enter(self, claim: Claim) -> None:
        self._withdraw(claim)
        claim.counted = self._counted(claim.groups)
        self._holders[claim] = None
        self._held.update(claim.counted)
        self._free -= 1
        self._grants += 1
        for group in claim.groups:
            self._served[group] = self._grants
            self._served.move_to_end(group)
        while len(self._served) > _REMEMBERED:
            self._served.popitem(last=False)
        claim.granted()

    def _leave(self, claim: Claim) -> None:
        del self._holders[claim]
        self._held -= Counter(claim.counted)  # which forgets the groups that hold none
        self._free += 1
        claim.counted = ()

    def _withdraw(self, claim: Claim) -> None:
        queue = self._waiting[claim.groups]
        queue.remove(claim)
        if not queue:
            del self._waiting[claim.groups]

    def _counted(self, groups: Groups) -> Groups:
        return (*groups, SUSPECTS) if self._suspicion(groups) else groups

    def _blocking(self, groups: Groups) -> set[str]:
        """The groups that hold so much that this origin gets no further place, free or of a claim of another group."""
        most = self._free or self._total // 2
        blocking = {group for group in self._counted(groups) if self._held[group] >= most}
        return blocking | ({groups[0]} if self._held[groups[0]] >= self._each else set())

    def _order(self, groups: Groups) -> tuple[Rank, int, int]:
        """The smallest is served next."""
        return self._rank(groups), self._served.get(groups[-1], 0), self._served.get(groups[0], 0)

    def _rank(self, groups: Groups, leaving: Groups | None = None) -> Rank:
        """The rank of an origin; with `leaving`, as it is after it got the place of a claim that counts for these groups."""
        held = [self._held[group] + (leaving is not None and group not in leaving) for group in (groups[-1], groups[0])]
        return self._suspicion(groups), held[0], held[1]

    def _victim(self, groups: Groups, silent_before: float) -> Claim | None:
        """The claim whose place an origin that waits gets; None if there is none that it may have."""
        blocking = self._blocking(groups)
        found: tuple[Rank, float] | None = None
        victim = None
        for claim in self._holders:
            if claim.silent is None or not blocking.issubset(claim.counted):
                continue
            mine, gained = self._rank(claim.groups), self._rank(groups, claim.counted)
            if mine > gained or (mine == gained and claim.silent <= silent_before):
                place = mine, -claim.silent
                if found is None or place > found:
                    found, victim = place, claim
        return victim
