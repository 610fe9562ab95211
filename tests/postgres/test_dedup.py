"""A dedup_key is published once for as long as its event is kept, and the caller's transaction stays usable."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from tests.postgres.test_publishing import Sql, handling, published
from tests.postgres.units import KINDS, Kind, Units
from tests.system.waiting import until

from pgebus import (
    DatabaseSessionManager,
    Event,
    InvalidKeyError,
    InvalidPriorityError,
    RetryTransactionError,
    publish_event,
    publish_events,
)
from pgebus.settings import DatabaseSettings

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@every_kind
async def test_publishing_a_key_again_returns_the_event_that_is_there(
    database: DatabaseSettings, sql: Sql, kind: Kind
) -> None:
    async with Units(database).open(kind) as unit:
        first = await unit.publish("a", {"n": 1}, "events", dedup_key="k", key="order:7", priority=3)
        first_id = first.id
        assert (first.duplicate, first.key, first.priority, first.dedup_key) == (False, "order:7", 3, "k")
        await unit.end("commit")
        again = await unit.publish("b", {"n": 2}, "events", dedup_key="k")
        assert (again.id, again.type, again.payload, again.duplicate) == (first_id, "a", {"n": 1}, True)
        inside = await unit.publish("c", {}, "events", dedup_key="l")
        twice = await unit.publish("d", {}, "events", dedup_key="l")
        assert (twice.id, twice.duplicate) == (inside.id, True)
        elsewhere = await unit.publish("e", {}, "other", dedup_key="k")
        assert not elsewhere.duplicate
        await unit.end("commit")
        await unit.publish("gone", {}, "events", dedup_key="m")
        await unit.end("rollback")
        assert not (await unit.publish("back", {}, "events", dedup_key="m")).duplicate
        await unit.end("commit")
    assert [row[1:3] for row in await published(sql)] == [
        ("a", "events"), ("c", "events"), ("e", "other"), ("back", "events")
    ]  # fmt: skip


@every_kind
async def test_a_batch_keeps_its_order_around_duplicates(database: DatabaseSettings, sql: Sql, kind: Kind) -> None:
    async with Units(database).open(kind) as unit:
        await unit.publish("a", {}, "events", dedup_key="k")
        batch = [Event(type="b"), Event(type="c", dedup_key="k"), Event(type="d", dedup_key="l"), Event(type="e")]
        found = await unit.publish_many(batch)
        assert [(each.type, each.duplicate) for each in found] == [
            ("b", False), ("a", True), ("d", False), ("e", False)
        ]  # fmt: skip
        await unit.end("commit")
    assert [row[1] for row in await published(sql)] == ["a", "b", "d", "e"]


async def test_a_pending_object_is_flushed_before_and_an_added_event_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        session.add(Event(type="pending"))
        mine = Event(type="mine", dedup_key="k")
        session.add(mine)
        assert (await publish_events(session, [mine, Event(type="other", dedup_key="k")])) == [mine, mine]
        assert mine in session
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["pending", "mine"]


async def test_another_transaction_that_has_not_ended_is_waited_for(sm: DatabaseSessionManager, sql: Sql) -> None:
    """If it commits, its event is returned; if it rolls back, ours is published."""
    for end in ("commit", "rollback"):
        async with sm.session() as one, sm.session() as two:
            theirs = (await publish_event(one, "theirs", {}, "events", dedup_key=end)).id
            waiting = asyncio.create_task(publish_event(two, "ours", {}, "events", dedup_key=end))
            await until(lambda: sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            assert not waiting.done()
            await getattr(one, end)()
            ours = await waiting
            assert ours.duplicate == (end == "commit")
            assert (ours.id == theirs) == (end == "commit")
            await publish_event(two, "usable", {}, "events")
            await two.commit()
    assert [row[1] for row in await published(sql)] == ["theirs", "usable", "ours", "usable"]


async def test_a_hundred_at_once_publish_one(sm: DatabaseSessionManager, sql: Sql) -> None:
    async def one(number: int) -> bool:
        async with sm.session() as session:
            event = await publish_event(session, "a", {"n": number}, "events", dedup_key="k")
            await session.commit()
            return event.duplicate

    assert sorted(await asyncio.gather(*map(one, range(100)))) == [False] + [True] * 99
    assert len(await published(sql)) == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_row_that_cannot_be_seen_asks_for_another_transaction(
    sm: DatabaseSessionManager, sql: Sql, level: Any
) -> None:
    async with AsyncSession(sm.engine.execution_options(isolation_level=level)) as session:
        await publish_event(session, "snapshot", {}, "events")
        async with sm.session() as other:
            await publish_event(other, "theirs", {}, "events", dedup_key="k")
            await other.commit()
        with pytest.raises(RetryTransactionError) as caught:
            await publish_event(session, "ours", {}, "events", dedup_key="k")
        assert caught.value.dedup_key == "k"
        await session.rollback()
        again = await publish_event(session, "ours", {}, "events", dedup_key="k")
        assert (again.type, again.duplicate) == ("theirs", True)
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["theirs"]


async def test_adding_an_event_with_a_used_key_is_an_integrity_error(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        session.add(Event(type="a", dedup_key="k"))
        await session.commit()
        session.add(Event(type="a", dedup_key="k"))
        with pytest.raises(IntegrityError):
            await session.flush()


async def test_a_key_is_free_again_when_its_event_is_gone(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        first = await publish_event(session, "a", {}, "events", dedup_key="k")
        await session.commit()
        await sql.execute("DELETE FROM pgebus.events")
        second = await publish_event(session, "a", {}, "events", dedup_key="k")
        assert (second.duplicate, second.id > first.id) == (False, True)


async def test_in_a_handlers_session_as_well(sm: DatabaseSessionManager, sql: Sql) -> None:
    for duplicate in (False, True):
        async with handling(sm) as session:
            event = await publish_event(session, "a", {}, "events", dedup_key="k")
            await publish_event(session, "b", {}, "events")
        assert event.headers == {"correlation_id": "c-1", "causation_id": "17"}
        assert event.duplicate == duplicate
    assert [row[1] for row in await published(sql)] == ["a", "b", "b"]


BAD_KEYS: list[Any] = ["", "k" * 256, "é" * 128, "a\x00", "\ud800", b"k", 1, True, ["k"]]
BAD_PRIORITIES: list[Any] = [-1, 10, 2**31, 10**5000, True, 1.0, "1", float("nan"), [1]]


async def test_bad_keys_and_priorities_are_refused_before_any_sql(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        for name in ("key", "dedup_key"):
            for key in BAD_KEYS:
                with pytest.raises(InvalidKeyError):
                    await publish_event(session, "a", {}, "events", **{name: key})
        for priority in BAD_PRIORITIES:
            with pytest.raises(InvalidPriorityError):
                await publish_event(session, "a", {}, "events", priority=priority)
        assert not session.in_transaction()
        await publish_event(session, "a", {}, "events", key="k" * 255, dedup_key="é" * 127, priority=9)
        await session.commit()
    assert len(await published(sql)) == 1
