"""Health is red while nothing can be claimed, says why, and is green again by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import asyncpg
import pytest
from pydantic import SecretStr

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, EventSystem, SystemState
from pgebus._runtime import listening, maintenance, pulse
from pgebus._runtime.maintenance import Maintenance
from pgebus._runtime.store import Line
from pgebus.embedded import EmbeddedPostgres
from pgebus.health import liveness, readiness
from pgebus.migrations import upgrade
from tests.embedded import embedded
from tests.roles import casting
from tests.system.bus import Sql, finished, publish, rounds, running, settings
from tests.system.faults import connected, healthy, no_longer, worker
from tests.system.proxy import Proxy
from tests.system.waiting import until

# Nothing is found by polling.
DEAF = {"poll_interval_seconds": 60.0}


@pytest.fixture
async def proxy(database: DatabaseSettings) -> AsyncIterator[Proxy]:
    async with Proxy(database.sqlalchemy_url()) as proxy:
        yield proxy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, brisk: None) -> None:
    """A tenth of the times; what they are, and that ten seconds are enough, is tested in tests/unit/test_health.py."""
    assert Line.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Line.__init__.__kwdefaults__, "within", 1.5)
    monkeypatch.setattr(listening, "BEAT_SECONDS", 0.4)
    monkeypatch.setattr(listening, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(pulse, "PATIENCE_SECONDS", 0.7)
    monkeypatch.setattr(maintenance, "ASK_SECONDS", 0.5)


def nothing() -> EventRouter:
    router = EventRouter()

    @router.on("order.placed")
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        pass

    return router


def through(proxy: Proxy) -> DatabaseSettings:
    return DatabaseSettings(url=SecretStr(proxy.text_url()), connect_timeout_seconds=1.0)


def said(system: EventSystem) -> str:
    return " ".join(system.health().reasons)


async def says(system: EventSystem, *words: str, within: float = 10.0) -> None:
    """Wait until one of the reasons holds all *words*."""

    async def check() -> bool:
        return any(all(word in reason for word in words) for reason in system.health().reasons)

    try:
        await until(check, within)
    except AssertionError:
        raise AssertionError(f"{words} are not in {system.health()}") from None


async def test_a_network_that_swallows_everything(
    quick: None, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    """No connection gives an error, and new ones are never answered."""
    async with worker(nothing(), through(proxy), **DEAF) as system:
        proxy.silent = True
        proxy.freeze()
        await no_longer(system, within=5.0)
        await says(system, "does not see this worker")
        assert system.health().alive
        proxy.heal()
        await healthy(system)
        assert system.health().reasons == ()
        await finished(sql, await publish(sm, "order.placed"))


async def test_a_deaf_listener(quick: None, database: DatabaseSettings, proxy: Proxy) -> None:
    """Everything else works; no more than the wake-ups and the proof of life are missing."""
    given = database.model_dump(exclude_unset=True, by_alias=True)
    listens = DatabaseSettings.model_validate({**given, "listen_url": proxy.text_url()})
    async with worker(nothing(), listens, **DEAF) as system:
        proxy.silent = True
        proxy.freeze()
        await no_longer(system, within=5.0)
        await says(system, "listen loop", "does not answer")
        assert (liveness(system)[0], readiness(system)[0]) == (200, 503)
        assert [loop.name for loop in system.health().loops if not loop.ok] == ["listen"]
        proxy.heal()
        await healthy(system)
        assert readiness(system)[0] == 200


@pytest.mark.parametrize(
    ("statement", "name"),
    [(b'EXISTS (SELECT FROM "pgebus".deliveries d JOIN', "claim"), (b"'completed'", "acknowledge")],
)
async def test_one_connection_that_does_not_answer(
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    sm: DatabaseSessionManager,
    sql: Sql,
    proxy: Proxy,
    statement: bytes,
    name: str,
) -> None:
    """It is noticed while the answer is still waited for, and before the connection is given up."""
    assert Line.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Line.__init__.__kwdefaults__, "within", 15.0)
    async with worker(nothing(), through(proxy), **DEAF) as system:
        deaf = proxy.cut_at(statement, "freeze")
        event_id = await publish(sm, "order.placed")
        await asyncio.wait_for(deaf.wait(), 10)
        await says(system, f"{name} loop has been waiting for PostgreSQL")
        loops = {loop.name: loop for loop in system.health().loops}
        assert (loops[name].failures, loops[name].ok) == (0, False)
        proxy.reset()
        await healthy(system)
        await finished(sql, event_id)


async def test_a_role_that_lost_its_rights(quick: None, database: DatabaseSettings, sql: Sql) -> None:
    """Also while there is nothing to do, and nothing has failed yet."""
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker)
        async with running(nothing(), login, **DEAF) as system:
            for table, right in (("deliveries", "UPDATE"), ("workers", "INSERT")):
                await rounds(sql)
                role = '"' + cast.roles.worker.replace('"', '""') + '"'
                await sql.execute(f"REVOKE {right} ON pgebus.{table} FROM {role}")
                await says(system, f"{right} on {table}")
                await sql.execute(f"GRANT {right} ON pgebus.{table} TO {role}")
                await healthy(system)


async def test_a_role_that_may_not_connect_any_more(quick: None, database: DatabaseSettings, sql: Sql) -> None:
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker)
        name = cast.logins[0]
        async with running(nothing(), login, **DEAF) as system:
            await sql.execute(f"ALTER ROLE {name} NOLOGIN")
            await sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", name)
            await says(system, "listen loop fails", "not permitted to log in")
            await sql.execute(f"ALTER ROLE {name} LOGIN")
            await healthy(system)


async def test_row_level_security_that_was_switched_on(quick: None, database: DatabaseSettings, sql: Sql) -> None:
    """Without a policy the queue looks empty from then on, and nothing fails."""
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker)
        async with running(nothing(), login, **DEAF) as system:
            await sql.execute("ALTER TABLE pgebus.deliveries ENABLE ROW LEVEL SECURITY")
            await says(system, "Row-level security hides every row of deliveries")
            await sql.execute("ALTER TABLE pgebus.deliveries DISABLE ROW LEVEL SECURITY")
            await healthy(system)


async def test_a_table_that_is_gone(quick: None, database: DatabaseSettings, sql: Sql) -> None:
    async with worker(nothing(), database, **DEAF) as system:
        await sql.execute("ALTER TABLE pgebus.deliveries RENAME TO elsewhere")
        await says(system, "loop fails", "deliveries")
        await sql.execute("ALTER TABLE pgebus.elsewhere RENAME TO deliveries")
        await healthy(system)


async def test_nothing_to_do_is_nothing_wrong(
    quick: None, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Neither an empty queue, nor a paused group with a full one, nor a handler that takes its time."""
    router, entered, opened = nothing(), asyncio.Event(), asyncio.Event()

    @router.on("stock.counted", group="slow")
    async def wait(ctx: EventContext, payload: dict[str, Any]) -> None:
        entered.set()
        await opened.wait()

    async with worker(router, database, n_workers=1, **DEAF) as system:
        await publish(sm, "stock.counted")
        await asyncio.wait_for(entered.wait(), 10)
        await sql.execute("UPDATE pgebus.consumer_groups SET paused_at = now() WHERE consumer_group = 'default'")
        await publish(sm, "order.placed")
        for _ in range(20):
            await rounds(sql, 1)
            assert (system.health().reasons, system.health().ready) == ((), True)
        ages = {loop.name: loop.worked_seconds_ago for loop in system.health().loops}
        assert all(age is not None and age < 5 for name, age in ages.items() if name not in ("acknowledge", "schedule"))
        opened.set()


