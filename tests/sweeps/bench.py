"""What a sweep runs on: a database with a ledger, a proxy, and systems that connect through it.

Time limits are shortened here, and nothing else is changed about the library.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from pgebus import DatabaseSettings, EventSystem
from pgebus._runtime import connecting
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line
from pgebus.database import make_engine
from tests.sweeps.cutting import CuttingProxy
from tests.sweeps.handlers import EFFECTS, TABLES, router_for
from tests.system.bus import Sql, settings
from tests.system.faults import connect
from tests.system.processes import Inquest, watched
from tests.system.waiting import until

# Instead of 15 seconds. Where a machine is so busy that this is merely slow, it is one more fault.
PATIENCE: Final = 1.0
# The worker's own statements get more: a claim that was given up here, and is executed later, is only found by a look
# that comes once in a while, and that is made rare here.
_LINE_PATIENCE: Final = 5 * PATIENCE
_WORKER: Final = {"n_workers": 1, "poll_interval_seconds": 1.0, "recovery_grace_seconds": 0.2}
_ENGINES: Final = ("control", "handlers", "listen")
_STATEMENTS: Final = Statements("pgebus")
# The line of a connection of ours is known by the first of these that it executes.
ROLES: Final = {
    _STATEMENTS.leases_of: "claims",
    _STATEMENTS.suspects: "claims",
    _STATEMENTS.complete: "writes",
    _STATEMENTS.release: "writes",
    _STATEMENTS.reschedule: "writes",
    _STATEMENTS.bury: "writes",
    _STATEMENTS.owners: "rounds",
}


def _shorter(patience: float) -> dict[str, Any]:
    return {
        "pgebus.system.Line": partial(Line, within=max(patience, _LINE_PATIENCE)),
        "pgebus.publisher.Line": partial(Line, within=patience),
        # What the server ends by itself, so that nothing goes on there that was given up here.
        "pgebus._runtime.connecting.ANSWER_SECONDS": max(patience, _LINE_PATIENCE),
        # Whatever is only found by looking once in a while would be found by these tests too late.
        "pgebus._runtime.claiming.STRAYS_SECONDS": 60.0,
        "pgebus._runtime.transacting.BEGIN_SECONDS": patience,
        "pgebus._runtime.transacting.COMMIT_SECONDS": patience,
        "pgebus._runtime.transacting._CLEANUP_SECONDS": patience,
        "pgebus._runtime.listening.BEAT_SECONDS": 0.1,
        "pgebus._runtime.listening.ANSWER_SECONDS": patience,
        "pgebus._runtime.maintenance.LOOK_SECONDS": 0.05,
        "pgebus._runtime.supervision._WELL_AFTER_SECONDS": 0.02,
        "pgebus.system._LAST_WRITES_SECONDS": 2 * patience,
        "pgebus.database._CLOSE_SECONDS": patience,
    }


@contextmanager
def in_a_hurry(patience: float = PATIENCE) -> Iterator[None]:
    """Shorten what the library waits for, to *patience* seconds, and name its connections after its engines."""
    engines = 0

    def named(*args: Any, **options: Any) -> Any:
        nonlocal engines
        name = _ENGINES[engines % len(_ENGINES)]
        engines += 1
        return make_engine(*args, connect_args={"server_settings": {"application_name": name}}, **options)

    with ExitStack() as stack:
        for name, value in _shorter(patience).items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(connecting, "make_engine", named))
        stack.enter_context(patch("pgebus._runtime.maintenance.Coroner", watched(Inquest(), patient=False)))
        yield


@dataclass
class Bench:
    """One database, and what is known of it outside of it.

    Attributes:
        direct: The way to it that is never cut.
        proxied: The way that is.
        proxy: Cuts it.
        sql: A plain connection, to look.
        gate: Handlers of long jobs wait for it.
        inside: Set when one of them waits.
    """

    direct: DatabaseSettings
    proxied: DatabaseSettings
    proxy: CuttingProxy
    sql: Sql
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    inside: asyncio.Event = field(default_factory=asyncio.Event)
    seen: int = 0
    """Events up to this id have been checked."""

    def system(self, database: DatabaseSettings | None = None, **options: Any) -> EventSystem:
        """Return a system that connects through the proxy, or to *database*."""
        return system_on(database or self.proxied, self.gate, self.inside, **options)

    async def publish(self, **counts: int) -> None:
        """Publish events in one transaction, not through the proxy: `order_placed=3`."""
        types = [name.replace("_", ".") for name, count in counts.items() for _ in range(count)]
        await self.sql.execute(
            "INSERT INTO pgebus.events (type, payload) SELECT unnest($1::text[]), '{}' ORDER BY 1", types
        )

    async def finished(self, *, lost: int = 0, within: float = 20.0) -> None:
        """Wait until every delivery is completed; then make sure that nothing was lost, doubled, or half applied.

        Args:
            lost: How often a worker may have died with one in hand.
            within: Seconds.
        """

        async def none_left() -> bool:
            return not await self.sql.fetchval(
                "SELECT count(*) FROM pgebus.deliveries WHERE event_id > $1 AND status <> 'completed'", self.seen
            )

        late = ""
        try:
            await until(none_left, within)
        except AssertionError:
            late = f"not finished within {within} s"
        rows = await self.sql.fetch(
            "SELECT e.id, e.type, d.status, d.attempt, d.lost, left(d.errors::text, 600) AS errors,"
            " (SELECT count(*) FROM effects f WHERE f.event_id = e.id) AS effects,"
            " (SELECT count(DISTINCT f.handler) FROM effects f WHERE f.event_id = e.id) AS handlers"
            " FROM pgebus.events e LEFT JOIN pgebus.deliveries d ON d.event_id = e.id WHERE e.id > $1 ORDER BY e.id",
            self.seen,
        )
        wrong = [dict(row) for row in rows if not _is_right(row, lost)]
        assert not wrong, (late, wrong)
        assert not late
        self.seen = max((row["id"] for row in rows), default=self.seen)

    async def at_rest(self, system: EventSystem | None) -> None:
        """Wait until nothing is open but what *system*, if it runs, has at rest: connections, transactions, locks."""
        limits = {"control": 3, "handlers": 1, "listen": 1} if system is not None else {}

        async def check() -> dict[str, Any] | None:
            rows = await self.sql.fetch(
                "SELECT application_name AS name, count(*) AS connections, count(xact_start) AS transactions,"
                " (SELECT count(*) FROM pg_locks l JOIN pg_database b ON b.oid = l.database"
                " WHERE l.locktype = 'advisory' AND b.datname = current_database()) AS locks"
                " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() GROUP BY 1"
            )
            found = {row["name"]: row["connections"] for row in rows}
            excess = {name: count for name, count in found.items() if count > limits.get(name, 0)}
            locks = max((row["locks"] for row in rows), default=0)
            held = (len(system._crew), len(system._holdings)) if system is not None else (0, 0)
            unwell = system is not None and not system.health().ok
            handlers = sum(row["transactions"] for row in rows if row["name"] == "handlers")
            self._state = {
                "too many connections": excess, "open transactions": handlers, "locks": locks, "held": held,
                "unwell": unwell,
            }  # fmt: skip
            at_rest = not excess and not handlers and locks == bool(system) and held == (0, 0) and not unwell
            return self._state if at_rest else None

        try:
            await until(check, within=10.0)
        except AssertionError:
            raise AssertionError(f"not at rest: {self._state}") from None

    _state: dict[str, Any] = field(default_factory=dict)


def system_on(database: DatabaseSettings, gate: asyncio.Event, inside: asyncio.Event, **options: Any) -> EventSystem:
    """Return a system with the handlers of the sweeps, one at a time."""
    return EventSystem(router_for(gate, inside), settings(database, **{**_WORKER, **options}))


def _is_right(row: asyncpg.Record, lost: int) -> bool:
    """Return whether a delivery is completed, and each of its handlers has had its effect once."""
    effects = EFFECTS.get(row["type"], 0)
    # One more where a fault was charged to it, or a worker was killed, and two for a busy machine; and the one that
    # fails on purpose.
    attempts = 4 + (row["type"] == "order.refused")
    done = row["status"] == "completed" and row["effects"] == row["handlers"] == effects
    return bool(done and row["lost"] <= lost and row["attempt"] <= attempts)


@asynccontextmanager
async def bench(database: DatabaseSettings) -> AsyncIterator[Bench]:
    """Make a bench on a migrated database."""
    sql = await connect(database)
    try:
        await sql.execute(TABLES)
        async with CuttingProxy(database.sqlalchemy_url(), ROLES) as proxy:
            proxied = DatabaseSettings.model_validate(
                {"url": proxy.text_url(), "connect_timeout_seconds": PATIENCE, "application_name": "publisher"}
            )
            yield Bench(database.model_copy(update={"application_name": "direct"}), proxied, proxy, sql)
    finally:
        sql.terminate()


DRIVER_ERRORS: Final = (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, EOFError)
