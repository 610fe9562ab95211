"""Workers that beat instead of holding a lock: they live, die and return as the others do."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

import pgebus.system
from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
)
from pgebus._runtime import statements
from pgebus._runtime.statements import Statements
from pgebus.operations import list_groups
from tests.system.bus import Sql, delivery, finished, publish, settings
from tests.system.conftest import Spawn
from tests.system.faults import EFFECTS, effects, failed, healthy, record, worker
from tests.system.processes import Inquest, rescuing
from tests.system.proxy import Proxy, TransactionPooler
from tests.system.waiting import until
from tests.system.worker_process import work

BEATS: dict[str, Any] = {"liveness": "beat", "poll_interval_seconds": 0.1}
BEAT = "UPDATE pgebus.workers SET beat_at = clock_timestamp() - interval '{} seconds'"


@pytest.fixture
def short_breath(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every system in this process take a beat for absent after two seconds: two beats must be missing."""
    monkeypatch.setattr(statements, "BEAT_ABSENT_SECONDS", 2)


def recording() -> EventRouter:
    router = EventRouter()

    @router.on("order.placed", transactional=True)
    async def once(ctx: EventContext, payload: dict[str, Any]) -> None:
        await record(ctx, payload["number"])

    return router


async def test_a_beating_worker_needs_no_session(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Each of its transactions may run on another server connection."""
    await sql.execute(EFFECTS)
    async with TransactionPooler(database.sqlalchemy_url()) as pooler:
        through = DatabaseSettings(url=SecretStr(pooler.text_url()))
        async with worker(recording(), through, **BEATS) as system:
            assert system.health().loops[0].name == "beat"
            events = [await publish(sm, "order.placed", {"number": number}) for number in range(20)]
            await finished(sql, *events)
            assert system.health().ok
            row = await sql.fetchrow("SELECT * FROM pgebus.workers")
            assert row is not None
            assert (row["backend_pid"], row["ended_at"]) == (None, None)
            assert await sql.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
            async with sm.session() as session:
                assert [group.workers for group in await list_groups(session, "events")] == [1]
                await sql.execute(BEAT.format(20))

                async def beaten_again() -> bool:
                    return bool(await sql.fetchval("SELECT beat_at > now() - interval '5 seconds' FROM pgebus.workers"))

                await until(beaten_again)
                assert not await sql.fetchval("SELECT idle FROM pgebus.workers")  # nor does it ask to be woken
    assert await effects(sql) == dict.fromkeys(range(20), 1)
    assert await sql.fetchval("SELECT ended_at IS NOT NULL FROM pgebus.workers")


async def test_a_worker_whose_beat_is_absent_is_not_counted_as_alive(sm: DatabaseSessionManager, sql: Sql) -> None:
    await sql.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'default')")
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, groups, beat_at) VALUES (1, 'events', '{default}', now())"
    )
    for seconds, alive in ((10, 1), (20, 0)):
        await sql.execute(BEAT.format(seconds))
        async with sm.session() as session:
            assert [group.workers for group in await list_groups(session, "events")] == [alive]


async def owned(sql: Sql, sm: DatabaseSessionManager, *, beaten: int) -> int:
    """Have worker 1, whose beat is some seconds old, own a delivery; return the event's id."""
    event_id = await publish(sm, "order.placed")
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, beat_at)"
        " VALUES (1, 'events', now() - make_interval(secs => $1::int))",
        beaten,
    )
    await sql.execute(
        "UPDATE pgebus.deliveries SET status = 'running', worker_id = 1, claimed_at = now(), attempt = 1, claim_seq = 1"
    )
    return event_id


@pytest.mark.parametrize(("beaten", "alive"), [(10, True), (20, False)])
async def test_a_beat_counts_for_fifteen_seconds(
    sm: DatabaseSessionManager, sql: Sql, beaten: int, alive: bool
) -> None:
    await owned(sql, sm, beaten=beaten)
    sees = Statements("pgebus")
    assert [row["alive"] for row in await sql.fetch(sees.owners)] == [alive]
    assert len(await sql.fetch(sees.recover, [1])) == (0 if alive else 1)
    assert await sql.fetchval("SELECT ended_at IS NULL FROM pgebus.workers") == alive


async def test_a_worker_without_a_row_cannot_beat(sm: DatabaseSessionManager, sql: Sql) -> None:
    await owned(sql, sm, beaten=0)
    await sql.execute("DELETE FROM pgebus.workers")
    assert [row["alive"] for row in await sql.fetch(Statements("pgebus").owners)] == [False]
    assert len(await sql.fetch(Statements("pgebus").recover, [1])) == 1


async def waits_for_a_lock(sql: Sql, other: Sql) -> None:
    pid = other.get_server_pid()

    async def waits() -> bool:
        question = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1"
        return bool(await sql.fetchval(question, pid))

    await until(waits)


async def test_a_beat_that_comes_first_keeps_the_deliveries(sm: DatabaseSessionManager, sql: Sql, another: Sql) -> None:
    """Whoever recovers has seen the old beat; what counts is the row after the new one was committed."""
    event_id = await owned(sql, sm, beaten=20)
    async with sql.transaction():
        assert await sql.fetchval(Statements("pgebus").beat, 1) == 1
        recovering = asyncio.ensure_future(another.fetch(Statements("pgebus").recover, [1]))
        await waits_for_a_lock(sql, another)
    assert await recovering == []
    assert await sql.fetchval("SELECT ended_at IS NULL FROM pgebus.workers")
    assert (await delivery(sql, event_id))["status"] == "running"


