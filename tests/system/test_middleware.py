"""What stands around handlers runs in their transaction, their time and their failures."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    MiddlewareError,
    Reject,
    Retry,
    RetryPolicy,
    SessionControlError,
    Snooze,
)
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.waiting import until

CallNext = Callable[[EventContext], Awaitable[None]]
ONCE = RetryPolicy(max_attempts=1)


def failure(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["errors"])[-1]
    return found


async def test_the_outermost_router_comes_first_then_the_order_of_registration(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Also for handlers and routers that were there before the middleware, and for plain functions."""
    seen: list[str] = []

    def noting(name: str) -> Any:
        async def middleware(ctx: EventContext, call_next: CallNext) -> None:
            seen.append(f"{name} in")
            await call_next(ctx)
            seen.append(f"{name} out")

        return middleware

    outer, inner = EventRouter(), EventRouter("inner")

    @inner.on("a")
    async def first(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append("first")

    outer.include_router(inner)
    inner.middleware(noting("inner"))
    outer.middleware(noting("outer 1"))
    outer.middleware(noting("outer 2"))

    @inner.on("a")
    def second(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append("second")

    @outer.on("inner.a")
    async def third(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append("third")

    async with running(outer, database):
        await finished(sql, await publish(sm, "inner.a"))

        assert seen == [
            *("outer 1 in", "outer 2 in", "inner in", "first", "inner out", "outer 2 out", "outer 1 out"),
            *("outer 1 in", "outer 2 in", "inner in", "second", "inner out", "outer 2 out", "outer 1 out"),
            *("outer 1 in", "outer 2 in", "third", "outer 2 out", "outer 1 out"),
        ]
        seen.clear()
        inner.middleware(noting("late"))  # while it runs
        await finished(sql, await publish(sm, "inner.a"))
        assert seen[:5] == ["outer 1 in", "outer 2 in", "inner in", "late in", "first"]


async def test_it_writes_in_the_transaction_of_the_handler(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """What it wrote before and after is there with the completion, and gone when the handler or itself fails."""
    await sql.execute("CREATE TABLE noted (what text)")
    router = EventRouter()
    refused: list[type[BaseException]] = []

    @router.middleware
    async def write(ctx: EventContext, call_next: CallNext) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO noted VALUES ('before')"))
        try:
            await ctx.session.execute(text("COMMIT"))
        except SessionControlError as error:
            refused.append(type(error))
        await call_next(ctx)
        await ctx.session.execute(text("INSERT INTO noted VALUES ('after')"))
        if ctx.event.payload.get("fail after"):
            raise LookupError("after")

    @router.on("a", transactional=True, name="handler", retry=ONCE)
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO noted VALUES ('handler')"))
        if payload.get("fail"):
            raise LookupError("inside")

    async with running(router, database):
        dead = [await publish(sm, "a", {"fail": True}), await publish(sm, "a", {"fail after": True})]
        await finished(sql, *dead, status="dead")
        assert await sql.fetchval("SELECT count(*) FROM noted") == 0
        await finished(sql, await publish(sm, "a"))
    assert [row[0] for row in await sql.fetch("SELECT what FROM noted")] == ["before", "handler", "after"]
    assert refused == [SessionControlError] * 3
    found = [failure(await delivery(sql, each)) for each in dead]
    assert [(each["handler"], each["type"], each["message"]) for each in found] == [
        ("handler", "LookupError", "inside"),
        ("handler", "LookupError", "after"),
    ]


@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_what_a_handler_raises_passes_through(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, threaded: bool
) -> None:
    """Errors and signals alike, as the very objects; and the policy of the handler decides about them."""
    seen: list[BaseException] = []
    router = EventRouter()
    wishes: dict[str, Exception] = {
        "dead": LookupError("no"),
        "reject": Reject("never"),
        "snooze": Snooze(timedelta(hours=1)),
        "retry": Retry(timedelta(hours=2)),
    }

    @router.middleware
    async def watch(ctx: EventContext, call_next: CallNext) -> None:
        try:
            await call_next(ctx)
        except BaseException as error:
            seen.append(error)
            raise

    def decide(wish: str) -> None:
        raise wishes[wish]

    if threaded:

        @router.on("a", retry=RetryPolicy(dead_on=(LookupError,)))
        def plain(ctx: EventContext, payload: dict[str, Any]) -> None:
            decide(payload["wish"])
    else:

        @router.on("a", retry=RetryPolicy(dead_on=(LookupError,)))
        async def coroutine(ctx: EventContext, payload: dict[str, Any]) -> None:
            decide(payload["wish"])

    async with running(router, database):
        ids = {wish: await publish(sm, "a", {"wish": wish}) for wish in wishes}
        await finished(sql, ids["dead"], ids["reject"], status="dead")
        await until(lambda: _waiting(sql, ids["snooze"], 0))
        await until(lambda: _waiting(sql, ids["retry"], 1))
    assert sorted(map(id, seen)) == sorted(map(id, wishes.values()))


async def _waiting(sql: Sql, event_id: int, attempt: int) -> bool:
    row = await delivery(sql, event_id)
    return (row["status"], row["attempt"]) == ("pending", attempt) and row["claim_seq"] == 1


async def test_what_a_middleware_swallows_is_no_failure(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.middleware
    async def forgive(ctx: EventContext, call_next: CallNext) -> None:
        with suppress(LookupError):
            await call_next(ctx)

    @router.on("a")
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise LookupError

    async with running(router, database):
        await finished(sql, await publish(sm, "a"))


async def test_the_error_of_a_middleware_is_that_of_the_handler_it_is_around(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The other one has succeeded and does not run again; the policy is that of the handler."""
    ran: list[str] = []
    router, broken = EventRouter(), EventRouter()
    router.include_router(broken)

    @broken.middleware
    async def fail(ctx: EventContext, call_next: CallNext) -> None:
        if ctx.attempt == 1:
            raise ConnectionError("refused")
        await call_next(ctx)

    @router.on("a", name="good", retry=ONCE)
    async def good(ctx: EventContext, payload: dict[str, Any]) -> None:
        ran.append("good")

    @broken.on("a", name="bad")
    async def bad(ctx: EventContext, payload: dict[str, Any]) -> None:
        ran.append("bad")

    async with running(router, database):
        event_id = await publish(sm, "a")
        await finished(sql, event_id)
    assert ran == ["good", "bad"]
    row = await delivery(sql, event_id)
    assert (row["attempt"], failure(row)["handler"], failure(row)["type"]) == (2, "bad", "ConnectionError")


async def _never(ctx: EventContext, call_next: CallNext) -> None: ...


async def _twice(ctx: EventContext, call_next: CallNext) -> None:
    await call_next(ctx)
    await call_next(ctx)


async def _again_after_a_failure(ctx: EventContext, call_next: CallNext) -> None:
    try:
        await call_next(ctx)
    except LookupError:
        await call_next(ctx)


async def _again_until_it_succeeds(ctx: EventContext, call_next: CallNext) -> None:
    for _ in range(3):
        try:
            await call_next(ctx)
        except (LookupError, MiddlewareError):
            logging.getLogger(__name__).info("once more")


async def _another_context(ctx: EventContext, call_next: CallNext) -> None:
    await call_next(object())  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize(
    ("middleware", "said", "calls"),
    [
        (_never, "returned without 'await call_next(ctx)'", 0),
        (_twice, "a second time", 1),
        (_again_after_a_failure, "a second time", 1),
        (_again_until_it_succeeds, "a second time", 1),
        (_another_context, "instead of the context", 0),
    ],
)
async def test_the_next_one_is_called_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, middleware: Any, said: str, calls: int
) -> None:
    ran: list[int] = []
    router = EventRouter()
    router.middleware(middleware)

    @router.on("a", retry=ONCE)
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        ran.append(ctx.event_id)
        if middleware in (_again_after_a_failure, _again_until_it_succeeds):
            raise LookupError

    async with running(router, database):
        event_id = await publish(sm, "a")
        await finished(sql, event_id, status="dead")
    found = failure(await delivery(sql, event_id))
    assert found["type"] == "pgebus.errors.MiddlewareError"
    assert said in found["message"]
    assert len(ran) == calls


async def test_a_timeout_includes_the_middleware(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Though it swallows the cancellation, before the handler as well as in it."""
    router = EventRouter()
    forever = asyncio.Event()

    @router.middleware
    async def swallow(ctx: EventContext, call_next: CallNext) -> None:
        try:
            if ctx.event.payload.get("before"):
                await forever.wait()
            await call_next(ctx)
        except asyncio.CancelledError:
            if ctx.event.payload.get("before"):
                raise

    @router.on("a", timeout=timedelta(milliseconds=50), retry=ONCE)
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        await forever.wait()

    async with running(router, database):
        ids = [await publish(sm, "a", {"before": True}), await publish(sm, "a")]
        await finished(sql, *ids, status="dead")
    assert [failure(await delivery(sql, each))["type"] for each in ids] == ["TimeoutError", "TimeoutError"]


async def test_a_plain_function_that_is_too_late_has_failed_whatever_the_middleware_makes_of_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router, gate, swallowed = EventRouter(), threading.Event(), asyncio.Event()

    @router.middleware
    async def swallow(ctx: EventContext, call_next: CallNext) -> None:
        try:
            await call_next(ctx)
        except TimeoutError:
            swallowed.set()

    @router.on("a", timeout=timedelta(milliseconds=50), retry=ONCE)
    def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        gate.wait(30)

    async with running(router, database):
        event_id = await publish(sm, "a")
        await asyncio.wait_for(swallowed.wait(), 10)
        gate.set()
        await finished(sql, event_id, status="dead")
    assert failure(await delivery(sql, event_id))["type"] == "TimeoutError"


@pytest.mark.parametrize("where", ["before", "inside", "after"])
@pytest.mark.parametrize("transactional", [False, True])
async def test_a_cancellation_that_is_swallowed_goes_on(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool, where: str
) -> None:
    """The system stops while it runs: the delivery is given back, and neither completed nor failed."""
    router = EventRouter()
    started, forever = asyncio.Event(), asyncio.Event()
    swallowed: list[BaseException] = []

    async def wait(here: str) -> None:
        if here == where:
            started.set()
            await forever.wait()

    @router.middleware
    async def swallow(ctx: EventContext, call_next: CallNext) -> None:
        try:
            await wait("before")
            await call_next(ctx)
            await wait("after")
        except asyncio.CancelledError as error:
            swallowed.append(error)

    @router.on("a", transactional=transactional)
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        await wait("inside")

    async with running(router, database) as system:
        event_id = await publish(sm, "a")
        await started.wait()
        await system.stop(wait_for_completion=False)
    assert len(swallowed) == 1
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"], row["claim_seq"]) == ("pending", 0, 1)


async def test_a_cancellation_of_the_handlers_own_is_its_failure(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Though a middleware has swallowed it: nobody has cancelled the delivery."""
    router = EventRouter()

    @router.middleware
    async def swallow(ctx: EventContext, call_next: CallNext) -> None:
        with suppress(asyncio.CancelledError):
            await call_next(ctx)

    @router.on("a", retry=ONCE)
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise asyncio.CancelledError

    async with running(router, database):
        event_id = await publish(sm, "a")
        await finished(sql, event_id, status="dead")
    assert failure(await delivery(sql, event_id))["type"] == "asyncio.exceptions.CancelledError"


async def test_a_handler_that_finishes_in_spite_of_its_cancellation_has_succeeded(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """As without a middleware."""
    router = EventRouter()
    started, forever = asyncio.Event(), asyncio.Event()

    @router.middleware
    async def nothing(ctx: EventContext, call_next: CallNext) -> None:
        await call_next(ctx)

    @router.on("a")
    async def handler(ctx: EventContext, payload: dict[str, Any]) -> None:
        started.set()
        try:
            await forever.wait()
        except asyncio.CancelledError:
            return

    async with running(router, database) as system:
        event_id = await publish(sm, "a")
        await started.wait()
        await system.stop(wait_for_completion=False)
    assert (await delivery(sql, event_id))["status"] == "completed"


async def test_context_variables_reach_the_handler(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Also the one in a thread; and no other delivery."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    seen: list[str] = []
    router = EventRouter()
    other = EventRouter()
    router.include_router(other)

    @other.middleware
    async def set_tenant(ctx: EventContext, call_next: CallNext) -> None:
        token = tenant.set(ctx.event.payload["tenant"])
        try:
            await call_next(ctx)
        finally:
            tenant.reset(token)

    @other.on("a")
    def plain(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(tenant.get())

    @other.on("a")
    async def coroutine(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(tenant.get())

    @router.on("a")
    async def outside(ctx: EventContext, payload: dict[str, Any]) -> None:
        seen.append(tenant.get())

    async with running(router, database):
        await finished(sql, await publish(sm, "a", {"tenant": "one"}))
    assert seen == ["one", "one", "none"]
