"""The whole of a bus in a schema of any name, and several of them in one database that know nothing of each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgebus import DatabaseSessionManager, DatabaseSettings, Event, EventContext, EventRouter, publish_event
from pgebus.drift import find_drift
from pgebus.migrations import downgrade, upgrade
from pgebus.names import quote_identifier
from tests.conftest import Server
from tests.postgres.test_migrations import facts, in_schema, is_there
from tests.schema_names import MORE, ODD, clear, schemas_in
from tests.system.bus import Sql, running
from tests.system.processes import Inquest
from tests.system.waiting import until

NAMES = [*ODD, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[DatabaseSettings]:
    """A database for all tests of this module."""
    name = "pgebus_test_system_schema_names"
    asyncio.run(server.execute(f"CREATE DATABASE {name}"))
    yield server.settings(name)
    asyncio.run(server.execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def sql(server: Server, shared: DatabaseSettings) -> AsyncIterator[Sql]:
    connection = await server.connect(shared.sqlalchemy_url().database)
    yield connection
    await clear(connection)
    await connection.close()


async def publish_with_our_sessions(settings: DatabaseSettings) -> None:
    async with DatabaseSessionManager(settings) as sm, sm.session() as session:
        await publish_event(session, "order.placed", {"by": "publish_event"}, "events")
        session.add_all([Event(type="order.placed", payload={"by": "our session"}) for _ in range(2)])
        await session.commit()


def translated(settings: DatabaseSettings) -> dict[str, Any]:
    """The one line that an application's own engine needs."""
    return {"execution_options": {"schema_translate_map": {"pgebus": settings.schema_name}}}


async def publish_with_a_hosts_engine(settings: DatabaseSettings) -> None:
    engine = create_async_engine(settings.sqlalchemy_url(), **translated(settings))
    async with AsyncSession(engine) as session:
        await publish_event(session, "order.placed", {"by": "host's publish_event"}, "events")
        session.add_all([Event(type="order.placed", payload={"by": "host's session"}) for _ in range(2)])
        await session.execute(sa.insert(Event).values(type="order.placed", payload={"by": "host's ORM insert"}))
        await session.commit()
    rows = [{"type": "order.placed", "payload": {"by": "host's bulk insert"}} for _ in range(2)]
    async with engine.begin() as connection:
        await connection.execute(sa.insert(Event), rows)
        assert len((await connection.scalars(sa.insert(Event).returning(Event.id), rows)).all()) == 2
    await engine.dispose()


def publish_without_asyncio(settings: DatabaseSettings) -> None:
    engine = sa.create_engine(settings.sqlalchemy_url().set(drivername="postgresql+psycopg"), **translated(settings))
    with Session(engine) as session:
        session.add_all([Event(type="order.placed", payload={"by": "sync session"}) for _ in range(2)])
        session.execute(sa.insert(Event).values(type="order.placed", payload={"by": "sync ORM insert"}))
        session.commit()
    rows = [{"type": "order.placed", "payload": {"by": "sync bulk insert"}} for _ in range(2)]
    with engine.begin() as connection:
        connection.execute(sa.insert(Event), rows)
        assert len(connection.scalars(sa.insert(Event).returning(Event.id), rows).all()) == 2
    engine.dispose()


PUBLISHED = {
    "publish_event": 1,
    "our session": 2,
    "host's publish_event": 1,
    "host's session": 2,
    "host's ORM insert": 1,
    "host's bulk insert": 4,
    "sync session": 2,
    "sync ORM insert": 1,
    "sync bulk insert": 4,
}


