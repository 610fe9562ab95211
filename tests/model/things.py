"""What the oracle keeps: events, deliveries, groups, patterns, workers, and publishers' open transactions.

Plain data. Times are microseconds of the model's clock: PostgreSQL's, plus what the test has let pass (see
`database.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

SECOND: Final = 1_000_000
# A delivery that a worker died with is not started again when it has used up as many attempts.
MAX_ATTEMPTS: Final = 3
KEPT_ERRORS: Final = 5
# For how long a pattern counts as handled by somebody after its last declaration, and as declared lately.
HANDLED_SECONDS: Final = 180
LATELY_SECONDS: Final = 300

UNFINISHED: Final = ("pending", "blocked", "running", "unhandled")


@dataclass(slots=True, eq=False)
class Moment:
    """When a step happened: not before *lo*, not after *hi*, which is known at its end."""

    lo: int
    hi: int | None = None

    def later(self, micros: int) -> Moment:
        """Return the moment as a transaction sees it that was open while the test let time pass."""
        return self if not micros else Moment(self.lo + micros, None if self.hi is None else self.hi + micros)


class Draft(NamedTuple):
    """An event to be published; times in seconds from the beginning of its transaction."""

    type: str
    key: str | None = None
    delay: int = 0
    priority: int = 0
    dedup_key: str | None = None

    def __repr__(self) -> str:
        """Return what is not as usual."""
        told = [f"{name}={value!r}" for name, value in self._asdict().items() if name != "type" and value]
        return f"Draft({', '.join([repr(self.type), *told])})"


@dataclass(slots=True)
class Event:
    id: int
    draft: Draft
    began: Moment
    purged: bool = False

    @property
    def type(self) -> str:
        return self.draft.type


# The claim_seq of a delivery that was made after its event, until the database's choice is seen.
UNSEEN: Final = -1


@dataclass(slots=True)
class Delivery:
    """One row, as it should be. `due` and `finished` are what was seen, and checked, when they were written."""

    event_id: int
    group: str
    type: str
    key: str | None
    priority: int
    status: str
    due_from: Moment
    delay: int
    due: int | None = None
    finished: int | None = None
    worker: int | None = None
    claim_seq: int = 0
    attempt: int = 0
    lost: int = 0
    round: int = 1
    holds_key: bool = False
    handled: tuple[str, ...] | None = None
    errors: int = 0
    cancelled_in: int | None = None

    @property
    def place(self) -> tuple[int, str]:
        return self.event_id, self.group

    @property
    def name(self) -> str:
        return f"#{self.event_id}/{self.group}"

    @property
    def leads(self) -> bool:
        """Whether nothing else of its key may be let in."""
        return self.status in ("pending", "running") or self.holds_key

    def stored(self) -> tuple[object, ...]:
        """Return what the row should hold, in the order of `database.COMPARED`."""
        return (
            self.status,
            self.worker,
            self.claim_seq,
            self.attempt,
            self.lost,
            self.round,
            self.holds_key,
            self.handled,
            self.errors,
            self.key,
            self.type,
            self.priority,
        )

    def due_again(self, now: Moment, delay: int) -> None:
        self.due_from, self.delay, self.due = now, delay * SECOND, None


@dataclass(slots=True)
class Group:
    created_in: int
    max_running: int | None = None
    dead_holds_key: bool = False
    paused: bool = False


@dataclass(slots=True)
class Pattern:
    """A subscription; `waits_for` are the transactions that its backfill has still to wait for, None before a look."""

    since: int
    reaches_back: bool
    declared: int
    backfilled: bool = False
    waits_for: set[object] | None = None


@dataclass(slots=True)
class Worker:
    id: int
    groups: tuple[str, ...]
    alive: bool = True
    ended: bool = False


class View(NamedTuple):
    """What a transaction sees: who wants what, and which keys of which groups are taken."""

    patterns: dict[str, set[str]]
    taken: frozenset[tuple[str, str]]


@dataclass(slots=True, eq=False)
class Unit:
    """A publisher's transaction that is open. At REPEATABLE READ it goes on seeing what it saw first."""

    began: Moment
    snapshot: View | None
    passed: int = 0  # since it began
    events: list[Event] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)


def matches(pattern: str, event_type: str) -> bool:
    """Tell whether a pattern stands for a type, word by word."""

    def rest(words: Sequence[str], of: Sequence[str]) -> bool:
        if not words:
            return not of
        if words[0] == "#":
            return rest(words[1:], of) or (bool(of) and rest(words, of[1:]))
        return bool(of) and words[0] in ("*", of[0]) and rest(words[1:], of[1:])

    return rest(pattern.split("."), event_type.split("."))
