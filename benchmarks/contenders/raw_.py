"""Loops written by hand on asyncpg over the tables of pgebus: what is left when there is no library.

They recover nothing, retry nothing and refuse nothing. The statements are those of pgebus.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import asyncpg
from common import SLOTS, Tally, cpu, in_parallel, main, payload, ready, trickle

from pgebus._runtime.statements import Statements

Options = dict[str, Any]
Fence = tuple[int, str, int]
TYPE = "order.placed"
WORKER = 1
AT_ONCE = 500
INSERT = "INSERT INTO pgebus.events (type, payload) VALUES ($1, $2) RETURNING id"
SQL = Statements("pgebus")


async def fill(options: Options) -> Options:
    """COPY, a thousand events at a time."""
    sql = await asyncpg.connect(options["dsn"])
    size = options.get("batch", 1_000)
    began = perf_counter()
    for first in range(0, options["events"], size):
        await sql.copy_records_to_table(
            "events",
            schema_name="pgebus",
            columns=["type", "payload"],
            records=[
                (TYPE, json.dumps(payload(number))) for number in range(first, min(first + size, options["events"]))
            ],
        )
    seconds = perf_counter() - began
    await sql.close()
    return {"seconds": seconds}


async def publish(options: Options) -> Options:
    """Publish one event in each statement."""

    @asynccontextmanager
    async def publisher() -> AsyncIterator[Callable[[int], Awaitable[object]]]:
        sql = await asyncpg.connect(options["dsn"])
        insert = await sql.prepare(options.get("insert", INSERT))
        yield lambda number: insert.fetchval(TYPE, json.dumps(payload(number)))
        await sql.close()

    began = cpu()
    seconds = await in_parallel(options["events"], options["connections"], publisher)
    return {"seconds": seconds, "cpu": cpu() - began}


async def drain(options: Options) -> Options:
    """Handle everything that is due: one connection claims, another completes, at the same time."""
    tally = Tally(options["events"])
    if options.get("transactional"):
        return await _drain_in_transactions(options, tally)
    claiming, completing = await asyncpg.connect(options["dsn"]), await asyncpg.connect(options["dsn"])
    claim, complete = await claiming.prepare(SQL.claim), await completing.prepare(SQL.complete)
    finished: list[Fence] = []
    stirred = asyncio.Event()
    written = 0

    async def handle(got: dict[str, Any]) -> None:
        tally.count(got["n"])

    async def acknowledge() -> None:
        nonlocal written
        while written < options["events"]:
            await stirred.wait()
            stirred.clear()
            if batch := sorted(finished):
                finished.clear()
                written += len(await complete.fetch(*(list(each) for each in zip(*batch, strict=True)), WORKER))

    async def work() -> None:
        while rows := await claim.fetch(WORKER, "events", ["default"], AT_ONCE):
            for row in rows:
                await handle(json.loads(row["payload"]))
                finished.append((row["event_id"], row["consumer_group"], row["claim_seq"]))
            stirred.set()

    async def unfinished() -> int:
        return options["events"] - written

    async with asyncio.TaskGroup() as group:
        group.create_task(acknowledge())
        group.create_task(work())
        result = await tally.drained(unfinished)
    await claiming.close()
    await completing.close()
    return result


async def _drain_in_transactions(options: Options, tally: Tally) -> Options:
    """Handle each event in a transaction of its own, which completes it: BEGIN, UPDATE, complete(), COMMIT."""
    claiming = await asyncpg.connect(options["dsn"])
    claim = await claiming.prepare(SQL.claim)
    waiting: asyncio.Queue[asyncpg.Record] = asyncio.Queue()
    running = done = 0
    turned = asyncio.Event()

    async def slot() -> None:
        nonlocal running, done
        sql = await asyncpg.connect(options["dsn"])
        change = await sql.prepare("UPDATE business SET value = value + 1 WHERE id = $1")
        complete = await sql.prepare("SELECT pgebus.complete($1, $2, $3, $4, 'x')")
        while done < options["events"]:
            try:
                row = waiting.get_nowait()
            except asyncio.QueueEmpty:
                await asyncio.sleep(0.001)
                continue
            async with sql.transaction():
                await sql.execute("SET LOCAL pgebus.tx = 'x'")
                number = json.loads(row["payload"])["n"]
                await change.fetch(number)
                tally.count(number)
                await complete.fetch(row["event_id"], row["consumer_group"], row["claim_seq"], WORKER)
            done += 1
            turned.set()
        await sql.close()

    async def work() -> None:
        while done < options["events"]:
            if waiting.qsize() < SLOTS:
                for row in await claim.fetch(WORKER, "events", ["default"], 100):
                    waiting.put_nowait(row)
            await turned.wait()
            turned.clear()

    async def unfinished() -> int:
        return options["events"] - done

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        for _ in range(SLOTS):
            group.create_task(slot())
        result = await tally.drained(unfinished)
    await claiming.close()
    return result


async def listen(options: Options) -> Options:
    """Say when each event's handler began; one connection listens and claims."""
    tally = Tally(options["events"])
    sql, listening = await asyncpg.connect(options["dsn"]), await asyncpg.connect(options["dsn"])
    claim, complete = await sql.prepare(SQL.claim), await sql.prepare(SQL.complete)
    woken = asyncio.Event()
    await listening.add_listener("events", lambda *_: woken.set())
    await listening.execute("INSERT INTO pgebus.workers (id, channel, idle) VALUES (1, 'events', true)")
    ready()
    while not tally.all_seen.is_set():
        await woken.wait()
        woken.clear()
        while rows := await claim.fetch(WORKER, "events", ["default"], AT_ONCE):
            for row in rows:
                tally.time(json.loads(row["payload"])["n"])
            fences = [(row["event_id"], row["consumer_group"], row["claim_seq"]) for row in rows]
            await complete.fetch(*(list(each) for each in zip(*fences, strict=True)), WORKER)
    await listening.execute("DELETE FROM pgebus.workers WHERE id = 1")
    await sql.close()
    await listening.close()
    return {"began": tally.began, "calls": tally.calls}


async def hold(options: Options) -> Options:
    """Hold a transaction open that has a snapshot, as a long report does, until killed."""
    sql = await asyncpg.connect(options["dsn"])
    async with sql.transaction(isolation="repeatable_read"):
        await sql.fetchval("SELECT txid_current()")
        await asyncio.Event().wait()
    return {}


async def slowly(options: Options) -> Options:
    """Publish at an even pace."""
    sql = await asyncpg.connect(options["dsn"])
    insert = await sql.prepare(INSERT)
    result = await trickle(
        options["events"], options["per_second"], lambda number: insert.fetchval(TYPE, json.dumps(payload(number)))
    )
    await sql.close()
    return result


if __name__ == "__main__":
    main({"fill": fill, "publish": publish, "drain": drain, "listen": listen, "hold": hold, "trickle": slowly})
