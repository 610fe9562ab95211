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
    operations,
    publish_events,
)
from pgebus._runtime.statements import Statements
from tests.system.bus import Sql, backfilled, delivery, finished, in_flight, publish, rounds, running
from tests.system.conftest import Spawn
from tests.system.waiting import until
from tests.system.worker_process import work


def noting(router: EventRouter, event_type: str, seen: list[int], **options: Any) -> None:
    """Register a handler that writes down which events it gets."""

    @router.on(event_type, name=f"note.{event_type}", **options)
    async def note(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)


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
            declared = Group(group, keep_history=group == "one")

            @router.on(
                "a", group=declared, name=group, transactional=transactional, retry=RetryPolicy(max_attempts=1_000)
            )
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


@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_order_outlives_workers_that_are_killed(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, keep: bool
) -> None:
    """With -9, in the middle of what they do, again and again: effects once, and one of a key after the other."""
    keys, each = 15, 8
    group = Group("default", start="beginning", keep_history=keep)
    quick = {"recovery_grace_seconds": 0.2, "backoff_first_seconds": 0.01, "backoff_ceiling_seconds": 0.01}
    async with sm.session() as session:
        batch = [
            Event(type="job.gated", channel="events", key=f"k{n % keys}", payload={"fails": n % 7 == 0})
            for n in range(keys * each)
        ]
        await publish_events(session, batch)
        await session.commit()
    crew = [spawn(work, event_system=quick, group=group) for _ in range(3)]
    for worker in crew:
        await worker.says("inside")
        worker.go()
    kills = 0
    for done in range(20, keys * each, 20):
        await until(lambda done=done: sql.fetchval("SELECT count(*) >= $1 FROM effects", done), within=30)  # type: ignore[misc]
        await crew.pop(0).killed()
        kills += 1
        crew.append(spawn(work, event_system=quick, group=group))
        await crew[-1].says("ready")
        crew[-1].go()
    left = "SELECT count(*) = 0 FROM pgebus.deliveries WHERE status <> 'completed'"
    await until(lambda: sql.fetchval(left), within=60)
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
    if keep:
        assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE lost > 0") > 0
    else:
        assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") < keys * each / 2


async def test_a_delayed_event_holds_its_key(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    seen: list[int] = []
    router = EventRouter()

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    due = await sql.fetchval("SELECT now() + interval '1 hour'")
    async with running(router, database, poll_interval_seconds=0.2):
        first = await publish(sm, "a", key="k", run_at=due)
        second = await publish(sm, "a", key="k")
        other = await publish(sm, "a", key="l")
        await finished(sql, other)
        assert seen == [other]
        assert (await delivery(sql, second))["status"] == "blocked"
        await sql.execute("UPDATE pgebus.deliveries SET due_at = now() WHERE event_id = $1", first)
        await finished(sql, first, second)
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


async def test_dead_events_let_go_when_the_group_does_not_say_so_any_more(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """With the next start that says the contrary; not with one that says nothing."""

    def made(group: Group) -> EventRouter:
        router = EventRouter(group=group)

        @router.on("a", name="handle")
        async def handle(_ctx: EventContext, payload: dict[str, Any]) -> None:
            if payload.get("bad"):
                raise Reject("bad")

        return router

    async with running(made(Group("g", dead_holds_key=True)), database):
        bad = await publish(sm, "a", {"bad": True}, key="k")
        good = await publish(sm, "a", key="k")
        await finished(sql, bad, status="dead")
    async with running(made(Group("g")), database):
        await rounds(sql)
        assert (await delivery(sql, good))["status"] == "blocked"
    async with running(made(Group("g", dead_holds_key=False)), database):
        await finished(sql, good)
    assert not await sql.fetchval("SELECT dead_holds_key FROM pgebus.consumer_groups")


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


async def test_adopted_events_take_their_places_among_those_that_wait(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """A later one is first in line when they come, because its type was wanted already."""
    seen: list[int] = []
    router = EventRouter()
    noting(router, "a", seen)
    early = [await publish(sm, "a", key="k") for _ in range(2)]
    # The subscription is there, and the first look of its worker is not.
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group, paused_at) VALUES ('events', 'default', now());"
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'default', 'a')"
    )
    late = await publish(sm, "a", key="k")
    assert (await delivery(sql, late))["status"] == "pending"
    async with running(router, database):
        await until(lambda: sql.fetchval("SELECT bool_and(status <> 'unhandled') FROM pgebus.deliveries"))
        await rounds(sql)
        async with sm.session() as session:
            await operations.resume_group(session, "default")
            await session.commit()
        await finished(sql, *early, late)
    assert seen == [*early, late]


