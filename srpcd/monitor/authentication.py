"""Authentications from the monitor's side: who may try, how often, how long; and what became of it.

The conversation is between the gate and the child (`pamchild`); what comes here is the outcome. An accepted afid stays
with its connection. Every refusal reaches the client at a multiple of `authentication.refusal` seconds after the answer
that it refuses, whatever the reason and however long it took to find out.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from srpcd import ipc
from srpcd.config import Authentication as Settings
from srpcd.monitor.accounts import Account
from srpcd.monitor.children import Child
from srpcd.monitor.conversations import Conversation
from srpcd.monitor.credentials import Credentials
from srpcd.monitor.limiter import FairLimiter, Groups
from srpcd.wire.limits import SUSPECT_SECONDS

FREE_FAILURES, LONGEST_WAIT, REMEMBERED = 3, 30.0, 4096
"""Failures of a (user, address) without a wait before the next try; seconds of the longest wait; pairs and groups kept."""
OVERFLOW_UID = 65534


class Afid:
    """uname, aname: what was asked for. proved: what the authentication has proved; None: it has not.

    expires: monotonic seconds until which it can be attached with; 0: it is not accepted, or was revoked.
    """

    def __init__(self, uname: str, aname: str) -> None:
        self.uname = uname
        self.aname = aname
        self.expires = 0.0
        self.proved: Credentials | None = None
        self.task: asyncio.Task[None] | None = None

    def allows(self, uname: str, aname: str) -> bool:
        """Whether it is good for this user and this part of the tree, now."""
        below = not self.aname or aname == self.aname or aname.startswith(self.aname + "/")
        return self.expires > time.monotonic() and uname == self.uname and below


class PamChild(Child):
    """The child in which one authentication runs."""

    role = "authenticate"
    level = "debug"
    result: ipc.Outcome | None = None
    conversation: Conversation


class Attempt:
    """One try. begun: it has come to PAM. accepted: it ended well. What was begun and not accepted has failed."""

    begun = accepted = False


class Failures:
    """Counts failures of (user, address) and makes the next try wait: twice as long each time, up to a bound.

    At most FREE_FAILURES tries of one pair run at once, so that those in parallel do not come before the first has failed.
    An address with a failure is suspect for a while, and so is its prefix.
    """

    def __init__(self) -> None:
        self._pairs: OrderedDict[Groups, tuple[int, float]] = OrderedDict()
        self._groups: OrderedDict[str, float] = OrderedDict()
        self._turns = FairLimiter(1_000_000, FREE_FAILURES)

    @asynccontextmanager
    async def attempt(self, user: str, groups: Groups) -> AsyncIterator[Attempt]:
        """Wait as long as it takes, then try. However the try ends, an abandoned one too, it is counted.

        groups: of the origin.
        """
        attempt, pair = Attempt(), (f"{groups[0]} {user}",)
        async with self._turns.turn(pair):
            failures, last = self._pairs.get(pair, (0, 0.0))
            pause = min(2.0 ** min(failures - FREE_FAILURES, 10), LONGEST_WAIT) if failures >= FREE_FAILURES else 0.0
            await asyncio.sleep(last + pause - time.monotonic())
            try:
                yield attempt
            finally:
                if attempt.accepted:
                    self._pairs.pop(pair, None)
                elif attempt.begun:
                    self._failed(pair, groups)

    def suspicion(self, groups: Groups) -> int:
        """How suspect an origin is: 2 where its address has failed lately, 1 where its prefix has, else 0."""
        lately = time.monotonic() - SUSPECT_SECONDS
        failed = [self._groups.get(group, 0.0) > lately for group in groups]
        return 2 if failed[0] else int(any(failed))

    def _failed(self, pair: Groups, groups: Groups) -> None:
        now = time.monotonic()
        failures, _last = self._pairs.pop(pair, (0, 0.0))
        self._pairs[pair] = failures + 1, now
        for group in groups:
            self._groups[group] = now
            self._groups.move_to_end(group)
        for each in (self._pairs, self._groups):
            while len(each) > REMEMBERED:
                each.popitem(last=False)


def policy(account: Account | None, settings: Settings, own: frozenset[int], network: bool) -> str:
    """Why an account that PAM accepted is refused all the same; empty if it is not.

    own: uids that are the daemon's. network: over TLS, where system accounts and those without a shell need `allow`.
    """
    if account is None:
        return "no such account"
    uid = account.identity.uid
    if uid in (0, OVERFLOW_UID, 0xFFFFFFFF) or uid in own:
        return "root, the overflow uid and the daemon's own never call"
    if account.unmapped:
        return account.unmapped
    if network and account.name not in settings.allow:
        if uid < settings.uid_min:
            return "a system account, not in authentication.allow"
        if not account.login:
            return "no valid login shell, and not in authentication.allow"
    return ""


def deadline(answered: float, step: float) -> float:
    """When a refusal is told: the next multiple of `step` seconds after the answer (0: now). Monotonic seconds."""
    answered = answered or time.monotonic()
    return answered + step * (int(max(0.0, time.monotonic() - answered) / step) + 1)


REFUSED = "user name or password is wrong, or the account may not be used"
"""What a client is told, whatever the reason."""
