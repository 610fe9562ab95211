"""Findings that need sessions, settings of the server, another role or time; and a system that is well."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    Settings,
)
from pgebus.doctor import Limits, Severity, _server
from pgebus.doctor._asking import Ask
from pgebus.names import quote_identifier
from tests.conftest import Server
from tests.doctor.conftest import Examine, of, wrong
from tests.postgres.plain_sql import Sql, subscribe
from tests.roles import casting
from tests.system.bus import finished, publish, running
from tests.system.waiting import until

Reconfigure = Callable[..., Awaitable[None]]


def router() -> EventRouter:
    found = EventRouter("orders")

    @found.on("placed")
    async def placed(ctx: EventContext, payload: dict[str, Any]) -> None:
        pass

    @found.every("0 2 * * *", "nightly")
    async def nightly(ctx: EventContext, payload: dict[str, Any]) -> None:
        pass

    return found


@pytest.mark.parametrize("liveness", ["lock", "beat"])
async def test_a_system_that_is_well_shows_no_warning(
    liveness: str, sql: Sql, sm: DatabaseSessionManager, database: DatabaseSettings, examined: Examine
) -> None:
    """As the role of a worker sees it, and as the owner does."""
    async with casting(sql, database) as cast:
        await cast.grant()
        worker = await cast.login(cast.roles.worker)
        async with running(router(), worker, liveness=liveness, poll_interval_seconds=0.05):
            await finished(sql, *[await publish(sm, "orders.placed", key="k") for _ in range(20)])
            for who in (database, worker):
                report = await examined(who, look_again_seconds=4.0)
                assert wrong(report) == [], report
                assert {finding.severity for finding in report.findings} <= {Severity.OK, Severity.NOTICE}
                assert len(report.findings) >= 22
        codes = [finding.code for finding in (await examined()).findings if finding.severity is not Severity.OK]
    assert "group-unserved" in codes


async def test_what_is_being_repaired_is_no_finding(sql: Sql, database: DatabaseSettings, examined: Examine) -> None:
    """A key without a head, and a delivery whose worker is gone, while a worker is there that mends them."""
    await subscribe(sql, "default", "orders.placed")
    async with running(router(), database):
        await sql.execute(
            "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status)"
            " VALUES (7, now(), 'nowhere', 'nobody', 'nothing', 'k', 'blocked')"
        )
        assert "key-without-head" not in wrong(await examined(look_again_seconds=3.0))


@pytest.mark.slow
async def test_settings_of_the_server_that_lose_commits(reconfigured: Reconfigure, examined: Examine) -> None:
    await reconfigured(fsync="off", full_page_writes="off", autovacuum="off", synchronous_commit="off")
    report = await examined()
    for code in ("fsync-off", "full-page-writes-off", "autovacuum-off"):
        assert of(report, code).severity is Severity.PROBLEM
        assert "ALTER SYSTEM" in (of(report, code).remedy or "")
    assert of(report, "synchronous-commit-off").severity is Severity.WARNING
    await reconfigured(fsync="on", full_page_writes="on", autovacuum="on", synchronous_commit="on")
    assert wrong(await examined()) == []


@pytest.mark.slow
async def test_an_unlimited_idle_transaction_is_a_notice(
    reconfigured: Reconfigure, database: DatabaseSettings, examined: Examine
) -> None:
    await reconfigured(idle_in_transaction_session_timeout="5min")
    codes = [finding.code for finding in (await examined()).findings]
    assert "idle-in-transaction-unlimited" not in codes
    await reconfigured(idle_in_transaction_session_timeout="0")
    assert of(await examined(), "idle-in-transaction-unlimited").severity is Severity.NOTICE


async def test_who_pins_dead_rows_is_named(sql: Sql, another: Sql, examined: Examine) -> None:
    await another.execute("SET application_name = 'report; DROP'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    pid = await another.fetchval("SELECT pg_backend_pid()")
    assert wrong(await examined()) == []
    found = of(await examined(transaction_seconds=0), "old-transaction")
    assert found.subject == str(pid)
    for word in (f"Session {pid}", "report; DROP", "idle in transaction"):
        assert word in found.seen
    assert f"pg_terminate_backend({pid})" in (found.remedy or "")
    await another.execute("COMMIT")
    assert "old-transaction" not in wrong(await examined(transaction_seconds=0))


async def test_what_other_roles_do_is_said_to_be_hidden(
    sql: Sql, another: Sql, database: DatabaseSettings, examined: Examine
) -> None:
    await another.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    async with casting(sql, database) as cast:
        await cast.grant()
        report = await examined(await cast.login(cast.roles.worker), transaction_ids=0)
    assert "hidden from this role" in of(report, "old-transaction").seen
    hidden = of(report, "not-visible")
    assert (hidden.severity, hidden.subject) == (Severity.NOTICE, "transactions")
    assert "pg_read_all_stats" in (hidden.remedy or "")
    await another.execute("ROLLBACK")


async def test_a_prepared_transaction_is_found(sql: Sql, another: Sql, examined: Examine) -> None:
    await another.execute("BEGIN; CREATE TABLE left_over (); PREPARE TRANSACTION 'it''s'")
    found = of(await examined(transaction_seconds=0), "prepared-transaction")
    assert "ROLLBACK PREPARED 'it''s';" in (found.remedy or "")
    assert "prepared-transaction" not in wrong(await examined())
    await another.execute("ROLLBACK PREPARED 'it''s'")


async def test_a_listener_in_a_transaction_and_a_queue_that_fills(sql: Sql, another: Sql, examined: Examine) -> None:
    await another.execute("LISTEN events; SELECT pg_advisory_lock(7)")
    await another.execute(
        "INSERT INTO pgebus.workers (id, channel, backend_pid, version) VALUES (7, 'events', pg_backend_pid(), '1')"
    )
    assert wrong(await examined()) == []
    await another.execute("BEGIN; SELECT 1")
    for _ in range(3):
        await sql.execute("SELECT pg_notify('events', repeat('x', 7000) || n) FROM generate_series(1, 100) n")
    report = await examined(transaction_seconds=0, notify_share=0)
    assert of(report, "listener-in-transaction").subject == "7"
    assert "% of the queue" in of(report, "notify-queue-fills").seen
    await another.execute("ROLLBACK")


@pytest.mark.slow
async def test_connections_near_their_limit(
    server: Server, sql: Sql, database: DatabaseSettings, examined: Examine
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(31):
            connection = await server.connect()
            stack.push_async_callback(connection.close)
        found = of(await examined(), "connections-near-limit")
    assert "of 37 connections are in use" in found.seen
    await sql.execute(
        "INSERT INTO pgebus.workers (id, channel, beat_at, version) SELECT n, 'events', now(), '1'"
        " FROM generate_series(1, 4) n"
    )
    assert "4 workers with 10 connections each" in of(await examined(), "connections-may-run-out").seen


@pytest.mark.slow
async def test_a_clock_that_is_off(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _server.this_clock
    for seconds, word in ((90, "s ahead of"), (-90, "s behind")):
        monkeypatch.setattr(_server, "this_clock", lambda seconds=seconds: ours() + seconds)
        assert word in of(await examined(), "clock-skew").seen


@pytest.mark.slow
async def test_a_release_that_is_out_of_support(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_END_OF_LIFE", dict.fromkeys(range(13, 30), _server._END_OF_LIFE[13]))
    assert of(await examined(), "postgres-end-of-life").severity is Severity.NOTICE
    monkeypatch.setattr(_server, "_OLDEST", 99)
    assert of(await examined(), "postgres-too-old").severity is Severity.PROBLEM


async def test_a_worker_that_was_killed_leaves_what_nobody_takes_back(sql: Sql, examined: Examine) -> None:
    await subscribe(sql, "default", "a.b")
    await sql.execute(
        "INSERT INTO pgebus.events (type) VALUES ('a.b'); INSERT INTO pgebus.workers (id, channel, backend_pid, host,"
        " pid, version) VALUES (9, 'events', 1, 'web-1', 77, '1'); UPDATE pgebus.deliveries SET status = 'running',"
        " worker_id = 9, claimed_at = now(), claim_seq = 1"
    )
    report = await examined()
    found = of(report, "running-without-worker")
    assert found.severity is Severity.PROBLEM
    assert "1 delivery is running in the hands of worker 9 (process 77 on web-1)" in found.seen
    assert of(report, "worker-without-lock").subject == "9"


@pytest.mark.slow
async def test_dead_rows_that_nobody_removes(sql: Sql, examined: Examine) -> None:
    await subscribe(sql, "default", "a.b")
    await sql.execute("ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = false)")
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 12000)")
    await sql.execute("UPDATE pgebus.deliveries SET lost = 0")
    dead = "SELECT n_dead_tup >= 12000 FROM pg_stat_all_tables WHERE relid = 'pgebus.deliveries'::regclass"
    await until(lambda: sql.fetchval(dead))
    codes = [finding.code for finding in (await examined()).findings]
    assert not {"vacuum-behind", "never-analyzed"} & set(codes)  # there was no time for it yet
    report = await examined(vacuum_seconds=0)
    found = of(report, "vacuum-behind")
    assert found.subject == "deliveries"
    for word in ("12,000 dead rows", "to come at 2,000", "never"):
        assert word in found.seen
    never = [finding.subject for finding in report.findings if finding.code == "never-analyzed"]
    assert "deliveries" in never
    await sql.execute("VACUUM ANALYZE pgebus.deliveries")
    await until(lambda: sql.fetchval(f"SELECT NOT ({dead})"))  # a collector tells of it, before PostgreSQL 15
    report = await examined(vacuum_seconds=0)
    assert "deliveries" not in [finding.subject for finding in report.findings if finding.code == "vacuum-behind"]


async def test_a_role_without_rights_is_told_so(sql: Sql, database: DatabaseSettings, examined: Examine) -> None:
    """A publisher sees hardly anything, and gets no error for it."""
    async with casting(sql, database) as cast:
        await cast.grant()
        publisher = await cast.login(cast.roles.publisher)
        report = await examined(publisher)
        unseen = {finding.subject for finding in report.findings if finding.code == "not-visible"}
        assert {"groups", "dead", "keys", "running", "workers", "schedules"} <= unseen
        assert wrong(report) == []
        assert "SELECT on deliveries" in of(report, "role-cannot-work").seen
        await sql.execute(f"REVOKE USAGE ON SCHEMA pgebus FROM {quote_identifier(cast.roles.publisher)}")
        assert of(await examined(publisher), "no-rights").severity is Severity.PROBLEM


@pytest.mark.slow
async def test_rows_that_policies_hide(sql: Sql, database: DatabaseSettings, examined: Examine) -> None:
    async with casting(sql, database) as cast:
        await cast.grant()
        await sql.execute("ALTER TABLE pgebus.deliveries ENABLE ROW LEVEL SECURITY")
        found = of(await examined(await cast.login(cast.roles.worker)), "rows-hidden")
        assert (found.subject, "are none" in found.seen) == ("deliveries", True)


async def test_a_check_that_takes_too_long_is_said_to_have(sql: Sql, another: Sql, examined: Examine) -> None:
    await another.execute("BEGIN; LOCK TABLE pgebus.workers IN ACCESS EXCLUSIVE MODE")
    report = await examined(check_seconds=0.5)
    late = {finding.subject for finding in report.findings if finding.code == "timed-out"}
    assert {"groups", "workers", "connections"} <= late
    assert "dead" in [finding.code for finding in report.findings]
    await another.execute("ROLLBACK")
    assert wrong(await examined()) == []


@pytest.mark.slow
async def test_a_session_that_is_ended_meanwhile_is_a_finding(
    sql: Sql, another: Sql, database: DatabaseSettings, examined: Examine
) -> None:
    await another.execute("BEGIN; LOCK TABLE pgebus.workers IN ACCESS EXCLUSIVE MODE")
    named = database.model_copy(update={"application_name": "doctor"})
    task = asyncio.create_task(examined(named, check_seconds=1.0))
    await until(
        lambda: sql.fetchval(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'doctor' AND wait_event_type = 'Lock' AND query LIKE '%max_connections%'"
        )
    )
    report = await task
    assert of(report, "unreachable").severity is Severity.PROBLEM
    assert "clock" in [finding.code for finding in report.findings]  # what was found out before stays
    await another.execute("ROLLBACK")


async def test_an_index_that_is_gone_shows_in_the_plans(sql: Sql, examined: Examine) -> None:
    await subscribe(sql, "default", "a.b")
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 12000)")
    assert "plan-scans" not in wrong(await examined())
    await sql.execute("DROP INDEX pgebus.ix_deliveries_running")
    found = of(await examined(), "plan-scans")
    assert "leases_of" in found.seen
    assert found.subject == "deliveries"


async def test_it_could_not_change_anything(sql: Sql, database: DatabaseSettings) -> None:
    ask = Ask(sql, Settings(database=database), Limits())
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await ask.rows("DELETE FROM {s}.events")


async def test_it_changes_nothing(sql: Sql, examined: Examine) -> None:
    """Not even a prepared statement or a schema is left; and all of it works in a read-only transaction."""
    everything = "SELECT md5(string_agg(oid::text, ',' ORDER BY oid)) FROM pg_class"
    before = await sql.fetchval(everything)
    await sql.execute("INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, 12000)")
    rows = "SELECT md5(string_agg(d::text || xmin::text || xmax::text, ',' ORDER BY event_id)) FROM pgebus.deliveries d"
    filled = await sql.fetchval(rows)
    await examined()
    assert (await sql.fetchval(everything), await sql.fetchval(rows)) == (before, filled)
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgebus' AND datname = current_database()"
    )
    await until(lambda: sql.fetchval(f"SELECT ({sessions}) = 0"))


@pytest.mark.slow
async def test_a_database_that_is_not_there_or_not_ours(
    empty_database: DatabaseSettings, database: DatabaseSettings, server: Server, examined: Examine
) -> None:
    assert "pgebus migrate" in (of(await examined(empty_database), "not-migrated").remedy or "")
    elsewhere = database.model_copy(update={"schema_name": "somewhere"})
    assert "Schemas that do: 'pgebus'" in of(await examined(elsewhere), "not-migrated").seen
    connection = await server.connect(empty_database.sqlalchemy_url().database)
    await connection.execute("CREATE TABLE public.of_somebody ()")
    await connection.close()
    others = empty_database.model_copy(update={"schema_name": "public"})
    assert "none of pgebus" in of(await examined(others), "not-ours").seen
    nowhere = server.settings("no_such_database")
    assert "no_such_database" in of(await examined(nowhere), "unreachable").seen
    nobody = DatabaseSettings.model_validate({"url": "postgresql://nobody@127.0.0.1:1/nowhere"})
    assert "PGEBUS_DATABASE__URL" in (of(await examined(nobody), "unreachable").remedy or "")


def test_a_limit_is_a_number() -> None:
    for wrong_value in (-1, float("nan"), True, "3"):
        with pytest.raises(ConfigurationError, match="check_seconds"):
            Limits(check_seconds=wrong_value)  # type: ignore[arg-type]
