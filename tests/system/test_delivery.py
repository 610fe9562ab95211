"""What becomes of an event between its commit and its last handler, on a system where nothing goes wrong outside."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    Reject,
    Retry,
    Snooze,
    publish_event,
    publish_events,
)
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.waiting import until


async def test_a_committed_event_is_handled_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[tuple[Any, ...]] = []
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append((ctx.event_id, ctx.attempt, ctx.group, ctx.claim_seq, ctx.session, payload))

    async with running(router, database):
        event_id = await publish(sm, "order.placed", {"order": 7})
        await finished(sql, event_id)
    assert seen == [(event_id, 1, "default", 1, None, {"order": 7})]


async def test_what_the_publisher_rolls_back_was_never_there(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[dict[str, Any]] = []
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(payload)

    async with running(router, database):
        async with sm.session() as session:
            await publish_event(session, "order.placed", {"order": "never"}, "events")
            await session.rollback()
        event_id = await publish(sm, "order.placed", {"order": "kept"})
        await finished(sql, event_id)
    assert seen == [{"order": "kept"}]
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == 1


async def test_a_handler_reads_the_event_with_all_its_columns(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    events: list[Event] = []
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.event is ctx.event
        payload["changed"] = True  # nobody else's business
        events.append(ctx.event)

    async with running(router, database):
        run_at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
        event_id = await publish(sm, "order.placed", {"n": 1}, run_at=run_at, headers={"tenant": "a"})
        await finished(sql, event_id)
    (event,) = events
    assert (event.id, event.type, event.channel, event.payload, event.headers, event.run_at, event.priority) == (
        event_id, "order.placed", "events", {"n": 1}, {"tenant": "a"}, run_at, 0,
    )  # fmt: skip
    assert event.created_at == await sql.fetchval("SELECT created_at FROM pgebus.events")


async def test_handlers_of_one_event_run_in_registration_order_with_payloads_of_their_own(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    order: list[tuple[str, dict[str, Any]]] = []
    router = EventRouter()

    @router.on("order.placed")
    async def zebra(ctx: EventContext, payload: dict[str, Any]) -> None:
        order.append(("zebra", dict(payload)))
        payload.clear()

    @router.on("order.placed")
    async def ant(ctx: EventContext, payload: dict[str, Any]) -> None:
        order.append(("ant", payload))

    async with running(router, database):
        await finished(sql, await publish(sm, "order.placed", {"n": 1}))
    assert order == [("zebra", {"n": 1}), ("ant", {"n": 1})]


async def test_a_failed_handler_is_tried_again_and_those_that_succeeded_are_not(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    calls: Counter[str] = Counter()
    attempts: list[int] = []
    router = EventRouter()

    @router.on("order.placed")
    async def mail(ctx: EventContext, payload: dict[str, Any]) -> None:
        calls["mail"] += 1

    @router.on("order.placed")
    async def flaky(ctx: EventContext, payload: dict[str, Any]) -> None:
        calls["flaky"] += 1
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise RuntimeError("the mail server is away")

    async with running(router, database):
        event_id = await publish(sm, "order.placed")
        await finished(sql, event_id)
    assert calls == {"mail": 1, "flaky": 3}
    assert attempts == [1, 2, 3]
    row = await delivery(sql, event_id)
    assert (row["attempt"], row["claim_seq"], row["lost"]) == (3, 3, 0)
    assert row["handled"] == [mail.__module__ + "." + mail.__qualname__]
    assert '"attempt": 1' in row["errors"]
    assert "the mail server is away" in row["errors"]


async def test_used_up_attempts_end_dead_and_keep_the_last_errors(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.placed")
    async def broken(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    async with running(router, database, max_attempts=7):
        event_id = await publish(sm, "order.placed")
        await finished(sql, event_id, status="dead")
    rows = await sql.fetch(
        "SELECT e->>'attempt' AS attempt, e->>'type' AS type, e->>'message' AS message, e->>'handler' AS handler, "
        "(e->>'at')::timestamptz < now() AS dated, e->>'traceback' AS traceback "
        "FROM pgebus.deliveries, jsonb_array_elements(errors) WITH ORDINALITY AS x(e, n) ORDER BY n"
    )
    assert [row["attempt"] for row in rows] == ["3", "4", "5", "6", "7"]
    assert {row["type"] for row in rows} == {"ValueError"}
    assert rows[-1]["message"] == "attempt 7"
    assert rows[-1]["dated"]
    assert rows[-1]["handler"].endswith("broken")
    assert 'raise ValueError(f"attempt {ctx.attempt}")' in rows[-1]["traceback"]


async def test_a_delivery_beyond_a_lowered_limit_runs_once_more(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """No delivery ends without its handlers having been asked, unless a process died in them."""
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        if ctx.attempt < 8:
            raise RuntimeError("not yet")

    async with running(router, database, max_attempts=5):
        event_id = await publish(sm, "order.placed")
        await finished(sql, event_id, status="dead")
    await sql.execute(
        "UPDATE pgebus.deliveries "
        "SET status = 'pending', finished_at = NULL, attempt = 7, claim_seq = 7, due_at = now()"
    )
    async with running(router, database, max_attempts=2):
        await finished(sql, event_id)
    assert (await delivery(sql, event_id))["attempt"] == 8


async def test_a_rejected_event_is_dead_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.placed")
    async def picky(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise Reject("not an order")

    async with running(router, database):
        event_id = await publish(sm, "order.placed")
        await finished(sql, event_id, status="dead")
    assert (await delivery(sql, event_id))["attempt"] == 1


async def test_a_snooze_is_not_counted_and_a_retry_chooses_its_delay(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[int] = []
    router = EventRouter()

    @router.on("order.placed")
    async def sleepy(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(ctx.attempt)
        if len(seen) <= 3:
            raise Snooze(timedelta(milliseconds=1))
        if len(seen) == 4:
            raise Retry(delay=timedelta(milliseconds=1))

    async with running(router, database, max_attempts=2, backoff_first_seconds=600, backoff_ceiling_seconds=600):
        event_id = await publish(sm, "order.placed")
        await finished(sql, event_id)
    assert seen == [1, 1, 1, 1, 2]
    row = await delivery(sql, event_id)
    assert (row["attempt"], row["claim_seq"]) == (2, 5)


async def test_a_delayed_event_is_never_early_and_needs_no_poll(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The poll interval is 30 s: what wakes the worker is the due time it was told of."""
    router = EventRouter()
    handled = asyncio.Event()

    @router.on("later")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        if payload["n"] == 3:
            handled.set()

    async with running(router, database):
        now = await sql.fetchval("SELECT clock_timestamp()")
        ids = [await publish(sm, "later", {"n": n}, run_at=now + timedelta(seconds=0.2 * n)) for n in (3, 1, 2)]
        await asyncio.wait_for(handled.wait(), 10)
        await finished(sql, *ids)
    early = await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE finished_at < due_at")
    assert early == 0


