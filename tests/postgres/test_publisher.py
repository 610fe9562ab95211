"""Events that belong to no other transaction: each is committed when `publish()` returns."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from tests.postgres.plain_sql import Sql, terminate

from pgebus import (
    DatabaseSettings,
    EventPublisher,
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidPayloadError,
    PublishError,
    StateError,
)


async def test_what_is_published_is_committed(database: DatabaseSettings, sql: Sql) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    async with EventPublisher(database) as publisher:
        first = await publisher.publish("order.placed", {"n": 'ä"'})
        second = await publisher.publish(
            "order.placed", {}, "slow", tomorrow, headers={"a": 1}, key="k", dedup_key="d", priority=3
        )
        assert second.id > first.id
        rows = await sql.fetch("SELECT * FROM pgebus.events ORDER BY id")
    assert [row["id"] for row in rows] == [first.id, second.id]
    assert rows[0]["payload"] == '{"n": "ä\\""}'
    assert (rows[0]["channel"], rows[0]["priority"], rows[0]["headers"]) == ("events", 0, "{}")
    assert (rows[1]["channel"], rows[1]["run_at"], rows[1]["headers"]) == ("slow", tomorrow, '{"a": 1}')
    assert (rows[1]["key"], rows[1]["dedup_key"], rows[1]["priority"]) == ("k", "d", 3)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 2


async def test_a_used_dedup_key_gives_the_event_that_is_there(database: DatabaseSettings, sql: Sql) -> None:
    async with EventPublisher(database, connections=10) as publisher:
        published = await asyncio.gather(*(publisher.publish("a", {"n": n}, dedup_key="d") for n in range(20)))
        assert len({each.id for each in published}) == 1
        assert sorted(each.duplicate for each in published) == [False] + [True] * 19
        other = await publisher.publish("a", {}, "another", dedup_key="d")
        assert not other.duplicate
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"event_type": "a b"}, InvalidEventTypeError),
        ({"payload": []}, InvalidPayloadError),
        ({"channel": ""}, InvalidChannelError),
        ({"colour": "red"}, PublishError),
        ({"id": 7}, PublishError),
    ],
)
async def test_bad_input_connects_to_nothing(arguments: dict[str, Any], error: type[Exception]) -> None:
    settings = DatabaseSettings.model_validate({"url": "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"})
    async with EventPublisher(settings) as publisher:
        with pytest.raises(error):
            await publisher.publish(**{"event_type": "a", "payload": {}, **arguments})


async def test_an_error_of_postgresql_is_one_of_sqlalchemy_and_costs_no_connection(
    database: DatabaseSettings, sql: Sql
) -> None:
    await sql.execute("ALTER TABLE pgebus.events ADD CONSTRAINT few CHECK (payload ->> 'n' <> '13')")
    async with EventPublisher(database, connections=1) as publisher:
        for _ in range(3):
            with pytest.raises(IntegrityError):
                await publisher.publish("a", {"n": 13})
        await publisher.publish("a", {"n": 14})


async def test_a_connection_that_was_lost_is_replaced(database: DatabaseSettings, sql: Sql) -> None:
    async with EventPublisher(database, connections=1) as publisher:
        await publisher.publish("a", {})
        pid = await sql.fetchval(
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE 'INSERT INTO%'"
        )
        await terminate(sql, pid)
        with pytest.raises((DBAPIError, OSError)):
            await publisher.publish("a", {})
        await publisher.publish("a", {})


async def test_after_its_end_it_refuses(database: DatabaseSettings) -> None:
    publisher = EventPublisher(database)
    await publisher.publish("a", {})
    await publisher.close()
    await publisher.close()
    with pytest.raises(StateError):
        await publisher.publish("a", {})
    with pytest.raises(ValueError, match="at least 1"):
        EventPublisher(database, connections=0)
    with pytest.raises(TypeError, match="DatabaseSettings"):
        EventPublisher("postgresql://")  # type: ignore[arg-type]
