"""The database of the model: its connections, its clock, and a look at its tables.

Time passes by moving what is stored: all times in the tables go back by the same amount, which to every statement is as
if the clock had gone forward. So the statements are those of production to the letter, with PostgreSQL's own `now()`;
nothing in them knows of a test. A transaction that is open moves what it has inserted itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar

import asyncpg

from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store
from pgebus.database import DatabaseSessionManager, make_engine
from pgebus.settings import DatabaseSettings
from tests.system.bus import Sql

T = TypeVar("T")

CHANNEL: Final = "events"
PUBLISHERS: Final = ("Ann", "Bob", "Cem")
SLOTS: Final = ("one", "two", "three")
COMPARED: Final = (
    "status, worker_id, claim_seq, attempt, lost, round, holds_key, handled,"
    " coalesce(jsonb_array_length(errors), 0) AS errors, key, type, priority"
)


def _micros(column: str) -> str:
    return f"(extract(epoch FROM {column}) * 1000000)::bigint"


# All deliveries, and one more row: the clock, the events and the effects.
LOOK: Final = f"""
SELECT event_id, consumer_group, {COMPARED}, {_micros("due_at")} AS due, {_micros("claimed_at")} AS claimed,
       {_micros("finished_at")} AS finished, NULL::bigint[] AS events, NULL::text[] AS effects
FROM pgebus.deliveries
UNION ALL
SELECT NULL, NULL, 'the rest', NULL, 0, 0, 0, 0, false, NULL, 0, NULL, NULL, 0,
       {_micros("clock_timestamp()")}, NULL, NULL,
       (SELECT array_agg(id) FROM pgebus.events),
       (SELECT array_agg(event_id || ' ' || consumer_group || ' ' || claim_seq) FROM effects)"""
# No constraint: it would hide what was done twice.
EFFECTS: Final = "CREATE TABLE effects (event_id bigint NOT NULL, consumer_group text NOT NULL, claim_seq int NOT NULL)"
INSERT: Final = """
INSERT INTO pgebus.events (type, key, run_at, priority, dedup_key, payload)
SELECT u.type, u.key, now() + make_interval(secs => u.delay), u.priority, u.dedup_key, jsonb_build_object('n', u.n)
FROM unnest($1::text[], $2::text[], $3::int[], $4::smallint[], $5::text[])
  WITH ORDINALITY u(type, key, delay, priority, dedup_key, n) ORDER BY u.n
ON CONFLICT (channel, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
RETURNING id, (payload ->> 'n')::int - 1 AS n"""
EMPTY: Final = """
DELETE FROM pgebus.deliveries; DELETE FROM pgebus.events; DELETE FROM pgebus.consumer_groups;
DELETE FROM pgebus.workers; DELETE FROM effects; SELECT pg_advisory_unlock_all();
SELECT setval(pg_get_serial_sequence('pgebus.events', 'id'), 1, false)"""
EMPTY_FILES: Final = "TRUNCATE pgebus.events, pgebus.deliveries, pgebus.subscriptions, pgebus.consumer_groups, effects"
# How many examples leave their dead rows behind before they are cleared away.
CLEARED_EVERY: Final = 20


class Look(NamedTuple):
    """What the tables hold: rows by (event, group), events, effects; *clock* is the model's."""

    clock: int
    rows: dict[tuple[int, str], asyncpg.Record]
    events: frozenset[int]
    effects: list[tuple[int, str, int]]
    passed: int  # what is to be added to the times of the rows


class Database:
    """Connections to a database of our own, for all examples of a run."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self.loop = asyncio.new_event_loop()
        self.settings = settings
        self.passed = 0  # microseconds that the test has let pass
        self.examples = 0
        self.statements = Statements(settings.schema_name)
        self.run(self._open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def _open(self) -> None:
        self.engine = make_engine(self.settings, pool_size=2, max_overflow=0, isolation_level="AUTOCOMMIT")
        self.store = Store(Line(self.engine), self.statements, CHANNEL)
        self.sessions = DatabaseSessionManager(self.settings)
        self.watcher = await self._connect()
        self.hands = await self._connect()
        self.locks = await self._connect()
        self.publishers = {name: await self._connect() for name in PUBLISHERS}
        self.handlers = {name: await self._connect() for name in SLOTS}
        await self.hands.execute(EFFECTS)

    async def _connect(self) -> Sql:
        url = self.settings.sqlalchemy_url().set(drivername="postgresql")
        return await asyncpg.connect(url.render_as_string(hide_password=False))

    def close(self) -> None:
        """Close everything, and the event loop."""

        async def close() -> None:
            for connection in self._all():
                await connection.close()
            await self.sessions.close()
            await self.engine.dispose()

        self.run(close())
        self.loop.close()

    def _all(self) -> list[Sql]:
        return [self.watcher, self.hands, self.locks, *self.publishers.values(), *self.handlers.values()]

    async def clear(self) -> None:
        """Begin anew: no rows, no open transaction, ids from 1, the clock where it is."""
        for connection in (*self.publishers.values(), *self.handlers.values()):
            if connection.is_in_transaction():
                await connection.execute("ROLLBACK")
        await self.locks.fetch("SELECT pg_advisory_unlock_all()")
        if self.examples % CLEARED_EVERY == 0:
            await self.hands.execute(EMPTY_FILES)
        await self.hands.execute(EMPTY)
        self.examples += 1
        self.passed = 0

    async def look(self) -> Look:
        """Read all that is committed, and then the clock."""
        *rows, rest = await self.watcher.fetch(LOOK)
        effects = [(int(e), g, int(c)) for e, g, c in (line.split() for line in rest["effects"] or ())]
        return Look(
            rest["due"] + self.passed,
            {(row["event_id"], row["consumer_group"]): row for row in rows},
            frozenset(rest["events"] or ()),
            effects,
            self.passed,
        )

    async def let_pass(self, seconds: int, inserted: dict[str, list[int]]) -> None:
        """Let time pass, for everything that is stored and for what publishers have *inserted* and not committed."""
        for name, ids in inserted.items():
            if ids:
                await _moved(self.publishers[name], seconds, f"event_id = ANY (ARRAY{ids})", f"id = ANY (ARRAY{ids})")
        await _moved(self.hands, seconds, "true", "true")
        by = f"- interval '{seconds} seconds'"
        await self.hands.execute(
            f"UPDATE pgebus.consumer_groups SET created_at = created_at {by};"
            # not created_at: it tells one subscription from the next of that name
            f"UPDATE pgebus.subscriptions SET declared_at = declared_at {by}, start_at = start_at {by}"
        )
        self.passed += seconds * 1_000_000


async def _moved(connection: Sql, seconds: int, deliveries: str, events: str) -> None:
    by = f"- interval '{seconds} seconds'"
    await connection.execute(
        f"UPDATE pgebus.deliveries SET due_at = due_at {by}, claimed_at = claimed_at {by},"
        f" finished_at = finished_at {by} WHERE {deliveries};"
        f"UPDATE pgebus.events SET run_at = run_at {by}, created_at = created_at {by} WHERE {events}"
    )
