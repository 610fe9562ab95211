"""Sends the statements, one connection for each line of work.

A `Line` keeps one connection of the pool while it works, replaces it when it fails, and lets no call wait for ever:
a half-open connection answers nothing, not even with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from time import monotonic
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgebus._runtime.events import selected_columns
from pgebus._runtime.faults import is_disconnect
from pgebus._runtime.leases import Fence, Lane, Lease, Place
from pgebus._runtime.outcome import Failure
from pgebus._runtime.statements import Statements
from pgebus._runtime.supervision import DATABASE_ERRORS
from pgebus.database import to_the_end
from pgebus.groups import Group

# Far above what any of our statements takes, far below what a person would wait for.
ANSWER_SECONDS: Final = 15.0
# For telling the server, over another connection, that nobody waits for the answer any more.
CANCEL_SECONDS: Final = 1.0
_T = TypeVar("_T")
FROM_THE_BEGINNING: Final[Mapping[Lane, Place]] = MappingProxyType({})
# How often a claim that lost a race for a key is simply repeated.
_KEY_TRIES: Final = 3


class Line:
    """One connection in AUTOCOMMIT, used by one coroutine at a time.

    Args:
        engine: Where it comes from; every statement is a transaction of its own.
        within: Seconds to wait for an answer before the connection is given up.
    """

    def __init__(self, engine: AsyncEngine, *, within: float = ANSWER_SECONDS) -> None:
        self._engine = engine
        self._within = within
        self._connection: AsyncConnection | None = None
        self._raw: asyncpg.Connection[asyncpg.Record] | None = None
        self._lock = asyncio.Lock()
        # When what is not answered yet was sent, on the monotonic clock.
        self.waiting_since: float | None = None

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """Return the rows of *sql*; committed when this returns, unknown when it raises a disconnect."""
        async with self._lock:
            self.waiting_since = monotonic()
            try:
                async with asyncio.timeout(self._within):
                    raw = self._raw if self._raw is not None else await self._connect()
                    return await raw.fetch(sql, *args)
            except BaseException as error:
                if not isinstance(error, asyncpg.PostgresError) or is_disconnect(error):
                    await self._drop(error)
                raise
            finally:
                self.waiting_since = None

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Callable[..., Awaitable[list[asyncpg.Record]]]]:
        """Run several statements in one transaction; yields what fetches. Committed at the end of the block."""
        async with self._lock:
            self.waiting_since = monotonic()
            try:
                async with asyncio.timeout(self._within):
                    raw = self._raw if self._raw is not None else await self._connect()
                    async with raw.transaction(isolation="read_committed"):
                        yield raw.fetch
            except BaseException as error:
                if not isinstance(error, asyncpg.PostgresError) or is_disconnect(error):
                    await self._drop(error)
                raise
            finally:
                self.waiting_since = None

    async def value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row, or None."""
        rows = await self.fetch(sql, *args)
        return rows[0][0] if rows else None

    async def close(self) -> None:
        """Give the connection back; the next statement takes another."""
        async with self._lock:
            connection, self._connection, self._raw = self._connection, None, None
            if connection is not None:
                await connection.close()

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        self._connection = await self._engine.connect()
        self._raw = raw = await driver_of(self._connection)
        return raw

    async def _drop(self, error: BaseException) -> None:
        connection, raw = self._connection, self._raw
        self._connection = self._raw = None
        await to_the_end(_discard(connection, raw, error))


async def give_up(raw: asyncpg.Connection[asyncpg.Record], error: BaseException) -> None:
    """Break a connection on which *error* was raised, so that nobody meets there what was not waited for.

    The driver asks the server to cancel a statement that was not answered in time, and is given a moment for it: a
    commit that waits for a standby does not notice that its client has gone, and each attempt would leave a backend
    behind. Cancelled, it is committed without the standby.
    """
    if isinstance(error, TimeoutError):
        with contextlib.suppress(*DATABASE_ERRORS):
            await raw.close(timeout=CANCEL_SECONDS)
    raw.terminate()  # at once: a polite close waits for the server that has just not answered


