"""The loop that one would write with SQLAlchemy over the tables of pgebus: an AsyncSession for each event."""

from __future__ import annotations

import asyncio
from typing import Any

from common import SLOTS, Tally, main
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from pgebus._runtime.statements import Statements

Options = dict[str, Any]
WORKER = 1
CHANGE = text("UPDATE business SET value = value + 1 WHERE id = :id")
COMPLETE = text("""
UPDATE pgebus.deliveries SET status = 'completed', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp()
WHERE event_id = :event_id AND consumer_group = :consumer_group AND claim_seq = :claim_seq AND worker_id = :worker
  AND status = 'running' RETURNING event_id
""")


async def drain(options: Options) -> Options:
    """Handle each event in a transaction of its own, which completes it."""
    tally = Tally(options["events"])
    engine = create_async_engine(options["dsn"].replace("postgresql://", "postgresql+asyncpg://", 1), pool_size=SLOTS)
    waiting: asyncio.Queue[Any] = asyncio.Queue()
    done = 0

    async def slot() -> None:
        nonlocal done
        while True:
            row = await waiting.get()
            if row is None:
                return
            async with AsyncSession(engine) as session, session.begin():
                number = row["payload_n"]
                await session.execute(CHANGE, {"id": number})
                tally.count(number)
                fence = {"event_id": row["event_id"], "consumer_group": row["consumer_group"]}
                completed = await session.execute(COMPLETE, {**fence, "claim_seq": row["claim_seq"], "worker": WORKER})
                assert completed.scalar_one()
            done += 1

    async def work() -> None:
        import json

        async with engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            while rows := await raw.fetch(Statements("pgebus").claim, WORKER, "events", ["default"], 100):
                await connection.commit()
                for row in rows:
                    waiting.put_nowait({**dict(row), "payload_n": json.loads(row["payload"])["n"]})
                while waiting.qsize() > SLOTS:
                    await asyncio.sleep(0.001)
            for _ in range(SLOTS):
                waiting.put_nowait(None)

    async def unfinished() -> int:
        return options["events"] - done

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        for _ in range(SLOTS):
            group.create_task(slot())
        result = await tally.drained(unfinished)
    await engine.dispose()
    return result


if __name__ == "__main__":
    main({"drain": drain})
