"""What an event says is erased wherever it is kept, and what is erased is never handled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.states import STATES, deliver, event_in

from pgebus import DatabaseSessionManager, SessionStateError, operations
from pgebus._runtime.statements import Statements
from pgebus.operations import _statements, purging

UNFINISHED = ("pending", "blocked", "running", "unhandled")


async def everything(sql: Sql) -> str:
    """Return all that the tables hold, as text."""
    return "".join(
        [
            row["all"]
            for table in ("events", "deliveries")
            for row in await sql.fetch(f'SELECT t::text AS "all" FROM pgebus.{table} t')
        ]
    )


async def test_nothing_personal_is_left_of_a_finished_event(sm: DatabaseSessionManager, sql: Sql) -> None:
    """In the payload, in headers of the user's own, in the errors of any group."""
    event_id = await event_in(sql, "completed")
    await deliver(sql, event_id, "dead", group="other")
    assert "Ada" in await everything(sql)
    async with sm.session() as session:
        purged = await operations.purge_payload(session, event_ids=[event_id])
        await session.commit()
    assert (purged.event_ids, purged.unfinished) == ((event_id,), ())
    assert "Ada" not in await everything(sql)
    async with sm.session() as session:
        shown = await operations.show_event(session, event_id)
    assert shown is not None
    assert (shown.id, shown.type, shown.payload) == (event_id, "a.b", {})
    assert sorted(shown.headers) == ["correlation_id", "pgebus_purged_at"]
    for each in shown.deliveries:
        (entry,) = each.errors
        assert (entry["handler"], entry["type"], entry["attempt"]) == ("second", "ValueError", 2)
        assert (entry["message"], entry["traceback"]) == ("(purged)", None)
        assert each.status == ("completed" if each.group == "default" else "cancelled")


async def test_what_is_still_to_be_handled_is_named_and_left(sm: DatabaseSessionManager, sql: Sql) -> None:
    ids = {status: await event_in(sql, status) for status in STATES}
    # One group is through with it, another is not.
    both = await event_in(sql, "completed")
    await deliver(sql, both, "pending", group="other")
    async with sm.session() as session:
        purged = await operations.purge_payload(session, event_type="#")
        await session.commit()
        assert purged.event_ids == tuple(sorted(ids[status] for status in ("completed", "dead", "cancelled")))
        assert purged.unfinished == tuple(sorted([both, *(ids[status] for status in UNFINISHED)]))
        assert await sql.fetchval("SELECT count(*) FROM pgebus.events WHERE payload <> '{}'") == 5
        await operations.cancel(session, event_ids=purged.unfinished)
        again = await operations.purge_payload(session, event_ids=purged.unfinished)
        await session.commit()
        assert (again.event_ids, again.unfinished) == (purged.unfinished, ())
        assert await operations.purge_payload(session, event_type="#") == operations.Purged((), ())


async def test_what_is_erased_is_not_handled_again(sm: DatabaseSessionManager, sql: Sql) -> None:
    """A handler that is called with an empty payload would do something, and nothing that anybody wants."""
    await subscribe(sql, "default", "#")
    ids = [await event_in(sql, status) for status in ("dead", "completed")]
    async with sm.session() as session:
        await operations.purge_payload(session, event_ids=ids)
        assert await operations.redrive(session) == []
        assert await operations.replay(session, "default") == []
        await session.commit()
    await subscribe(sql, "late", "#")
    await sql.execute("UPDATE pgebus.subscriptions SET start_at = '-infinity' WHERE consumer_group = 'late'")
    other = await event_in(sql, "completed")
    created = await sql.fetchval("SELECT created_at::text FROM pgebus.subscriptions WHERE consumer_group = 'late'")
    row = await sql.fetchrow(Statements("pgebus").backfill, "events", "late", "#", 0, other, 100, created)
    assert row is not None
    assert (row["made"], row["reached"], row["missed"]) == (1, other, None)


async def test_a_dead_letter_that_is_erased_lets_go_of_its_key(sm: DatabaseSessionManager, sql: Sql) -> None:
    """It cannot be handled any more, so nothing waits for that."""
    holder = await event_in(sql, "dead", holds_key=True)
    waiting = await event_in(sql, "blocked", key="k")
    async with sm.session() as session:
        await operations.purge_payload(session, event_ids=[holder])
        await session.commit()
    assert await sql.fetchval("SELECT status FROM pgebus.deliveries WHERE event_id = $1", waiting) == "pending"


async def test_what_is_redriven_at_this_moment_keeps_its_payload(
    sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was dead when it was looked for, and is to be handled when it is about to be emptied."""
    event_id = await event_in(sql, "dead")
    fetch = _statements.fetch

    async def late(session: AsyncSession, statement: str, **parameters: Any) -> Sequence[Any]:
        if "d.ctid" in statement:
            async with sm.session() as other:
                assert await operations.redrive(other)
                await other.commit()
        return await fetch(session, statement, **parameters)

    monkeypatch.setattr(purging, "fetch", late)
    async with sm.session() as session:
        assert await operations.purge_payload(session, event_ids=[event_id]) == operations.Purged((), (event_id,))
        await session.commit()
    assert await sql.fetchval("SELECT payload::text FROM pgebus.events") == '{"name": "Ada"}'


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
async def test_a_session_that_cannot_look_again_is_refused(level: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    """It would not see a delivery that a replay has made since its snapshot, whose handlers would get nothing."""
    event_id = await event_in(sql, "completed")
    async with sm.session() as session:
        await session.connection(execution_options={"isolation_level": level})
        with pytest.raises(SessionStateError, match=level):
            await operations.purge_payload(session, event_ids=[event_id])
    assert await sql.fetchval("SELECT payload::text FROM pgebus.events") == '{"name": "Ada"}'


async def test_nobody_who_has_locked_a_delivery_is_waited_for(sm: DatabaseSessionManager, sql: Sql) -> None:
    locked, free = [await event_in(sql, "dead") for _ in range(2)]
    async with sql.transaction():
        await sql.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", locked)
        async with sm.session() as session:
            await session.execute(text("SET LOCAL lock_timeout = '1ms'"))
            purged = await operations.purge_payload(session, event_ids=[locked, free])
            await session.commit()
    assert purged == operations.Purged((free,), ())


async def test_an_event_without_any_delivery_is_emptied(sm: DatabaseSessionManager, sql: Sql) -> None:
    event_id = await event_in(sql, "completed")
    await sql.execute("DELETE FROM pgebus.deliveries")
    async with sm.session() as session:
        assert (await operations.purge_payload(session, event_ids=[event_id])).event_ids == (event_id,)


async def test_a_batch_is_bounded(sm: DatabaseSessionManager, sql: Sql) -> None:
    await event_in(sql, "pending")  # takes no place in a batch
    ids = [await event_in(sql, "dead") for _ in range(3)]
    async with sm.session() as session:
        assert (await operations.purge_payload(session, event_type="a.*", limit=2)).event_ids == tuple(ids[:2])
        assert (await operations.purge_payload(session, event_type="a.*", limit=2)).event_ids == tuple(ids[2:])


async def test_what_python_cannot_read_is_shown_as_text(sm: DatabaseSessionManager, sql: Sql) -> None:
    event_id = await event_in(sql, "dead", payload='{"n": %s}' % ("9" * 5_000))
    await sql.execute("UPDATE pgebus.events SET run_at = '20000-01-01'")
    async with sm.session() as session:
        shown = await operations.show_event(session, event_id)
        assert shown is not None
        assert isinstance(shown.payload, str)
        assert shown.run_at is None
        assert await operations.show_event(session, event_id + 1) is None
    json.dumps(shown.headers)
