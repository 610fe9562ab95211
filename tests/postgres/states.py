"""An event with a delivery in any state, made by hand: for tests of what a person does to it."""

from __future__ import annotations

from typing import Final

from tests.postgres.plain_sql import Sql

STATES: Final = ("pending", "blocked", "running", "unhandled", "completed", "dead", "cancelled")
WORKER: Final = 7


async def event_in(
    sql: Sql,
    status: str,
    *,
    key: str | None = None,
    group: str = "default",
    holds_key: bool = False,
    event_type: str = "a.b",
    payload: str = '{"name": "Ada"}',
) -> int:
    """Publish an event without triggers, and give it one delivery that has failed twice, one handler apart."""
    key = key or ("k" if status == "blocked" or holds_key else None)
    event_id: int = await sql.fetchval(
        "WITH off AS MATERIALIZED (SELECT set_config('session_replication_role', 'replica', false)) INSERT INTO"
        " pgebus.events (type, key, payload, headers, run_at, created_at) SELECT $1, $2, $3::jsonb,"
        ' \'{"correlation_id": "c", "user": "Ada"}\', now() - interval \'1 hour\', now() - interval \'1 hour\''
        " FROM off RETURNING id",
        event_type,
        key,
        payload,
    )
    await sql.execute("SET session_replication_role = origin")
    await deliver(sql, event_id, status, group=group, holds_key=holds_key)
    return event_id


async def deliver(sql: Sql, event_id: int, status: str, *, group: str = "default", holds_key: bool = False) -> None:
    """Give an event one more delivery."""
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, worker_id,"
        " claimed_at, finished_at, holds_key, claim_seq, attempt, lost, handled, errors) SELECT e.id, e.run_at,"
        " e.channel, $2, e.type, e.key, $3, CASE WHEN $3 = 'running' THEN $5::bigint END,"
        " CASE WHEN $3 = 'running' THEN now() END,"
        " CASE WHEN $3 IN ('completed', 'dead', 'cancelled') THEN now() - interval '30 minutes' END, $4, 3, 2, 1,"
        " '{first}', jsonb_build_array(jsonb_build_object('attempt', 2, 'at', now(), 'worker', '7', 'handler',"
        " 'second', 'type', 'ValueError', 'message', 'Ada is unknown', 'traceback', 'Traceback of Ada'))"
        " FROM pgebus.events e WHERE e.id = $1",
        event_id,
        group,
        status,
        holds_key,
        WORKER,
    )
