"""A worker or a publisher dies at each step of its work: real processes, SIGKILL, and what is there in the end."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import asyncpg
import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings
from tests.conftest import Server
from tests.system.bus import Sql, delivery, finished
from tests.system.bus import publish as publish_here
from tests.system.conftest import Spawn
from tests.system.processes import Inquest, rescuing
from tests.system.waiting import until
from tests.system.worker_process import publish, work

BEFORE_THE_END = (
    "claimed",
    "dispatched",
    "transaction about to begin",
    "first handler entered",
    "first handler wrote",
    "second handler entered",
    "second handler wrote",
    "handlers returned",
)
# The COMMIT of whoever writes to the table waits here, for an advisory lock that the test holds.
SLOW_COMMIT = """
CREATE FUNCTION wait_in_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER wait_in_commit AFTER INSERT ON {} DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION wait_in_commit();
"""


@pytest.fixture
async def obstacle(server: Server, database: DatabaseSettings) -> AsyncIterator[Sql]:
    """A connection that holds locks in the way of others."""
    connection = await server.connect(database.sqlalchemy_url().database)
    yield connection
    with suppress(OSError, asyncpg.PostgresConnectionError):
        await connection.close(timeout=2)


async def waits_for(sql: Sql, obstacle: Sql) -> int:
    """Wait until some backend waits for *obstacle*; return its pid."""
    question = "SELECT pid FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))"
    await until(lambda: sql.fetchval(question, obstacle.get_server_pid()))
    pid: int = await sql.fetchval(question, obstacle.get_server_pid())
    return pid


async def gone(sql: Sql, pid: int) -> None:
    """Wait until the backend *pid* has ended."""
    await until(lambda: sql.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid))


async def effects(sql: Sql, event_id: int) -> list[tuple[str, int]]:
    """Return (handler, attempt) of all effects of an event."""
    rows = await sql.fetch("SELECT handler, attempt FROM effects WHERE event_id = $1 ORDER BY 1, 2", event_id)
    return [(row["handler"], row["attempt"]) for row in rows]


async def runs(sql: Sql, event_id: int) -> int:
    """Return how often a handler of an event was started."""
    count: int = await sql.fetchval("SELECT count(*) FROM runs WHERE event_id = $1", event_id)
    return count


@pytest.mark.parametrize("point", BEFORE_THE_END)
async def test_a_worker_killed_before_its_commit_leaves_nothing_and_another_does_it_once(
    point: str, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    child = spawn(work, die_at=point)
    await child.says("ready")
    event_id = await publish_here(sm, "order.placed")
    assert await child.dies() == -signal.SIGKILL
    left = await delivery(sql, event_id)
    assert (left["status"], left["attempt"], left["lost"]) == ("running", 1, 0)
    assert await effects(sql, event_id) == []

    async with rescuing(database, recovery_grace_seconds=0.1):
        await finished(sql, event_id)
    after = await delivery(sql, event_id)
    assert (after["attempt"], after["lost"], after["claim_seq"]) == (2, 1, 2)
    assert await effects(sql, event_id) == [("bill", 2), ("reserve", 2)]


async def test_a_worker_killed_after_its_commit_has_done_it_and_nobody_does_it_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    child = spawn(work, die_at="outcome known")
    await child.says("ready")
    event_id = await publish_here(sm, "order.placed")
    assert await child.dies() == -signal.SIGKILL
    assert (await delivery(sql, event_id))["status"] == "completed"

    async with rescuing(database, recovery_grace_seconds=0.1):
        await finished(sql, await publish_here(sm, "order.placed"))
    after = await delivery(sql, event_id)
    assert (after["status"], after["attempt"], after["lost"]) == ("completed", 1, 0)
    assert await effects(sql, event_id) == [("bill", 1), ("reserve", 1)]


@pytest.mark.parametrize("where", ["completing", "committing"])
@pytest.mark.parametrize("fate", ["goes through", "is cut off", "is open while others recover"])
async def test_a_completion_whose_sender_was_killed_is_decided_by_postgresql(
    where: str,
    fate: str,
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    obstacle: Sql,
    spawn: Spawn,
    inquest: Inquest,
) -> None:
    """The message that completes and commits was sent; the server has it, whoever sent it is dead."""
    await sql.execute(SLOW_COMMIT.format("effects"))
    child = spawn(work)
    await child.says("ready")
    event_id = await publish_here(sm, "job.gated")
    await child.says("inside")
    block = obstacle.transaction()
    await block.start()
    if where == "completing":
        await obstacle.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", event_id)
    else:
        await obstacle.execute("SELECT pg_advisory_xact_lock(4711)")
    child.go()
    orphan = await waits_for(sql, obstacle)
    await child.killed()
    assert (await delivery(sql, event_id))["status"] == "running"

    match fate:
        case "goes through":
            await block.rollback()
            await finished(sql, event_id)
            async with rescuing(database, recovery_grace_seconds=0.1):
                await finished(sql, await publish_here(sm, "order.placed"))
        case "is cut off":
            await sql.execute("SELECT pg_terminate_backend($1)", orphan)
            await gone(sql, orphan)
            await block.rollback()
            async with rescuing(database, recovery_grace_seconds=0.1):
                await finished(sql, event_id)
        case _:
            async with rescuing(database, recovery_grace_seconds=0.1):

                async def recovered_in_vain() -> bool:
                    return len(inquest.condemned) >= 3

                await until(recovered_in_vain)
                assert (await delivery(sql, event_id))["status"] == "running"
                await block.rollback()
                await finished(sql, event_id)

    after = await delivery(sql, event_id)
    assert after["lost"] == after["attempt"] - 1
    assert await effects(sql, event_id) == [("gated", after["attempt"])]
    if fate == "goes through":
        assert after["attempt"] == 1
    elif fate == "is cut off":
        assert after["attempt"] == 2
    elif where == "committing":
        # Its own backend held the row all the time, so no recoverer could have it.
        assert after["attempt"] == 1


@pytest.mark.parametrize(
    ("point", "starts"),
    [
        ("claimed", 1),
        ("dispatched", 1),
        ("first handler entered", 2),
        ("outcome known", 2),
        ("completion about to be written", 2),
    ],
)
async def test_without_a_transaction_a_killed_worker_costs_a_repetition_and_no_event(
    point: str,
    starts: int,
    database: DatabaseSettings,
    sm: DatabaseSessionManager,
    sql: Sql,
    spawn: Spawn,
    inquest: Inquest,
) -> None:
    child = spawn(work, die_at=point)
    await child.says("ready")
    event_id = await publish_here(sm, "mail.sent")
    assert await child.dies() == -signal.SIGKILL
    async with rescuing(database, recovery_grace_seconds=0.1):
        await finished(sql, event_id)
    after = await delivery(sql, event_id)
    assert (after["attempt"], after["lost"]) == (2, 1)
    assert await runs(sql, event_id) == starts


async def test_a_publisher_killed_before_its_commit_has_published_nothing(
    database: DatabaseSettings, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    await sql.execute("CREATE TABLE orders (id int)")
    child = spawn(publish, die_at="published")
    assert await child.dies() == -signal.SIGKILL
    assert await child.says("published"), "it had published by then"
    assert await sql.fetchval("SELECT (SELECT count(*) FROM orders) + (SELECT count(*) FROM pgebus.events)") == 0
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 0


async def test_what_a_publisher_committed_before_it_was_killed_is_handled(
    database: DatabaseSettings, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    await sql.execute("CREATE TABLE orders (id int)")
    child = spawn(publish, die_at="committed")
    assert await child.dies() == -signal.SIGKILL
    (event_id,) = await child.says("published")
    assert await sql.fetchval("SELECT count(*) FROM orders") == 1
    async with rescuing(database, recovery_grace_seconds=0.1):
        await finished(sql, event_id)
    assert await effects(sql, event_id) == [("bill", 1), ("reserve", 1)]


@pytest.mark.parametrize("fate", ["goes through", "is cut off"])
async def test_order_and_event_share_the_fate_of_a_commit_whose_sender_was_killed(
    fate: str, database: DatabaseSettings, sql: Sql, obstacle: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    await sql.execute("CREATE TABLE orders (id int)")
    await sql.execute(SLOW_COMMIT.format("orders"))
    async with rescuing(database, recovery_grace_seconds=0.1):
        await obstacle.execute("SELECT pg_advisory_lock(4711)")
        child = spawn(publish)
        (event_id,) = await child.says("published")
        orphan = await waits_for(sql, obstacle)
        await child.killed()
        if fate == "is cut off":
            await sql.execute("SELECT pg_terminate_backend($1)", orphan)
        await obstacle.execute("SELECT pg_advisory_unlock(4711)")
        if fate == "goes through":
            await finished(sql, event_id)
        await gone(sql, orphan)
    committed = int(fate == "goes through")
    assert await sql.fetchval("SELECT count(*) FROM orders") == committed
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events WHERE id = $1", event_id) == committed
    assert len(await effects(sql, event_id)) == 2 * committed
