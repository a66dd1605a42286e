"""The parts of the bench, by the names that `--only` takes, in the order in which they are run.

Each is a function (stage, extent, section, progress): it puts what it finds into the section, grid by grid, so that what
was found before a failure is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.plan import Extent
from bench.results import Section
from bench.rounds import Progress
from bench.sections import connections, cpu, echo, handlers, memory, profile, start, tree, users
from bench.stage import Stage


@dataclass(frozen=True)
class Part:
    """A section. private: needs root, for users with passwords."""

    name: str
    title: str
    run: Callable[[Stage, Extent, Section, Progress], None]
    private: bool = False


PARTS = (
    Part("lone", "One call at a time", echo.lone),
    Part("flight", "Several calls in flight", echo.flight),
    Part("payload", "Payloads", echo.payload),
    Part("handlers", "Kinds of handlers", handlers.run),
    Part("cpu", "CPU time", cpu.run),
    Part("profile", "Where a call's time goes", profile.run, private=True),
    Part("start", "First calls, and workers", start.run, private=True),
    Part("connections", "Connections", connections.run),
    Part("memory", "Memory", memory.run, private=True),
    Part("tree", "Many endpoints", tree.run),
    Part("users", "Many users", users.run, private=True),
)
NAMES = tuple(part.name for part in PARTS)
