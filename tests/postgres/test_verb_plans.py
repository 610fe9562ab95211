"""What a person asks for costs what it finds, not the history: by the buffers that the statements touch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.plans import explaining

from pgebus import DatabaseSessionManager, operations

HISTORY: Final = 60_000
DEAD: Final = range(1_000, 11_000)

# A history, what died in its early days, a key that is held and for which a hundred wait, and some that are running.
# Whoever walks the ids from the newest one on, for the dead ones, walks far.
FILL: Final = f"""
SET session_replication_role = replica;
INSERT INTO pgebus.events (type, key, payload) SELECT 'a.b', CASE WHEN n > {HISTORY} THEN 'k' END, '{{"n": 1}}'
  FROM generate_series(1, {HISTORY} + 120) n;
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, finished_at, holds_key,
                               worker_id, claimed_at)
SELECT n, now(), 'events', 'default', 'a.b', CASE WHEN n > {HISTORY} THEN 'k' END, status,
  CASE WHEN status IN ('completed', 'dead') THEN now() END, n = {HISTORY} + 1,
  CASE WHEN status = 'running' THEN 1 END, CASE WHEN status = 'running' THEN now() END
FROM generate_series(1, {HISTORY} + 120) n, LATERAL (SELECT CASE
  WHEN n = {HISTORY} + 1 THEN 'dead' WHEN n > {HISTORY} THEN 'blocked'
  WHEN n BETWEEN {DEAD.start} AND {DEAD.stop - 1} THEN 'dead'
  WHEN n <= 20 THEN 'running' ELSE 'completed' END AS status) s;
RESET session_replication_role;
"""

Call = Callable[[AsyncSession], Awaitable[object]]

# How many buffers all statements of a call may touch; a table of deliveries has over a thousand.
CALLS: Final[dict[str, tuple[Call, int]]] = {
    "list dead": (lambda s: operations.list_deliveries(s, status="dead", limit=20), 600),
    "list dead of a group": (
        lambda s: operations.list_deliveries(s, status="dead", group="default", channel="events"),
        1_000,
    ),
    "list running": (lambda s: operations.list_deliveries(s, status="running"), 300),
    "list blocked of a key": (
        lambda s: operations.list_deliveries(s, status="blocked", channel="events", group="default", key="k"),
        900,
    ),
    "list the newest": (lambda s: operations.list_deliveries(s, limit=20), 200),
    "list the next page": (lambda s: operations.list_deliveries(s, after=(30_000, "default"), limit=20), 200),
    "list what was finished just now": (
        lambda s: operations.list_deliveries(s, status="completed", event_ids=range(100, 120)),
        300,
    ),
    "count dead": (lambda s: operations.count_deliveries(s, status="dead"), 400),
    "show": (lambda s: operations.show_event(s, 100), 30),
    "redrive one": (lambda s: operations.redrive(s, event_ids=[DEAD.start]), 150),
    "redrive some": (lambda s: operations.redrive(s, group="default", limit=10), 1_200),
    "cancel one": (lambda s: operations.cancel(s, event_ids=[1]), 150),
    "cancel running": (lambda s: operations.cancel(s, status="running", limit=10), 700),
    "replay some": (lambda s: operations.replay(s, "default", after=DEAD.stop, limit=10), 900),
    "release": (lambda s: operations.release_key(s, "default", "k"), 400),
    "purge one": (lambda s: operations.purge_payload(s, event_ids=[DEAD.start]), 200),
}


@pytest.mark.parametrize("known", ["everything", "nothing"])
async def test_what_is_asked_for_costs_what_is_found(known: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    for table in ("events", "deliveries"):
        await sql.execute(f"ALTER TABLE pgebus.{table} SET (autovacuum_enabled = false)")
    await subscribe(sql, "default", "#")
    await sql.execute(FILL)
    if known == "everything":
        await sql.execute("ANALYZE pgebus.events; ANALYZE pgebus.deliveries")
    explained = explaining(sm)
    too_many = {}
    for name, (call, most) in CALLS.items():
        if known == "nothing" and name == "replay some":
            continue  # that walks the events, and a planner that takes them for a few sorts them all
        explained.clear()
        async with sm.session() as session:
            await call(session)
        touched = sum(explained)
        assert touched, name
        if touched > most:
            too_many[name] = touched
    assert not too_many