async def test_an_event_that_nobody_handles_waits_for_a_worker_that_knows_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Also where it was published before any worker ever ran."""
    first = await publish(sm, "order.placed")
    assert (await delivery(sql, first))["status"] == "unhandled"
    later = await publish(sm, "order.placed", run_at=await sql.fetchval("SELECT now() + interval '1 hour'"))

    async with running(EventRouter(), database):
        second = await publish(sm, "order.placed")
    assert (await delivery(sql, second))["status"] == "unhandled"

    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    async with running(router, database):
        await finished(sql, first, second)
        await finished(sql, later, status="pending")
    assert (await delivery(sql, first))["attempt"] == 1


async def test_a_type_whose_handler_was_removed_is_put_aside_uncounted(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    old = EventRouter()

    @old.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    async with running(old, database):
        pass
    event_id = await publish(sm, "order.placed")
    assert (await delivery(sql, event_id))["status"] == "pending"
    async with running(EventRouter(), database):
        await finished(sql, event_id, status="unhandled")
    row = await delivery(sql, event_id)
    assert (row["attempt"], row["claim_seq"]) == (0, 1)
    async with running(old, database):
        await finished(sql, event_id)


async def test_a_handler_that_is_registered_late_is_found(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router, child = EventRouter(prefix="shop"), EventRouter(prefix="order")
    router.include_router(child)
    async with running(router, database):
        event_id = await publish(sm, "shop.order.placed")

        @child.on("placed")
        async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

        await finished(sql, event_id)

        async def subscribed() -> bool:
            return bool(await sql.fetchval("SELECT pattern = 'shop.order.placed' FROM pgebus.subscriptions"))

        await until(subscribed)


async def test_no_more_than_n_workers_deliveries_run_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    running_now = highest = 0
    gate = asyncio.Event()
    router = EventRouter()

    @router.on("slow")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        nonlocal running_now, highest
        running_now += 1
        highest = max(highest, running_now)
        await gate.wait()
        running_now -= 1

    async with sm.session() as session:
        events = await publish_events(session, [Event(type="slow") for _ in range(20)])
        ids = [event.id for event in events]
        await session.commit()
    async with running(router, database, n_workers=3):

        async def three() -> bool:
            return running_now == 3

        await until(three)
        # Nothing is held beyond the slots while nothing finishes: each one held is charged when the process dies.
        assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'running'") == 3
        gate.set()
        await finished(sql, *ids)
    assert highest == 3


async def test_two_systems_share_the_work_and_no_delivery_runs_twice(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    runs: Counter[int] = Counter()
    by: Counter[str] = Counter()

    def router(name: str) -> EventRouter:
        made = EventRouter()

        @made.on("shared")
        async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
            runs[ctx.event_id] += 1
            by[name] += 1
            await asyncio.sleep(0.001)  # long enough for both to get some

        return made

    async with running(router("a"), database), running(router("b"), database):
        async with sm.session() as session:
            events = await publish_events(session, [Event(type="shared") for _ in range(300)])
            ids = [event.id for event in events]
            await session.commit()
        await finished(sql, *ids)
    assert set(runs) == set(ids)
    assert set(runs.values()) == {1}
    assert len(by) == 2, by


@pytest.mark.parametrize(
    "row",
    [
        "INSERT INTO pgebus.events (type, payload) VALUES ('raw', ('{\"n\": ' || repeat('9', 5000) || '}')::jsonb)",
        "INSERT INTO pgebus.events (type, payload) "
        "SELECT 'raw', (repeat('{\"a\":', 5000) || '1' || repeat('}', 5000))::jsonb",
    ],
    ids=["a number beyond Python's limit", "deeper than Python can read"],
)
async def test_a_row_that_cannot_be_read_dies_alone(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, row: str
) -> None:
    router = EventRouter()

    @router.on("raw")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    async with running(router, database):
        pass
    before = await publish(sm, "raw")
    await sql.execute(row)
    odd = await sql.fetchval("SELECT max(id) FROM pgebus.events")
    after = await publish(sm, "raw")
    async with running(router, database):
        await finished(sql, before, after)
        await finished(sql, odd, status="dead")
    assert "UndecodableEvent" in (await delivery(sql, odd))["errors"]


async def test_times_outside_of_pythons_calendar_and_lost_events_stop_nobody(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """A delivery whose event is gone is dead, and does not fill its lane for ever."""
    router = EventRouter()

    @router.on("raw")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.event.id == ctx.event_id

    async with running(router, database):
        pass
    await sql.execute("INSERT INTO pgebus.events (type, run_at) VALUES ('raw', '4000-01-01 BC')")
    ancient = await sql.fetchval("SELECT max(id) FROM pgebus.events")
    async with running(router, database):
        await finished(sql, ancient)
    orphans = [await publish(sm, "raw") for _ in range(12)]
    # As a restore without triggers would leave them.
    await sql.execute(
        "SET session_replication_role = replica; DELETE FROM pgebus.events; RESET session_replication_role"
    )
    normal = await publish(sm, "raw")
    async with running(router, database):
        await finished(sql, normal)
        await finished(sql, *orphans, status="dead")


async def test_an_error_of_any_shape_is_recorded(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def cyclic() -> Exception:
        error = ValueError("round and round")
        error.__cause__ = KeyError("and round")
        error.__cause__.__cause__ = error
        return error

    def deep(depth: int) -> Exception:
        error: Exception = ValueError("bottom")
        for _ in range(depth):
            error = ExceptionGroup("level", [error])
        return error

    raised: list[BaseException] = [
        UnprintableError(), ValueError("x" * 10_000_000), ValueError("NUL \x00, half \ud800"), cyclic(), deep(1000),
        SystemExit(3), GeneratorExit(), asyncio.CancelledError(), TimeoutError(),
        BaseExceptionGroup("both", [SystemExit(1), ValueError()]), StopAsyncIteration(), MemoryError(),
        RecursionError(),
    ]  # fmt: skip
    router = EventRouter()

    @router.on("odd")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise raised[payload["n"]]

    async with running(router, database, max_attempts=1) as system:
        ids = [await publish(sm, "odd", {"n": n}) for n in range(len(raised))]
        await finished(sql, *ids, status="dead")
        assert system.health().ok
    sizes = await sql.fetch(
        "SELECT pg_column_size(errors) AS size, octet_length(errors::text) AS text FROM pgebus.deliveries"
    )
    assert max(row["text"] for row in sizes) < 32_768


async def test_channels_are_apart(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    async with running(router, database, channel='od"d Größe'):
        async with sm.session() as session:
            other = await publish_event(session, "order.placed", {}, "events")
            ours = await publish_event(session, "order.placed", {}, 'od"d Größe')
            await session.commit()
        await finished(sql, ours.id)
        assert (await delivery(sql, other.id))["status"] == "unhandled"


async def test_another_schema_works_the_same(server: Any, empty_database: DatabaseSettings) -> None:
    from pgebus.migrations import upgrade

    database = empty_database.model_copy(update={"schema_name": 'Odd "name"'})
    await asyncio.to_thread(upgrade, database)
    router = EventRouter()
    done: list[int] = []

    @router.on("order.placed")
    async def plain(ctx: EventContext, payload: dict[str, Any]) -> None:
        done.append(ctx.event.id)

    @router.on("order.paid", transactional=True)
    async def within(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await publish_event(ctx.session, "order.placed", {}, "events")

    async with DatabaseSessionManager(database) as sm, running(router, database):
        first = await publish(sm, "order.placed")
        second = await publish(sm, "order.paid")
        connection = await server.connect(empty_database.sqlalchemy_url().database)

        async def all_completed() -> bool:
            return bool(
                await connection.fetchval(
                    'SELECT count(*) = 3 AND bool_and(status = \'completed\') FROM "Odd ""name""".deliveries'
                )
            )

        await until(all_completed)
        await connection.close()
    assert sorted(done)[0] == first
    assert len(done) == 2
    assert second not in done


