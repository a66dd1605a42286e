"""Logins of a bystander while many others authenticate and mean no good, on a clock that nobody waits for.

The monitor's own code decides; PAM is a time that each child takes, and clients are what they answer, and when.
"""

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EACCES, EAGAIN, ETIMEDOUT
from types import SimpleNamespace
from typing import Any, cast

import pytest

from srpcd import ipc
from srpcd.config import Authentication, Config
from srpcd.monitor import authentication
from srpcd.monitor import logins as module
from srpcd.monitor.authentication import Afid
from srpcd.monitor.conversations import Conversation, Conversations
from srpcd.monitor.launch import Identity
from srpcd.monitor.logins import Logins
from srpcd.monitor.origins import Origin, of_host, of_uid
from srpcd.monitor.requests import Violation
from srpcd.wire.limits import CONVERSATIONS_MAX, PAM_WORKING_MAX, SILENCE_SECONDS

WORK = 0.04
"""Seconds that PAM works until it asks, and again until it has decided."""
ALONE = 2 * WORK
NEVER = 3600.0
LATE = SILENCE_SECONDS - 0.1


class _Selector(selectors.DefaultSelector):
    """Does not wait: the time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.passed += max(timeout or 0.0, 1e-6)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop on such a clock."""

    def __init__(self) -> None:
        self.own = _Selector()
        super().__init__(self.own)

    def time(self) -> float:
        return 1000.0 + self.own.passed


class Child:
    """An authentication child. answer: seconds until its client answers."""

    def __init__(self, world: "World", answer: float, right: bool) -> None:
        self.gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.result: ipc.Outcome | None = None
        self.conversation: Any = None
        self._world = world
        self._answer = answer
        self._right = right
        self._proceeds = asyncio.Event()
        world.children += 1
        world.most_children = max(world.children, world.most_children)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        logins: Any = self._world.logins
        await self._work()
        logins.waiting(self, ipc.Waiting())
        await asyncio.sleep(self._answer)
        logins.answered(self, ipc.Answered())
        await self._proceeds.wait()
        await self._work()
        logins.outcome(self, ipc.Outcome(0, "", 0, 20_000) if self._right else ipc.Outcome(EACCES, "wrong", 0, 0))

    async def _work(self) -> None:
        self._world.working += 1
        self._world.most_working = max(self._world.working, self._world.most_working)
        try:
            await asyncio.sleep(WORK)
        finally:
            self._world.working -= 1

    def send(self, message: ipc.Message, fds: tuple[int, ...] = ()) -> None:
        if isinstance(message, ipc.Proceed):
            self._proceeds.set()

    def release(self) -> None:
        self.kill("")

    def kill(self, _reason: str) -> None:
        if not self.gone.done():
            self._world.children -= 1
            self._task.cancel()
            self.gone.set_result(0)


