"""Who gets a place: an origin that has few of them, before one that has many, that has failed, or that was just served."""

from collections.abc import Callable
from math import inf

import pytest

from srpcd.monitor.limiter import Claim, FairLimiter
from srpcd.monitor.origins import of_host

A, B, C, D = "192.0.2.1", "198.51.100.1", "203.0.113.1", "233.252.0.1"


class World:
    """A limiter, and what it has said. Claims are known by names."""

    def __init__(self, total: int, each: int | None = None) -> None:
        self.suspects: set[str] = set()
        self.limiter = FairLimiter(total, total if each is None else each, lambda groups: int(groups[0] in self.suspects))
        self.said: list[str] = []

    def add(self, name: str, host: str, silent: float | None = None) -> Claim:
        """Claim a place for an address. silent: as of the claim."""
        claim = Claim(of_host(host).groups, self._say("+", name), self._say("-", name))
        claim.silent = silent
        self.limiter.add(claim)
        return claim

    def heard(self) -> str:
        """What was said since the last time: "+a" granted, "-a" evicted."""
        said, self.said = self.said, []
        return " ".join(said)

    def _say(self, what: str, name: str) -> Callable[[], None]:
        return lambda: self.said.append(what + name)


def test_one_origin_gets_half_and_the_next_one_finds_a_place() -> None:
    world = World(8)
    claims = [world.add(f"a{each}", A) for each in range(6)]
    assert world.heard() == "+a0 +a1 +a2 +a3"
    world.add("b", B)
    assert world.heard() == "+b"
    world.limiter.remove(claims[0])
    assert world.heard() == "+a4"
    world.limiter.remove(claims[5])
    world.limiter.remove(claims[5])
    assert world.heard() == ""


def test_the_addresses_of_a_prefix_get_half_together() -> None:
    world = World(8)
    for each in range(6):
        world.add(f"a{each}", f"192.0.2.{each}")
    assert world.heard() == "+a0 +a1 +a2 +a3"


def test_suspects_get_half_together() -> None:
    world = World(8)
    world.suspects = {A, B, C}
    for host in (A, B, C):
        world.add(host, host)
        world.add(host, host)
    assert world.heard() == f"+{A} +{A} +{B} +{B}"
    world.add("d", D)
    assert world.heard() == "+d"


def test_an_address_gets_no_more_than_its_own_bound() -> None:
    world = World(8, 2)
    for each in range(3):
        world.add(f"a{each}", A)
    assert world.heard() == "+a0 +a1"


def test_origins_without_failures_go_first_and_then_those_that_hold_least() -> None:
    world = World(1)
    world.suspects = {B}
    first = world.add("first", A)
    for name, host in (("b", B), ("a1", A), ("a2", A), ("c", C)):
        world.add(name, host)
    world.heard()
    world.limiter.remove(first)
    assert world.heard() == "+c"  # before a, which was just served, and b, which came before


def test_claims_of_one_origin_are_served_in_their_order() -> None:
    world = World(1)
    claims = [world.add(f"a{each}", A) for each in range(4)]
    world.limiter.remove(claims[2])
    world.heard()
    world.limiter.remove(claims[0])
    world.limiter.remove(claims[1])
    assert world.heard() == "+a1 +a3"


def test_origins_take_turns() -> None:
    world = World(1)
    held = world.add("held", D)
    claims = {f"{name}{each}": world.add(f"{name}{each}", host) for name, host in (("a", A), ("b", B)) for each in range(3)}
    world.heard()
    world.limiter.remove(held)
    for name in ("a0", "b0", "a1", "b1", "a2"):
        world.limiter.remove(claims[name])
    assert world.heard() == "+a0 +b0 +a1 +b1 +a2 +b2"


def test_what_was_served_is_remembered_for_a_bounded_number_of_origins() -> None:
    world = World(1)
    for each in range(5000):
        world.limiter.remove(world.add("", f"10.{each // 250}.{each % 250}.1"))
    assert len(world.limiter._served) == 4096


# --- eviction ----------------------------------------------------------------------------------------------------------


def test_the_longest_silent_claim_of_the_largest_origin_goes() -> None:
    world = World(8)
    for name, host, silent in (("b", B, 1.0), ("a0", A, 9.0), ("a1", A, 5.0), ("a2", A, 7.0), ("a3", A, None)):
        world.add(name, host, silent)
    for each in range(3):
        world.add(f"c{each}", f"203.0.{each}.1", 2.0)
    world.heard()
    world.add("d", D)
    assert world.heard() == ""
    world.limiter.evict_for(of_host(D).groups)
    assert world.heard() == "+d -a1"


def test_an_origin_that_has_as_many_goes_after_a_time_of_silence() -> None:
    world = World(2)
    world.add("a", A, 5.0)
    world.add("b", B, 4.0)
    world.add("c", C, inf)
    world.heard()
    world.limiter.evict_silent(3.0, 8)
    assert world.heard() == ""
    world.limiter.evict_silent(4.0, 8)
    assert world.heard() == "+c -b"
    world.add("d", D)
    world.limiter.evict_silent(4.0, 8)
    assert world.heard() == ""
    world.limiter.evict_silent(90.0, 8)
    assert world.heard() == "+d -a"  # and not c, which does not wait for its client


def test_what_is_used_is_not_taken_away() -> None:
    world = World(2)
    world.add("a", A)
    world.add("b", B)
    world.add("c", C)
    world.heard()
    world.limiter.evict_silent(990.0, 8)
    assert world.heard() == ""


def test_an_origin_with_its_share_gets_the_place_of_one_of_its_own() -> None:
    world = World(4)
    world.suspects = {B}
    world.add("b", B, 0.0)
    for each in range(4):
        world.add(f"a{each}", A, float(each))
    assert world.heard() == "+b +a0 +a1"  # and one place is left for another origin
    world.limiter.evict_silent(-5.0, 8)
    assert world.heard() == ""
    world.limiter.evict_silent(0.0, 8)
    assert world.heard() == "+a2 -a0"
    world.add("c", C, 0.0)
    assert world.heard() == "+c"
    world.limiter.evict_silent(0.5, 8)
    assert world.heard() == ""  # nothing is free, but b is none of a's


def test_a_suspect_goes_first_however_little_it_has() -> None:
    world = World(4)
    for name, host in (("a0", A), ("a1", A), ("b", B), ("c", C)):
        world.add(name, host, 0.0)
    world.suspects = {C}
    world.add("d", D, 0.0)
    assert world.heard() == "+a0 +a1 +b +c"
    world.limiter.evict_silent(-9.0, 8)
    assert world.heard() == "+d -c"
    world.suspects = {C, D}
    world.add("c", C)
    world.limiter.evict_silent(990.0, 8)
    assert world.heard() == "+c -d"


async def test_a_turn_is_given_back_whatever_happens() -> None:
    limiter = FairLimiter(1, 1)
    with pytest.raises(ZeroDivisionError):
        async with limiter.turn(("a",)):
            raise ZeroDivisionError
    async with limiter.turn(("b",)):
        pass
