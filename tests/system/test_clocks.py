"""The clock of the database is the only one that counts: those of workers may say what they like."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter
from pgebus._runtime import claiming
from tests.system.bus import Sql, finished, publish, running


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_delayed_event_comes_in_time_whatever_the_clock_of_its_worker_says(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The worker looks only when it is told to, or knows that something is due."""
    monkeypatch.setattr(claiming, "next_look", lambda _idle_for, poll_interval: poll_interval)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3_600 * hours)
    router = EventRouter()

    @router.on("later")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        if ctx.attempt == 1:
            raise ValueError("and once more, after the backoff")

    async with running(router, database):
        moment = await sql.fetchval("SELECT clock_timestamp()") + timedelta(seconds=0.5)
        event_id = await publish(sm, "later", run_at=moment)
        await finished(sql, event_id)
    first = await sql.fetchval("SELECT errors -> 0 ->> 'at' FROM pgebus.deliveries")
    assert await sql.fetchval("SELECT $1::text::timestamptz >= $2", first, moment)
