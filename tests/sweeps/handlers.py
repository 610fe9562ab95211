"""The handlers of the sweeps, the same ones in a test's own process and in a child, and the tables of the ledger.

Effects have no unique constraint, which would hide a double.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import text

from pgebus import EventContext, EventRouter

TABLES: Final = """
CREATE TABLE orders (number bigint NOT NULL);
CREATE TABLE effects (event_id bigint NOT NULL, handler text NOT NULL);
"""
# Transactional types, and how many of their handlers leave an effect.
EFFECTS: Final = {"order.placed": 2, "order.refused": 1, "job.long": 1}
# A statement of a handler waits for its answer as long as the handler may: that is the application's to decide.
_LIMIT: Final = timedelta(seconds=1)


def router_for(gate: asyncio.Event, inside: asyncio.Event, limit: timedelta = _LIMIT) -> EventRouter:
    """Return the handlers.

    Args:
        gate: Handlers of `job.long` wait for it.
        inside: Set when one of them has written.
        limit: The time that the others have.
    """
    router = EventRouter()

    async def effect(ctx: EventContext, handler: str) -> None:
        assert ctx.session is not None
        await ctx.session.execute(
            text("INSERT INTO effects VALUES (:event_id, :handler)"), {"event_id": ctx.event_id, "handler": handler}
        )

    @router.on("order.placed", transactional=True, name="reserve", timeout=limit)
    async def reserve(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx, "reserve")

    @router.on("order.placed", transactional=True, name="bill", timeout=limit)
    async def bill(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx, "bill")

    @router.on("order.refused", transactional=True, name="refuse", timeout=limit)
    async def refuse(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx, "refuse")
        if ctx.attempt == 1:
            raise RuntimeError("as told")

    @router.on("job.long", transactional=True, name="long")
    async def long(ctx: EventContext, payload: dict[str, Any]) -> None:
        await effect(ctx, "long")
        inside.set()
        await gate.wait()

    @router.on("mail.sent", name="send")
    async def send(ctx: EventContext, payload: dict[str, Any]) -> None:
        pass

    return router
