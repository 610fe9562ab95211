"""The plans of the statements that workers send all the time: whether one reads a whole table.

Only EXPLAIN, which runs nothing: with ANALYZE a claim would claim.
"""

# ruff: noqa: S608 - what is filled in are quoted identifiers and text of this package

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import asyncpg

from pgebus._runtime.statements import Statements
from pgebus.doctor._asking import Ask
from pgebus.doctor._findings import Finding, notice, warning
from pgebus.doctor._tables import LARGE_BYTES
from pgebus.models import BEAT_ABSENT_SECONDS

_MODES: Final = ("force_custom_plan", "force_generic_plan")
_LEASES: Final = "ARRAY[1]::bigint[], ARRAY[{g}], ARRAY[1], 1"
# What each is called with; {c} and {g} stand for a channel and a group, as literals.
_ARGUMENTS: Final = {
    "claim": "1, {c}, ARRAY[{g}], 100",
    "claim_suspect": "1, {c}, ARRAY[{g}], 1",
    "suspects": "{c}, ARRAY[{g}]",
    "next_due": "{c}, ARRAY[{g}]",
    "complete": _LEASES,
    "complete_keyed": _LEASES,
    "release": _LEASES,
    "reschedule": "1, {g}, 1, 1, NULL, 1, 0, NULL",
    "bury": "1, {g}, 1, 1, NULL, NULL",
    "unhandled_types": "{c}, ARRAY[{g}]",
    "adopt": "1, {c}, {g}, 'a', 100",
    "sweep": "'', '', '', 5000",
    "let_go": "",
    "leases_of": "1",
}
_LARGE: Final = """
SELECT c.relname AS name FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1::text AND c.relname IN ('events', 'deliveries') AND c.relkind = 'r'
  AND pg_relation_size(c.oid) > $2"""
_PREPARED: Final = "pgebus_doctor_explains"


async def plans(ask: Ask) -> AsyncIterator[Finding]:
    """Sequential scans of large tables, with the plans for these values and with the generic ones."""
    large = {row["name"] for row in await ask.rows(_LARGE, ask.schema, LARGE_BYTES)}
    if not large:
        return
    row = await ask.row(
        "SELECT coalesce(quote_literal(min(channel)), '''events''') AS c, coalesce(quote_literal(min(consumer_group)),"
        " '''default''') AS g, EXISTS (SELECT FROM {s}.workers w WHERE w.ended_at IS NULL AND w.backend_pid IS NULL"
        f" AND w.beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds') AS beating"
        " FROM {s}.consumer_groups"
    )
    statements = Statements(ask.schema)
    # A worker keeps the planner from scans, unless it is behind a transaction pooler.
    for planner in (True, False) if row["beating"] else (True,):
        bad: dict[str, set[str]] = {}
        for name, arguments in _ARGUMENTS.items():
            values = arguments.format(c=row["c"], g=row["g"])
            for table in await _scanned(ask, getattr(statements, name), values, planner=planner):
                bad.setdefault(table, set()).add(name)
        for table in sorted(large & set(bad)):
            names = ", ".join(sorted(bad[table]))
            yield warning(
                "plan-scans",
                f"Statements of the worker read all of {ask.s}.{table}{'' if planner else ' (behind a pooler)'}: "
                f"{names}.",
                f"Look for an index that is missing or invalid; else: ANALYZE {ask.s}.{table};",
                table,
            )


async def _scanned(ask: Ask, sql: str, values: str, *, planner: bool) -> set[str]:
    """Return which tables are read as a whole, in one of the modes."""
    found: set[str] = set()
    async with ask.transaction(planner=planner):
        await ask.driver.execute(f"PREPARE {_PREPARED} AS {sql}")
        try:
            async with ask.driver.transaction():  # a savepoint: what is prepared has to go in any case
                for mode in _MODES:
                    await ask.driver.execute(f"SET LOCAL plan_cache_mode = {mode}")
                    call = f"{_PREPARED} ({values})" if values else _PREPARED
                    (explained,) = await ask.driver.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE {call}")
                    found |= set(_scans(explained["Plan"]))
        finally:
            await ask.driver.execute(f"DEALLOCATE {_PREPARED}")
    return found


def _scans(node: dict[str, Any]) -> Iterator[str]:
    kind = node["Node Type"]
    # Kept from a scan, the planner reads the table in the order of its primary key, which is no better.
    whole = kind.startswith("Index") and "Index Cond" not in node and node.get("Index Name", "").startswith("pk_")
    if kind == "Seq Scan" or (whole and "Relation Name" in node):
        yield node["Relation Name"]
    for child in node.get("Plans", ()):
        yield from _scans(child)


async def slow_statements(ask: Ask) -> AsyncIterator[Finding]:
    """What pg_stat_statements says, where it is installed and may be read."""
    places = await ask.rows(
        "SELECT quote_ident(n.nspname) AS place FROM pg_catalog.pg_extension e"
        " JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pg_stat_statements'"
    )
    if not places:
        return
    try:
        rows = await ask.rows(
            f"SELECT q.calls, q.mean_exec_time AS mean, q.query FROM {places[0]['place']}.pg_stat_statements q"
            " WHERE q.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())"
            " AND strpos(q.query, $1::text) > 0 AND q.calls >= 10 AND q.mean_exec_time >= 1000 * $2::double precision"
            " ORDER BY q.mean_exec_time DESC LIMIT 3",
            f"{ask.s}.",
            ask.limits.statement_seconds,
        )
    except asyncpg.PostgresError as error:
        yield notice("not-visible", f"pg_stat_statements: {error}.".splitlines()[0], None, "statements")
        return
    for row in rows:
        text = " ".join(row["query"].split())
        yield warning(
            "slow-statement",
            f"A statement on our tables takes {row['mean']:,.0f} ms on average, over {row['calls']:,} calls: "
            f"{text[:120]}",
            "EXPLAIN it; look for dead rows, locks and missing indexes.",
        )
