"""Which connections may stay: the rules one by one, and attacks on them."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice

import pytest

from srpcd.config import Limits
from srpcd.monitor.admission import Admission
from srpcd.monitor.origins import of_host


class Peer:
    """A connection, as far as the decisions look at it."""

    def __init__(self, address: str, authenticating: bool = False) -> None:
        self.address = address
        self.origin = of_host(address)
        self.authenticating = True if authenticating else None

    def __repr__(self) -> str:
        return self.address


class Front:
    """An `Admission` with what it has closed. `arrive` returns the new connection."""

    def __init__(self, seed: int | None = None, **limits: int) -> None:
        self.closed: list[tuple[Peer, str]] = []
        self.admission: Admission[Peer] = Admission(
            Limits(**limits),
            lambda peer, limit: self.closed.append((peer, limit)),
            (lambda found: found[0]) if seed is None else random.Random(seed).choice,
        )

    def arrive(self, address: str, authenticating: bool = False) -> Peer:
        peer = Peer(address)
        self.admission.arrive(peer)
        peer.authenticating = True if authenticating else None
        return peer

    def log_in(self, address: str, user: str) -> Peer | None:
        """An authenticated connection, None where it is refused (and then gone)."""
        peer = self.arrive(address)
        if self.admission.authenticated(peer, user):
            return peer
        self.admission.leave(peer)
        return None

    def is_closed(self, peer: Peer) -> bool:
        return any(each is peer for each, _limit in self.closed)


def numbered(pattern: str) -> Iterator[str]:
    return (pattern.format(each // 250, each % 250) for each in count())


# --- unauthenticated ones ----------------------------------------------------------------------------------------------


def test_nothing_is_closed_while_there_is_room() -> None:
    front = Front(strangers=4, strangers_per_address=2)
    for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.1.1"):
        front.arrive(address)
    assert front.closed == []


def test_of_an_address_that_has_as_many_as_it_may_the_older_one_is_closed() -> None:
    front = Front(strangers=100, strangers_per_address=2)
    old, _other, _elsewhere = front.arrive("10.0.0.1"), front.arrive("10.0.0.1"), front.arrive("10.0.0.2")
    front.arrive("10.0.0.1")
    assert front.closed == [(old, "strangers_per_address")]


def test_of_a_full_pool_the_network_and_in_it_the_address_with_most_loses_one() -> None:
    front = Front(strangers=6)
    front.arrive("10.0.0.1"), front.arrive("10.0.0.1")
    front.arrive("10.0.1.1"), front.arrive("10.0.1.2")
    first = front.arrive("10.0.1.3")
    front.arrive("10.0.1.3")
    front.arrive("10.0.9.1")
    assert front.closed == [(first, "strangers")]


def test_the_newcomer_counts_for_its_origin() -> None:
    front = Front(strangers=4)
    front.arrive("10.0.0.1"), front.arrive("10.0.0.1")
    first = front.arrive("10.0.1.1")
    front.arrive("10.0.1.1")
    front.arrive("10.0.1.1")
    assert front.closed == [(first, "strangers")]


def test_the_larger_of_those_that_authenticate_and_those_that_do_not_loses_one() -> None:
    front = Front(strangers=4)
    typing = [front.arrive("10.0.0.1", authenticating=True) for _ in range(2)]
    silent = front.arrive("10.0.0.1")
    front.arrive("10.0.0.1")
    front.arrive("10.0.0.1")  # silent: three of five
    assert front.closed == [(silent, "strangers")]
    front = Front(strangers=4)
    typing = [front.arrive("10.0.0.1", authenticating=True) for _ in range(3)]
    front.arrive("10.0.0.1")
    front.arrive("10.0.0.1")
    assert front.closed == [(typing[0], "strangers")]


def test_only_the_older_half_is_chosen_from_and_all_of_it() -> None:
    chosen: Counter[int] = Counter()
    for seed in range(200):
        front = Front(seed, strangers=8)
        there = [front.arrive("10.0.0.1") for _ in range(8)]
        front.arrive("10.0.0.1")
        chosen[there.index(front.closed[0][0])] += 1
    assert set(chosen) == {0, 1, 2, 3}


def test_what_is_over_leaves_room() -> None:
    front = Front(strangers=2, strangers_per_address=1)
    one, other = front.arrive("10.0.0.1"), front.arrive("10.0.0.2")
    front.admission.leave(one)
    front.admission.leave(one)
    front.arrive("10.0.0.1")
    assert front.closed == []
    front.admission.authenticated(other, "alice")
    front.arrive("10.0.0.2")
    assert front.closed == []


def test_a_lower_bound_counts_for_what_comes() -> None:
    front = Front(strangers=4)
    for _ in range(4):
        front.arrive("10.0.0.1")
    front.admission.limits = Limits(strangers=2)
    front.arrive("10.0.0.2")
    assert len(front.closed) == 1


# --- attacks on the pool of unauthenticated ones -----------------------------------------------------------------------

HOSTS: dict[str, Callable[[], Iterator[str]]] = {
    "one host": lambda: cycle(["192.0.2.1"]),
    "four hosts": lambda: cycle([f"192.0.{each}.1" for each in range(4)]),
    "a network": lambda: cycle([f"192.0.2.{host}" for host in range(1, 255)]),
    "64 networks": lambda: cycle([f"192.{each}.{each}.{host}" for host in range(99) for each in range(64)]),
}


@pytest.mark.parametrize("attack", HOSTS)
@pytest.mark.parametrize("authenticating", ["none", "all", "half"])
def test_a_client_from_elsewhere_is_never_closed(attack: str, authenticating: str) -> None:
    """Whatever the flood does, and however long the client needs: it is the only connection of its network."""
    front, sources = Front(1), HOSTS[attack]()
    begin = {"none": cycle([False]), "all": cycle([True]), "half": cycle([True, False])}[authenticating]
    for source in islice(sources, 1000):
        front.arrive(source, next(begin))
    client = front.arrive("198.51.100.7")
    for stage in (None, True):
        client.authenticating = stage
        for source in islice(sources, 1000):
            front.arrive(source, next(begin))
    assert not front.is_closed(client)


@pytest.mark.parametrize("authenticating", [False, True])
@pytest.mark.parametrize("source", ["one host", "networks"])
def test_among_equals_a_client_has_the_time_in_which_half_its_group_is_replaced(source: str, authenticating: bool) -> None:
    """One NAT with the attacker; or a flood of so many networks that each has one connection, as the client has."""
    one = source == "one host"
    sources = cycle(["192.0.2.1"]) if one else numbered("192.{}.{}.1")
    size = 64 if one else 256
    for seed in range(20):
        front = Front(seed)
        for each in islice(sources, 1000):
            front.arrive(each, authenticating)
        client = front.arrive("192.0.2.1" if one else "198.51.100.7")
        for each in islice(sources, size // 2 - 1):
            front.arrive(each, authenticating)
        assert not front.is_closed(client)


@pytest.mark.parametrize("seed", range(5))
def test_a_person_at_a_prompt_outlasts_a_flood_of_silent_connections_from_the_same_address(seed: int) -> None:
    front = Front(seed)
    person = front.arrive("192.0.2.1", authenticating=True)
    for _ in range(10_000):
        front.arrive("192.0.2.1")
    assert not front.is_closed(person)


@pytest.mark.parametrize("seed", range(5))
def test_a_client_in_its_handshake_outlasts_a_flood_that_authenticates(seed: int) -> None:
    front = Front(seed)
    for each in islice(numbered("192.{}.{}.1"), 256):
        front.arrive(each, authenticating=True)
    client = front.arrive("198.51.100.7")
    for each in islice(numbered("193.{}.{}.1"), 10_000):
        front.arrive(each, authenticating=True)
    assert not front.is_closed(client)


def test_a_flood_closes_no_authenticated_connection() -> None:
    front = Front(1, connections=4)
    users = [front.log_in(f"10.0.{each}.1", f"user{each}") for each in range(4)]
    for each in islice(numbered("192.{}.{}.1"), 2000):
        front.arrive(each)
    assert not any(front.is_closed(user) for user in users if user)
    assert len(front.closed) == 2000 - 256


@pytest.mark.parametrize("seed", range(30))
def test_the_bounds_hold_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    limits = {"strangers": 8, "strangers_per_address": 3, "connections": 6, "connections_per_address": 4}
    front = Front(seed, **limits)
    there: list[Peer] = []
    users: dict[Peer, str] = {}
    for _ in range(600):
        if there and dice.random() < 0.3:
            peer = dice.choice(there)
            peer.authenticating = True
            if dice.random() < 0.5:
                user = dice.choice("abc")
                if front.admission.authenticated(peer, user):
                    users.setdefault(peer, user)
        elif there and dice.random() < 0.2:
            peer = dice.choice(there)
            front.admission.leave(peer)
            there.remove(peer)
            users.pop(peer, None)
        else:
            there.append(front.arrive(f"10.0.{dice.randrange(3)}.{dice.randrange(3)}"))
        for gone, _limit in front.closed:
            there.remove(gone)
            users.pop(gone, None)
        front.closed.clear()
        waiting = [each for each in there if each not in users]
        assert len(waiting) <= 8
        assert len(users) <= 6
        assert max(Counter(each.address for each in waiting).values(), default=0) <= 3
        assert max(Counter(each.address for each in users).values(), default=0) <= 4


# --- authenticated ones ------------------------------------------------------------------------------------------------


def addresses(found: Sequence[tuple[Peer, str]]) -> list[tuple[str, str]]:
    return [(peer.address, limit) for peer, limit in found]


def test_the_newest_of_the_user_with_most_makes_room_for_others() -> None:
    front = Front(connections=4)
    for each in range(4):
        front.log_in(f"10.0.0.{each}", "alice")
    assert front.log_in("10.0.1.1", "bob")
    assert addresses(front.closed) == [("10.0.0.3", "connections")]
    assert front.log_in("10.0.1.1", "bob")
    assert addresses(front.closed)[1:] == [("10.0.0.2", "connections")]
    assert not front.log_in("10.0.1.1", "bob"), "two each: no one takes another's"
    assert not front.log_in("10.0.0.9", "alice"), "nor more than the others have"
    assert front.log_in("10.0.2.1", "carol"), "who has none gets one"


def test_one_address_is_shared_by_its_users() -> None:
    front = Front(connections_per_address=3)
    for _ in range(3):
        front.log_in("10.0.0.1", "alice")
    assert front.log_in("10.0.0.2", "alice")
    assert front.log_in("10.0.0.1", "bob")
    assert addresses(front.closed) == [("10.0.0.1", "connections_per_address")]
    assert not front.log_in("10.0.0.1", "alice")


def test_where_each_user_has_one_a_new_user_is_refused_and_nobody_is_closed() -> None:
    front = Front(connections=3)
    for user in ("alice", "bob", "carol"):
        assert front.log_in("10.0.0.1", user)
    assert not front.log_in("10.0.0.2", "dave")
    assert front.closed == []


def test_a_connection_counts_once_whoever_else_authenticates_on_it() -> None:
    front = Front(connections=2)
    one = front.log_in("10.0.0.1", "alice")
    assert one
    assert front.admission.authenticated(one, "bob")
    assert front.log_in("10.0.0.1", "bob")
    assert front.closed == []


def test_a_connection_that_was_closed_meanwhile_does_not_come_back() -> None:
    front = Front(strangers=1)
    one = front.arrive("10.0.0.1")
    front.arrive("10.0.0.2")
    assert front.is_closed(one)
    assert not front.admission.authenticated(one, "alice")
