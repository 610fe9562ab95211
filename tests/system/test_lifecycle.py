"""Starting and stopping: whatever the order and the moment, nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, NoReturn

import pytest

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    SchemaMismatchError,
    StateError,
    SystemState,
)
from pgebus._runtime.maintenance import Maintenance
from pgebus.models import SCHEMA_VERSION
from tests.system.bus import Sql, delivery, finished, publish, rounds, running, settings
from tests.system.waiting import until


@pytest.fixture(autouse=True)
async def nothing_is_left(sql: Sql) -> AsyncIterator[None]:
    """No task, no connection of a worker, no lock, no open transaction."""
    before = asyncio.all_tasks()
    yield
    left = {task.get_name() for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    assert not {name for name in left if name.startswith("pgebus")}, left

    async def no_locks() -> bool:
        return not await sql.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

    await until(no_locks)


def waiting_router(started: asyncio.Event, gate: asyncio.Event) -> EventRouter:
    router = EventRouter()

    @router.on("slow")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        started.set()
        await gate.wait()

    return router


async def test_start_returns_when_events_are_handled_and_stop_when_nothing_runs(
    database: DatabaseSettings, sql: Sql
) -> None:
    system = EventSystem(EventRouter(), settings(database))
    assert system.health().state is SystemState.NEW
    await system.start()
    health = system.health()
    assert health.ok
    assert (health.state, health.present, health.running, health.held) == (SystemState.RUNNING, True, 0, 0)
    worker = await sql.fetchrow("SELECT * FROM pgebus.workers")
    assert worker is not None
    assert worker["ended_at"] is None
    assert worker["version"]
    await system.stop()
    assert system.health().state is SystemState.STOPPED
    assert not system.health().ok
    assert await sql.fetchval("SELECT ended_at IS NOT NULL AND NOT idle FROM pgebus.workers")


async def test_a_system_has_one_life(database: DatabaseSettings) -> None:
    system = EventSystem(EventRouter(), settings(database))
    await system.start()
    with pytest.raises(StateError, match="already running"):
        await system.start()
    with pytest.raises(StateError, match="already running"):
        await system.run()
    await system.stop()
    with pytest.raises(StateError, match="has been stopped"):
        await system.start()


async def test_stop_is_harmless_before_start_and_when_repeated(database: DatabaseSettings) -> None:
    unstarted = EventSystem(EventRouter(), settings(database))
    await unstarted.stop()
    await unstarted.stop()
    with pytest.raises(StateError, match="has been stopped"):
        await unstarted.start()
    system = EventSystem(EventRouter(), settings(database))
    await system.start()
    await asyncio.gather(system.stop(), system.stop(), system.stop(wait_for_completion=False))
    await system.stop()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("-inf")])
async def test_a_timeout_that_is_none_is_refused(database: DatabaseSettings, seconds: float) -> None:
    system = EventSystem(EventRouter(), settings(database))
    with pytest.raises(ValueError, match="timeout"):
        await system.stop(timeout=seconds)


async def test_stop_waits_for_handlers_and_claims_nothing_more(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    started, gate = asyncio.Event(), asyncio.Event()
    system = EventSystem(waiting_router(started, gate), settings(database, n_workers=1))
    await system.start()
    first = await publish(sm, "slow")
    await asyncio.wait_for(started.wait(), 10)
    stopping = asyncio.ensure_future(system.stop())

    async def is_stopping() -> bool:
        return system.health().state is SystemState.STOPPING

    await until(is_stopping)
    second = await publish(sm, "slow")
    gate.set()
    await stopping
    assert (await delivery(sql, first))["status"] == "completed"
    assert (await delivery(sql, second))["status"] == "pending"
    assert (await delivery(sql, second))["claim_seq"] == 0


async def test_whoever_stops_keeps_its_deliveries_until_its_handlers_have_ended(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """To the others it lives as long as its handlers run, however long that is."""
    started, gate = asyncio.Event(), asyncio.Event()
    impatient = settings(database, recovery_grace_seconds=0.5)
    stopping = EventSystem(waiting_router(started, gate), impatient)
    await stopping.start()
    event_id = await publish(sm, "slow")
    await asyncio.wait_for(started.wait(), 10)
    async with EventSystem(waiting_router(asyncio.Event(), gate), impatient):
        await rounds(sql)  # the other one has seen that it is alive
        end = asyncio.ensure_future(stopping.stop())
        await rounds(sql, 5)
        row = await delivery(sql, event_id)
        gate.set()
        await end
        assert (row["status"], row["claim_seq"], row["lost"]) == ("running", 1, 0)
        await finished(sql, event_id)
    assert (await delivery(sql, event_id))["claim_seq"] == 1


async def test_handlers_that_outlast_the_timeout_are_cancelled_and_released_uncounted(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    started, gate = asyncio.Event(), asyncio.Event()
    async with running(waiting_router(started, gate), database) as system:
        event_id = await publish(sm, "slow")
        await asyncio.wait_for(started.wait(), 10)
        await system.stop(timeout=0.05)
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"], row["claim_seq"], row["lost"]) == ("pending", 0, 1, 0)


async def test_a_second_stop_can_lose_patience(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    started, gate = asyncio.Event(), asyncio.Event()
    async with running(waiting_router(started, gate), database) as system:
        event_id = await publish(sm, "slow")
        await asyncio.wait_for(started.wait(), 10)
        patient = asyncio.ensure_future(system.stop(timeout=3600))

        async def is_stopping() -> bool:
            return system.health().state is SystemState.STOPPING

        await until(is_stopping)
        await asyncio.wait_for(system.stop(wait_for_completion=False), 10)
        await patient
    assert (await delivery(sql, event_id))["status"] == "pending"


async def test_a_handler_that_ignores_its_cancellation_keeps_its_lease_until_the_process_ends(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still runs, so nobody else may be given the delivery by this worker; the others count it as lost."""
    monkeypatch.setattr("pgebus.system._CANCELLED_SECONDS", 0.05)
    started, gate = asyncio.Event(), asyncio.Event()
    router = EventRouter()

    @router.on("stubborn")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        started.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    async with running(router, database) as system:
        event_id = await publish(sm, "stubborn")
        await asyncio.wait_for(started.wait(), 10)
        await asyncio.wait_for(system.stop(wait_for_completion=False), 10)
    assert (await delivery(sql, event_id))["status"] == "running"
    gate.set()

    async def handler_ended() -> bool:
        return system.health().running == 0

    await until(handler_ended)


