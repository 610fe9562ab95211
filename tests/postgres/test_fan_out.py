"""The triggers on events: who gets a delivery, who is woken, what waits for its key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from tests.postgres.plain_sql import (
    NOW,
    Sql,
    deliveries,
    drain,
    insert_delivery,
    listen,
    publish,
    sleeper,
    statuses,
    subscribe,
)

from pgebus.settings import DatabaseSettings


@pytest.fixture
async def other(database: DatabaseSettings) -> AsyncIterator[Sql]:
    """A second connection to the database of `sql`."""
    url = database.sqlalchemy_url().set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    yield connection
    await connection.close()


async def test_an_event_nobody_subscribed_to_is_kept_as_unhandled(sql: Sql) -> None:
    event_id = await publish(sql)
    assert await deliveries(sql) == [(event_id, "default", "unhandled")]


async def test_a_delivery_copies_what_the_claim_needs(sql: Sql) -> None:
    await subscribe(sql, "group", "a.b")
    run_at = datetime.now(UTC) + timedelta(days=1)
    await sql.execute("INSERT INTO pgebus.events (type, key, priority, run_at) VALUES ('a.b', 'k', 3, $1)", run_at)
    row = await sql.fetchrow("SELECT * FROM pgebus.deliveries")
    assert row is not None
    assert (row["type"], row["key"], row["priority"], row["due_at"]) == ("a.b", "k", 3, run_at)
    assert (row["attempt"], row["claim_seq"], row["lost"], row["round"]) == (0, 0, 0, 1)


PATTERNS = [
    ("a.b", ["a.b"], ["a", "a.b.c", "a.bb", "A.b"]),
    ("a.*", ["a.b", "a.c-d"], ["a", "a.b.c", "ab.c"]),
    ("a.#", ["a", "a.b", "a.b.c"], ["ab", "b.a"]),
    ("#", ["a", "a.b.c"], []),
    ("*", ["a", "b_c"], ["a.b"]),
    ("*.b", ["a.b"], ["b", "a.b.c", "a.a.b"]),
    ("#.b", ["b", "a.b", "a.a.b"], ["a", "a.bb", "a.b.c"]),
    ("a.#.z", ["a.z", "a.b.c.z"], ["a", "z", "a.b"]),
    ("a.*.#", ["a.b", "a.b.c"], ["a"]),
    ("#.m.*", ["m.x", "a.b.m.x"], ["m", "a.m"]),
]


async def test_a_star_is_one_word_and_a_hash_any_number(sql: Sql) -> None:
    types = {event_type for _, matching, others in PATTERNS for event_type in matching + others}
    for pattern, _, _ in PATTERNS:
        await subscribe(sql, f"group of {pattern}", pattern)
    for event_type in types:
        await publish(sql, event_type)
    for pattern, matching, others in PATTERNS:
        rows = await sql.fetch(
            "SELECT type, status FROM pgebus.deliveries WHERE consumer_group = $1", f"group of {pattern}"
        )
        got = {row["type"] for row in rows if row["status"] == "pending"}
        assert (got.issuperset(matching), got.isdisjoint(others)) == (True, True), (pattern, got)


async def test_every_group_gets_its_own_delivery_and_only_one(sql: Sql) -> None:
    """Two patterns of one group that match one type would otherwise abort the publisher."""
    await subscribe(sql, "one", "a.*", "a.#", "a.b", "#")
    await subscribe(sql, "two", "a.b")
    await subscribe(sql, "three", "other")
    await subscribe(sql, "four", "a.b", channel="elsewhere")
    event_id = await publish(sql)
    assert await deliveries(sql) == [(event_id, "one", "pending"), (event_id, "two", "pending")]


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_group_with_two_matching_patterns_gets_keyed_events_once(sql: Sql, key: str | None) -> None:
    await subscribe(sql, "one", "a.*", "a.#")
    event_id = await publish(sql, key=key)
    assert await deliveries(sql) == [(event_id, "one", "pending")]


async def test_many_rows_of_several_channels_in_one_statement(sql: Sql) -> None:
    await subscribe(sql, "group", "a.*")
    await subscribe(sql, "group", "a.#", channel="second")
    await sql.execute(
        "INSERT INTO pgebus.events (type, channel)"
        " SELECT 'a.t' || n, CASE WHEN n <= 600 THEN 'events' ELSE 'second' END FROM generate_series(1, 1000) n"
    )
    rows = await sql.fetch("SELECT channel, status, count(*) FROM pgebus.deliveries GROUP BY 1, 2 ORDER BY 1")
    assert [tuple(row) for row in rows] == [("events", "pending", 600), ("second", "pending", 400)]


async def test_copy_publishes(sql: Sql) -> None:
    await subscribe(sql, "group", "a")
    await sql.copy_records_to_table(
        "events", schema_name="pgebus", columns=["type", "key"], records=[("a", None), ("b", None), ("a", "k")]
    )
    assert await statuses(sql) == ["pending", "unhandled", "pending"]


async def test_an_insert_of_nothing_publishes_nothing(sql: Sql, other: Sql) -> None:
    heard = await listen(other, "events")
    await sleeper(sql)
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a' WHERE false")
    assert await deliveries(sql) == []
    assert await drain(heard, sql, "events") == []


async def test_a_rolled_back_event_leaves_no_delivery(sql: Sql) -> None:
    transaction = sql.transaction()
    await transaction.start()
    await publish(sql)
    await transaction.rollback()
    assert await deliveries(sql) == []


async def test_a_restored_event_keeps_the_deliveries_it_has(sql: Sql) -> None:
    """A restore of the data alone, with triggers: deliveries come first, then events, then subscriptions."""
    for event_id, key in ((1, None), (2, "k"), (3, None)):
        if event_id < 3:
            await insert_delivery(sql, event_id=event_id, consumer_group="group", status="completed", finished_at=NOW)
        await sql.execute(
            "INSERT INTO pgebus.events (id, type, key) OVERRIDING SYSTEM VALUE VALUES ($1, 'a', $2)", event_id, key
        )
    assert await deliveries(sql) == [(1, "group", "completed"), (2, "group", "completed"), (3, "default", "unhandled")]


async def test_deleted_events_take_their_deliveries_along(sql: Sql) -> None:
    await subscribe(sql, "one", "a.b")
    await subscribe(sql, "two", "a.b")
    first, second = await publish(sql), await publish(sql)
    await sql.execute("DELETE FROM pgebus.events WHERE id = $1", first)
    assert await deliveries(sql) == [(second, "one", "pending"), (second, "two", "pending")]


async def test_nothing_of_the_publishers_own_shadows_ours(sql: Sql) -> None:
    """The triggers run with the rights of the tables' owner: nobody may lead them to tables or functions of his."""
    await subscribe(sql, "group", "a.b")
    await subscribe(sql, "misled", "z.#")
    await sql.execute(
        "CREATE TEMP TABLE deliveries (LIKE pgebus.deliveries); CREATE TEMP TABLE subscriptions (channel text);"
        "CREATE TEMP TABLE workers (id bigint); CREATE TEMP TABLE events (id bigint); CREATE SCHEMA evil;"
        "CREATE FUNCTION evil.starts_with(text, text) RETURNS bool LANGUAGE sql AS 'SELECT true';"
        "SET search_path = pg_temp, evil, pgebus, pg_catalog"
    )
    event_id = await publish(sql)
    assert await deliveries(sql) == [(event_id, "group", "pending")]
    assert await sql.fetchval("SELECT count(*) FROM pg_temp.deliveries") == 0


