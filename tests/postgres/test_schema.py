"""What no row may be: the CHECKs and unique indexes, which hold for every client."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
import pytest
from tests.postgres.plain_sql import NOW, Sql, insert_delivery, subscribe

BAD_EVENTS: list[tuple[dict[str, object], str]] = [
    ({"type": "a..b"}, "ck_events_type"),
    ({"type": "a b"}, "ck_events_type"),
    ({"type": "ä"}, "ck_events_type"),
    ({"type": "a\n"}, "ck_events_type"),
    ({"type": ""}, "ck_events_type"),
    ({"type": "a" * 256}, "ck_events_type"),
    ({"channel": ""}, "ck_events_channel"),
    ({"channel": "ä" * 32}, "ck_events_channel"),
    ({"key": ""}, "ck_events_key"),
    ({"key": "k" * 256}, "ck_events_key"),
    ({"dedup_key": ""}, "ck_events_dedup_key"),
    ({"dedup_key": "k" * 256}, "ck_events_dedup_key"),
    ({"priority": -1}, "ck_events_priority"),
    ({"priority": 10}, "ck_events_priority"),
    ({"payload": "[]"}, "ck_events_payload"),
    ({"payload": "null"}, "ck_events_payload"),
    ({"headers": '"text"'}, "ck_events_headers"),
    ({"run_at": datetime.max.replace(tzinfo=UTC)}, "ck_events_run_at"),  # asyncpg sends it as infinity
]


async def test_an_event_that_the_api_would_refuse_is_refused(sql: Sql) -> None:
    for values, constraint in BAD_EVENTS:
        row = {"type": "a.b"} | values
        places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        insert = f"INSERT INTO pgebus.events ({', '.join(row)}) VALUES ({places})"
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await sql.execute(insert, *row.values())
        assert caught.value.constraint_name == constraint, values


async def test_a_dedup_key_is_unique_within_its_channel(sql: Sql) -> None:
    insert = "INSERT INTO pgebus.events (type, channel, dedup_key) VALUES ('a', $1, $2)"
    await sql.execute(insert, "one", "k")
    await sql.execute(insert, "two", "k")
    await sql.execute(insert, "one", None)
    await sql.execute(insert, "one", None)
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await sql.execute(insert, "one", "k")
    assert caught.value.constraint_name == "uq_events_dedup_key"


LEASE: dict[str, object] = {"worker_id": 1, "claimed_at": NOW}

BAD_DELIVERIES: list[tuple[dict[str, object], str]] = [
    ({"status": "failed"}, "ck_deliveries_status"),
    ({"status": "running"}, "ck_deliveries_running"),
    ({"status": "running", "worker_id": 1}, "ck_deliveries_running"),
    ({"status": "running", "claimed_at": NOW}, "ck_deliveries_running"),
    ({"status": "pending", "worker_id": 1}, "ck_deliveries_running"),
    ({"status": "pending", "claimed_at": NOW}, "ck_deliveries_running"),
    ({"status": "completed", "finished_at": NOW, **LEASE}, "ck_deliveries_running"),
    ({"status": "completed"}, "ck_deliveries_finished"),
    ({"status": "dead"}, "ck_deliveries_finished"),
    ({"status": "cancelled"}, "ck_deliveries_finished"),
    ({"status": "pending", "finished_at": NOW}, "ck_deliveries_finished"),
    ({"status": "blocked"}, "ck_deliveries_key"),
    ({"holds_key": True, "key": "k"}, "ck_deliveries_key"),
    ({"holds_key": True, "status": "dead", "finished_at": NOW}, "ck_deliveries_key"),
    ({"attempt": 1}, "ck_deliveries_attempt"),
    ({"attempt": -1}, "ck_deliveries_attempt"),
    ({"lost": -1}, "ck_deliveries_attempt"),
]


async def test_an_illegal_state_of_a_delivery_cannot_be_stored(sql: Sql) -> None:
    for values, constraint in BAD_DELIVERIES:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await insert_delivery(sql, **values)
        assert caught.value.constraint_name == constraint, values


LEGAL_DELIVERIES: list[dict[str, object]] = [
    {"status": "pending"},
    {"status": "unhandled"},
    {"status": "blocked", "key": "k"},
    {"status": "running", "claim_seq": 2, "attempt": 1, **LEASE},
    {"status": "completed", "finished_at": NOW},
    {"status": "dead", "finished_at": NOW, "holds_key": True, "key": "k"},
    {"status": "cancelled", "finished_at": NOW},
]


async def test_every_legal_state_can_be_stored(sql: Sql) -> None:
    for event_id, values in enumerate(LEGAL_DELIVERIES):
        await insert_delivery(sql, event_id=event_id, **values)


async def test_two_deliveries_of_one_key_never_run_together(sql: Sql) -> None:
    await insert_delivery(sql, event_id=1, key="k", status="running", **LEASE)
    await insert_delivery(sql, event_id=2, key="k", status="running", consumer_group="another", **LEASE)
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert_delivery(sql, event_id=3, key="k", status="running", **LEASE)


async def test_a_pattern_that_is_none_is_refused(sql: Sql) -> None:
    for pattern in ["", ".", "a.", "a*", "a.#b", "**", "a b", "a" * 256]:
        with pytest.raises(asyncpg.CheckViolationError):
            await subscribe(sql, "group", pattern)


async def test_a_limit_of_nothing_is_refused(sql: Sql) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(
            "INSERT INTO pgebus.consumer_groups (channel, consumer_group, max_running) VALUES ('c', 'g', 0)"
        )


async def test_a_groups_subscriptions_go_with_it(sql: Sql) -> None:
    await subscribe(sql, "group", "a.*", "#")
    await sql.execute("DELETE FROM pgebus.consumer_groups")
    assert await sql.fetchval("SELECT count(*) FROM pgebus.subscriptions") == 0