async def driver_of(connection: AsyncConnection) -> asyncpg.Connection[asyncpg.Record]:
    """Return the asyncpg connection below *connection*.

    Raises:
        asyncpg.InterfaceError: If there is none, because it was lost in between.
    """
    driver: asyncpg.Connection[asyncpg.Record] | None = (await connection.get_raw_connection()).driver_connection
    if driver is None:
        raise asyncpg.InterfaceError("The pool returned a connection that is closed already.")
    return driver


async def _unless_raced(claim: Callable[[], Awaitable[_T]]) -> _T:
    """Claim; again, at once, when a lower id of a key became visible between two claims and both were to run."""
    for _ in range(_KEY_TRIES):
        with contextlib.suppress(asyncpg.UniqueViolationError):
            return await claim()
    return await claim()


async def _discard(
    connection: AsyncConnection | None, raw: asyncpg.Connection[asyncpg.Record] | None, error: BaseException
) -> None:
    """Break it, and give its place in the pool back."""
    if raw is not None:
        await give_up(raw, error)
    if connection is not None:
        with contextlib.suppress(*DATABASE_ERRORS):  # it is being thrown away
            async with asyncio.timeout(5):
                await connection.invalidate()
                await connection.close()


# A key of a group of a channel.
KeyPlace: TypeAlias = tuple[str, str, str]


class Backfill(NamedTuple):
    """A pattern that is new, and above which id its events begin."""

    group: str
    pattern: str
    since: int
    created: str


