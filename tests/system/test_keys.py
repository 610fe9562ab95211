"""Order per key: never two of a key at once, and each in the order of the ids, through whatever happens to them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    Group,
    Reject,
    Retry,
    RetryPolicy,
    Snooze,
    publish_events,
)
from pgebus._runtime.statements import Statements
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.conftest import Spawn
from tests.system.waiting import until
from tests.system.worker_process import work


class Watch:
    """What runs now, and what has succeeded, for each group and key."""

    def __init__(self) -> None:
        self.now: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.done: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.meetings: list[tuple[str, str, list[int]]] = []

    async def run(self, ctx: EventContext, fail: Exception | None) -> None:
        key = ctx.event.key
        assert key is not None
        here = self.now[ctx.group, key]
        here.append(ctx.event_id)
        if len(here) > 1:
            self.meetings.append((ctx.group, key, list(here)))
        await asyncio.sleep(0)
        here.remove(ctx.event_id)
        if fail is not None:
            raise fail
        self.done[ctx.group, key].append(ctx.event_id)


@pytest.mark.parametrize("transactional", [False, True])
async def test_events_of_a_key_are_handled_one_after_the_other(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    """By several workers, in two groups, with failures, pauses and rejections on the way; none is left behind."""
    rng = random.Random(7)
    watch, rejected = Watch(), set[tuple[str, int]]()

    def made() -> EventRouter:
        router = EventRouter()
        for group in ("one", "two"):

            @router.on("a", group=group, name=group, transactional=transactional, retry=RetryPolicy(max_attempts=1_000))
            async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
                what = rng.random()
                fail: Exception | None = None
                if what < 0.1:
                    fail = Retry(delay=_pause(rng))
                elif what < 0.2:
                    fail = Snooze(_pause(rng))
                elif what < 0.25:
                    fail = Reject("no")
                    rejected.add((ctx.group, ctx.event_id))
                await watch.run(ctx, fail)

        return router

    published: dict[str, list[int]] = defaultdict(list)

    async def publish_some(number: int) -> None:
        for n in range(30):
            async with sm.session() as session:
                # Only this publisher uses these keys, so its commits are in the order of its ids.
                batch = [Event(type="a", key=f"{number}-{k}") for k in (n % 3, (n + 1) % 3)]
                for event in await publish_events(session, batch):
                    published[str(event.key)].append(event.id)
                await session.commit()

    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(running(made(), database, poll_interval_seconds=0.5))
        await asyncio.gather(*(publish_some(number) for number in range(4)))
        await until(
            lambda: sql.fetchval("SELECT bool_and(status IN ('completed', 'dead')) FROM pgebus.deliveries"), within=60
        )
    assert watch.meetings == []
    for group in ("one", "two"):
        for key, ids in published.items():
            assert watch.done[group, key] == [each for each in ids if (group, each) not in rejected]
    assert rejected


def _pause(rng: random.Random) -> timedelta:
    return timedelta(milliseconds=rng.randrange(20))


async def test_order_outlives_workers_that_are_killed(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn
) -> None:
    """With -9, in the middle of what they do, again and again: effects once, and one of a key after the other."""
    keys, each = 15, 8
    quick = {"recovery_grace_seconds": 0.2, "backoff_first_seconds": 0.01, "backoff_ceiling_seconds": 0.01}
    async with sm.session() as session:
        batch = [
            Event(type="job.gated", channel="events", key=f"k{n % keys}", payload={"fails": n % 7 == 0})
            for n in range(keys * each)
        ]
        await publish_events(session, batch)
        await session.commit()
    crew = [spawn(work, event_system=quick) for _ in range(3)]
    for worker in crew:
        await worker.says("inside")
        worker.go()
    kills = 0
    for done in range(20, keys * each, 20):
        await until(lambda done=done: sql.fetchval("SELECT count(*) >= $1 FROM effects", done), within=30)  # type: ignore[misc]
        await crew.pop(0).killed()
        kills += 1
        crew.append(spawn(work, event_system=quick))
        await crew[-1].says("ready")
        crew[-1].go()
    await until(lambda: sql.fetchval("SELECT bool_and(status = 'completed') FROM pgebus.deliveries"), within=60)
    assert kills == 5
    assert await sql.fetchval("SELECT count(*) FROM effects") == keys * each
    assert await sql.fetchval("SELECT count(DISTINCT event_id) FROM effects") == keys * each
    early = await sql.fetch("""
