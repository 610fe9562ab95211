from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from tests.embedded import embedded
from tests.sweeps.stepping import cancelled_at
from tests.system.proxy import Proxy

from pgebus.database import DatabaseSessionManager, make_engine
from pgebus.errors import StateError
from pgebus.settings import DatabaseSettings

CANARY = "c4nary-s3cret"
NASTY = "@:/?#% &+=[]{}\\ ' \" ü€😀 %40 ;--"


def changed(settings: DatabaseSettings, **values: Any) -> DatabaseSettings:
    return DatabaseSettings.model_validate({**settings.model_dump(exclude_unset=True), **values})


def parts(settings: DatabaseSettings, **values: Any) -> DatabaseSettings:
    """The same database, by parts instead of the URL."""
    url = settings.sqlalchemy_url()
    query_host, query_port = url.query.get("host"), url.query.get("port")
    named = {
        "host": query_host or url.host,
        "port": query_port or url.port,
        "user": url.username,
        "password": url.password,
        "database": url.database,
    }
    return DatabaseSettings.model_validate({**named, **values})


@pytest.fixture
async def manager(empty_database: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    manager = DatabaseSessionManager(empty_database)
    yield manager
    await manager.close()


@pytest.fixture
async def table(empty_database: DatabaseSettings) -> AsyncIterator[Table]:
    """A table of the models' schema, in the real schema that the settings name."""
    engine = make_engine(empty_database)
    async with engine.begin() as connection:
        await connection.execute(text('CREATE SCHEMA "we""ird"'))
        await connection.execute(text('CREATE TABLE "we""ird".t (n int)'))
    yield Table("t", MetaData(), Column("n", Integer), schema="pgebus")
    await engine.dispose()


def leaked() -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    return caught


OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


async def backends_become(settings: DatabaseSettings, expected: int) -> None:
    """Wait until the database has *expected* other connections: a backend ends a little after its socket."""
    url = settings.sqlalchemy_url().set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    async with asyncio.timeout(10):
        while await connection.fetchval(OTHERS) != expected:
            pass
    await connection.close()


# --- sessions


async def test_a_session_commits_only_when_it_is_told(manager: DatabaseSessionManager, table: Table) -> None:
    async with manager.session() as session:
        await session.execute(text('INSERT INTO "we""ird".t VALUES (1)'))
        await session.commit()
        await session.execute(text('INSERT INTO "we""ird".t VALUES (2)'))
    async with manager.session() as session:
        assert (await session.scalars(text('SELECT n FROM "we""ird".t'))).all() == [1]


async def test_a_session_works_again_after_its_block(empty_database: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(empty_database)
    async with manager.session() as session:
        assert await session.scalar(select(1)) == 1
    assert await session.scalar(text("SELECT 2")) == 2
    await session.commit()
    assert await session.scalar(text("SELECT 3")) == 3
    await manager.close()
    await backends_become(empty_database, 0)
    del session, manager
    assert leaked() == []


async def test_a_session_that_is_used_again_and_left_open_is_rolled_back_by_close(
    empty_database: DatabaseSettings, table: Table
) -> None:
    manager = DatabaseSessionManager(empty_database)
    sessions = [manager.session() for _ in range(3)]
    for session in sessions:
        async with session:
            pass
        await session.execute(text('INSERT INTO "we""ird".t VALUES (1)'))
    await manager.close()
    await backends_become(empty_database, 1)  # the table's own
    async with DatabaseSessionManager(empty_database) as other, other.session() as session:
        assert (await session.scalars(text('SELECT n FROM "we""ird".t'))).all() == []
    del session, sessions
    assert leaked() == []


async def test_objects_stay_readable_after_a_commit(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        assert session.sync_session.expire_on_commit is False


async def test_nothing_connects_before_the_first_use(empty_database: DatabaseSettings) -> None:
    nowhere = DatabaseSettings(host="/nowhere")
    async with DatabaseSessionManager(nowhere) as manager:
        manager.session()
    await DatabaseSessionManager(nowhere).close()


async def test_close_may_be_repeated(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(select(1))
    await manager.close()
    await manager.close()


@pytest.mark.parametrize("used", [True, False])
async def test_a_closed_manager_gives_out_nothing(empty_database: DatabaseSettings, used: bool) -> None:
    manager = DatabaseSessionManager(empty_database)
    if used:
        assert isinstance(manager.session(), AsyncSession)
    await manager.close()
    with pytest.raises(StateError):
        manager.session()
    with pytest.raises(StateError):
        _ = manager.engine


async def test_a_session_cannot_connect_after_its_manager_was_closed(
    empty_database: DatabaseSettings,
) -> None:
    manager = DatabaseSessionManager(empty_database)
    async with manager.session() as session:
        await session.execute(select(1))
    await manager.close()
    with pytest.raises(StateError):
        await session.execute(select(1))
    await backends_become(empty_database, 0)


async def test_close_cancels_what_still_runs(empty_database: DatabaseSettings, server: Any) -> None:
    manager = DatabaseSessionManager(empty_database)
    blocker = await server.connect(empty_database.sqlalchemy_url().database)
    await blocker.execute("SELECT pg_advisory_lock(1)")
    idle, busy = manager.session(), manager.session()
    await idle.execute(select(1))
    await busy.execute(select(1))
    task = asyncio.create_task(busy.execute(text("SELECT pg_advisory_lock(1)")))
    async with asyncio.timeout(10):
        while not await blocker.fetchval("SELECT bool_or(NOT granted) FROM pg_locks WHERE locktype = 'advisory'"):
            pass
    await manager.close()
    await backends_become(empty_database, 1)  # the blocker
    with pytest.raises(DBAPIError):
        await task
    await busy.close()
    await blocker.close()
    del idle, busy, task
    assert leaked() == []


async def test_a_connection_that_comes_back_after_close_is_closed(empty_database: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(empty_database)
    async with manager.engine.connect() as connection:
        await connection.execute(select(1))
        await manager.close()
        await backends_become(empty_database, 1)
    await backends_become(empty_database, 0)
    assert leaked() == []


async def three_in_the_pool(manager: DatabaseSessionManager) -> list[Any]:
    """Have three connections lie in the pool; return the driver's."""
    async with AsyncExitStack() as stack:
        lent = [await stack.enter_async_context(manager.engine.connect()) for _ in range(3)]
        raw = [await connection.get_raw_connection() for connection in lent]
        return [each.driver_connection for each in raw]


async def test_a_close_that_is_cancelled_leaves_no_connection_open(empty_database: DatabaseSettings) -> None:
    """Nobody would close the rest of the pool later."""
    for number in range(1, 20):
        manager = DatabaseSessionManager(empty_database)
        connections = await three_in_the_pool(manager)
        count = await cancelled_at(number, manager.close)
        assert [connection.is_closed() for connection in connections] == [True] * 3
        if count < number:
            break
    assert number > 1
    assert leaked() == []


async def test_close_gives_up_all_that_a_frozen_server_does_not_let_go(
    empty_database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgebus.database._CLOSE_SECONDS", 0.2)
    async with Proxy(empty_database.sqlalchemy_url()) as proxy:
        manager = DatabaseSessionManager(changed(empty_database, url=proxy.text_url()))
        connections = await three_in_the_pool(manager)
        proxy.freeze()
        await manager.close()
        assert [connection.is_closed() for connection in connections] == [True] * 3
        proxy.reset()  # for the server they are still there
    await backends_become(empty_database, 0)
    assert leaked() == []


# --- the engine


async def test_the_server_sees_the_settings(empty_database: DatabaseSettings) -> None:
    settings = changed(
        empty_database,
        application_name="shop",
        connect_args={"server_settings": {"statement_timeout": "1234"}},
    )
    engine = make_engine(settings, connect_args={"server_settings": {"lock_timeout": "77"}})
    async with engine.connect() as connection:
        shown = [
            await connection.scalar(text(f"SHOW {name}"))
            for name in ("application_name", "statement_timeout", "lock_timeout")
        ]
    await engine.dispose()
    assert shown == ["shop", "1234ms", "77ms"]
    assert settings.connect_args == {"server_settings": {"statement_timeout": "1234"}}


async def test_another_url_and_other_options_go_before_the_settings(empty_database: DatabaseSettings) -> None:
    engine = make_engine(
        DatabaseSettings(host="/nowhere"), url=empty_database.sqlalchemy_url(), pool_size=1, max_overflow=0
    )
    async with engine.connect() as connection:
        assert await connection.scalar(select(1)) == 1
    assert engine.pool.size() == 1  # type: ignore[attr-defined]  # of QueuePool
    await engine.dispose()


async def test_a_pool_without_a_size_is_possible(empty_database: DatabaseSettings) -> None:
    engine = make_engine(empty_database, poolclass=NullPool)
    async with engine.connect() as connection:
        assert await connection.scalar(select(1)) == 1
    await backends_become(empty_database, 0)
    await engine.dispose()


async def test_another_schema_is_put_in_place_of_the_models_own(empty_database: DatabaseSettings, table: Table) -> None:
    settings = changed(empty_database, schema='we"ird')
    async with DatabaseSessionManager(settings) as manager, manager.session() as session:
        await session.execute(insert(table).values(n=7))
        assert (await session.scalars(select(table.c.n))).all() == [7]
        await session.commit()
        assert (await session.scalars(text('SELECT n FROM "we""ird".t'))).all() == [7]


async def test_the_models_own_schema_needs_no_translation(empty_database: DatabaseSettings) -> None:
    engine = make_engine(empty_database)
    assert "schema_translate_map" not in engine.sync_engine.get_execution_options()


async def in_transaction(engine: AsyncEngine) -> tuple[int, bool]:
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, asyncpg.Connection)
        return raw.get_server_pid(), raw.is_in_transaction()


@pytest.mark.parametrize("isolation_level", ["AUTOCOMMIT", "READ COMMITTED"])
async def test_a_raw_begin_left_open_does_not_reach_the_next_user(
    empty_database: DatabaseSettings, isolation_level: str
) -> None:
    engine = make_engine(empty_database, pool_size=1, max_overflow=0)
    async with engine.execution_options(isolation_level=isolation_level).connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, asyncpg.Connection)
        pid = raw.get_server_pid()
        await raw.execute("BEGIN; SET LOCAL application_name = 'left'")
        del raw
    next_pid, open_transaction = await in_transaction(engine)
    assert not open_transaction
    assert next_pid != pid
    await backends_become(empty_database, 1)
    await engine.dispose()
    assert leaked() == []


async def test_a_connection_without_an_open_transaction_stays_in_the_pool(
    empty_database: DatabaseSettings,
) -> None:
    engine = make_engine(empty_database, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        await connection.execute(select(1))
    pid, _ = await in_transaction(engine)
    async with AsyncSession(engine) as session:
        await session.execute(select(1))
    assert await in_transaction(engine) == (pid, False)
    await engine.dispose()


async def test_a_connection_that_the_server_closed_is_replaced_when_it_is_taken_out(
    empty_database: DatabaseSettings,
) -> None:
    engine = make_engine(empty_database, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, asyncpg.Connection)
    other = make_engine(empty_database, poolclass=NullPool)
    async with other.connect() as connection:
        await connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": raw.get_server_pid()})
        async with asyncio.timeout(10):
            while not raw.is_closed():  # the loop has to read the end of the stream first
                await connection.execute(select(1))
    await other.dispose()
    async with engine.connect() as connection:
        assert await connection.scalar(select(1)) == 1
    await engine.dispose()


# --- ways to reach the server


async def current_user(settings: DatabaseSettings) -> str:
    async with DatabaseSessionManager(settings) as manager, manager.session() as session:
        user = await session.scalar(text("SELECT current_user"))
    assert isinstance(user, str)
    return user


async def test_url_and_parts_reach_the_same_server(empty_database: DatabaseSettings) -> None:
    assert await current_user(parts(empty_database)) == await current_user(empty_database)


async def test_the_first_host_that_answers_is_used(empty_database: DatabaseSettings) -> None:
    reachable = parts(empty_database).host
    assert isinstance(reachable, str)
    several = parts(empty_database, host=["/nowhere", reachable])
    assert await current_user(several) == several.user
    again = several.sqlalchemy_url().render_as_string(hide_password=False)
    assert await current_user(DatabaseSettings.model_validate({"url": again})) == several.user


@pytest.mark.parametrize("driver", ["postgresql", "postgres", "postgresql+asyncpg"])
async def test_hosts_and_ports_may_be_parameters(empty_database: DatabaseSettings, driver: str) -> None:
    given = parts(empty_database)
    if given.password is not None:
        pytest.skip("the URL below has no password")
    url = f"{driver}:///{given.database}?user={given.user}&host={given.host}&port={given.port}&sslmode=prefer"
    assert await current_user(DatabaseSettings.model_validate({"url": url})) == given.user


# --- secrets


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The socket directory of a server that asks the role `shop` for its password, which is NASTY."""
    with embedded({"fsync": "off", "password_encryption": "scram-sha-256"}) as postgres:  # before 14, md5 unless told
        quoted = NASTY.replace("'", "''")
        asyncio.run(_execute(postgres.url(None), f"CREATE ROLE shop LOGIN PASSWORD '{quoted}'"))
        rules = Path(postgres.host) / "data" / "pg_hba.conf"
        rules.write_text("local all shop scram-sha-256\n" + rules.read_text())
        postgres.restart()
        yield postgres.host


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


async def test_a_password_of_special_characters_opens_the_door(guarded: str) -> None:
    by_parts = DatabaseSettings.model_validate(
        {"host": guarded, "user": "shop", "password": NASTY, "database": "postgres"}
    )
    assert await current_user(by_parts) == "shop"
    url = by_parts.sqlalchemy_url().render_as_string(hide_password=False)
    assert await current_user(DatabaseSettings.model_validate({"url": url})) == "shop"
    quoted = f"postgresql://shop:{quote(NASTY, safe='')}@/postgres?host={guarded}"
    assert await current_user(DatabaseSettings.model_validate({"url": quoted})) == "shop"


async def test_a_wrong_password_is_not_shown(guarded: str) -> None:
    wrong = f"postgresql://shop:{CANARY}@/postgres?host={guarded}"
    said = await engine_error(DatabaseSettings.model_validate({"url": wrong}))
    assert "password authentication failed" in said
    assert CANARY not in said


async def engine_error(settings: DatabaseSettings) -> str:
    with pytest.raises((DBAPIError, OSError, asyncpg.PostgresError)) as caught:
        await current_user(settings)
    link: BaseException | None = caught.value
    said = [str(caught.getrepr(style="short"))]
    while link is not None:
        said += [str(link), repr(link)]
        link = link.__cause__ or link.__context__
    return "\n".join(said)


async def test_a_failing_connection_never_shows_the_password(empty_database: DatabaseSettings) -> None:
    nobody = parts(empty_database, user="nobody_of_that_name", password=CANARY)
    assert CANARY not in await engine_error(nobody)
    url = nobody.sqlalchemy_url().render_as_string(hide_password=False)
    assert CANARY in url
    assert CANARY not in await engine_error(DatabaseSettings.model_validate({"url": url}))
    assert CANARY not in await engine_error(parts(empty_database, host="/nowhere", password=CANARY))
    engine = make_engine(nobody)
    assert CANARY not in repr(engine) + str(engine.url)


async def test_a_failing_statement_never_shows_its_parameters(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        with pytest.raises(DBAPIError) as caught:
            await session.execute(text("SELECT 1 / (length(:value) - :size)"), {"value": CANARY, "size": len(CANARY)})
    assert CANARY not in str(caught.value)
