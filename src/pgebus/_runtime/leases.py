"""What a worker holds: its leases, and the count of them.

Bookkeeping in memory only; PostgreSQL decides who owns what, by the fence that every write carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg


class Fence(NamedTuple):
    """What every write on a running delivery must match; `status = 'running'` is the fifth part of it."""

    event_id: int
    group: str
    claim_seq: int
    worker_id: int


class Lane(NamedTuple):
    """Deliveries that are claimed in the order of their due times: those of one group and priority."""

    group: str
    priority: int


class Place(NamedTuple):
    """A delivery's place in its lane: when it was due, in microseconds since the epoch, and its event's id."""

    due: int
    event_id: int


@dataclass(slots=True, eq=False)  # not frozen: that would take three times as long to make
class Lease:
    """The right to finish one delivery, and what its claim brought along.

    Attributes:
        fence: Proof of the claim.
        type: The event type.
        keyed: Whether finishing it may promote the next delivery of its key.
        attempt: This execution, counted from 1; it was counted at the claim.
        lost: How many workers have died with this delivery in hand.
        handled: Handlers that had succeeded in an earlier attempt.
        row: The claimed row, with the columns of the event; `payload` and `headers` still as text.
    """

    fence: Fence
    type: str
    keyed: bool
    attempt: int
    lost: int
    handled: tuple[str, ...]
    row: asyncpg.Record

    @property
    def lane(self) -> Lane:
        """The group and the priority that it was claimed at."""
        return Lane(self.fence.group, self.row["lane"])

    @property
    def place(self) -> Place:
        """Its place in the lane."""
        return Place(self.row["due"], self.fence.event_id)

    @classmethod
    def from_row(cls, row: asyncpg.Record, worker_id: int) -> Lease:
        """Make the lease of a row that a claim of *worker_id* returned."""
        handled = row["handled"]
        return cls(
            Fence(row["event_id"], row["consumer_group"], row["claim_seq"], worker_id),
            row["delivery_type"],
            row["delivery_key"] is not None,
            row["attempt"],
            row["lost"],
            tuple(handled) if handled else (),
            row,
        )


class Holdings:
    """The leases whose outcome PostgreSQL has not confirmed yet, running and waiting ones alike."""

    def __init__(self) -> None:
        self._held: dict[Fence, Lease] = {}
        self._of_group: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, fence: object) -> bool:
        return fence in self._held

    def __iter__(self) -> Iterator[Lease]:
        return iter(tuple(self._held.values()))

    def add(self, leases: Iterable[Lease]) -> None:
        """Take note of freshly claimed *leases*."""
        for lease in leases:
            if self._held.get(lease.fence) is None:
                self._of_group[lease.fence.group] += 1
            self._held[lease.fence] = lease

    def of_group(self, group: str) -> int:
        """Return how many of them are of *group*."""
        return self._of_group[group]

    def drop(self, lease: Lease) -> None:
        """Forget *lease*: its outcome is written, or it is somebody else's."""
        if self._held.pop(lease.fence, None) is not None:
            self._of_group[lease.fence.group] -= 1
