"""What the clock publishes: each time once in the cluster, by whoever is there, and all or nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    EventSystem,
    add_publish_middleware,
    remove_publish_middleware,
)
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.scheduling import LEAST_SECONDS, LOOK_SECONDS, Scheduler
from tests.system.bus import Sql, finished, running
from tests.system.waiting import until

BACK = "UPDATE pgebus.schedules SET last_at = date_trunc('minute', now()) - $1::interval RETURNING last_at"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "schedules.md"
TICKS = "SELECT id, run_at, payload->>'scheduled_at' AS at, created_at FROM pgebus.events ORDER BY id"


def router_with(cron: str = "* * * * *", **options: Any) -> EventRouter:
    router = EventRouter("clock")

    @router.every(cron, "ticked", **options)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    return router


def scheduler(sm: DatabaseSessionManager, router: EventRouter) -> Scheduler:
    return Scheduler(lambda: AsyncSession(sm.engine), router, "events", health=Pulse("schedule"))


async def test_what_the_clock_publishes_is_handled(database: DatabaseSettings, sql: Sql) -> None:
    seen: list[dict[str, Any]] = []
    router = EventRouter("clock")

    @router.every("* * * * *", "ticked", missed="all")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(payload)

    async with running(router, database):
        await until(lambda: sql.fetchval("SELECT count(*) = 1 FROM pgebus.schedules"))
    began: datetime = await sql.fetchval(BACK, timedelta(minutes=2))
    async with running(router, database):
        await until(lambda: sql.fetchval("SELECT count(*) >= 2 FROM pgebus.events"))
        ids = [row["id"] for row in await sql.fetch(TICKS)]
        await finished(sql, *ids)
    expected = [began + timedelta(minutes=n) for n in (1, 2)]
    assert [datetime.fromisoformat(payload["scheduled_at"]) for payload in seen[:2]] == expected
    rows = await sql.fetch(TICKS)
    assert [row["run_at"] for row in rows[:2]] == expected
    assert all(row["run_at"] <= row["created_at"] for row in rows)


async def test_a_schedule_begins_when_it_is_first_declared(sm: DatabaseSessionManager, sql: Sql) -> None:
    pause = await scheduler(sm, router_with("0 0 1 1 *")).look()
    assert LOOK_SECONDS <= pause <= LOOK_SECONDS + 1
    assert await sql.fetch(TICKS) == []


async def test_it_is_looked_at_again_when_its_time_comes(sm: DatabaseSessionManager, sql: Sql) -> None:
    """The clock is the database's, in which the next minute may be a whole minute away."""
    clock = scheduler(sm, router_with())
    pause = await clock.look()
    left = 60 - float(await sql.fetchval("SELECT extract(epoch FROM clock_timestamp())::numeric % 60"))
    assert 0 < pause <= LOOK_SECONDS + 1
    assert pause == pytest.approx(min(left, LOOK_SECONDS), abs=5) or left > 55


@pytest.mark.parametrize(("missed", "published"), [("latest", 1), ("all", 90), ("skip", 1)])
async def test_times_at_which_nobody_ran(sm: DatabaseSessionManager, sql: Sql, missed: str, published: int) -> None:
    clock = scheduler(sm, router_with(missed=missed))
    await clock.look()
    began: datetime = await sql.fetchval(BACK, timedelta(minutes=90))
    await clock.look()
    rows = await sql.fetch(TICKS)
    reached = await sql.fetchval("SELECT last_at FROM pgebus.schedules")
    minutes = round((reached - began) / timedelta(minutes=1))  # one more where a minute has begun meanwhile
    assert minutes in (90, 91)
    expected = range(1, minutes + 1) if missed == "all" else range(minutes - published + 1, minutes + 1)
    found = [round((row["run_at"] - began) / timedelta(minutes=1)) for row in rows]
    assert found == list(expected) or (missed == "skip" and found in ([], list(range(minutes - 1, minutes + 1))))


async def test_however_many_look_at_once_each_time_is_published_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    clocks = [scheduler(sm, router_with(missed="all")) for _ in range(4)]
    await clocks[0].look()
    await sql.fetchval(BACK, timedelta(minutes=250))
    for _ in range(4):
        await asyncio.gather(*(clock.look() for clock in clocks))
    rows = await sql.fetch(TICKS)
    assert len(rows) >= 250
    assert [row["run_at"] for row in rows] == sorted({row["run_at"] for row in rows})


