"""Adding an Event to a session publishes it, and the flush brings back what the database filled in."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from tests.postgres.plain_sql import Sql, deliveries

from pgebus.database import DatabaseSessionManager
from pgebus.errors import SessionStateError
from pgebus.migrations import upgrade
from pgebus.models import Delivery, Event
from pgebus.settings import DatabaseSettings


async def test_the_flush_loads_the_defaults_of_the_database(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Without another round trip: in an AsyncSession a lazy load would raise."""
    async with sm.session() as session:
        event = Event(type="order.placed", payload={"order": 7})
        session.add(event)
        await session.flush()
        assert event.id > 0
        assert (event.channel, event.priority, event.headers, event.key) == ("events", 0, {}, None)
        assert event.run_at == event.created_at == await session.scalar(select(Event.created_at))
        await session.commit()
    assert await deliveries(sql) == [(event.id, "default", "unhandled")]


async def test_many_events_are_loaded_back_each_with_its_own(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        events = [Event(type=f"a.t{number}", payload={"n": number}) for number in range(50)]
        session.add_all(events)
        await session.flush()
        stored = {row.id: row.type for row in await session.execute(select(Event.id, Event.type))}
        assert {event.id: event.type for event in events} == stored
        assert {event.channel for event in events} == {"events"}


async def test_none_becomes_the_default_of_the_database(sm: DatabaseSessionManager) -> None:
    left_out = {"headers": None, "run_at": None, "priority": None, "key": None, "dedup_key": None}
    async with sm.session() as session:
        event = Event(type="a", payload={}, **left_out)
        session.add(event)
        await session.flush()
        assert (event.headers, event.priority) == ({}, 0)
        assert event.run_at == event.created_at


async def test_every_value_comes_back(sm: DatabaseSessionManager) -> None:
    run_at = datetime(2030, 1, 1, 12, 30, 0, 5, UTC)
    values = {"payload": {"ä": [1, None, "x"]}, "headers": {"trace": "t"}, "key": "k", "dedup_key": "d"}
    async with sm.session() as session:
        session.add(Event(type="a.b", channel="shop", priority=9, run_at=run_at, **values))
        await session.commit()
    async with sm.session() as session:
        event = (await session.scalars(select(Event))).one()
        assert {name: getattr(event, name) for name in values} == values
        assert (event.channel, event.priority, event.run_at) == ("shop", 9, run_at)
        delivery = (await session.scalars(select(Delivery))).one()
        assert (delivery.event_id, delivery.due_at, delivery.key) == (event.id, run_at, "k")


async def test_an_event_in_another_schema(empty_database: DatabaseSettings) -> None:
    """The models say `pgebus`; the manager's engine puts the schema of the settings in its place."""
    settings = empty_database.model_copy(update={"schema_name": 'Odd "name"'})
    await asyncio.to_thread(upgrade, settings)
    async with DatabaseSessionManager(settings) as sm, sm.session() as session:
        session.add(Event(type="a", payload={}))
        await session.commit()
        assert (await session.scalars(select(Delivery.status))).all() == ["unhandled"]


async def test_a_two_phase_transaction_is_refused_before_any_sql(sm: DatabaseSessionManager) -> None:
    async with AsyncSession(sm.engine, twophase=True) as session:
        session.add(Event(type="a", payload={}))
        with pytest.raises(SessionStateError, match="two-phase"):
            await session.flush()