async def test_a_handler_may_stop_the_system(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    router = EventRouter()
    system = EventSystem(router, settings(database))

    @router.on("last")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await system.stop()

    await system.start()
    event_id = await publish(sm, "last")

    async def stopped() -> bool:
        return system.health().state is SystemState.STOPPED

    await until(stopped)
    await system.stop()
    assert (await delivery(sql, event_id))["status"] == "completed"


async def test_wait_ends_with_the_system(database: DatabaseSettings) -> None:
    """However often it is asked; before the start there is nothing to wait for, and a cancelled wait stops nothing."""
    system = EventSystem(EventRouter(), settings(database))
    await system.wait()
    await system.start()
    waiting = [asyncio.create_task(system.wait()) for _ in range(3)]
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert system.health().state is SystemState.RUNNING
    await system.stop()
    await asyncio.gather(*waiting[1:])
    await system.wait()


async def test_wait_raises_what_has_ended_the_system(
    database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = asyncio.Event()

    async def fail(_: object) -> NoReturn:
        await failing.wait()
        raise ZeroDivisionError

    monkeypatch.setattr(Maintenance, "run", fail)
    system = EventSystem(EventRouter(), settings(database))
    await system.start()
    failing.set()
    with pytest.raises(ZeroDivisionError):
        await system.wait()
    with pytest.raises(ZeroDivisionError):
        await system.stop()


async def test_a_system_serves_the_groups_that_it_is_told(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Instead of those of the settings; the others' deliveries wait."""
    router = EventRouter()

    @router.on("x", group="one")
    @router.on("x", group="two")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    system = EventSystem(router, settings(database, groups=["one"]))
    for wrong in ([], ["three"], ["two", ""]):
        with pytest.raises(ConfigurationError):
            system.serve(*wrong)
    system.serve("two")
    assert system.settings.event_system.groups == ("two",)
    async with system:
        with pytest.raises(StateError):
            system.serve("one")
        event_id = await publish(sm, "x")

        async def handled() -> bool:
            rows = await sql.fetch("SELECT consumer_group, status FROM pgebus.deliveries WHERE event_id = $1", event_id)
            return dict(map(tuple, rows)) == {"one": "pending", "two": "completed"}

        await until(handled)


async def test_run_ends_when_it_is_cancelled_and_gives_back_what_it_held(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    started, gate = asyncio.Event(), asyncio.Event()
    system = EventSystem(waiting_router(started, gate), settings(database))
    task = asyncio.create_task(system.run())
    event_id = await publish(sm, "slow")
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await delivery(sql, event_id))["status"] == "pending"
    assert system.health().state is SystemState.STOPPED


async def test_a_start_that_is_cancelled_leaves_nothing(database: DatabaseSettings) -> None:
    for patience in (0.0, 0.005, 0.02, 0.05):
        system = EventSystem(EventRouter(), settings(database))
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await system.start()
        await system.stop()


async def test_a_missing_or_foreign_schema_is_refused_with_the_command_to_run(
    database: DatabaseSettings, empty_database: DatabaseSettings, sql: Sql
) -> None:
    with pytest.raises(SchemaMismatchError, match="pgebus migrate") as missing:
        await EventSystem(EventRouter(), settings(empty_database)).start()
    assert (missing.value.found, missing.value.schema) == (None, "pgebus")
    for version in (0, SCHEMA_VERSION + 2):
        await sql.execute(
            "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE "
            f"AS 'SELECT {version}'"
        )
        with pytest.raises(SchemaMismatchError) as other:
            await EventSystem(EventRouter(), settings(database)).start()
        assert other.value.found == version
    assert await sql.fetchval("SELECT count(*) FROM pgebus.workers") == 0


async def test_a_database_that_is_not_there_fails_the_start(database: DatabaseSettings) -> None:
    nowhere = DatabaseSettings(host="/nonexistent", user="nobody", database="nothing")
    system = EventSystem(EventRouter(), settings(nowhere))
    with pytest.raises(OSError, match=r"."):
        await system.start()
    await system.stop()


async def test_a_bug_in_a_loop_ends_the_system_loudly(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Never silently: the error is logged as critical, health is red, stop() raises it, leases go back."""
    started, gate = asyncio.Event(), asyncio.Event()
    system = EventSystem(waiting_router(started, gate), settings(database))
    await system.start()
    event_id = await publish(sm, "slow")
    await asyncio.wait_for(started.wait(), 10)

    async def broken(self: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pgebus._runtime.maintenance.Maintenance._recover", broken)

    async def reported() -> bool:
        return any(record.levelno == logging.CRITICAL for record in caplog.records)

    await until(reported)
    assert system.health().state is SystemState.STOPPED
    assert not system.health().ok
    with pytest.raises(ZeroDivisionError):
        await system.stop()
    await system.stop()
    assert (await delivery(sql, event_id))["status"] == "pending"


async def test_starting_and_stopping_many_times_leaks_nothing(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    for _ in range(8):
        event_id = await publish(sm, "order.placed")
        async with running(router, database):
            await finished(sql, event_id)

    async def alone() -> bool:
        return bool(
            await sql.fetchval(
                "SELECT count(*) <= 2 FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend'"
            )
        )

    await until(alone)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.workers WHERE ended_at IS NULL") == 0


@pytest.mark.parametrize("wrong", [None, object(), "router"])
async def test_wrong_arguments_are_refused_at_once(database: DatabaseSettings, wrong: Any) -> None:
    with pytest.raises(TypeError, match="EventRouter"):
        EventSystem(wrong, settings(database))
    with pytest.raises(TypeError, match="Settings"):
        EventSystem(EventRouter(), wrong)