class World:
    """A monitor's logins, and what they took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.children = self.most_children = self.working = self.most_working = 0
        self.monitor: Any = SimpleNamespace(
            own=Identity(0, 0, ()), config=Config(), personal=False, start=self._start, told=lambda *_, **__: None
        )
        self.logins: Any = Logins(cast(Any, self.monitor))
        self._next: tuple[float, bool] = (0.0, True)
        self._numbers = 0

        async def accepted(*_: object) -> str:
            return ""

        monkeypatch.setattr(self.logins, "_refusal", accepted)
        monkeypatch.setattr(self.logins, "_introduce", lambda *_: None)
        clock = SimpleNamespace(monotonic=asyncio.get_running_loop().time)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(authentication, "time", clock)

    def _start(self, _kind: object, name: str, _drop: object, *, log_origin: str) -> Child:
        answer, right = name.split()[1:]
        return Child(self, float(answer), right == "True")

    async def login(
        self, origin: Origin, user: str, answer: float, right: bool, mechanism: str = "pam"
    ) -> tuple[int, float]:
        """One attempt on a connection of its own: the errno that it gets, and the seconds that this took."""
        began = asyncio.get_running_loop().time()
        verdicts: list[ipc.Verdict] = []
        self._numbers += 1
        gate = SimpleNamespace(send=verdicts.append)
        connection: Any = SimpleNamespace(
            gate=gate, number=self._numbers, origin=origin, log_origin="", host="", peer="", failures=0, afids={},
            authenticating=None,
            identity=Identity(20_000, 20_000, ()) if mechanism == "peer" else None, becomes_known=lambda *_: True,
        )  # fmt: skip
        message = ipc.Authenticate(self._numbers, 1, mechanism, f"{user} {answer} {right}", "")
        afid = connection.afids[1] = Afid(message.uname, "")
        await self.logins._authenticate(connection, afid, message)
        return verdicts[0].errno, asyncio.get_running_loop().time() - began


@asynccontextmanager
async def attack(world: World, origins: list[Origin], answer: float) -> AsyncIterator[None]:
    """1000 connections of these origins authenticate again and again. answer: seconds until they answer, wrongly."""

    async def again(number: int) -> None:
        count = 0
        while True:
            count += 1
            await world.login(origins[number % len(origins)], f"attacker{number}-{count}", answer, False)
            await asyncio.sleep(0.01)

    async def look() -> None:
        while True:
            await asyncio.sleep(1.0)
            world.logins.look()

    tasks = [asyncio.create_task(each) for each in (*(again(number) for number in range(1000)), look())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def run() -> Callable[..., Any]:
    """Runs a coroutine on that clock."""

    def run(work: Any) -> Any:
        with asyncio.Runner(loop_factory=Loop) as runner:
            return runner.run(work)

    return run


NETWORKS = {
    "one-prefix": [of_host(f"192.0.2.{each}") for each in range(100)],
    "a-prefix-each": [of_host(f"10.{each}.0.1") for each in range(100)],
    "ten-prefixes": [of_host(f"10.{each % 10}.0.{each}") for each in range(100)],
    "a-48-of-IPv6": [of_host(f"2001:db8:1:{each:x}::1") for each in range(100)],
    "loopback": [of_host(f"127.0.1.{each}") for each in range(100)],
}

BYSTANDER = of_host("203.0.113.1")


@pytest.mark.parametrize("origins", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("answer", [NEVER, LATE, 59.0], ids=["silent", "late", "nearly-a-minute"])
def test_clients_that_do_not_answer_do_not_delay_a_bystander(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, origins: list[Origin], answer: float
) -> None:
    async def story() -> tuple[list[tuple[int, float]], World]:
        world = World(monkeypatch)
        found: list[tuple[int, float]] = []
        async with attack(world, origins, answer):
            await asyncio.sleep(len(origins) * WORK / PAM_WORKING_MAX)  # until each of them was served once
            for number in range(80):
                found.append(await world.login(BYSTANDER, f"bystander{number}", 0.0, True))
                await asyncio.sleep(0.9)
        return found, world

    found, world = run(story())
    assert {errno for errno, _ in found} == {0}
    assert max(seconds for _, seconds in found) <= 3 * ALONE
    assert world.most_children <= CONVERSATIONS_MAX + PAM_WORKING_MAX  # one that gave way may not have ended
    assert world.most_working <= PAM_WORKING_MAX
    assert (world.children, world.working) == (0, 0)
    for limiter in (world.logins._pam["pam"].places, world.logins._pam["pam"].turns):
        assert not limiter._holders
        assert not limiter._waiting
        assert not limiter._held


@pytest.mark.parametrize("origins", NETWORKS.values(), ids=NETWORKS)
def test_wrong_passwords_do_not_delay_a_bystander(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, origins: list[Origin]
) -> None:
    async def story() -> list[tuple[int, float]]:
        world = World(monkeypatch)
        found: list[tuple[int, float]] = []
        world.monitor.config = Config(authentication=Authentication(refusal=0.001))
        async with attack(world, origins, 0.0):
            await asyncio.sleep(2 * len(origins) * ALONE / PAM_WORKING_MAX)  # until each of them has failed
            for number in range(100):
                found.append(await world.login(BYSTANDER, f"bystander{number}", 0.0, True))
                await asyncio.sleep(0.1)
        return found

    found = run(story())
    assert {errno for errno, _ in found} == {0}
    assert max(seconds for _, seconds in found) <= 3 * ALONE


def test_who_types_slowly_is_not_driven_out_by_one_prefix(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> tuple[int, float]:
        world = World(monkeypatch)
        async with attack(world, NETWORKS["one-prefix"], NEVER):
            await asyncio.sleep(30.0)
            return await world.login(BYSTANDER, "slow", 45.0, True)

    assert run(story())[0] == 0


def test_who_fails_among_attackers_still_gets_in(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> list[int]:
        world = World(monkeypatch)
        async with attack(world, NETWORKS["a-prefix-each"], NEVER):
            await asyncio.sleep(30.0)
            return [(await world.login(BYSTANDER, "clumsy", 3.0, right))[0] for right in (False, True)]

    assert run(story()) == [EACCES, 0]


def test_the_time_for_an_answer_does_not_run_in_line(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> list[int]:
        world = World(monkeypatch)
        settings = Authentication(timeout=10 * WORK, refusal=0.001)
        world.monitor.config = Config(authentication=settings)
        origins = [of_host(f"10.0.0.{each}") for each in range(200)]
        return [errno for errno, _ in await asyncio.gather(*(world.login(each, "u", WORK, True) for each in origins))]

    assert set(run(story())) == {0}


def test_a_client_that_does_not_answer_in_time_is_told_so(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> tuple[int, float]:
        return await World(monkeypatch).login(BYSTANDER, "u", NEVER, True)

    errno, seconds = run(story())
    assert errno == ETIMEDOUT
    assert 60.0 <= seconds < 61.0


def test_a_conversation_that_gives_way_is_told_so(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> list[int]:
        world = World(monkeypatch)
        silent = [asyncio.create_task(world.login(of_host(f"10.0.{each}.1"), "u", NEVER, True)) for each in range(130)]
        await asyncio.sleep(SILENCE_SECONDS + 5.0)
        world.logins.look()
        done, rest = await asyncio.wait(silent, timeout=1.0)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        return [task.result()[0] for task in done]

    assert run(story()) == [EAGAIN] * 2


def test_other_users_of_the_host_do_not_delay_a_local_login(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> float:
        world = World(monkeypatch)
        others = [
            asyncio.create_task(world.login(of_uid(1000 + each % 20), f"u{each}", 0.0, True, "peer")) for each in range(1000)
        ]
        await asyncio.sleep(WORK)
        _errno, seconds = await world.login(of_uid(5000), "bystander", 0.0, True, "peer")
        await asyncio.gather(*others)
        return seconds

    assert run(story()) <= 3 * ALONE


@pytest.mark.parametrize("said", ["waiting", "answered"])
async def test_a_child_that_speaks_out_of_turn_is_ended(said: str) -> None:
    conversations = Conversations(lambda _groups: 0)
    async with asyncio.timeout(None) as timeout:
        conversation = Conversation(conversations, ("a",), 60.0, timeout)
        if said == "waiting":
            conversation.waiting()
            conversation.answered()
            conversation.waiting()
        with pytest.raises(Violation):
            getattr(conversation, said)()
