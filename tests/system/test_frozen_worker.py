"""A worker that was stopped in the middle of a handler, given up by the others, and woken again."""

from __future__ import annotations

import signal

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings
from tests.system.bus import Sql, delivery, finished, publish
from tests.system.conftest import Spawn
from tests.system.processes import Child, Inquest, rescuing
from tests.system.waiting import until
from tests.system.worker_process import work


async def freeze(sql: Sql, child: Child) -> None:
    """Stop *child* with everything it has open, and end the connection that proves it alive."""
    child.signal(signal.SIGSTOP)
    question = "SELECT backend_pid FROM pgebus.workers WHERE pid = $1 AND ended_at IS NULL"
    backend = await sql.fetchval(question, child.pid)
    assert await sql.fetchval("SELECT pg_terminate_backend($1)", backend)


async def effects(sql: Sql, event_id: int) -> list[tuple[str, int]]:
    """Return (handler, attempt) of all effects of an event."""
    rows = await sql.fetch("SELECT handler, attempt FROM effects WHERE event_id = $1", event_id)
    return [(row["handler"], row["attempt"]) for row in rows]


async def lives(sql: Sql, child: Child) -> list[bool]:
    """Return, for each identity of *child* in turn, whether it has ended."""
    rows = await sql.fetch("SELECT ended_at FROM pgebus.workers WHERE pid = $1 ORDER BY started_at", child.pid)
    return [row["ended_at"] is not None for row in rows]


@pytest.mark.parametrize("thawed", ["while the other runs it", "after the other has completed it"])
async def test_a_thawed_worker_cannot_complete_what_was_given_to_another(
    thawed: str, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    # It would find out that it was given up before its handler is done, or after: here after, so that it tries.
    child = spawn(work, returns_late=True)
    await child.says("ready")
    event_id = await publish(sm, "job.gated")
    await child.says("inside")
    await freeze(sql, child)

    taken_over: list[int] = []

    async def taken() -> bool:
        return bool(taken_over)

    async with rescuing(
        database, gate_open=False, say=lambda _, event: taken_over.append(event), recovery_grace_seconds=0.1
    ) as stage:
        await until(taken)
        if thawed == "after the other has completed it":
            stage.gate.set()
            await finished(sql, event_id)
        assert await lives(sql, child) == [True]
        child.go()
        child.signal(signal.SIGCONT)
        # Refused by the fence; so is what it then wants to write about the delivery.
        assert await child.says("Reschedule") == [event_id]
        if thawed == "while the other runs it":
            assert await effects(sql, event_id) == []
            assert (await delivery(sql, event_id))["status"] == "running"
            stage.gate.set()
            await finished(sql, event_id)

    assert taken_over == [event_id]
    assert await effects(sql, event_id) == [("gated", 2)]
    after = await delivery(sql, event_id)
    assert (after["attempt"], after["lost"], after["claim_seq"]) == (2, 1, 2)


async def test_a_thawed_worker_cancels_what_was_given_to_another_and_returns_as_somebody_new(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    child = spawn(work)
    await child.says("ready")
    event_id = await publish(sm, "job.gated")
    await child.says("inside")
    await freeze(sql, child)
    async with rescuing(database, recovery_grace_seconds=0.1):
        await finished(sql, event_id)
        assert await lives(sql, child) == [True]
    child.signal(signal.SIGCONT)
    assert await child.says("cancelled") == [event_id]

    async def somebody_new() -> bool:
        return await lives(sql, child) == [True, False]

    await until(somebody_new)
    child.go()
    another = await publish(sm, "job.gated")
    await finished(sql, another)
    assert await effects(sql, event_id) == [("gated", 2)]
    assert await sql.fetchval("SELECT pid FROM effects WHERE event_id = $1", another) == child.pid


async def test_a_frozen_worker_that_nobody_gave_up_goes_on_as_if_nothing_had_been(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    """However long it takes: as long as its connection stands, it lives."""
    child = spawn(work)
    await child.says("ready")
    event_id = await publish(sm, "job.gated")
    await child.says("inside")
    child.signal(signal.SIGSTOP)

    async with rescuing(database, recovery_grace_seconds=0.1):

        async def looked_for_far_longer_than_the_grace() -> bool:
            return inquest.looks >= 10

        await until(looked_for_far_longer_than_the_grace)
        assert inquest.condemned == []
        child.go()
        child.signal(signal.SIGCONT)
        await finished(sql, event_id)
    assert await effects(sql, event_id) == [("gated", 1)]
    assert await lives(sql, child) == [False]
