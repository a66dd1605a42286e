"""Which authentications may have a child, and in which of these PAM may work.

An authentication waits for a *place*, then for a *turn* at work, and then its child is started. The child says when PAM asks
the client something (`ipc.Waiting`) and when it was answered (`ipc.Answered`): in between it has a place only, and goes on
when it is told to (`ipc.Proceed`). So a client that types nothing costs others no turn, and its place is handed to others
that wait (`limiter`).

A client's time runs from the first turn on, while the client thinks and while PAM works, but not while it waits in line.
"""

import asyncio
from collections.abc import Callable
from math import inf

from srpcd.monitor.limiter import Claim, FairLimiter, Groups
from srpcd.monitor.requests import Violation
from srpcd.wire import limits as wire


class Conversations:
    """The authentications of one mechanism. suspicion: how suspect an origin is, as for `FairLimiter`."""

    def __init__(self, suspicion: Callable[[Groups], int]) -> None:
        self.places = FairLimiter(wire.CONVERSATIONS_MAX, wire.CONVERSATIONS_MAX // 4, suspicion)
        self.turns = FairLimiter(wire.PAM_WORKING_MAX, wire.PAM_WORKING_MAX // 2, suspicion)

    def look(self) -> None:
        """Let conversations that have been silent for long give way; to be called about once a second."""
        now = asyncio.get_running_loop().time()
        self.places.evict_silent(now - wire.SILENCE_SECONDS, wire.PAM_WORKING_MAX)


class Conversation:
    """One authentication.

    begun: set when it has its first turn: its child is to be started. gave_way: it has lost its place.
    proceed: called when it has another turn, after an answer.
    """

    def __init__(self, among: Conversations, groups: Groups, seconds: float, timeout: asyncio.Timeout) -> None:
        """Wait for a place.

        Args:
            groups: of its origin.
            seconds: time for the client and for PAM.
            timeout: ends the authentication when that time is over, or when it gives way. It has no time yet.
        """
        self.begun = asyncio.Event()
        self.gave_way = False
        self.proceed: Callable[[], None] = lambda: None
        self._among = among
        self._left = seconds
        self._timeout = timeout
        self._turn = Claim(groups, self._work)
        self._place = Claim(groups, self._queue, self._give_way)
        among.places.add(self._place)
        if not self._place.counted:
            among.places.evict_for(groups)

    def waiting(self) -> None:
        """The child waits for its client. Raises Violation where it has no turn."""
        if not self._turn.counted:
            raise Violation("an authentication child that waits, and had no turn to work")
        self._place.silent = asyncio.get_running_loop().time()
        self._among.turns.remove(self._turn)

    def answered(self) -> None:
        """The child has its answer, and waits for a turn. Raises Violation where it did not wait for a client."""
        if self._place.silent in (None, inf):
            raise Violation("an authentication child that has an answer, and did not wait for one")
        self._left = (self._timeout.when() or 0.0) - asyncio.get_running_loop().time()
        self._end_at(None)
        self._queue()

    def leave(self) -> None:
        """Give up what it waits for. A child that still runs keeps its place and turn, until `over`."""
        self._place.silent = None
        for limiter, claim in ((self._among.places, self._place), (self._among.turns, self._turn)):
            if not claim.counted:
                limiter.remove(claim)

    def over(self) -> None:
        """Give up its place and its turn."""
        self._among.turns.remove(self._turn)
        self._among.places.remove(self._place)

    def _queue(self) -> None:
        self._place.silent = inf
        self._among.turns.add(self._turn)

    def _work(self) -> None:
        self._place.silent = None
        self._end_at(asyncio.get_running_loop().time() + self._left)
        if self.begun.is_set():
            self.proceed()
        self.begun.set()

    def _give_way(self) -> None:
        self.gave_way = True
        self._end_at(asyncio.get_running_loop().time())

    def _end_at(self, when: float | None) -> None:
        if not self._timeout.expired():
            self._timeout.reschedule(when)
