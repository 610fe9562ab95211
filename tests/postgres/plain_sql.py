"""The bus by hand, in plain SQL: what tests of the schema do on a connection. It tests nothing itself."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import asyncpg
from tests.system.waiting import until

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

NOW: Final = datetime(2030, 1, 1, tzinfo=UTC)


async def subscribe(sql: Sql, group: str, *patterns: str, channel: str = "events") -> None:
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        channel,
        group,
    )
    await sql.executemany(
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ($1, $2, $3)",
        [(channel, group, pattern) for pattern in patterns],
    )


async def publish(sql: Sql, event_type: str = "a.b", *, key: str | None = None, channel: str = "events") -> int:
    event_id: int = await sql.fetchval(
        "INSERT INTO pgebus.events (type, key, channel) VALUES ($1, $2, $3) RETURNING id", event_type, key, channel
    )
    return event_id


async def deliveries(sql: Sql) -> list[tuple[int, str, str]]:
    rows = await sql.fetch("SELECT event_id, consumer_group, status FROM pgebus.deliveries ORDER BY 1, 2")
    return [tuple(row) for row in rows]


async def statuses(sql: Sql) -> list[str]:
    return [status for _, _, status in await deliveries(sql)]


async def insert_delivery(sql: Sql, **values: object) -> None:
    row = {"event_id": 1, "due_at": NOW, "channel": "events", "consumer_group": "default", "type": "a"} | values
    places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    await sql.execute(f"INSERT INTO pgebus.deliveries ({', '.join(row)}) VALUES ({places})", *row.values())


async def sleeper(sql: Sql, channel: str = "events", *, idle: bool = True) -> None:
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, idle) VALUES ((SELECT count(*) FROM pgebus.workers), $1, $2)",
        channel,
        idle,
    )


async def listen(sql: Sql, channel: str) -> asyncio.Queue[str]:
    heard: asyncio.Queue[str] = asyncio.Queue()

    def hear(*notification: Any) -> None:
        heard.put_nowait(notification[-1])

    await sql.add_listener(channel, hear)
    return heard


async def drain(heard: asyncio.Queue[str], sql: Sql, channel: str) -> list[str]:
    """What was heard up to now: a NOTIFY of our own comes after all that were committed before it."""
    await sql.execute("SELECT pg_notify($1, 'end')", channel)
    seen = []
    while (payload := await heard.get()) != "end":
        seen.append(payload)
    return seen


async def terminate(sql: Sql, pid: int) -> None:
    """End a backend and wait until it is gone; `pg_terminate_backend` can wait for it itself only from 14 on."""
    assert await sql.fetchval("SELECT pg_terminate_backend($1)", pid)

    async def gone() -> bool:
        return not await sql.fetchval("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)

    await until(gone)
