"""Findings that plain SQL provokes: each is there, says what it is about, and was not there before."""

from __future__ import annotations

from typing import Final, NamedTuple

import pytest

from pgebus.doctor import Severity
from tests.doctor.conftest import Examine, of, wrong
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.states import event_in


class Case(NamedTuple):
    """What is done, and what is found then."""

    sql: str
    code: str
    severity: Severity
    words: tuple[str, ...]
    remedy: str


PROBLEM, WARNING, NOTICE = Severity.PROBLEM, Severity.WARNING, Severity.NOTICE
GROUP = "INSERT INTO pgebus.consumer_groups (channel, consumer_group{more}) VALUES ('events', 'mail'{values});"
PLAIN = GROUP.format(more="", values="")
SUBSCRIBED = (
    f"{PLAIN} INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'mail', 'a.b');"
)
PUBLISHED = "INSERT INTO pgebus.events (type, run_at) VALUES ('a.b', now() - interval '2 hours');"
# A worker that is alive, as far as anybody can see: it beats.
BEATING = (
    "INSERT INTO pgebus.workers (id, channel, groups, beat_at, version) VALUES (1, 'events', '{mail}', now(), '1');"
)

CASES = [
    Case(
        "ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = off)",
        "autovacuum-off-for-table",
        PROBLEM,
        ('"pgebus".deliveries',),
        'ALTER TABLE "pgebus".deliveries RESET (autovacuum_enabled);',
    ),
    Case(
        "ALTER TABLE pgebus.events SET (toast.autovacuum_enabled = off)",
        "autovacuum-off-for-table",
        PROBLEM,
        ('"pgebus".events', "large values"),
        'ALTER TABLE "pgebus".events RESET (toast.autovacuum_enabled);',
    ),
    Case("DROP INDEX pgebus.ix_deliveries_due", "index-missing", PROBLEM, ("ix_deliveries_due",), "CREATE INDEX"),
    Case(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pgebus.ix_deliveries_dead'::regclass",
        "index-invalid",
        PROBLEM,
        ("ix_deliveries_dead", "invalid"),
        'REINDEX INDEX CONCURRENTLY "pgebus"."ix_deliveries_dead";',
    ),
    Case(
        "CREATE INDEX ix_deliveries_dead_ccnew1 ON pgebus.deliveries (event_id);"
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pgebus.ix_deliveries_dead_ccnew1'::regclass",
        "index-invalid",
        WARNING,
        ("ix_deliveries_dead_ccnew1",),
        'DROP INDEX CONCURRENTLY "pgebus"."ix_deliveries_dead_ccnew1";',
    ),
    Case("ALTER TABLE pgebus.events DISABLE TRIGGER fan_out", "differs", PROBLEM, ("fan_out", "disabled"), "drift.md"),
    Case(
        "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1'",
        "schema-old",
        PROBLEM,
        ("version 1",),
        "pgebus migrate",
    ),
    Case(
        "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 3'",
        "schema-ahead",
        NOTICE,
        ("version 3", "one ahead"),
        "release",
    ),
    Case(
        "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 9'",
        "schema-new",
        PROBLEM,
        ("version 9",),
        "release",
    ),
    Case(
        "DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database() || ' SET synchronous_commit = off'; END $$",
        "synchronous-commit-off",
        WARNING,
        ("the database", "'off'"),
        "SET synchronous_commit = 'on'",
    ),
    Case(
        "DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database() || ' SET session_replication_role = replica';"
        " END $$",
        "triggers-off",
        PROBLEM,
        ("the database", "'replica'", "is lost"),
        "SET session_replication_role = 'origin'",
    ),
    Case(
        "DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database()"
        " || ' SET default_transaction_isolation = serializable'; END $$",
        "transaction-default",
        NOTICE,
        ("'serializable'", "behind a transaction pooler"),
        "read committed",
    ),
    Case(
        SUBSCRIBED + PUBLISHED + BEATING.replace("mail", "other"),
        "group-unserved",
        PROBLEM,
        ("'mail'", "1 delivery is due", "2 hours"),
        "remove mail",
    ),
    Case(PLAIN, "group-unserved", NOTICE, ("'mail'", "nothing is due"), "Start a worker"),
    Case(
        SUBSCRIBED + PUBLISHED + "UPDATE pgebus.consumer_groups SET paused_at = now();",
        "group-paused",
        WARNING,
        ("paused since", "the oldest since 2 hours"),
        "resume mail",
    ),
    Case(
        GROUP.format(more=", paused_at", values=", now()"), "group-paused", NOTICE, ("nothing is due",), "resume mail"
    ),
    Case(SUBSCRIBED + PUBLISHED + BEATING, "group-behind", WARNING, ("1 worker,", "2 hours"), "more workers"),
    Case(
        SUBSCRIBED
        + PUBLISHED
        + PUBLISHED
        + BEATING
        + "UPDATE pgebus.consumer_groups SET max_running = 1; UPDATE pgebus.deliveries SET status = 'running',"
        " worker_id = 1, claimed_at = now(), claim_seq = 1 WHERE event_id = 1;",
        "group-full",
        WARNING,
        ("its limit of 1", "1 delivery is due"),
        "limit mail",
    ),
    Case(
        SUBSCRIBED + PUBLISHED + "DELETE FROM pgebus.consumer_groups;",
        "group-not-declared",
        WARNING,
        ("1 delivery waits", "'mail'"),
        "pgebus cancel --group mail",
    ),
    Case(
        "INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 1500)",
        "unhandled-type",
        WARNING,
        ("1,000 or more events", "'a.b'", "No group wants them now."),
        "--status unhandled --type a.b",
    ),
    Case(
        PUBLISHED + SUBSCRIBED,
        "unhandled-type",
        WARNING,
        ("1 event of type", "Wanted now by: 'mail'."),
        "group 'default'",
    ),
    Case(
        "INSERT INTO pgebus.workers (id, channel, backend_pid, host, pid, version)"
        " VALUES (5, 'events', 1, 'web-1', 77, '1')",
        "worker-without-lock",
        WARNING,
        ("process 77 on web-1",),
        "listen_url",
    ),
    Case(
        "INSERT INTO pgebus.workers (id, channel, beat_at, host, pid, version)"
        " VALUES (5, 'events', now() - interval '20 s', 'web-1', 77, '1')",
        "beat-absent",
        WARNING,
        ("process 77 on web-1", "last beat"),
        "its process",
    ),
    Case(
        "INSERT INTO pgebus.workers (id, channel, backend_pid, version) VALUES (5, 'events', 1, '1');"
        "SELECT pg_advisory_lock(5)",
        "listener-behind-pooler",
        WARNING,
        ("does not keep its session",),
        "listen_url",
    ),
    Case(
        BEATING + "INSERT INTO pgebus.workers (id, channel, beat_at, version) VALUES (2, 'events', now(), '2')",
        "releases-differ",
        NOTICE,
        ("1, 2",),
        "deploy",
    ),
    Case(
        "INSERT INTO pgebus.schedules (channel, type, cron, timezone, declared_at)"
        " VALUES ('events', 'nightly', '0 2 * * *', 'UTC', now() - interval '1 day')",
        "schedule-forgotten",
        NOTICE,
        ("'nightly'", "0 2 * * *"),
        "delete its row",
    ),
    Case(
        "INSERT INTO pgebus.schedules (channel, type, cron, timezone, last_at)"
        " VALUES ('events', 'often', '* * * * *', 'UTC', now() - interval '10 minutes')",
        "schedule-behind",
        WARNING,
        ("'often'", "was due at"),
        "log",
    ),
    Case(
        "SELECT pg_create_physical_replication_slot('doctor_slot', true)",
        "replication-slot-inactive",
        WARNING,
        ("doctor_slot",),
        "pg_drop_replication_slot('doctor_slot')",
    ),
]


