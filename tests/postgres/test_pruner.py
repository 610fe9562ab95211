"""What a worker prunes, and what it looks at on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from tests.postgres.plain_sql import Sql
from tests.postgres.states import STATES, deliver, event_in

from pgebus import DatabaseSessionManager
from pgebus._runtime.presence import Presence
from pgebus._runtime.pruning import Pruner
from pgebus._runtime.retention import Retention
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store
from pgebus.database import make_engine
from pgebus.settings import DatabaseSettings

HOUR = 3600.0


class Watched(Store):
    """Counts which deliveries it has looked at."""

    seen: Counter[int]
    walked: Counter[int]

    async def bare(self, older_than: float, after: int, limit: int) -> list[asyncpg.Record]:
        rows = await super().bare(older_than, after, limit)
        assert len(rows) <= limit
        self.walked.update(row["event_id"] for row in rows)
        return rows

    async def finished(self, older_than: float, after: int, limit: int) -> list[asyncpg.Record]:
        rows = await super().finished(older_than, after, limit)
        assert len({row["place"] for row in rows}) <= limit
        self.seen.update(row["event_id"] for row in rows)
        return rows


@pytest.fixture
async def store(database: DatabaseSettings) -> AsyncIterator[Watched]:
    engine = make_engine(database, isolation_level="AUTOCOMMIT")
    line = Line(engine)
    watched = Watched(line, Statements("pgebus"), "events")
    watched.seen, watched.walked = Counter(), Counter()
    yield watched
    await line.close()
    await engine.dispose()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_SECONDS", 0.0)


async def pruner(store: Store, sql: Sql, retention: Retention, worker_id: int = 5, **options: Any) -> Pruner:
    presence = Presence(lambda _: None)
    presence.worker_id = worker_id
    presence.arrive()
    await sql.execute("INSERT INTO pgebus.workers (id, channel) VALUES ($1, 'events')", worker_id)
    return Pruner(store, presence, retention, **options)


async def kept(sql: Sql) -> list[int]:
    return [row["id"] for row in await sql.fetch("SELECT id FROM pgebus.events ORDER BY id")]


async def some(sql: Sql, count: int, *, age: str = "1 hour", event_type: str = "a.b") -> range:
    """Finish events one millisecond after the other."""
    await sql.execute("SET session_replication_role = replica")
    first = await sql.fetchval(
        "WITH made AS (INSERT INTO pgebus.events (type) SELECT $1 FROM generate_series(1, $2::int) RETURNING id),"
        " done AS (INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, status, finished_at)"
        " SELECT id, now(), 'events', 'g', $1, 'completed', now() - $3::text::interval + interval '1 ms' * id"
        " FROM made)"
        " SELECT min(id) FROM made",
        event_type,
        count,
        age,
    )
    await sql.execute("RESET session_replication_role")
    return range(first, first + count)


async def test_each_type_and_each_status_has_its_time(
    store: Watched, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """What is finished, dead and unhandled is half an hour old here; the event of each is an hour old."""
    at = {status: await event_in(sql, status) for status in STATES}
    audit = await event_in(sql, "completed", event_type="audit.login")
    mixed = {status: await event_in(sql, "completed") for status in STATES}
    for status, event_id in mixed.items():
        if status == "blocked":
            await sql.execute("UPDATE pgebus.events SET key = 'k' WHERE id = $1", event_id)
        await deliver(sql, event_id, status, group="other")
    everything = await kept(sql)

    async def gone_with(worker_id: int, retention: Retention) -> set[int]:
        nonlocal everything
        await (await pruner(store, sql, retention, worker_id)).round()
        before, everything = everything, await kept(sql)
        await sql.execute("UPDATE pgebus.workers SET ended_at = now() WHERE id = $1", worker_id)
        return set(before) - set(everything)

    assert await gone_with(1, Retention()) == set()
    assert await gone_with(2, Retention(HOUR, {}, HOUR, 2 * HOUR)) == set()
    assert await gone_with(3, Retention(HOUR, {"a.*": 60.0})) == {
        at["completed"], at["cancelled"], mixed["completed"], mixed["cancelled"]
    }  # fmt: skip
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert await gone_with(4, Retention(None, {"a.b": 60.0}, dead=60.0)) == {at["dead"], mixed["dead"]}
    # one message for each group
    assert caplog.text.count("were dead, because their retention is over: 1; of the types a.b (1)") == 2
    assert await gone_with(5, Retention(60.0, unhandled=1800.0)) == {at["unhandled"], mixed["unhandled"], audit}
    assert caplog.text.count("were unhandled, because their retention is over: 1") == 2


async def test_an_unhandled_event_has_its_time_from_when_it_was_due(store: Watched, sql: Sql) -> None:
    """Nor does a due time in the far past make an event old that was published just now."""
    early, late, young = [await event_in(sql, "unhandled") for _ in range(3)]
    await sql.execute("UPDATE pgebus.deliveries SET due_at = now() + interval '1 day' WHERE event_id = $1", late)
    await sql.execute("UPDATE pgebus.events SET created_at = now() WHERE id = $1", young)
    await sql.execute("UPDATE pgebus.deliveries SET due_at = now() - interval '9 years' WHERE event_id = $1", young)
    await (await pruner(store, sql, Retention(unhandled=60.0))).round()
    assert await kept(sql) == [late, young]
    assert early not in await kept(sql)


async def test_a_delayed_one_hides_no_unhandled_one_behind_it(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 1)
    late, early = [await event_in(sql, "unhandled") for _ in range(2)]
    await sql.execute("UPDATE pgebus.deliveries SET due_at = now() + interval '1 day' WHERE event_id = $1", late)
    await (await pruner(store, sql, Retention(unhandled=60.0))).round()
    assert await kept(sql) == [late]
    assert early != late


async def test_a_pass_looks_at_nothing_twice_and_the_next_one_goes_on(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at what another group still holds, nor at what is kept longer, nor at many that ended at one moment."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 7)
    held = await some(sql, 60)
    for event_id in held:
        await deliver(sql, event_id, "pending", group="slow")
    alike = await some(sql, 30)
    await sql.execute(
        "UPDATE pgebus.deliveries SET finished_at = now() - interval '2 hours' WHERE event_id = ANY ($1)", list(alike)
    )
    for event_id in alike[:20]:
        await deliver(sql, event_id, "pending", group="slow")
    longer = await some(sql, 40, event_type="audit.login")
    over = await some(sql, 50)
    one = await pruner(store, sql, Retention(1800.0, {"audit.#": 86_400.0}))
    await one.round()
    assert await kept(sql) == sorted([*held, *alike[:20], *longer])
    assert store.seen == dict.fromkeys([*held, *alike, *longer, *over], 1)

    store.seen.clear()
    await sql.execute(
        "UPDATE pgebus.deliveries SET status = 'completed', finished_at = clock_timestamp() - interval '35 minutes'"
        " WHERE event_id = ANY ($1) AND consumer_group = 'slow'",
        [*held],
    )
    await one.round()
    assert store.seen == dict.fromkeys(held, 1)
    assert await kept(sql) == sorted([*alike[:20], *longer])


async def test_what_was_locked_goes_with_a_pass_from_the_beginning(
    store: Watched, sql: Sql, sm: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = await some(sql, 3)
    one = await pruner(store, sql, Retention(1800.0))
    async with sm.session() as person:
        await person.execute(text("SELECT FROM pgebus.deliveries WHERE event_id = :id FOR UPDATE"), {"id": first})
        await person.execute(text("SELECT FROM pgebus.events WHERE id = :id FOR KEY SHARE"), {"id": second})
        await one.round()
        assert await kept(sql) == [first, second]
    await one.round()
    assert await kept(sql) == [first, second]
    assert third not in await kept(sql)
    monkeypatch.setattr(one, "_whole_at", 0.0)
    await one.round()
    assert await kept(sql) == []


async def test_nobody_deletes_what_another_worker_keeps(store: Watched, sql: Sql) -> None:
    """As in a rolling deploy. When that one has gone, what it kept goes at the next pass, as old as it may be."""
    events = list(await some(sql, 3))
    hurried = await pruner(store, sql, Retention(60.0), 1)
    careful = await pruner(store, sql, Retention(86_400.0), 2)
    await careful.round()
    await hurried.round()
    assert await kept(sql) == events
    await sql.execute("UPDATE pgebus.workers SET ended_at = now() WHERE id = 2")
    await hurried.round()
    assert await kept(sql) == []


async def test_what_is_not_understood_keeps_everything(
    store: Watched, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """A later release may say more than this one knows."""
    events = list(await some(sql, 3))
    await sql.execute("INSERT INTO pgebus.workers (id, channel, retention) VALUES (1, 'events', '{\"months\": 1}')")
    one = await pruner(store, sql, Retention(60.0))
    await one.round()
    assert await kept(sql) == events
    assert "not understood" in caplog.text
    await sql.execute("UPDATE pgebus.workers SET ended_at = now() WHERE id = 1")
    await one.round()
    assert await kept(sql) == []


async def test_other_channels_are_the_matter_of_their_workers(store: Watched, sql: Sql) -> None:
    mine, other = await some(sql, 2)
    await sql.execute("UPDATE pgebus.deliveries SET channel = 'other' WHERE event_id = $1", other)
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, retention) VALUES"
        ' (1, \'other\', \'{"default": null, "patterns": {}, "dead": null, "unhandled": null}\')'
    )
    await (await pruner(store, sql, Retention(60.0))).round()
    assert await kept(sql) == [other]
    assert mine != other


async def test_an_event_that_a_table_refers_to_keeps_no_other(
    store: Watched, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of its batch nor of another."""
    events = await some(sql, 2_100)
    await sql.execute("CREATE TABLE mine (event_id bigint REFERENCES pgebus.events)")
    referred = [events[0], events[2], events[999], events[1500]]
    await sql.executemany("INSERT INTO mine VALUES ($1)", [(event_id,) for event_id in referred])
    one = await pruner(store, sql, Retention(60.0))
    for _ in range(20):
        await one.round()
    assert await kept(sql) == referred
    assert caplog.text.count("rows of table 'mine' refer to them") >= 1


