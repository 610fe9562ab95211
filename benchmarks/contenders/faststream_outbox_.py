"""faststream-outbox, on SQLAlchemy and asyncpg, through its public interface."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter
from typing import Any

from common import SLOTS, Tally, in_parallel, main, payload, ready, trickle
from faststream_outbox import OutboxBroker, make_outbox_table, outbox_autovacuum_ddl
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

Options = dict[str, Any]
QUEUE = "events"
# How many rows it claims with one statement, and how many of those handled a slot deletes with one: the defaults are 10
# and 1. Larger ones gain nothing more, and a row is still deleted only after it was handled.
CLAIMED, DELETED = 1_000, 500
METADATA = MetaData()
TABLE = make_outbox_table(METADATA)
UNFINISHED = text("SELECT count(*) FROM outbox WHERE next_attempt_at <= now()")
LISTENING = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'")


@asynccontextmanager
async def made(options: Options, connections: int) -> AsyncIterator[tuple[AsyncEngine, OutboxBroker]]:
    """Make an engine and a broker."""
    url = options["dsn"].replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url, pool_size=connections)
    broker = OutboxBroker(
        engine,
        outbox_table=TABLE,
        logger=logging.getLogger("faststream_outbox"),  # it shows warnings; its own tells of each message
        apply_types=False,  # the handler gets the decoded body as it is, unchecked by pydantic, which is faster
    )
    try:
        yield engine, broker
    finally:
        await engine.dispose()


@asynccontextmanager
async def working(options: Options, note: Callable[[int], None]) -> AsyncIterator[AsyncEngine]:
    """Run a worker meanwhile whose handler calls *note*."""
    slots = options.get("slots", SLOTS)
    async with made(options, slots + 2) as (engine, broker):

        @broker.subscriber(
            QUEUE,
            max_workers=slots,
            fetch_batch_size=options.get("claimed", CLAIMED),
            terminal_flush_batch_size=options.get("deleted", DELETED),
        )
        async def handle(got: dict[str, Any]) -> None:
            note(got["n"])

        async with broker:  # this starts it
            yield engine


async def prepare(options: Options) -> None:
    """Make the table, and set its autovacuum as is advised."""
    async with made(options, 1) as (engine, _), engine.begin() as sql:
        await sql.run_sync(METADATA.create_all)
        await sql.execute(text(outbox_autovacuum_ddl()))


async def fill(options: Options) -> Options:
    """Publish a thousand with each statement."""
    events, delay = options["events"], options.get("delay_seconds", 0)
    after = timedelta(seconds=delay) if delay else None
    async with made(options, 1) as (engine, broker), engine.connect() as sql:
        began = perf_counter()
        for first in range(0, events, 1_000):
            bodies = [payload(number) for number in range(first, min(first + 1_000, events))]
            async with sql.begin():
                await broker.publish_batch(*bodies, queue=QUEUE, session=sql, activate_in=after)
        return {"seconds": perf_counter() - began}


@asynccontextmanager
async def publishing(engine: AsyncEngine, broker: OutboxBroker) -> AsyncIterator[Callable[[int], Any]]:
    """Publish one in a transaction of its own."""
    async with engine.connect() as sql:

        async def one(number: int) -> None:
            async with sql.begin():
                await broker.publish(payload(number), queue=QUEUE, session=sql)

        yield one


async def publish(options: Options) -> Options:
    """Publish one in each transaction."""
    connections = options["connections"]
    async with made(options, connections) as made_:
        return {"seconds": await in_parallel(options["events"], connections, lambda: publishing(*made_))}


async def drain(options: Options) -> Options:
    """Handle everything that is due."""
    tally = Tally(options["events"])
    async with working(options, tally.count) as engine, engine.connect() as raw:
        sql = await raw.execution_options(isolation_level="AUTOCOMMIT")

        async def unfinished() -> int:
            return int((await sql.execute(UNFINISHED)).scalar_one())

        return await tally.drained(unfinished)


async def listen(options: Options) -> Options:
    """Say when each event's handler began."""
    tally = Tally(options["events"])
    async with working(options, tally.time) as engine:
        async with engine.connect() as sql:
            while not (await sql.execute(LISTENING)).scalar_one():
                await sql.rollback()
                await asyncio.sleep(0.01)
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Publish at an even pace."""
    async with made(options, 1) as made_, publishing(*made_) as one:
        return await trickle(options["events"], options["per_second"], one)


if __name__ == "__main__":
    main({"prepare": prepare, "fill": fill, "publish": publish, "drain": drain, "listen": listen, "trickle": slowly})