WITH r AS (
  SELECT e.key, e.id, min(r.started_at) AS began, max(r.ended_at) AS ended FROM runs r JOIN pgebus.events e
    ON e.id = r.event_id GROUP BY 1, 2
)
SELECT a.id, b.id FROM r a JOIN r b ON a.key = b.key AND a.id < b.id AND b.began < a.ended""")
    assert early == []
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE lost > 0") > 0


async def test_a_delayed_event_holds_its_key(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    seen: list[int] = []
    router = EventRouter()

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    due = await sql.fetchval("SELECT now() + interval '0.5 seconds'")
    async with running(router, database, poll_interval_seconds=0.2):
        first = await publish(sm, "a", key="k", run_at=due)
        second = await publish(sm, "a", key="k")
        other = await publish(sm, "a", key="l")
        await finished(sql, first, second, other)
    assert seen == [other, first, second]


@pytest.mark.parametrize("holds", [False, True])
async def test_a_dead_event_holds_its_key_if_the_group_says_so(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, holds: bool
) -> None:
    router = EventRouter(group=Group("g", dead_holds_key=holds))

    @router.on("a")
    async def handle(_ctx: EventContext, payload: dict[str, Any]) -> None:
        if payload.get("bad"):
            raise Reject("bad")

    async with running(router, database, poll_interval_seconds=0.1):
        bad = await publish(sm, "a", {"bad": True}, key="k")
        good = await publish(sm, "a", key="k")
        other = await publish(sm, "a", key="l")
        await finished(sql, bad, status="dead")
        await finished(sql, other)
        if not holds:
            await finished(sql, good)
            return
        # Two sweeps later it is still waiting.
        sweeps = await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE holds_key")
        assert sweeps == 1
        last = await publish(sm, "a", key="m")
        await finished(sql, last)
        assert (await delivery(sql, good))["status"] == "blocked"
        await sql.execute("UPDATE pgebus.deliveries SET holds_key = false WHERE holds_key")
        await finished(sql, good)


async def test_a_handler_at_repeatable_read_leaves_the_promotion_to_the_sweep(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Its snapshot is older than what was published while it ran, so its completion cannot see who is next."""
    began, go_on = asyncio.Event(), asyncio.Event()
    router = EventRouter()

    @router.on("a", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("SELECT 1 FROM pgebus.events LIMIT 1"))
        if payload.get("first"):
            began.set()
            await go_on.wait()

    async with running(router, database, isolation_level="REPEATABLE READ"):
        first = await publish(sm, "a", {"first": True}, key="k")
        await began.wait()
        second = await publish(sm, "a", key="k")
        assert (await delivery(sql, second))["status"] == "blocked"
        go_on.set()
        await finished(sql, first)
        await finished(sql, second, within=5)


async def test_adopted_events_keep_their_order(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[int] = []
    events = [await publish(sm, "a", key="k") for _ in range(5)]
    router = EventRouter()

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    async with running(router, database):
        await finished(sql, *events)
    assert seen == events


async def test_a_key_with_a_hundred_thousand_waiting_costs_a_claim_nothing(
    database: DatabaseSettings, sql: Sql
) -> None:
    """Buffers that are touched, not time: claim, completion and sweep, with statistics and without."""
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups VALUES ('events', 'default');"
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'default', '#')"
    )
    claim = Statements("pgebus").claim

    async def buffers() -> int:
        transaction = sql.transaction()
        await transaction.start()
        plan = await sql.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {claim}", 1, "events", ["default"], 5)
        await transaction.rollback()
        found = json.loads(plan)[0]["Plan"]
        return int(found["Shared Hit Blocks"] + found["Shared Read Blocks"])

    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a' FROM generate_series(1, 5)")
    empty = await buffers()
    await sql.execute("INSERT INTO pgebus.events (type, key) SELECT 'a', 'hot' FROM generate_series(1, 100000)")
    fresh = await buffers()
    await sql.execute("ANALYZE pgebus.deliveries")
    assert max(fresh, await buffers()) <= empty * 2 + 50
