"""What happened, as plain data: what publishers wrote down outside PostgreSQL, and what is in its tables.

Judges nothing: that is the checker's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple


class Outcome(StrEnum):
    """What a publisher knows of one of its transactions."""

    OK = "ok"
    """COMMIT was confirmed."""
    FAILED = "failed"
    """It was rolled back, or lost before COMMIT was sent."""
    UNKNOWN = "unknown"
    """The answer to COMMIT never came, or the publisher was killed."""


class Unit(NamedTuple):
    """One transaction of a publisher: the events of the numbers *first* to *last*, and their business rows."""

    first: int
    last: int
    outcome: Outcome
    business: bool = True
    """Whether business rows belong to it; `EventPublisher` writes events alone."""


class EventRow(NamedTuple):
    """One row of `events`."""

    id: int
    number: int
    type: str
    key: str | None = None
    run_at: float = 0.0


class DeliveryRow(NamedTuple):
    """One row of `deliveries`."""

    event_id: int
    group: str
    status: str
    attempt: int = 1
    claim_seq: int = 1
    lost: int = 0


class Run(NamedTuple):
    """A handler was here: an effect, which commits with the delivery, or a start, which was written apart from it."""

    position: int
    """Grows in the order of writing."""
    event_id: int
    group: str
    handler: str
    claim_seq: int = 1
    at: float = float("inf")
    """Seconds since the epoch by the database's clock; infinite where that is not known."""


@dataclass(frozen=True)
class Promise:
    """What a group owes an event of some type.

    Attributes:
        group: The consumer group.
        effects: Names of the transactional handlers: one effect each, or none.
        starts: Names of the other handlers: one start each, or more.
        status: In what it has to end.
    """

    group: str
    effects: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    status: str = "completed"


@dataclass(frozen=True)
class Rules:
    """What is owed.

    Attributes:
        promises: For each event type.
        accounts: How many balances there are; an event belongs to that of its number.
        bumping: Handlers that add one to the balance.
        follow_up: (type, of which type, group): an event of *type* with the number negated is published by the
            transactional handlers of *group*, where the number is divisible by `every`.
        every: See there.
        max_attempts: No delivery may have more.
    """

    promises: Mapping[str, Sequence[Promise]]
    accounts: int = 1
    bumping: frozenset[str] = frozenset()
    follow_up: tuple[str, str, str] | None = None
    every: int = 1
    max_attempts: int = 100


@dataclass(frozen=True)
class History:
    """Everything that is known when the dust has settled.

    Attributes:
        units: The publishers' ledgers.
        business: The number of each business row.
        events: The events.
        deliveries: The deliveries.
        effects: Written by transactional handlers, in their transactions.
        starts: Written by other handlers, apart from any transaction of the bus.
        balances: For each account, how often it was bumped.
        left: What should not be there any more, by name, and how much of it is: backends, locks, processes.
    """

    units: Sequence[Unit] = ()
    business: Sequence[int] = ()
    events: Sequence[EventRow] = ()
    deliveries: Sequence[DeliveryRow] = ()
    effects: Sequence[Run] = ()
    starts: Sequence[Run] = ()
    balances: Mapping[int, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)


UNFINISHED: Final = frozenset({"pending", "blocked", "running", "unhandled"})
