"""The table of rules is whole, and says what the protocol says."""

from errno import ESHUTDOWN

import pytest

from srpcd.session import session
from srpcd.session.rules import LIMITS, RULES, State, refusals
from srpcd.wire import frames, limits, messages


def test_every_request_has_a_rule_and_a_handler() -> None:
    assert RULES.keys() == frames.REQUESTS.keys() == session._HANDLERS.keys()


def test_every_json_request_has_its_body() -> None:
    assert {kind: rule.body for kind, rule in RULES.items() if rule.body} == messages.REQUEST_TYPES


def test_limits_are_those_of_the_protocol() -> None:
    assert LIMITS[State.KNOWN] == frames.REQUESTS
    assert LIMITS[State.STRANGER] == frames.STRANGER_REQUESTS
    assert max(LIMITS[State.STRANGER].values()) <= limits.STRANGER_MAX


@pytest.mark.parametrize("state", State)
def test_the_network_never_allows_more_than_the_local_socket(state: State) -> None:
    local, network = refusals(state, local=True), refusals(state, local=False)
    assert all(network[kind] for kind in RULES if local[kind])


def test_a_draining_daemon_takes_nothing_that_makes_work() -> None:
    allowed = {kind for kind, errno in refusals(State.DRAINING, local=True).items() if errno != ESHUTDOWN}
    assert allowed == {frames.CLUNK, frames.FLUSH, frames.PING}
    assert {kind for kind, rule in RULES.items() if rule.share == 0} == {frames.CLUNK, frames.PING}


def test_what_can_be_cancelled_is_what_a_worker_does() -> None:
    wanted = {frames.WALK, frames.STAT, frames.APPEND, frames.CALL}
    assert {kind for kind, rule in RULES.items() if rule.cancellable} == wanted
