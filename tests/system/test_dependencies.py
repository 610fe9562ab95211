"""What handlers depend on is made for each call, inside their transaction, and closed with it."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from pgebus import DatabaseSessionManager, DatabaseSettings, EventContext, EventRouter, RetryPolicy
from pgebus.depends import Depends, provider
from tests.system.bus import Sql, delivery, finished, publish, running

ONCE = RetryPolicy(max_attempts=1)


class Order(BaseModel):
    order_id: int


class Repo:
    def __init__(self, ctx: EventContext) -> None:
        self.ctx = ctx


def name_of(payload: Order) -> str:
    return f"order {payload.order_id} in {threading.current_thread().name.partition('-')[0]}"


async def repo_of(ctx: EventContext, name: Annotated[str, Depends(name_of)]) -> list[object]:
    return [ctx.event_id, name]


RepoOf = Annotated[list[object], Depends(repo_of)]


@pytest.fixture(autouse=True)
def no_overrides() -> Iterator[None]:
    yield
    provider.clear()


async def test_every_way_to_say_it(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    """Annotated, an alias of it, a default, a class; positional or by name; in coroutines and in threads."""
    seen: list[object] = []
    router = EventRouter()

    @router.on("a")
    async def annotated(ctx: EventContext, payload: Order, repo: Annotated[list[object], Depends(repo_of)]) -> None:
        seen.append((payload, repo))

    @router.on("a")
    async def alias(ctx: EventContext, order: Order, *, repo: RepoOf, more: int = 3) -> None:
        seen.append((order, repo, more))

    @router.on("a")
    async def default(ctx: EventContext, payload: Order, name: str = Depends(name_of)) -> None:
        seen.append((payload, name))

    @router.on("a")
    async def made(ctx: EventContext, payload: Order, repo: Annotated[Repo, Depends(Repo)]) -> None:
        seen.append((payload, repo.ctx is ctx))

    @router.on("a")
    def threaded(ctx: EventContext, payload: Order, repo: RepoOf) -> None:
        seen.append((payload, repo))

    async with running(router, database):
        event_id = await publish(sm, "a", {"order_id": "7"})
        await finished(sql, event_id)
    order, name = Order(order_id=7), "order 7 in AnyIO worker thread"
    assert seen == [
        (order, [event_id, name]),
        (order, [event_id, name], 3),
        (order, name),
        (order, True),
        (order, [event_id, name]),
    ]


async def test_one_is_made_once_for_each_call(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    """However many depend on it, and anew for the next handler; use_cache=False makes it each time."""
    made: list[str] = []

    async def shared() -> object:
        made.append("shared")
        return object()

    async def fresh() -> object:
        made.append("fresh")
        return object()

    async def one(it: Annotated[object, Depends(shared)]) -> object:
        return it

    async def two(it: Annotated[object, Depends(shared)]) -> object:
        return it

    router = EventRouter()
    same: list[bool] = []

    async def handler(
        ctx: EventContext,
        payload: dict[str, Any],
        a: Annotated[object, Depends(one)],
        b: Annotated[object, Depends(two)],
        c: Annotated[object, Depends(fresh, use_cache=False)],
        d: Annotated[object, Depends(fresh, use_cache=False)],
    ) -> None:
        same.append(a is b)
        same.append(c is d)

    router.on("a", name="first")(handler)
    router.on("b", name="second")(handler)
    async with running(router, database):
        await finished(sql, await publish(sm, "a"), await publish(sm, "b"))
    assert same == [True, False] * 2
    assert sorted(made) == ["fresh"] * 4 + ["shared"] * 2


async def test_what_yields_is_closed_inside_the_transaction(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """After the handler and before the commit: what it writes at its end is part of it, and gone when that failed."""
    await sql.execute("CREATE TABLE noted (what text)")
    order: list[str] = []

    async def notes(ctx: EventContext) -> AsyncIterator[Any]:
        assert ctx.session is not None
        execute = ctx.session.execute
        try:
            yield execute
        except LookupError:
            order.append("saw it")
            raise
        finally:
            order.append("closed")
            await execute(text("INSERT INTO noted VALUES ('closed')"))

    router = EventRouter()

    @router.middleware
    async def around(ctx: EventContext, call_next: Callable[[EventContext], Awaitable[None]]) -> None:
        try:
            await call_next(ctx)
        finally:
            order.append("middleware")

    @router.on("a", transactional=True, retry=ONCE)
    async def handler(ctx: EventContext, payload: dict[str, Any], execute: Annotated[Any, Depends(notes)]) -> None:
        await execute(text("INSERT INTO noted VALUES ('handler')"))
        order.append("handler")
        if payload.get("fail"):
            raise LookupError

    async with running(router, database):
        await finished(sql, await publish(sm, "a", {"fail": True}), status="dead")
        assert await sql.fetchval("SELECT count(*) FROM noted") == 0
        await finished(sql, await publish(sm, "a"))
    assert [row[0] for row in await sql.fetch("SELECT what FROM noted")] == ["handler", "closed"]
    assert order == ["handler", "saw it", "closed", "middleware", "handler", "closed", "middleware"]


async def test_what_yields_cannot_hide_a_failure(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Neither an error nor the cancellation of a time limit."""
    forever = asyncio.Event()

    async def swallowing() -> AsyncIterator[None]:
        with suppress(BaseException):
            yield

    router = EventRouter()

    @router.on("a", retry=ONCE, timeout=timedelta(milliseconds=50))
    async def handler(ctx: EventContext, payload: dict[str, Any], _: Annotated[None, Depends(swallowing)]) -> None:
        if payload.get("late"):
            await forever.wait()
        raise LookupError("inside")

    async with running(router, database):
        ids = [await publish(sm, "a"), await publish(sm, "a", {"late": True})]
        await finished(sql, *ids, status="dead")
    errors = [json.loads((await delivery(sql, each))["errors"])[-1]["type"] for each in ids]
    assert errors == ["LookupError", "TimeoutError"]


