"""What a person does to deliveries while workers run, sleep and are killed."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import text

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, Reject, operations
from pgebus._runtime import claiming
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.conftest import Spawn
from tests.system.processes import Inquest, rescuing
from tests.system.waiting import until
from tests.system.worker_process import work


class Clinic:
    """A handler that rejects until it is mended, and notes what it gets."""

    def __init__(self, **options: Any) -> None:
        self.router = EventRouter()
        self.mended = False
        self.seen: list[int] = []
        self.router.on("#", name="treat", **options)(self._treat)

    async def _treat(self, ctx: EventContext, _payload: dict[str, Any]) -> None:
        if not self.mended:
            raise Reject("ill")
        self.seen.append(ctx.event_id)


@pytest.fixture
def heavy_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the workers look for nothing unasked until they poll, in 30 s: whatever they find, they were woken for."""
    monkeypatch.setattr(claiming, "next_look", lambda _idle_for, poll_interval: poll_interval)


async def asleep(sql: Sql) -> None:
    """Wait until the worker sleeps."""
    await until(lambda: sql.fetchval("SELECT bool_and(idle) AND count(*) > 0 FROM pgebus.workers"))


async def fill(sql: Sql, count: int, *, status: str = "dead", key: str | None = None) -> list[int]:
    """Make events with a delivery each that is dead, or has another status that is final."""
    await sql.execute("SET session_replication_role = replica")
    rows = await sql.fetch(
        "INSERT INTO pgebus.events (type, key) SELECT 'a.b', $2 FROM generate_series(1, $1::int) RETURNING id",
        count,
        key,
    )
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, finished_at,"
        " claim_seq, attempt) SELECT id, now(), 'events', 'default', type, key, $1, now(), 10, 10 FROM pgebus.events",
        status,
    )
    await sql.execute("RESET session_replication_role")
    return sorted(row["id"] for row in rows)


@pytest.mark.usefixtures("heavy_sleep")
async def test_a_sleeping_worker_starts_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    clinic = Clinic()
    async with running(clinic.router, database):
        event_id = await publish(sm, "a.b")
        await finished(sql, event_id, status="dead")
        clinic.mended = True
        for verb in ("redrive", "replay"):
            await asleep(sql)
            async with sm.session() as session:
                if verb == "redrive":
                    await operations.redrive(session, event_ids=[event_id])
                else:
                    await operations.replay(session, "default", event_ids=[event_id])
                await session.commit()
            await finished(sql, event_id, within=5)
    assert clinic.seen == [event_id, event_id]
    assert (await delivery(sql, event_id))["round"] == 3


