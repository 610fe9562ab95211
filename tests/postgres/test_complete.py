"""The fenced completion, as the dispatcher sends it: last in the handlers' transaction, with its COMMIT."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import asyncpg
import pytest
from tests.postgres.plain_sql import Sql, drain, listen, publish, sleeper, statuses, subscribe

from pgebus.settings import DatabaseSettings


@pytest.fixture
async def other(database: DatabaseSettings) -> AsyncIterator[Sql]:
    """A second connection to the database of `sql`."""
    url = database.sqlalchemy_url().set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    yield connection
    await connection.close()


COMPLETE = "SELECT pgebus.complete({event}, '{group}', {claim}, {worker}, '{marker}')"


async def claim(sql: Sql, event_id: int, *, worker: int = 7, group: str = "group") -> None:
    await sql.execute(
        "UPDATE pgebus.deliveries SET status = 'running', worker_id = $2, claimed_at = clock_timestamp(),"
        " attempt = attempt + 1, claim_seq = claim_seq + 1 WHERE event_id = $1 AND consumer_group = $3",
        event_id,
        worker,
        group,
    )


async def finish(sql: Sql, event_id: int, **fence: object) -> None:
    """End the handlers' transaction as the dispatcher does: completion and COMMIT in one message."""
    values = {"event": event_id, "group": "group", "claim": 1, "worker": 7, "marker": "here"} | fence
    await sql.execute(COMPLETE.format_map(values) + "; COMMIT")


async def begin(sql: Sql, marker: str = "here") -> None:
    await sql.execute(f"BEGIN; SET LOCAL pgebus.tx = '{marker}'")
    await sql.execute("CREATE TABLE IF NOT EXISTS public.done (); INSERT INTO public.done DEFAULT VALUES")


async def effects(sql: Sql) -> int:
    """How many handlers' transactions were committed."""
    if await sql.fetchval("SELECT to_regclass('public.done')") is None:
        return 0
    count: int = await sql.fetchval("SELECT count(*) FROM public.done")
    return count


@pytest.fixture
async def lease(sql: Sql) -> int:
    """An event whose delivery to `group` is held by worker 7, claimed once."""
    await subscribe(sql, "group", "a.b")
    event_id = await publish(sql)
    await claim(sql, event_id)
    return event_id


async def test_completion_commits_with_the_effects(sql: Sql, other: Sql, lease: int) -> None:
    await begin(sql)
    await finish(sql, lease)
    assert not sql.is_in_transaction()
    row = await other.fetchrow("SELECT * FROM pgebus.deliveries")
    assert row is not None
    assert (row["status"], row["worker_id"], row["claimed_at"]) == ("completed", None, None)
    assert row["finished_at"] is not None
    assert await effects(other) == 1


@pytest.mark.parametrize(
    "fence",
    [{"claim": 2}, {"claim": 0}, {"worker": 8}, {"group": "another"}, {"event": 0}],
    ids=lambda fence: next(iter(fence)),
)
async def test_without_the_lease_nothing_is_committed(
    sql: Sql, other: Sql, lease: int, fence: dict[str, object]
) -> None:
    await begin(sql)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await finish(sql, lease, **fence)
    assert caught.value.sqlstate == "PGB01"
    await sql.execute("COMMIT")  # whatever comes after it can only roll back
    assert await effects(other) == 0
    assert await statuses(other) == ["running"]


@pytest.mark.parametrize(
    "meanwhile",
    [
        "status = 'pending', worker_id = NULL, claimed_at = NULL",
        "status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = now()",
        "worker_id = 8, claim_seq = claim_seq + 1",
    ],
)
async def test_a_lease_given_away_meanwhile_is_lost(sql: Sql, other: Sql, lease: int, meanwhile: str) -> None:
    await begin(sql)
    await other.execute(f"UPDATE pgebus.deliveries SET {meanwhile}")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await finish(sql, lease)
    assert caught.value.sqlstate == "PGB01"
    await sql.execute("ROLLBACK")
    assert await effects(other) == 0


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("again", ["", "BEGIN"])
async def test_a_transaction_that_was_ended_behind_the_guard_is_noticed(
    sql: Sql, other: Sql, lease: int, end: str, again: str
) -> None:
    await begin(sql)
    await sql.execute(end)
    if again:
        await sql.execute(again)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await finish(sql, lease)
    assert caught.value.sqlstate == "PGB02"
    if again:
        await sql.execute("ROLLBACK")
    assert await statuses(other) == ["running"]