async def test_a_failing_dependency_is_a_failure_of_its_handler(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Which does not run, and whose policy decides; what was made before is closed."""
    closed: list[str] = []

    async def opened() -> AsyncIterator[str]:
        yield "open"
        closed.append("never")

    async def broken(it: Annotated[str, Depends(opened)]) -> None:
        raise ConnectionError(it)

    async def also_opened() -> AsyncIterator[None]:
        try:
            yield
        finally:
            closed.append("also")

    router = EventRouter()

    @router.on("a", name="poor", retry=RetryPolicy(dead_on=(ConnectionError,)))
    async def handler(
        ctx: EventContext,
        payload: dict[str, Any],
        first: Annotated[None, Depends(also_opened)],
        second: Annotated[None, Depends(broken)],
    ) -> None:
        closed.append("ran")

    async with running(router, database):
        event_id = await publish(sm, "a")
        await finished(sql, event_id, status="dead")
    found = json.loads((await delivery(sql, event_id))["errors"])[-1]
    assert (found["handler"], found["type"], found["message"]) == ("poor", "ConnectionError", "open")
    assert closed == ["also"]


async def test_a_payload_that_does_not_fit_makes_nothing(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    made: list[object] = []
    router = EventRouter()

    async def dependency(payload: Order) -> None:
        made.append(payload)

    @router.on("a")
    async def handler(ctx: EventContext, payload: Order, _: Annotated[None, Depends(dependency)]) -> None: ...

    async with running(router, database):
        event_id = await publish(sm, "a", {"order_id": "seven"})
        await finished(sql, event_id, status="dead")
    found = json.loads((await delivery(sql, event_id))["errors"])[-1]
    assert found["type"] == "pgebus.errors.PayloadValidationError"
    assert made == []


async def test_a_test_replaces_a_dependency(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    """While the system runs, at every depth, by one that has dependencies itself."""
    seen: list[object] = []
    router = EventRouter()

    @router.on("a")
    async def handler(ctx: EventContext, payload: Order, repo: RepoOf) -> None:
        seen.append(repo[1])

    async def fake(ctx: EventContext) -> str:
        return f"fake {ctx.event_id}"

    async with running(router, database):
        first = await publish(sm, "a", {"order_id": 1})
        await finished(sql, first)
        provider.override(name_of, fake)
        second = await publish(sm, "a", {"order_id": 2})
        await finished(sql, second)
        provider.clear()
        await finished(sql, await publish(sm, "a", {"order_id": 3}))
    assert seen == [
        "order 1 in AnyIO worker thread",
        f"fake {second}",
        "order 3 in AnyIO worker thread",
    ]
