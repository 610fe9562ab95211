"""`operations.trace`: the tree of causes, its bounds, and what it costs."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.plans import explaining

from pgebus import ConfigurationError, DatabaseSessionManager, operations
from pgebus.operations import Trace

INDEX = (
    "CREATE INDEX ON pgebus.events ((headers ->> 'correlation_id'), id) WHERE headers ->> 'correlation_id' IS NOT NULL"
)


async def event(sql: Sql, cause: object = None, correlation: object = None, event_type: str = "a.b") -> int:
    """Publish an event as a handler of *cause* would have; return its id."""
    headers = {"causation_id": cause, "correlation_id": correlation}
    said = json.dumps({name: str(value) for name, value in headers.items() if value is not None})
    event_id: int = await sql.fetchval(
        "INSERT INTO pgebus.events (type, headers) VALUES ($1, $2) RETURNING id", event_type, said
    )
    return event_id


async def family(sql: Sql) -> list[int]:
    """Publish 1 → (2 → (4, 5), 3), and strangers before and between."""
    await event(sql)
    root = await event(sql)
    first = await event(sql, root, root)
    await event(sql)
    second = await event(sql, root, root)
    return [root, first, second, await event(sql, first, root), await event(sql, first, root)]


async def traced(sm: DatabaseSessionManager, event_id: int, **options: int) -> Trace:
    async with sm.session() as session:
        found = await operations.trace(session, event_id, **options)
    assert found is not None
    return found


def shape(found: Trace) -> list[tuple[int, int]]:
    return [(each.id, each.depth) for each in found.events]


async def test_there_is_no_such_event(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        assert await operations.trace(session, 7) is None


@pytest.mark.parametrize("asked", range(5))
@pytest.mark.parametrize("correlation", [None, "request-7"])
async def test_the_tree_is_the_same_from_each_of_its_events(
    sm: DatabaseSessionManager, sql: Sql, asked: int, correlation: str | None
) -> None:
    root, first, second, third, fourth = ids = await family(sql)
    if correlation is not None:
        await sql.execute(
            "UPDATE pgebus.events SET headers = headers || jsonb_build_object('correlation_id', $1::text)"
            " WHERE id = ANY ($2)",
            correlation,
            ids,
        )
    found = await traced(sm, ids[asked])
    assert shape(found) == [(root, 0), (first, 1), (third, 2), (fourth, 2), (second, 1)]
    assert [each.cause for each in found.events] == [None, root, first, first, root]
    assert found.correlation_id == (correlation or str(root))
    assert (found.event_id, found.caused_by, found.more, found.searched_to) == (ids[asked], None, False, None)


async def test_a_root_says_what_has_caused_it_where_that_is_gone_or_of_another_correlation(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    root = await event(sql)
    apart = await event(sql, root, "of its own")
    below = await event(sql, apart, "of its own")
    found = await traced(sm, below)
    assert (shape(found), found.caused_by) == ([(apart, 0), (below, 1)], str(root))
    await sql.execute("DELETE FROM pgebus.events WHERE id = $1", apart)
    found = await traced(sm, below)
    assert (shape(found), found.caused_by) == ([(below, 0)], str(apart))


@pytest.mark.parametrize("cause", ["", "not a number", "-1", "9" * 30, "\N{SUPERSCRIPT TWO}"])
async def test_headers_that_somebody_has_made_up_end_the_line(sm: DatabaseSessionManager, sql: Sql, cause: str) -> None:
    alone = await event(sql, cause, "x")
    found = await traced(sm, alone)
    assert (shape(found), found.caused_by) == ([(alone, 0)], cause)


async def test_causes_in_a_circle_end(sm: DatabaseSessionManager, sql: Sql) -> None:
    first, second = await event(sql, None, "x"), await event(sql, None, "x")
    for one, another in ((first, second), (second, first)):
        await sql.execute(
            "UPDATE pgebus.events SET headers = headers || jsonb_build_object('causation_id', $2::text) WHERE id = $1",
            one,
            str(another),
        )
    found = await traced(sm, first)
    assert (shape(found), found.more) == ([(second, 0), (first, 1)], False)


async def chain(sql: Sql, length: int) -> list[int]:
    """Publish events of which each has caused the next, as handlers do that publish for each other without an end."""
    rows = await sql.fetch(
        "INSERT INTO pgebus.events (type, headers) SELECT 'a.b', CASE WHEN n = 1 THEN '{}'::jsonb ELSE"
        " jsonb_build_object('causation_id', (base + n - 1)::text, 'correlation_id', (base + 1)::text) END"
        " FROM (SELECT coalesce(max(id), 0) AS base FROM pgebus.events) b, generate_series(1, $1::integer) n"
        " RETURNING id",
        length,
    )
    return [row["id"] for row in rows]


async def test_a_chain_without_an_end_is_cut(sm: DatabaseSessionManager, sql: Sql) -> None:
    ids = await chain(sql, 500)
    for asked in (ids[0], ids[250], ids[-1]):
        found = await traced(sm, asked, limit=20)
        assert asked in {each.id for each in found.events}
        assert found.more
        assert len(found.events) <= 60
    assert len((await traced(sm, ids[-1], limit=500)).events) == 500


async def test_what_became_of_each_in_each_group(sm: DatabaseSessionManager, sql: Sql) -> None:
    for group in ("done", "dead", "runs", "again", "later"):
        await subscribe(sql, group, "a.b")
    asked = await event(sql)
    async with sql.transaction():  # all of it at one moment
        await sql.execute("UPDATE pgebus.events SET run_at = now() - interval '60 seconds'")
        await sql.execute("UPDATE pgebus.deliveries SET due_at = now() - interval '40 seconds'")
        for group, change in {
            "done": "status = 'completed', finished_at = now() - interval '20 seconds', attempt = 2",
            "dead": "status = 'dead', finished_at = now() - interval '50 seconds', attempt = 3, errors = '[{\"type\": "
            '"ValueError", "message": "first"}, {"type": "ValueError", "message": "no\\nsuch"}]\'',
            "runs": "status = 'running', worker_id = 1, claimed_at = due_at + interval '2 seconds', attempt = 1",
            "again": "status = 'completed', finished_at = due_at + interval '3 seconds', round = 2, attempt = 1",
            "later": "due_at = now() + interval '1 hour'",
        }.items():
            await sql.execute(
                f"UPDATE pgebus.deliveries SET claim_seq = 3, {change} WHERE consumer_group = $1",
                group,
            )
    found = {each.group: each for each in (await traced(sm, asked)).events[0].deliveries}
    assert list(found) == ["again", "dead", "done", "later", "runs"]
    assert found["done"].took == timedelta(seconds=40)
    assert found["done"].attempt == 2
    assert found["dead"].took == timedelta(seconds=10)
    assert found["dead"].error == "ValueError: no such"
    assert found["again"].took == timedelta(seconds=3)
    runs = found["runs"]
    assert runs.waited == timedelta(seconds=2)
    assert runs.ran is not None
    assert timedelta(seconds=38) <= runs.ran < timedelta(seconds=60)
    assert (found["later"].waited, found["later"].ran, found["later"].took) == (None, None, None)


async def test_what_was_caused_by_an_event_that_is_gone_is_below_the_root(sm: DatabaseSessionManager, sql: Sql) -> None:
    """A shorter retention of one type is enough for it; but of what another tree has, nothing is shown."""
    root, first, second, third, fourth = await family(sql)
    below = await event(sql, third, root)
    other = await event(sql, None, root)
    await event(sql, other, root)
    await event(sql, root - 1, root)
    await sql.execute("DELETE FROM pgebus.events WHERE id = ANY ($1)", [first, root - 1])
    found = await traced(sm, root)
    assert shape(found) == [(root, 0), (second, 1), (third, 1), (below, 2), (fourth, 1)]
    assert [each.cause for each in found.events] == [None, root, first, third, first]


@pytest.mark.parametrize("moment", ["20000-01-01", "4000-01-01 BC"])
async def test_a_moment_that_python_does_not_know_is_none(sm: DatabaseSessionManager, sql: Sql, moment: str) -> None:
    """Any publisher may write it."""
    await subscribe(sql, "g", "a.b")
    asked = await event(sql)
    below = await event(sql, asked, asked)
    await sql.execute(
        "UPDATE pgebus.events SET run_at = $1::text::timestamptz, created_at = $1::text::timestamptz", moment
    )
    for change in ("", ", status = 'running', worker_id = 1, claim_seq = 1, claimed_at = now()", ", status = 'dead'"):
        await sql.execute(
            f"UPDATE pgebus.deliveries SET due_at = $1::text::timestamptz{change}"
            + (", finished_at = now(), claimed_at = NULL, worker_id = NULL" if "dead" in change else ""),
            moment,
        )
        first, second = (await traced(sm, asked)).events
        assert (first.id, first.created_at, second.id, second.created_at) == (asked, None, below, None)
        (delivery,) = first.deliveries
        assert (delivery.due_at, delivery.waited, delivery.took) == (None, None, None)
        assert (delivery.ran is not None) == ("running" in change)


@pytest.mark.parametrize(
    "wrong",
    [{"event_id": 0}, {"event_id": 2**63}, {"limit": 0}, {"limit": 10_001}, {"within": 0}, {"within": True}],
    ids=str,
)
async def test_a_number_that_cannot_be_is_refused(sm: DatabaseSessionManager, wrong: dict[str, Any]) -> None:
    options = {"event_id": 1, **wrong}
    async with sm.session() as session:
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            await operations.trace(session, options.pop("event_id"), **options)


async def test_the_search_ends_and_says_where(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Unless the table has an index of the correlation ids, which it then uses."""
    root = await event(sql)
    await chain(sql, 100)
    far = await event(sql, root, root)
    found = await traced(sm, root, within=50)
    assert (shape(found), found.searched_to) == ([(root, 0)], root + 50)
    assert shape(await traced(sm, far, within=50)) == [(root, 0), (far, 1)]
    await sql.execute(INDEX)
    found = await traced(sm, root, within=50)
    assert (shape(found), found.searched_to) == ([(root, 0), (far, 1)], None)


async def test_what_it_costs(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Without an index, as many events as it searches; with one, as many as it finds."""
    await sql.execute("ALTER TABLE pgebus.events SET (autovacuum_enabled = false)")
    await sql.execute("SET session_replication_role = replica")
    insert = "INSERT INTO pgebus.events (type, payload) SELECT 'a.b', '{\"n\": 1}' FROM generate_series(1, 20000)"
    await sql.execute(insert)
    *_, last = await chain(sql, 10)
    await sql.execute(f"{insert}; {insert}; ANALYZE pgebus.events")
    pages: int = await sql.fetchval("SELECT pg_relation_size('pgebus.events') / 8192")
    buffers = explaining(sm)

    async def cost(**options: int) -> int:
        buffers.clear()
        assert len((await traced(sm, last, **options)).events) == 10
        return sum(buffers)

    assert await cost(within=5_000) < pages / 3
    await sql.execute(f"{INDEX}; ANALYZE pgebus.events")
    assert await cost() < 150
    endless = await chain(sql, 10_000)
    buffers.clear()
    assert (await traced(sm, endless[5_000], limit=20)).more
    assert sum(buffers) < 500