@pytest.fixture
async def clean(sql: Sql) -> object:
    """What is the server's, not the database's, goes with the test."""
    yield None
    await sql.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")


async def test_nothing_of_it_is_found_in_a_new_database(examined: Examine) -> None:
    report = await examined()
    assert wrong(report) == []
    assert not {case.code for case in CASES} & {finding.code for finding in report.findings}


# In the default lane those whose reason is in the catalog, in the deliveries, among the workers: one of each.
DEFAULT: Final = {
    "index-invalid",
    "differs",
    "group-unserved",
    "unhandled-type",
    "listener-behind-pooler",
    "triggers-off",
}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=f"{case.code}-{case.severity}-{number}", marks=[] if case.code in DEFAULT else [pytest.mark.slow]
        )
        for number, case in enumerate(CASES)
    ],
)
async def test_what_was_provoked_is_found(case: Case, sql: Sql, examined: Examine) -> None:
    await sql.execute(case.sql)
    found = of(await examined(), case.code)
    assert found.severity == case.severity
    for word in case.words:
        assert word in found.seen
    assert case.remedy in (found.remedy or "")


@pytest.mark.parametrize("status", ["dead", "unhandled"])
async def test_who_holds_a_key_is_said(status: str, sql: Sql, examined: Examine) -> None:
    holder = await event_in(sql, status, key="k", holds_key=True)
    await event_in(sql, "blocked", key="k")
    found = of(await examined(), "key-held")
    assert found.severity == WARNING
    assert f"event {holder} holds, {status} since" in found.seen
    assert "release-key default k" in (found.remedy or "")


