"""A running bus for a test: its handlers, its tables, and questions to ask of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg

from pgebus import DatabaseSessionManager, DatabaseSettings, Event, EventRouter, EventSystem, Settings, publish_event
from tests.system.waiting import until

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# Short enough for a test that retries, long enough that nothing is found by polling before it is by a wake-up.
QUICK = {"backoff_first_seconds": 0.01, "backoff_ceiling_seconds": 0.05, "poll_interval_seconds": 30.0}


def settings(database: DatabaseSettings, **event_system: Any) -> Settings:
    """Return settings with short backoff."""
    return Settings(database=database, event_system={**QUICK, **event_system})


@asynccontextmanager
async def running(router: EventRouter, database: DatabaseSettings, **event_system: Any) -> AsyncIterator[EventSystem]:
    """Run a system inside the block."""
    async with EventSystem(router, settings(database, **event_system)) as system:
        yield system


async def publish(
    sm: DatabaseSessionManager, event_type: str, payload: dict[str, Any] | None = None, **options: Any
) -> int:
    """Publish one event in a transaction of its own; return its id."""
    async with sm.session() as session:
        event: Event = await publish_event(session, event_type, payload or {}, "events", **options)
        await session.commit()
        return event.id


async def delivery(sql: Sql, event_id: int) -> asyncpg.Record:
    """Return the one delivery of an event."""
    rows = await sql.fetch("SELECT * FROM pgebus.deliveries WHERE event_id = $1", event_id)
    assert len(rows) == 1, rows
    return rows[0]


async def finished(sql: Sql, *event_ids: int, status: str = "completed", within: float = 10.0) -> None:
    """Wait until the deliveries of all *event_ids* have *status*."""

    async def check() -> bool:
        count = await sql.fetchval(
            "SELECT count(*) FROM pgebus.deliveries WHERE event_id = ANY ($1) AND status = $2", list(event_ids), status
        )
        return bool(count == len(event_ids))

    try:
        await until(check, within)
    except AssertionError:
        rows = await sql.fetch(
            "SELECT event_id, status, attempt, claim_seq, lost, left(errors::text, 300) AS errors "
            "FROM pgebus.deliveries WHERE event_id = ANY ($1) AND status <> $2 LIMIT 5",
            list(event_ids),
            status,
        )
        raise AssertionError(f"not {status} within {within} s: {[dict(row) for row in rows]}") from None


async def forgotten(sql: Sql, *event_ids: int, within: float = 10.0) -> None:
    """Wait until nothing is left of the deliveries of *event_ids*, whose groups keep no history."""
    left = "SELECT count(*) = 0 FROM pgebus.deliveries WHERE event_id = ANY ($1)"
    await until(lambda: sql.fetchval(left, list(event_ids)), within)


async def backfilled(sql: Sql) -> None:
    """Wait until no pattern lacks earlier events."""
    await until(
        lambda: sql.fetchval("SELECT count(*) > 0 AND bool_and(backfilled_at IS NOT NULL) FROM pgebus.subscriptions")
    )


async def rounds(sql: Sql, count: int = 2) -> None:
    """Wait until the maintenance has come round *count* times: after two, all of it was done once in between.

    A key of nobody's is made to wait for nothing, which is for the sweep to find.
    """
    for _ in range(count):
        await sql.execute(
            "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status)"
            " VALUES (-1, now(), 'nowhere', 'nobody', 'nothing', 'canary', 'blocked')"
        )
        await until(
            lambda: sql.fetchval("DELETE FROM pgebus.deliveries WHERE event_id = -1 AND status = 'pending' RETURNING 1")
        )


@asynccontextmanager
async def in_flight(sql: Sql, isolation: Any = "repeatable_read") -> AsyncIterator[None]:
    """Hold a transaction open on *sql* in the block, for which a backfill has to wait; rolled back at its end."""
    transaction = sql.transaction(isolation=isolation)
    await transaction.start()
    await sql.fetchval("SELECT count(*) FROM pgebus.subscriptions")
    yield
    await transaction.rollback()
