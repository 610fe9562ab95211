"""A database for each test: copied from a migrated template, on an embedded server or the one PGEBUS_TEST_URL names."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import asyncpg
import pytest
from sqlalchemy import URL, make_url

from pgebus.database import DatabaseSessionManager
from pgebus.migrations import upgrade
from pgebus.settings import DatabaseSettings
from tests.embedded import in_memory, version

# Nothing here outlives the run, so durability would only cost time. Tests of durability start a server of their own.
FAST = {"fsync": "off", "synchronous_commit": "on", "full_page_writes": "off", "max_connections": "200"}
TEMPLATE = "pgebus_test_template"


def pytest_report_header() -> str:
    """Say on what the tests run: `make test-matrix` varies it."""
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("SQLAlchemy", "alembic", "asyncpg"))
    return f"on: {'the server of PGEBUS_TEST_URL' if os.environ.get('PGEBUS_TEST_URL') else version()}, {libraries}"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Say how many processes `-n auto` means: one more than there are processors, since a test waits half of its time.

    Each has a server of its own. One that somebody has named would be shared, and some tests ask what all of its
    sessions do, or make databases and roles of fixed names.
    """
    if os.environ.get("PGEBUS_TEST_URL"):
        return 0
    return min((os.cpu_count() or 1) + 1, 8)


@dataclass(frozen=True)
class Server:
    """The PostgreSQL server under test, and how to make databases on it.

    Attributes:
        url: Where it is.
        strategy: What CREATE DATABASE is told about how to copy.
    """

    url: URL
    strategy: str = ""

    def settings(self, database: str, **options: object) -> DatabaseSettings:
        url = self.url.set(database=database, drivername="postgresql+asyncpg")
        return DatabaseSettings.model_validate({"url": url.render_as_string(hide_password=False), **options})

    async def connect(self, database: str | None = None) -> asyncpg.Connection[asyncpg.Record]:
        url = self.url.set(drivername="postgresql", database=database or self.url.database)
        return await asyncpg.connect(url.render_as_string(hide_password=False))

    async def execute(self, *statements: str) -> None:
        connection = await self.connect()
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server of the whole run."""
    if url := os.environ.get("PGEBUS_TEST_URL"):
        yield asyncio.run(_known(make_url(url)))
        return
    with in_memory(FAST) as postgres:
        yield asyncio.run(_known(make_url(postgres.url())))


async def _known(url: URL) -> Server:
    """Have files copied, as all did before 15, where nothing is synced: a checkpoint is cheap, 7 MB of log are not."""
    connection = await Server(url).connect()
    try:
        cheap = await connection.fetchval(
            "SELECT current_setting('fsync') = 'off' AND current_setting('server_version_num')::int >= 150000"
        )
    finally:
        await connection.close()
    return Server(url, " STRATEGY file_copy" if cheap else "")


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """The name of a migrated database to copy."""
    name = f"{TEMPLATE}_{os.getpid()}"
    asyncio.run(server.execute(f'CREATE DATABASE "{name}"'))
    upgrade(server.settings(name))
    yield name
    asyncio.run(server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


_numbers = itertools.count(1)


async def _scratch(server: Server, template: str | None) -> AsyncIterator[str]:
    name = f"pgebus_test_{os.getpid()}_{next(_numbers)}"
    copied = f' TEMPLATE "{template}"' if template else ""
    await server.execute(f'CREATE DATABASE "{name}"{copied}{server.strategy}')
    yield name
    with suppress(OSError, asyncpg.PostgresConnectionError):  # a test of our own may have stopped the server
        await server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture
async def empty_database(server: Server) -> AsyncIterator[DatabaseSettings]:
    """A database without our tables."""
    async for name in _scratch(server, None):
        yield server.settings(name)


@pytest.fixture
async def database(server: Server, template: str) -> AsyncIterator[DatabaseSettings]:
    """A migrated database."""
    async for name in _scratch(server, template):
        yield server.settings(name)


@pytest.fixture
async def sm(database: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    """Sessions on the migrated database."""
    manager = DatabaseSessionManager(database)
    yield manager
    await manager.close()


@pytest.fixture
async def sql(server: Server, database: DatabaseSettings) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A plain connection to the migrated database, to look and to meddle."""
    connection = await server.connect(database.sqlalchemy_url().database)
    yield connection
    with suppress(OSError, asyncpg.PostgresConnectionError):
        await connection.close(timeout=2)
