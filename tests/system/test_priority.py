"""Of what is due, the lowest number is claimed first; what is due later costs a claim nothing, whatever its number."""

from __future__ import annotations

import json
from typing import Any

from pgebus import DatabaseSessionManager, DatabaseSettings, Event, EventContext, EventRouter, publish_events
from pgebus._runtime.statements import Statements
from tests.system.bus import Sql, finished, publish, running
from tests.system.waiting import until


async def test_the_lowest_number_comes_first_and_then_what_is_due_longest(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """One at a time, in two groups, and without holding anything ahead."""
    seen: dict[str, list[int]] = {"one": [], "two": []}
    router = EventRouter()
    for group in seen:

        @router.on("a", group=group, name=group)
        async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
            seen[ctx.group].append(payload["n"])

    async with running(router, database):
        await finished_all(sql, 0)
    async with sm.session() as session:
        numbers = [3, 0, 9, 3, 0, 5]
        await publish_events(
            session, [Event(type="a", payload={"n": n}, priority=level) for n, level in enumerate(numbers)]
        )
        await session.commit()
    async with running(router, database, n_workers=1, max_attempts=1):
        await finished_all(sql, 12)
    assert seen == {"one": [1, 4, 0, 3, 5, 2], "two": [1, 4, 0, 3, 5, 2]}


async def finished_all(sql: Sql, count: int) -> None:
    await until(lambda: sql.fetchval("SELECT count(*) = 2 FROM pgebus.subscriptions WHERE backfilled_at IS NOT NULL"))
    await until(lambda: sql.fetchval("SELECT count(*) = $1 FROM pgebus.deliveries WHERE status = 'completed'", count))


async def test_what_is_due_later_costs_a_claim_nothing(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Buffers that are touched, with 20,000 for tomorrow at each priority; with statistics and without."""
    router = EventRouter()

    @router.on("a")
    async def handle(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    async with running(router, database):
        await finished(sql, await publish(sm, "a"))

    async def buffers() -> int:
        transaction = sql.transaction()
        await transaction.start()
        await sql.execute("INSERT INTO pgebus.events (type, priority) SELECT 'a', n FROM generate_series(0, 9) n")
        claim = Statements("pgebus").claim
        plan = await sql.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {claim}", 1, "events", ["default"], 10)
        await transaction.rollback()
        found = json.loads(plan)[0]["Plan"]
        return int(found["Shared Hit Blocks"] + found["Shared Read Blocks"])

    empty = await buffers()
    await sql.execute(
        "INSERT INTO pgebus.events (type, priority, run_at)"
        " SELECT 'a', p, now() + interval '1 day' FROM generate_series(0, 9) p, generate_series(1, 20000)"
    )
    fresh = await buffers()
    await sql.execute("VACUUM ANALYZE pgebus.deliveries")
    assert max(fresh, await buffers()) <= empty * 2 + 50
