"""Authentications from the monitor's side: who may try, how often, how long; and what became of it.

The conversation is between the gate and the child (`pamchild`); what comes here is the outcome. An accepted afid stays
with its connection. Every refusal reaches the client at a multiple of `authentication.refusal` seconds after the answer
that it refuses, whatever the reason and however long it took to find out.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from errno import EACCES
from weakref import WeakValueDictionary

from srpcd import ipc
from srpcd.config import Authentication as Settings
from srpcd.monitor.accounts import Account
from srpcd.monitor.children import Child
from srpcd.wire.limits import PAM_CHILDREN_MAX

FREE_FAILURES, LONGEST_WAIT, REMEMBERED = 3, 30.0, 4096
"""Failures of a (user, origin) without a wait before the next try; seconds of the longest wait; pairs kept."""
OVERFLOW_UID = 65534


class Afid:
    """uname, aname: what was asked for. expires: monotonic seconds until which it can be attached with; 0: not accepted."""

    def __init__(self, uname: str, aname: str) -> None:
        self.uname = uname
        self.aname = aname
        self.expires = 0.0
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


class Failures:
    """Counts failures of (user, origin) and makes the next try wait: twice as long each time, up to a bound."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()

    def wait(self, uname: str, origin: str) -> float:
        """Seconds that the next try has to wait."""
        failures, last = self._pairs.get((uname, origin), (0, 0.0))
        excess = failures - FREE_FAILURES
        pause = min(2.0 ** min(excess, 10), LONGEST_WAIT) if excess >= 0 else 0.0
        return max(0.0, last + pause - time.monotonic())

    def record(self, uname: str, origin: str, accepted: bool) -> None:
        """Remember how a try ended."""
        failures, _last = self._pairs.pop((uname, origin), (0, 0.0))
        if not accepted:
            self._pairs[uname, origin] = (failures + 1, time.monotonic())
            if len(self._pairs) > REMEMBERED:
                self._pairs.popitem(last=False)


class Slots:
    """Places for PAM children, in all and by origin: whoever finds none waits in line, for a bounded time."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(PAM_CHILDREN_MAX)
        self._origins: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def place(self, origin: str, seconds: float) -> AsyncIterator[None]:
        """Hold a place. Raises TimeoutError if there was none in time."""
        own = self._origins.setdefault(origin, asyncio.Semaphore(PAM_CHILDREN_MAX // 2))
        async with AsyncExitStack() as held:
            async with asyncio.timeout(seconds):
                await held.enter_async_context(own)
                await held.enter_async_context(self._all)
            yield


def policy(account: Account | None, settings: Settings, own: frozenset[int], network: bool) -> str:
    """Why an account that PAM accepted is refused all the same; empty if it is not.

    own: uids that are the daemon's. network: over TLS, where system accounts and those without a shell need `allow`.
    """
    if account is None:
        return "no such account"
    uid = account.identity.uid
    if uid in (0, OVERFLOW_UID, 0xFFFFFFFF) or uid in own:
        return "root, the overflow uid and the daemon's own never call"
    if network and account.name not in settings.allow:
        if uid < settings.uid_min:
            return "a system account, not in authentication.allow"
        if not account.login:
            return "no valid login shell, and not in authentication.allow"
    return ""


def deadline(answered: float, step: float) -> float:
    """When a refusal is told: the next multiple of `step` seconds after the answer. Monotonic seconds."""
    return answered + step * (int(max(0.0, time.monotonic() - answered) / step) + 1)


REFUSED = (EACCES, "user name or password is wrong, or the account may not be used")
"""What a client is told, whatever the reason."""
