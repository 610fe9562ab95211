"""A rolling deploy: the database is migrated first, and the release before goes on until its processes are replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, EventSystem, SchemaMismatchError
from tests.conftest import Server
from tests.postgres.hosts import Host
from tests.system.bus import finished, publish, running, settings


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
            host.release(2)
            await asyncio.to_thread(host.alembic, "upgrade", "pgebus@head")
            assert await sql.fetchval("SELECT pgebus.schema_version()") == 2
            await finished(sql, await publish(sm, "order.placed"))
            async with running(router, empty_database):
                await finished(sql, *[await publish(sm, "order.placed") for _ in range(20)])
            await asyncio.to_thread(host.alembic, "downgrade", "pgebus_0001")
            assert await sql.fetchval("SELECT pgebus.schema_version()") == 1
            await finished(sql, await publish(sm, "order.placed"))

        host.release(3)
        host.alembic("upgrade", "pgebus@head")
        with pytest.raises(SchemaMismatchError, match="Install the release") as refused:
            await EventSystem(router, settings(empty_database)).start()
        assert (refused.value.found, refused.value.needed) == (3, 1)
        await sql.close()
