"""The hot statements stay cheap on large tables, whatever the planner knows: by the buffers that they touch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest
from tests.postgres.plain_sql import Sql, subscribe

from pgebus._runtime.connecting import PLANNER
from pgebus._runtime.statements import Statements

STATEMENTS: Final = Statements("pgebus")
LARGE: Final = 40_000
TABLES: Final = ("events", "deliveries", "subscriptions")
HELD: Final = range(4 * LARGE + 1, 4 * LARGE + 101)

# By number: a history, what is due tomorrow at all priorities, what is due, what nobody handles, a thousand that run,
# and one key for which four thousand wait.
FILL: Final = f"""
INSERT INTO pgebus.events (type, payload) SELECT 'a.b', '{{"n": 1}}' FROM generate_series(1, 4 * {LARGE} + 5000);
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, status, finished_at, key, priority,
                               worker_id, claimed_at, claim_seq, attempt)
SELECT n, now() + CASE WHEN n BETWEEN {LARGE} + 1 AND 2 * {LARGE} THEN interval '1 day' ELSE interval '-1 hour' END,
  'events', CASE WHEN n % 10 = 0 THEN 'billing' ELSE 'default' END, CASE WHEN n % 2 = 0 THEN 'a.b' ELSE 'a.c' END,
  CASE WHEN n <= {LARGE} THEN 'completed' WHEN n <= 3 * {LARGE} THEN 'pending' WHEN n <= 4 * {LARGE} THEN 'unhandled'
       WHEN running THEN 'running' WHEN n = 4 * {LARGE} + 1001 THEN 'pending' ELSE 'blocked' END,
  CASE WHEN n <= {LARGE} THEN now() - interval '1 hour' + interval '10 ms' * n END,
  CASE WHEN n > 4 * {LARGE} + 1000 THEN 'hot' END,
  CASE WHEN n <= 2 * {LARGE} THEN n % 10 ELSE 0 END,
  CASE WHEN running THEN 1 END, CASE WHEN running THEN now() END, running::integer, running::integer