async def test_a_recovery_that_comes_first_ends_the_worker_that_beats(
    sm: DatabaseSessionManager, sql: Sql, another: Sql
) -> None:
    event_id = await owned(sql, sm, beaten=20)
    async with sql.transaction():
        assert len(await sql.fetch(Statements("pgebus").recover, [1])) == 1
        beating = asyncio.ensure_future(another.fetchval(Statements("pgebus").beat, 1))
        await waits_for_a_lock(sql, another)
    assert await beating is None
    assert (await delivery(sql, event_id))["status"] == "pending"


@pytest.mark.parametrize("recoverer", ["beat", pytest.param("lock", marks=pytest.mark.slow)])
async def test_what_a_killed_worker_held_goes_to_others_of_either_kind(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    spawn: Spawn,
    inquest: Inquest,
    short_breath: None,
    recoverer: str,
) -> None:
    """A beating one lives beside them as long as it beats; one that holds a lock is gone at once, as ever."""
    beating, locked = spawn(work, event_system={**BEATS, "n_workers": 1}), spawn(work, event_system={"n_workers": 1})
    for child in (beating, locked):
        await child.says("ready")
    events = [await publish(sm, "job.gated") for _ in range(2)]
    assert sorted(await beating.says("inside") + await locked.says("inside")) == events

    async with rescuing(database, recovery_grace_seconds=0.1, liveness=recoverer, poll_interval_seconds=0.1):

        async def looked_for_longer_than_a_breath() -> bool:
            return inquest.looks >= 45

        await until(looked_for_longer_than_a_breath)
        assert inquest.condemned == []
        await locked.killed()
        await finished(sql, *locked.said("inside"))
        assert (await delivery(sql, beating.said("inside")[0]))["lost"] == 0
        await beating.killed()
        await finished(sql, *beating.said("inside"), within=30)
    rows = await sql.fetch("SELECT DISTINCT attempt, lost FROM pgebus.deliveries")
    assert [tuple(row) for row in rows] == [(2, 1)]
    assert sorted(row[0] for row in await sql.fetch("SELECT event_id FROM effects")) == sorted(events)


async def test_a_frozen_one_is_given_up_and_returns_as_somebody_new(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    spawn: Spawn,
    inquest: Inquest,
    short_breath: None,
) -> None:
    """Other than with a lock, its connections do not speak for it."""
    child = spawn(work, event_system=BEATS)
    await child.says("ready")
    event_id = await publish(sm, "job.gated")
    await child.says("inside")
    child.signal(signal.SIGSTOP)
    async with rescuing(database, recovery_grace_seconds=0.1, liveness="beat", poll_interval_seconds=0.1):
        await finished(sql, event_id)
    child.signal(signal.SIGCONT)
    assert await child.says("cancelled") == [event_id]

    async def somebody_new() -> bool:
        rows = await sql.fetch("SELECT ended_at FROM pgebus.workers WHERE pid = $1 ORDER BY started_at", child.pid)
        return [row["ended_at"] is None for row in rows] == [False, True]

    await until(somebody_new)
    child.go()
    another = await publish(sm, "job.gated")
    await finished(sql, another)
    assert await sql.fetchval("SELECT count(*) FROM effects WHERE event_id = $1", event_id) == 1
    assert await sql.fetchval("SELECT pid FROM effects WHERE event_id = $1", another) == child.pid


async def test_a_silent_connection_keeps_nobody_from_beating(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgebus.system, "BEAT_ANSWER_SECONDS", 0.3)
    await sql.execute(EFFECTS)
    async with Proxy(database.sqlalchemy_url()) as proxy:
        through = DatabaseSettings(url=SecretStr(proxy.text_url()))
        async with worker(recording(), through, **BEATS) as system:
            deaf = proxy.cut_at(b"SET beat_at", "freeze")
            await asyncio.wait_for(deaf.wait(), 10)
            await failed(system, "beat")
            await healthy(system)
            await finished(sql, await publish(sm, "order.placed", {"number": 1}))
            assert await sql.fetchval("SELECT count(*) FROM pgebus.workers") == 1
            proxy.reset()  # for the server the silent connection is still there


@pytest.mark.parametrize("behind", ["beat", "listen_url"])
async def test_defaults_that_a_worker_behind_a_pooler_cannot_set_are_refused(
    database: DatabaseSettings, sql: Sql, behind: str
) -> None:
    """A SET would reach strangers, so it sets nothing, and says what to do instead."""
    await sql.execute(f'ALTER DATABASE "{database.sqlalchemy_url().database}" SET synchronous_commit = off')
    url = database.sqlalchemy_url().render_as_string(hide_password=False)
    given = {"url": url} if behind == "beat" else {"url": url, "listen_url": url}
    options: dict[str, Any] = BEATS if behind == "beat" else {}
    system = EventSystem(recording(), settings(DatabaseSettings.model_validate(given), **options))
    with pytest.raises(ConfigurationError, match="ALTER ROLE … SET synchronous_commit = 'on'"):
        await system.start()


@pytest.mark.parametrize("liveness", ["lock", "beat"])
async def test_only_a_worker_with_sessions_of_its_own_sets_anything_for_them(
    database: DatabaseSettings, liveness: str
) -> None:
    seen: list[str] = []

    class Watched(asyncpg.Connection):
        async def execute(self, query: str, *args: Any, **options: Any) -> str:
            seen.append(query)
            return await super().execute(query, *args, **options)

    given = database.model_copy(update={"connect_args": {"connection_class": Watched}})
    async with worker(recording(), given, liveness=liveness):
        pass
    assert bool([query for query in seen if "SET " in query]) == (liveness == "lock")
