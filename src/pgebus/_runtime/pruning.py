"""Removes what has been kept long enough: a bit each round, in short transactions.

A pass goes through what is finished in the order in which it was finished, and looks at nothing twice: neither at what
another group still holds, nor at what is kept longer. The next pass goes on where the last one has ended. That is
enough, because an event can go when the last of its deliveries can, and that one is met at its own place. What it
cannot know of, such as what was locked, is made up for by a pass from the beginning, once an hour.

A group that keeps no history leaves nothing that could be met. So where a worker has one, there is a pass through the
events as well, in the order of their ids, for those that no delivery is left of; and an event of which such a delivery
was the last is found, if not on the way, by the pass from the beginning.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Final, TypeAlias

import asyncpg

from pgebus._runtime.presence import Presence
from pgebus._runtime.retention import Keeping, Retention
from pgebus._runtime.store import Store

logger = logging.getLogger(__name__)

PRUNE_SECONDS: Final = 60.0
PRUNE_BATCH: Final = 1_000
# How long a round goes on; rounds come each second.
ROUND_SECONDS: Final = 0.5
# A deletion that takes longer is followed by smaller ones: foreign keys and triggers of the application's may be slow,
# and the rest of the maintenance waits meanwhile.
LONG_SECONDS: Final = 1.0
FROM_THE_BEGINNING_SECONDS: Final = 3600.0
# So much is looked at again: what was finished before the last pass, and committed after it.
OVERLAP_MICROSECONDS: Final = 600_000_000
BEGINNING: Final = 0

Look: TypeAlias = Callable[[int, int], Awaitable[list[asyncpg.Record]]]


@dataclass
class Walk:
    """One way through the deliveries, or through the events, in one order.

    Attributes:
        look: Returns what comes behind a place.
        what: What is looked for, as logs call it.
        term: Only types that are kept for so long are taken; None takes all.
        after: The place of the last delivery that was looked at.
        batch: What was looked at there and is still to be deleted.
    """

    look: Look
    what: str
    term: float | None = None
    after: int = BEGINNING
    batch: Batch | None = None


@dataclass
class Batch:
    """What a look has found, which may take more than one round to delete.

    Attributes:
        kept: Event ids, and the seconds for which what is finished of them is kept.
        types: The types of these events.
        parts: The ids that are still to be tried, in the order in which they are; each part in one transaction.
        after: The place of the last delivery that was looked at, or None.
        more: Whether there may be more behind it.
    """

    kept: Mapping[int, float | None]
    types: Mapping[int, str]
    after: int | None
    more: bool
    parts: deque[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = deque([list(self.kept)] if self.kept else [])


class Pruner:
    """Prunes the events of the worker's channel.

    Args:
        store: On the connection of the maintenance.
        presence: Who this worker is.
        retention: What this worker was told.
        forgets: Returns whether it has a group that keeps no history.
    """

    def __init__(
        self, store: Store, presence: Presence, retention: Retention, *, forgets: Callable[[], bool] = lambda: False
    ) -> None:
        self._store = store
        self._presence = presence
        self._retention = retention
        self._forgets = forgets
        self._declared: tuple[int, Retention] | None = None
        self._said: frozenset[str] = frozenset()
        self._keeping = Keeping([retention])
        self._reached: dict[tuple[str, float], int] = {}
        self._walks: deque[Walk] = deque()
        self._now = 0
        self._next_at = monotonic() + PRUNE_SECONDS
        self._whole_at = monotonic()
        self._refused: set[str] = set()
        self._size = PRUNE_BATCH  # of how many events a part is, at most

    async def round(self) -> None:
        """Say what this worker keeps; and when it is time, go on for a while."""
        worker_id = self._presence.worker_id
        self._retention = replace(self._retention, forgets=self._forgets())
        if worker_id is not None and (worker_id, self._retention) != self._declared and self._presence.here:
            await self._store.declare_retention(worker_id, self._retention.to_json())
            self._declared = worker_id, self._retention
        if monotonic() < self._next_at or self._declared is None:
            return
        until = monotonic() + ROUND_SECONDS
        if self._walks and frozenset((await self._store.retentions())[1]) != self._said:
            self._walks.clear()  # a pass may last for hours, and somebody else would keep more, or less, by now
        if not self._walks:
            await self._store.prune_workers()
            if not await self._begin():
                self._next_at = monotonic() + PRUNE_SECONDS
                return
        while self._walks:
            if not await self._step(self._walks[0], until):
                self._walks.popleft()
            if monotonic() >= until and self._walks:
                return
        self._next_at = monotonic() + PRUNE_SECONDS

    async def _begin(self) -> bool:
        """Learn what the others keep, and set out; return whether that is known."""
        self._now, said = await self._store.retentions()
        try:
            others = [Retention.from_json(text) for text in sorted(set(said))]
        except ValueError as error:
            logger.warning("Nothing is pruned while a worker runs whose retention is not understood: %s.", error)
            return False
        if frozenset(said) != self._said or monotonic() >= self._whole_at:
            self._said = frozenset(said)
            self._whole_at = monotonic() + FROM_THE_BEGINNING_SECONDS
            self._keeping = Keeping([self._retention, *others])
            self._reached.clear()
            await self._look_for_the_kept()
        self._refused.clear()
        self._walks.extend(self._walk_of(term) for term in self._keeping.terms)
        if self._keeping.forgets:
            self._walks.extend(self._walk_of_events(term) for term in self._keeping.terms)
        return True

    def _walk_of(self, term: float) -> Walk:
        # A transaction may have been long about the commit of what it finished.
        after = min(self._reached.get(("finished", term), BEGINNING), self._now - OVERLAP_MICROSECONDS)

        async def look(after: int, limit: int) -> list[asyncpg.Record]:
            return await self._store.finished(term, after, limit)

        return Walk(look, "finished", term, after)

    def _walk_of_events(self, term: float) -> Walk:
        async def look(after: int, limit: int) -> list[asyncpg.Record]:
            return await self._store.bare(term, after, limit)

        return Walk(look, "bare", term, self._reached.get(("bare", term), BEGINNING))

    async def _look_for_the_kept(self) -> None:
        """Set out for what is dead or unhandled, too: it is rare, and in no hurry."""
        store, dead, unhandled = self._store, self._keeping.dead, self._keeping.unhandled
        if dead is not None:
            for group in await store.groups_with("dead"):
                self._walks.append(Walk(_look_at_dead(store, group, dead), "dead"))
        if unhandled is not None:
            for group, event_type in await store.unhandled_types(await store.groups_with("unhandled")):
                self._walks.append(Walk(_look_at_unhandled(store, group, event_type, unhandled), "unhandled"))

    async def _step(self, walk: Walk, until: float) -> bool:
        """Take one batch, or as much of it as there is time for; return whether there may be more."""
        batch = walk.batch = walk.batch or await self._look(walk)
        gone: Counter[str] = Counter()
        total = 0
        try:
            while batch.parts:
                part = batch.parts.popleft()
                if len(part) > self._size:
                    batch.parts.appendleft(part[self._size :])
                    part = part[: self._size]
                if removed := await self._remove(batch, part):
                    total += removed
                    gone.update(batch.types[event_id] for event_id in part)
                if batch.parts and monotonic() >= until:
                    return True
        finally:
            if total and walk.term is None:
                logger.warning(
                    "Events deleted that were %s, because their retention is over: %d; of the types %s.",
                    walk.what,
                    total,
                    ", ".join(f"{name} ({count})" for name, count in gone.most_common(5)),
                )
        walk.batch = None
        if batch.after is not None:
            walk.after = batch.after
            if walk.term is not None:
                self._reached[walk.what, walk.term] = walk.after
        return batch.more

    async def _look(self, walk: Walk) -> Batch:
        rows = await walk.look(walk.after, PRUNE_BATCH)
        kept = {row["event_id"]: self._keeping.of(row["type"]) for row in rows if row["ours"] and row["old"]}
        if walk.term is not None:
            kept = {event_id: seconds for event_id, seconds in kept.items() if seconds == walk.term}
        return Batch(
            kept,
            {row["event_id"]: row["type"] for row in rows},
            # What is young is looked at again, when it is old.
            after=next((row["place"] for row in reversed(rows) if not row["young"]), None),
            # Ids grow with time: behind one that is young, all are.
            more=len(rows) >= PRUNE_BATCH and not rows[-1]["young"],
        )

    async def _remove(self, batch: Batch, part: list[int]) -> int:
        """Delete this part; where that is refused, or takes too long, put its halves back, or pass over the one."""
        began = monotonic()
        kept = {event_id: batch.kept[event_id] for event_id in part}
        try:
            gone = await self._store.remove(kept, dead=self._keeping.dead, unhandled=self._keeping.unhandled)
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.PLPGSQLError, asyncpg.QueryCanceledError) as error:
            # A foreign key of the application's, or a trigger: no reason for the rest of the maintenance to fail.
            half = len(part) // 2
            if half:
                batch.parts.extendleft((part[half:], part[:half]))
            else:
                self._refuse(error)
            if isinstance(error, asyncpg.QueryCanceledError):
                # The rest of the maintenance has waited for as long as a statement may last; it comes first now.
                self._size = max(1, half)
                self._next_at = monotonic() + PRUNE_SECONDS
            return 0
        took = monotonic() - began
        if took > LONG_SECONDS:
            self._size = max(1, len(part) // 2)
        elif took < LONG_SECONDS / 4:
            self._size = min(PRUNE_BATCH, max(self._size, 2 * len(part)))
        return gone

    def _refuse(self, error: asyncpg.PostgresError) -> None:
        if isinstance(error, (asyncpg.ForeignKeyViolationError, asyncpg.RestrictViolationError)):
            why = f"rows of table {error.table_name!r} refer to them"
        elif isinstance(error, asyncpg.QueryCanceledError):
            why = "to delete one of them takes longer than a statement may last"
        else:
            why = f"the database refuses to delete them ({type(error).__name__})"
        if why not in self._refused:
            self._refused.add(why)
            logger.warning("Events are kept, because %s.", why)


def _look_at_dead(store: Store, group: str, seconds: float) -> Look:
    async def look(after: int, limit: int) -> list[asyncpg.Record]:
        return await store.died(group, seconds, after, limit)

    return look


def _look_at_unhandled(store: Store, group: str, event_type: str, seconds: float) -> Look:
    async def look(after: int, limit: int) -> list[asyncpg.Record]:
        return await store.left_unhandled(group, event_type, seconds, after, limit)

    return look
