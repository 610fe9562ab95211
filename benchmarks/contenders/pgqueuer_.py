"""pgqueuer, on asyncpg, through its public interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter
from typing import Any

import asyncpg
from common import Tally, in_parallel, main, payload, ready, trickle
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, Job, PgQueuer, Queries

Options = dict[str, Any]
TYPE = "order.placed"
# How many jobs it claims, and finishes, with one statement; the default is 10. How many run at once has no limit. One
# connection listens, one claims, one finishes; with a single one for all, it is slower.
AT_ONCE, CONNECTIONS = 500, 3
UNFINISHED = "SELECT count(*) FROM pgqueuer WHERE execute_after <= now()"
LISTENING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'"


@asynccontextmanager
async def connected(options: Options) -> AsyncIterator[asyncpg.Connection]:
    """Connect meanwhile."""
    sql = await asyncpg.connect(options["dsn"])
    try:
        yield sql
    finally:
        await sql.close()


@asynccontextmanager
async def working(options: Options, note: Callable[[int], None]) -> AsyncIterator[None]:
    """Run a worker meanwhile whose handler calls *note*."""
    async with asyncpg.create_pool(options["dsn"], min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
        queue = PgQueuer(AsyncpgPoolDriver(pool))

        @queue.entrypoint(TYPE)
        async def handle(job: Job) -> None:
            assert job.payload is not None
            note(json.loads(job.payload)["n"])

        async def run() -> None:
            await queue.run(batch_size=options.get("at_once", AT_ONCE))
            if not queue.shutdown.is_set():
                raise RuntimeError("The worker has stopped by itself.")

        async with asyncio.TaskGroup() as group:
            group.create_task(run())
            yield
            queue.shutdown.set()


async def prepare(options: Options) -> None:
    """Make the tables, and set their autovacuum as is advised."""
    async with connected(options) as sql:
        queries = Queries(AsyncpgDriver(sql))
        await queries.install()
        await queries.optimize_autovacuum()


async def fill(options: Options) -> Options:
    """Enqueue a thousand jobs with each statement."""
    events, delay = options["events"], options.get("delay_seconds", 0)
    after = timedelta(seconds=delay) if delay else None
    async with connected(options) as sql:
        queries = Queries(AsyncpgDriver(sql))
        began = perf_counter()
        for first in range(0, events, 1_000):
            bodies = [json.dumps(payload(number)).encode() for number in range(first, min(first + 1_000, events))]
            count = len(bodies)
            await queries.enqueue([TYPE] * count, bodies, [0] * count, [after] * count)
        return {"seconds": perf_counter() - began}


@asynccontextmanager
async def enqueuing(options: Options) -> AsyncIterator[Callable[[int], Any]]:
    """Enqueue one job with a statement, which is a transaction of its own."""
    async with connected(options) as sql:
        queries = Queries(AsyncpgDriver(sql))
        yield lambda number: queries.enqueue(TYPE, json.dumps(payload(number)).encode())


async def publish(options: Options) -> Options:
    """Enqueue one job in each transaction."""
    return {"seconds": await in_parallel(options["events"], options["connections"], lambda: enqueuing(options))}


async def drain(options: Options) -> Options:
    """Handle everything that is due."""
    tally = Tally(options["events"])
    async with connected(options) as sql, working(options, tally.count):
        return await tally.drained(lambda: sql.fetchval(UNFINISHED))


async def listen(options: Options) -> Options:
    """Say when each event's handler began."""
    tally = Tally(options["events"])
    async with connected(options) as sql, working(options, tally.time):
        while not await sql.fetchval(LISTENING):
            await asyncio.sleep(0.01)
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Enqueue at an even pace."""
    async with enqueuing(options) as one:
        return await trickle(options["events"], options["per_second"], one)


if __name__ == "__main__":
    main({"prepare": prepare, "fill": fill, "publish": publish, "drain": drain, "listen": listen, "trickle": slowly})
