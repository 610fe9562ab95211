"""Findings for which a server of its own is started: a standby, and one that has pg_stat_statements."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import asyncpg
import pytest

from pgebus import DatabaseSettings, Settings
from pgebus.doctor import Limits, Report, Severity, examine
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade
from tests.doctor.conftest import of
from tests.embedded import in_memory
from tests.system.standby import primary_and_standby
from tests.system.waiting import until

pytestmark = pytest.mark.slow


def settings_of(server: EmbeddedPostgres) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"url": server.url()})


async def examined(server: EmbeddedPostgres, **limits: float) -> Report:
    return await examine(Settings(database=settings_of(server)), Limits(**{"look_again_seconds": 0.0, **limits}))


async def connect(server: EmbeddedPostgres) -> Any:
    return await asyncpg.connect(server.url(driver=None))


async def test_a_standby_and_what_its_queries_keep() -> None:
    with primary_and_standby() as (primary, standby):
        await asyncio.to_thread(upgrade, settings_of(primary))
        there, here = await connect(standby), await connect(primary)
        await until(lambda: there.fetchval("SELECT to_regclass('pgebus.schedules') IS NOT NULL"))
        report = await examined(standby)
        assert of(report, "standby").severity is Severity.PROBLEM
        assert "on a standby" in of(report, "not-visible").seen
        for change in ("hot_standby_feedback = on", "wal_receiver_status_interval = '1s'"):
            await there.execute(f"ALTER SYSTEM SET {change}")
        await there.execute("SELECT pg_reload_conf()")
        await there.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1")
        feeds = "SELECT count(*) = 1 FROM pg_stat_replication WHERE backend_xmin IS NOT NULL"
        await until(lambda: here.fetchval(feeds), within=30.0)
        assert "standby-feedback" not in [finding.code for finding in (await examined(primary)).findings]
        found = of(await examined(primary, transaction_ids=0), "standby-feedback")
        assert (found.subject, found.severity) == ("standby", Severity.WARNING)
        await there.close()
        await here.close()


async def test_statements_that_are_slow_as_the_server_knows() -> None:
    server = in_memory({"shared_preload_libraries": "pg_stat_statements"})
    try:
        server.start()
    except subprocess.CalledProcessError:  # it does not start without the library, which the wheel's lacks
        pytest.skip("this PostgreSQL has no pg_stat_statements")
    try:
        await asyncio.to_thread(upgrade, settings_of(server))
        sql = await connect(server)
        await sql.execute("CREATE SCHEMA odd; CREATE EXTENSION pg_stat_statements SCHEMA odd")
        for _ in range(10):
            await sql.fetch('SELECT count(*) FROM "pgebus".deliveries')
        assert "slow-statement" not in [finding.code for finding in (await examined(server)).findings]
        seen = of(await examined(server, statement_seconds=0), "slow-statement").seen
        assert "over 10 calls" in seen
        assert '"pgebus".deliveries' in seen
        await sql.close()
    finally:
        server.stop()