def echoing() -> EventRouter:
    """A handler that writes down, through its session, what it got."""
    router = EventRouter()

    @router.on("order.placed", transactional=True)
    async def echo(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        stored = await ctx.session.scalar(sa.select(Event.payload).where(Event.id == ctx.event.id))
        assert stored == payload
        ctx.session.add(Event(type="echo", channel="echoes", payload=payload))

    return router


async def handled(sql: Sql, schema: str, count: int) -> None:
    async def done() -> bool:
        found: int = await sql.fetchval(
            f"SELECT count(*) FROM {quote_identifier(schema)}.deliveries WHERE status = 'completed'"
        )
        return found == count

    await until(done)


@pytest.mark.parametrize("schema", NAMES)
async def test_a_bus_lives_in_a_schema_of_any_name(schema: str, shared: DatabaseSettings, sql: Sql) -> None:
    settings, quoted = in_schema(shared, schema), quote_identifier(schema)
    await asyncio.to_thread(upgrade, settings)
    made = await facts(sql, schema)

    await publish_with_our_sessions(settings)
    await publish_with_a_hosts_engine(settings)
    await asyncio.to_thread(publish_without_asyncio, settings)
    async with running(echoing(), settings):
        await handled(sql, schema, sum(PUBLISHED.values()))
    echoes = await sql.fetch(
        f"SELECT payload->>'by' AS by, count(*) AS count FROM {quoted}.events WHERE type = 'echo' GROUP BY 1"
    )
    assert {row["by"]: row["count"] for row in echoes} == PUBLISHED

    assert await find_drift(settings) == []
    await sql.execute(f"ALTER FUNCTION {quoted}.fan_out() SECURITY INVOKER")
    assert [(each.kind, each.name, each.aspect) for each in await find_drift(settings)] == [
        ("function", "fan_out()", "security")
    ]

    await asyncio.to_thread(downgrade, settings)
    assert await is_there(sql, schema) == (schema == "public")
    await asyncio.to_thread(upgrade, settings)
    assert await facts(sql, schema) == made
    await asyncio.to_thread(downgrade, settings)
    # Nothing was made beside it.
    assert await schemas_in(sql) == ["public"]


@pytest.fixture
async def tenants(shared: DatabaseSettings) -> AsyncIterator[tuple[DatabaseSettings, DatabaseSettings]]:
    """Two schemas of one database, migrated."""
    both = in_schema(shared, "first"), in_schema(shared, ODD[0])
    for settings in both:
        await asyncio.to_thread(upgrade, settings)
    yield both
    for settings in both:
        await asyncio.to_thread(downgrade, settings)


def collecting(seen: list[int]) -> EventRouter:
    router = EventRouter()

    @router.on("order.placed", transactional=True)
    async def collect(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(payload["number"])

    return router


async def test_systems_of_two_schemas_share_a_channel_and_no_events(
    tenants: tuple[DatabaseSettings, DatabaseSettings], sql: Sql
) -> None:
    """LISTEN and NOTIFY know no schemas: each is woken by the other's events, and finds its own."""
    seen: tuple[list[int], list[int]] = [], []
    async with running(collecting(seen[0]), tenants[0]), running(collecting(seen[1]), tenants[1]):
        for number in range(20):
            which = number % 2
            async with DatabaseSessionManager(tenants[which]) as sm, sm.session() as session:
                await publish_event(session, "order.placed", {"number": number}, "events")
                await session.commit()
        for settings in tenants:
            await handled(sql, settings.schema_name, 10)
    assert [sorted(each) for each in seen] == [list(range(0, 20, 2)), list(range(1, 20, 2))]


ABANDONED = """
WITH event AS (
  INSERT INTO {schema}.events (type, payload) VALUES ('order.placed', '{{"number": 7}}') RETURNING id
)
INSERT INTO {schema}.deliveries
  (event_id, due_at, channel, consumer_group, type, status, worker_id, claimed_at, attempt, claim_seq)
SELECT id, now(), 'events', 'default', 'order.placed', 'running', {worker}, now(), 1, 1 FROM event
"""


async def test_a_worker_is_dead_in_its_own_schema_alone(
    tenants: tuple[DatabaseSettings, DatabaseSettings], sql: Sql, inquest: Inquest
) -> None:
    """Advisory locks know no schemas either: one that is held in the other's name keeps nobody here alive."""
    seen: tuple[list[int], list[int]] = [], []
    dead, alive = 4711, 4712
    await sql.execute(f"SELECT pg_advisory_lock({alive})")
    # Without the triggers, which would give the event another delivery.
    await sql.execute("SET session_replication_role = replica")
    for settings, worker in zip(tenants, (dead, alive), strict=True):
        await sql.execute(ABANDONED.format(schema=quote_identifier(settings.schema_name), worker=worker))
    quick = {"recovery_grace_seconds": 0.1}
    async with running(collecting(seen[0]), tenants[0], **quick), running(collecting(seen[1]), tenants[1], **quick):
        await handled(sql, tenants[0].schema_name, 1)

        async def seen_alive() -> bool:
            return alive in inquest.witnessed

        await until(seen_alive)
        assert set(inquest.condemned) == {dead}
        assert seen == ([7], [])
        await sql.execute(f"SELECT pg_advisory_unlock({alive})")
        await handled(sql, tenants[1].schema_name, 1)
    assert set(inquest.condemned) == {dead, alive}
    assert seen == ([7], [7])


async def test_drift_in_one_schema_is_none_of_another(
    tenants: tuple[DatabaseSettings, DatabaseSettings], sql: Sql
) -> None:
    await sql.execute(f"DROP INDEX {quote_identifier(tenants[1].schema_name)}.ix_deliveries_due")
    assert await find_drift(tenants[0]) == []
    assert [str(each) for each in await find_drift(tenants[1])] == ["index ix_deliveries_due: missing"]
