"""The database on which the permutations of a spec are played, emptied before each, and questions to ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import asyncpg

from pgebus._runtime.leases import Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store
from pgebus.database import make_engine
from pgebus.settings import DatabaseSettings
from tests.interleavings.parties import Party
from tests.interleavings.scheduler import Trace
from tests.postgres.plain_sql import drain, listen

# What handlers write. No UNIQUE: it would hide that an effect came twice.
EFFECTS: Final = "CREATE TABLE effects (event_id bigint NOT NULL, by text NOT NULL)"
_EMPTY: Final = """
DELETE FROM pgebus.subscriptions; DELETE FROM pgebus.consumer_groups; DELETE FROM pgebus.workers;
DELETE FROM pgebus.events; DELETE FROM pgebus.deliveries; DELETE FROM effects;
SELECT setval(pg_get_serial_sequence('pgebus.events', 'id'), 1, false)"""
_UNFINISHED: Final = """
SELECT coalesce(array_agg(DISTINCT status) || array_agg(DISTINCT CASE WHEN lost > 0 THEN 'lost' ELSE '' END), '{}')
FROM pgebus.deliveries WHERE status NOT IN ('completed', 'cancelled', 'dead')"""
_GROUPS: Final = "SELECT consumer_group, max_running IS NOT NULL FROM pgebus.consumer_groups"
_DRAINER: Final = 999


class Scene:
    """Tables, sessions, and what happened.

    Args:
        settings: The database.
        sql: A connection that looks, and never belongs to a session.
        statements: What the sessions send; a defect may be planted in them.
        levels: The isolation level of each session.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        sql: asyncpg.Connection[asyncpg.Record],
        statements: Statements,
        levels: Mapping[str, str],
    ) -> None:
        self.sql = sql
        self.trace = Trace()
        self.memory: dict[str, Any] = {}
        self.parties = {
            name: Party(name, 100 + number, settings, level, statements)
            for number, (name, level) in enumerate(levels.items(), 1)
        }
        self._engine = make_engine(settings, isolation_level="AUTOCOMMIT")
        self._line = Line(self._engine)
        self.store = Store(self._line, statements, "events")
        self._queue: asyncio.Queue[str] | None = None

    async def empty(self) -> None:
        await self.sql.execute(_EMPTY)
        self.trace = Trace()
        self.memory.clear()
        for party in self.parties.values():
            party.leases = []

    async def close(self) -> None:
        for party in self.parties.values():
            await party.close()
        await self._line.close()
        await self._engine.dispose()

    async def group(self, *names: str, **columns: Any) -> None:
        """Declare groups that get every event."""
        for name in names:
            values = {"channel": "events", "consumer_group": name, **columns}
            places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
            await self.sql.execute(
                f"INSERT INTO pgebus.consumer_groups ({', '.join(values)}) VALUES ({places})", *values.values()
            )
            await self.sql.execute(
                "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern, backfilled_at)"
                " VALUES ('events', $1, '#', now())",
                name,
            )

    async def events(self, *types: str, key: str | None = None) -> list[int]:
        """Publish one event of each type, committed."""
        rows = await self.sql.fetch(
            "INSERT INTO pgebus.events (type, key) SELECT t, $2 FROM unnest($1::text[]) t RETURNING id", types, key
        )
        return [row["id"] for row in rows]

    async def claimed(self, name: str, limit: int, group: str = "g") -> list[Lease]:
        """Let a session claim, committed, before the permutation begins."""
        leases = await self.store.claim(self.parties[name].worker_id, [group], limit)
        assert len(leases) == limit
        self.parties[name].leases = leases
        return leases

    async def rows(self, *columns: str, order: str = "type") -> str:
        """Return every delivery as text: its type, and the columns."""
        shown = ", ".join(("type", *columns))
        found: str = await self.sql.fetchval(
            f"SELECT coalesce(string_agg(concat_ws(' ', {shown}), ', ' ORDER BY {order}, consumer_group), '-')"
            " FROM pgebus.deliveries"
        )
        return found

    def result(self, name: str) -> Any:
        """Return what a step returned."""
        return self.trace.results.get(name)

    async def blocked(self, waiting: set[int], holding: set[int]) -> bool:
        """Return whether a backend waits for a lock of one of the others."""
        return bool(
            await self.sql.fetchval(
                "SELECT EXISTS (SELECT FROM unnest($1::integer[]) w WHERE pg_blocking_pids(w) && $2::integer[])",
                list(waiting),
                list(holding),
            )
        )

    async def drain(self, *, effects: bool) -> list[int]:
        """Do what workers do until nothing is left: recover, sweep, claim, handle, complete.

        Whoever ran before is taken for dead: no session of a spec holds a worker's lock.

        Returns:
            The ids of the events, in the order in which they came.
        """
        store = self.store
        drained: list[int] = []
        for _ in range(50):
            left = set(await self.sql.fetchval(_UNFINISHED))
            if "running" in left:
                await store.recover([row["worker_id"] for row in await store.owners()])
            if "blocked" in left:
                await store.sweep(("", "", ""), 1_000)
            groups = {row[0]: row[1] for row in await self.sql.fetch(_GROUPS)} if left else {}
            leases: list[Lease] = []
            for suspect in (False, True) if left & {"lost", "running"} else (False,):
                for group in (name for name, limited in groups.items() if limited):
                    leases += await store.claim_limited(_DRAINER, group, 100, suspect=suspect) or []
                free = [name for name, limited in groups.items() if not limited]
                if free and suspect:
                    leases += await store.claim_suspect(_DRAINER, free)
                elif free:
                    leases += await store.claim(_DRAINER, free, 100)
            if not leases:
                return drained
            drained += [lease.fence.event_id for lease in leases]
            if effects:
                await self.sql.executemany(
                    "INSERT INTO effects (event_id, by) VALUES ($1, 'drain')", [(x.fence.event_id,) for x in leases]
                )
            assert len(await store.complete(leases)) == len(leases)
        raise AssertionError(f"never drained: {await self.rows('status', 'consumer_group')}")

    async def heard(self) -> list[str]:
        """Return the notifications of all that was committed since this was last asked."""
        if self._queue is None:
            self._queue = await listen(self.sql, "events")
        return await drain(self._queue, self.sql, "events")
