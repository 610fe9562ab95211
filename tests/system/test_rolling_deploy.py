"""A rolling deploy: the database is migrated first, and the release before goes on until its processes are replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, EventSystem, SchemaMismatchError
from pgebus.models import SCHEMA_VERSION
from tests.conftest import Server
from tests.postgres.hosts import HEAD, Host
from tests.system.bus import finished, publish, running, settings
from tests.system.waiting import until


async def test_the_release_before_works_with_the_next_schema(
    tmp_path: Path, server: Server, empty_database: DatabaseSettings
) -> None:
    """While it runs, when it is started again, and after the way back; with one more revision it no longer starts."""
    router = EventRouter()

    @router.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None

    with Host(tmp_path, "generic", empty_database) as host:
        host.alembic("upgrade", "pgebus@head")
        sql = await server.connect(empty_database.sqlalchemy_url().database)
        async with DatabaseSessionManager(empty_database) as sm, running(router, empty_database):
            await finished(sql, await publish(sm, "order.placed"))
            host.release(SCHEMA_VERSION + 1)
            await asyncio.to_thread(host.alembic, "upgrade", "pgebus@head")
            assert await sql.fetchval("SELECT pgebus.schema_version()") == SCHEMA_VERSION + 1
            await finished(sql, await publish(sm, "order.placed"))
            async with running(router, empty_database):
                await finished(sql, *[await publish(sm, "order.placed") for _ in range(20)])
            await asyncio.to_thread(host.alembic, "downgrade", HEAD)
            assert await sql.fetchval("SELECT pgebus.schema_version()") == SCHEMA_VERSION
            await finished(sql, await publish(sm, "order.placed"))

        host.release(SCHEMA_VERSION + 2)
        host.alembic("upgrade", "pgebus@head")
        with pytest.raises(SchemaMismatchError, match="Install the release") as refused:
            await EventSystem(router, settings(empty_database)).start()
        assert (refused.value.found, refused.value.needed) == (SCHEMA_VERSION + 2, SCHEMA_VERSION)
        await sql.close()


async def test_the_first_release_goes_on_beside_the_second(
    tmp_path: Path, server: Server, empty_database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that has really been made: 0002 adds a table, which nothing of the release before knows of."""
    before, after = EventRouter(), EventRouter()

    @before.on("order.placed", transactional=True)
    @after.on("order.placed", transactional=True)
    async def handle(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None

    @after.every("* * * * *", "clock.ticked", missed="all")
    async def tick(ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    def release(number: int) -> None:
        monkeypatch.setattr("pgebus._runtime.requirements.SCHEMA_VERSION", number)

    with Host(tmp_path, "generic", empty_database) as host:
        host.alembic("upgrade", "pgebus_0001")
        sql = await server.connect(empty_database.sqlalchemy_url().database)
        release(1)
        async with DatabaseSessionManager(empty_database) as sm, running(before, empty_database):
            await finished(sql, await publish(sm, "order.placed"))
            await asyncio.to_thread(host.alembic, "upgrade", "pgebus@head")
            async with running(before, empty_database):  # started again
                await finished(sql, await publish(sm, "order.placed"))
                release(SCHEMA_VERSION)
                async with running(after, empty_database):
                    await until(lambda: sql.fetchval("SELECT count(*) = 1 FROM pgebus.schedules"))
                    await finished(sql, *[await publish(sm, "order.placed") for _ in range(20)])
            await asyncio.to_thread(host.alembic, "downgrade", "pgebus_0001")
            await finished(sql, await publish(sm, "order.placed"))
        with pytest.raises(SchemaMismatchError, match="alembic upgrade pgebus@head"):
            await EventSystem(after, settings(empty_database)).start()
        await sql.close()
