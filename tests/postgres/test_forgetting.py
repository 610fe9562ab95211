"""Groups that keep no history: what a completion deletes, what it keeps, and that no backfill repeats it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Final

import asyncpg
import pytest
from tests.postgres.plain_sql import Sql, publish, subscribe

from pgebus import DatabaseSessionManager, operations
from pgebus._runtime.leases import Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store
from pgebus.database import make_engine
from pgebus.settings import DatabaseSettings

WORKER: Final = 7
BACKFILLED: Final = "UPDATE pgebus.subscriptions SET backfilled_at = now()"


@pytest.fixture
async def store(database: DatabaseSettings) -> AsyncIterator[Store]:
    engine = make_engine(database, isolation_level="AUTOCOMMIT")
    line = Line(engine)
    yield Store(line, Statements("pgebus"), "events")
    await line.close()
    await engine.dispose()


@pytest.fixture
async def other(database: DatabaseSettings) -> AsyncIterator[Sql]:
    url = database.sqlalchemy_url().set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    yield connection
    await connection.close()


async def left(sql: Sql) -> list[tuple[int, str]]:
    return [(row[0], row[1]) for row in await sql.fetch("SELECT event_id, status FROM pgebus.deliveries ORDER BY 1")]


async def finish(sql: Sql, lease: Lease) -> None:
    """End a handlers' transaction as the dispatcher does."""
    await sql.execute("BEGIN; SET LOCAL pgebus.tx = 'm'")
    await sql.execute(Statements("pgebus").end(*lease.fence, "m", forget=True))


async def held(sql: Sql, store: Store, *keys: str | None) -> list[Lease]:
    """Publish an event of each key, and claim what can be claimed, for a group that is up to date."""
    await subscribe(sql, "g", "a.#")
    await sql.execute(BACKFILLED)
    for key in keys:
        await publish(sql, key=key)
    return await store.claim(WORKER, ["g"], 100)


# What is deleted

PATTERNS: Final = {
    "one that has every event": ("a.b", "0", "NULL", True, True),
    "one that goes back to the beginning": ("a.*", "0", "'-infinity'", True, True),
    "one that goes back to a moment before it": ("#", "0", "now() - interval '1 hour'", True, True),
    "one that goes back to a moment after it": ("#", "0", "now() + interval '1 hour'", True, False),
    "one that begins after it": ("a.b", "e.id", "NULL", True, False),
    "one that begins just before it": ("a.b", "e.id - 1", "NULL", True, True),
    "one of another type": ("a.c", "0", "NULL", True, False),
    "one that is not backfilled yet": ("a.b", "0", "NULL", False, False),
}


@pytest.mark.parametrize("how", ["batch", "batch with keys", "transaction"])
async def test_what_a_pattern_covers_is_deleted_and_all_else_is_kept(how: str, store: Store, sql: Sql) -> None:
    """An event may have come through none: it was unhandled, or its transaction was older than the pattern."""
    wrong = {}
    for name, (pattern, since, start, done, deleted) in PATTERNS.items():
        await sql.execute("DELETE FROM pgebus.consumer_groups; DELETE FROM pgebus.events")
        (lease,) = await held(sql, store, "k" if how == "batch with keys" else None)
        await subscribe(sql, "another", "a.b")  # which nobody has backfilled
        await sql.execute("DELETE FROM pgebus.subscriptions WHERE consumer_group = 'g'")
        await sql.execute(
            "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern, since_event_id, start_at,"
            f" backfilled_at) SELECT 'events', 'g', $1, {since}, {start}, CASE WHEN $2 THEN now() END"
            " FROM pgebus.events e",
            pattern,
            done,
        )
        if how == "transaction":
            await finish(sql, lease)
        else:
            assert await store.forget([lease]) == {lease.fence[:2]}
        expected = [] if deleted else [(lease.fence.event_id, "completed")]
        if (found := await left(sql)) != expected:
            wrong[name] = found
    assert not wrong


@pytest.mark.parametrize("how", ["batch", "transaction"])
async def test_as_long_as_a_pattern_of_the_group_is_new_everything_is_kept(how: str, store: Store, sql: Sql) -> None:
    (lease,) = await held(sql, store, None)
    await subscribe(sql, "g", "unlike.it")
    await (finish(sql, lease) if how == "transaction" else store.forget([lease]))
    assert await left(sql) == [(lease.fence.event_id, "completed")]


@pytest.mark.parametrize("keys", [(None, None, None), ("k", "l", None)])
async def test_a_batch_may_hold_what_is_deleted_and_what_is_kept(
    keys: tuple[str | None, ...], store: Store, sql: Sql
) -> None:
    leases = await held(sql, store, *keys)
    await sql.execute("UPDATE pgebus.subscriptions SET since_event_id = $1", leases[0].fence.event_id)
    assert await store.forget(leases) == {lease.fence[:2] for lease in leases}
    assert await left(sql) == [(leases[0].fence.event_id, "completed")]


# The fence


