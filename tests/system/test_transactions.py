"""Transactional handlers: their effects and the completion commit together, or neither does."""

from __future__ import annotations

import asyncio
import logging
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    GuardedSession,
    Snooze,
    publish_event,
)
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.waiting import until


@pytest.fixture(autouse=True)
async def effects(sql: Sql) -> None:
    """A table of effects without any unique constraint: a constraint would hide what is done twice."""
    await sql.execute(
        "CREATE TABLE effects (event_id bigint, what text);"
        "CREATE TABLE balance (id int PRIMARY KEY, amount int NOT NULL);"
        "INSERT INTO balance VALUES (1, 0);"
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )


async def effect(session: GuardedSession | None, event_id: int, what: str = "") -> None:
    assert session is not None
    await session.execute(text("INSERT INTO effects VALUES (:id, :what)"), {"id": event_id, "what": what})


async def effects_of(sql: Sql, event_id: int) -> list[str]:
    rows = await sql.fetch("SELECT what FROM effects WHERE event_id = $1 ORDER BY what", event_id)
    return [row["what"] for row in rows]


async def test_all_handlers_of_an_event_share_one_transaction_with_the_completion(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    transactions: list[int] = []
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def one(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx.session, ctx.event_id, "one")
        assert ctx.session is not None
        transactions.append(int(await ctx.session.scalar(text("SELECT pg_current_xact_id()::text::bigint"))))

    @router.on("order.paid")
    async def plain(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None, "one of its handlers is transactional"
        transactions.append(int(await ctx.session.scalar(text("SELECT pg_current_xact_id()::text::bigint"))))

    @router.on("order.paid", transactional=True)
    async def two(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        assert await ctx.session.scalar(text("SELECT what FROM effects")) == "one"
        await effect(ctx.session, ctx.event_id, "two")

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id)
    assert await effects_of(sql, event_id) == ["one", "two"]
    assert len(set(transactions)) == 1
    completed_by = await sql.fetchval("SELECT xmin::text::bigint FROM pgebus.deliveries")
    assert completed_by == transactions[0]


async def test_an_exception_rolls_back_every_handler_and_all_run_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    starts: list[str] = []
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def one(ctx: EventContext, payload: dict[str, Any]) -> None:
        starts.append("one")
        await effect(ctx.session, ctx.event_id, f"one {ctx.attempt}")

    @router.on("order.paid", transactional=True)
    async def two(ctx: EventContext, payload: dict[str, Any]) -> None:
        starts.append("two")
        await effect(ctx.session, ctx.event_id, f"two {ctx.attempt}")
        if ctx.attempt < 3:
            raise RuntimeError("not yet")

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id)
    assert starts == ["one", "two"] * 3
    assert await effects_of(sql, event_id) == ["one 3", "two 3"]
    assert (await delivery(sql, event_id))["handled"] is None


async def test_a_snoozed_transaction_leaves_nothing_behind(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    runs = 0
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        nonlocal runs
        runs += 1
        await effect(ctx.session, ctx.event_id, f"run {runs}")
        if runs == 1:
            raise Snooze(timedelta(milliseconds=1))

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id)
    assert await effects_of(sql, event_id) == ["run 2"]


async def test_events_published_by_a_handler_commit_with_it_and_name_their_cause(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    headers: list[dict[str, Any]] = []
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await publish_event(ctx.session, "invoice.wanted", {"attempt": ctx.attempt}, "events")
        ctx.session.add(Event(type="mail.wanted", payload={"attempt": ctx.attempt}))
        if ctx.attempt == 1:
            raise RuntimeError("once more")

    @router.on("invoice.wanted", transactional=True)
    async def invoice(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        assert ctx.event in ctx.session, "the event is attached: its relationships can be loaded"
        assert await ctx.session.scalar(select(Event.type).where(Event.id == ctx.event_id)) == "invoice.wanted"
        headers.append(ctx.event.headers)
        await publish_event(ctx.session, "invoice.made", {}, "events")

    @router.on("invoice.made")
    async def made(ctx: EventContext, payload: dict[str, Any]) -> None:
        headers.append(ctx.event.headers)

    async with running(router, database):
        event_id = await publish(sm, "order.paid")

        async def both() -> bool:
            return len(headers) == 2

        await until(both)
    events = await sql.fetch("SELECT id, type, payload FROM pgebus.events WHERE id <> $1 ORDER BY id", event_id)
    assert [(row["type"], row["payload"]) for row in events] == [
        ("invoice.wanted", '{"attempt": 2}'), ("mail.wanted", '{"attempt": 2}'), ("invoice.made", "{}"),
    ]  # fmt: skip
    root = str(event_id)
    assert headers == [
        {"correlation_id": root, "causation_id": root},
        {"correlation_id": root, "causation_id": str(events[0]["id"])},
    ]


async def test_events_that_a_hook_of_the_session_adds_name_their_cause_as_well(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        ctx.session.add(Event(type="mail.wanted", payload={}))

    def audit(session: Session, *_: object) -> None:
        if any(isinstance(each, Event) and each.type == "mail.wanted" for each in session.new):
            session.add(Event(type="audited", payload={}))

    event.listen(Session, "before_flush", audit)
    try:
        async with running(router, database):
            event_id = await publish(sm, "order.paid")
            await finished(sql, event_id)
    finally:
        event.remove(Session, "before_flush", audit)
    causes = await sql.fetch(
        "SELECT type, headers ->> 'causation_id' AS cause FROM pgebus.events WHERE id > $1", event_id
    )
    assert {(row["type"], row["cause"]) for row in causes} == {
        ("mail.wanted", str(event_id)), ("audited", str(event_id)),
    }  # fmt: skip


async def test_a_serialization_failure_runs_again_at_once_and_is_not_counted(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """20 increments of one row at SERIALIZABLE, five at a time, in one attempt each."""
    router = EventRouter()

    @router.on("deposit", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        amount = await ctx.session.scalar(text("SELECT amount FROM balance WHERE id = 1"))
        await ctx.session.execute(text("UPDATE balance SET amount = :n WHERE id = 1"), {"n": amount + 1})

    async with running(router, database, isolation_level="SERIALIZABLE", max_attempts=50):
        ids = [await publish(sm, "deposit") for _ in range(20)]
        await finished(sql, *ids, within=20)
    assert await sql.fetchval("SELECT amount FROM balance") == 20


async def test_a_deadlock_is_replayed_without_using_up_an_attempt(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    await sql.execute("INSERT INTO balance VALUES (2, 0)")
    name = await sql.fetchval("SELECT current_database()")
    await sql.execute(f"ALTER DATABASE \"{name}\" SET deadlock_timeout = '20ms'")
    met = asyncio.Barrier(2)
    first = {1: True, 2: True}
    router = EventRouter()

    @router.on("transfer", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        mine, other = payload["from"], payload["to"]
        add = text("UPDATE balance SET amount = amount + 1 WHERE id = :id")
        await ctx.session.execute(add, {"id": mine})
        if first.pop(mine, False):
            await met.wait()
        await ctx.session.execute(add, {"id": other})

    async with running(router, database, max_attempts=1):
        ids = [await publish(sm, "transfer", {"from": a, "to": b}) for a, b in ((1, 2), (2, 1))]
        await finished(sql, *ids)
    assert await sql.fetchval("SELECT array_agg(amount) FROM balance") == [2, 2]


async def test_a_deferred_constraint_fails_the_attempt_with_everything_in_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx.session, ctx.event_id)
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO child VALUES (1)"))

    async with running(router, database, max_attempts=2):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id, status="dead")
    assert await effects_of(sql, event_id) == []
    assert "ForeignKeyViolation" in (await delivery(sql, event_id))["errors"]


async def test_a_database_error_that_the_handler_swallows_is_no_success(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """PostgreSQL answers the COMMIT of an aborted transaction with ROLLBACK, and no error."""
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx.session, ctx.event_id)
        assert ctx.session is not None
        with suppress(DBAPIError):
            await ctx.session.execute(text("SELECT 1 / 0"))

    async with running(router, database, max_attempts=2):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id, status="dead")
    assert await effects_of(sql, event_id) == []
    assert "TransactionAborted" in (await delivery(sql, event_id))["errors"]


@pytest.mark.parametrize("message", ["COMMIT", "COMMIT; BEGIN", "ROLLBACK", "ROLLBACK; BEGIN"])
async def test_a_transaction_that_was_ended_behind_the_guard_is_detected_and_never_run_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one hole: the driver's own connection, dug out of a result."""
    starts = 0
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        nonlocal starts
        starts += 1
        await effect(ctx.session, ctx.event_id)
        assert ctx.session is not None
        result: Any = await ctx.session.run_sync(lambda session: session.execute(text("SELECT 1")))
        driver = result.connection.connection.driver_connection
        await driver.execute(message)

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id, status="dead")
        clean = await publish(sm, "unknown")
        await finished(sql, clean, status="unhandled")
    assert starts == 1
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)
    assert "TransactionEndedError" in (await delivery(sql, event_id))["errors"]
    assert await sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == 0


async def test_unsafe_commits_for_real_and_the_delivery_still_completes(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await effect(ctx.session, ctx.event_id, f"kept {ctx.attempt}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = ctx.session.unsafe
        await session.commit()
        await effect(ctx.session, ctx.event_id, f"with the rest {ctx.attempt}")
        if ctx.attempt == 1:
            raise RuntimeError("after the commit")

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id)
    assert await effects_of(sql, event_id) == ["kept 1", "kept 2", "with the rest 2"]


async def test_an_unsafe_commit_that_postgresql_turns_into_a_rollback_is_no_success(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await effect(ctx.session, ctx.event_id, f"attempt {ctx.attempt}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = ctx.session.unsafe
        if ctx.attempt == 1:
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
        await session.commit()

    async with running(router, database):
        event_id = await publish(sm, "order.paid")
        await finished(sql, event_id)
    assert await effects_of(sql, event_id) == ["attempt 2"]


async def test_the_session_is_of_no_use_after_the_handlers(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    from pgebus import SessionControlError

    kept: list[GuardedSession] = []
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        kept.append(ctx.session)

    async with running(router, database):
        await finished(sql, await publish(sm, "order.paid"))
        with pytest.raises(SessionControlError):
            await kept[0].execute(text("SELECT 1"))


async def test_what_one_handler_sets_for_its_transaction_the_next_delivery_does_not_see(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[tuple[str, str, int]] = []
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        row = (
            await ctx.session.execute(
                text("SELECT current_setting('search_path'), current_setting('app.who', true), pg_backend_pid()")
            )
        ).one()
        seen.append((row[0], row[1] or "", row[2]))
        for_the_session = payload["fails"] is None
        await ctx.session.execute(text(f"SET {'' if for_the_session else 'LOCAL'} search_path = pgebus"))
        await ctx.session.execute(text("SELECT set_config('app.who', 'me', :local)"), {"local": not for_the_session})
        await ctx.session.execute(text("SELECT pg_advisory_lock(1, 2)"))
        if payload["fails"]:
            raise RuntimeError

    async with running(router, database, n_workers=1, max_attempts=1):
        first = await publish(sm, "order.paid", {"fails": True})
        await finished(sql, first, status="dead")
        second = await publish(sm, "order.paid", {"fails": None})
        await finished(sql, second)
        third = await publish(sm, "order.paid", {"fails": False})
        await finished(sql, third)
        assert await sql.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1") == 1
    assert [row[:2] for row in seen] == [('"$user", public', "")] * 3
    assert len({row[2] for row in seen}) == 1, "one connection, used three times"


async def test_losing_the_lease_rolls_back_what_the_handlers_did(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The fence: whoever took the delivery meanwhile finds it untouched."""
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx.session, ctx.event_id, str(ctx.claim_seq))
        if ctx.claim_seq == 1:
            await sql.execute(
                "UPDATE pgebus.deliveries SET claim_seq = claim_seq + 1 WHERE event_id = $1", ctx.event_id
            )

    async with running(router, database) as system:
        event_id = await publish(sm, "order.paid")

        async def let_go() -> bool:
            return system.health().held == 0 and await sql.fetchval(
                "SELECT claim_seq = 2 FROM pgebus.deliveries WHERE event_id = $1", event_id
            )

        await until(let_go)
        assert await effects_of(sql, event_id) == []
    # Nobody holds that lease; the next look at what runs in this worker's name, or its end, gives it back.


async def test_a_handler_that_is_cancelled_by_a_stop_leaves_nothing_and_is_not_counted(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    started = asyncio.Event()
    router = EventRouter()

    @router.on("order.paid", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx.session, ctx.event_id, f"claim {ctx.claim_seq}")
        if ctx.claim_seq == 1:
            started.set()
            assert ctx.session is not None
            await ctx.session.execute(text("SELECT pg_sleep(60)"))

    async with running(router, database) as system:
        event_id = await publish(sm, "order.paid")
        await asyncio.wait_for(started.wait(), 10)
        await system.stop(wait_for_completion=False)
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"], row["claim_seq"], row["lost"]) == ("pending", 0, 1, 0)
    assert await effects_of(sql, event_id) == []
    async with running(router, database):
        await finished(sql, event_id)
    assert await effects_of(sql, event_id) == ["claim 2"]
