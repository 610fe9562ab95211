"""chancy, on psycopg, through its public interface."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

from chancy import Chancy, Job, Queue, Worker
from chancy.plugins.leadership import Leadership
from chancy.plugins.pruner import Pruner
from chancy.plugins.recovery import Recovery
from common import Tally, in_parallel, main, payload, ready, trickle
from psycopg import AsyncConnection

Options = dict[str, Any]
QUEUE = "events"
# How many jobs run at once, which is as well how many it claims with one statement; the default is 100. It writes down
# which have finished every so many seconds, up to a thousand in one transaction; the default is 1.
AT_ONCE, WRITTEN_EVERY = 1_000, 0.1
UNFINISHED = """
SELECT count(*) FROM chancy_jobs WHERE state IN ('pending', 'running', 'retrying') AND scheduled_at <= now()
"""
NOTES: list[Callable[[int], None]] = []


async def handle(**got: Any) -> None:
    """Call what is to be called; a job names its function, so it can't be a closure."""
    NOTES[0](got["n"])


def job(number: int, **more: Any) -> Job:
    """Return a job for one event."""
    return Job(func="__main__.handle", queue=QUEUE, kwargs=payload(number), **more)


def make(options: Options, connections: int) -> Chancy:
    """Return an application."""
    # Of the default plugins, those that delivery needs. The others, for metrics and workflows, do work for each job.
    more = {} if options.get("all_plugins") else {"plugins": [Leadership(), Recovery(), Pruner()]}
    return Chancy(
        options["dsn"],
        min_connection_pool_size=connections,
        max_connection_pool_size=connections,
        log=logging.getLogger("chancy"),  # it shows warnings; its own tells of each job
        no_default_plugins=bool(more),
        **more,
    )


@asynccontextmanager
async def working(options: Options, note: Callable[[int], None]) -> AsyncIterator[Worker]:
    """Run a worker meanwhile whose handler calls *note*."""
    NOTES.append(note)
    async with make(options, options.get("pool", 5)) as chancy:
        await chancy.declare(
            Queue(
                QUEUE,
                concurrency=options.get("at_once", AT_ONCE),
                executor=Chancy.Executor.Async,
                eager_polling=True,  # else it claims again only after 5 s, or when something is pushed
            ),
            upsert=True,
        )
        worker = Worker(chancy, register_signal_handlers=False)
        worker.send_outgoing_interval = options.get("written_every", WRITTEN_EVERY)
        async with worker, asyncio.TaskGroup() as group:
            watch = group.create_task(worker.wait_for_shutdown())
            yield worker
            watch.cancel()


async def prepare(options: Options) -> None:
    """Make the tables."""
    async with make(options | {"all_plugins": True}, 1) as chancy:
        await chancy.migrate()


async def fill(options: Options) -> Options:
    """Push a thousand jobs in each transaction; it sends a statement for each job all the same."""
    events, delay = options["events"], options.get("delay_seconds", 0)
    later = {"scheduled_at": datetime.now(UTC) + timedelta(seconds=delay)} if delay else {}
    async with make(options, 1) as chancy:
        began = perf_counter()
        async for _ in chancy.push_many((job(number, **later) for number in range(events)), batch_size=1_000):
            pass
        return {"seconds": perf_counter() - began}


@asynccontextmanager
async def pushing(options: Options) -> AsyncIterator[Callable[[int], Any]]:
    """Push one job in a transaction of its own."""
    async with make(options, 1) as chancy:
        await chancy.pool.wait()
        yield lambda number: chancy.push(job(number))


async def publish(options: Options) -> Options:
    """Push one job in each transaction."""
    return {"seconds": await in_parallel(options["events"], options["connections"], lambda: pushing(options))}


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
    async with working(options, tally.time) as worker:
        # It listens already; it takes up its queues after that.
        while QUEUE not in worker.executors:
            await asyncio.sleep(0.01)
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Push at an even pace."""
    async with pushing(options) as one:
        return await trickle(options["events"], options["per_second"], one)


if __name__ == "__main__":
    main({"prepare": prepare, "fill": fill, "publish": publish, "drain": drain, "listen": listen, "trickle": slowly})