async def test_a_clock_that_cannot_publish_does_not_move_on(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Both commit together; and what can be published is, beside it."""
    router = router_with(missed="all")

    @router.every("* * * * *", "refused", missed="all")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    clock = scheduler(sm, router)
    await clock.look()
    began = await sql.fetchval(BACK, timedelta(minutes=3))
    await sql.execute("ALTER TABLE pgebus.events ADD CONSTRAINT refuse CHECK (type <> 'clock.refused')")
    with pytest.raises(Exception, match="refuse"):
        await clock.look()
    assert await sql.fetchval("SELECT last_at FROM pgebus.schedules WHERE type = 'clock.refused'") == began
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events WHERE type = 'clock.ticked'") >= 3
    await sql.execute("ALTER TABLE pgebus.events DROP CONSTRAINT refuse")
    await clock.look()
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events WHERE type = 'clock.refused'") >= 3


async def test_a_schedule_that_cannot_be_moved_on_is_not_looked_at_without_a_pause(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """A trigger, or a policy for UPDATE alone: no error says so."""
    clock = scheduler(sm, router_with())
    await clock.look()
    await sql.fetchval(BACK, timedelta(minutes=3))
    await sql.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER keep BEFORE UPDATE ON pgebus.schedules FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    assert await clock.look() >= LEAST_SECONDS
    assert await sql.fetch(TICKS) == []


async def test_before_a_flood_comes_how_much_was_missed_is_said_once(
    sm: DatabaseSessionManager, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the rollback of a deploy: nobody had the schedule for days, and now each of its times comes."""
    clock = scheduler(sm, router_with(missed="all"))
    await clock.look()
    await sql.fetchval(BACK, timedelta(days=3))
    caplog.set_level(logging.INFO, "pgebus")
    for _ in range(3):
        assert await clock.look() <= 1  # the rest is not put off for long
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert "more than 1000 events of type 'clock.ticked'" in said[0]
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == 300
    assert sum("100 events of type 'clock.ticked' were published" in each.getMessage() for each in caplog.records) == 3


async def test_a_schedule_begins_anew_as_the_guide_says(sm: DatabaseSessionManager, sql: Sql) -> None:
    clock = scheduler(sm, router_with(missed="all"))
    await clock.look()
    await sql.fetchval(BACK, timedelta(days=3))
    (statement,) = [line for line in GUIDE.read_text().splitlines() if line.startswith("DELETE FROM pgebus.schedules")]
    await sql.execute(statement.replace("reports.nightly", "clock.ticked"))
    await clock.look()
    assert await sql.fetchval("SELECT count(*) <= 1 FROM pgebus.events")  # a minute may have begun meanwhile


async def test_who_has_no_schedule_asks_nothing(database: DatabaseSettings) -> None:
    """Not even for the table: a release before has none, and a database of another kind may be behind it."""

    def never() -> AsyncSession:
        raise AssertionError("a session was made")

    assert await Scheduler(never, EventRouter(), "events", health=Pulse("schedule")).look() == LOOK_SECONDS


async def test_schedules_of_another_channel_are_left_alone(sm: DatabaseSessionManager, sql: Sql) -> None:
    await scheduler(sm, router_with(missed="all")).look()
    await sql.fetchval(BACK, timedelta(minutes=3))
    elsewhere = Scheduler(
        lambda: AsyncSession(sm.engine), router_with(missed="all"), "elsewhere", health=Pulse("schedule")
    )
    await elsewhere.look()
    assert await sql.fetch(TICKS) == []
    assert await sql.fetchval("SELECT count(*) FROM pgebus.schedules") == 2


async def test_an_event_that_the_application_refuses_to_publish_ends_no_worker(
    database: DatabaseSettings, sql: Sql
) -> None:
    """A middleware that looks for the request that is handled finds none where the clock publishes."""
    router = router_with(missed="all")

    @router.every("* * * * *", "refused", missed="all")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    refusing = True

    def middleware(event: Event, call_next: Callable[[Event], None]) -> None:
        if refusing and event.type == "clock.refused":
            raise LookupError("no tenant")
        call_next(event)

    async def says(system: EventSystem, what: str) -> bool:
        assert system.health().ready  # events are handled all the same
        warnings = system.health().warnings
        return any(what in warning for warning in warnings) if what else not warnings

    async with running(router, database):
        await until(lambda: sql.fetchval("SELECT count(*) = 2 FROM pgebus.schedules"))
    await sql.fetchval(BACK, timedelta(minutes=3))
    add_publish_middleware(middleware)
    try:
        async with running(router, database) as system:
            await until(lambda: sql.fetchval("SELECT count(*) >= 3 FROM pgebus.events WHERE type = 'clock.ticked'"))
            await until(lambda: says(system, "LookupError"))
            assert system.health().alive
            assert await sql.fetchval("SELECT count(*) FROM pgebus.events WHERE type = 'clock.refused'") == 0
            refusing = False
            await until(lambda: sql.fetchval("SELECT count(*) >= 3 FROM pgebus.events WHERE type = 'clock.refused'"))
            await until(lambda: says(system, ""))
    finally:
        remove_publish_middleware(middleware)