async def test_a_loop_that_keeps_failing_is_named(
    quick: None, database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> NoReturn:
        raise asyncpg.TooManyConnectionsError("too many of us")

    async with worker(nothing(), database, **DEAF) as system:
        with monkeypatch.context() as patched:
            patched.setattr(Maintenance, "_round", fail)

            async def warned() -> bool:
                (warning,) = system.health().warnings or ("",)
                return "maintain loop fails" in warning and "TooManyConnectionsError: too many of us" in warning

            await until(warned)
            assert system.health().ready  # events are handled all the same

        async def well() -> bool:
            return not system.health().warnings

        await until(well)


async def test_a_loop_with_a_bug_ends_the_system_and_is_named(
    database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch, brisk: None
) -> None:
    """Then a new process is what helps."""

    async def fail(_: object) -> NoReturn:
        raise KeyError("a bug")

    system = EventSystem(nothing(), settings(database))
    await system.start()
    monkeypatch.setattr(Maintenance, "_round", fail)

    async def ended() -> bool:
        return system.health().state is SystemState.STOPPED

    await until(ended)
    assert not system.health().alive
    assert "The system has ended." in said(system)
    assert "maintain loop fails" in said(system)
    with pytest.raises(KeyError):
        await system.stop()


async def test_another_thread_sees_a_blocked_event_loop(
    database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch, sm: DatabaseSessionManager
) -> None:
    """Health needs no event loop, so a watchdog may ask while a handler blocks it."""
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 0.5)
    router, seen = EventRouter(), list[str]()

    def watch(system: EventSystem) -> None:
        while not any("blocks the event loop" in reason for reason in system.health().reasons):
            pass
        seen.append("blocked")

    @router.on("order.placed")
    async def block(ctx: EventContext, payload: dict[str, Any]) -> None:
        thread = Thread(target=watch, args=(system,), daemon=True)
        thread.start()
        thread.join(10)
        done.set()

    done = asyncio.Event()
    async with running(router, database, **DEAF) as system:
        await publish(sm, "order.placed")
        await asyncio.wait_for(done.wait(), 15)
    assert seen == ["blocked"]


@pytest.fixture
def mortal() -> Iterator[EmbeddedPostgres]:
    with embedded() as postgres:
        yield postgres


async def test_a_server_that_comes_back_as_a_standby(quick: None, mortal: EmbeddedPostgres) -> None:
    """It answers, and refuses every write: as an old primary does after a failover. Then it is promoted."""
    database = DatabaseSettings(url=SecretStr(mortal.url()), connect_timeout_seconds=1.0)
    await asyncio.to_thread(upgrade, database)
    async with running(nothing(), database, **DEAF) as system:
        await asyncio.to_thread(mortal.shut_down, "fast")
        await no_longer(system)
        assert system.health().alive
        (Path(mortal.host) / "data" / "standby.signal").touch()
        await asyncio.to_thread(mortal.start_again)
        await says(system, "The server is a standby")
        async with connected(database) as sql:
            assert await sql.fetchval("SELECT pg_is_in_recovery()")
            assert not system.health().ready
            assert await sql.fetchval("SELECT pg_promote()")
        await healthy(system)
        async with DatabaseSessionManager(database) as sm, connected(database) as sql:
            await finished(sql, await publish(sm, "order.placed"))