@pytest.mark.parametrize("verb", ["cancel", "release_key"])
@pytest.mark.usefixtures("heavy_sleep")
async def test_whoever_waits_for_a_key_starts_at_once(
    verb: str, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    clinic = Clinic()
    async with running(clinic.router, database):
        await until(lambda: sql.fetchval("SELECT count(*) FROM pgebus.consumer_groups"))
        await sql.execute("UPDATE pgebus.consumer_groups SET dead_holds_key = true")
        holder = await publish(sm, "a.b", key="k")
        await finished(sql, holder, status="dead")
        waiting = await publish(sm, "a.b", key="k")
        clinic.mended = True
        await asleep(sql)
        async with sm.session() as session:
            if verb == "cancel":
                await operations.cancel(session, event_ids=[holder])
            else:
                await operations.release_key(session, "default", "k")
            await session.commit()
        await finished(sql, waiting, within=5)
    assert clinic.seen == [waiting]


async def test_a_running_delivery_is_taken_from_its_worker(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Its handler goes on, and nothing of what it writes is committed; the next of its key does not wait for it."""
    await sql.execute("CREATE TABLE effects (event_id bigint)")
    router, gates = EventRouter(), dict[int, asyncio.Event]()
    done: list[int] = []

    @router.on("#", transactional=True)
    async def write(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        gate = gates[ctx.event_id] = asyncio.Event()
        await ctx.session.execute(text("INSERT INTO effects VALUES (:id)"), {"id": ctx.event_id})
        await gate.wait()
        done.append(ctx.event_id)

    async with running(router, database) as system:
        first = await publish(sm, "a.b", key="k")
        await until(lambda: _is(first in gates))
        second = await publish(sm, "a.b", key="k")
        async with sm.session() as session:
            assert await operations.cancel(session, event_ids=[first]) == [(first, "default", "running")]
            await session.commit()
        await until(lambda: _is(second in gates))
        gates[first].set()
        gates[second].set()
        await finished(sql, second)
        await until(lambda: _is(system.health().held == 0))
    assert done[0] == first
    assert (await delivery(sql, first))["status"] == "cancelled"
    assert [row["event_id"] for row in await sql.fetch("SELECT event_id FROM effects")] == [second]


async def _is(value: bool) -> bool:
    return value


async def test_what_was_cancelled_stays_so_when_its_worker_is_killed(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    """And what was redriven is finished by another one: its effects are there once."""
    child = spawn(work)
    await child.says("ready")
    ids = [await publish(sm, "job.gated") for _ in range(3)]
    await child.says("inside", times=3)
    await sql.execute(
        "UPDATE pgebus.deliveries SET status = 'dead', worker_id = NULL, claimed_at = NULL, finished_at = now()"
        " WHERE event_id = $1",
        ids[2],
    )
    async with sm.session() as session:
        await operations.cancel(session, event_ids=[ids[0]])
        await operations.redrive(session, event_ids=[ids[2]])
        await session.commit()
    await child.says("inside", times=4)  # the redriven one, in its new round
    await child.killed()
    async with rescuing(database):
        await finished(sql, *ids[1:])
    rows = await sql.fetch("SELECT event_id, status, round, lost FROM pgebus.deliveries ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        (ids[0], "cancelled", 1, 0),
        (ids[1], "completed", 1, 1),
        (ids[2], "completed", 2, 1),
    ]
    effects = await sql.fetch("SELECT event_id FROM effects ORDER BY 1")
    assert [row["event_id"] for row in effects] == ids[1:]


async def test_a_redriven_key_is_handled_in_order(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """A thousand of them, in batches, while they are being handled."""
    ids = await fill(sql, 1_000, key="k")
    clinic = Clinic()
    clinic.mended = True
    async with running(clinic.router, database):
        await until(lambda: sql.fetchval("SELECT count(*) FROM pgebus.subscriptions"))
        async with sm.session() as session:
            while await operations.redrive(session, limit=300):
                await session.commit()
        await finished(sql, *ids, within=60)
    assert clinic.seen == ids


async def test_verbs_and_workers_do_not_stand_in_each_others_way(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Two operators redrive, cancel and replay what two workers handle: each change is counted once."""
    ids = await fill(sql, 600)
    await fill_keys(sql)
    clinic, other = Clinic(), Clinic()
    clinic.mended = other.mended = True
    counted = dict.fromkeys(("redrive", "cancel", "replay"), 0)

    async def operate(place: int) -> None:
        async with sm.session() as session:
            for _ in range(15):
                redriven = await operations.redrive(session, limit=40)
                await session.commit()
                cancelled = await operations.cancel(session, event_ids=ids[place::7], limit=20)
                await session.commit()
                replayed = await operations.replay(session, "default", event_ids=ids[place::11])
                await session.commit()
                counted["redrive"] += len(redriven)
                counted["cancel"] += len(cancelled)
                counted["replay"] += len(replayed)

    async with running(clinic.router, database), running(other.router, database):
        await until(lambda: sql.fetchval("SELECT count(*) FROM pgebus.subscriptions"))
        await asyncio.gather(operate(0), operate(1))
        await until(lambda: sql.fetchval("SELECT count(*) = 0 FROM pgebus.deliveries WHERE finished_at IS NULL"), 30)
    rounds = await sql.fetchval("SELECT sum(round - 1) FROM pgebus.deliveries")
    assert rounds == counted["redrive"] + counted["replay"]
    assert min(counted.values()) > 0


async def fill_keys(sql: Sql) -> None:
    """Give half of the events a key of ten."""
    await sql.execute("UPDATE pgebus.events SET key = 'k' || id % 10 WHERE id % 2 = 0")
    await sql.execute("UPDATE pgebus.deliveries d SET key = e.key FROM pgebus.events e WHERE e.id = d.event_id")


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_a_flood_of_dead_letters_is_redriven_without_holding_up_publishers(
    count: int, sm: DatabaseSessionManager, sql: Sql, another: Sql
) -> None:
    """Batch by batch; a publisher that may wait for nobody commits between any two statements, and within one."""
    await fill(sql, count)
    await another.execute("SET lock_timeout = '1s'")
    redriving = True
    slowest = published = 0.0

    async def keep_publishing() -> None:
        nonlocal slowest, published
        while redriving:
            began = monotonic()
            await another.execute("INSERT INTO pgebus.events (type) VALUES ('c.d')")
            slowest = max(slowest, monotonic() - began)
            published += 1

    publishing = asyncio.create_task(keep_publishing(), name="publisher")
    batches = []
    async with sm.session() as session:
        while done := await operations.redrive(session, limit=1_000):
            await session.commit()
            batches.append(len(done))
    redriving = False
    await publishing
    assert batches == [1_000] * (count // 1_000)
    assert published > len(batches)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'pending'") == count
    assert slowest < 1.0
