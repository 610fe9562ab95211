"""The database goes away, loses an answer or is not what it should be: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random
from time import monotonic
from typing import Any, Literal

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import pgebus.system
from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    Group,
    SchemaMismatchError,
    publish_event,
)
from pgebus._runtime import faults, listening, transacting
from pgebus._runtime.store import Line
from pgebus.database import dispose, make_engine
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade
from tests.conftest import Server
from tests.embedded import embedded
from tests.roles import casting
from tests.system.bus import Sql, backfilled, delivery, finished, forgotten, publish, settings
from tests.system.faults import (
    EFFECTS,
    backends,
    connect,
    connected,
    effects,
    healthy,
    name_of,
    no_backend_of,
    no_longer,
    record,
    tasks_of_ours,
    worker,
)
from tests.system.proxy import Proxy
from tests.system.waiting import until

DEAF = {"poll_interval_seconds": 60.0}


@pytest.fixture(scope="module")
def durable() -> Iterator[EmbeddedPostgres]:
    """A server that may be restarted, and that keeps what it has confirmed."""
    with embedded() as postgres:
        yield postgres


_migrated: list[str] = []


@pytest.fixture
async def perishable(durable: EmbeddedPostgres) -> DatabaseSettings:
    """A migrated database on a server that may be restarted."""
    name = f"perishable_{len(_migrated)}"
    _migrated.append(name)
    async with connected(DatabaseSettings(url=SecretStr(durable.url()))) as sql:
        await sql.execute(f"CREATE DATABASE {name}")
    database = DatabaseSettings(url=SecretStr(durable.url(database=name)), connect_timeout_seconds=5.0)
    await asyncio.to_thread(upgrade, database)
    async with connected(database) as sql:
        await sql.execute(EFFECTS)
    return database


def both_kinds(*, keep: bool | None = None) -> tuple[EventRouter, Counter[int]]:
    """Return handlers that count: in a table, within the transaction, and in memory."""
    router, seen = EventRouter(group=Group("default", keep_history=keep)), Counter[int]()

    @router.on("order.placed", transactional=True)
    async def once(ctx: EventContext, payload: dict[str, Any]) -> None:
        await record(ctx, payload["number"])

    @router.on("order.checked")
    async def at_least_once(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen[payload["number"]] += 1

    return router, seen


class Publisher:
    """Publishes without pause and remembers what became of each transaction, as far as its client can tell."""

    def __init__(self, database: DatabaseSettings) -> None:
        self._manager = DatabaseSessionManager(database)
        self._number = 0
        self.ok: set[int] = set()
        self.failed: set[int] = set()
        self.unknown: set[int] = set()

    async def run(self) -> None:
        while True:
            self._number += 1
            await self._publish(self._number)
            await asyncio.sleep(0.002)  # a load, not a flood: a dead server refuses at once

    async def _publish(self, number: int) -> None:
        ledger = self.failed
        try:
            async with self._manager.session() as session:
                for event_type in ("order.placed", "order.checked"):
                    await publish_event(session, event_type, {"number": number}, "events")
                ledger = self.unknown
                await session.commit()
                ledger = self.ok
        except (DBAPIError, asyncpg.PostgresError, asyncpg.InternalClientError, OSError):
            # A refused or lost connection before COMMIT was sent is a failure, after it nobody knows.
            pass
        ledger.add(number)

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.unknown.add(self._number)
            await self._manager.close()

    async def more(self, count: int = 20) -> None:
        """Wait until so many more transactions were confirmed."""
        goal = len(self.ok) + count

        async def reached() -> bool:
            return len(self.ok) >= goal

        await until(reached, within=20.0)


async def all_finished(database: DatabaseSettings, within: float = 20.0) -> None:
    async with connected(database) as sql:

        async def none_left() -> bool:
            return not await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status <> 'completed'")

        await until(none_left, within)


async def nothing_lost_nothing_doubled(database: DatabaseSettings, publisher: Publisher, seen: Counter[int]) -> None:
    """Compare what the publisher knows with what is stored and with what was done."""
    async with connected(database) as sql:
        stored = Counter(
            row["number"] for row in await sql.fetch("SELECT (payload->>'number')::int AS number FROM pgebus.events")
        )
        done = await effects(sql)
    assert publisher.ok <= stored.keys()
    assert not publisher.failed - publisher.unknown & stored.keys()
    assert set(stored.values()) <= {2}
    assert done == dict.fromkeys(stored, 1)
    assert seen.keys() >= stored.keys()


Outage = Literal["immediate", "fast", "down for a while"]


@pytest.mark.parametrize("outage", ["immediate", "fast", "down for a while"])
async def test_a_system_outlives_a_restart_of_the_server(
    durable: EmbeddedPostgres, perishable: DatabaseSettings, outage: Outage
) -> None:
    """It goes on by itself; what was committed is handled, what was handled in a transaction was handled once."""
    router, seen = both_kinds()
    publisher = Publisher(perishable)
    async with worker(router, perishable, poll_interval_seconds=5.0) as system:
        async with publisher.publishing():
            await publisher.more()
            if outage == "down for a while":
                await asyncio.to_thread(durable.shut_down, "immediate")
                began = monotonic()
                await no_longer(system)

                async def long_enough() -> bool:
                    return monotonic() - began > 3.0

                await until(long_enough)
                assert not system.health().ok
                await asyncio.to_thread(durable.start_again)
            else:
                await asyncio.to_thread(durable.restart, outage)
            await publisher.more()
        await healthy(system)
        await all_finished(perishable)
        await healthy(system)  # a loop that slept through the restart learns of it later than the others
        assert next(loop.failures for loop in system.health().loops if loop.name == "listen") >= 1
        async with connected(perishable) as sql:  # the same worker, which recovered nothing of its own
            assert await sql.fetchval("SELECT count(*) FROM pgebus.workers") == 1
    await nothing_lost_nothing_doubled(perishable, publisher, seen)


async def test_a_system_outlives_the_loss_of_any_of_its_connections(database: DatabaseSettings, sql: Sql) -> None:
    """One after the other, whatever it was doing; then all at once."""
    await sql.execute(EFFECTS)
    router, seen = both_kinds()
    publisher = Publisher(database)
    async with worker(router, database, **DEAF) as system:
        async with publisher.publishing():
            await publisher.more()
            for pid in await backends(sql, name_of(system)):
                await sql.execute("SELECT pg_terminate_backend($1)", pid)
                await publisher.more(5)
            for _ in range(5):
                await sql.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1",
                    name_of(system),
                )
                await publisher.more(5)
        await healthy(system)
        await all_finished(database)
    await nothing_lost_nothing_doubled(database, publisher, seen)


async def test_a_handler_that_loses_its_connection_is_run_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    await sql.execute(EFFECTS)
    router, pids = EventRouter(), list[int]()
    entered, opened = asyncio.Event(), asyncio.Event()

    @router.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await record(ctx, 1)
        pids.append(await ctx.session.scalar(text("SELECT pg_backend_pid()")) or 0)
        if len(pids) == 1:
            entered.set()
            await opened.wait()
            await record(ctx, 2)

    async with worker(router, database, **DEAF):
        event_id = await publish(sm, "order.placed")
        await asyncio.wait_for(entered.wait(), 10)
        await sql.execute("SELECT pg_terminate_backend($1)", pids[0])
        opened.set()
        await finished(sql, event_id)
    row = await delivery(sql, event_id)
    assert (row["attempt"], row["lost"]) == (2, 0)
    assert await effects(sql) == {1: 1}


async def test_a_connection_that_is_lost_between_two_deliveries_is_not_the_next_one_s_fault(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Its transaction was begun in the message that ended the one before; only its first statement finds out."""
    await sql.execute(EFFECTS)
    router, runs = EventRouter(), list[tuple[int, int]]()

    @router.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        number, loses = payload["number"], payload["loses"]
        runs.append((number, ctx.attempt))
        if len([run for run in runs if run[0] == number]) <= loses:
            await _end_open_transactions(database)
        await record(ctx, number)

    async with worker(router, database, n_workers=1, **DEAF):
        async with sm.session() as session:
            for number, loses in enumerate([0] * 20 + [1, 0, 2, 0]):
                await publish_event(session, "order.placed", {"number": number, "loses": loses}, "events")
            await session.commit()

        async def all_done() -> bool:
            return len(await effects(sql)) == 24

        await until(all_done)
    assert [run for run in runs if run[0] == 20] == [(20, 1), (20, 1)]
    # What is lost again, in a transaction that was begun just before, may well be the handler's own doing.
    assert [run for run in runs if run[0] == 22] == [(22, 1), (22, 1), (22, 2)]
    assert set((await effects(sql)).values()) == {1}


