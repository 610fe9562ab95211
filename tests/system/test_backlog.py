"""A backlog is not walked from its beginning at each claim; what comes in behind the claims is found all the same."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, publish_events
from tests.system.bus import Sql, backfilled, finished, publish, running


async def in_a_backlog_without_end(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, **options: Any
) -> list[int]:
    """Publish events with *options*, due since yesterday, while claims go on; return the order of their handling.

    Each event of the backlog publishes another one, until all of them were handled.
    """
    handled: list[int] = []
    all_handled = asyncio.Event()
    claims_go_on = asyncio.Event()
    router = EventRouter()

    @router.on("filler")
    async def fill(ctx: EventContext, payload: dict[str, Any]) -> None:
        if payload["n"] == 50:
            claims_go_on.set()
        if not all_handled.is_set():
            await publish(sm, "filler", {"n": payload["n"] + 20})

    @router.on("late")
    async def late(ctx: EventContext, payload: dict[str, Any]) -> None:
        handled.append(payload["n"])
        if len(handled) == 3:
            all_handled.set()

    async with running(router, database, n_workers=2, max_attempts=1):
        await backfilled(sql)
        async with sm.session() as session:
            await publish_events(session, [{"type": "filler", "payload": {"n": n}} for n in range(20)])
            await session.commit()
        await asyncio.wait_for(claims_go_on.wait(), 10)
        yesterday = datetime.now(UTC) - timedelta(days=1)
        ids = [await publish(sm, "late", {"n": n}, run_at=yesterday, **options) for n in range(3)]
        await asyncio.wait_for(all_handled.wait(), 20)
        await finished(sql, *ids)
    return handled


async def test_what_is_due_before_the_backlog_is_found_while_it_lasts(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    assert sorted(await in_a_backlog_without_end(database, sm, sql)) == [0, 1, 2]


async def test_the_next_of_a_key_is_found_while_a_backlog_lasts(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    assert await in_a_backlog_without_end(database, sm, sql, key="k") == [0, 1, 2]
