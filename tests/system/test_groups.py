"""Consumer groups: each has deliveries, attempts, dead letters and transactions of its own; new ones miss nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url, text

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    EventSystem,
    Group,
    Reject,
    operations,
    publish_events,
)
from pgebus._runtime.connecting import open_engines
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import driver_of
from pgebus.migrations import upgrade
from tests.conftest import FAST, Server
from tests.embedded import embedded
from tests.system.bus import Sql, backfilled, delivery, finished, in_flight, publish, rounds, running, settings
from tests.system.processes import Inquest
from tests.system.waiting import until


async def deliveries(sql: Sql) -> list[tuple[Any, ...]]:
    rows = await sql.fetch(
        "SELECT type, consumer_group, status FROM pgebus.deliveries ORDER BY event_id, consumer_group"
    )
    return [tuple(row) for row in rows]


async def test_every_group_handles_an_event_by_itself(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """What one of them does wrong is nothing to the others, not even to their transactions."""
    await sql.execute("CREATE TABLE effects (who text)")
    router, billing = EventRouter(), EventRouter("order", group="billing")

    async def note(ctx: EventContext, who: str) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO effects VALUES (:who)"), {"who": who})

    @router.on("order.#", transactional=True)
    async def default(ctx: EventContext, _payload: dict[str, Any]) -> None:
        await note(ctx, ctx.group)

    @router.on("order.placed", group="audit", transactional=True)
    async def audit(ctx: EventContext, _payload: dict[str, Any]) -> None:
        await note(ctx, ctx.group)
        raise Reject("never")

    @billing.on("*", transactional=True)
    async def bill(ctx: EventContext, _payload: dict[str, Any]) -> None:
        await note(ctx, ctx.group)
        if ctx.attempt < 3:
            raise RuntimeError

    router.include_router(billing)
    async with running(router, database):
        placed = await publish(sm, "order.placed")
        other = await publish(sm, "order.a.b")
        nobody = await publish(sm, "customer.left")

        async def settled() -> bool:
            return not await sql.fetchval(
                "SELECT count(*) FROM pgebus.deliveries WHERE status IN ('pending', 'running')"
            )

        await until(settled)
    rows = await sql.fetch("SELECT * FROM pgebus.deliveries ORDER BY event_id, consumer_group")
    assert [(row["event_id"], row["consumer_group"], row["status"], row["attempt"]) for row in rows] == [
        (placed, "audit", "dead", 1),
        (placed, "billing", "completed", 3),
        (placed, "default", "completed", 1),
        (other, "default", "completed", 1),
        (nobody, "default", "unhandled", 0),
    ]
    effects = await sql.fetch("SELECT who, count(*) FROM effects GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in effects] == [("billing", 1), ("default", 2)]


async def test_a_process_serves_the_groups_that_it_is_told(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[tuple[str, str]] = []

    def made(who: str) -> EventRouter:
        router = EventRouter()
        for group in ("one", "two"):

            @router.on("a", group=group, name=group)
            async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
                seen.append((who, ctx.group))

        return router

    async with running(made("x"), database, groups=["two"]):
        first = await publish(sm, "a")
        await until(lambda: sql.fetchval("SELECT bool_or(status = 'completed') FROM pgebus.deliveries"))
        assert sorted(await deliveries(sql)) == [("a", "one", "pending"), ("a", "two", "completed")]
        assert await sql.fetchval("SELECT groups FROM pgebus.workers WHERE ended_at IS NULL") == ["two"]
        async with running(made("y"), database, groups=("one",)):
            second = await publish(sm, "a")
            await until(lambda: sql.fetchval("SELECT bool_and(status = 'completed') FROM pgebus.deliveries"))
    assert Counter(seen) == Counter({("x", "two"): 2, ("y", "one"): 2})
    assert first < second
    with pytest.raises(ConfigurationError, match="three"):
        EventSystem(made("z"), settings(database, groups=["one", "three"]))


@pytest.mark.parametrize("start", ["now", "beginning", "moment"])
async def test_a_new_group_starts_where_it_says(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, start: Any
) -> None:
    """And what nobody wanted until then is not kept as unhandled when somebody gets it."""
    seen: list[int] = []
    early = [await publish(sm, "a", {"n": n}) for n in range(3)]
    await sql.execute("UPDATE pgebus.events SET created_at = created_at - interval '1 hour' WHERE id = $1", early[0])
    if start == "moment":
        start = await sql.fetchval("SELECT now() - interval '30 minutes'")
    router = EventRouter(group=Group("g", start=start))

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    async with running(router, database):
        await backfilled(sql)
        late = await publish(sm, "a")
        expected = {"now": [], "beginning": early}.get(start, early[1:]) if isinstance(start, str) else early[1:]
        await until(lambda: asyncio.sleep(0, len(seen) == len(expected) + 1))
    assert sorted(seen) == [*expected, late]
    rows = await sql.fetch(
        "SELECT event_id, consumer_group FROM pgebus.deliveries WHERE status = 'unhandled' ORDER BY 1"
    )
    assert sorted(map(tuple, rows)) == [(each, "default") for each in early if each not in expected]


@asynccontextmanager
async def publishing(sql: Sql, level: Any) -> AsyncIterator[None]:
    """A publisher whose snapshot is older than what happens in the block, and who inserts at its end."""
    transaction = sql.transaction(isolation=level)
    await transaction.start()
    await sql.fetchval("SELECT count(*) FROM pgebus.subscriptions")
    yield
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('a')")
    await transaction.commit()


@pytest.mark.parametrize("level", ["read_committed", "repeatable_read", "serializable"])
async def test_a_publisher_in_flight_is_not_missed_and_not_held_up(
    database: DatabaseSettings, sql: Sql, server: Any, level: str
) -> None:
    """At REPEATABLE READ its trigger does not see the new group: the backfill waits for it, and makes up for it."""
    seen: list[int] = []
    router = EventRouter(group="g")

    @router.on("#")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    other: asyncpg.Connection[asyncpg.Record] = await server.connect(database.sqlalchemy_url().database)
    async with publishing(other, level):
        system = EventSystem(router, settings(database, poll_interval_seconds=0.2))
        await system.start()
        await until(lambda: sql.fetchval("SELECT count(*) FROM pgebus.subscriptions"))
        assert await sql.fetchval("SELECT backfilled_at FROM pgebus.subscriptions") is None
    await backfilled(sql)
    await until(lambda: asyncio.sleep(0, len(seen) == 1))
    await system.stop()
    await other.close()
    assert await deliveries(sql) in ([("a", "g", "completed")],)


async def test_concurrent_publishers_at_both_levels_lose_and_double_nothing(
    database: DatabaseSettings, sql: Sql, server: Any
) -> None:
    """Twelve of them, half at REPEATABLE READ, while groups come up from the beginning and from now."""
    publishers = [await server.connect(database.sqlalchemy_url().database) for _ in range(12)]
    going = True
    after: list[int] = []
    subscribed = asyncio.Event()

    async def keep_publishing(connection: asyncpg.Connection[asyncpg.Record], level: Any) -> None:
        while going:
            async with connection.transaction(isolation=level):
                began_after = subscribed.is_set()
                await connection.fetchval("SELECT 1 FROM pgebus.events LIMIT 1")
                made = await connection.fetchval("INSERT INTO pgebus.events (type) VALUES ('a.b') RETURNING id")
                await connection.fetchval("SELECT pg_sleep(0.005)")
            if began_after:
                after.append(made)

    tasks = [
        asyncio.create_task(keep_publishing(each, ("read_committed", "repeatable_read")[number % 2]))
        for number, each in enumerate(publishers)
    ]
    await until(lambda: sql.fetchval("SELECT count(*) > 50 FROM pgebus.events"))
    seen: dict[str, Counter[int]] = {"all": Counter(), "new": Counter()}
    router = EventRouter()
    for group in (Group("all", start="beginning"), Group("new")):

        @router.on("a.*", group=group, name=group.name)
        async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
            seen[ctx.group][ctx.event_id] += 1

    async with running(router, database):
        subscribed.set()
        await backfilled(sql)
        await until(lambda: asyncio.sleep(0, len(after) > 50))
        going = False
        await asyncio.gather(*tasks)
        everything = [row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events")]
        since = await sql.fetchval("SELECT since_event_id FROM pgebus.subscriptions WHERE consumer_group = 'new'")

        async def done() -> bool:
            return not await sql.fetchval(
                "SELECT count(*) FROM pgebus.deliveries WHERE status <> 'completed' AND consumer_group <> 'default'"
            )

        await until(done, within=30)
    assert seen["all"] == Counter(everything)
    assert seen["new"] == Counter(each for each in everything if each > since)
    assert set(after) <= set(seen["new"])
    assert (
        await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'unhandled'")
        == sum(each <= since for each in everything) * 0
    )
    for each in publishers:
        await each.close()


async def test_a_publisher_that_is_prepared_meanwhile_is_waited_for(brisk: None) -> None:
    """It is in a transaction under another name then, which tells nothing of the first one."""
    seen: list[int] = []
    router = EventRouter(group="g")

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    with embedded({**FAST, "max_prepared_transactions": "1"}) as postgres:
        server = Server(make_url(postgres.url()))
        database = server.settings("postgres")
        await asyncio.to_thread(upgrade, database)
        sql, publisher = await server.connect("postgres"), await server.connect("postgres")
        await publisher.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pgebus.subscriptions")
        async with running(router, database, poll_interval_seconds=0.2):
            await rounds(sql)
            missed = await publisher.fetchval("INSERT INTO pgebus.events (type) VALUES ('a') RETURNING id")
            await publisher.execute("PREPARE TRANSACTION 'later'")
            await rounds(sql)
            assert await sql.fetchval("SELECT backfilled_at FROM pgebus.subscriptions") is None
            await publisher.execute("COMMIT PREPARED 'later'")
            await backfilled(sql)
            await until(lambda: asyncio.sleep(0, seen))
        assert seen == [missed]
        await publisher.close()
        await sql.close()


async def test_a_moment_counts_for_each_event_and_not_for_its_id(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, another: Sql, brisk: None
) -> None:
    """A transaction that took long was created before others whose ids are lower."""
    transaction = another.transaction()
    await transaction.start()
    start = await sql.fetchval("SELECT clock_timestamp()")
    early = [await publish(sm, "a") for _ in range(2)]
    before = await another.fetchval("INSERT INTO pgebus.events (type) VALUES ('a') RETURNING id")
    await transaction.commit()
    seen: list[int] = []
    router = EventRouter(group=Group("g", start=start))

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.event_id)

    async with running(router, database):
        await backfilled(sql)
        late = await publish(sm, "a")
        await until(lambda: asyncio.sleep(0, len(seen) == 3))
    assert sorted(seen) == [*early, late]
    assert early[-1] < before < late


async def test_an_event_that_somebody_has_locked_delays_itself_only(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, another: Sql, inquest: Inquest
) -> None:
    """Its own backfill, and not the events beside it, other patterns, or what dead workers have left."""
    first, locked, last = [await publish(sm, "a") for _ in range(3)]
    other = await publish(sm, "b")
    router = EventRouter()
    router.on("a", group=Group("g", start="beginning"))(_nothing)
    router.on("b", group=Group("h", start="beginning"), name="b")(_nothing)
    router.on("c", name="c")(_nothing)
    async with AsyncExitStack() as stack:
        locker = await stack.enter_async_context(sm.session())
        async with in_flight(another):
            await stack.enter_async_context(running(router, database, recovery_grace_seconds=0.1))
            await rounds(sql)
            # In a transaction that is later than whoever the backfill waits for.
            await locker.execute(text("SELECT FROM pgebus.events WHERE id = :id FOR UPDATE"), {"id": locked})
        await finished_in(sql, "h", other)
        await finished_in(sql, "g", first, last)
        left = await publish(sm, "c")
        await finished(sql, left)
        await sql.execute("INSERT INTO pgebus.workers (id, channel) VALUES (77, 'events')")
        await sql.execute(
            "UPDATE pgebus.deliveries SET status = 'running', finished_at = NULL, worker_id = 77, claimed_at = now()"
            " WHERE event_id = $1",
            left,
        )
        await finished(sql, left)
        assert (await delivery(sql, left))["lost"] == 1
        rows = await sql.fetch("SELECT pattern FROM pgebus.subscriptions WHERE backfilled_at IS NULL")
        assert [row["pattern"] for row in rows] == ["a"]
        await locker.rollback()
        await finished_in(sql, "g", locked)
        await backfilled(sql)


async def test_a_role_that_may_not_read_the_sequence_cannot_start(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """To such a role "from now" would be "from the beginning"."""
    role = f"worker_{uuid4().hex}"
    await sql.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'none'; GRANT USAGE ON SCHEMA pgebus TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgebus TO {role};"
    )
    url = database.sqlalchemy_url().set(username=role, password="none").render_as_string(hide_password=False)
    visitor = DatabaseSettings.model_validate({"url": url})
    try:
        router = EventRouter()
        router.on("a")(_nothing)
        with pytest.raises(ConfigurationError, match="GRANT SELECT ON ALL SEQUENCES IN SCHEMA"):
            await EventSystem(router, settings(visitor)).start()
        assert await sql.fetchval("SELECT count(*) FROM pgebus.subscriptions") == 0
        await sql.execute(f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA pgebus TO {role}")
        async with running(router, visitor):
            await finished(sql, await publish(sm, "a"))
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_group_is_limited_over_all_workers(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """And the others are not held up by it, nor it by them."""
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def made() -> EventRouter:
        router = EventRouter()

        async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
            now[ctx.group] += 1
            most[ctx.group] = max(most[ctx.group], now[ctx.group])
            await asyncio.sleep(0.01)
            now[ctx.group] -= 1

        router.on("a", group=Group("few", max_running=2), name="few")(handle)
        router.on("a", group="many", name="many")(handle)
        return router

    events = [await publish(sm, "a") for _ in range(40)]
    quick = {"poll_interval_seconds": 0.1}
    async with running(made(), database, **quick), running(made(), database, **quick):
        events += [await publish(sm, "a") for _ in range(60)]
        await until(
            lambda: sql.fetchval("SELECT count(*) = 120 FROM pgebus.deliveries WHERE status = 'completed'"),
            within=20,
        )
    assert most["few"] == 2
    assert most["many"] > 2
    assert await sql.fetchval("SELECT max_running FROM pgebus.consumer_groups WHERE consumer_group = 'few'") == 2


async def test_a_group_is_limited_in_one_process(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    most = running_now = 0
    router = EventRouter(group=Group("few", per_process=1))

    @router.on("a")
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        nonlocal most, running_now
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0)
        running_now -= 1

    async with running(router, database):
        await finished(sql, *[await publish(sm, "a") for _ in range(20)])
    assert most == 1


@pytest.mark.parametrize("change", ["paused", "limited"])
async def test_a_group_that_an_operator_has_locked_delays_no_other(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, change: str
) -> None:
    """He has paused it, or limited it, and not committed yet."""
    router = EventRouter()
    router.on("a", group=Group("few", max_running=2), name="few")(_nothing)
    router.on("b")(_nothing)
    async with running(router, database) as system:
        await finished(sql, await publish(sm, "a"), await publish(sm, "b"))
        async with sm.session() as operator:
            if change == "paused":
                await operations.pause_group(operator, "few")
            else:
                await operations.limit_group(operator, "few", 5)
            waits = await publish(sm, "a")
            for _ in range(3):
                await finished(sql, await publish(sm, "b"), within=5)
            assert (await delivery(sql, waits))["status"] == "pending"
            await operator.rollback()
        await finished(sql, waits, within=5)
        assert not any(loop.failures for loop in system.health().loops)


async def test_a_worker_that_is_frozen_while_it_claims_delays_a_limited_group_only(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has locked the group; and that, too, until the server ends its transaction."""
    router = EventRouter()
    router.on("a", group=Group("few", max_running=2), name="few")(_nothing)
    router.on("b")(_nothing)
    with monkeypatch.context() as patch:
        patch.setattr("pgebus._runtime.connecting.ANSWER_SECONDS", 3.0)
        async with open_engines(settings(database)) as (engine, *_), engine.connect() as connection:
            frozen = await driver_of(connection)
            patch.undo()
            async with running(router, database):
                await finished(sql, await publish(sm, "a"), await publish(sm, "b"))
                await frozen.execute("BEGIN")
                lock = Statements("pgebus").lock_group
                await until(lambda: frozen.fetch(lock, "events", "few"))  # not while the other one claims
                waits = await publish(sm, "a")
                for _ in range(3):
                    await finished(sql, await publish(sm, "b"), within=5)
                state = "SELECT state FROM pg_stat_activity WHERE pid = $1"
                assert await sql.fetchval(state, frozen.get_server_pid()) == "idle in transaction"
                await finished(sql, waits)
            await connection.invalidate()