FROM generate_series(1, 4 * {LARGE} + 5000) n, LATERAL (SELECT n BETWEEN {HELD.start} AND {HELD.start + 999}) r(running)
"""

_GROUPS: Final = "ARRAY['default', 'billing']"
_LEASES: Final = (
    f"ARRAY{[*HELD]}, ARRAY{['billing' if n % 10 == 0 else 'default' for n in HELD]}, ARRAY{[1 for _ in HELD]}, 1"
)

_OVER: Final = f"ARRAY{[*range(1, 101)]}, array_fill(60::float, ARRAY[100]), NULL, NULL"


class Case(NamedTuple):
    """A statement, what it is called with, and how many buffers it may touch."""

    sql: str
    arguments: str
    buffers: int


CASES: Final = {
    # About twenty for each row, index entries and the event included.
    "claim": Case(STATEMENTS.claim, f"1, 'events', {_GROUPS}, 100", 4_000),
    "claim_one": Case(STATEMENTS.claim, f"1, 'events', {_GROUPS}, 1", 300),
    "claim_on": Case(
        STATEMENTS.claim_on,
        f"1, 'events', {_GROUPS}, 100, ARRAY['default'], ARRAY[0], "
        "ARRAY[(extract(epoch FROM now() - interval '1 hour') * 1000000)::bigint], ARRAY[0]",
        4_000,
    ),
    "claim_suspect": Case(STATEMENTS.claim_suspect, f"1, 'events', {_GROUPS}, 1", 300),
    "claim_lost_once": Case(STATEMENTS.claim_lost_once, f"1, 'events', {_GROUPS}, 100", 300),
    "suspects": Case(STATEMENTS.suspects, f"'events', {_GROUPS}", 100),
    "next_due": Case(STATEMENTS.next_due, f"'events', {_GROUPS}", 300),
    "complete": Case(STATEMENTS.complete, _LEASES, 4_000),
    "complete_keyed": Case(STATEMENTS.complete_keyed, _LEASES, 4_000),
    "release": Case(STATEMENTS.release, _LEASES, 4_000),
    "unhandled_types": Case(STATEMENTS.unhandled_types, f"'events', {_GROUPS}", 300),
    "adopt": Case(STATEMENTS.adopt, "1, 'events', 'default', 'a.b', 100", 4_000),
    "sweep": Case(STATEMENTS.sweep, "'', '', '', 5000", 300),
    "let_go": Case(STATEMENTS.let_go, "", 100),
    "forget": Case(STATEMENTS.forget, _LEASES, 4_000),
    "forget_keyed": Case(STATEMENTS.forget_keyed, _LEASES, 4_000),
    "backfill": Case(
        STATEMENTS.backfill,
        "'events', 'billing', 'a.#', 0, 1000000, 100, '2030-01-01 00:00:00+00'",
        8_000,
    ),
    # From the middle of the history: what lies before is not walked again.
    "finished": Case(
        STATEMENTS.finished,
        "60, (extract(epoch FROM now() - interval '58 minutes') * 1000000)::bigint, 100, 'events'",
        400,
    ),
    "died": Case(STATEMENTS.died, "60, 0, 100, 'events', 'default'", 100),
    "bare": Case(STATEMENTS.bare, "60, 100, 100, 'events'", 600),
    "unhandled": Case(STATEMENTS.unhandled, "60, 0, 100, 'events', 'default', 'a.b'", 900),
    "groups_with_unhandled": Case(STATEMENTS.groups_with_unhandled, "'events'", 100),
    "lock_ripe": Case(STATEMENTS.lock_ripe, _OVER, 3_000),
    "delete_ripe": Case(STATEMENTS.delete_ripe, _OVER, 4_000),
    "leases_of": Case(STATEMENTS.leases_of, "2", 100),
}


def _calls() -> Iterator[tuple[str, str]]:
    for name, case in CASES.items():
        yield name, f"EXECUTE {name} ({case.arguments})" if case.arguments else f"EXECUTE {name}"


async def _touched(sql: Sql, call: str) -> int:
    """Return how many buffers *call* touches; what it changes is rolled back."""
    transaction = sql.transaction()
    await transaction.start()
    try:
        text: str = await sql.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {call}")
    finally:
        await transaction.rollback()
    plan: dict[str, Any] = json.loads(text)[0]["Plan"]
    buffers: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return buffers


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("known", ["everything", "nothing", "that the tables are empty"])
async def test_a_hot_statement_touches_a_bounded_number_of_buffers(sql: Sql, known: str, mode: str) -> None:
    """With generic plans also those that were made, and kept, when there was nothing in the tables."""
    await sql.execute("".join(f"ALTER TABLE pgebus.{name} SET (autovacuum_enabled = false);" for name in TABLES))
    await sql.execute(f"SET plan_cache_mode = {mode}; SET session_replication_role = replica; {PLANNER}")
    await subscribe(sql, "default", "a.b", "a.c")
    await subscribe(sql, "billing", "a.#")
    # The one is up to date, the other one is not.
    await sql.execute("UPDATE pgebus.subscriptions SET backfilled_at = now() WHERE consumer_group = 'default'")
    await sql.execute("UPDATE pgebus.subscriptions SET created_at = '2030-01-01 00:00:00+00' WHERE pattern = 'a.#'")
    if known == "that the tables are empty":
        await sql.execute("VACUUM ANALYZE pgebus.events")
        await sql.execute("VACUUM ANALYZE pgebus.deliveries")
    for name, case in CASES.items():
        await sql.execute(f"PREPARE {name} AS {case.sql}")
    if known == "that the tables are empty":
        for _, call in _calls():
            await sql.execute(call)
    await sql.execute(FILL)
    if known == "everything":
        await sql.execute("ANALYZE pgebus.events; ANALYZE pgebus.deliveries")
    too_many = {}
    for name, call in _calls():
        buffers = await _touched(sql, call)
        if buffers > CASES[name].buffers:
            too_many[name] = buffers
    assert not too_many


async def test_a_claim_that_goes_on_walks_over_nothing_that_was_claimed_before(sql: Sql) -> None:
    """The entries of what this very transaction finishes can't be removed; so it is in one that somebody holds open."""
    await sql.execute("ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = false)")
    await sql.execute(PLANNER)
    await subscribe(sql, "default", "a.b")
    # Due in another order than they are stored in: so each entry is a page of its own.
    await sql.execute(
        "INSERT INTO pgebus.events (type, run_at)"
        " SELECT 'a.b', now() - interval '1 second' * (n * 7919 % 20011) FROM generate_series(1, 20000) n"
    )
    due, microseconds, event_id = await sql.fetchrow(
        "SELECT due_at, (extract(epoch FROM due_at) * 1000000)::bigint, event_id FROM pgebus.deliveries"
        " ORDER BY due_at OFFSET 10000 LIMIT 1"
    )  # type: ignore[misc]  # there is a row
    await sql.execute(f"PREPARE claim AS {STATEMENTS.claim}")
    await sql.execute(f"PREPARE claim_on AS {STATEMENTS.claim_on}")
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("UPDATE pgebus.deliveries SET status = 'completed', finished_at = now() WHERE due_at < $1", due)
    walked = await _touched(sql, "EXECUTE claim (1, 'events', ARRAY['default'], 10)")
    went_on = await _touched(
        sql,
        f"EXECUTE claim_on (1, 'events', ARRAY['default'], 10, ARRAY['default'], ARRAY[0], "
        f"ARRAY[{microseconds}], ARRAY[{event_id}])",
    )
    await transaction.rollback()
    assert walked > 10_000
    assert went_on < 400


READ: Final = "SELECT seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'deliveries'"


