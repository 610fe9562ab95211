"""The tables: whether they are those of this release, and whether VACUUM and ANALYZE keep up with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from pgebus._runtime.statements import Statements
from pgebus.doctor._asking import Ask, age
from pgebus.doctor._findings import Finding, notice, problem, warning
from pgebus.drift import DriftCheckError, find_drift
from pgebus.models import SCHEMA_VERSION, metadata
from pgebus.names import quote_identifier

TABLES: Final = ("events", "deliveries", "consumer_groups", "subscriptions", "workers", "schedules")
# Those that an application may add to `events` are its own.
_INDEXES: Final = (
    *sorted(
        str(index.name)
        for name in ("deliveries", "subscriptions")
        for index in metadata.tables[f"pgebus.{name}"].indexes
    ),
    "uq_events_dedup_key",
    *(f"pk_{name}" for name in TABLES),
)
_MIGRATE: Final = "Run 'alembic upgrade pgebus@head' (or 'pgebus migrate')."
# Below it, a scan of a whole table is nothing.
LARGE_BYTES: Final = 1 << 20
# VACUUM comes at its threshold, ANALYZE too; so many times as much means that it does not come.
_BEHIND: Final = 2
_BUILT_ANEW: Final = ("_ccnew", "_ccold")


async def version(ask: Ask) -> AsyncIterator[Finding]:
    """Whether the tables are those of this release, and this role may work on them."""
    row = await ask.row("SELECT {s}.schema_version() AS version")
    found = row["version"]
    if found < SCHEMA_VERSION:
        yield problem(
            "schema-old", f"Schema {ask.schema!r} is at version {found}, this release needs {SCHEMA_VERSION}.", _MIGRATE
        )
    elif found == SCHEMA_VERSION + 1:
        yield notice(
            "schema-ahead",
            f"Schema {ask.schema!r} is at version {found}, one ahead of this release, which may go on.",
            "Install the release that the database was migrated for.",
        )
    elif found > SCHEMA_VERSION:
        yield problem(
            "schema-new",
            f"Schema {ask.schema!r} is at version {found}, this release works with {SCHEMA_VERSION} and one ahead.",
            "Install the release that the database was migrated for.",
        )


async def rights(ask: Ask) -> AsyncIterator[Finding]:
    """Whether the role that asks sees all there is, as a worker has to."""
    statements = Statements(ask.schema)
    row = await ask.row(statements.fitness, ask.schema)
    if row["missing"]:
        yield notice(
            "role-cannot-work",
            f"The role that examines could not run a worker: it lacks {', '.join(row['missing'])}.",
            "Examine as a member of the worker's role or of the owner: see 'pgebus roles'.",
        )
    for each in await ask.rows(statements.row_security, ask.schema):
        yield warning(
            "rows-hidden",
            f"Row-level security is active on {each['name']} for the role that examines: this report knows only the "
            f"rows that policies show it, which {'may be some' if each['seen'] else 'are none'}.",
            "Give the role of workers BYPASSRLS, or a policy for all commands with USING (true).",
            each["name"],
        )


async def drift(ask: Ask) -> AsyncIterator[Finding]:
    """What differs from the tables that this release makes; indexes have a check of their own."""
    row = await ask.row("SELECT {s}.schema_version() AS version")
    if row["version"] != SCHEMA_VERSION:
        return  # said already, and all that follows from it would be noise
    try:
        async with asyncio.timeout(2 * ask.limits.check_seconds):  # it waits for whoever has locked a table
            differences = await find_drift(ask.settings.database)
    except DriftCheckError as error:
        yield notice("not-visible", f"What differs from a fresh copy of the tables: {error}", None, "drift")
        return
    for each in differences:
        if each.kind in ("index", "primary key") and each.aspect in ("existence", "state"):
            continue
        parameters = each.aspect == "storage parameters"
        if parameters and _without_switch(each.expected) == _without_switch(each.found):
            continue  # autovacuum is turned off, which has a code of its own
        make = problem if each.kind in ("table", "trigger", "function") and not parameters else warning
        yield make(
            "differs",
            f"{each}.",
            each.remedy or "Find out who changed it; docs/guides/drift.md has the statements.",
            each.name,
        )


def _without_switch(parameters: str) -> set[str]:
    return {each for each in parameters.split(", ") if not each.startswith("autovacuum_enabled=") and each != "none"}


async def indexes(ask: Ask) -> AsyncIterator[Finding]:
    """Whether all indexes are there and used."""
    rows = await ask.rows(
        "SELECT c.relname AS name, t.relname AS table_name, i.indisvalid AND i.indisready AS valid,"
        " EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index p WHERE p.index_relid = c.oid"
        "   OR p.relid = t.oid) AS building"
        " FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_catalog.pg_class t ON t.oid = i.indrelid JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace"
        " WHERE n.nspname = $1::text AND t.relname = ANY ($2::text[]) ORDER BY c.relname",
        ask.schema,
        list(TABLES),
    )
    tables = {row["table_name"] for row in rows}
    for name in _INDEXES:
        if name not in {row["name"] for row in rows} and (not name.startswith("pk_") or name[3:] in tables):
            yield problem(
                "index-missing",
                f"Index {name} is missing: statements that need it read the whole table.",
                "Build it again with the CREATE INDEX of the migration, CONCURRENTLY; 'pgebus check' compares it.",
                name,
            )
    for row in rows:
        if row["valid"]:
            continue
        name = f"{ask.s}.{quote_identifier(row['name'])}"
        if row["building"]:
            yield notice("index-building", f"Index {name} is being built.", None, row["name"])
        else:
            left_over = row["name"].rstrip("0123456789").endswith(_BUILT_ANEW)
            yield (warning if left_over else problem)(
                "index-invalid",
                f"Index {name} is invalid: it is written, and never read.",
                f"DROP INDEX CONCURRENTLY {name};" if left_over else f"REINDEX INDEX CONCURRENTLY {name};",
                row["name"],
            )


_VACUUM: Final = """
SELECT c.relname AS name, c.reltuples, c.reloptions AS options, toast.reloptions AS toast,
  pg_relation_size(c.oid) AS bytes, coalesce(t.n_dead_tup, 0) AS dead,
  greatest(t.last_vacuum, t.last_autovacuum) AS vacuumed,
  greatest(t.last_analyze, t.last_autoanalyze) AS analyzed, clock_timestamp() AS clock,
  current_setting('autovacuum')::boolean AND current_setting('track_counts')::boolean AS works,
  current_setting('autovacuum_vacuum_threshold')::double precision AS threshold,
  current_setting('autovacuum_vacuum_scale_factor')::double precision AS scale,
  EXISTS (SELECT FROM pg_catalog.pg_stat_progress_vacuum p WHERE p.relid = c.oid) AS at_work,
  greatest(pg_postmaster_start_time(), (SELECT min(g.created_at) FROM {s}.consumer_groups g)) AS since
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_class toast ON toast.oid = c.reltoastrelid
LEFT JOIN pg_catalog.pg_stat_all_tables t ON t.relid = c.oid
WHERE n.nspname = $1::text AND c.relkind = 'r' AND c.relname = ANY ($2::text[]) ORDER BY c.relname"""


async def vacuum(ask: Ask) -> AsyncIterator[Finding]:
    """Whether autovacuum is on, and keeps up."""
    rows = await ask.rows(_VACUUM, ask.schema, list(TABLES))
    if rows and not rows[0]["works"]:
        yield problem(
            "autovacuum-off",
            "Autovacuum does not run on this server: dead rows are never removed, and every claim gets slower.",
            "ALTER SYSTEM SET autovacuum = on; ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf();",
        )
    for row in rows:
        for finding in _of_table(ask, row):
            yield finding


def _of_table(ask: Ask, row: Any) -> list[Finding]:
    options, toast = (dict(option.split("=", 1) for option in row[which] or ()) for which in ("options", "toast"))
    table = f"{ask.s}.{row['name']}"
    found = []
    for its, prefix, what in ((options, "", table), (toast, "toast.", f"the large values of {table}")):
        if its.get("autovacuum_enabled", "true").lower() in ("false", "off", "0", "no"):
            found.append(
                problem(
                    "autovacuum-off-for-table",
                    f"Autovacuum is turned off for {what}: its dead rows are never removed.",
                    f"ALTER TABLE {table} RESET ({prefix}autovacuum_enabled);",
                    row["name"],
                )
            )

    def due_since(last: Any) -> float:
        began = max((each for each in (last, row["since"]) if each is not None), default=row["clock"])
        return float((row["clock"] - began).total_seconds())

    threshold = float(options.get("autovacuum_vacuum_threshold", row["threshold"]))
    scale = float(options.get("autovacuum_vacuum_scale_factor", row["scale"]))
    bound = _BEHIND * (threshold + scale * max(row["reltuples"], 0))
    if row["dead"] > bound and due_since(row["vacuumed"]) >= ask.limits.vacuum_seconds:
        last = "never" if row["vacuumed"] is None else f"{age(row['clock'] - row['vacuumed'])} ago"
        found.append(
            warning(
                "vacuum-behind",
                f"{table} has {row['dead']:,} dead rows; VACUUM was to come at {bound / _BEHIND:,.0f}, and came last: "
                f"{last}.{' One runs now.' if row['at_work'] else ''}",
                f"Look for who keeps dead rows (old-transaction and the like), then: VACUUM {table};",
                row["name"],
            )
        )
    never = row["analyzed"] is None and row["reltuples"] <= 0 and row["bytes"] > LARGE_BYTES
    if never and due_since(None) >= ask.limits.vacuum_seconds:
        found.append(
            warning(
                "never-analyzed",
                f"{table} has {row['bytes'] / 1e6:,.0f} MB and was never analyzed: the planner takes it for small.",
                f"ANALYZE {table};",
                row["name"],
            )
        )
    return found
