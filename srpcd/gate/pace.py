"""Time for a transfer: a peer that sends or takes something has to keep a pace, and not only to show a sign of life."""

from srpcd.config import Limits
from srpcd.records import RECORD
from srpcd.wire.limits import LARGE

SMALL_STALLS = 4
"""Times `limits.stall` in which LARGE bytes have to pass at least where less than that is pinned: 64 KiB in 80 seconds by
default, which a line of 7 kbit/s does. What pins little may be slow."""

HURRY = 16
"""Times `limits.pace` at which transfers of an origin have to move that holds more than its part of the memory while others
wait for theirs: 16 MiB in 64 seconds by default."""


class Transfer:
    """A transfer in one direction, looked at now and then.

    In any time longer than `limits.stall` it has to move as many bytes as its pace asks for in the rest of that time. A fast
    beginning buys nothing for later. It is a leaky bucket: each byte postpones the time at which the transfer is late, and
    never beyond `limits.stall` from now.
    """

    __slots__ = ("_done", "_due", "_large", "_number", "_records", "_seen", "_small", "_stall")

    def __init__(self, limits: Limits, *, records: bool = False) -> None:
        """Begin to watch.

        Args:
            limits: `stall` (seconds) and `pace` (bytes per second).
            records: whether bytes are seen in whole TLS records only, so that most of one may be on its way unseen.
        """
        self._stall = limits.stall
        self._large = float(limits.pace)
        self._small = min(self._large, LARGE / (SMALL_STALLS * limits.stall))
        self._records = records
        self._number = 0
        self._done = 0
        self._seen = self._due = 0.0

    def late(self, now: float, number: int, done: int, pinned: int, *, hurried: bool = False, halted: bool = False) -> bool:
        """Look at the transfer.

        Args:
            now: the time, in seconds.
            number: of the transfer in progress, another one for each; 0: none is.
            done: bytes, counted from anywhere: what it is more than at the last look was moved since then.
            pinned: bytes of memory that the transfer pins, which decide about its pace.
            hurried: whether it has to move at HURRY times the pace, where it pins much.
            halted: whether the peer could not go on because of this end.

        Returns: whether the peer is too slow.
        """
        rate = self._small if pinned < LARGE else self._large * HURRY if hurried else self._large
        grace = self._stall + RECORD / rate if self._records else self._stall
        if number != self._number:
            self._number = number
            self._due = now + grace
        else:
            if halted:
                self._due += now - self._seen
            self._due = min(self._due + (done - self._done) / rate, now + grace)
        self._done = done
        self._seen = now
        return number != 0 and now > self._due
