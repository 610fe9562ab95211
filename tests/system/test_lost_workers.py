"""What becomes of the deliveries of a worker that was killed, and of the event that kills its workers."""

from __future__ import annotations

import asyncio
from time import monotonic

from pgebus import DatabaseSessionManager, DatabaseSettings, Event, EventRouter, EventSystem, Settings, publish_events
from tests.system.bus import Sql, finished, running
from tests.system.conftest import Spawn
from tests.system.processes import Inquest
from tests.system.waiting import until
from tests.system.worker_process import TABLES, Stage, router_for, taking_notes, work

MAX_ATTEMPTS = 3
# Runs of two deliveries that were under way at the same moment, in one process.
OVERLAPS = """
SELECT count(*) FROM runs a JOIN runs b ON a.pid = b.pid AND a.event_id < b.event_id
  AND tstzrange(a.started_at, a.ended_at) && tstzrange(b.started_at, b.ended_at)
WHERE a.attempt > 1 AND b.attempt > 1"""


async def publish_all(sm: DatabaseSessionManager, *events: Event) -> list[int]:
    """Publish *events* in one transaction; return their ids."""
    async with sm.session() as session:
        published = await publish_events(session, list(events))
        await session.commit()
        return [event.id for event in published]


async def worker_of(sql: Sql, pid: int) -> int:
    """Return the id of the worker that is the process *pid*."""
    worker_id: int = await sql.fetchval("SELECT id FROM pgebus.workers WHERE pid = $1 AND ended_at IS NULL", pid)
    return worker_id


async def test_another_worker_has_what_a_killed_one_held_within_five_seconds(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, patient_inquest: Inquest
) -> None:
    """With default settings."""
    child = spawn(work)
    await child.says("ready")
    events = await publish_all(sm, *(Event(type="job.gated", channel="events", payload={}) for _ in range(5)))
    assert sorted(await child.says("inside", times=5)) == events
    started: dict[int, float] = {}

    def note_start(_: str, event_id: int) -> None:
        started.setdefault(event_id, monotonic())

    async def witnessed() -> bool:
        return await worker_of(sql, child.pid) in patient_inquest.witnessed

    async with taking_notes(database) as notes:
        stage = Stage(notes, say=note_start)
        stage.gate.set()
        async with EventSystem(router_for(stage), Settings(database=database)):
            # A worker that was not seen alive has a longer grace while the server is young, as it is here.
            await until(witnessed)
            await child.killed()
            died = monotonic()
            await finished(sql, *events)

    assert sorted(started) == events
    assert max(started.values()) - died < 5.0
    rows = await sql.fetch("SELECT status, attempt, lost, claim_seq >= 2 AS again FROM pgebus.deliveries")
    assert [tuple(row) for row in rows] == [("completed", 2, 1, True)] * 5
    assert sorted(row[0] for row in await sql.fetch("SELECT event_id FROM effects")) == events


