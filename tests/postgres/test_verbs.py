"""What a person does to deliveries: every verb on every state, twice, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.postgres.plain_sql import Sql, drain, listen, publish, subscribe
from tests.postgres.states import STATES, deliver, event_in

from pgebus import ConfigurationError, DatabaseSessionManager, SessionTypeError, operations
from pgebus.operations import Changed

Verb = Callable[[AsyncSession, int], Awaitable[Any]]

VERBS: Final[dict[str, Verb]] = {
    "redrive": lambda session, event_id: operations.redrive(session, event_ids=[event_id]),
    "replay": lambda session, event_id: operations.replay(session, "default", event_ids=[event_id]),
    "cancel": lambda session, event_id: operations.cancel(session, event_ids=[event_id]),
    "release_key": lambda session, _: operations.release_key(session, "default", "k"),
    "prune": lambda session, _: operations.prune(session, timedelta(0)),
    "purge_payload": lambda session, event_id: operations.purge_payload(session, event_ids=[event_id]),
}

# What a verb makes of a state without a key; what is not named stays as it is. None: it is gone.
BECOMES: Final[dict[str, dict[str, str | None]]] = {
    "redrive": {"dead": "pending"},
    "replay": {"dead": "pending", "completed": "pending", "cancelled": "pending"},
    "cancel": dict.fromkeys(("pending", "blocked", "running", "unhandled", "dead"), "cancelled"),
    "release_key": {"blocked": "pending"},  # nothing holds it: what the next sweep would do
    "prune": {"completed": None, "cancelled": None},
    "purge_payload": {"dead": "cancelled"},
}


async def status_of(sql: Sql, event_id: int, group: str = "default") -> str | None:
    status: str | None = await sql.fetchval(
        "SELECT status FROM pgebus.deliveries WHERE event_id = $1 AND consumer_group = $2", event_id, group
    )
    return status


async def row_of(sql: Sql, event_id: int) -> dict[str, Any]:
    return dict(await sql.fetchrow("SELECT * FROM pgebus.deliveries WHERE event_id = $1", event_id) or {})


async def do(sm: DatabaseSessionManager, what: Callable[[AsyncSession], Awaitable[Any]]) -> Any:
    async with sm.session() as session:
        done = await what(session)
        await session.commit()
        return done


async def _on(verb: Verb, event_id: int, session: AsyncSession) -> Any:
    return await verb(session, event_id)


def count(done: Any) -> int:
    return len(done.event_ids) if isinstance(done, operations.Purged) else done if isinstance(done, int) else len(done)


@pytest.mark.parametrize("name", VERBS)
async def test_every_verb_on_every_state_and_again(name: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    """What it changes it says, once; what it does not is as it was."""
    await subscribe(sql, "default", "#")
    for status in STATES:
        event_id = await event_in(sql, status)
        other = await event_in(sql, "dead" if status != "dead" else "running", group="other", event_type="x")
        before, beside = await row_of(sql, event_id), await row_of(sql, other)
        verb = partial(_on, VERBS[name], event_id)
        first = await do(sm, verb)
        after = await row_of(sql, event_id)
        assert after.get("status") == BECOMES[name].get(status, status)
        changes = status in BECOMES[name] and name != "release_key"
        if name == "purge_payload":
            changes = status in ("completed", "dead", "cancelled")
        assert count(first) == int(changes), status
        if not changes and name != "release_key":
            assert after == before
        if name in ("redrive", "replay", "cancel") and changes:
            assert first == [Changed(event_id, "default", status)]
        assert await row_of(sql, other) == beside
        assert count(await do(sm, verb)) == 0
        assert await row_of(sql, event_id) == after
        await sql.execute("TRUNCATE pgebus.events")


@pytest.mark.parametrize("name", ["redrive", "replay"])
async def test_a_new_round_begins(name: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    """The claims are counted on, or the fence of the last one would hold again; a redrive keeps what has succeeded."""
    await subscribe(sql, "default", "#")
    event_id = await event_in(sql, "dead")
    began = await sql.fetchval("SELECT clock_timestamp()")
    verb: Any = operations.redrive if name == "redrive" else partial(operations.replay, group="default")
    await do(sm, lambda session: verb(session, event_ids=[event_id], by="ada", reason="the address is right now"))
    row = await row_of(sql, event_id)
    assert (row["round"], row["attempt"], row["claim_seq"], row["lost"]) == (2, 0, 3, 1)
    assert row["handled"] == (["first"] if name == "redrive" else None)
    assert began <= row["due_at"] <= await sql.fetchval("SELECT clock_timestamp()")
    async with sm.session() as session:
        shown = await operations.show_event(session, event_id)
    assert shown is not None
    _, entry = shown.deliveries[0].errors
    assert datetime.fromisoformat(entry.pop("at")) >= began
    assert entry == {
        "attempt": 2,
        "worker": None,
        "handler": None,
        "type": "Redriven" if name == "redrive" else "Replayed",
        "message": "by ada: the address is right now",
        "traceback": None,
    }


async def test_errors_stay_five(sm: DatabaseSessionManager, sql: Sql) -> None:
    event_id = await event_in(sql, "dead")
    for number in range(6):
        await sql.execute("UPDATE pgebus.deliveries SET status = 'dead', finished_at = now()")
        assert await do(sm, lambda session, number=number: operations.redrive(session, by=f"{number}"))  # type: ignore[misc]
    async with sm.session() as session:
        (state,) = await operations.list_deliveries(session)
    assert [entry["message"] for entry in state.errors] == [f"by {number}" for number in range(1, 6)]
    assert (state.event_id, state.round) == (event_id, 7)


async def test_whoever_does_not_say_who_he_is_is_the_role(sm: DatabaseSessionManager, sql: Sql) -> None:
    await event_in(sql, "running")
    await do(sm, lambda session: operations.cancel(session, status="running"))
    async with sm.session() as session:
        (state,) = await operations.list_deliveries(session)
    assert state.errors[-1]["message"] == f"by {await sql.fetchval('SELECT session_user')}"


@pytest.mark.parametrize("name", ["redrive", "replay", "cancel", "release_key"])
async def test_nothing_happens_without_the_commit_and_everything_with_it(
    name: str, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The correction of the data and the verb are one transaction: both or neither."""
    await subscribe(sql, "default", "#")
    await sql.execute("CREATE TABLE fixes (note text)")
    event_id = await event_in(sql, "dead", holds_key=True)
    before = await row_of(sql, event_id)
    heard = await listen(sql, "events")
    for commits in (False, True):
        async with sm.session() as session:
            await session.execute(text("INSERT INTO fixes VALUES ('mended')"))
            assert count(await VERBS[name](session, event_id)) == 1
            await (session.commit() if commits else session.rollback())
        if not commits:
            assert await row_of(sql, event_id) == before
            assert await drain(heard, sql, "events") == []
    assert await row_of(sql, event_id) != before
    assert await sql.fetchval("SELECT count(*) FROM fixes") == 1
    assert await drain(heard, sql, "events") == ([] if name == "cancel" else [""])


