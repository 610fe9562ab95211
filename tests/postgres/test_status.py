"""`operations.status`: what it counts, and that it stops counting."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.plans import explaining

from pgebus import DatabaseSessionManager, InvalidChannelError, operations
from pgebus.operations import GroupStatus, backlog

INSERT = """
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, finished_at, priority,
                               worker_id, claimed_at)
SELECT $1::bigint + n, now() + $4::interval, 'events', $2, 'a.b', CASE WHEN $3 = 'blocked' THEN 'k' END, $3,
  CASE WHEN $3 IN ('completed', 'dead', 'cancelled') THEN now() + $4 END, n % 10,
  CASE WHEN $3 = 'running' THEN 1 END, CASE WHEN $3 = 'running' THEN now() END
FROM generate_series(1, $5::integer) n
"""


class Rows:
    """Deliveries of any status, without events."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._next = 0

    async def add(self, group: str, status: str, count: int = 1, age: timedelta = timedelta(0)) -> None:
        await self._sql.execute(INSERT, self._next, group, status, -age, count)
        self._next += count


@pytest.fixture
def rows(sql: Sql) -> Rows:
    return Rows(sql)


async def look(sm: DatabaseSessionManager, channel: str | None = None) -> dict[str, GroupStatus]:
    async with sm.session() as session:
        return {each.group: each for each in await operations.status(session, channel)}


async def test_nothing_is_there(sm: DatabaseSessionManager) -> None:
    assert await look(sm) == {}


async def test_every_number_counts_what_it_says(sm: DatabaseSessionManager, sql: Sql, rows: Rows) -> None:
    await subscribe(sql, "mail", "a.b")
    await sql.execute("UPDATE pgebus.consumer_groups SET paused_at = now()")
    await rows.add("mail", "pending", 12, timedelta(hours=-1))
    await rows.add("mail", "pending", 15, timedelta(seconds=30))
    await rows.add("mail", "pending", 1, timedelta(seconds=90))
    for count, status in enumerate(("running", "blocked", "dead", "unhandled"), 2):
        await rows.add("mail", status, count)
    await rows.add("mail", "completed", 30, timedelta(seconds=20))
    await rows.add("mail", "completed", 7, timedelta(seconds=70))
    await rows.add("mail", "cancelled", 5, timedelta(seconds=20))
    found = (await look(sm))["mail"]
    assert found.paused_at is not None
    assert found.declared
    counts = (found.pending, found.due, found.running, found.blocked, found.dead, found.unhandled)
    assert counts == (28, 16, 2, 3, 4, 5)
    assert found.oldest_due is not None
    assert timedelta(seconds=90) <= found.oldest_due < timedelta(seconds=120)
    assert found.per_second == pytest.approx(30 / 60)
    assert (found.workers, found.capped) == (0, ())


@pytest.mark.parametrize("status", ["pending", "running", "blocked", "dead", "unhandled"])
async def test_a_group_that_nobody_has_declared_is_there_with_its_deliveries(
    sm: DatabaseSessionManager, rows: Rows, status: str
) -> None:
    for group in ("a", "b", "c"):
        await rows.add(group, status)
    found = await look(sm)
    assert list(found) == ["a", "b", "c"]
    assert not any(each.declared for each in found.values())
    assert all(getattr(each, status) == 1 for each in found.values())


async def test_only_the_channel_that_was_asked_for(sm: DatabaseSessionManager, sql: Sql, rows: Rows) -> None:
    await rows.add("mail", "pending")
    assert list(await look(sm, "events")) == ["mail"]
    assert list(await look(sm, "others")) == []
    with pytest.raises(InvalidChannelError):
        await look(sm, "")


async def test_workers_count_while_they_live(sm: DatabaseSessionManager, sql: Sql, rows: Rows) -> None:
    """By their lock, or by their beat: one that was killed has neither."""
    await subscribe(sql, "mail", "a.b")
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, groups, backend_pid, beat_at, ended_at) VALUES"
        " (1 << 33 | 5, 'events', '{mail,x}', 1, NULL, NULL), (2, 'events', '{mail}', 1, NULL, NULL),"
        " (3, 'events', '{mail}', NULL, now(), NULL), (4, 'events', '{mail}', NULL, now() - interval '1 hour', NULL),"
        " (6, 'events', '{x}', NULL, now(), NULL), (7, 'events', '{mail}', NULL, now(), now()),"
        " (8, 'others', '{mail}', NULL, now(), NULL)".replace("1 << 33 | 5", str(1 << 33 | 5))
    )
    await sql.fetch("SELECT pg_advisory_lock($1)", 1 << 33 | 5)
    assert (await look(sm))["mail"].workers == 2


async def test_what_is_more_than_the_limit_is_not_counted(
    sm: DatabaseSessionManager, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the rate that of a minute then, but that of the last ones."""
    monkeypatch.setattr(backlog, "COUNT_LIMIT", 100)
    await rows.add("mail", "pending", 101, timedelta(seconds=1))
    await rows.add("mail", "dead", 100)
    await rows.add("mail", "completed", 400, timedelta(seconds=50))
    await rows.add("mail", "completed", 150, timedelta(seconds=10))
    found = (await look(sm))["mail"]
    assert (found.pending, found.due, found.dead) == (100, 100, 100)
    assert found.capped == ("pending", "due")
    assert 100 / 15 < found.per_second <= 100 / 10


async def test_a_schema_of_any_name(sm: DatabaseSessionManager, sql: Sql) -> None:
    await sql.execute('ALTER SCHEMA pgebus RENAME TO "a:b ""c"')
    renamed: dict[str, Any] = {"schema_translate_map": {"pgebus": 'a:b "c'}}
    async with sm.session() as session:
        await session.connection(execution_options=renamed)
        assert await operations.status(session) == []


async def test_its_cost_does_not_grow_with_the_tables(
    sm: DatabaseSessionManager, sql: Sql, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the buffers that it touches, whether the planner knows the tables or thinks them empty."""
    monkeypatch.setattr(backlog, "COUNT_LIMIT", 200)
    await sql.execute("ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = false)")
    await sql.execute("VACUUM ANALYZE pgebus.deliveries")
    await sql.execute("SET session_replication_role = replica")
    for group in ("billing", "mail"):
        for status in ("completed", "pending", "blocked", "dead", "unhandled"):
            await rows.add(group, status, 10_000, timedelta(seconds=5))
    buffers = explaining(sm)
    for known in ("nothing", "everything"):
        if known == "everything":
            await sql.execute("ANALYZE pgebus.deliveries")
        buffers.clear()
        await look(sm)
        assert 0 < sum(buffers) < 4_000, known