async def _end_open_transactions(database: DatabaseSettings) -> None:
    """Terminate every backend in a transaction, and wait for its end."""
    mine = "FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    async with connected(database) as sql:
        await sql.execute(f"SELECT pg_terminate_backend(pid) {mine}")

        async def gone() -> bool:
            return not await sql.fetchval(f"SELECT count(*) {mine}")

        await until(gone)


async def test_a_handler_that_loses_its_connection_without_noticing_is_run_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The loss shows when its completion is written, which waits here for a lock."""
    await sql.execute(EFFECTS)
    router, pids = EventRouter(), list[int]()

    @router.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await record(ctx, 1)
        if not pids:
            await sql.execute("BEGIN")
            await sql.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", ctx.event_id)
        pids.append(await ctx.session.scalar(text("SELECT pg_backend_pid()")) or 0)

    async with worker(router, database, **DEAF):
        event_id = await publish(sm, "order.placed")
        async with connected(database) as other:

            async def waits() -> bool:
                return bool(
                    pids
                    and await other.fetchval(
                        "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1", pids[0]
                    )
                )

            await until(waits)
            await other.execute("SELECT pg_terminate_backend($1)", pids[0])
        await sql.execute("ROLLBACK")
        await finished(sql, event_id)
    assert len(pids) == 2
    assert await effects(sql) == {1: 1}


@pytest.fixture
async def proxy(database: DatabaseSettings) -> AsyncIterator[Proxy]:
    async with Proxy(database.sqlalchemy_url()) as proxy:
        yield proxy


def through(proxy: Proxy) -> DatabaseSettings:
    return DatabaseSettings(url=SecretStr(proxy.text_url()))


async def test_a_claim_whose_answer_is_lost_is_not_stuck(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    """What runs in a worker's name and is unknown to it goes back, uncounted."""
    router, seen = both_kinds()
    async with worker(router, through(proxy), **DEAF) as system:
        await healthy(system)
        event_id = await publish(sm, "order.checked", {"number": 0})
        await finished(sql, event_id)
        lost = proxy.cut_at(b"SKIP LOCKED", "after")
        event_ids = [await publish(sm, "order.checked", {"number": 1})]
        await asyncio.wait_for(lost.wait(), 10)
        event_ids.append(await publish(sm, "order.checked", {"number": 2}))
        await finished(sql, *event_ids, within=5.0)
        await healthy(system)
    assert seen == {0: 1, 1: 1, 2: 1}
    assert (await delivery(sql, event_ids[0]))["attempt"] == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["before", "after"])
