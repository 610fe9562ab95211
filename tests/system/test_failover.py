"""A primary that is lost, and those that still lead to it: what was acknowledged stays, and everybody moves on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

import pgebus.system
from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    SessionStateError,
    publish_events,
)
from pgebus._runtime import transacting
from pgebus._runtime.faults import sqlstate
from pgebus._runtime.store import Line
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade
from tests.system.bus import Sql, finished, publish, running, settings
from tests.system.faults import EFFECTS, connected, effects, healthy, name_of, no_longer, record, tasks_of_ours, worker
from tests.system.proxy import Proxy
from tests.system.standby import Standby, primary_and_standby, reaching
from tests.system.test_database_faults import Publisher, all_finished, both_kinds, nothing_lost_nothing_doubled
from tests.system.waiting import until

Pair = tuple[EmbeddedPostgres, Standby]
DEAF = {"poll_interval_seconds": 60.0}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A primary and a standby that nobody promotes."""
    with primary_and_standby() as both:
        yield both


def on(server: EmbeddedPostgres, name: str) -> DatabaseSettings:
    return DatabaseSettings(url=SecretStr(server.url(database=name)), connect_timeout_seconds=5.0)


async def made(primary: EmbeddedPostgres, standby: EmbeddedPostgres, name: str) -> DatabaseSettings:
    """Make a migrated database on both."""
    async with connected(on(primary, "postgres")) as sql:
        await sql.execute(f"CREATE DATABASE {name}")
    await asyncio.to_thread(upgrade, on(primary, name))
    async with connected(on(primary, name)) as sql:
        await sql.execute(EFFECTS)
        await caught_up(sql)
    return on(primary, name)


async def set_on(server: EmbeddedPostgres, setting: str, value: str) -> None:
    """Change a setting of a running server, and wait until it has."""
    async with connected(on(server, "postgres")) as sql:
        await sql.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
        await sql.execute("SELECT pg_reload_conf()")

        async def read() -> bool:
            return bool(await sql.fetchval(f"SHOW {setting}") == value)

        await until(read)


async def synchronous(primary: EmbeddedPostgres) -> None:
    """Let commits wait for the standby from now on."""
    await set_on(primary, "synchronous_standby_names", "standby")
    async with connected(on(primary, "postgres")) as sql:
        await until(lambda: sql.fetchval("SELECT bool_or(sync_state = 'sync') FROM pg_stat_replication"))


async def caught_up(sql: Sql) -> None:
    """Wait until the standby has all that the primary has."""

    async def replayed() -> bool:
        return bool(
            await sql.fetchval(
                "SELECT bool_and(replay_lsn >= pg_current_wal_lsn()) FROM pg_stat_replication"
                " WHERE application_name = 'standby'"
            )
        )

    await until(replayed)


LEDGER = """
SELECT o.number, d.status, (SELECT count(*) FROM effects x WHERE x.number = o.number)
FROM orders o FULL JOIN pgebus.events e ON (e.payload->>'number')::int = o.number
LEFT JOIN pgebus.deliveries d ON d.event_id = e.id ORDER BY o.number"""


async def with_an_order(sql: Sql, number: int, *, later: bool = False) -> int:
    """Write an order and publish its event in one transaction; return the event's id."""
    async with sql.transaction():
        await sql.execute("CREATE TABLE IF NOT EXISTS orders (number integer NOT NULL)")
        await sql.execute("INSERT INTO orders VALUES ($1)", number)
        event_id: int = await sql.fetchval(
            "INSERT INTO pgebus.events (type, payload, run_at)"
            " VALUES ('order.placed', jsonb_build_object('number', $1::int), now() + make_interval(hours => $2))"
            " RETURNING id",
            number,
            int(later),
        )
        return event_id


@pytest.mark.slow
@pytest.mark.parametrize("run", range(2))
async def test_a_failover_to_a_synchronous_standby_loses_and_doubles_nothing(run: int) -> None:
    """Workers and publishers know both servers, and find the one that may be written."""
    with primary_and_standby() as (primary, standby):
        await made(primary, standby, "app")
        await synchronous(primary)
        both = reaching(primary, standby, name="app")
        router, seen = both_kinds()
        publisher = Publisher(both)
        async with worker(router, both) as one, worker(router, both, liveness="beat") as other:
            async with publisher.publishing():
                await publisher.more(100)
                await asyncio.to_thread(primary.shut_down, "immediate")
                await no_longer(one)
                await no_longer(other)
                await asyncio.to_thread(standby.promote)
                promoted = monotonic()
                await publisher.more(1)
                await healthy(one)
                await healthy(other)
                took = monotonic() - promoted
                await publisher.more(100)
            await all_finished(both)
            assert took < 15.0
        await nothing_lost_nothing_doubled(both, publisher, seen)