async def test_a_key_that_is_at_work_is_said_when_it_takes_long(sql: Sql, examined: Examine) -> None:
    running = await event_in(sql, "running", key="r")
    retried = await event_in(sql, "pending", key="p")
    for key in ("r", "p"):
        await event_in(sql, "blocked", key=key)
    await sql.execute("UPDATE pgebus.deliveries SET due_at = now() + interval '3 hours' WHERE event_id = $1", retried)
    await sql.execute(
        "UPDATE pgebus.deliveries SET claimed_at = now() - interval '3 hours' WHERE event_id = $1", running
    )
    report = await examined()
    seen = [finding.seen for finding in report.findings if finding.code == "key-held"]
    assert any(f"event {running} holds, running since 3 hours" in each for each in seen)
    assert any("it failed (ValueError), and is tried again in 2 hours" in each for each in seen)
    assert of(report, "running-long").subject == str(running)
    assert of(report, "running-without-worker").severity == PROBLEM
    assert "key-held" not in [f.code for f in (await examined(running_seconds=1e6, waiting_seconds=1e6)).findings]


async def test_a_key_without_a_head_is_one_that_no_sweep_has_come_to(sql: Sql, examined: Examine) -> None:
    await event_in(sql, "blocked", key="k")
    found = of(await examined(), "key-without-head")
    assert found.severity == PROBLEM
    assert "1 delivery waits for key 'k'" in found.seen


async def test_dead_letters_are_counted_and_the_newest_error_is_told(sql: Sql, examined: Examine) -> None:
    await event_in(sql, "dead", group="mail")
    newest = await event_in(sql, "dead", group="mail")
    await sql.execute("UPDATE pgebus.deliveries SET finished_at = now() WHERE event_id = $1", newest)
    found = of(await examined(), "dead-letters")
    assert "has 2 dead letters" in found.seen
    assert f"(event {newest}: ValueError: Ada is unknown)" in found.seen
    assert found.subject == "events/mail"


async def test_only_so_many_of_a_kind_are_listed(sql: Sql, examined: Examine) -> None:
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a.t' || n FROM generate_series(1, 30) n")
    await subscribe(sql, "mail", "k.#")
    await sql.execute("SET session_replication_role = replica")
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status)"
        " SELECT n, now(), 'events', 'mail', 'k', 'k' || n, 'blocked' FROM generate_series(100, 130) n"
    )
    report = await examined()
    assert len([finding for finding in report.findings if finding.code == "unhandled-type"]) == 11
    assert len([finding for finding in report.findings if finding.code == "key-without-head"]) == 10
    assert "21 keys more" in of(report, "keys-more").seen
