"""What is finished in every group and old goes; all else stays."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError
from tests.postgres.plain_sql import Sql
from tests.postgres.states import STATES, deliver, event_in

from pgebus import DatabaseSessionManager, operations
from pgebus.errors import SessionStateError


async def kept(sql: Sql) -> list[int]:
    return [row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events ORDER BY id")]


async def test_an_event_goes_when_its_last_delivery_is_finished_and_old(sm: DatabaseSessionManager, sql: Sql) -> None:
    gone: list[int] = []
    expected: list[int] = []
    for status in STATES:
        event_id = await event_in(sql, "completed", key=status)
        await deliver(sql, event_id, status, group="other")
        (gone if status in ("completed", "cancelled") else expected).append(event_id)
    async with sm.session() as session:
        assert await operations.prune(session, timedelta(hours=1)) == 0
        assert await operations.prune(session, timedelta(minutes=20)) == len(gone)
        assert await operations.prune(session, timedelta(minutes=20)) == 0
        await session.commit()
    assert await kept(sql) == expected
    assert await sql.fetchval("SELECT count(DISTINCT event_id) FROM pgebus.deliveries") == len(expected)


async def test_what_a_table_of_the_user_refers_to_is_the_users_matter(sm: DatabaseSessionManager, sql: Sql) -> None:
    event_id = await event_in(sql, "completed")
    await sql.execute("CREATE TABLE mine (event_id bigint REFERENCES pgebus.events)")
    await sql.execute("INSERT INTO mine VALUES ($1)", event_id)
    async with sm.session() as session:
        with pytest.raises(IntegrityError):
            await operations.prune(session, timedelta(0))
    assert await kept(sql) == [event_id]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
async def test_a_session_that_cannot_look_again_is_refused(level: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    """It would not see a delivery that a backfill has made since its snapshot; and in AUTOCOMMIT no lock is held."""
    event_id = await event_in(sql, "completed")
    async with sm.session() as session:
        await session.connection(execution_options={"isolation_level": level})
        with pytest.raises(SessionStateError, match=level):
            await operations.prune(session, timedelta(0))
    assert await kept(sql) == [event_id]
