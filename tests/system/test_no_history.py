"""A group that keeps no history, in a running system: what is left of an event, and what people see of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    Group,
    Reject,
    operations,
)
from pgebus._runtime.statements import Statements
from tests.system.bus import Sql, backfilled, delivery, finished, forgotten, publish, running
from tests.system.waiting import until


def counting(
    seen: Counter[int], *paths: str, transactional: bool = False, keep: bool | None = False, start: Any = None
) -> EventRouter:
    """Return handlers that count, and reject what they are told to, of a group that keeps no history."""
    router = EventRouter(group=Group("brief", keep_history=keep, start=start))
    for path in paths:

        @router.on(path, transactional=transactional, name=path)
        async def count(ctx: EventContext, payload: dict[str, Any]) -> None:
            seen[ctx.event_id] += 1
            if payload.get("bad") and seen[ctx.event_id] == 1:
                raise Reject("bad")

    return router


@pytest.mark.parametrize("transactional", [False, True])
async def test_what_is_completed_is_gone_and_what_is_dead_is_kept(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    seen = Counter[int]()
    async with running(counting(seen, "a", transactional=transactional), database):
        await backfilled(sql)
        good = [await publish(sm, "a") for _ in range(20)]
        bad = await publish(sm, "a", {"bad": True}, key="k")
        after = await publish(sm, "a", key="k")
        await finished(sql, bad, status="dead")
        await forgotten(sql, *good, after)
        async with sm.session() as session:
            assert [each.event_id for each in await operations.redrive(session)] == [bad]
            await session.commit()
        await forgotten(sql, bad)
    assert seen == Counter([*good, bad, bad, after])
    assert await sql.fetchval("SELECT count(*) FROM pgebus.events") == len(good) + 2


@pytest.mark.parametrize("transactional", [False, True])
async def test_what_is_cancelled_while_it_runs_is_kept(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()
    router = EventRouter(group=Group("brief", keep_history=False))

    @router.on("a", transactional=transactional)
    async def wait(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        inside.set()
        await go_on.wait()

    async with running(router, database) as system:
        await backfilled(sql)
        event_id = await publish(sm, "a")
        await inside.wait()
        async with sm.session() as session:
            assert len(await operations.cancel(session, event_ids=[event_id])) == 1
            await session.commit()
        go_on.set()

        async def nothing_held() -> bool:
            return system.health().held == 0

        await until(nothing_held)
    assert (await delivery(sql, event_id))["status"] == "cancelled"


async def test_an_older_handler_is_no_reason_to_repeat_anything_for_a_new_one(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The next release has a handler for more, from the beginning: what was handled is not handled again by any."""
    first, second = Counter[int](), Counter[int]()
    async with running(counting(first, "a.b"), database):
        await backfilled(sql)
        known = [await publish(sm, "a.b") for _ in range(5)]
        unknown = [await publish(sm, "a.c") for _ in range(3)]
        await forgotten(sql, *known)
    both = counting(second, "a.b", "a.#", start="beginning")
    async with running(both, database):
        await backfilled(sql)
        for event_id in unknown:
            await until_count(second, event_id, 1)
        later = [await publish(sm, name) for name in ("a.b", "a.c")]
        await forgotten(sql, *later)
    assert first == Counter(known)
    assert second == Counter([*unknown, *later, later[0]])  # two handlers have the last one


async def test_who_does_not_say_so_keeps_what_it_completes(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen = Counter[int]()
    async with running(counting(seen, "a", keep=None), database):
        event_id = await publish(sm, "a")
        await finished(sql, event_id)


async def test_who_looks_finds_the_event_and_no_delivery(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen = Counter[int]()
    async with running(counting(seen, "a"), database):
        await backfilled(sql)
        event_id = await publish(sm, "a", dedup_key="once")
        await forgotten(sql, event_id)
        async with sm.session() as session:
            shown = await operations.show_event(session, event_id)
            assert shown is not None
            assert list(shown.deliveries) == []
            await operations.trace(session, event_id)
            await operations.status(session)
            assert await operations.list_deliveries(session, event_ids=[event_id]) == []
            (group,) = await operations.list_groups(session)
            assert (group.group, group.pending, group.running) == ("brief", 0, 0)
            # Published once for as long as the event is kept, whatever is left of its deliveries.
            again = await operations.replay(session, "brief", reason="it was lost elsewhere")
            assert [each.was for each in again] == [None]
            await session.commit()
        assert await publish(sm, "a", dedup_key="once") == event_id
        await until_count(seen, event_id, 2)
        await forgotten(sql, event_id)
        async with sm.session() as session:
            assert await operations.prune(session, timedelta(0)) == 1
            await session.commit()


async def until_count(seen: Counter[int], event_id: int, count: int) -> None:
    async def check() -> bool:
        return seen[event_id] == count

    await until(check)


async def test_an_event_comes_with_its_deliveries_however_it_is_published(sql: Sql) -> None:
    """One without any is taken for completed: so nobody may ever see one that is only not delivered yet."""
    async with sql.transaction():
        await sql.execute("INSERT INTO pgebus.events (type) VALUES ('a')")
        await sql.copy_records_to_table("events", schema_name="pgebus", columns=["type"], records=[("a",), ("b",)])
        assert await sql.fetch(Statements("pgebus").bare, -60.0, 0, 10, "events") != []
        assert not any(row["old"] for row in await sql.fetch(Statements("pgebus").bare, -60.0, 0, 10, "events"))
        await sql.execute("DELETE FROM pgebus.deliveries")
        assert all(row["old"] for row in await sql.fetch(Statements("pgebus").bare, -60.0, 0, 10, "events"))