async def test_only_what_is_held_is_deleted(store: Store, sql: Sql, other: Sql) -> None:
    leases = await held(sql, store, None, None, None, None)
    ids = [lease.fence.event_id for lease in leases]
    await sql.execute("UPDATE pgebus.deliveries SET worker_id = 8 WHERE event_id = $1", ids[0])
    await sql.execute("UPDATE pgebus.deliveries SET claim_seq = 2 WHERE event_id = $1", ids[1])
    async with other.transaction():  # a row that somebody has locked is not waited for
        await other.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", ids[2])
        assert await store.forget(leases) == {(ids[3], "g")}
        assert await store.still_held([lease.fence for lease in leases]) == {(ids[2], "g")}
    assert await left(sql) == [(event_id, "running") for event_id in ids[:3]]
    assert await store.forget(leases[2:]) == {(ids[2], "g")}


@pytest.mark.parametrize("defect", ["claim_seq", "worker_id", "status", "row"])
async def test_without_the_lease_no_effect_is_committed(defect: str, store: Store, sql: Sql, other: Sql) -> None:
    (lease,) = await held(sql, store, None)
    await other.execute("CREATE TABLE effects ()")
    change = {
        "claim_seq": "UPDATE pgebus.deliveries SET claim_seq = 2",
        "worker_id": "UPDATE pgebus.deliveries SET worker_id = 8",
        "status": "UPDATE pgebus.deliveries SET status = 'pending', worker_id = NULL, claimed_at = NULL",
        "row": "DELETE FROM pgebus.deliveries",
    }
    await sql.execute("BEGIN; SET LOCAL pgebus.tx = 'm'; INSERT INTO effects DEFAULT VALUES")
    await other.execute(change[defect])
    before = await left(other)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.execute(Statements("pgebus").end(*lease.fence, "m", forget=True))
    assert caught.value.sqlstate == "PGB01"
    await sql.execute("ROLLBACK")
    assert await left(other) == before
    assert await other.fetchval("SELECT count(*) FROM effects") == 0


async def test_a_transaction_that_was_ended_behind_the_guard_deletes_nothing(store: Store, sql: Sql) -> None:
    (lease,) = await held(sql, store, None)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await sql.execute(Statements("pgebus").end(*lease.fence, "m", forget=True))
    assert caught.value.sqlstate == "PGB02"
    assert await left(sql) == [(lease.fence.event_id, "running")]


@pytest.mark.parametrize("how", ["batch", "transaction"])
async def test_the_next_of_its_key_is_let_in(how: str, store: Store, sql: Sql) -> None:
    leases = await held(sql, store, "k", "k", "k", "l")
    assert len(leases) == 2
    first = leases[0]
    await (finish(sql, first) if how == "transaction" else store.forget([first]))
    assert [status for _, status in await left(sql)] == ["pending", "blocked", "running"]
    assert await store.claim(WORKER, ["g"], 100) != []


# Backfills


async def backfill(store: Store, pattern: str, *, limit: int = 100) -> int:
    """Backfill one pattern to its end; return how many deliveries that made."""
    (new,) = [each for each in await store.backfills() if each.pattern == pattern]
    above, total = new.since, 0
    while True:
        done = await store.backfill(new, above, await store.last_event_id(), limit)
        assert done is not None
        made, reached, missed = done
        assert missed is None
        total += made
        if reached is None:
            await store.backfilled(new)
            return total
        above = reached


async def test_a_backfill_makes_what_no_other_pattern_covers(store: Store, sql: Sql) -> None:
    """All ways in which an older pattern may have begun, for an event without a delivery."""
    starts = {"now": ("e.id", "NULL"), "before": ("0", "now() - interval '1 hour'"), "beginning": ("0", "'-infinity'"),
              "after": ("0", "now() + interval '1 hour'"), "always": ("0", "NULL")}  # fmt: skip
    wrong = []
    for new, old, pattern, done in itertools.product(starts, starts, ("a.*", "a.c"), (True, False)):
        if new == "now":  # its backfill does not even look
            continue
        await sql.execute("DELETE FROM pgebus.consumer_groups; DELETE FROM pgebus.events")
        event_id = await publish(sql)
        await sql.execute("DELETE FROM pgebus.deliveries; INSERT INTO pgebus.consumer_groups VALUES ('events', 'g')")
        for name, which, there in ((pattern, old, done), ("a.b", new, False)):
            since, start = starts[which]
            await sql.execute(
                "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern, since_event_id, start_at,"
                f" backfilled_at) SELECT 'events', 'g', $1, {since}, {start}, CASE WHEN $2 THEN now() END"
                " FROM pgebus.events e",
                name,
                there,
            )
        covered = pattern == "a.*" and done and old in ("before", "beginning", "always")
        expected = int(new != "after" and not covered)
        if (made := await backfill(store, "a.b")) != expected:
            wrong.append((event_id, new, old, pattern, done, made))
    assert not wrong