async def test_what_is_pending_waits_for_what_is_blocked_before_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, another: Sql, brisk: None
) -> None:
    """That came later, and its turn is found by the sweep; not while somebody has locked it."""
    seen: list[int] = []
    router = EventRouter()
    noting(router, "a", seen)
    async with running(router, database):
        pass
    events = [await publish(sm, "a", key="k") for _ in range(2)]
    for event, status in zip(events, ("blocked", "pending"), strict=True):
        await sql.execute("UPDATE pgebus.deliveries SET status = $2 WHERE event_id = $1", event, status)
    async with AsyncExitStack() as stack:
        async with in_flight(another, "read_committed"):
            await another.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", events[0])
            await stack.enter_async_context(running(router, database))
            for _ in range(3):
                await finished(sql, await publish(sm, "a"))
            assert (await delivery(sql, events[1]))["status"] == "pending"
            seen.clear()
        await finished(sql, *events)
    assert seen == events


@pytest.mark.parametrize("due", ["now", "tomorrow"])
async def test_a_group_that_reaches_back_handles_no_key_before_it_has_all_of_it(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    another: Sql,
    monkeypatch: pytest.MonkeyPatch,
    brisk: None,
    due: str,
) -> None:
    """What the trigger gives it meanwhile waits for what is still to come, and does not hold it back."""
    monkeypatch.setattr("pgebus._runtime.maintenance.SWEEP_PAUSE", 1e9)  # nothing is left to it
    seen: list[int] = []
    router = EventRouter(group=Group("g", start="beginning"))
    noting(router, "a", seen)
    early = [await publish(sm, "a", key="k") for _ in range(2)]
    run_at = await sql.fetchval("SELECT now() + interval '1 day'") if due == "tomorrow" else None
    async with AsyncExitStack() as stack:
        async with in_flight(another):
            await stack.enter_async_context(running(router, database))
            late = await publish(sm, "a", key="k", run_at=run_at)
            for _ in range(3):
                await finished(sql, await publish(sm, "a"))
            assert (await delivery(sql, late))["status"] == "pending"
            seen.clear()
        await finished(sql, *early)
        if due == "now":
            await finished(sql, late)
            early.append(late)
        assert seen == early


@pytest.mark.parametrize("n_workers", [1, 4])
async def test_order_where_a_backfill_and_publishers_meet(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None, n_workers: int
) -> None:
    """A group begins with what is there, while more of the same keys is published."""
    await sql.execute("INSERT INTO pgebus.events (type, key) SELECT 'a', 'k' || n % 20 FROM generate_series(1, 200) n")
    seen: dict[str, list[int]] = defaultdict(list)
    router = EventRouter(group=Group("g", start="beginning"))

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.event.key is not None
        seen[ctx.event.key].append(ctx.event_id)

    published = 0
    going = True

    async def keep_publishing() -> None:
        nonlocal published
        while going:
            await publish(sm, "a", key=f"k{published % 20}")
            published += 1

    publisher = asyncio.create_task(keep_publishing())
    await until(lambda: asyncio.sleep(0, published > 20))
    async with running(router, database, n_workers=n_workers):
        await backfilled(sql)
        enough = published + 40
        await until(lambda: asyncio.sleep(0, published >= enough))
        going = False
        await publisher
        await until(lambda: asyncio.sleep(0, sum(map(len, seen.values())) == 200 + published))
    assert {key: sorted(ids) for key, ids in seen.items()} == seen


async def test_in_a_rolling_deploy_an_event_keeps_its_place(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """An old process puts it aside for one that knows its type, and what is behind it in its key waits."""
    seen: list[int] = []
    old, new = EventRouter(), EventRouter()
    for router in (old, new):
        noting(router, "a", seen)
    noting(new, "b", seen)
    async with running(new, database):
        pass  # it comes and goes; what it has declared counts for a while
    async with running(old, database):
        first = await publish(sm, "b", key="k")
        await finished(sql, first, status="unhandled")
        events = [first, *[await publish(sm, each, key="k") for each in "abba"]]
        await finished(sql, await publish(sm, "a", key="l"))
        await rounds(sql)
        await finished(sql, *events[1:], status="blocked")
        seen.clear()
        async with running(new, database):
            await finished(sql, *events)
    assert seen == events


async def test_order_of_a_new_type_while_old_and_new_processes_run(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch, brisk: None
) -> None:
    monkeypatch.setattr("pgebus._runtime.claiming.ADOPT_SECONDS", 0.05)
    seen: list[int] = []
    old, new = EventRouter(), EventRouter()
    for router in (old, new):
        noting(router, "a", [])
    noting(new, "b", seen)
    async with running(old, database), running(new, database):
        events = [await publish(sm, "b", key="k") for _ in range(20)]
        await finished(sql, *events)
    assert seen == events
    # What was put aside goes straight to a process that knows it, and not back and forth.
    assert await sql.fetchval("SELECT max(claim_seq) FROM pgebus.deliveries") <= 2


async def test_an_event_that_was_put_aside_makes_way_for_one_that_comes_before_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, another: Sql, brisk: None
) -> None:
    """Which has a lower id and was committed later."""
    seen: list[int] = []
    old, new = EventRouter(), EventRouter()
    noting(old, "a", [])
    noting(new, "b", seen)
    async with running(new, database):
        pass
    transaction = another.transaction()
    await transaction.start()
    low = await another.fetchval("INSERT INTO pgebus.events (type, key) VALUES ('b', 'k') RETURNING id")
    async with running(old, database):
        high = await publish(sm, "b", key="k")
        await finished(sql, high, status="unhandled")
    await transaction.commit()
    async with running(new, database):
        await finished(sql, low, high)
    assert seen == [low, high]