# Keys


async def test_of_a_key_the_first_one_is_let_in_and_the_others_wait(sm: DatabaseSessionManager, sql: Sql) -> None:
    ids = [await event_in(sql, "dead", key="k") for _ in range(4)]
    head = await event_in(sql, "pending", key="k")
    async with sm.session() as session:
        # Not the first, as an operator might: the others are still to be asked for.
        await operations.redrive(session, event_ids=ids[2:])
        await session.commit()
        assert [await status_of(sql, each) for each in ids] == ["dead", "dead", "pending", "blocked"]
        assert len(await operations.redrive(session)) == 2
        await session.commit()
    # Each earlier one is before those that were let in: a claim takes the first alone.
    assert [await status_of(sql, each) for each in ids] == ["pending", "blocked", "pending", "blocked"]
    assert await status_of(sql, head) == "pending"


@pytest.mark.parametrize("before", ["pending", "running", "unhandled"])
async def test_what_is_before_it_in_its_key_stays_before_it(before: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    await event_in(sql, before, key="k", holds_key=before == "unhandled")
    dead = await event_in(sql, "dead", key="k")
    assert len(await do(sm, lambda session: operations.redrive(session))) == 1
    assert await status_of(sql, dead) == "blocked"


async def test_a_running_later_one_of_the_key_is_waited_for(sm: DatabaseSessionManager, sql: Sql) -> None:
    dead = await event_in(sql, "dead", key="k")
    await event_in(sql, "running", key="k")
    await do(sm, lambda session: operations.redrive(session))
    assert await status_of(sql, dead) == "blocked"


@pytest.mark.parametrize("status", ["pending", "running", "dead", "unhandled"])
async def test_who_is_cancelled_lets_the_next_of_its_key_in(status: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    first = await event_in(sql, status, key="k", holds_key=status in ("dead", "unhandled"))
    second, third = [await event_in(sql, "blocked", key="k") for _ in range(2)]
    heard = await listen(sql, "events")
    assert await do(sm, lambda session: operations.cancel(session, event_ids=[first])) == [
        Changed(first, "default", status)
    ]
    assert [await status_of(sql, each) for each in (first, second, third)] == ["cancelled", "pending", "blocked"]
    assert await drain(heard, sql, "events") == [""]


async def test_cancelling_one_that_waits_lets_nobody_in(sm: DatabaseSessionManager, sql: Sql) -> None:
    await event_in(sql, "pending", key="k")
    second, third = [await event_in(sql, "blocked", key="k") for _ in range(2)]
    heard = await listen(sql, "events")
    await do(sm, lambda session: operations.cancel(session, event_ids=[second]))
    assert await status_of(sql, third) == "blocked"
    assert await drain(heard, sql, "events") == []


async def test_a_place_that_comes_free_in_a_group_wakes(sm: DatabaseSessionManager, sql: Sql) -> None:
    event_id = await event_in(sql, "running")
    heard = await listen(sql, "events")
    await do(sm, lambda session: operations.cancel(session, event_ids=[event_id]))
    assert await drain(heard, sql, "events") == [""]


@pytest.mark.parametrize("status", ["dead", "unhandled"])
async def test_a_held_key_is_let_go(status: str, sm: DatabaseSessionManager, sql: Sql) -> None:
    holder = await event_in(sql, status, holds_key=True)
    waiting = await event_in(sql, "blocked", key="k")
    elsewhere = await event_in(sql, status, key="l", holds_key=True)
    heard = await listen(sql, "events")
    released = await do(sm, lambda session: operations.release_key(session, "default", "k", reason="wrong"))
    assert released == [Changed(holder, "default", status)]
    row = await row_of(sql, holder)
    assert (row["status"], row["holds_key"]) == (status, False)
    assert await status_of(sql, waiting) == "pending"
    assert (await row_of(sql, elsewhere))["holds_key"]
    assert await drain(heard, sql, "events") == [""]
    assert await do(sm, lambda session: operations.release_key(session, "default", "k")) == []


async def test_a_key_at_which_somebody_is_at_work_is_not_let_go(sm: DatabaseSessionManager, sql: Sql) -> None:
    await event_in(sql, "pending", key="k")
    waiting = await event_in(sql, "blocked", key="k")
    assert await do(sm, lambda session: operations.release_key(session, "default", "k")) == []
    assert await status_of(sql, waiting) == "blocked"


async def test_a_limit_takes_the_earliest(sm: DatabaseSessionManager, sql: Sql) -> None:
    """In the order of ids, not of their deaths: the next batch may not hold what comes before this one in its key."""
    ids = [await event_in(sql, "dead") for _ in range(5)]
    await sql.execute("UPDATE pgebus.deliveries SET finished_at = now() - make_interval(secs => event_id)")
    done = []
    for size in (2, 2, 1, 0):
        batch = await do(sm, lambda session: operations.redrive(session, limit=2))
        assert len(batch) == size
        done += [each.event_id for each in batch]
    assert done == ids


async def test_what_somebody_has_locked_is_passed_over(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Nobody waits, neither for a worker nor for another operator; so there is no deadlock either."""
    await subscribe(sql, "default", "#")
    ids = [await event_in(sql, "dead") for _ in range(2)]
    async with sql.transaction():
        await sql.execute("SELECT FROM pgebus.deliveries WHERE event_id = $1 FOR UPDATE", ids[0])
        for verb in (operations.redrive, operations.cancel):
            async with sm.session() as session:
                assert [each.event_id for each in await verb(session, event_ids=ids)] == [ids[1]]
        async with sm.session() as session:
            assert len(await operations.replay(session, "default", event_ids=ids)) == 1
        await sql.execute("SELECT FROM pgebus.events WHERE id = $1 FOR UPDATE", ids[1])
        async with sm.session() as session:
            assert await operations.replay(session, "default", event_ids=ids) == []
            assert (await operations.purge_payload(session, event_ids=ids[1:])).event_ids == ()


# Replay


async def test_a_group_gets_what_it_would_have_got(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Events from before it was there, and only those that it wants; nobody's unhandled event is somebody's then."""
    early = await publish(sql, "order.placed")
    keyed = [await publish(sql, "order.placed", key="k") for _ in range(2)]
    unwanted = await publish(sql, "mail.sent")
    other = await publish(sql, "order.placed", channel="other")
    await subscribe(sql, "late", "order.*")
    heard = await listen(sql, "events")
    done = await do(sm, lambda session: operations.replay(session, "late"))
    assert done == [Changed(each, "late", None) for each in (early, *keyed)]
    assert await status_of(sql, keyed[0], "late") == "pending"
    assert await status_of(sql, keyed[1], "late") == "blocked"
    rows = await sql.fetch("SELECT event_id FROM pgebus.deliveries WHERE consumer_group = 'default' ORDER BY 1")
    assert [row["event_id"] for row in rows] == [unwanted, other]
    assert await drain(heard, sql, "events") == [""]
    assert await do(sm, lambda session: operations.replay(session, "late")) == []


async def test_what_is_missing_may_be_left_out(sm: DatabaseSessionManager, sql: Sql) -> None:
    await subscribe(sql, "g", "#")
    event_id = await event_in(sql, "completed", group="g")
    await publish(sql)
    await sql.execute("DELETE FROM pgebus.deliveries WHERE event_id <> $1", event_id)
    async with sm.session() as session:
        assert len(await operations.replay(session, "g")) == 2
    async with sm.session() as session:
        assert len(await operations.replay(session, "g", missing=False)) == 1


async def test_an_event_that_is_not_due_waits_in_its_new_round_too(sm: DatabaseSessionManager, sql: Sql) -> None:
    await subscribe(sql, "default", "#")
    event_id = await event_in(sql, "cancelled")
    await sql.execute("UPDATE pgebus.events SET run_at = '2100-01-01'")
    await do(sm, lambda session: operations.replay(session, "default"))
    assert (await row_of(sql, event_id))["due_at"] == datetime(2100, 1, 1, tzinfo=UTC)


async def test_batches_of_a_replay_meet_each_event_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Also when the events of the first one are completed before the second one begins."""
    await subscribe(sql, "default", "#")
    ids = [await event_in(sql, "completed") for _ in range(5)]
    began = await sql.fetchval("SELECT clock_timestamp()")
    seen: list[int] = [0]
    async with sm.session() as session:
        while batch := await operations.replay(session, "default", limit=2, after=seen[-1], finished_before=began):
            seen += [each.event_id for each in batch]
            await session.commit()
            await sql.execute("UPDATE pgebus.deliveries SET status = 'completed', finished_at = now() WHERE round = 2")
    assert seen[1:] == ids
    assert await do(sm, lambda session: operations.replay(session, "default", finished_before=began)) == []


# Filters

MOMENT: Final = datetime(2030, 1, 1, tzinfo=UTC)


FILTERS: Final[list[tuple[dict[str, Any], list[int]]]] = [
    ({}, [0, 1, 2]),
    ({"event_type": "order.placed"}, [0, 1]),
    ({"event_type": "order.*"}, [0, 1]),
    ({"event_type": "#.sent"}, [2]),
    ({"event_type": "#"}, [0, 1, 2]),
    ({"key": "k"}, [1]),
    ({"group": "other"}, [2]),
    ({"channel": "events"}, [0, 1, 2]),
    ({"channel": "elsewhere"}, []),
    ({"finished_after": MOMENT}, [1, 2]),
    ({"finished_before": MOMENT}, [0]),
    ({"created_after": MOMENT, "created_before": MOMENT + timedelta(days=1)}, [1]),
    ({"created_before": MOMENT}, [0]),
    ({"event_ids": []}, []),
    ({"event_ids": []}, [0, 2]),
    ({"event_type": "order.*", "key": "k", "group": "default", "created_after": MOMENT}, [1]),
    ({"group": None, "key": None}, [0, 1, 2]),
]


async def test_a_filter_selects(sm: DatabaseSessionManager, sql: Sql) -> None:
    ids = [
        await event_in(sql, "dead", event_type="order.placed"),
        await event_in(sql, "dead", event_type="order.placed", key="k"),
        await event_in(sql, "dead", event_type="mail.sent", group="other"),
    ]
    for place, event_id in enumerate(ids):
        moment = MOMENT + timedelta(days=place - 1)
        await sql.execute("UPDATE pgebus.deliveries SET finished_at = $2 WHERE event_id = $1", event_id, moment)
        await sql.execute("UPDATE pgebus.events SET created_at = $2 WHERE id = $1", event_id, moment)
    for filters, found in FILTERS:
        expected = [ids[place] for place in found]
        if "event_ids" in filters:
            filters["event_ids"] = expected
        async with sm.session() as session:
            listed = await operations.list_deliveries(session, status="dead", **filters)
            assert [each.event_id for each in listed] == expected[::-1], filters
            assert await operations.count_deliveries(session, **filters) == len(found)
            redriven = await operations.redrive(session, **filters)
            assert [each.event_id for each in redriven] == expected, filters


async def test_pages_meet_each_delivery_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    for _ in range(3):
        await deliver(sql, await event_in(sql, "completed"), "dead", group="other")
    seen: list[tuple[int, str]] = []
    async with sm.session() as session:
        while page := await operations.list_deliveries(session, limit=2, after=seen[-1] if seen else None):
            seen += [(each.event_id, each.group) for each in page]
        assert len(seen) == 6
        assert seen == sorted(set(seen), reverse=True)
        page = await operations.list_deliveries(session, status="dead", limit=2)
        assert [each.group for each in page] == ["other", "other"]


SENT: Final[dict[str, Callable[[AsyncSession], Awaitable[Any]]]] = {
    "limit 0": lambda session: operations.redrive(session, limit=0),
    "limit -1": lambda session: operations.cancel(session, event_ids=[1], limit=-1),
    "limit 10^9": lambda session: operations.replay(session, "g", limit=10**9),
    "limit True": lambda session: operations.prune(session, timedelta(1), limit=True),
    "limit text": lambda session: operations.list_deliveries(session, limit="1; DROP TABLE x"),  # type: ignore[arg-type]
    "id -1": lambda session: operations.show_event(session, -1),
    "id 2^63": lambda session: operations.redrive(session, event_ids=[2**63]),
    "id text": lambda session: operations.redrive(session, event_ids="12"),  # type: ignore[arg-type]
    "ids too many": lambda session: operations.redrive(session, event_ids=range(10_001)),
    "naive": lambda session: operations.redrive(session, created_after=datetime(2030, 1, 1)),  # noqa: DTZ001 - that is the mistake
    "no moment": lambda session: operations.redrive(session, finished_before="now()"),  # type: ignore[arg-type]
    "type": lambda session: operations.redrive(session, event_type="a..b"),
    "pattern": lambda session: operations.redrive(session, event_type="a.b*"),
    "group": lambda session: operations.redrive(session, group="a b"),
    "channel": lambda session: operations.redrive(session, channel=""),
    "key": lambda session: operations.redrive(session, key="a\x00b"),
    "empty key": lambda session: operations.release_key(session, "g", ""),
    "no key": lambda session: operations.release_key(session, "g", None),  # type: ignore[arg-type]
    "no filter": lambda session: operations.redrive(session, order_by="1"),  # type: ignore[call-arg]
    "status": lambda session: operations.list_deliveries(session, status="done"),
    "statuses": lambda session: operations.list_deliveries(session, status=[]),
    "completed": lambda session: operations.cancel(session, status="completed"),
    "all": lambda session: operations.cancel(session),
    "all of a channel": lambda session: operations.cancel(session, channel="events"),
    "purge all": lambda session: operations.purge_payload(session, channel="events"),
    "cursor": lambda session: operations.list_deliveries(session, after=(1,)),  # type: ignore[arg-type]
    "cursor group": lambda session: operations.list_deliveries(session, after=(1, "'")),
    "after": lambda session: operations.replay(session, "g", after=-1),
    "age": lambda session: operations.prune(session, timedelta(-1)),
    "no age": lambda session: operations.prune(session, 30),  # type: ignore[arg-type]
    "reason": lambda session: operations.redrive(session, reason="x" * 1_001),
    "by": lambda session: operations.cancel(session, event_ids=[1], by="\ud800"),
}


async def test_a_mistake_is_said_before_anything_is_sent(sm: DatabaseSessionManager) -> None:
    accepted = []
    for mistake, call in SENT.items():
        async with sm.session() as session:
            try:
                await call(session)
            except ConfigurationError:
                assert not session.in_transaction(), mistake
            else:
                accepted.append(mistake)
    assert accepted == []


async def test_a_session_is_needed(sm: DatabaseSessionManager) -> None:
    with pytest.raises(SessionTypeError):
        await operations.redrive(sm)  # type: ignore[arg-type]


async def test_a_group_that_is_not_there_is_named(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        with pytest.raises(ConfigurationError, match="no consumer group 'x'"):
            await operations.replay(session, "x")
