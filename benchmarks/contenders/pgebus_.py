"""pgebus, through its public interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic, perf_counter
from typing import Any

from common import SLOTS, Tally, cpu, in_parallel, main, payload, ready, trickle
from sqlalchemy import insert, text

from pgebus import (
    DatabaseSessionManager,
    Event,
    EventContext,
    EventPublisher,
    EventRouter,
    EventSystem,
    Group,
    Settings,
    publish_event,
    publish_events,
)
from pgebus.migrations import upgrade

Options = dict[str, Any]
TYPE = "order.placed"
UNFINISHED = "SELECT count(*) FROM pgebus.deliveries WHERE status = 'running' OR status = 'pending' AND due_at <= now()"


def settings(options: Options) -> Settings:
    """Return settings for the database that *options* name."""
    url = options["dsn"].replace("postgresql://", "postgresql+asyncpg://", 1)
    return Settings.model_validate(
        {
            "database": {"url": url, "pool_size": options.get("connections", 5)},
            "event_system": {"n_workers": options.get("slots", SLOTS), **options.get("event_system", {})},
        }
    )


async def prepare(options: Options) -> None:
    """Make the tables, and the subscription, which a worker would make at its first start."""
    await asyncio.to_thread(upgrade, settings(options).database)
    router = EventRouter()
    router.on(TYPE)(_nothing)
    async with EventSystem(router, settings(options)):
        pass


async def fill(options: Options) -> Options:
    """Publish many in one call after another."""
    events, size = options["events"], options.get("batch", 1_000)
    delay = options.get("delay_seconds", 0)
    run_at = datetime.now(UTC) + timedelta(seconds=delay) if delay else None
    more: dict[str, Any] = {"run_at": run_at} if run_at else {}
    spread = options.get("priorities", 1)
    filler = "x" * options.get("extra_bytes", 0)
    async with DatabaseSessionManager(settings(options).database) as manager:
        began = perf_counter()
        for first in range(0, events, size):
            numbers = range(first, min(first + size, events))
            async with manager.session() as session:
                await publish_events(
                    session,
                    [
                        {
                            "type": options.get("type", TYPE),
                            "payload": payload(number) | ({"filler": filler} if filler else {}),
                            **({"priority": number % spread} if spread > 1 else {}),
                            **more,
                        }
                        for number in numbers
                    ],
                )
                await session.commit()
        return {"seconds": perf_counter() - began}


async def publish(options: Options) -> Options:
    """Publish one event in each transaction: as such, or in a session, as one does that has something else to write."""
    began = cpu()
    if not options.get("in_sessions"):
        connections = options["connections"]
        async with EventPublisher(settings(options).database, connections=connections) as alone:

            @asynccontextmanager
            async def publisher() -> AsyncIterator[Any]:
                yield lambda number: alone.publish(TYPE, payload(number))

            async with asyncio.TaskGroup() as group:  # all of its connections are open
                for _ in range(connections):
                    group.create_task(alone.publish("warm.up", {}, "elsewhere"))
            seconds = await in_parallel(options["events"], connections, publisher)
            return {"seconds": seconds, "cpu": cpu() - began}
    async with DatabaseSessionManager(settings(options).database) as manager:

        @asynccontextmanager
        async def publisher_of_session() -> AsyncIterator[Any]:
            async with manager.session() as session:
                await session.execute(text("SELECT 1"))
                await session.commit()

                async def one(number: int) -> None:
                    await publish_event(session, TYPE, payload(number), "events")
                    await session.commit()

                yield one

        seconds = await in_parallel(options["events"], options["connections"], publisher_of_session)
        return {"seconds": seconds, "cpu": cpu() - began}


def counting(router: EventRouter, tally: Tally, *, transactional: bool = False) -> None:
    """Register a handler that counts; with a transaction, it changes a row as well."""
    if not transactional:

        @router.on(TYPE)
        async def count(_ctx: EventContext, got: dict[str, Any]) -> None:
            tally.count(got["n"])

        return
    change = text("UPDATE business SET value = value + 1 WHERE id = :id")

    @router.on(TYPE, transactional=True)
    async def work(ctx: EventContext, got: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(change, {"id": got["n"]})
        tally.count(got["n"])


async def drain(options: Options) -> Options:
    """Handle everything that is due, or the first of it."""
    tally = Tally(options["events"])
    router = EventRouter(group=Group("default", keep_history=options.get("keep_history", True)))
    counting(router, tally, transactional=options.get("transactional", False))
    async with DatabaseSessionManager(settings(options).database) as manager, manager.engine.connect() as sql:

        async def unfinished() -> int:
            count: int = (await sql.execute(text(UNFINISHED))).scalar_one()
            await sql.rollback()
            return count

        await unfinished()  # it is connected

        async def handled() -> int:
            return 0

        async with EventSystem(router, settings(options)):
            return await tally.drained(handled if options.get("first_of_many") else unfinished)


async def share(options: Options) -> Options:
    """Handle what is due, beside other processes, until nothing is left."""
    tally = Tally(options["events"] + 1)
    router = EventRouter()
    counting(router, tally)
    async with DatabaseSessionManager(settings(options).database) as manager, manager.engine.connect() as sql:
        began = monotonic()
        async with EventSystem(router, settings(options)):
            while (await sql.execute(text(UNFINISHED))).scalar_one():
                await sql.rollback()
                await asyncio.sleep(0.01)
            return {"began": began, "ended": monotonic(), "calls": tally.calls}


async def listen(options: Options) -> Options:
    """Say when each event's handler began."""
    tally = Tally(options["events"])
    router = EventRouter()

    @router.on(TYPE)
    async def time(_ctx: EventContext, got: dict[str, Any]) -> None:
        tally.time(got["n"])

    async with EventSystem(router, settings(options)):
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Publish at an even pace."""
    async with EventPublisher(settings(options).database, connections=1) as alone:
        return await trickle(options["events"], options["per_second"], lambda n: alone.publish(TYPE, payload(n)))


async def inside(options: Options) -> Options:
    """In one transaction: publish, insert the same row with SQLAlchemy Core, add it to the session, in turns."""
    events, warm = options["events"], 200
    seconds = {"publish": 0.0, "insert": 0.0, "add": 0.0}
    async with DatabaseSessionManager(settings(options).database) as manager, manager.session() as session:
        for number in range(events + warm):
            if number == warm:
                seconds = dict.fromkeys(seconds, 0.0)
            began = perf_counter()
            await publish_event(session, TYPE, payload(number), "events")
            published = perf_counter()
            await session.execute(insert(Event.__table__).values(type=TYPE, payload=payload(number), channel="events"))
            inserted = perf_counter()
            session.add(Event(type=TYPE, payload=payload(number)))
            await session.flush()
            seconds["publish"] += published - began
            seconds["insert"] += inserted - published
            seconds["add"] += perf_counter() - inserted
        await session.rollback()
    return seconds


async def _nothing(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


if __name__ == "__main__":
    main(
        {
            "prepare": prepare,
            "fill": fill,
            "publish": publish,
            "inside": inside,
            "drain": drain,
            "share": share,
            "listen": listen,
            "trickle": slowly,
        }
    )
