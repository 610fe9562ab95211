"""`pgebus check`, run as users run it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import pytest

from pgebus import DatabaseSettings, __version__
from pgebus.cli.app import run
from pgebus.migrations import upgrade
from pgebus.models import SCHEMA_VERSION
from pgebus.names import quote_identifier
from tests.postgres.plain_sql import Sql

CANARY = "canary-71c5"
ODD = 'Odd ":name" %s ä'

Done = subprocess.CompletedProcess[str]


def environment(**variables: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PGEBUS_")}
    return {**ours, **variables}


class Check(Protocol):
    """Runs `pgebus check`."""

    async def __call__(self, database: DatabaseSettings | str, *arguments: str, **variables: str) -> Done: ...


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Check:
    """Runs it in this process, since starting Python takes most of a command's time."""

    def here(variables: dict[str, str], *arguments: str) -> Done:
        for name in set(os.environ) - set(environment()):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pgebus", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        return Done(arguments, int(ended.value.code or 0), *capsys.readouterr())

    async def check(database: DatabaseSettings | str, *arguments: str, **variables: str) -> Done:
        variables["PGEBUS_DATABASE__URL"] = database if isinstance(database, str) else url_of(database)
        return await asyncio.to_thread(here, variables, *arguments)

    return check


def url_of(settings: DatabaseSettings) -> str:
    return settings.sqlalchemy_url().render_as_string(hide_password=False)


def assert_mistake(done: Done, status: int, *words: str) -> None:
    """A mistake is answered with one message: no traceback, no secret, nothing on standard output."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    for word in words:
        assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert CANARY not in done.stderr


async def test_a_migrated_database_is_as_it_should_be(database: DatabaseSettings, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pgebus.cli",
        "check",
        cwd=tmp_path,
        env=environment(PGEBUS_DATABASE__URL=url_of(database)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode().endswith(f"schema 'pgebus': no differences from what pgebus {__version__} makes.\n")


async def test_every_difference_is_a_line(check: Check, database: DatabaseSettings, sql: Sql) -> None:
    await sql.execute("DROP INDEX pgebus.ix_deliveries_due; ALTER TABLE pgebus.events DISABLE TRIGGER fan_out")
    done = await check(database)
    assert (done.returncode, done.stderr) == (1, "")
    *differences, last = done.stdout.splitlines()
    assert differences == [
        "index ix_deliveries_due: missing",
        "trigger fan_out on events, state: expected enabled, found disabled",
    ]
    assert "schema 'pgebus': 2 differences" in last


async def test_json_is_for_programs(check: Check, database: DatabaseSettings, sql: Sql) -> None:
    done = await check(database, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"schema": "pgebus", "differences": []})
    await sql.execute("ALTER TABLE pgebus.events ALTER priority TYPE integer")
    done = await check(database, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["differences"] == [
        {
            "kind": "column",
            "name": "events.priority",
            "aspect": "type",
            "expected": "smallint",
            "found": "integer",
            "remedy": None,
        }
    ]


async def test_an_odd_schema_is_shown_as_it_is(check: Check, database: DatabaseSettings, sql: Sql) -> None:
    odd = database.model_copy(update={"schema_name": ODD})
    await asyncio.to_thread(upgrade, odd)
    done = await check(database, PGEBUS_DATABASE__SCHEMA=ODD)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"schema {ODD!r}: no differences" in done.stdout
    await sql.execute(f"ALTER FUNCTION {quote_identifier(ODD)}.fan_out SECURITY INVOKER")
    done = await check(database, "--json", PGEBUS_DATABASE__SCHEMA=ODD)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["schema"], found["differences"][0]["name"]) == (ODD, "fan_out()")


async def test_a_schema_that_cannot_be_is_a_misuse(check: Check, database: DatabaseSettings) -> None:
    for name in ("pg_mine", "ä" * 32):
        assert_mistake(await check(database, PGEBUS_DATABASE__SCHEMA=name), 2, name)


async def test_where_nothing_is_installed_it_says_what_to_run(check: Check, empty_database: DatabaseSettings) -> None:
    done = await check(empty_database)
    assert (done.returncode, done.stderr) == (1, "")
    assert "holds no tables of pgebus" in done.stdout
    assert "pgebus migrate" in done.stdout


async def test_a_newer_database_needs_another_release(check: Check, database: DatabaseSettings, sql: Sql) -> None:
    await sql.execute(
        "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql AS "
        f"'SELECT {SCHEMA_VERSION + 1}'"
    )
    done = await check(database)
    assert done.returncode == 1
    assert f"expected {SCHEMA_VERSION}, found {SCHEMA_VERSION + 1}. Install the release" in done.stdout
    assert "1 difference from" in done.stdout


async def test_a_role_without_rights_is_told_what_it_needs(check: Check, database: DatabaseSettings, sql: Sql) -> None:
    role = f"visitor_{uuid4().hex}"
    url = database.sqlalchemy_url().set(username=role, password=CANARY).render_as_string(hide_password=False)
    await sql.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{CANARY}'")
    try:
        assert_mistake(await check(url), 1, "permission denied", "pgebus")
        name = quote_identifier(database.sqlalchemy_url().database or "")
        await sql.execute(f"GRANT USAGE ON SCHEMA pgebus TO {role}; REVOKE ALL ON DATABASE {name} FROM PUBLIC")
        await sql.execute(f"GRANT CONNECT ON DATABASE {name} TO {role}")
        assert_mistake(await check(url), 1, role, "GRANT TEMPORARY")
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_database_that_cannot_be_reached_is_one_message(check: Check) -> None:
    done = await check(f"postgresql://shop:{CANARY}@127.0.0.1:1/orders", "--json")
    assert_mistake(done, 1, "shop@127.0.0.1:1/orders")
