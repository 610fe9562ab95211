"""How the database is asked: read-only, for a few seconds at most, and without leaving anything behind.

Each statement has a transaction of its own, whose settings end with it: so a transaction pooler may be in between, and
nothing is held while an examination waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final

from pgebus._runtime.connecting import PLANNER
from pgebus.doctor._findings import Limits
from pgebus.names import quote_identifier
from pgebus.settings import Settings

# So many of a kind are counted, and no more; and so many of a kind are listed.
COUNTED: Final = 1_000
LISTED: Final = 10
_LOCK_TIMEOUT: Final = "500ms"


class Ask:
    """Asks one database.

    Args:
        driver: A connection of asyncpg that nobody else uses.
        settings: `database.schema_name` is the schema.
        limits: How long a statement may take.
    """

    def __init__(self, driver: Any, settings: Settings, limits: Limits) -> None:
        self.driver: Final = driver
        self.settings: Final = settings
        self.limits: Final = limits
        self.schema: Final = settings.database.schema_name
        self.s: Final = quote_identifier(self.schema)
        self._turns = asyncio.Lock()  # checks that wait may be under way at the same time

    @asynccontextmanager
    async def transaction(self, *, planner: bool = True) -> AsyncIterator[None]:
        """Open a transaction that reads; *planner* as a worker's own connections have it."""
        milliseconds = max(1, int(self.limits.check_seconds * 1000))
        # Not only the server's: a connection that is half open answers nothing.
        async with (
            self._turns,
            asyncio.timeout(self.limits.check_seconds * 2 + 2),
            self.driver.transaction(isolation="read_committed", readonly=True),
        ):
            await self.driver.execute(
                f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'; "
                "SET LOCAL search_path = pg_catalog, pg_temp"
                + (f"; {PLANNER.replace('SET ', 'SET LOCAL ')}" if planner else "")
            )
            yield

    async def rows(self, sql: str, *values: object) -> list[Any]:
        """Return the rows of one statement; `{s}` in it stands for the quoted schema."""
        async with self.transaction():
            found: list[Any] = await self.driver.fetch(sql.replace("{s}", self.s), *values)
        return found

    async def row(self, sql: str, *values: object) -> Any:
        """Return the one row of a statement."""
        (row,) = await self.rows(sql, *values)
        return row

    async def pause(self) -> None:
        """Wait until a running system has had the time to repair what it repairs by itself."""
        await asyncio.sleep(self.limits.look_again_seconds)


def counted(count: int, one: str, many: str) -> str:
    """Return a count that ends at `COUNTED`, with its noun."""
    if count == 1:
        return f"1 {one}"
    return f"{count:,} {many}" if count < COUNTED else f"{COUNTED:,} or more {many}"


def age(seconds: float | timedelta | None) -> str:
    """Return how long that is, in the largest unit that says enough."""
    if seconds is None:
        return "an unknown time"
    total = seconds.total_seconds() if isinstance(seconds, timedelta) else float(seconds)
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if total >= 2 * size:
            return f"{int(total // size)} {unit}"
    return f"{max(0, int(total))} s"


def moment(when: datetime | None) -> str:
    """Return a moment in UTC, as everything here is the database's."""
    return "an unknown time" if when is None else f"{when:%Y-%m-%d %H:%M:%S} UTC"


# Held advisory locks of our database with a key of 64 bits; any role may look.
LOCKS: Final = """locks AS MATERIALIZED (
  SELECT (l.classid::bigint << 32) | l.objid::bigint AS id, min(l.pid) AS pid FROM pg_catalog.pg_locks l
  WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  GROUP BY 1
)"""
