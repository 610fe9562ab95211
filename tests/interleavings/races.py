"""A race: a spec at an isolation level, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from tests.interleavings.spec import Spec

Maker = Callable[[str], Spec]


class Race(NamedTuple):
    """A spec at one isolation level of those that publish or handle."""

    name: str
    level: str
    make: Maker

    def __str__(self) -> str:
        return f"{self.name}-{self.level.lower().replace(' ', '-')}"


RACES: Final[list[Race]] = []


def race(*levels: str) -> Callable[[Maker], Maker]:
    """Register a spec at each of *levels*."""

    def register(make: Maker) -> Maker:
        RACES.extend(Race(make.__name__, level, make) for level in levels)
        return make

    return register


def race_named(name: str) -> Race:
    """Return the first race of that name."""
    return next(race for race in RACES if race.name == name)
