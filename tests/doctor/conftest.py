"""A server as it should be, which tests may reconfigure: that of the other tests has its durability turned off."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol

import pytest
from sqlalchemy import make_url

from pgebus import DatabaseSettings, Settings
from pgebus.doctor import Finding, Limits, Report, examine
from pgebus.migrations import upgrade
from tests.conftest import Server
from tests.embedded import in_memory
from tests.system import conftest as system
from tests.system.bus import Sql

command = system.command
another = system.another

SOUND = {"max_connections": "40", "max_prepared_transactions": "5", "wal_level": "logical"}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of these tests' own."""
    with in_memory(SOUND) as postgres:
        yield Server(make_url(postgres.url()))


@pytest.fixture(scope="session")
def template(server: Server) -> str:
    """The name of a migrated database to copy, on that server."""
    name = f"pgebus_doctor_template_{os.getpid()}"
    asyncio.run(server.execute(f'CREATE DATABASE "{name}"'))
    upgrade(server.settings(name))
    return name


class Examine(Protocol):
    """Examines the test's database, or another one; nothing is waited for, unless told to."""

    async def __call__(self, database: DatabaseSettings | None = None, **limits: float) -> Report: ...


@pytest.fixture
def examined(database: DatabaseSettings) -> Examine:
    ours = database

    async def examined(database: DatabaseSettings | None = None, **limits: float) -> Report:
        given = Limits(**{"look_again_seconds": 0.0, **limits})
        return await examine(Settings(database=database or ours), given)

    return examined


@pytest.fixture
async def reconfigured(sql: Sql) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Change settings of the server; they are as before after the test."""

    async def change(**values: Any) -> None:
        for name, value in values.items():
            await sql.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await reload(sql, values)

    yield change
    await sql.execute("ALTER SYSTEM RESET ALL")
    await sql.execute("SELECT pg_reload_conf()")


async def reload(sql: Sql, values: dict[str, Any]) -> None:
    from tests.system.waiting import until

    await sql.execute("SELECT pg_reload_conf()")

    async def there() -> bool:
        return all([await sql.fetchval("SELECT current_setting($1)", name) == value for name, value in values.items()])

    await until(there)


def of(report: Report, code: str) -> Finding:
    """Return the one finding of this code."""
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) == 1, report
    return found[0]


def wrong(report: Report) -> list[str]:
    """Return the codes of what is worse than a notice."""
    return [finding.code for finding in report.findings if finding.severity.rank > 1]