async def test_a_start_does_not_wait_for_an_operator(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """What is declared is written once he has let go of the group."""
    before, router = EventRouter(), EventRouter()
    before.on("a", group="g")(_nothing)
    router.on("a", group=Group("g", max_running=3, dead_holds_key=True))(_nothing)
    router.on("b", name="b")(_nothing)
    declared = "SELECT max_running = 3 AND dead_holds_key FROM pgebus.consumer_groups WHERE consumer_group = 'g'"
    async with running(before, database):
        pass
    system = EventSystem(router, settings(database))
    async with sm.session() as operator:
        await operations.pause_group(operator, "g")
        async with asyncio.timeout(5):
            await system.start()
        await finished(sql, await publish(sm, "b"))
        await rounds(sql)
        assert not await sql.fetchval(declared)
        await operator.rollback()
    await until(lambda: sql.fetchval(declared))
    await system.stop()


async def test_a_paused_group_waits(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    router = EventRouter(group="g")
    router.on("a")(_nothing)
    other = EventRouter(group="h")
    other.on("a", name="other")(_nothing)
    router.include_router(other)
    async with running(router, database, poll_interval_seconds=0.1):
        await finished_in(sql, "h", await publish(sm, "a"))
        await sql.execute("UPDATE pgebus.consumer_groups SET paused_at = now() WHERE consumer_group = 'g'")
        await until(lambda: sql.fetchval("SELECT bool_and(status = 'completed') FROM pgebus.deliveries"))
        later = await publish(sm, "a")
        await finished_in(sql, "h", later)
    async with running(router, database, poll_interval_seconds=0.1):
        last = await publish(sm, "a")
        await finished_in(sql, "h", last)
        assert await deliveries(sql) == [
            ("a", "g", "completed"), ("a", "h", "completed"),
            ("a", "g", "pending"), ("a", "h", "completed"),
            ("a", "g", "pending"), ("a", "h", "completed"),
        ]  # fmt: skip
        await sql.execute("UPDATE pgebus.consumer_groups SET paused_at = NULL; SELECT pg_notify('events', '')")
        await finished_in(sql, "g", later, last)


async def _nothing(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


async def finished_in(sql: Sql, group: str, *event_ids: int) -> None:
    await until(
        lambda: sql.fetchval(
            "SELECT count(*) = $3 FROM pgebus.deliveries WHERE event_id = ANY ($1) AND consumer_group = $2"
            " AND status = 'completed'",
            list(event_ids),
            group,
            len(event_ids),
        )
    )


async def test_a_pattern_that_is_registered_late_is_served(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Its group as well, in the process that has just learned of it."""
    router = EventRouter()
    router.on("a")(_nothing)
    async with running(router, database):
        await finished(sql, await publish(sm, "a"))
        before = await publish(sm, "b.c")
        router.on("b.#", group=Group("late", start="beginning"))(_nothing)
        await finished_in(sql, "late", before)
        await finished_in(sql, "late", await publish(sm, "b"))
    assert ("b.c", "default", "unhandled") not in await deliveries(sql)


async def test_what_a_late_group_declares_counts_as_well(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """Its options, in the database and in this process; and the worker says that it serves it."""
    most = running_now = 0
    router = EventRouter()
    router.on("a")(_nothing)

    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        nonlocal most, running_now
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0)
        running_now -= 1

    async with running(router, database):
        await finished(sql, await publish(sm, "a"))
        router.on("b", group=Group("late", max_running=3, per_process=1, dead_holds_key=True))(handle)
        await until(lambda: sql.fetchval("SELECT groups = '{default,late}' FROM pgebus.workers"))
        row = await sql.fetchrow("SELECT * FROM pgebus.consumer_groups WHERE consumer_group = 'late'")
        assert row is not None
        assert (row["max_running"], row["dead_holds_key"]) == (3, True)
        async with sm.session() as session:
            events = await publish_events(session, [Event(type="b") for _ in range(20)])
            await session.commit()
            await finished(sql, *[event.id for event in events])
    assert most == 1


async def test_what_was_declared_is_written_at_the_start_and_left_to_the_operator(
    database: DatabaseSettings, sql: Sql
) -> None:
    router = EventRouter()
    router.on("a", group=Group("g", max_running=3, dead_holds_key=True))(_nothing)
    select = "SELECT max_running, dead_holds_key FROM pgebus.consumer_groups WHERE consumer_group = 'g'"
    async with running(router, database):
        assert [tuple(row) for row in await sql.fetch(select)] == [(3, True)]
        await sql.execute("UPDATE pgebus.consumer_groups SET max_running = 7, dead_holds_key = false")
        router.on("b", group="g")(_nothing)
        await until(lambda: sql.fetchval("SELECT count(*) = 2 FROM pgebus.subscriptions"))
    plain = EventRouter()
    plain.on("a", group="g")(_nothing)
    async with running(plain, database):
        assert await sql.fetchval("SELECT count(*) FROM pgebus.consumer_groups") == 1
    assert [tuple(row) for row in await sql.fetch(select)] == [(7, False)]


async def test_a_group_that_comes_back_from_the_beginning_gets_what_its_removal_had_cancelled(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """And neither what it had completed, nor what a person has cancelled since."""
    seen: list[int] = []

    def served() -> EventRouter:
        router = EventRouter(group=Group("g", start="beginning"))

        @router.on("a", name="h")
        async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
            seen.append(ctx.event_id)

        return router

    async with running(served(), database):
        done = await publish(sm, "a")
        await finished(sql, done)
    left = [await publish(sm, "a") for _ in range(2)]
    async with sm.session() as session:
        await operations.remove_group(session, "g")
        await session.commit()
    await sql.execute(
        "UPDATE pgebus.deliveries SET finished_at = now() + interval '1 hour' WHERE event_id = $1", left[1]
    )
    async with running(served(), database):
        await finished(sql, left[0])
        await backfilled(sql)
    assert seen == [done, left[0]]
    assert await sql.fetchval("SELECT status FROM pgebus.deliveries WHERE event_id = $1", left[1]) == "cancelled"
