"""What is finished in every group and old goes; all else stays."""

from __future__ import annotations

from datetime import timedelta

import pytest
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


REFUSING = {
    "a foreign key": "CREATE TABLE mine (event_id bigint REFERENCES pgebus.events);"
    "INSERT INTO mine SELECT id FROM pgebus.events WHERE id % 3 = 1",
    "a trigger that keeps it": "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN RETURN CASE WHEN old.id % 3 = 1 THEN NULL ELSE old END; END$$;"
    "CREATE TRIGGER mine BEFORE DELETE ON pgebus.events FOR EACH ROW EXECUTE FUNCTION mine()",
    "a trigger that raises": "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN IF old.id % 3 = 1 THEN RAISE 'not this one'; END IF; RETURN old; END$$;"
    "CREATE TRIGGER mine BEFORE DELETE ON pgebus.events FOR EACH ROW EXECUTE FUNCTION mine()",
}


@pytest.mark.parametrize("limit", [1, 4, 100])
@pytest.mark.parametrize("refusing", REFUSING)
async def test_what_the_database_refuses_to_delete_keeps_nothing_else(
    sm: DatabaseSessionManager, sql: Sql, refusing: str, limit: int
) -> None:
    """Nor does it end: zero means that there is no more that could go."""
    events = [await event_in(sql, "completed") for _ in range(10)]
    await sql.execute(REFUSING[refusing])
    pruned = []
    async with sm.session() as session:
        while gone := await operations.prune(session, timedelta(0), limit=limit):
            pruned.append(gone)
            await session.commit()
    assert await kept(sql) == [event_id for event_id in events if event_id % 3 == 1]
    assert max(pruned) <= limit
    assert sum(pruned) == 6


async def test_what_somebody_has_locked_keeps_nothing_else(sm: DatabaseSessionManager, sql: Sql) -> None:
    first, second, _ = [await event_in(sql, "completed") for _ in range(3)]
    async with sql.transaction(), sm.session() as session:
        await sql.execute("SELECT FROM pgebus.events WHERE id = $1 FOR KEY SHARE", first)
        await sql.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", second)
        assert await operations.prune(session, timedelta(0), limit=1) == 1
        assert await operations.prune(session, timedelta(0), limit=1) == 0
        await session.commit()
    assert await kept(sql) == [first, second]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
async def test_a_session_that_cannot_look_again_is_refused(level: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    """It would not see a delivery that a backfill has made since its snapshot; and in AUTOCOMMIT no lock is held."""
    event_id = await event_in(sql, "completed")
    async with sm.session() as session:
        await session.connection(execution_options={"isolation_level": level})
        with pytest.raises(SessionStateError, match=level):
            await operations.prune(session, timedelta(0))
    assert await kept(sql) == [event_id]


async def bare(sql: Sql, *, created: str = "1 hour", due: str = "1 hour", count: int = 1) -> list[int]:
    """Publish events that groups without history have completed: of so long ago, and due so long ago."""
    rows = await sql.fetch(
        "INSERT INTO pgebus.events (type, created_at, run_at)"
        " SELECT 'a.b', now() - $1::text::interval, now() - $2::text::interval FROM generate_series(1, $3)"
        " RETURNING id",
        created,
        due,
        count,
    )
    ids = [row[0] for row in rows]
    await sql.execute("DELETE FROM pgebus.deliveries WHERE event_id = ANY ($1)", ids)
    return ids


async def test_an_event_without_a_delivery_goes_when_it_is_old(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Its time begins when it was published, or due if that was later."""
    await bare(sql, count=3)
    young = await bare(sql, created="10 minutes") + await bare(sql, due="10 minutes") + await bare(sql, due="-1 hour")
    pending = await event_in(sql, "pending")
    await event_in(sql, "completed")
    async with sm.session() as session:
        assert await operations.pruning.count_prunable(session, timedelta(minutes=20)) == 4
        assert await operations.prune(session, timedelta(minutes=20), limit=3) == 3
        assert await operations.prune(session, timedelta(minutes=20), limit=3) == 1
        assert await operations.prune(session, timedelta(minutes=20)) == 0
        await session.commit()
    assert await kept(sql) == [*young, pending]


async def test_all_events_are_looked_through_until_they_are_young(
    sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgebus.operations.pruning._EVENTS_LOOKED_AT", 2)
    held = [await event_in(sql, "pending") for _ in range(5)]
    young = await bare(sql, created="1 second")
    await bare(sql, count=2)
    young += await bare(sql, created="1 second", count=2)
    behind = await bare(sql)  # older than what was published before it, as nothing is
    async with sm.session() as session:
        assert await operations.prune(session, timedelta(minutes=20)) == 2
        await session.commit()
    assert await kept(sql) == [*held, *young, *behind]