async def test_the_triggers_and_complete_read_no_table_to_its_end(sql: Sql) -> None:
    """Their plans are kept from their first execution, which may have met empty tables."""
    for name in TABLES:
        await sql.execute(f"ALTER TABLE pgebus.{name} SET (autovacuum_enabled = false)")
        await sql.execute(f"VACUUM ANALYZE pgebus.{name}")
    insert = "INSERT INTO pgebus.events (type, key) SELECT 'a.b', CASE WHEN n % 2 = 0 THEN 'k' || n END FROM {} n"
    complete = "SELECT pgebus.complete({0}, 'default', 1, 1, 'x') FROM set_config('pgebus.tx', 'x', true)"
    run = """
        UPDATE pgebus.deliveries
        SET status = 'running', worker_id = 1, claimed_at = now(), claim_seq = 1, attempt = 1
        WHERE event_id IN (SELECT id FROM pgebus.events ORDER BY id LIMIT 20)"""
    await subscribe(sql, "default", "a.#")
    await sql.execute(insert.format("generate_series(1, 20)"))
    await sql.execute(run)
    ids = [row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events ORDER BY id")]
    async with sql.transaction():
        await sql.execute(complete.format(ids[0]))
    async with sql.transaction():
        before = await sql.fetchval(READ)
        await sql.execute(insert.format("generate_series(1, 3000)"))
        for event_id in ids[1:]:
            await sql.execute(complete.format(event_id))
        await sql.execute(f"DELETE FROM pgebus.events WHERE id = {ids[0]}")
        assert await sql.fetchval(READ) == before


HISTORY: Final = """
INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, {n});
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, status, finished_at)
SELECT n, now(), 'events', g, 'a.b', CASE WHEN g = 'default' THEN 'completed' ELSE 'pending' END,
  CASE WHEN g = 'default' THEN now() - interval '1 day' + interval '1 ms' * n END
FROM generate_series(1, {n}) n, unnest(ARRAY[{groups}]) g
"""


async def test_a_pass_over_what_another_group_holds_costs_what_there_is(sql: Sql) -> None:
    """Batch for batch as much: what was looked at before is not walked over again."""
    held, batch = 20_000, 1_000
    await sql.execute("ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = false)")
    await sql.execute(f"SET session_replication_role = replica; {PLANNER}")
    await sql.execute(HISTORY.format(n=held, groups="'default', 'slow'"))
    await sql.execute("ANALYZE pgebus.events; ANALYZE pgebus.deliveries")
    await sql.execute(f"PREPARE finished AS {STATEMENTS.finished}; PREPARE lock_ripe AS {STATEMENTS.lock_ripe}")
    looking, locking = [], []
    after, seen = 0, 0
    while True:
        rows = await sql.fetch(STATEMENTS.finished, 60.0, after, batch, "events")
        if not rows:
            break
        looking.append(await _touched(sql, f"EXECUTE finished (60, {after}, {batch}, 'events')"))
        ids = [row["event_id"] for row in rows]
        locking.append(
            await _touched(sql, f"EXECUTE lock_ripe (ARRAY{ids}, array_fill(60::float, ARRAY[{batch}]), NULL, NULL)")
        )
        after, seen = rows[-1]["place"], seen + len(rows)
    assert seen == held
    assert max(looking) <= 1.5 * min(looking)
    assert max(locking) <= 1.5 * min(locking)
    # a page of history holds many; of each event are looked at its row, and its deliveries
    assert sum(looking) <= held / 20
    assert sum(locking) <= held * 10


@pytest.mark.slow
@pytest.mark.parametrize("history", [1_000_000, 10_000_000])
async def test_a_claim_beside_a_history_costs_what_it_costs_without(sql: Sql, history: int) -> None:
    """By the buffers that it touches; an index of the events is a level or two higher then."""
    await subscribe(sql, "default", "#")
    await sql.execute(f"{PLANNER}; PREPARE claim AS {STATEMENTS.claim}; SET plan_cache_mode = force_generic_plan")
    publish = "INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 1000)"
    call = f"EXECUTE claim (1, 'events', {_GROUPS}, 100)"
    await sql.execute(publish)
    await sql.execute("VACUUM ANALYZE pgebus.events, pgebus.deliveries")
    empty = await _touched(sql, call)
    await sql.execute("TRUNCATE pgebus.events RESTART IDENTITY")
    await sql.execute("SET session_replication_role = replica; SET work_mem = '64MB'")
    await sql.execute(HISTORY.format(n=history, groups="'default'"))
    await sql.execute("RESET session_replication_role")
    await sql.execute(publish)
    await sql.execute("VACUUM ANALYZE pgebus.events, pgebus.deliveries")
    beside = await _touched(sql, call)
    assert beside <= 1.3 * empty, f"{beside} buffers beside {history} finished ones, {empty} without"
