"""`pgebus roles`: what the command says, and that its SQL does the same."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pgebus import DatabaseSettings
from pgebus.migrations import upgrade
from pgebus.names import quote_identifier
from tests.roles import Cast, casting
from tests.schema_names import ODD
from tests.system.bus import Sql
from tests.system.test_cli import Done, environment, run_process, url_of

Roles = Callable[..., Awaitable[Done]]


@pytest.fixture
def roles(database: DatabaseSettings, tmp_path: Path) -> Roles:
    async def run(*arguments: str, **variables: str) -> Done:
        command = [sys.executable, "-m", "pgebus.cli", "roles", *arguments]
        given = {"PGEBUS_DATABASE__URL": url_of(database), **variables}
        return await asyncio.to_thread(run_process, tmp_path, *command, **environment(**given))

    return run


def named(cast: Cast) -> list[str]:
    return [f"--{which}={getattr(cast.roles, which)}" for which in ("owner", "publisher", "worker")]


async def may_insert(sql: Sql, cast: Cast, schema: str = "pgebus") -> bool:
    found = await sql.fetchval(
        "SELECT has_table_privilege($1, c.oid, 'INSERT') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE n.nspname = $2 AND relname = 'events'",
        cast.roles.publisher,
        schema,
    )
    return bool(found)


async def test_the_command_grants_and_says_so(roles: Roles, sql: Sql, database: DatabaseSettings) -> None:
    async with casting(sql, database) as cast:
        done = await roles(*named(cast))
        assert (done.returncode, done.stderr) == (0, "")
        assert all(name in done.stdout for name in (cast.roles.owner, cast.roles.publisher, cast.roles.worker))
        assert await may_insert(sql, cast)


async def test_its_sql_does_the_same_in_any_schema(roles: Roles, sql: Sql, database: DatabaseSettings) -> None:
    """Written without connecting, for somebody else to run."""
    odd = ODD[0]
    await asyncio.to_thread(upgrade, database.model_copy(update={"schema_name": odd}))
    async with casting(sql, database) as cast:
        nowhere = "postgresql://nobody@127.0.0.1:1/nowhere"
        done = await roles(*named(cast), "--sql", PGEBUS_DATABASE__SCHEMA=odd, PGEBUS_DATABASE__URL=nowhere)
        assert (done.returncode, done.stderr) == (0, "")
        for _ in range(2):
            await sql.execute(done.stdout)
        assert await may_insert(sql, cast, odd)
        assert not await may_insert(sql, cast)
        await sql.execute(f"DROP SCHEMA {quote_identifier(odd)} CASCADE")


@pytest.mark.slow
async def test_what_cannot_be_done_is_one_message(roles: Roles, sql: Sql, empty_database: DatabaseSettings) -> None:
    done = await roles("--worker=pgebus_owner")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "must differ" in done.stderr
    async with casting(sql, empty_database) as cast:
        done = await roles(*named(cast), PGEBUS_DATABASE__URL=url_of(empty_database))
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert "pgebus migrate" in done.stderr
        assert not await sql.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", cast.roles.owner)