class Store:
    """The verbs of the running machine, as calls on one line.

    Args:
        line: The connection to use.
        statements: The statements for the schema.
        channel: The channel that the worker serves.
    """

    def __init__(self, line: Line, statements: Statements, channel: str) -> None:
        self._line = line
        self._sql = statements
        self._channel = channel
        self._selected = ""

    def _claiming(self) -> Statements:
        """Return the statements with the columns of all subclasses of Event, also of one that was defined just now."""
        selected = selected_columns()
        if selected != self._selected:
            self._sql = Statements(self._sql.schema, selected)
            self._selected = selected
        return self._sql

    async def claim(
        self, worker_id: int, groups: Sequence[str], limit: int, places: Mapping[Lane, Place] = FROM_THE_BEGINNING
    ) -> list[Lease]:
        """Claim up to *limit* due deliveries, in the order in which they should start, from *places* on.

        When this raises, deliveries may have been claimed all the same: see `strays()`.
        """
        sql, arguments = self._claiming().claim, (worker_id, self._channel, list(groups), limit)
        if places:
            columns = [
                list(column) for column in zip(*((*lane, *place) for lane, place in places.items()), strict=True)
            ]
            rows = await self._claimed(self._claiming().claim_on, *arguments, *columns)
        else:
            rows = await self._claimed(sql, *arguments)
        rows.sort(key=lambda row: (row["lane"], row["due"], row["event_id"]))
        return [Lease.from_row(row, worker_id) for row in rows]

    async def _claimed(self, sql: str, *args: object) -> list[asyncpg.Record]:
        return await _unless_raced(lambda: self._line.fetch(sql, *args))

    async def claim_limited(
        self, worker_id: int, group: str, limit: int, *, suspect: bool = False
    ) -> list[Lease] | None:
        """Claim up to *limit* due deliveries of a limited group, as far as all workers together may run them.

        Returns:
            The leases; None when another worker is just doing that, or somebody has locked the group.
        """
        return await _unless_raced(lambda: self._claim_limited(worker_id, group, limit, suspect=suspect))

    async def _claim_limited(self, worker_id: int, group: str, limit: int, *, suspect: bool) -> list[Lease] | None:
        sql = self._claiming()
        claim = sql.claim_limited_suspect if suspect else sql.claim_limited
        async with self._line.transaction() as fetch:
            rows = await fetch(sql.lock_group, self._channel, group)
            if not rows:
                return None
            if (most := rows[0]["max_running"]) is not None:
                running = (await fetch(sql.count_running, self._channel, group))[0]["count"]
                limit = min(limit, most - running)
            rows = await fetch(claim, worker_id, self._channel, [group], limit) if limit > 0 else []
        rows.sort(key=lambda row: (row["lane"], row["due"], row["event_id"]))
        return [Lease.from_row(row, worker_id) for row in rows]

    async def limited_groups(self, groups: Sequence[str]) -> frozenset[str]:
        """Return those of *groups* that may run only so many deliveries at once."""
        rows = await self._line.fetch(self._sql.limited_groups, self._channel, list(groups))
        return frozenset(row["consumer_group"] for row in rows)

    async def claim_suspect(self, worker_id: int, groups: Sequence[str]) -> list[Lease]:
        """Claim one due delivery in whose hands a worker died, if there is one."""
        rows = await self._claimed(self._claiming().claim_suspect, worker_id, self._channel, list(groups), 1)
        return [Lease.from_row(row, worker_id) for row in rows]

    async def claim_lost_once(self, worker_id: int, groups: Sequence[str], limit: int) -> list[Lease]:
        """Claim up to *limit* due deliveries in whose hands one worker died."""
        rows = await self._claimed(self._claiming().claim_lost_once, worker_id, self._channel, list(groups), limit)
        rows.sort(key=lambda row: (row["lane"], row["due"], row["event_id"]))
        return [Lease.from_row(row, worker_id) for row in rows]

    async def suspects(self, groups: Sequence[str]) -> bool:
        """Return whether such a delivery is due."""
        return bool(await self._line.value(self._sql.suspects, self._channel, list(groups)))

    async def still_held(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        """Return (event id, group) of those *fences*, all of one worker, that still hold."""
        return await self._batch(self._sql.still_held, list(fences))

    async def adopt(self, worker_id: int, group: str, event_type: str, limit: int) -> tuple[int, list[Lease]]:
        """Take up to *limit* unhandled deliveries of one type; return how many, and the leases of those to run now."""
        rows = await self._claimed(self._claiming().adopt, worker_id, self._channel, group, event_type, limit)
        rows.sort(key=lambda row: row["event_id"])
        return len(rows), [Lease.from_row(row, worker_id) for row in rows if row["status"] == "running"]

    async def unhandled_types(self, groups: Sequence[str]) -> list[tuple[str, str]]:
        """Return (group, type) of all unhandled deliveries of *groups*."""
        rows = await self._line.fetch(self._sql.unhandled_types, self._channel, list(groups))
        return [(row["consumer_group"], row["type"]) for row in rows]

    async def strays(self, worker_id: int) -> list[Fence]:
        """Return the fence of everything that runs in the name of *worker_id*."""
        rows = await self._line.fetch(self._sql.leases_of, worker_id)
        return [Fence(row["event_id"], row["consumer_group"], row["claim_seq"], worker_id) for row in rows]

    async def next_due(self, groups: Sequence[str]) -> tuple[float, float | None]:
        """Return the database's clock and the next due time, both in seconds since the epoch."""
        row = (await self._line.fetch(self._sql.next_due, self._channel, list(groups)))[0]
        return row["clock"], row["due"]

    async def complete(self, leases: Iterable[Lease]) -> set[tuple[int, str]]:
        """Complete *leases*, all of one worker; return (event id, group) of those whose fence held."""
        batch = list(leases)
        keyed = any(lease.keyed for lease in batch)
        sql = self._sql.complete_keyed if keyed else self._sql.complete
        return await self._batch(sql, [lease.fence for lease in batch])

    async def forget(self, leases: Iterable[Lease]) -> set[tuple[int, str]]:
        """Complete *leases* of groups that keep no history: delete them, but for what a backfill might make again."""
        batch = list(leases)
        keyed = any(lease.keyed for lease in batch)
        sql = self._sql.forget_keyed if keyed else self._sql.forget
        return await self._batch(sql, [lease.fence for lease in batch])

    async def release(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        """Give leases of one worker back, uncounted; return (event id, group) of those whose fence held."""
        return await self._batch(self._sql.release, list(fences))

    async def reschedule(
        self,
        fence: Fence,
        *,
        delay: float,
        give_back: int,
        handled: Sequence[str],
        entry: dict[str, Any] | None,
    ) -> bool:
        """Make a delivery pending again after *delay* seconds; return whether the fence held."""
        return await self._one(
            self._sql.reschedule, *fence, _json(entry), delay, give_back, list(handled) if handled else None
        )

    async def bury(self, fence: Fence, *, handled: Sequence[str], entry: dict[str, Any] | None) -> bool:
        """Make a delivery dead; return whether the fence held."""
        return await self._one(self._sql.bury, *fence, _json(entry), list(handled) if handled else None)

    async def unhandle(self, fence: Fence) -> bool:
        """Put a delivery aside for a worker that knows its type; return whether the fence held."""
        return await self._one(self._sql.unhandle, *fence)

    async def owners(self) -> list[asyncpg.Record]:
        """Return worker_id, alive, owns, fresh for every worker that may have to be recovered."""
        return await self._line.fetch(self._sql.owners)

    async def recover(self, worker_ids: Sequence[int]) -> int:
        """Take back up to 1,000 leases of dead workers; return how many."""
        return len(await self._line.fetch(self._sql.recover, list(worker_ids)))

    async def set_idle(self, worker_id: int, idle: bool) -> None:
        """Say whether this worker wants to be notified."""
        await self._line.fetch(self._sql.set_idle, worker_id, idle)

    async def sign_off(self, worker_id: int) -> None:
        """Say that this worker has ended."""
        await self._line.fetch(self._sql.sign_off, worker_id)

    async def declare_groups(self, groups: Sequence[Group], *, configure: bool) -> bool:
        """Write *groups*; what was declared of those that are there already only if *configure* says so.

        Returns:
            Whether that is done; somebody may have locked one of them.
        """
        names = [group.name for group in groups]
        options = [group.max_running for group in groups], [group.dead_holds_key for group in groups]
        await self._line.fetch(self._sql.ensure_groups, self._channel, names, *options)
        if not configure:
            return True
        return not await self._line.value(self._sql.configure_groups, self._channel, names, *options)

    async def subscribe(self, patterns: Sequence[tuple[str, str, str]]) -> None:
        """Write (group, pattern, start) triples; what is there already stays as it is."""
        ordered = sorted(set(patterns))
        columns = [list(column) for column in zip(*ordered, strict=True)]
        await self._line.fetch(self._sql.subscribe, self._channel, *columns, self._sql.schema)
        await self._line.fetch(self._sql.declare, self._channel, *columns[:2])

    async def backfills(self) -> list[Backfill]:
        """Return the patterns that have not got their earlier events yet."""
        rows = await self._line.fetch(self._sql.backfills, self._channel)
        return [Backfill(row["consumer_group"], row["pattern"], row["since_event_id"], row["created"]) for row in rows]

    async def in_flight(self) -> frozenset[tuple[str, bool]]:
        """Return who is in a transaction now, and whether it is a prepared one."""
        return frozenset((row["who"], row["prepared"]) for row in await self._line.fetch(self._sql.in_flight))

    async def last_event_id(self) -> int:
        """Return the highest id of an event that is there."""
        return int(await self._line.value(self._sql.last_event_id))

    async def backfill(
        self, what: Backfill, above: int, up_to: int, limit: int
    ) -> tuple[int, int | None, int | None] | None:
        """Make the deliveries that up to *limit* events above an id lack.

        Returns:
            How many deliveries; the id of the last event that was looked at, None when there was none; and the first
            id that has to be looked at again, because somebody had locked the event. None, and nothing was done, where
            the pattern is not to be backfilled any more, or somebody has locked it.
        """
        arguments = self._channel, what.group, what.pattern, above, up_to, limit, what.created
        row = (await self._line.fetch(self._sql.backfill, *arguments))[0]
        return (row["made"], row["reached"], row["missed"]) if row["there"] else None

    async def backfilled(self, what: Backfill) -> None:
        """Say that a pattern has got its earlier events."""
        await self._line.fetch(self._sql.backfilled, self._channel, what.group, what.pattern, what.created)

    async def sweep(self, behind: KeyPlace, limit: int) -> tuple[int, KeyPlace | None]:
        """Promote keys that lost their head unseen, looking at up to *limit* keys behind a place.

        Returns:
            How many, and where it ended; None when that was the end.
        """
        row = (await self._line.fetch(self._sql.sweep, *behind, limit))[0]
        ended = None if row["key"] is None else (row["channel"], row["consumer_group"], row["key"])
        return row["promoted"], ended

    async def let_go(self) -> None:
        """Free the keys that unhandled deliveries hold for processes that are not there any more."""
        await self._line.fetch(self._sql.let_go)

    async def serve(self, worker_id: int, groups: Sequence[str]) -> None:
        """Say which groups this worker serves by now."""
        await self._line.fetch(self._sql.serve, worker_id, list(groups))

    async def finished(self, older_than: float, after: int, limit: int) -> list[asyncpg.Record]:
        """Return *limit* deliveries that were finished more than *older_than* seconds ago, behind a place.

        Args:
            older_than: Seconds.
            after: A time in microseconds since the epoch.
            limit: How many; more, where several were finished at the moment of the last one.

        Returns:
            Rows (event_id, type, ours, place, old, young) in the order of their places.
        """
        return await self._line.fetch(self._sql.finished, older_than, after, limit, self._channel)

    async def died(self, group: str, older_than: float, after: int, limit: int) -> list[asyncpg.Record]:
        """The same for those of one group that are dead."""
        return await self._line.fetch(self._sql.died, older_than, after, limit, self._channel, group)

    async def left_unhandled(
        self, group: str, event_type: str, older_than: float, after: int, limit: int
    ) -> list[asyncpg.Record]:
        """The same for those of one type that are unhandled, *after* an event id; also what is not `old` yet."""
        sql = self._sql.unhandled
        return await self._line.fetch(sql, older_than, after, limit, self._channel, group, event_type)

    async def bare(self, older_than: float, after: int, limit: int) -> list[asyncpg.Record]:
        """The same for *limit* events *after* an id: those without a delivery are `old`, or not yet."""
        return await self._line.fetch(self._sql.bare, older_than, after, limit, self._channel)

    async def groups_with(self, status: Literal["dead", "unhandled"]) -> list[str]:
        """Return the groups that have deliveries of this status."""
        sql = self._sql.groups_with_dead if status == "dead" else self._sql.groups_with_unhandled
        return [row["name"] for row in await self._line.fetch(sql, self._channel)]

    async def remove(self, kept: Mapping[int, float | None], *, dead: float | None, unhandled: float | None) -> int:
        """Delete those of some events of which no delivery has to be kept any longer, in one short transaction.

        Args:
            kept: Event ids, and the seconds for which what is finished of them is kept; None, for ever.
            dead: The seconds for which what is dead is kept; None, for ever.
            unhandled: The same for what is unhandled.

        Returns:
            How many are gone. One that is locked, or of which a delivery is, is passed over.
        """
        async with self._line.transaction() as fetch:
            rows = await fetch(self._sql.lock_ripe, list(kept), list(kept.values()), dead, unhandled)
            locked = {row["id"]: kept[row["id"]] for row in rows}
            if not locked:
                return 0
            rows = await fetch(self._sql.delete_ripe, list(locked), list(locked.values()), dead, unhandled)
        return int(rows[0]["gone"])

    async def declare_retention(self, worker_id: int, retention: str) -> None:
        """Write down, as JSON, how long this worker would keep what."""
        await self._line.fetch(self._sql.declare_retention, worker_id, retention)

    async def retentions(self) -> tuple[int, list[str]]:
        """Return the database's clock in microseconds since the epoch, and what the workers that run would keep."""
        row = (await self._line.fetch(self._sql.retentions, self._channel))[0]
        return row["now"], row["retentions"]

    async def prune_workers(self) -> None:
        """Delete the rows of workers that ended a day ago."""
        await self._line.fetch(self._sql.prune_workers)

    async def _one(self, sql: str, *args: object) -> bool:
        return bool((await self._line.fetch(sql, *args))[0]["rows"])

    async def _batch(self, sql: str, fences: list[Fence]) -> set[tuple[int, str]]:
        # Sorted, so that two batches lock in one order.
        fences = sorted(fences)
        rows = await self._line.fetch(
            sql,
            [f.event_id for f in fences],
            [f.group for f in fences],
            [f.claim_seq for f in fences],
            fences[0].worker_id,
        )
        return {(row["event_id"], row["consumer_group"]) for row in rows}


def entry_of(failure: Failure | None, *, attempt: int, worker_id: int) -> dict[str, Any] | None:
    """Return the entry for `errors`, or None."""
    return None if failure is None else failure.entry(attempt=attempt, worker_id=worker_id)


def _json(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else json.dumps(entry)