async def test_what_an_asynchronous_standby_had_not_got_is_lost_as_a_whole() -> None:
    """The last seconds of the primary: an event goes with what was written beside it, an effect with its completion."""
    router, _ = both_kinds()
    with primary_and_standby() as (primary, standby):
        database = await made(primary, standby, "app")
        async with connected(database) as sql, running(router, database) as system:
            await finished(sql, await with_an_order(sql, 1))
            waiting = await with_an_order(sql, 2, later=True)
            await caught_up(sql)
            await set_on(standby, "primary_conninfo", "")  # it gets nothing any more
            await sql.execute("UPDATE pgebus.events SET run_at = now() WHERE id = $1", waiting)
            await sql.execute("UPDATE pgebus.deliveries SET due_at = now() WHERE event_id = $1", waiting)
            await finished(sql, waiting)
            await finished(sql, await with_an_order(sql, 3))
            assert await effects(sql) == {1: 1, 2: 1, 3: 1}
            await asyncio.to_thread(primary.shut_down, "immediate")
            await no_longer(system)
        await asyncio.to_thread(standby.promote)
        database = on(standby, "app")
        async with connected(database) as sql, running(router, database):
            assert [tuple(row) for row in await sql.fetch(LEDGER)] == [(1, "completed", 1), (2, "pending", 0)]
            await sql.execute("UPDATE pgebus.deliveries SET due_at = now() WHERE event_id = $1", waiting)
            await finished(sql, waiting)
            again = await with_an_order(sql, 4)
            await finished(sql, again)
            assert [tuple(row) for row in await sql.fetch(LEDGER)] == [
                (1, "completed", 1),
                (2, "completed", 1),
                (4, "completed", 1),
            ]


@pytest.mark.parametrize("count", [1, 1_000])
async def test_a_pool_that_leads_to_a_standby_leaves_it(pair: Pair, count: int) -> None:
    """Its connections work, so nothing but a refused write tells that they lead to the wrong server."""
    primary, standby = pair
    name = f"publishing_{count}"  # many are copied
    database = await made(primary, standby, name)
    async with Proxy(make_url(standby.url(database=name))) as proxy:
        pinned = DatabaseSettings(url=SecretStr(proxy.text_url()), pool_size=1, max_overflow=0)
        async with DatabaseSessionManager(pinned) as manager:

            async def attempt() -> None:
                async with manager.session() as session:
                    await publish_events(session, [{"type": "order.placed", "payload": {}} for _ in range(count)])
                    await session.commit()

            for _ in range(2):  # also when it leads to the same one again
                with pytest.raises((SessionStateError, DBAPIError)) as refused:
                    await attempt()
                assert sqlstate(refused.value) == "25006"
            proxy.lead_to(database.sqlalchemy_url())
            await attempt()
            assert len(proxy) == 1


async def test_a_deliberate_read_only_transaction_costs_no_connection(pair: Pair) -> None:
    primary, standby = pair
    database = await made(primary, standby, "reading")
    async with DatabaseSessionManager(database) as manager:
        pids = set()
        for _ in range(3):
            async with manager.session() as session:
                pids.add(await session.scalar(text("SELECT pg_backend_pid()")))
                await session.execute(text("SET TRANSACTION READ ONLY"))
                with pytest.raises(DBAPIError):
                    await session.execute(text("INSERT INTO effects VALUES (1, 1, '')"))
        assert len(pids) == 1


async def test_a_slot_that_leads_to_a_standby_leaves_it(pair: Pair) -> None:
    """Its other connections still lead to the primary, so that it claims, and could never handle what it claimed."""
    primary, standby = pair
    database = await made(primary, standby, "slots")
    router, pids = EventRouter(), list[int]()

    @router.on("order.checked")
    async def check(ctx: EventContext, payload: dict[str, Any]) -> None: ...

    @router.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        pids.append(await ctx.session.scalar(text("SELECT pg_backend_pid()")) or 0)
        await record(ctx, payload["number"])

    async with (
        connected(database) as sql,
        Proxy(database.sqlalchemy_url()) as proxy,
        DatabaseSessionManager(database) as manager,
        worker(router, DatabaseSettings(url=SecretStr(proxy.text_url())), n_workers=1, **DEAF) as system,
    ):
        for event_type in ("order.checked", "order.placed"):  # so that each of its connections is made
            await finished(sql, await publish(manager, event_type, {"number": 1}))
        proxy.lead_to(make_url(standby.url(database="slots")))
        await sql.execute("SELECT pg_terminate_backend($1)", pids[0])
        event_id = await publish(manager, "order.placed", {"number": 2})

        async def refused() -> bool:
            question = "SELECT errors::text LIKE '%recovery%' FROM pgebus.deliveries WHERE event_id = $1"
            return bool(await sql.fetchval(question, event_id))

        await until(refused)
        proxy.lead_to(database.sqlalchemy_url())
        await finished(sql, event_id)
        assert (await sql.fetchval("SELECT attempt FROM pgebus.deliveries WHERE event_id = $1", event_id)) == 1
        assert await effects(sql) == {1: 1, 2: 1}
        assert system.health().ok