async def test_what_two_workers_have_died_with_runs_one_at_a_time(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    await sql.execute(TABLES)
    events = await publish_all(sm, *(Event(type="job.gated", channel="events", payload={}) for _ in range(5)))
    await sql.execute("UPDATE pgebus.deliveries SET status = 'pending', lost = 2, attempt = 2, claim_seq = 2")
    async with taking_notes(database) as notes:
        stage = Stage(notes, say=lambda _, __: None)
        stage.gate.set()
        async with EventSystem(router_for(stage), Settings(database=database)):
            await finished(sql, *events)
    assert await sql.fetchval(OVERLAPS) == 0


async def test_an_event_that_kills_its_workers_ends_dead_and_takes_no_other_with_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    innocent = [Event(type="job.innocent", channel="events", payload={}) for _ in range(9)]
    deadly = Event(type="job.deadly", channel="events", payload={})
    # In the middle of the first claim.
    ids = await publish_all(sm, *innocent[:2], deadly, *innocent[2:])
    deadly_id = ids.pop(2)
    workers = [spawn(work, event_system={"max_attempts": MAX_ATTEMPTS})]

    async def over_while_the_dead_are_replaced() -> bool:
        if workers[-1].exit_code is not None:
            workers.append(spawn(work, event_system={"max_attempts": MAX_ATTEMPTS}))
        question = "SELECT count(*) FROM pgebus.deliveries WHERE finished_at IS NULL"
        return bool(await sql.fetchval(question) == 0)

    # Serves another channel, and does for all of them what every worker does.
    async with running(EventRouter(), database, channel="elsewhere", recovery_grace_seconds=0.1):
        await until(over_while_the_dead_are_replaced, within=40)

    dead = await sql.fetchrow("SELECT * FROM pgebus.deliveries WHERE event_id = $1", deadly_id)
    assert dead is not None
    assert (dead["status"], dead["lost"]) == ("dead", MAX_ATTEMPTS)
    assert await sql.fetchval("SELECT errors -> -1 ->> 'type' FROM pgebus.deliveries WHERE status = 'dead'") == (
        "WorkerLost"
    )
    assert await sql.fetchval("SELECT count(*) FROM runs WHERE event_id = $1", deadly_id) == MAX_ATTEMPTS
    assert len(workers) == MAX_ATTEMPTS + 1

    others = await sql.fetch("SELECT * FROM pgebus.deliveries WHERE event_id = ANY ($1)", ids)
    assert {row["status"] for row in others} == {"completed"}
    # Those in hand when it struck first, and again, and never after that.
    assert max(row["lost"] for row in others) <= 2
    assert sum(row["lost"] for row in others) <= 8
    assert sorted(row[0] for row in await sql.fetch("SELECT event_id FROM effects")) == sorted(ids)


async def test_a_worker_that_was_killed_idle_is_not_taken_for_a_sleeper(
    database: DatabaseSettings, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    """Its idle flag would make every publisher notify, for ever."""
    child = spawn(work)
    await child.says("ready")
    await until(lambda: sql.fetchval("SELECT idle FROM pgebus.workers WHERE pid = $1", child.pid))
    await child.killed()
    async with running(EventRouter(), database, channel="elsewhere", recovery_grace_seconds=0.1):
        ended = "SELECT ended_at IS NOT NULL AND NOT idle FROM pgebus.workers WHERE pid = $1"
        await until(lambda: sql.fetchval(ended, child.pid))


async def test_two_processes_share_the_work_and_none_of_it_runs_twice_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn
) -> None:
    quick = {"backoff_first_seconds": 0.01, "backoff_ceiling_seconds": 0.01}
    pair = [spawn(work, event_system=quick), spawn(work, event_system=quick)]
    await asyncio.gather(*(child.says("ready") for child in pair))
    failing = [{"fails": number % 10 == 0} for number in range(200)]
    events = await publish_all(sm, *(Event(type="job.gated", channel="events", payload=payload) for payload in failing))
    # Neither is let on before the other has something in hand.
    await asyncio.gather(*(child.says("inside") for child in pair))
    for child in pair:
        child.go()
    await finished(sql, *events, within=30)

    runs = await sql.fetch("SELECT event_id, count(*) FROM runs GROUP BY event_id ORDER BY event_id")
    assert [row["count"] for row in runs] == [2 if payload["fails"] else 1 for payload in failing]
    at_once = """
SELECT count(*) FROM runs a JOIN runs b ON a.event_id = b.event_id AND a.id < b.id
  AND tstzrange(a.started_at, a.ended_at) && tstzrange(b.started_at, b.ended_at)"""
    assert await sql.fetchval(at_once) == 0
    assert [row[0] for row in await sql.fetch("SELECT event_id FROM effects ORDER BY 1")] == events
    assert {row[0] for row in await sql.fetch("SELECT pid FROM effects")} == {child.pid for child in pair}
    assert await sql.fetchval("SELECT max(lost) FROM pgebus.deliveries") == 0