async def test_a_completion_whose_answer_is_lost_is_written_once(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    proxy: Proxy,
    how: Literal["before", "after"],
    keep: bool,
) -> None:
    """The handler is not run again, whether or not the lost statement was executed."""
    router, seen = both_kinds(keep=keep)
    async with worker(router, through(proxy), **DEAF) as system:
        await backfilled(sql)
        lost = proxy.cut_at(b"SET status = 'completed'", how)
        event_ids = [await publish(sm, "order.checked", {"number": number}) for number in range(5)]
        await asyncio.wait_for(lost.wait(), 10)
        await (finished if keep else forgotten)(sql, *event_ids, within=5.0)

        async def nothing_held() -> bool:
            return system.health().held == 0

        await until(nothing_held)
        await healthy(system)
        failures = {loop.name: loop.failures for loop in system.health().loops}
        assert failures["acknowledge"] == 1
    assert seen == dict.fromkeys(range(5), 1)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["before", "after"])
async def test_a_commit_whose_answer_is_lost_has_its_effects_once(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    proxy: Proxy,
    how: Literal["before", "after"],
    keep: bool,
) -> None:
    """PostgreSQL decided: the handler runs again only if nothing was committed. A row that is gone says that it was."""
    await sql.execute(EFFECTS)
    router, _ = both_kinds(keep=keep)
    async with worker(router, through(proxy), **DEAF) as system:
        await backfilled(sql)
        lost = proxy.cut_at(b".complete(", how)
        event_id = await publish(sm, "order.placed", {"number": 1})
        await asyncio.wait_for(lost.wait(), 10)
        await (finished if keep else forgotten)(sql, event_id, within=5.0)

        async def nothing_held() -> bool:
            return system.health().held == 0

        await until(nothing_held)
        if keep:
            assert (await delivery(sql, event_id))["attempt"] == (1 if how == "after" else 2)
    assert await effects(sql) == {1: 1}