async def test_a_publisher_needs_rights_on_events_alone(sql: Sql) -> None:
    role = await sql.fetchval("SELECT current_database() || '_publisher'")
    await sql.execute(
        f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA pgebus TO {role}; GRANT INSERT ON pgebus.events TO {role};"
        f"GRANT SELECT (id, channel, dedup_key, run_at, created_at) ON pgebus.events TO {role};"
        f"SET ROLE {role}; CREATE TEMP TABLE mine (id bigint)"
    )
    try:
        await publish(sql)
        for forbidden in (
            "CREATE TRIGGER t AFTER INSERT ON mine FOR EACH STATEMENT EXECUTE FUNCTION pgebus.fan_out()",
            "CREATE TRIGGER t AFTER DELETE ON mine FOR EACH STATEMENT EXECUTE FUNCTION pgebus.forget()",
            "SET pgebus.tx = 'm'; SELECT pgebus.complete(1, 'default', 1, 1, 'm')",
            "SELECT FROM pgebus.deliveries",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await sql.execute(forbidden)
    finally:
        await sql.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
    assert await statuses(sql) == ["unhandled"]


async def test_only_a_channel_with_a_sleeping_worker_is_notified(sql: Sql, other: Sql) -> None:
    heard = await listen(other, "events")
    await publish(sql)
    await sleeper(sql, "events", idle=False)
    await sleeper(sql, "another")
    await publish(sql)
    assert await drain(heard, sql, "events") == []
    await sleeper(sql, "events")
    await publish(sql)
    await publish(sql, channel="another")
    assert await drain(heard, sql, "events") == [""]


async def test_events_of_one_transaction_wake_once(sql: Sql, other: Sql) -> None:
    heard = await listen(other, "events")
    await sleeper(sql)
    async with sql.transaction():
        await publish(sql)
        await publish(sql)
    assert await drain(heard, sql, "events") == [""]


async def test_the_payload_is_the_earliest_due_time(sql: Sql, other: Sql) -> None:
    heard = await listen(other, "events")
    await sleeper(sql)
    early, late = (datetime(2100, 1, 1, tzinfo=UTC) + timedelta(days=day, milliseconds=250) for day in (0, 1))
    insert = "INSERT INTO pgebus.events (type, run_at) SELECT 'a', * FROM unnest($1::timestamptz[])"
    await sql.execute(insert, [late, early])
    (due,) = await drain(heard, sql, "events")
    assert float(due) == early.timestamp()
    await sql.execute(insert, [late, datetime(2000, 1, 1, tzinfo=UTC)])
    assert await drain(heard, sql, "events") == [""]


async def test_a_channels_name_is_taken_as_it_is(sql: Sql, other: Sql) -> None:
    channel = 'Odd "channel" %s :x'
    heard = await listen(other, channel)
    await sleeper(sql, channel)
    await publish(sql, channel=channel)
    assert await drain(heard, sql, channel) == [""]


async def test_of_one_key_only_the_first_is_pending(sql: Sql) -> None:
    await subscribe(sql, "group", "a.b")
    await sql.execute(
        "INSERT INTO pgebus.events (type, key) VALUES ('a.b','k'), ('a.b','k'), ('a.b','l'), ('a.b',NULL)"
    )
    assert await statuses(sql) == ["pending", "blocked", "pending", "pending"]
    await publish(sql, key="k")
    await publish(sql, key="m")
    assert (await statuses(sql))[4:] == ["blocked", "pending"]


HEADS = [
    ("status = 'running', worker_id = 1, claimed_at = now()", "blocked"),
    ("status = 'completed', finished_at = now()", "pending"),
    ("status = 'dead', finished_at = now()", "pending"),
    ("status = 'dead', finished_at = now(), holds_key = true", "blocked"),
    ("status = 'blocked'", "blocked"),
]


async def test_an_unfinished_event_of_the_key_blocks_the_next(sql: Sql) -> None:
    await subscribe(sql, "group", "a.b")
    for status, then in HEADS:
        event_id = await publish(sql, key=status)
        await sql.execute(f"UPDATE pgebus.deliveries SET {status} WHERE event_id = $1", event_id)
        await publish(sql, key=status)
        assert (await statuses(sql))[-1] == then, status


async def test_unhandled_events_block_nobody_and_are_not_blocked(sql: Sql) -> None:
    await publish(sql, key="k")
    await publish(sql, key="k")
    assert await statuses(sql) == ["unhandled", "unhandled"]
    await subscribe(sql, "default", "a.b")
    await publish(sql, key="k")
    assert await statuses(sql) == ["unhandled", "unhandled", "pending"]


async def test_many_events_after_one_take_no_longer_each(sql: Sql) -> None:
    """PL/pgSQL keeps the plan that was made for the first. Row by row, this would take minutes."""
    await subscribe(sql, "default", "#")
    for key in ("NULL", "'k' || n"):
        insert = f"INSERT INTO pgebus.events (type, key) SELECT 'a.b', {key} FROM generate_series(1, $1::integer) n"
        await sql.execute(insert, 1)
        async with asyncio.timeout(30):
            await sql.execute(insert, 30_000)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 60_002


async def test_one_event_is_forgotten_by_the_index_after_many(sql: Sql) -> None:
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a' FROM generate_series(1, 20000)")
    await sql.execute("DELETE FROM pgebus.events WHERE id <= 5000")
    scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'deliveries'"
    async with sql.transaction():
        before = await sql.fetchval(scans)
        await sql.execute("DELETE FROM pgebus.events WHERE id = 6000")
        assert await sql.fetchval(scans) == before
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 14_999