async def test_finished_events_are_pruned_after_the_retention(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dead, unfinished or younger stays, and so does its event."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_SECONDS", 0.0)
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        if payload.get("bad"):
            raise Reject("bad")

    async with running(router, database, retention_seconds=None):
        old = [await publish(sm, "order.placed") for _ in range(3)]
        young = await publish(sm, "order.placed")
        dead = await publish(sm, "order.placed", {"bad": True})
        later = await publish(sm, "order.placed", run_at=await sql.fetchval("SELECT now() + interval '1 day'"))
        orphaned = [await publish(sm, "order.placed") for _ in range(3)]
        await finished(sql, *old, young, *orphaned)
        await finished(sql, dead, status="dead")
    await sql.execute("SET session_replication_role = replica")
    await sql.execute("DELETE FROM pgebus.events WHERE id = ANY ($1)", orphaned)
    await sql.execute("RESET session_replication_role")
    await sql.execute(
        "UPDATE pgebus.deliveries SET finished_at = finished_at - interval '1 hour' "
        "WHERE finished_at IS NOT NULL AND event_id <> $1",
        young,
    )
    async with running(router, database, retention_seconds=1800.0):

        async def gone() -> bool:
            return not await sql.fetchval(
                "SELECT count(*) FROM pgebus.deliveries WHERE event_id = ANY ($1)", old + orphaned
            )

        await until(gone)
    left = {row["event_id"] for row in await sql.fetch("SELECT event_id FROM pgebus.deliveries")}
    assert left == {young, dead, later}
    assert left == {row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events")}