async def test_an_event_that_nobody_declares_any_more_lets_the_others_pass(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    seen: list[int] = []
    old, new = EventRouter(), EventRouter()
    noting(old, "a", seen)
    noting(new, "b", seen)
    async with running(new, database):
        pass
    async with running(old, database):
        held = await publish(sm, "b", key="k")
        await finished(sql, held, status="unhandled")
        events = [await publish(sm, "a", key="k") for _ in range(2)]
        await rounds(sql)
        await finished(sql, *events, status="blocked")
        await sql.execute(
            "UPDATE pgebus.subscriptions SET declared_at = now() - interval '181 seconds' WHERE pattern = 'b'"
        )
        await finished(sql, *events)
        assert (await delivery(sql, held))["status"] == "unhandled"
    assert seen == events


async def test_the_sweep_comes_to_all_keys_however_many_wait(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    monkeypatch: pytest.MonkeyPatch,
    brisk: None,
) -> None:
    """A few at a time, behind those that have to wait; then it begins again."""
    monkeypatch.setattr("pgebus._runtime.maintenance.SWEEP_BATCH", 2)
    seen: list[int] = []
    router = EventRouter()
    noting(router, "a", seen)
    tomorrow = await sql.fetchval("SELECT now() + interval '1 day'")

    async def leave(keys: str) -> list[int]:
        """Make events that wait, and nothing before them: what a head that has finished unseen leaves behind."""
        async with sm.session() as session:
            made = [event.id for event in await publish_events(session, [Event(type="a", key=key) for key in keys])]
            await session.execute(
                text("UPDATE pgebus.deliveries SET status = 'blocked' WHERE event_id = ANY (:ids)"), {"ids": made}
            )
            await session.commit()
        return made

    async with running(router, database):
        for key in "bcde":
            await publish(sm, "a", key=key, run_at=tomorrow)
        waiting = [await publish(sm, "a", key=key) for key in "bcde"]
        behind = await leave("fghij")
        await finished(sql, *behind)
        before = await leave("a")
        await finished(sql, *before)
        await finished(sql, *waiting, status="blocked")
    assert sorted(seen) == behind + before


@pytest.mark.parametrize("max_running", [None, 5])
async def test_a_claim_that_another_one_of_its_key_was_faster_than_is_repeated_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, another: Sql, max_running: int | None
) -> None:
    """The lower id becomes visible while the higher one is being claimed; and nothing has failed."""
    seen: list[int] = []
    router = EventRouter(group=Group("g", max_running=max_running))
    noting(router, "a", seen)
    insert = "INSERT INTO pgebus.events (type, key) VALUES ('a', 'k') RETURNING id"
    async with running(router, database) as system:
        await finished(sql, await publish(sm, "a"))
        async with sm.session() as publisher:
            low = (await publisher.execute(text(insert))).scalar_one()
            claim = another.transaction()
            await claim.start()
            high = await another.fetchval(insert)
            await another.execute(
                "UPDATE pgebus.deliveries SET status = 'running', worker_id = 1, claimed_at = now(), attempt = 1,"
                " claim_seq = 1 WHERE event_id = $1",
                high,
            )
            await publisher.commit()
        behind = "SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))"
        await until(lambda: sql.fetchval(behind, another.get_server_pid()))
        await claim.commit()
        await finished(sql, await publish(sm, "a"), within=5)
        assert [loop.failures for loop in system.health().loops] == [0] * 5
        assert (await delivery(sql, low))["status"] == "pending"
        await sql.execute(
            "UPDATE pgebus.deliveries SET status = 'completed', worker_id = NULL, claimed_at = NULL,"
            " finished_at = now() WHERE event_id = $1; SELECT pg_notify('events', '')".replace("$1", str(high))
        )
        await finished(sql, low)
    assert low < high


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
