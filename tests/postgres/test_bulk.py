"""Events as plain rows: few of them go the ordinary way, many by COPY, and nobody can tell the difference."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from uuid import uuid4

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from tests.postgres.plain_sql import Sql, subscribe
from tests.system.bus import finished, publish, running
from tests.system.faults import connected
from tests.system.waiting import until

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidKeyError,
    InvalidPayloadError,
    PayloadTooLargeError,
    PublishError,
    SessionStateError,
    publish_events,
)
from pgebus._bulk import COPY_FROM

MANY: Final = COPY_FROM + 50
COUNTS: Final = pytest.mark.parametrize("count", [3, MANY])


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "order.placed", "payload": {"n": n, "text": 'a\\"\tä\n'}, **more} for n in range(count)]


@COUNTS
async def test_rows_are_published_in_their_order_with_the_ids_that_are_returned(
    sm: DatabaseSessionManager, sql: Sql, count: int
) -> None:
    await subscribe(sql, "default", "order.#")
    async with sm.session() as session:
        ids = await publish_events(session, rows(count))
        await session.commit()
    found = await sql.fetch("SELECT id, payload::jsonb ->> 'n' AS n FROM pgebus.events ORDER BY id")
    assert [(row["id"], row["n"]) for row in found] == [(id_, str(n)) for n, id_ in enumerate(ids)]
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'pending'") == count
    async with sm.session() as session:
        event = await session.get_one(Event, ids[1])
        assert event.payload == {"n": 1, "text": 'a\\"\tä\n'}
        assert (event.channel, event.priority, event.headers, event.key) == ("events", 0, {}, None)
        assert event.created_at == event.run_at


@COUNTS
async def test_a_row_may_give_what_an_event_has(sm: DatabaseSessionManager, count: int) -> None:
    """And only some of them: the others get what they would have got."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    batch = rows(count)
    batch[1] |= {
        "channel": "slow", "priority": 7, "headers": {"a": [1]}, "key": "k", "run_at": tomorrow, "dedup_key": None,
    }  # fmt: skip
    async with sm.session() as session:
        ids = await publish_events(session, batch)
        await session.commit()
        event = await session.get_one(Event, ids[1])
        assert (event.channel, event.priority, event.headers, event.key) == ("slow", 7, {"a": [1]}, "k")
        assert event.run_at == tomorrow
        assert await session.scalar(select(func.count()).where(Event.channel == "events")) == count - 1


@COUNTS
async def test_rows_roll_back_with_their_transaction(sm: DatabaseSessionManager, sql: Sql, count: int) -> None:
    async with sm.session() as session:
        await publish_events(session, rows(1))
        nested = await session.begin_nested()
        await publish_events(session, rows(count))
        await nested.rollback()
        await session.commit()
    async with sm.engine.connect() as connection:
        await publish_events(connection, rows(count))
        await connection.rollback()
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == 1


