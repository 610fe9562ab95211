"""An examination costs little however much there is."""

from __future__ import annotations

from time import monotonic
from typing import Final

import pytest

from tests.doctor.conftest import Examine, of
from tests.postgres.plain_sql import Sql, subscribe
from tests.system.waiting import until

# The work may take ten times as long on a machine that is busy; a scan of a million rows for each check takes longer.
BUDGET_SECONDS: Final = 15.0
# Of the indexes, however large: at most a thousand of each kind, and there are some dozens of kinds.
ENTRIES: Final = 60_000
OTHERS: Final = "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"

FILL: Final = """
INSERT INTO pgebus.events (type) SELECT 'a.b' FROM generate_series(1, {rows});
INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, worker_id, claimed_at,
  finished_at, claim_seq, attempt, errors)
SELECT n, now() - interval '1 hour', 'events', CASE WHEN n / 6 % 2 = 0 THEN 'mail' ELSE 'gone' END, 'a.t' || n % 7,
  CASE WHEN status = 'blocked' THEN 'k' || n % 5000 END, status, CASE WHEN status = 'running' THEN 1 + n % 3 END,
  CASE WHEN status = 'running' THEN now() END, CASE WHEN status IN ('completed', 'dead') THEN now() END, 1, 1,
  CASE WHEN status = 'dead' THEN jsonb_build_array(jsonb_build_object('type', 'E', 'message', repeat('x', 500))) END
FROM generate_series(1, {rows}) n, LATERAL (SELECT (ARRAY['pending', 'blocked', 'unhandled', 'dead', 'completed',
  CASE WHEN n <= 1000 THEN 'running' ELSE 'pending' END])[1 + n % 6]) s(status)
"""


@pytest.mark.parametrize(
    "rows", [pytest.param(40_000, id="40000"), pytest.param(1_000_000, id="1000000", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "never analyzed"])
async def test_an_examination_of_large_tables_takes_seconds(
    rows: int, analyzed: bool, sql: Sql, examined: Examine
) -> None:
    await sql.execute(
        "".join(f"ALTER TABLE pgebus.{t} SET (autovacuum_enabled = off);" for t in ("events", "deliveries"))
    )
    await subscribe(sql, "mail", "a.#")
    await sql.execute("SET session_replication_role = replica")
    await sql.execute(FILL.format(rows=rows))
    if analyzed:
        await sql.execute("ANALYZE pgebus.events; ANALYZE pgebus.deliveries")
    before = await read(sql)
    began = monotonic()
    report = await examined()
    took = monotonic() - began
    codes = [finding.code for finding in report.findings]
    assert not {"timed-out", "not-visible"} & set(codes), report
    assert "1,000 or more dead letters" in of_subject(report, "dead-letters", "events/mail")
    assert "at least" in of(report, "group-unserved").seen
    assert {"unhandled-type", "key-without-head", "running-without-worker", "group-not-declared"} <= set(codes)
    assert took < BUDGET_SECONDS, took
    # The sessions of the examination have ended, and said what they have read.
    await until(lambda: sql.fetchval(f"SELECT count(*) = 0 FROM pg_stat_activity WHERE {OTHERS}"))
    scans, entries = await read(sql)
    assert scans == before[0]
    assert entries - before[1] < ENTRIES


async def read(sql: Sql) -> tuple[int, int]:
    """Return how often the large tables were read as a whole, and how many index entries were."""
    await sql.execute("SELECT pg_stat_clear_snapshot()")
    (row,) = await sql.fetch(
        "SELECT (SELECT sum(seq_scan) FROM pg_stat_all_tables WHERE schemaname = 'pgebus'"
        " AND relname IN ('events', 'deliveries'))::bigint, (SELECT sum(idx_tup_read) FROM pg_stat_all_indexes"
        " WHERE schemaname = 'pgebus' AND relname IN ('events', 'deliveries'))::bigint"
    )
    return row[0], row[1]


def of_subject(report: object, code: str, subject: str) -> str:
    (seen,) = [f.seen for f in report.findings if (f.code, f.subject) == (code, subject)]  # type: ignore[attr-defined]
    return str(seen)
