"""How long what is kept: pure.

The workers of a channel may have been told different things, as in a rolling deploy. Each writes down what it was told,
and none deletes what another one that runs would still keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pgebus.patterns import MANY, ONE, PatternIndex, is_pattern

_RANKS: Final = {ONE: 1, MANY: 2}
# Of so many types is what was found remembered; a publisher may make types up.
_REMEMBERED: Final = 10_000


def specificity(pattern: str) -> tuple[object, ...]:
    """Return what the patterns of one type are ordered by, the most specific first.

    The type itself comes first. Then the patterns are compared word by word: a word, then `*`, then `#`; where one
    ends, the longer one is the more specific.
    """
    return (is_pattern(pattern), *(_RANKS.get(word, 0) for word in pattern.split(".")), len(_RANKS) + 1)


@dataclass(frozen=True)
class Retention:
    """Seconds after which what is finished, dead or unhandled is deleted; None keeps it.

    Attributes:
        default: For what is finished, where no pattern matches its type.
        patterns: The same for the types that a pattern matches: that of the most specific one.
        dead: For dead letters, whatever their type.
        unhandled: For what no handler has taken.
        forgets: Whether this worker has a group that keeps no history, and so events may be left without a delivery.
    """

    default: float | None = None
    patterns: Mapping[str, float | None] = field(default_factory=dict)
    dead: float | None = None
    unhandled: float | None = None
    forgets: bool = False

    def to_json(self) -> str:
        """Return it as it is written into the database; what has to be known by all workers only where it is so."""
        said = {
            "default": self.default,
            "patterns": dict(self.patterns),
            "dead": self.dead,
            "unhandled": self.unhandled,
        }
        return json.dumps(said | ({"forgets": True} if self.forgets else {}), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Retention:
        """Return what a worker has written.

        Raises:
            ValueError: If this is not what this release writes.
        """
        try:
            said = json.loads(text)
            forgets = said.pop("forgets", False)
            if not isinstance(forgets, bool) or sorted(said) != ["dead", "default", "patterns", "unhandled"]:
                raise ValueError("it has other parts")
            patterns = {str(pattern): _seconds(value) for pattern, value in said.pop("patterns").items()}
            return cls(patterns=patterns, forgets=forgets, **{name: _seconds(said.pop(name)) for name in list(said)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{text[:200]!r} is no retention") from error


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    raise ValueError(f"{value!r} is no number of seconds")


class Keeping:
    """What several workers would keep, taken together: of everything the longest.

    Args:
        retentions: One at least.
    """

    def __init__(self, retentions: Sequence[Retention]) -> None:
        self.dead = _longest([each.dead for each in retentions])
        self.unhandled = _longest([each.unhandled for each in retentions])
        self.forgets = any(each.forgets for each in retentions)
        self._retentions = retentions
        self._indexes = [PatternIndex() for _ in retentions]
        for index, each in zip(self._indexes, retentions, strict=True):
            for pattern in each.patterns:
                index.add(pattern)
        self._known: dict[str, float | None] = {}

    @property
    def terms(self) -> list[float]:
        """All the seconds that there are for what is finished, shortest first."""
        said = {each for of in self._retentions for each in (of.default, *of.patterns.values())}
        return sorted(each for each in said if each is not None)

    def of(self, event_type: str) -> float | None:
        """Return the seconds for which what is finished of this type is kept."""
        if event_type not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            pairs = zip(self._retentions, self._indexes, strict=True)
            self._known[event_type] = _longest([_of_one(each, index, event_type) for each, index in pairs])
        return self._known[event_type]


def _of_one(retention: Retention, index: PatternIndex, event_type: str) -> float | None:
    found = index.find(event_type)
    if not found:
        return retention.default
    best = min(specificity(pattern) for pattern in found)
    # Two of the same rank, like `#.a.#` and `#.b.#`.
    return _longest([retention.patterns[pattern] for pattern in found if specificity(pattern) == best])


def _longest(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return max(known) if len(known) == len(seconds) else None
