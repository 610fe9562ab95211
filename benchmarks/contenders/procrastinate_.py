"""procrastinate, on psycopg, through its public interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from common import SLOTS, Tally, in_parallel, main, payload, ready, trickle
from procrastinate import App, PsycopgConnector
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

Options = dict[str, Any]
QUEUE = "events"
UNFINISHED = """
SELECT count(*) FROM procrastinate_jobs
WHERE status IN ('todo', 'doing') AND (scheduled_at IS NULL OR scheduled_at <= now())
"""
LISTENING = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'"


def make(options: Options, note: Callable[[int], None] | None = None) -> tuple[App, Any]:
    """Return the application and its one task, which calls *note*."""
    app = App(connector=PsycopgConnector(conninfo=options["dsn"]))

    @app.task(name="order.placed", queue=QUEUE)
    async def handle(**got: Any) -> None:
        assert note is not None
        note(got["n"])

    return app, handle


@asynccontextmanager
async def opened(app: App, options: Options, connections: int) -> AsyncIterator[None]:
    """Open the application on a pool of our own, which it allows and which is faster.

    Whatever it does is a single statement: with autocommit, there is no BEGIN and no COMMIT to send. And its own pool
    tries out a connection, with one more round trip, whenever it takes one.
    """
    pool = AsyncConnectionPool(
        options["dsn"],
        min_size=connections,
        max_size=connections,
        open=False,
        configure=lambda sql: sql.set_autocommit(True),
    )
    async with pool:
        await pool.wait()
        async with app.open_async(pool):
            yield


@asynccontextmanager
async def working(app: App, options: Options) -> AsyncIterator[None]:
    """Run a worker meanwhile."""
    slots = options.get("slots", SLOTS)

    async def run() -> None:
        # One job is claimed after another, each with a statement of its own, and this sets the pace: neither more
        # slots, nor more connections, nor to delete what is done has made it faster.
        await app.run_worker_async(
            queues=[QUEUE],
            concurrency=slots,
            delete_jobs=options.get("delete_jobs", "never"),
            install_signal_handlers=False,
        )
        raise RuntimeError("The worker has stopped by itself.")

    async with opened(app, options, options.get("pool", 4)), asyncio.TaskGroup() as group:
        worker = group.create_task(run())
        yield
        worker.cancel()


async def prepare(options: Options) -> None:
    """Make the tables."""
    app, _ = make(options)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def fill(options: Options) -> Options:
    """Defer a thousand jobs with each statement."""
    app, task = make(options)
    events, delay = options["events"], options.get("delay_seconds", 0)
    later = {"schedule_in": {"seconds": delay}} if delay else {}
    async with opened(app, options, 1):
        began = perf_counter()
        for first in range(0, events, 1_000):
            numbers = range(first, min(first + 1_000, events))
            await task.configure(**later).batch_defer_async(*(payload(number) for number in numbers))
        seconds = perf_counter() - began
        # As autovacuum would within a minute: without it, to claim one job sorts all that wait, and is far slower.
        await app.connector.execute_query_async("ANALYZE procrastinate_jobs")
        return {"seconds": seconds}


@asynccontextmanager
async def deferring(options: Options) -> AsyncIterator[Callable[[int], Any]]:
    """Defer one job in a transaction of its own, on a connection of our own as for an outbox."""
    _, task = make(options)
    async with await AsyncConnection.connect(options["dsn"], autocommit=True) as sql:
        yield lambda number: task.configure(connection=sql).defer_async(**payload(number))


async def publish(options: Options) -> Options:
    """Defer one job in each transaction."""
    return {"seconds": await in_parallel(options["events"], options["connections"], lambda: deferring(options))}


async def drain(options: Options) -> Options:
    """Handle everything that is due."""
    tally = Tally(options["events"])
    app, _ = make(options, tally.count)
    async with await AsyncConnection.connect(options["dsn"], autocommit=True) as sql:

        async def unfinished() -> int:
            row = await (await sql.execute(UNFINISHED)).fetchone()
            assert row is not None
            return int(row[0])

        async with working(app, options):
            return await tally.drained(unfinished)


async def listen(options: Options) -> Options:
    """Say when each event's handler began."""
    tally = Tally(options["events"])
    app, _ = make(options, tally.time)
    async with await AsyncConnection.connect(options["dsn"], autocommit=True) as sql, working(app, options):
        while not await (await sql.execute(LISTENING)).fetchone():
            await asyncio.sleep(0.01)
        ready()
        await tally.all_seen.wait()
        return {"began": tally.began, "calls": tally.calls}


async def slowly(options: Options) -> Options:
    """Defer at an even pace."""
    async with deferring(options) as one:
        return await trickle(options["events"], options["per_second"], one)


if __name__ == "__main__":
    main({"prepare": prepare, "fill": fill, "publish": publish, "drain": drain, "listen": listen, "trickle": slowly})
