"""Memory of one gate: who holds how much, who may take more, and who waits. Without I/O.

Each connection and each link has a `Holding`, which counts bytes in two ways:

- `reserve` asks for the memory of a large message *before* it is collected, and for all of it. So a message that has begun
  to be collected can always be finished without more memory, and no two can wait for each other. A holding that gets none
  is called again when memory was given back; until then its stream is not read.
- `hold` records what is held already: replies that a client does not take, requests that a worker does not take, buffers of
  TLS. It is never refused. What produces these bytes looks at `over` and stops.

An origin (`Share`) may take more as long as it holds no more than is still free for all: one alone gets half of the budget.
So n origins come to an (n+1)th part each, with one left for the next, and nobody sets a limit for each. (A. K. Choudhury, E.
L. Hahne: Dynamic Queue Length Thresholds for Shared-Memory Packet Switches, IEEE/ACM Transactions on Networking 6(2), 1998.)
An origin that came early still holds more than its part when others come. While one that has less than its part waits
(`contended`), the transfers of those that have more (`greedy`) have to hurry, or they are ended.

Messages and replies below LARGE bytes ask for nothing and wait for nothing here. Nor is the beginning of a large message
counted that waits for its memory: it is less than the last read, and counted it could keep all of them waiting for ever.
"""

from collections.abc import Callable

from srpcd.wire.limits import MIB

LOCAL_PEER = "uid:"
"""What the monitor calls a peer on the local socket begins with this."""

TURN = 0.002
"""Seconds in one pass of the gate's loop in which the connections of one origin are read from. What takes longer is read in
the next pass: else whoever sends small requests on many connections has all of these seen to before another one's."""

NEGLIGIBLE = MIB
"""Bytes that an origin may hold (fids, small replies) without being counted as one that has a part of the budget."""


class Share:
    """What one origin holds, in bytes, and its turn in each pass of the loop.

    An origin is the uid of a worker, whatever addresses its connections come from, and all that are not attached to a worker
    are one origin. A single worker is none: its user can end it, and have the next one. On the local socket the origin is
    the uid that connects.
    """

    __slots__ = ("__weakref__", "_pass", "_spent", "held")

    def __init__(self) -> None:
        self.held = 0
        self._pass = self._spent = 0.0

    def has_turn(self, now: float) -> bool:
        """Whether there is time left for it in the pass that began at `now`."""
        if self._pass != now:
            self._pass = now
            self._spent = 0.0
        return self._spent < TURN

    def spend(self, seconds: float) -> None:
        """So much time was used for it in this pass."""
        self._spent += seconds


class Budget:
    """The memory that a gate may use for large messages and for what waits.

    size: bytes. held: bytes that are reserved or held. peak: the most that `held` has been; its owner may lower it.
    wake: is called when `offer` is worth calling, and not again before that. contended: what `look` found last.
    """

    __slots__ = ("_origins", "_waiting", "_wake", "_woken", "contended", "held", "peak", "size")

    def __init__(self, size: int, wake: Callable[[], None]) -> None:
        self.size = size
        self.held = 0
        self.peak = 0
        self.contended = False
        self._origins = 0  # shares that hold more than is negligible
        self._wake = wake
        self._woken = False
        self._waiting: dict[Holding, Callable[[], object]] = {}

    @property
    def free(self) -> int:
        """Bytes that nobody holds; negative where more is held than the budget has."""
        return self.size - self.held

    @property
    def part(self) -> int:
        """Bytes that each origin should have, so that as much is left for another one."""
        return self.size // (self._origins + 1)

    def look(self) -> None:
        """Look whether an origin that has less than its part waits for more."""
        self.contended = any(holding.share.held < self.part for holding in self._waiting)

    def offer(self) -> None:
        """Let those who wait ask again, in the order in which they came."""
        self._woken = False
        waiting, self._waiting = self._waiting, {}
        for ask in waiting.values():
            ask()

    def _change(self, share: Share, by: int) -> None:
        self._origins -= share.held > NEGLIGIBLE
        share.held += by
        self._origins += share.held > NEGLIGIBLE
        self.held += by
        if by > 0:
            self.peak = max(self.peak, self.held)
        elif self._waiting and not self._woken:
            self._woken = True
            self._wake()


class Holding:
    """What one connection or link holds.

    share: of its origin. reserved: bytes for the message that is being collected. held: bytes that are there otherwise.
    """

    __slots__ = ("_budget", "held", "reserved", "share")

    def __init__(self, budget: Budget, share: Share) -> None:
        self._budget = budget
        self.share = share
        self.reserved = 0
        self.held = 0

    @property
    def over(self) -> bool:
        """Whether the origin holds more than its part, so that it should produce nothing more that has to be kept."""
        return self.share.held > max(self._budget.free, 0)

    @property
    def greedy(self) -> bool:
        """Whether the origin holds more than its part while another one that does not has to wait."""
        return self._budget.contended and self.share.held - NEGLIGIBLE > self._budget.part

    def reserve(self, size: int, again: Callable[[], object]) -> bool:
        """Reserve memory for a message.

        Args:
            size: bytes of the whole message.
            again: called when it is worth to ask again, if this returns False.

        Returns: whether the memory is reserved.
        """
        budget = self._budget
        if self.share.held + size > budget.free:
            budget._waiting[self] = again
            return False
        self.reserved += size
        budget._change(self.share, size)
        return True

    def unreserve(self) -> None:
        """Give the reserved memory back, or stop waiting for some."""
        self._budget._waiting.pop(self, None)
        if self.reserved:
            size, self.reserved = self.reserved, 0
            self._budget._change(self.share, -size)

    def hold(self, size: int) -> None:
        """Record that so many bytes are held now, beside the reserved ones."""
        if size != self.held:
            by, self.held = size - self.held, size
            self._budget._change(self.share, by)

    def move(self, share: Share) -> None:
        """Count for another origin from now on."""
        size = self.reserved + self.held
        self._budget._change(self.share, -size)
        self._budget._change(share, size)
        self.share = share

    def clear(self) -> None:
        """Hold nothing any more."""
        self.unreserve()
        self.hold(0)
