"""A gate for each test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gate.world import World, copy_code, why_not


@pytest.fixture(scope="session")
def code() -> Iterator[Path]:
    """The code, where every user may read it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    place = copy_code()
    yield place
    shutil.rmtree(place)


@pytest.fixture
def start(code: Path) -> Iterator[Callable[..., World]]:
    """Start gates: kind, and limits as in the configuration. Whatever they say on standard error is a failure."""
    worlds: list[World] = []

    def make(kind: str = "local", program: str = "strict.py", **limits: Any) -> World:
        world = World(code, kind, limits, program)
        worlds.append(world)
        return world

    yield make
    said = [world.close() for world in worlds]
    assert said == [""] * len(worlds)


@pytest.fixture(params=["local", "tls"])
def world(start: Callable[..., World], request: pytest.FixtureRequest) -> World:
    """A gate of each kind."""
    return start(request.param)


@pytest.fixture
def local(start: Callable[..., World]) -> World:
    """A gate of the local socket."""
    return start("local")