async def test_the_search_for_what_is_referred_to_goes_on_in_the_next_round(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgebus._runtime.pruning.ROUND_SECONDS", 0.0)
    events = await some(sql, 8)
    await sql.execute("CREATE TABLE mine (event_id bigint REFERENCES pgebus.events)")
    await sql.execute("INSERT INTO mine VALUES ($1)", events[5])
    one = await pruner(store, sql, Retention(60.0))
    left = []
    for _ in range(7):
        await one.round()
        left.append(len(await kept(sql)))
    assert left == [8, 4, 4, 4, 3, 3, 1]  # 8: no; 4; 4: no; 2: no; 1; 1: no; 2
    assert store.seen == dict.fromkeys(events, 1)


async def test_a_deletion_that_lasts_too_long_is_tried_in_halves(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a foreign key that cascades to a large table without an index: else it fails so for ever."""
    events = await some(sql, 8)
    await sql.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN PERFORM pg_sleep(CASE old.id WHEN {events[5]} THEN 9 ELSE 0.1 END); RETURN old; END$$;"
        "CREATE TRIGGER slow BEFORE DELETE ON pgebus.events FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    await store._line.fetch("SET statement_timeout = 300")
    one = await pruner(store, sql, Retention(60.0))
    for _ in range(20):
        await one.round()
    assert await kept(sql) == [events[5]]
    assert caplog.text.count("takes longer than a statement may last") == 1
    assert store.seen[events[0]] == 1


async def test_after_a_deletion_that_lasted_too_long_the_rest_of_the_maintenance_comes_first(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials in one round would hold up recovery twice as long; and each second it would be held up again."""
    events = await some(sql, 8)
    now, tried = 10.0**9, list[int]()

    async def remove(kept: dict[int, float | None], **_: object) -> int:
        nonlocal now
        tried.append(len(kept))
        now += 12
        raise asyncpg.QueryCanceledError

    one = await pruner(store, sql, Retention(60.0))
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_SECONDS", 60.0)
    monkeypatch.setattr("pgebus._runtime.pruning.monotonic", lambda: now)
    monkeypatch.setattr(store, "remove", remove)
    await one.round()
    await one.round()
    assert tried == [8]
    now += 60
    await one.round()
    assert tried == [8, 4]
    assert await kept(sql) == list(events)


async def test_what_lasts_long_is_done_in_smaller_parts(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some(sql, 30)
    now, each, parts = 10.0**9, 0.5, list[int]()

    async def remove(kept: dict[int, float | None], **_: object) -> int:
        nonlocal now
        parts.append(len(kept))
        now += each * len(kept)
        return len(kept)

    one = await pruner(store, sql, Retention(60.0))
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 10)
    monkeypatch.setattr("pgebus._runtime.pruning.monotonic", lambda: now)
    monkeypatch.setattr(store, "remove", remove)
    monkeypatch.setattr(one, "_size", 8)
    for _ in range(6):
        await one.round()
    assert parts == [8, 2, 4, 2, 2, 2]
    each = 0.0
    await one.round()
    assert parts[6:] == [2, 4, 4]


@pytest.mark.parametrize(
    "refusing",
    [
        # 23001 from PostgreSQL 18 on, and 23503 before.
        "CREATE TABLE mine (event_id bigint REFERENCES pgebus.events ON DELETE RESTRICT);"
        "INSERT INTO mine SELECT min(id) FROM pgebus.events",
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not archived'; END$$;"
        "CREATE TRIGGER mine BEFORE DELETE ON pgebus.events FOR EACH ROW WHEN (old.id % 6 = 1) EXECUTE FUNCTION no()",
    ],
    ids=["restrict", "trigger"],
)
async def test_what_the_application_refuses_to_delete_ends_no_round(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusing: str
) -> None:
    """A round that raises is the failure of all of the maintenance: of health, of new groups, again and again."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 2)
    events = await some(sql, 6)
    await sql.execute(refusing)
    await (await pruner(store, sql, Retention(60.0))).round()
    assert await kept(sql) == [events[0]]
    assert caplog.text.count("Events are kept, because") == 1


async def test_a_pass_heeds_who_came_after_it_had_begun(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a long history a pass lasts for hours, and a worker that keeps more is started meanwhile."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 2)
    monkeypatch.setattr("pgebus._runtime.pruning.ROUND_SECONDS", 0.0)
    events = await some(sql, 8)
    one = await pruner(store, sql, Retention(60.0))
    await one.round()
    assert await kept(sql) == list(events[2:])
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, retention) VALUES (1, 'events', $1)", Retention(None).to_json()
    )
    for _ in range(3):
        await one.round()
    assert await kept(sql) == list(events[2:])
    await sql.execute("UPDATE pgebus.workers SET ended_at = now() WHERE id = 1")
    for _ in range(5):
        await one.round()
    assert await kept(sql) == []


# Groups that keep no history


async def bare(sql: Sql, count: int, *, event_type: str = "a.b", channel: str = "events", **ago: str) -> list[int]:
    """Publish events whose deliveries are completed and deleted: `created` and `due` are how long ago."""
    await sql.execute("SET session_replication_role = replica")
    rows = await sql.fetch(
        "INSERT INTO pgebus.events (type, channel, created_at, run_at)"
        " SELECT $1, $2, now() - $3::text::interval, now() - $4::text::interval FROM generate_series(1, $5::int)"
        " RETURNING id",
        event_type,
        channel,
        ago.get("created", "1 hour"),
        ago.get("due", "1 hour"),
        count,
    )
    await sql.execute("RESET session_replication_role")
    return [row["id"] for row in rows]


async def test_events_without_a_delivery_go_after_the_retention_of_their_types(store: Watched, sql: Sql) -> None:
    await bare(sql, 3)
    await bare(sql, 1, event_type="noise.x", created="10 minutes")
    stays = await bare(sql, 1, event_type="law.x")
    stays += await bare(sql, 1, created="10 minutes") + await bare(sql, 1, due="10 minutes")
    stays += await bare(sql, 1, channel="elsewhere") + [await event_in(sql, "pending"), await event_in(sql, "dead")]
    retention = Retention(1_800.0, {"law.#": None, "noise.#": 60.0})
    pruning = await pruner(store, sql, retention)
    await pruning.round()
    assert len(await kept(sql)) == len(stays) + 4  # no worker has such a group
    await sql.execute("INSERT INTO pgebus.workers (id, channel, retention) VALUES (6, 'events', $1::jsonb)",
                      Retention(1_800.0, {"noise.#": 60.0}, forgets=True).to_json())  # fmt: skip
    await pruning.round()
    assert await kept(sql) == stays


async def test_a_worker_says_that_it_has_such_a_group_as_soon_as_it_has(store: Watched, sql: Sql) -> None:
    declared: list[str] = []
    pruning = await pruner(store, sql, Retention(60.0), forgets=lambda: bool(declared))
    said = "SELECT retention ? 'forgets' FROM pgebus.workers"
    await pruning.round()
    assert await sql.fetchval(said) is False
    declared.append("brief")
    await bare(sql, 1)
    await pruning.round()
    assert await sql.fetchval(said) is True
    assert await kept(sql) == []


async def test_a_pass_through_the_events_looks_at_each_once(
    store: Watched, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the hour is over: what has lost its last delivery since then is found. What is young is looked at again."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_BATCH", 3)
    held = [await event_in(sql, "pending") for _ in range(4)]
    await bare(sql, 4)
    young = await bare(sql, 5, created="59 seconds")
    pruning = await pruner(store, sql, Retention(60.0), forgets=lambda: True)
    for _ in range(2):
        await pruning.round()
        assert await kept(sql) == [*held, *young]
    # The last look may have met those that are young.
    assert all(store.walked[event_id] == 1 for event_id in held)
    assert all(store.walked[event_id] <= 4 for event_id in young)
    await sql.execute("DELETE FROM pgebus.deliveries; UPDATE pgebus.events SET created_at = now() - interval '1 hour'")
    await pruning.round()
    assert await kept(sql) == held
    pruning._whole_at = 0.0
    await pruning.round()
    assert await kept(sql) == []
