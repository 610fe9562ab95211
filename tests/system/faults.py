"""Workers for tests that break something: they may leave nothing behind, and what they did can be counted."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import text

from pgebus import DatabaseSettings, EventContext, EventRouter, EventSystem
from tests.system.bus import Sql, settings
from tests.system.waiting import until

_numbers = itertools.count(1)


@asynccontextmanager
async def worker(router: EventRouter, database: DatabaseSettings, **event_system: Any) -> AsyncIterator[EventSystem]:
    """Run a system inside the block; afterwards none of its connections and none of its tasks may be left."""
    name = f"worker-{next(_numbers)}"
    others = tasks_of_ours()
    system = EventSystem(router, settings(database.model_copy(update={"application_name": name}), **event_system))
    try:
        async with system:
            yield system
    finally:
        left = tasks_of_ours() - others
        await no_backend_of(database, name)
    assert not {task.get_name() for task in left if not task.done()}


def tasks_of_ours() -> set[asyncio.Task[Any]]:
    """Return the tasks of all systems in this process."""
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("pgebus-")}


async def no_backend_of(database: DatabaseSettings, application_name: str) -> None:
    """Wait until the server has none; a backend lives on for a moment after its client has gone."""
    async with connected(database) as sql:

        async def check() -> bool:
            return not await backends(sql, application_name)

        await until(check, within=5.0)


@asynccontextmanager
async def connected(database: DatabaseSettings) -> AsyncIterator[Sql]:
    """Connect to look and to meddle."""
    connection = await connect(database)
    try:
        yield connection
    finally:
        connection.terminate()


async def connect(database: DatabaseSettings) -> Sql:
    """Return a plain connection."""
    url = database.sqlalchemy_url().set(drivername="postgresql")
    return await asyncpg.connect(url.render_as_string(hide_password=False))


async def backends(sql: Sql, application_name: str) -> list[int]:
    """Return the process ids of all connections of one worker to any database."""
    rows = await sql.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name = $1 ORDER BY backend_start", application_name
    )
    return [row["pid"] for row in rows]


def name_of(system: EventSystem) -> str:
    """Return the application name under which a worker's connections are known."""
    return system._settings.database.application_name


async def healthy(system: EventSystem, within: float = 15.0) -> float:
    """Wait until a system says that it is well; return the seconds."""

    async def check() -> bool:
        return system.health().ok

    return await until(check, within)


async def no_longer(system: EventSystem, within: float = 15.0) -> float:
    """Wait until a system says that something is wrong; return the seconds."""

    async def check() -> bool:
        return not system.health().ok

    return await until(check, within)


async def failed(system: EventSystem, loop: str, within: float = 15.0) -> float:
    """Wait until a loop has failed at least once, which it may be over already; return the seconds."""

    async def check() -> int:
        return sum(one.failures for one in system.health().loops if one.name == loop)

    return await until(check, within)


# No constraint: a second effect must be stored to be seen.
EFFECTS = "CREATE TABLE effects (event_id bigint NOT NULL, number integer NOT NULL, handler text NOT NULL)"


async def effects(sql: Sql, handler: str = "once") -> Counter[int]:
    """Return how often each number was written."""
    rows = await sql.fetch("SELECT number FROM effects WHERE handler = $1", handler)
    return Counter(row["number"] for row in rows)


async def record(ctx: EventContext, number: int, handler: str = "once") -> None:
    """Write an effect in the handler's transaction."""
    assert ctx.session is not None
    await ctx.session.execute(
        text("INSERT INTO effects VALUES (:event, :number, :handler)"),
        {"event": ctx.event_id, "number": number, "handler": handler},
    )