async def test_what_is_pending_in_the_session_comes_first(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        session.add(before := Event(type="a", payload={}))
        ids = await publish_events(session, rows(MANY))
        assert before.id < ids[0]


BAD: Final[list[tuple[Any, type[Exception]]]] = [
    ({"payload": {}}, InvalidEventTypeError),
    ({"type": "a b"}, InvalidEventTypeError),
    ({"type": 7}, InvalidEventTypeError),
    ({"type": "a", "payload": []}, InvalidPayloadError),
    ({"type": "a", "payload": {"x": float("nan")}}, InvalidPayloadError),
    ({"type": "a", "payload": {"x": "y" * 2_000_000}}, PayloadTooLargeError),
    ({"type": "a", "channel": "c" * 64}, InvalidChannelError),
    ({"type": "a", "key": ""}, InvalidKeyError),
    ({"type": "a", "headers": []}, InvalidPayloadError),
    ({"type": "a", "id": 7}, PublishError),
    ({"type": "a", "colour": "red"}, PublishError),
    (Event(type="a", payload={}), PublishError),
    ("a", PublishError),
]


@pytest.mark.parametrize(("bad", "error"), BAD)
async def test_a_bad_row_is_named_and_nothing_is_sent(
    sm: DatabaseSessionManager, bad: Any, error: type[Exception]
) -> None:
    async with sm.session() as session:
        with pytest.raises(error) as caught:
            await publish_events(session, [*rows(MANY), bad])
        where = f"events[{MANY}]"
        assert where in str(caught.value) or caught.value.__notes__ == [f"That is {where}."]
        assert await session.scalar(select(func.count()).select_from(Event)) == 0, "the session can go on"


async def test_a_row_among_events_is_refused(sm: DatabaseSessionManager) -> None:
    mixed: Any = [Event(type="a", payload={}), {"type": "a"}]
    async with sm.session() as session:
        with pytest.raises(PublishError, match=r"events\[1\]"):
            await publish_events(session, mixed)
        with pytest.raises(PublishError, match="iterable"):
            await publish_events(session, cast("Any", {"type": "a"}))


@COUNTS
async def test_a_used_dedup_key_gives_the_id_that_is_there(sm: DatabaseSessionManager, count: int) -> None:
    async with sm.session() as session:
        (first,) = await publish_events(session, rows(1, dedup_key="d"))
        batch = rows(count)
        batch[2]["dedup_key"] = "d"
        ids = await publish_events(session, batch)
        assert ids[2] == first
        assert len(set(ids)) == count


async def test_what_postgresql_refuses_is_an_error_of_sqlalchemy(sm: DatabaseSessionManager, sql: Sql) -> None:
    await sql.execute("ALTER TABLE pgebus.events ADD CONSTRAINT few CHECK (payload ->> 'n' <> '120')")
    async with sm.session() as session:
        with pytest.raises(IntegrityError):
            await publish_events(session, rows(MANY))
        await session.rollback()
        await publish_events(session, rows(COPY_FROM))
        await session.commit()
    async with sm.session() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises((SessionStateError, DBAPIError)):
            await publish_events(session, rows(MANY))


@pytest.mark.parametrize("url", ["postgresql+psycopg", "postgresql+asyncpg"])
async def test_every_driver_publishes_many(database: DatabaseSettings, sql: Sql, url: str) -> None:
    engine = create_async_engine(database.sqlalchemy_url().set(drivername=url))
    async with engine.begin() as connection:
        ids = await publish_events(connection, rows(MANY))
    await engine.dispose()
    assert [row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events ORDER BY id")] == ids


async def test_a_role_that_may_only_publish_goes_the_ordinary_way(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    role = f"publisher_{uuid4().hex}"
    await sql.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA pgebus TO {role}")
    await sql.execute(f"GRANT INSERT, SELECT ON pgebus.events TO {role}")
    async with sm.session() as session:
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        ids = await publish_events(session, rows(MANY))
        await session.commit()
    assert len(ids) == await sql.fetchval("SELECT count(*) FROM pgebus.events")
    await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_what_a_handler_publishes_says_what_caused_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("root", transactional=True)
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await publish_events(ctx.session, rows(MANY, headers={"mine": 1}))

    async with running(router, database):
        root = await publish(sm, "root")
        await finished(sql, root)
    found = await sql.fetch("SELECT DISTINCT headers FROM pgebus.events WHERE type = 'order.placed'")
    assert len(found) == 1
    assert f'"causation_id": "{root}"' in found[0]["headers"]
    assert '"mine": 1' in found[0]["headers"]


async def test_a_copy_that_is_broken_off_raises_what_broke_it_off(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Its connection is thrown away, and the rollback on it that leaving the session would bring does not fail."""
    async with connected(database) as other, other.transaction():
        await other.execute("LOCK TABLE pgebus.events IN SHARE MODE")
        copying = asyncio.create_task(_publish_many(sm))
        await until(
            lambda: sql.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database()"
                " AND wait_event_type = 'Lock' AND query LIKE 'COPY%'"
            )
        )
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
    assert "Current Checked out connections: 0" in sm.engine.sync_engine.pool.status()
    await _publish_many(sm)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == MANY


async def _publish_many(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        await publish_events(session, rows(MANY))
        await session.commit()
