"""Publishers whose connection is cut at every message, and their ledger outside of PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from sqlalchemy import text

from pgebus import DatabaseSessionManager, EventPublisher, publish_event
from tests.sweeps.bench import DRIVER_ERRORS, PATIENCE, Bench
from tests.sweeps.conversations import NEVER
from tests.sweeps.cutting import Cut, Origin

Outcome: TypeAlias = Literal["ok", "failed", "unknown"]
Way: TypeAlias = Literal["publish", "connect and publish", "publish alone"]

WAYS: Final[tuple[Way, ...]] = ("publish", "connect and publish", "publish alone")


@dataclass
class Publishing:
    """A publisher, and what became of each of its transactions, as far as their client can tell.

    Attributes:
        bench: Where.
        kept: Sessions on connections that are kept.
        alone: Publishes without a transaction.
        outcomes: Of each number.
    """

    bench: Bench
    kept: DatabaseSessionManager
    alone: EventPublisher
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    async def cut(self, way: Way, cut: Cut) -> str | None:
        """Publish one event over a connection that is cut; return at which message."""
        if way != "connect and publish":
            await self._publish(way)  # so that there is a connection
        armed = self.bench.proxy.arm(cut, only_new=way == "connect and publish")
        await self._publish(way)
        self.bench.proxy.heal()
        return armed.message if armed.happened.is_set() else None

    async def messages_of(self, way: Way) -> dict[Origin, list[str]]:
        """Return the names of its messages."""
        await self._publish(way)
        armed = self.bench.proxy.arm(Cut("publisher", "client", NEVER, "before", "RST"))
        await self._publish(way)
        self.bench.proxy.heal()
        return armed.trace

    async def check(self) -> dict[int, bool]:
        """Make sure that the ledger agrees with the database; return which unknown transactions were committed."""
        sql = self.bench.sql
        orders = [row["number"] for row in await sql.fetch("SELECT number FROM orders")]
        events = await sql.fetch("SELECT type, (payload->>'number')::bigint AS number FROM pgebus.events")
        placed = [row["number"] for row in events if row["type"] == "order.placed"]
        assert sorted(orders) == sorted(placed), "the business row and the event go together"
        stored = {row["number"] for row in events}
        assert len(stored) == len(events)
        for number, outcome in self.outcomes.items():
            assert (number in stored) is (outcome == "ok") or outcome == "unknown", (number, outcome)
        return {number: number in stored for number, outcome in self.outcomes.items() if outcome == "unknown"}

    async def _publish(self, way: Way) -> None:
        number = len(self.outcomes) + 1
        self.outcomes[number] = "unknown"
        if way == "publish alone":
            try:
                await self.alone.publish("mail.sent", {"number": number})
                self.outcomes[number] = "ok"
            except DRIVER_ERRORS:
                pass
        elif way == "publish":
            await self._in_a_transaction(self.kept, number)
        else:
            async with DatabaseSessionManager(self.bench.proxied) as manager:
                await self._in_a_transaction(manager, number)

    async def _in_a_transaction(self, manager: DatabaseSessionManager, number: int) -> None:
        """Place an order and publish that."""
        outcome: Outcome = "failed"
        try:
            async with asyncio.timeout(PATIENCE), manager.session() as session:
                await session.execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})
                await publish_event(session, "order.placed", {"number": number}, "events")
                outcome = "unknown"
                await session.commit()
                outcome = "ok"
        except DRIVER_ERRORS:
            pass  # before COMMIT was sent it is a failure, after that nobody knows
        self.outcomes[number] = outcome


@asynccontextmanager
async def publishing(bench: Bench) -> AsyncIterator[Publishing]:
    """Make a publisher on a bench."""
    async with DatabaseSessionManager(bench.proxied) as kept, EventPublisher(bench.proxied, connections=1) as alone:
        yield Publishing(bench, kept, alone)