@pytest.mark.parametrize("liveness", ["lock", "beat"])
async def test_a_worker_that_leads_to_a_standby_is_red_and_leaves_it(pair: Pair, liveness: str) -> None:
    primary, standby = pair
    database = await made(primary, standby, f"workers_{liveness}")
    router, _ = both_kinds()
    name = f"workers_{liveness}"
    async with (
        connected(database) as sql,
        Proxy(database.sqlalchemy_url()) as proxy,
        DatabaseSessionManager(database) as manager,
        worker(router, DatabaseSettings(url=SecretStr(proxy.text_url())), liveness=liveness, **DEAF) as system,
    ):
        await finished(sql, await publish(manager, "order.placed", {"number": 1}))
        proxy.lead_to(make_url(standby.url(database=name)))
        proxy.reset()
        await no_longer(system, within=10.0)
        event_id = await publish(manager, "order.placed", {"number": 2})

        async def refused() -> bool:
            return any("read-only" in (loop.last_error or "") for loop in system.health().loops)

        await until(refused)
        assert not system.health().ok
        proxy.lead_to(database.sqlalchemy_url())  # the connections that are there lead to the standby still
        await healthy(system, within=15.0)
        await finished(sql, event_id, within=15.0)
        assert await effects(sql) == {1: 1, 2: 1}


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = $1"
INSERT = "INSERT INTO pgebus.events (type, payload) VALUES ($1, jsonb_build_object('number', $2::int))"


@asynccontextmanager
async def without_its_standby(router: EventRouter) -> AsyncIterator[tuple[EventSystem, Sql, Standby]]:
    """Run a worker on a primary whose synchronous standby has just gone; the connection does not wait for it."""
    with primary_and_standby() as (primary, standby):
        database = await made(primary, standby, "app")
        await synchronous(primary)
        async with connected(database) as sql:
            await sql.execute("SET synchronous_commit = local")
            system = EventSystem(router, settings(database, **DEAF))
            async with system:
                await sql.execute(INSERT, "order.placed", 0)
                await sql.execute(INSERT, "order.checked", 0)
                await all_finished(database)
                await asyncio.to_thread(standby.shut_down)
                yield system, sql, standby


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a worker give up after half a second what it gives up after 15 or 60."""
    assert Line.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Line.__init__.__kwdefaults__, "within", 0.5)
    monkeypatch.setattr(transacting, "COMMIT_SECONDS", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("event_type", ["order.placed", "order.checked"])
async def test_without_its_synchronous_standby_commits_wait_and_nothing_piles_up(
    impatient: None, event_type: str
) -> None:
    """What was not answered in time is given up on the server, too; when the standby is back, all goes on."""
    router, seen = both_kinds()
    async with without_its_standby(router) as (system, sql, standby):
        name = name_of(system)
        most = 0
        for number in range(1, 9):
            await sql.execute(INSERT, event_type, number)
            began = monotonic()

            async def a_second_later(began: float = began) -> bool:
                return monotonic() - began > 1.0

            await until(a_second_later)
            most = max(most, await sql.fetchval(WAITING, name))
        assert sum(loop.failures for loop in system.health().loops) >= 4
        assert 1 <= most <= 4  # three lines and a slot, at the worst
        await asyncio.to_thread(standby.start_again)
        await until(lambda: sql.fetchval("SELECT bool_and(status = 'completed') FROM pgebus.deliveries"), within=60)
        await healthy(system, within=30)
        if event_type == "order.placed":
            assert await effects(sql) == dict.fromkeys(range(9), 1)
        else:
            assert seen.keys() == set(range(9))


@pytest.mark.slow
async def test_a_system_stops_without_its_synchronous_standby(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last writes are tried for a bounded time; what they were about is recovered by others."""
    monkeypatch.setattr(pgebus.system, "_LAST_WRITES_SECONDS", 0.5)
    async with without_its_standby(both_kinds()[0]) as (system, sql, _):
        await sql.execute(INSERT, "order.placed", 1)
        await until(lambda: sql.fetchval(WAITING, name_of(system)))
        await asyncio.wait_for(system.stop(timeout=0.1), 10)
        assert not tasks_of_ours()
