"""oban for Python, on psycopg, through its public interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from common import Tally, in_parallel, main, payload, ready, trickle
from oban import Job, Oban, worker
from oban.schema import install
from psycopg import AsyncConnection

Options = dict[str, Any]
QUEUE = "events"
# How many jobs run at once, which is as well how many it claims with one statement, and finishes in one transaction
# with a statement for each; the default is 10.
AT_ONCE = 1_000
UNFINISHED = """
SELECT count(*) FROM oban_jobs
WHERE state IN ('available', 'executing', 'scheduled', 'retryable') AND scheduled_at <= timezone('UTC', now())
"""


@worker(queue=QUEUE)
class Handle:
    """Calls *note*."""

    note: Callable[[int], None]

    async def process(self, job: Job) -> None:
        """Handle one job."""
        Handle.note(job.args["n"])


@asynccontextmanager
async def opened(options: Options, connections: int, **more: Any) -> AsyncIterator[Oban]:
    """Make an instance on a pool of so many connections; without queues, it only enqueues."""
    pool = await Oban.create_pool(options["dsn"], min_size=connections, max_size=connections)
    async with pool:
        yield Oban(pool=pool, **more)


@asynccontextmanager
async def working(options: Options, note: Callable[[int], None]) -> AsyncIterator[None]:
    """Run a worker meanwhile whose handler calls *note*."""
    Handle.note = staticmethod(note)
    limit = options.get("at_once", AT_ONCE)
    async with opened(options, options.get("pool", 5), queues={QUEUE: {"limit": limit}}) as oban, oban:
        yield


async def prepare(options: Options) -> None:
    """Make the tables."""
    async with await Oban.create_pool(options["dsn"]) as pool:
        await install(pool)


async def fill(options: Options) -> Options:
    """Enqueue a thousand jobs in each transaction; it sends a statement for each job all the same."""
    events, delay = options["events"], options.get("delay_seconds", 0)
    later = {"scheduled_in": delay} if delay else {}
    async with opened(options, 1) as oban:
        began = perf_counter()
        for first in range(0, events, 1_000):
            numbers = range(first, min(first + 1_000, events))
            await oban.enqueue_many(Handle.new(payload(number), **later) for number in numbers)
        return {"seconds": perf_counter() - began}


@asynccontextmanager
async def enqueuing(options: Options, oban: Oban) -> AsyncIterator[Callable[[int], Any]]:
    """Enqueue one job with a statement, which is a transaction of its own, on a connection of our own."""
    async with await AsyncConnection.connect(options["dsn"], autocommit=True) as sql:
        yield lambda number: oban.enqueue(Handle.new(payload(number)), conn=sql)


async def publish(options: Options) -> Options:
    """Enqueue one job in each transaction."""
    async with opened(options, 1) as oban:
        seconds = await in_parallel(options["events"], options["connections"], lambda: enqueuing(options, oban))
        return {"seconds": seconds}


async def drain(options: Options) -> Options:
    """Handle everything that is due."""
    tally = Tally(options["events"])
    async with await AsyncConnection.connect(options["dsn"], autocommit=True) as sql:

        async def unfinished() -> int:
            row = await (await sql.execute(UNFINISHED)).fetchone()
            assert row is not None
            return int(row[0])

        async with working(options, tally.count):
            return await tally.drained(unfinished)


async def listen(options: Options) -> Options:
    """Say when each event's handler began."""
    tally = Tally(options["events"])
    async with working(options, tally.time):
        await asyncio.sleep(1)  # it listens some 0.1 s after it has started, and does not say when
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Enqueue at an even pace."""
    async with opened(options, 1) as oban, enqueuing(options, oban) as one:
        return await trickle(options["events"], options["per_second"], one)


if __name__ == "__main__":
    main({"prepare": prepare, "fill": fill, "publish": publish, "drain": drain, "listen": listen, "trickle": slowly})
