"""What a handler may ask for: a type for its payload, a thread, a time limit, a policy; and what it publishes."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from typing_extensions import TypedDict

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    InvalidHandlerError,
    Retry,
    RetryPolicy,
    publish_event,
)
from tests.system.bus import Sql, delivery, finished, publish, running


class Placed(BaseModel):
    order_id: int
    note: str = "none"


@dataclass
class Paid:
    amount: float


class Shipped(TypedDict):
    where: str


async def test_a_payload_comes_as_what_the_handler_takes(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[object] = []
    router = EventRouter()

    @router.on("placed")
    async def placed(_ctx: EventContext, payload: Placed) -> None:
        seen.append(payload)

    @router.on("paid")
    async def paid(_ctx: EventContext, payload: Paid) -> None:
        seen.append(payload)

    @router.on("shipped", transactional=True)
    async def shipped(_ctx: EventContext, payload: Shipped) -> None:
        seen.append(payload)

    @router.on("either")
    async def either(_ctx: EventContext, payload: Placed | Paid) -> None:
        seen.append(payload)

    async with running(router, database):
        for event_type, payload in (
            ("placed", {"order_id": "7", "more": 1}),
            ("paid", {"amount": 1}),
            ("shipped", {"where": "here"}),
            ("either", {"amount": 2.5}),
        ):
            await finished(sql, await publish(sm, event_type, payload))
        async with sm.session() as session:
            for made in (Placed(order_id=8), Paid(3.5)):
                event_type = type(made).__name__.lower()
                await publish_event(session, event_type, made, "events")
            await session.commit()
        await finished(sql, 5, 6)
    assert seen == [
        Placed(order_id=7), Paid(1.0), {"where": "here"}, Paid(2.5), Placed(order_id=8), Paid(3.5)
    ]  # fmt: skip


async def test_a_payload_that_does_not_fit_is_dead_at_once_and_says_where(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Without its values; unless the handler's policy says that it may fit later."""
    router = EventRouter()

    @router.on("placed", transactional=True)
    async def placed(_ctx: EventContext, payload: Placed) -> None: ...

    @router.on("patient", retry=RetryPolicy(max_attempts=2, first=timedelta(0), dead_on=()))
    async def patient(_ctx: EventContext, payload: Placed) -> None: ...

    async with running(router, database):
        first = await publish(sm, "placed", {"order_id": "canary-4711"})
        second = await publish(sm, "patient", {})
        await finished(sql, first, second, status="dead")
    found = await delivery(sql, first)
    assert found["attempt"] == 1
    assert "PayloadValidationError" in found["errors"]
    assert "order_id: Input should be a valid integer" in found["errors"]
    assert "canary" not in found["errors"]
    assert (await delivery(sql, second))["attempt"] == 2


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


