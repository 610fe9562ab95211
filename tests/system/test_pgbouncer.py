"""A real PgBouncer in transaction mode between publishers, workers and PostgreSQL, and what its operators do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings, EventRouter, EventSystem, SessionlessConnectionError
from pgebus._runtime import listening
from tests.system.bus import Sql, finished, publish, settings
from tests.system.conftest import Spawn
from tests.system.faults import EFFECTS, effects, healthy, tasks_of_ours
from tests.system.pgbouncer import UNPREPARED, PgBouncer
from tests.system.processes import Inquest, rescuing
from tests.system.test_beating import BEATS
from tests.system.test_database_faults import Publisher, all_finished, both_kinds, nothing_lost_nothing_doubled
from tests.system.test_listener import asleep
from tests.system.waiting import until
from tests.system.worker_process import work

DEAF = {"poll_interval_seconds": 60.0}
# Of the names of the connections to the server, all are PgBouncer's.
SERVER_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1"


@pytest.fixture
async def pooler(database: DatabaseSettings) -> AsyncIterator[PgBouncer]:
    async with PgBouncer(database.sqlalchemy_url()) as pooler:
        yield pooler


def through(pooler: PgBouncer, **given: Any) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"url": pooler.text_url(), "connect_args": UNPREPARED, **given})


@asynccontextmanager
async def worker(router: EventRouter, database: DatabaseSettings, **event_system: Any) -> AsyncIterator[EventSystem]:
    """Run a system inside the block; its server connections are PgBouncer's, and outlive it."""
    others = tasks_of_ours()
    async with EventSystem(router, settings(database, **event_system)) as system:
        yield system
    assert not {task for task in tasks_of_ours() - others if not task.done()}


async def test_publishers_and_beating_workers_share_few_server_connections(
    pooler: PgBouncer, database: DatabaseSettings, sql: Sql
) -> None:
    """A slot holds a server connection only while it is in a transaction: four of them serve 28 clients."""
    await sql.execute(EFFECTS)
    router, seen = both_kinds()
    publisher = Publisher(through(pooler))
    given = DatabaseSettings.model_validate({"url": pooler.text_url()})  # a worker knows what to do about statements
    async with worker(router, given, **BEATS, n_workers=10), worker(router, given, **BEATS, n_workers=10) as second:
        async with publisher.publishing():
            await publisher.more(100)
        await all_finished(database)
        assert second.health().ok
        assert await sql.fetchval(SERVER_CONNECTIONS, sql.get_server_pid()) <= 4
        assert {loop.failures for loop in second.health().loops} == {0}
    await nothing_lost_nothing_doubled(database, publisher, seen)


async def test_a_worker_that_listens_beside_it_is_woken(
    pooler: PgBouncer, database: DatabaseSettings, sql: Sql
) -> None:
    await sql.execute(EFFECTS)
    router, _ = both_kinds()
    direct = database.sqlalchemy_url().render_as_string(hide_password=False)
    async with (
        worker(router, through(pooler, listen_url=direct), **DEAF) as system,
        DatabaseSessionManager(through(pooler)) as manager,
    ):
        await asleep(sql)
        await finished(sql, *[await publish(manager, "order.placed", {"number": number}) for number in range(20)])
        assert system.health().ok
    assert await effects(sql) == dict.fromkeys(range(20), 1)


async def test_listening_through_it_is_refused_with_both_ways_out(
    pooler: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "ANSWER_SECONDS", 0.5)
    system = EventSystem(both_kinds()[0], settings(through(pooler)))
    with pytest.raises(SessionlessConnectionError, match=r"listen_url.*event_system\.liveness"):
        await system.start()


@pytest.mark.slow
async def test_what_a_killed_beating_worker_held_is_recovered_within_twenty_seconds(
    pooler: PgBouncer, database: DatabaseSettings, sql: Sql, spawn: Spawn, patient_inquest: Inquest
) -> None:
    """With default settings: fifteen seconds for the beat, two for the grace, and the looks."""
    child = spawn(work, through=pooler.text_url(), event_system={"liveness": "beat"})
    await child.says("ready")
    async with DatabaseSessionManager(through(pooler)) as manager:
        event_id = await publish(manager, "job.gated")
    await child.says("inside")

    async def witnessed() -> bool:
        worker_id = await sql.fetchval("SELECT id FROM pgebus.workers WHERE pid = $1", child.pid)
        return worker_id in patient_inquest.witnessed

    async with rescuing(database):
        await until(witnessed)
        await child.killed()
        died = monotonic()
        await finished(sql, event_id, within=30)
        assert 13.0 < monotonic() - died < 20.0
    assert [row[0] for row in await sql.fetch("SELECT event_id FROM effects")] == [event_id]


Trouble = Callable[[PgBouncer, Publisher], Awaitable[None]]


async def pause(pooler: PgBouncer, publisher: Publisher) -> None:
    await pooler.command("PAUSE")
    began = monotonic()

    async def long_enough() -> bool:
        return monotonic() - began > 1.0

    await until(long_enough)
    await pooler.command("RESUME")


async def reconnect(pooler: PgBouncer, publisher: Publisher) -> None:
    await pooler.command("RECONNECT")


async def kill_clients(pooler: PgBouncer, publisher: Publisher) -> None:
    database = pooler.url.database
    await pooler.command(f"KILL {database}")
    await pooler.command(f"RESUME {database}")


async def kill_process(pooler: PgBouncer, publisher: Publisher) -> None:
    await pooler.kill()
    await pooler.start()


@pytest.mark.parametrize(
    "trouble",
    [kill_process, *(pytest.param(each, marks=pytest.mark.slow) for each in (pause, reconnect, kill_clients))],
)
async def test_what_its_operators_do_to_it_loses_and_doubles_nothing(
    pooler: PgBouncer, database: DatabaseSettings, sql: Sql, trouble: Trouble
) -> None:
    await sql.execute(EFFECTS)
    router, seen = both_kinds()
    publisher = Publisher(through(pooler))
    direct = database.sqlalchemy_url().render_as_string(hide_password=False)
    async with (
        worker(router, through(pooler), **BEATS) as beating,
        worker(router, through(pooler, listen_url=direct)) as listening_directly,
    ):
        async with publisher.publishing():
            for _ in range(3):
                await publisher.more(20)
                await trouble(pooler, publisher)
            await publisher.more(20)
        await healthy(beating)
        await healthy(listening_directly)
        await all_finished(database)
        assert await sql.fetchval("SELECT count(*) FROM pgebus.workers") == 2  # nobody was given up
    await nothing_lost_nothing_doubled(database, publisher, seen)