async def test_a_silent_claim_connection_is_given_up(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-open connection gives no error; no statement of ours is waited for without end."""
    assert Line.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Line.__init__.__kwdefaults__, "within", 0.5)
    router, seen = both_kinds()
    async with worker(router, through(proxy), **DEAF) as system:
        deaf = proxy.cut_at(b"SKIP LOCKED", "freeze")
        event_id = await publish(sm, "order.checked", {"number": 1})
        await asyncio.wait_for(deaf.wait(), 10)
        await finished(sql, event_id, within=5.0)
        await healthy(system)
        proxy.reset()  # for the server the silent connection is still there
        await healthy(system)
    assert seen == {1: 1}


async def test_a_connection_that_is_being_given_up_is_not_forgotten_when_that_is_cancelled(
    database: DatabaseSettings, proxy: Proxy
) -> None:
    """Until the garbage collector came, its place in the pool would be taken."""
    engine = make_engine(through(proxy), pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    line = Line(engine, within=0.2)
    await line.value("SELECT 1")
    proxy.freeze()
    task = asyncio.create_task(line.value("SELECT 1"))

    async def giving_up() -> bool:
        return line._raw is None

    await until(giving_up)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, TimeoutError)):
        await task
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool
    await dispose(engine)
    proxy.reset()  # for the server the silent connection is still there


@pytest.mark.parametrize("statement", [b"pg_catalog.version()", b"BEGIN ISOLATION LEVEL", b".complete("])
async def test_a_silent_handler_connection_gives_its_slot_back(
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    proxy: Proxy,
    statement: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the dispatcher sends by itself is not waited for without end, and the connection is not used again."""
    monkeypatch.setattr(transacting, "BEGIN_SECONDS", 0.5)
    monkeypatch.setattr(transacting, "COMMIT_SECONDS", 0.5)
    await sql.execute(EFFECTS)
    router, _ = both_kinds()
    async with worker(router, through(proxy), n_workers=1, **DEAF) as system:
        deaf = proxy.cut_at(statement, "freeze")
        event_id = await publish(sm, "order.placed", {"number": 1})
        await asyncio.wait_for(deaf.wait(), 10)
        if statement == b".complete(":
            # The server still holds what the transaction has locked, until it notices that the client is gone.
            async def given_up() -> bool:
                return system.health().running == 0

            await until(given_up)
            proxy.reset()
        await finished(sql, event_id)
        event_id = await publish(sm, "order.placed", {"number": 2})
        await finished(sql, event_id)
        proxy.reset()  # for the server the silent connection is still there
        await healthy(system)
    assert await effects(sql) == {1: 1, 2: 1}


async def test_a_schema_that_is_away_for_a_while_stops_nothing_for_good(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    await sql.execute(EFFECTS)
    router, seen = both_kinds()
    async with worker(router, database, poll_interval_seconds=0.5) as system:
        event_id = await publish(sm, "order.placed", {"number": 1})
        await finished(sql, event_id)
        await sql.execute("ALTER SCHEMA pgebus RENAME TO elsewhere")
        await no_longer(system)
        failures = sum(loop.failures for loop in system.health().loops)
        assert failures < 50
        await sql.execute("ALTER SCHEMA elsewhere RENAME TO pgebus")
        await healthy(system)
        event_ids = [await publish(sm, kind, {"number": 2}) for kind in ("order.placed", "order.checked")]
        await finished(sql, *event_ids)
    assert await effects(sql) == {1: 1, 2: 1}
    assert seen == {2: 1}


async def test_defaults_of_the_database_do_not_change_what_a_claim_is(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Claims run at READ COMMITTED, and are durable, whatever is set for the role or the database."""
    name = database.sqlalchemy_url().database
    for setting in ("default_transaction_isolation = 'serializable'", "synchronous_commit = off"):
        await sql.execute(f'ALTER DATABASE "{name}" SET {setting}')
    # What the statement itself runs under, noted by the server.
    await sql.execute(
        "CREATE TABLE claims (isolation text, durable text);"
        "CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.claims VALUES"
        " (current_setting('transaction_isolation'), current_setting('synchronous_commit')); RETURN NULL; END $$;"
        "CREATE TRIGGER note_claim AFTER UPDATE ON pgebus.deliveries FOR EACH ROW"
        " WHEN (NEW.status = 'running') EXECUTE FUNCTION note_claim()"
    )
    router, seen = both_kinds()
    async with worker(router, database, **DEAF) as system:
        for number in range(3):
            await finished(sql, await publish(sm, "order.checked", {"number": number}))
        assert system.health().ok
    rows = await sql.fetch("SELECT DISTINCT * FROM claims")
    assert [tuple(row) for row in rows] == [("read committed", "on")]
    assert seen == {0: 1, 1: 1, 2: 1}


async def test_connections_that_wait_are_not_ended_for_being_idle(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """A time-out for idle sessions, set for the role or the database, would end those whose work is to wait."""
    if sql.get_server_version().major < 14:
        pytest.skip("idle_session_timeout came with PostgreSQL 14")
    name = database.sqlalchemy_url().database
    await sql.execute(f"ALTER DATABASE \"{name}\" SET idle_session_timeout = '100ms'")
    router, seen = both_kinds()
    async with worker(router, database, **DEAF) as system:
        for _ in range(5):  # each of them is ended before the next one is made
            async with connected(database) as impatient:

                async def ended(connection: Sql = impatient) -> bool:
                    return connection.is_closed()

                await until(ended)
        await finished(sql, await publish(sm, "order.checked", {"number": 1}))
        assert {loop.name: loop.failures for loop in system.health().loops if loop.failures} == {}
    assert seen == {1: 1}


async def test_a_system_stops_while_the_server_is_down(
    durable: EmbeddedPostgres, perishable: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last writes are tried for a bounded time; what they were about is recovered by others."""
    monkeypatch.setattr(pgebus.system, "_LAST_WRITES_SECONDS", 0.5)
    router, entered = EventRouter(), asyncio.Event()

    @router.on("order.placed", transactional=True)
    async def wait_for_ever(ctx: EventContext, payload: dict[str, Any]) -> None:
        await record(ctx, 1)
        entered.set()
        await asyncio.Event().wait()

    system = EventSystem(router, settings(perishable, **DEAF))
    await system.start()
    async with DatabaseSessionManager(perishable) as sm:
        await publish(sm, "order.placed")
    await asyncio.wait_for(entered.wait(), 10)
    await asyncio.to_thread(durable.shut_down, "immediate")
    try:
        await no_longer(system)
        await asyncio.wait_for(system.stop(timeout=0.1), 15)
        assert not tasks_of_ours()
    finally:
        await asyncio.to_thread(durable.start_again)
    async with connected(perishable) as sql:
        assert await effects(sql) == {}
        assert await sql.fetchval("SELECT status FROM pgebus.deliveries") == "running"  # for its recoverer


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_any_faults_in_any_order_lose_and_double_nothing(
    database: DatabaseSettings, sql: Sql, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Ten seconds of lost, silent and refused connections for two workers, then both recover by themselves."""
    assert Line.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Line.__init__.__kwdefaults__, "within", 0.5)
    for module, name in (
        (transacting, "BEGIN_SECONDS"),
        (transacting, "COMMIT_SECONDS"),
        (listening, "BEAT_SECONDS"),
        (listening, "ANSWER_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.5)
    await sql.execute(EFFECTS)
    router, seen = both_kinds()
    publisher, random = Publisher(database), Random(seed)
    many: dict[str, Any] = {"max_attempts": 1000, "n_workers": 20, **DEAF}
    async with worker(router, through(proxy), **many) as first, worker(router, database, **many) as second:
        async with publisher.publishing():
            end = monotonic() + 10.0
            while monotonic() < end:
                await publisher.more(random.randint(1, 20))
                match random.choice(["reset", "freeze", "pg_terminate_backend", "pg_cancel_backend", "refuse", "cut"]):
                    case "reset":
                        proxy.reset()
                    case "freeze":
                        proxy.freeze()
                    case "refuse":
                        proxy.refusing = True
                        proxy.reset()
                        await publisher.more(random.randint(1, 50))
                        proxy.refusing = False
                    case "cut":
                        needles = [b"SKIP LOCKED", b".complete(", b"'completed'", b"BEGIN", b"advisory", b"SET idle"]
                        hows: list[Literal["before", "after", "freeze"]] = ["before", "after", "freeze"]
                        proxy.cut_at(random.choice(needles), random.choice(hows))
                    case function:
                        for pid in await backends(sql, name_of(random.choice([first, second]))):
                            if random.random() < 0.5:
                                await sql.execute(f"SELECT {function}($1)", pid)
        proxy.heal()
        await healthy(first)
        await healthy(second)
        await all_finished(database)
    await nothing_lost_nothing_doubled(database, publisher, seen)


async def refused(database: DatabaseSettings) -> BaseException:
    """Start a system that cannot start; nothing may be left of it. Return what it raised."""
    system = EventSystem(both_kinds()[0], settings(database.model_copy(update={"application_name": "refused"})))
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the caller looks at it
        await asyncio.wait_for(system.start(), 20)
    assert not tasks_of_ours()
    await system.stop()  # harmless
    return raised.value


async def test_a_database_without_the_tables_is_refused(empty_database: DatabaseSettings) -> None:
    error = await refused(empty_database)
    assert isinstance(error, SchemaMismatchError)
    assert error.found is None
    assert "upgrade" in str(error)
    await no_backend_of(empty_database, "refused")


@pytest.mark.parametrize("version", [0, 99])
async def test_tables_of_another_release_are_refused(database: DatabaseSettings, sql: Sql, version: int) -> None:
    await sql.execute(
        f"CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql AS 'SELECT {version}'"
    )
    error = await refused(database)
    assert isinstance(error, SchemaMismatchError)
    assert error.found == version
    await no_backend_of(database, "refused")


async def test_a_database_that_is_not_there_is_refused(
    server: Server, database: DatabaseSettings, proxy: Proxy
) -> None:
    error = await refused(server.settings("no_such_database"))
    assert isinstance(error, (asyncpg.InvalidCatalogNameError, DBAPIError))
    proxy.refusing = True
    error = await refused(through(proxy))
    assert isinstance(error, (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError))
    closed = proxy.url.set(host="/nonexistent/socket/directory", port=None)
    error = await refused(DatabaseSettings(host="/nonexistent/socket/directory", user="u", database=closed.database))
    assert isinstance(error, OSError)
    await no_backend_of(database, "refused")


async def test_a_wrong_password_is_refused(perishable: DatabaseSettings) -> None:
    async with connected(perishable) as sql:
        await sql.execute("CREATE ROLE somebody LOGIN PASSWORD 'the right one'")
        file = await sql.fetchval("SHOW hba_file")
        await sql.execute(
            f"COPY (VALUES ('local all somebody scram-sha-256'), ('local all all trust')) TO '{file}'; "
            "SELECT pg_reload_conf()"
        )
        parts = perishable.sqlalchemy_url()
        given = DatabaseSettings(
            host=str(parts.query["host"]), user="somebody", password=SecretStr("the wrong one"), database=parts.database
        )

        async def asks_for_it() -> bool:
            try:
                (await connect(given)).terminate()
            except asyncpg.InvalidPasswordError:
                return True
            return False

        await until(asks_for_it)  # the server reads the file in its own time
        error = await refused(given)
        assert faults.sqlstate(error) == "28P01"
        assert "the wrong one" not in str(error)
        await no_backend_of(perishable, "refused")


@pytest.mark.parametrize(
    ("refuse", "allow", "why"),
    [
        ("ROLE {login} CONNECTION LIMIT 0", "ROLE {login} CONNECTION LIMIT -1", "too many connections"),
        ("ROLE {login} NOLOGIN", "ROLE {login} LOGIN", "not permitted to log in"),
        (
            'DATABASE "{database}" ALLOW_CONNECTIONS false',
            'DATABASE "{database}" ALLOW_CONNECTIONS true',
            "not currently accepting connections",
        ),
    ],
    ids=["too many connections", "no login", "no database"],
)
async def test_a_server_that_lets_nobody_in_is_asked_ever_more_rarely(
    database: DatabaseSettings, sql: Sql, server: Server, refuse: str, allow: str, why: str
) -> None:
    """It may be over in a moment, or have no end: the system is not well, goes on trying, and does not flood."""
    await sql.execute(EFFECTS)
    router, _ = both_kinds()
    async with casting(sql, database) as cast:
        await cast.grant()
        given = await cast.login(cast.roles.worker)
        await sql.execute(f"GRANT ALL ON effects TO {cast.logins[0]}")
        names = {"login": cast.logins[0], "database": database.sqlalchemy_url().database}
        async with DatabaseSessionManager(database) as sm, worker(router, given, **DEAF) as system:
            await finished(sql, await publish(sm, "order.placed", {"number": 1}))
            await server.execute(f"ALTER {refuse.format(**names)}")
            event_id = await publish(sm, "order.placed", {"number": 2})  # its session was there before
            began = monotonic()
            await sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name_of(system)
            )

            async def tried() -> bool:
                loops = {loop.name: loop for loop in system.health().loops}
                assert all(loop.failures < 12 for loop in loops.values()), loops
                return loops["listen"].failures >= 7 and why in (loops["listen"].last_error or "")

            await until(tried, within=30.0)
            assert monotonic() - began > 0.7  # at least half of 0.05, 0.1, 0.2, 0.4 and 0.8
            assert not system.health().ready
            assert system.health().alive
            await server.execute(f"ALTER {allow.format(**names)}")
            await healthy(system)
            await finished(sql, event_id)
    assert await effects(sql) == {1: 1, 2: 1}


async def test_a_listener_that_cannot_connect_is_refused(database: DatabaseSettings, proxy: Proxy) -> None:
    proxy.refusing = True
    given = database.model_dump(exclude_unset=True, by_alias=True)
    error = await refused(DatabaseSettings.model_validate({**given, "listen_url": proxy.text_url()}))
    assert isinstance(error, (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError))
    await no_backend_of(database, "refused")