async def test_a_plain_function_runs_in_a_thread_without_the_session(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[Any] = []
    router = EventRouter()

    @router.on("a", transactional=True)
    async def first(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        variable.set("from the task")

    @router.on("a")
    def second(ctx: EventContext, payload: Placed) -> None:
        seen.append((ctx.session, ctx.event.id == ctx.event_id, payload.order_id, variable.get()))
        seen.append(threading.current_thread() is not threading.main_thread())

    @router.on("b", retry=RetryPolicy(max_attempts=1))
    def fails(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        raise LookupError("from a thread")

    @router.on("c", retry=RetryPolicy(max_attempts=1))
    def forgets(ctx: EventContext, payload: dict[str, Any]) -> Any:
        return first(ctx, payload)

    with pytest.raises(InvalidHandlerError, match="async def"):
        router.on("d", transactional=True)(second)
    async with running(router, database):
        await finished(sql, await publish(sm, "a", {"order_id": 7}))
        dead = [await publish(sm, "b"), await publish(sm, "c")]
        await finished(sql, *dead, status="dead")
    assert seen == [(None, True, 7, "from the task"), True]
    assert "from a thread" in (await delivery(sql, dead[0]))["errors"]
    assert "returned something to be awaited" in (await delivery(sql, dead[1]))["errors"]


async def test_a_handler_has_the_time_that_it_is_given(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """What it has written in a transaction is undone, and its slot is free again."""
    await sql.execute("CREATE TABLE effects (n int)")
    router = EventRouter()
    short = {"timeout": timedelta(seconds=0.05), "retry": RetryPolicy(max_attempts=2, first=timedelta(0))}
    cancelled = 0

    @router.on("a", transactional=True, **short)  # type: ignore[arg-type]  # two kinds of values
    async def writes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO effects VALUES (1)"))
        await asyncio.Future()

    @router.on("b", **short)  # type: ignore[arg-type]  # two kinds of values
    async def waits(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        nonlocal cancelled
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async with running(router, database, n_workers=1):
        events = [await publish(sm, "a"), await publish(sm, "b")]
        await finished(sql, *events, status="dead")
    assert await sql.fetchval("SELECT count(*) FROM effects") == 0
    assert cancelled == 2
    for each in events:
        assert "TimeoutError" in (await delivery(sql, each))["errors"]


async def test_the_policy_of_the_handler_that_failed_decides(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    calls: list[str] = []
    router = EventRouter()

    @router.on("a", retry=RetryPolicy(max_attempts=9, first=timedelta(0), ceiling=timedelta(0)))
    async def patient(ctx: EventContext, _payload: dict[str, Any]) -> None:
        calls.append("patient")
        if ctx.attempt < 4:
            raise Retry(timedelta(0))

    @router.on("a", retry=RetryPolicy(max_attempts=5, first=timedelta(0), dead_on=(KeyError,)))
    async def strict(ctx: EventContext, _payload: dict[str, Any]) -> None:
        calls.append("strict")
        raise LookupError if ctx.attempt < 5 else RuntimeError

    @router.on("b", retry=RetryPolicy(dead_on=(LookupError,)))
    async def final(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        raise KeyError("a LookupError, too")

    async with running(router, database, max_attempts=2):
        first, second = await publish(sm, "a"), await publish(sm, "b")
        await finished(sql, first, second, status="dead")
    assert calls == ["patient"] * 4 + ["strict"] * 2
    found = await delivery(sql, first)
    assert (found["attempt"], found["handled"]) == (5, [f"{__name__}.{patient.__qualname__}"])
    assert (await delivery(sql, second))["attempt"] == 1


@pytest.mark.parametrize("transactional", [True, False])
async def test_what_a_handler_publishes_says_what_caused_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    router = EventRouter()

    @router.on("first", transactional=transactional)
    async def first(ctx: EventContext, _payload: dict[str, Any]) -> None:
        await ctx.publish("second", {"n": 1}, headers={"mine": True}, key="k")

    @router.on("second", transactional=transactional)
    async def second(ctx: EventContext, payload: dict[str, Any]) -> None:
        await ctx.publish("third", payload, "elsewhere")
        if ctx.attempt == 1:
            raise RuntimeError

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "x=1"}
    async with running(router, database):
        root = await publish(sm, "first", headers={**trace, "secret": 1})
        await finished(sql, root, root + 1)
    rows = await sql.fetch("SELECT type, channel, headers - 'mine' AS headers, key FROM pgebus.events ORDER BY id")
    # In a transaction the first attempt has published nothing; without one it has, and does so again.
    assert [(row["type"], row["channel"], row["key"]) for row in rows] == [
        ("first", "events", None),
        ("second", "events", "k"),
        *[("third", "elsewhere", None)] * (1 if transactional else 2),
    ]
    assert json.loads(rows[1]["headers"]) == {"correlation_id": str(root), "causation_id": str(root), **trace}
    for row in rows[2:]:
        assert json.loads(row["headers"]) == {"correlation_id": str(root), "causation_id": str(root + 1), **trace}
