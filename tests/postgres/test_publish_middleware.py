"""Every event passes the publish middleware of its process once, before it is written, however it is published."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, insert, text
from sqlalchemy import event as hooks
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from tests.system.bus import Sql, finished, publish, running

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventPublisher,
    EventRouter,
    InvalidEventTypeError,
    InvalidPayloadError,
    MiddlewareError,
    PgebusError,
    PublishError,
    add_publish_middleware,
    publish_event,
    publish_event_sync,
    publish_events,
    publish_events_sync,
    remove_publish_middleware,
)
from pgebus._bulk import COPY_FROM

CallNext = Callable[[Event], None]
Middleware = Callable[[Event, CallNext], None]


@pytest.fixture
def adding() -> Iterator[Callable[[Middleware], Middleware]]:
    """Adds middleware for one test."""
    added: list[Middleware] = []

    def add(function: Middleware) -> Middleware:
        added.append(add_publish_middleware(function))
        return function

    yield add
    for each in added:
        remove_publish_middleware(each)


@pytest.fixture
def passed(adding: Callable[[Middleware], Middleware]) -> list[str]:
    """A middleware that stamps; the types of the events that it has seen."""
    seen: list[str] = []

    @adding
    def stamp(event: Event, call_next: CallNext) -> None:
        seen.append(event.type)
        event.headers = {**(event.headers or {}), "stamp": len(seen)}
        call_next(event)

    return seen


@pytest.fixture
def sync(database: DatabaseSettings) -> Iterator[Session]:
    """A synchronous session on the same database."""
    engine = create_engine(database.sqlalchemy_url().set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
async def session(sm: DatabaseSessionManager) -> AsyncIterator[AsyncSession]:
    async with sm.session() as session:
        yield session


async def stamps(sql: Sql) -> list[tuple[str, int | None]]:
    rows = await sql.fetch("SELECT type, headers FROM pgebus.events ORDER BY id")
    return [(row["type"], json.loads(row["headers"]).get("stamp")) for row in rows]


def row(event_type: str, **more: Any) -> dict[str, Any]:
    return {"type": event_type, "payload": {"a": 1}, **more}


async def test_in_an_asynchronous_session(session: AsyncSession, sql: Sql, passed: list[str]) -> None:
    session.add(Event(type="added"))
    await session.flush()
    event = await publish_event(session, "one", {}, "events")
    assert event.headers == {"stamp": 2}
    await publish_event(session, "once", {}, "events", dedup_key="k")
    await publish_event(session, "once", {}, "events", dedup_key="k")  # is there
    await publish_events(session, [Event(type="many"), Event(type="many", dedup_key="m")])
    await publish_events(session, [row("row")])
    await publish_events(session, [row("row.once", dedup_key="r")])
    await session.commit()
    assert passed == ["added", "one", "once", "once", "many", "many", "row", "row.once"]
    assert await stamps(sql) == [
        *(("added", 1), ("one", 2), ("once", 3), ("many", 5), ("many", 6), ("row", 7), ("row.once", 8)),
    ]


async def test_on_a_connection(sm: DatabaseSessionManager, sql: Sql, passed: list[str]) -> None:
    async with sm.engine.begin() as connection:
        await publish_event(connection, "one", {}, "events")
        await publish_event(connection, "once", {}, "events", dedup_key="k")
        await publish_events(connection, [Event(type="many"), Event(type="many")])
        await publish_events(connection, [row("row")])
    assert await stamps(sql) == [("one", 1), ("once", 2), ("many", 3), ("many", 4), ("row", 5)]


async def test_in_synchronous_code(sync: Session, sql: Sql, passed: list[str]) -> None:
    sync.add(Event(type="added"))
    publish_event_sync(sync, "one", {}, "events")
    publish_events_sync(sync, [Event(type="many")])
    publish_events_sync(sync, [row("row")])
    publish_event_sync(sync.connection(), "connected", {}, "events")
    sync.commit()
    # What is pending is flushed with what comes next, which has passed before.
    assert sorted(passed) == sorted(["added", "one", "many", "row", "connected"])
    assert {kind for kind, stamp in await stamps(sql) if stamp} == set(passed)


async def test_rows_that_go_by_copy(session: AsyncSession, sql: Sql, passed: list[str]) -> None:
    """They still do: no INSERT is sent."""
    sent: list[str] = []
    hooks.listen(session.bind.sync_engine, "before_cursor_execute", lambda *given: sent.append(given[2]))  # type: ignore[union-attr]  # it has one
    ids = await publish_events(session, [row("row", key=str(number)) for number in range(COPY_FROM)])
    await session.commit()
    assert not [statement for statement in sent if "INSERT" in statement]
    assert len(ids) == len(passed) == COPY_FROM
    assert await stamps(sql) == [("row", number + 1) for number in range(COPY_FROM)]
    assert await sql.fetchval("SELECT count(DISTINCT key) FROM pgebus.events WHERE payload = '{\"a\": 1}'") == COPY_FROM


async def test_by_an_event_publisher(database: DatabaseSettings, sql: Sql, passed: list[str]) -> None:
    async with EventPublisher(database) as publisher:
        await publisher.publish("one", {"a": 1})
        await publisher.publish("two", {}, key="k", dedup_key="d", priority=3)
    assert await stamps(sql) == [("one", 1), ("two", 2)]


async def test_what_a_handler_publishes(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, passed: list[str]
) -> None:
    """It sees what has caused the event, with and without a transaction, and when the event was only added."""
    causes: list[tuple[str, Any]] = []
    router = EventRouter()

    def see(event: Event, call_next: CallNext) -> None:
        causes.append((event.type, (event.headers or {}).get("causation_id")))
        call_next(event)

    @router.on("a", transactional=True)
    async def transactional(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        ctx.session.add(Event(type="added"))
        await ctx.session.flush()
        await ctx.publish("published", {})
        await publish_events(ctx.session, [row("row")])

    @router.on("b")
    async def alone(ctx: EventContext, payload: dict[str, Any]) -> None:
        await ctx.publish("alone", {})

    add_publish_middleware(see)
    try:
        async with running(router, database):
            first, second = await publish(sm, "a"), await publish(sm, "b")
            await finished(sql, first, second)
    finally:
        remove_publish_middleware(see)
    kinds = ("added", "published", "row")
    assert sorted(each for each in causes if each[1]) == sorted(
        [*((kind, str(first)) for kind in kinds), ("alone", str(second))]
    )
    assert all(stamp for _, stamp in await stamps(sql))


async def test_the_first_that_was_added_is_the_outermost(
    session: AsyncSession, adding: Callable[[Middleware], Middleware]
) -> None:
    seen: list[str] = []

    def noting(name: str) -> Middleware:
        def middleware(event: Event, call_next: CallNext) -> None:
            seen.append(f"{name} in")
            call_next(event)
            seen.append(f"{name} out")

        return middleware

    adding(noting("one"))
    adding(noting("two"))
    await publish_event(session, "a", {}, "events")
    assert seen == ["one in", "two in", "two out", "one out"]


def _never(event: Event, call_next: CallNext) -> None: ...


def _twice(event: Event, call_next: CallNext) -> None:
    call_next(event)
    call_next(event)


def _another(event: Event, call_next: CallNext) -> None:
    call_next(Event(type="other"))


def _awaited(event: Event, call_next: CallNext) -> Any:
    async def later() -> None: ...

    return later()


def _retyped(event: Event, call_next: CallNext) -> None:
    event.type = "not dotted words"
    call_next(event)


def _in_place(event: Event, call_next: CallNext) -> None:
    event.payload["bad"] = float("nan")
    call_next(event)


@pytest.mark.parametrize(
    ("middleware", "error"),
    [
        (_never, MiddlewareError),
        (_twice, MiddlewareError),
        (_another, MiddlewareError),
        (_awaited, MiddlewareError),
        (_retyped, InvalidEventTypeError),
        (_in_place, InvalidPayloadError),
    ],
)
@pytest.mark.parametrize("way", ["call", "added", "rows", "publisher"])
async def test_a_mistake_refuses_the_event(
    session: AsyncSession,
    database: DatabaseSettings,
    sql: Sql,
    adding: Callable[[Middleware], Middleware],
    middleware: Middleware,
    error: type[PgebusError],
    way: str,
) -> None:
    """Nothing is written, and where nothing was being flushed the session goes on."""
    adding(middleware)

    async def try_it() -> None:
        if way == "call":
            await publish_event(session, "a", {"a": 1}, "events")
        elif way == "added":
            session.add(Event(type="a", payload={"a": 1}))
            await session.flush()
        elif way == "rows":
            await publish_events(session, [row("a") for _ in range(COPY_FROM)])
        else:
            async with EventPublisher(database) as publisher:
                await publisher.publish("a", {"a": 1})

    with pytest.raises(error):
        await try_it()
    if way != "added":
        await session.execute(text("SELECT 1"))
        assert not session.new
    await session.rollback()
    assert await stamps(sql) == []


async def test_an_error_names_its_event(session: AsyncSession, adding: Callable[[Middleware], Middleware]) -> None:
    @adding
    def refuse(event: Event, call_next: CallNext) -> None:
        if event.key == "1":
            raise PublishError("not that one")
        call_next(event)

    with pytest.raises(PublishError, match="not that one") as caught:
        await publish_events(session, [Event(type="a", key=str(number)) for number in range(3)])
    assert caught.value.__notes__ == ["That is events[1]."]


async def test_a_statement_that_would_go_around_it_is_refused(
    session: AsyncSession, sm: DatabaseSessionManager, sql: Sql, sync: Session, passed: list[str]
) -> None:
    """However it is written; also in a session that has just flushed events, which have passed."""
    await publish_events(session, [Event(type="a"), Event(type="a")])
    for refused in (insert(Event), insert(Event.__table__), insert(Event).values(type="b", payload={})):  # type: ignore[arg-type]  # the table of a class
        with pytest.raises(MiddlewareError):
            await session.execute(refused, [] if refused._values else [{"type": "b"}, {"type": "b"}])
    async with sm.engine.connect() as connection:
        with pytest.raises(MiddlewareError):
            await connection.execute(insert(Event), {"type": "b"})
    with pytest.raises(MiddlewareError):
        sync.bulk_save_objects([Event(type="b")])
    await session.commit()
    assert await stamps(sql) == [("a", 1), ("a", 2)]


async def test_without_one_nothing_is_in_the_way(session: AsyncSession, sql: Sql) -> None:
    def middleware(event: Event, call_next: CallNext) -> None:
        raise AssertionError

    add_publish_middleware(middleware)
    remove_publish_middleware(middleware)
    session.add(Event(type="a"))
    await session.execute(insert(Event), [{"type": "b"}])
    await publish_events(session, [row("c")])
    await session.commit()
    assert [kind for kind, _ in await stamps(sql)] == ["a", "b", "c"]


async def test_an_event_passes_once(session: AsyncSession, sql: Sql, passed: list[str]) -> None:
    """Though its flush is tried again."""
    await publish_event(session, "a", {}, "events", dedup_key="k")
    await session.commit()
    event = Event(type="b", dedup_key="k")
    session.add(event)
    with pytest.raises(IntegrityError):
        await session.flush()
    await session.rollback()
    event.dedup_key = None
    session.add(event)
    await session.commit()
    assert passed == ["a", "b"]
    assert await stamps(sql) == [("a", 1), ("b", 2)]
