"""What nobody means to do and somebody does: to the tables, to the server, and inside a handler."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

import pgebus.database
import pgebus.system
from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    LeaseLostError,
    Snooze,
    StateError,
    SystemState,
)
from pgebus._runtime import claiming, listening, maintenance, quarantine
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import downgrade, upgrade
from tests.conftest import Server
from tests.embedded import embedded
from tests.system.bus import Sql, delivery, finished, publish, running, settings
from tests.system.faults import backends, connected, tasks_of_ours
from tests.system.processes import Inquest
from tests.system.waiting import until


async def insert(sql: Sql, event_type: str, count: int = 1, key: str | None = None) -> list[int]:
    """Publish *count* events as a person with psql does; return their ids."""
    rows = await sql.fetch(
        "INSERT INTO pgebus.events (type, key) SELECT $1, $3 FROM generate_series(1, $2::integer) RETURNING id",
        event_type,
        count,
        key,
    )
    return [row["id"] for row in rows]


async def insert_suspects(sql: Sql, event_type: str, count: int) -> list[int]:
    """Publish events that look as if a worker had died with each of them in hand."""
    async with sql.transaction():
        ids = await insert(sql, event_type, count)
        await sql.execute("UPDATE pgebus.deliveries SET lost = 1 WHERE event_id = ANY ($1)", ids)
    return ids


async def insert_orphan(sql: Sql, event_type: str, worker_id: int) -> int:
    """Publish an event that a worker has claimed which is gone; return its id."""
    async with sql.transaction():
        (event_id,) = await insert(sql, event_type)
        await sql.execute(
            "UPDATE pgebus.deliveries SET status = 'running', worker_id = $2, claimed_at = now(), attempt = 1, "
            "claim_seq = 1 WHERE event_id = $1",
            event_id,
            worker_id,
        )
    return event_id


async def entered(event: asyncio.Event) -> None:
    """Wait for a handler, but not for ever."""
    async with asyncio.timeout(10):
        await event.wait()


class Gate:
    """A handler that says when it is in, and stays until it is let out."""

    def __init__(self, router: EventRouter, event_type: str, *, transactional: bool = False) -> None:
        self.inside = 0
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        router.on(event_type, name=f"gate-{event_type}", transactional=transactional)(self.stay)

    async def stay(self, ctx: EventContext, payload: dict[str, Any]) -> None:
        self.inside += 1
        self.entered.set()
        await self.opened.wait()


def on_quick(router: EventRouter, *, transactional: bool = False) -> None:
    """Add a handler that has nothing to do."""

    @router.on("quick", transactional=transactional)
    async def quick(ctx: EventContext, payload: dict[str, Any]) -> None:
        await asyncio.sleep(0)


# Slots


async def test_a_free_slot_is_refilled_at_once_while_all_others_are_busy(database: DatabaseSettings, sql: Sql) -> None:
    router = EventRouter()
    gate = Gate(router, "slow", transactional=True)
    on_quick(router, transactional=True)
    async with running(router, database, n_workers=5):
        await insert(sql, "slow", 4)

        async def all_inside() -> bool:
            return gate.inside == 4

        await until(all_inside)
        await finished(sql, *await insert(sql, "quick", 20), within=5)
        gate.opened.set()


async def test_a_last_attempt_is_never_held_ahead(database: DatabaseSettings, sql: Sql) -> None:
    """What a process holds when it dies has used up an attempt: with a single one, only what runs may be at stake."""
    router = EventRouter()
    peak = 0
    one_question_at_a_time = asyncio.Lock()

    @router.on("quick")
    async def count(ctx: EventContext, payload: dict[str, Any]) -> None:
        nonlocal peak
        async with one_question_at_a_time:
            peak = max(peak, await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'running'"))

    ids = await insert(sql, "quick", 60)
    async with connected(database) as other, running(router, database, n_workers=3, max_attempts=1):
        await finished(other, *ids)
    assert 1 <= peak <= 3


# Handlers


class _Exit(BaseException):
    """No `Exception`."""


async def _raise_base_exception(ctx: EventContext) -> None:
    raise _Exit("not an Exception")


async def _cancel_itself(ctx: EventContext) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def _claim_a_lost_lease(ctx: EventContext) -> None:
    raise LeaseLostError(event_id=ctx.event_id, group=ctx.group, claim_seq=ctx.claim_seq)


async def _delete_own_event(ctx: EventContext) -> None:
    assert ctx.session is not None
    await ctx.session.execute(text("DELETE FROM pgebus.events WHERE id = :id"), {"id": ctx.event_id})


async def _delete_own_delivery(ctx: EventContext) -> None:
    assert ctx.session is not None
    await ctx.session.execute(text("DELETE FROM pgebus.deliveries WHERE event_id = :id"), {"id": ctx.event_id})


@pytest.mark.parametrize(
    ("misbehave", "transactional", "recorded"),
    [
        (_raise_base_exception, False, "_Exit"),
        (_raise_base_exception, True, "_Exit"),
        (_cancel_itself, False, "CancelledError"),
        (_cancel_itself, True, "CancelledError"),
        (_claim_a_lost_lease, False, "LeaseLostError"),
        (_claim_a_lost_lease, True, "LeaseLostError"),
        (_delete_own_event, True, "LeaseLostError"),
        (_delete_own_delivery, True, "LeaseLostError"),
    ],
)
async def test_whatever_a_handler_does_is_a_counted_failure_and_ends_dead(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    misbehave: Any,
    transactional: bool,
    recorded: str,
) -> None:
    router = EventRouter()
    runs = 0

    @router.on("odd", transactional=transactional)
    async def odd(ctx: EventContext, payload: dict[str, Any]) -> None:
        nonlocal runs
        runs += 1
        await misbehave(ctx)

    on_quick(router)
    async with running(router, database, max_attempts=2):
        event_id = await publish(sm, "odd")
        await finished(sql, event_id, status="dead")
        await finished(sql, await publish(sm, "quick"))  # the worker goes on
    row = await delivery(sql, event_id)
    assert (runs, row["attempt"], row["lost"]) == (2, 2, 0)
    types = await sql.fetch("SELECT jsonb_path_query($1::jsonb, '$[*].type') #>> '{}' AS type", row["errors"])
    assert [each["type"].rpartition(".")[2] for each in types] == [recorded] * 2


async def test_a_handler_that_blocks_the_loop_for_long_keeps_the_workers_lock(
    database: DatabaseSettings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own deafness is not the connection's: no time that it was blocked counts against an answer."""
    router = EventRouter()
    asking, blocked, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @router.on("greedy")
    async def block(ctx: EventContext, payload: dict[str, Any]) -> None:
        asking.clear()
        await asking.wait()
        time.sleep(1.0)  # noqa: ASYNC251 - blocking the loop is what this handler is for
        blocked.set()

    beat = listening.Listener._beat

    async def told(self: listening.Listener, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        asking.set()
        await beat(self, raw)
        if blocked.is_set():
            answered.set()

    monkeypatch.setattr(listening.Listener, "_beat", told)
    monkeypatch.setattr(listening, "BEAT_SECONDS", 0.1)
    async with running(router, database) as system:
        before = await sql.fetchval("SELECT backend_pid FROM pgebus.workers")
        monkeypatch.setattr(listening, "ANSWER_SECONDS", 0.5)
        event_id = (await insert(sql, "greedy"))[0]
        await entered(answered)
        await finished(sql, event_id)
        assert await sql.fetchval("SELECT backend_pid FROM pgebus.workers") == before
        assert [loop.failures for loop in system.health().loops] == [0, 0, 0, 0, 0]


async def test_a_handler_may_take_another_role(database: DatabaseSettings, sql: Sql) -> None:
    if not await sql.fetchval("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"):
        pytest.skip("only a superuser may surely make a role and become it")
    role = f"pgebus_test_tenant_{os.getpid()}"
    router = EventRouter()

    @router.on("tenant.asked", transactional=True)
    async def become(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text(f"SET LOCAL ROLE {role}"))
        await ctx.session.execute(text("INSERT INTO tenants VALUES (current_user)"))

    await sql.execute(f"CREATE ROLE {role}; CREATE TABLE tenants (name text); GRANT INSERT ON tenants TO {role}")
    try:
        async with running(router, database, max_attempts=1):
            await finished(sql, *await insert(sql, "tenant.asked"))
        assert await sql.fetchval("SELECT name FROM tenants") == role
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


# Deliveries that a worker died with


async def test_one_suspect_does_not_stop_a_worker_whose_other_handler_runs_long(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(quarantine, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(quarantine, "RETRY_SECONDS", 2.0)
    router = EventRouter()
    gate = Gate(router, "slow")
    on_quick(router)
    async with running(router, database):
        slow = await publish(sm, "slow")
        await entered(gate.entered)
        (suspect,) = await insert_suspects(sql, "quick", 1)
        began = monotonic()
        for _ in range(20):  # one after another: some of them come while nothing is claimed
            await finished(sql, await publish(sm, "quick"))
        assert monotonic() - began < 8
        assert (await delivery(sql, suspect))["status"] == "pending"  # it would have started beside another
        gate.opened.set()
        await finished(sql, slow, suspect)


async def test_many_suspects_are_run_without_delay(database: DatabaseSettings, sql: Sql) -> None:
    router = EventRouter()
    on_quick(router)
    async with running(router, database):
        ids = await insert_suspects(sql, "quick", 200)
        await finished(sql, *ids, within=15)
    assert await sql.fetchval("SELECT sum(claim_seq) FROM pgebus.deliveries") <= 205


# Tables


async def test_a_running_delivery_whose_attempt_was_set_to_zero_can_be_put_off(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()
    arrived, edited = asyncio.Event(), asyncio.Event()

    @router.on("snoozed")
    async def snooze(ctx: EventContext, payload: dict[str, Any]) -> None:
        if not arrived.is_set():
            arrived.set()
            await edited.wait()
            raise Snooze(timedelta(milliseconds=50))

    on_quick(router)
    async with running(router, database) as system:
        event_id = await publish(sm, "snoozed")
        await entered(arrived)
        await sql.execute("UPDATE pgebus.deliveries SET attempt = 0 WHERE event_id = $1", event_id)
        edited.set()
        # An outcome that the table refuses would be given up, and the delivery found again ten seconds later.
        await finished(sql, event_id, await publish(sm, "quick"), within=5)
        assert system.health().held == 0


async def test_an_error_that_the_databases_encoding_cannot_hold_is_recorded_all_the_same(server: Server) -> None:
    name = f"pgebus_test_latin1_{os.getpid()}"
    await server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
    router = EventRouter()

    @router.on("foreign")
    async def fail(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise ValueError("日本語 it said")

    on_quick(router)
    database = server.settings(name)
    try:
        await asyncio.to_thread(upgrade, database)
        async with connected(database) as sql, running(router, database, max_attempts=1):
            (event_id,) = await insert(sql, "foreign")
            await finished(sql, event_id, status="dead")
            await finished(sql, *await insert(sql, "quick", 20))
            message = await sql.fetchval(
                "SELECT errors -> -1 ->> 'message' FROM pgebus.deliveries WHERE status = 'dead'"
            )
            assert message.endswith("it said")
    finally:
        await server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def test_truncated_events_take_their_deliveries_along_and_later_ones_are_delivered(
    database: DatabaseSettings, sql: Sql
) -> None:
    router = EventRouter()
    on_quick(router)
    async with running(router, database):
        before = await insert(sql, "quick", 10)
        await finished(sql, *before)
        await sql.execute("TRUNCATE pgebus.events RESTART IDENTITY")
        assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 0
        after = await insert(sql, "quick", 5)
        assert set(after) <= set(before)  # the same ids again
        await finished(sql, *after)


async def test_a_locked_row_that_waits_for_its_turn_does_not_keep_dead_workers_from_being_recovered(
    database: DatabaseSettings, sql: Sql, inquest: Inquest
) -> None:
    router = EventRouter()
    on_quick(router)
    (keyed,) = await insert(sql, "quick", key="k")
    await sql.execute("UPDATE pgebus.deliveries SET status = 'blocked' WHERE event_id = $1", keyed)
    async with connected(database) as psql:
        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("SELECT FROM pgebus.deliveries WHERE status = 'blocked' FOR UPDATE")
        async with running(router, database, recovery_grace_seconds=0.2):
            for worker_id in (4242, 4243):  # the second is left after the first round, which has met the locked row
                await finished(sql, await insert_orphan(sql, "quick", worker_id))
            assert (await delivery(sql, keyed))["status"] == "blocked"
            await transaction.rollback()
            await finished(sql, keyed)


async def test_a_locked_successor_does_not_hold_up_the_acknowledgement_of_others(
    database: DatabaseSettings, sql: Sql
) -> None:
    """And it is not passed over: what comes after it still waits for it."""
    router = EventRouter()
    gate = Gate(router, "gate")
    order: list[int] = []

    @router.on("keyed")
    async def note(ctx: EventContext, payload: dict[str, Any]) -> None:
        order.append(ctx.event_id)

    on_quick(router)
    async with connected(database) as psql, running(router, database) as system:
        (head,) = await insert(sql, "gate", key="k")
        await entered(gate.entered)
        successors = await insert(sql, "keyed", 2, key="k")
        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", successors[0])
        gate.opened.set()

        async def handed_over() -> bool:
            return system.health().running == 0

        await until(handed_over)
        await finished(sql, head, *await insert(sql, "quick", 30), within=5)
        assert order == []
        await transaction.rollback()
        await finished(sql, *successors, within=5)
    assert order == successors


@pytest.mark.parametrize("failing", [False, True])
async def test_a_locked_running_delivery_does_not_hold_up_the_acknowledgement_of_others(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, failing: bool
) -> None:
    router = EventRouter()
    arrived, locked = asyncio.Event(), asyncio.Event()

    @router.on("locked")
    async def wait(ctx: EventContext, payload: dict[str, Any]) -> None:
        arrived.set()
        await locked.wait()
        if failing and ctx.attempt == 1:
            raise ValueError("not this time")

    on_quick(router)
    async with connected(database) as psql, running(router, database) as system:
        event_id = await publish(sm, "locked")
        await entered(arrived)
        transaction = psql.transaction()
        await transaction.start()
        await psql.execute("SELECT FROM pgebus.deliveries WHERE status = 'running' FOR UPDATE")
        locked.set()

        async def handed_over() -> bool:
            return system.health().running == 0

        await until(handed_over)
        await finished(sql, *await insert(sql, "quick", 30), within=5)
        assert (await delivery(sql, event_id))["status"] == "running"
        await transaction.rollback()
        await finished(sql, event_id, within=5)


async def test_what_was_unhandled_is_adopted_under_a_backlog_that_never_ends(
    database: DatabaseSettings, sql: Sql
) -> None:
    router = EventRouter()

    @router.on("busy", name="busy")
    @router.on("known", name="known")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        await asyncio.sleep(0.02)

    (known,) = await insert(sql, "known")
    assert (await delivery(sql, known))["status"] == "unhandled"
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'default');"
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'default', 'busy')"
    )
    await insert(sql, "busy", 300)

    async def adopted() -> bool:
        if await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'pending'") < 200:
            await insert(sql, "busy", 200)
        return bool((await delivery(sql, known))["status"] == "completed")

    async with running(router, database, n_workers=2):
        await until(adopted)


async def test_a_worker_under_which_the_tables_are_made_anew_handles_events_again(
    database: DatabaseSettings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "SUBSCRIBE_SECONDS", 0.2)
    router = EventRouter()
    on_quick(router)
    async with running(router, database, poll_interval_seconds=0.5):
        await finished(sql, *await insert(sql, "quick"))
        await asyncio.to_thread(downgrade, database)
        await asyncio.to_thread(upgrade, database)
        at_once = await insert(sql, "quick", 3)
        later = await sql.fetchval(
            "INSERT INTO pgebus.events (type, run_at) VALUES ('quick', now() + interval '1 second') RETURNING id"
        )
        await finished(sql, *at_once, later, within=20)


async def test_a_database_that_is_read_only_by_default_is_written_all_the_same(
    database: DatabaseSettings, sql: Sql
) -> None:
    router = EventRouter()
    on_quick(router)

    @router.on("written", transactional=True)
    async def write(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO written VALUES (1)"))

    await sql.execute("CREATE TABLE written (n integer)")
    name = await sql.fetchval("SELECT quote_ident(current_database())")
    await sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with running(router, database, max_attempts=1):
        await finished(sql, *await insert(sql, "quick"), *await insert(sql, "written"))
    assert await sql.fetchval("SELECT count(*) FROM written") == 1


# The listener


async def test_what_is_published_while_the_listener_is_away_runs_when_it_is_due(
    database: DatabaseSettings, sql: Sql, another: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its notification went to nobody: the worker asks for the next due time when it listens again."""
    monkeypatch.setattr(claiming, "next_look", lambda _idle_for, poll_interval: poll_interval)
    router = EventRouter()
    on_quick(router)
    async with running(router, database, poll_interval_seconds=60) as system:

        async def idle() -> bool:
            return bool(await sql.fetchval("SELECT idle FROM pgebus.workers"))

        await until(idle)
        worker = await sql.fetchrow("SELECT id, backend_pid FROM pgebus.workers")
        assert worker is not None
        # Who has its lock keeps it away; who waits for it has it before the worker is back.
        lock = asyncio.create_task(another.fetchval("SELECT pg_advisory_lock($1)", worker["id"]))
        waits = "SELECT bool_or(NOT granted) FROM pg_locks WHERE pid = $1"
        await until(partial(sql.fetchval, waits, another.get_server_pid()))
        await sql.fetchval("SELECT pg_terminate_backend($1)", worker["backend_pid"])
        await asyncio.wait_for(lock, 10)

        async def away() -> bool:
            return not system.health().present

        await until(away)
        event_id = await sql.fetchval(
            "INSERT INTO pgebus.events (type, run_at) VALUES ('quick', now() + interval '1 second') RETURNING id"
        )
        await another.fetchval("SELECT pg_advisory_unlock($1)", worker["id"])
        await finished(sql, event_id, within=8)


# Starting and stopping


async def test_of_two_starts_at_once_one_is_refused_and_the_other_can_be_stopped(
    database: DatabaseSettings, sql: Sql
) -> None:
    system = EventSystem(EventRouter(), settings(database.model_copy(update={"application_name": "twice"})))
    results = await asyncio.gather(system.start(), system.start(), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StateError]
    assert system.health().state is SystemState.RUNNING
    await system.stop()
    assert system.health().state is SystemState.STOPPED
    assert not tasks_of_ours()

    async def gone() -> bool:
        return not await backends(sql, "twice")

    await until(gone)


async def test_an_impatient_stop_ends_the_wait_of_a_patient_one(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()
    gate = Gate(router, "slow")
    system = EventSystem(router, settings(database))
    await system.start()
    event_id = await publish(sm, "slow")
    await entered(gate.entered)
    patient = asyncio.create_task(system.stop(timeout=60))

    async def stopping() -> bool:
        return system.health().state is SystemState.STOPPING

    await until(stopping)
    async with asyncio.timeout(5):
        await system.stop(wait_for_completion=False)
        await patient
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"]) == ("pending", 0)


@pytest.fixture
async def frozen_server() -> AsyncIterator[EmbeddedPostgres]:
    """A server of the test's own, to be frozen."""
    server = embedded({"fsync": "off"})
    await asyncio.to_thread(server.start)
    yield server
    await asyncio.to_thread(server.stop)


async def test_stop_returns_when_the_server_has_frozen(
    frozen_server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen server answers nothing and closes nothing; each thing that is asked of it has its own bound."""
    monkeypatch.setattr(pgebus.database, "_CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(pgebus.system, "_LAST_WRITES_SECONDS", 0.3)
    monkeypatch.setattr(pgebus.system, "_CANCELLED_SECONDS", 0.3)
    database = DatabaseSettings.model_validate({"url": frozen_server.url(), "application_name": "frozen"})
    await asyncio.to_thread(upgrade, database)
    router = EventRouter()
    on_quick(router, transactional=True)
    system = EventSystem(router, settings(database))
    await system.start()
    async with connected(database) as sql:
        await finished(sql, *await insert(sql, "quick", 20))
        pids = await backends(sql, "frozen")
    assert pids
    stopped: asyncio.Task[None] | None = None
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        stopped = asyncio.create_task(system.stop(timeout=0.3))
        await asyncio.wait([stopped], timeout=10)
        assert stopped.done()
        assert system.health().state is SystemState.STOPPED
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        if stopped is not None:
            await asyncio.wait([stopped], timeout=10)