async def test_the_marker_of_another_dispatch_does_not_count(sql: Sql, lease: int) -> None:
    await begin(sql, "another")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await finish(sql, lease)
    assert caught.value.sqlstate == "PGB02"
    await sql.execute("ROLLBACK")


@pytest.mark.parametrize("marker", ["''", "NULL"])
async def test_an_empty_marker_proves_nothing(sql: Sql, lease: int, marker: str) -> None:
    """Once a custom setting was there, PostgreSQL reads it as the empty text after its transaction."""
    await begin(sql)
    await sql.execute("ROLLBACK")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.execute(f"SELECT pgebus.complete({lease}, 'group', 1, 7, {marker})")
    assert caught.value.sqlstate == "PGB02"


async def test_a_rolled_back_savepoint_keeps_the_marker(sql: Sql, other: Sql, lease: int) -> None:
    await begin(sql)
    await sql.execute("SAVEPOINT s")
    await sql.execute("ROLLBACK TO SAVEPOINT s")
    await finish(sql, lease)
    assert await statuses(other) == ["completed"]


async def keyed(sql: Sql, count: int) -> list[int]:
    """Events of one key, the first of them claimed by worker 7."""
    await subscribe(sql, "group", "a.b")
    ids = [await publish(sql, key="k") for _ in range(count)]
    await claim(sql, ids[0])
    return ids


async def test_completion_promotes_the_next_of_its_key_alone(sql: Sql, other: Sql) -> None:
    await subscribe(sql, "another", "a.b")
    ids = await keyed(sql, 3)
    await publish(sql, key="l")
    await begin(sql)
    await finish(sql, ids[0])
    rows = await other.fetch(
        "SELECT key, status FROM pgebus.deliveries WHERE consumer_group = 'group' ORDER BY event_id"
    )
    assert [row["status"] for row in rows] == ["completed", "pending", "blocked", "pending"]
    rows = await other.fetch(
        "SELECT status FROM pgebus.deliveries WHERE consumer_group = 'another' AND key = 'k' ORDER BY event_id"
    )
    assert [row["status"] for row in rows] == ["pending", "blocked", "blocked"]


async def test_completion_without_a_key_promotes_nobody(sql: Sql, other: Sql, lease: int) -> None:
    await publish(sql, key="k")
    await publish(sql, key="k")
    await begin(sql)
    await finish(sql, lease)
    assert await statuses(other) == ["completed", "pending", "blocked"]


async def test_a_promotion_wakes_a_sleeping_worker(sql: Sql, other: Sql) -> None:
    ids = await keyed(sql, 3)
    heard = await listen(other, "events")
    await begin(sql)
    await finish(sql, ids[0])
    assert await drain(heard, sql, "events") == []
    await sleeper(sql)
    await claim(sql, ids[1])
    await begin(sql)
    await finish(sql, ids[1])
    assert await drain(heard, sql, "events") == [""]
    await claim(sql, ids[2])
    await begin(sql)
    await finish(sql, ids[2])
    assert await drain(heard, sql, "events") == []  # nobody was waiting for the last one


async def test_completion_finds_its_row_by_an_index(sql: Sql) -> None:
    """Also with the statistics of a table that was empty when they were taken."""
    await sql.execute(
        "ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = false); ANALYZE pgebus.deliveries;"
        "INSERT INTO pgebus.events (type) SELECT 'a' FROM generate_series(1, 5000)"
    )
    await sql.execute(
        "PREPARE finish (bigint, text, integer, bigint) AS UPDATE pgebus.deliveries SET status = 'completed'"
        " WHERE event_id = $1 AND consumer_group = $2 AND claim_seq = $3 AND worker_id = $4 AND status = 'running'"
    )
    for statistics in ("", "ANALYZE pgebus.deliveries"):
        await sql.execute(statistics or "RESET ALL")
        for mode in ("force_generic_plan", "force_custom_plan"):
            await sql.execute(f"SET plan_cache_mode = {mode}")
            plan = "\n".join(row[0] for row in await sql.fetch("EXPLAIN EXECUTE finish(1, 'default', 1, 1)"))
            assert re.search(r"Index Cond: .*\bevent_id = ", plan), plan