async def test_two_patterns_that_are_new_at_once_leave_nothing_out(store: Store, sql: Sql) -> None:
    ids = [await publish(sql, name) for name in ("a.b", "a.c", "b.c", "c.d")]
    await subscribe(sql, "g", "a.*", "*.c")
    await sql.execute("UPDATE pgebus.subscriptions SET start_at = '-infinity'")
    assert await backfill(store, "a.*") == 2
    assert await backfill(store, "*.c") == 1
    rows = await sql.fetch("SELECT event_id FROM pgebus.deliveries WHERE consumer_group = 'g' ORDER BY 1")
    assert [row[0] for row in rows] == ids[:3]


@pytest.mark.parametrize("order", [("a.*", "*.b"), ("*.b", "a.*")])
async def test_a_group_that_comes_back_with_two_patterns_gets_all_that_was_cancelled(
    order: tuple[str, str], store: Store, sm: DatabaseSessionManager, sql: Sql
) -> None:
    await subscribe(sql, "g", "#")
    ids = [await publish(sql, name) for name in ("a.b", "a.c", "b.b", "c.d")]
    await sql.execute("UPDATE pgebus.subscriptions SET declared_at = now() - interval '1 day'")
    async with sm.session() as session:
        assert await operations.remove_group(session, "g") == 4
        await session.commit()
    await subscribe(sql, "g", *order)
    await sql.execute("UPDATE pgebus.subscriptions SET start_at = '-infinity'")
    assert await backfill(store, order[0]) + await backfill(store, order[1]) == 3
    assert await left(sql) == [(event_id, "pending") for event_id in ids[:3]] + [(ids[3], "cancelled")]


async def test_what_was_completed_and_deleted_is_not_delivered_again(store: Store, sql: Sql) -> None:
    """A new pattern goes back to the beginning, over events that an older one covers, and over others."""
    leases = await held(sql, store, None, None)
    await store.forget(leases)
    unlike = await publish(sql, "b.c")  # unhandled, until somebody wants it
    await subscribe(sql, "g", "#")
    await sql.execute("UPDATE pgebus.subscriptions SET start_at = '-infinity' WHERE pattern = '#'")
    assert await backfill(store, "#") == 1
    assert await left(sql) == [(unlike, "pending")]


async def test_what_somebody_has_backfilled_meanwhile_is_not_backfilled_again(
    store: Store, sql: Sql, other: Sql
) -> None:
    """A worker that was slow looks at the subscription again; and until it has, nobody says that it is done."""
    event_id = await publish(sql)
    await subscribe(sql, "g", "a.b")
    (new,) = await store.backfills()
    assert await store.backfill(new, 0, event_id, 100) == (1, event_id, None)
    async with other.transaction():
        await other.execute(BACKFILLED)
        assert await store.backfill(new, 0, event_id, 100) is None
    await store.forget(await store.claim(WORKER, ["g"], 1))
    assert await left(sql) == []
    assert await store.backfill(new, 0, event_id, 100) is None
    assert await left(sql) == []


async def test_a_backfill_says_nothing_of_a_pattern_that_was_declared_again(store: Store, sql: Sql) -> None:
    await publish(sql)
    await subscribe(sql, "g", "a.b")
    (old,) = await store.backfills()
    await sql.execute("DELETE FROM pgebus.subscriptions")
    await subscribe(sql, "g", "a.b")
    assert await store.backfill(old, 0, 100, 100) is None
    await store.backfilled(old)
    assert await backfill(store, "a.b") == 1


# The fence of a delivery that is made again


@pytest.mark.parametrize("how", ["replay", "backfill"])
async def test_a_late_completion_does_not_meet_a_delivery_that_was_made_again(
    how: str, store: Store, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The worker that has the new one is the same, and not done with the old one: it had no answer."""
    leases = await held(sql, store, None)
    assert len(await store.forget(leases)) == 1
    if how == "replay":
        async with sm.session() as session:
            (made,) = await operations.replay(session, "g")
            await session.commit()
        assert made.was is None
    else:  # somebody has removed the pattern, and with it what was known of the events that it covered
        await sql.execute("UPDATE pgebus.subscriptions SET backfilled_at = NULL, start_at = '-infinity'")
        assert await backfill(store, "a.#") == 1
    (again,) = await store.claim(WORKER, ["g"], 1)
    assert again.attempt == 1
    assert await store.forget(leases) == set()
    assert await store.still_held([lease.fence for lease in leases]) == set()
    assert await store.forget([again]) == {again.fence[:2]}


async def test_a_delivery_that_is_made_again_has_room_for_its_claims(sm: DatabaseSessionManager, sql: Sql) -> None:
    await subscribe(sql, "g", "a.b")
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 1000)")
    await sql.execute("DELETE FROM pgebus.deliveries")
    async with sm.session() as session:
        assert len(await operations.replay(session, "g", limit=1_000)) == 1_000
        await session.commit()
    least, most, count = tuple(
        await sql.fetchrow("SELECT min(claim_seq), max(claim_seq), count(DISTINCT claim_seq) FROM pgebus.deliveries")
        or ()
    )
    assert least >= 1_000_000
    assert most < 2**30
    assert count > 990
