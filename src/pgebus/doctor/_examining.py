"""The examination: one check after the other, on one connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from pgebus.database import dispose, make_engine
from pgebus.doctor import _crew, _deliveries, _groups, _horizon, _plans, _server, _tables
from pgebus.doctor._asking import Ask
from pgebus.doctor._findings import Finding, Limits, Report, Severity, notice, problem, warning
from pgebus.settings import Settings

_STOPPED: Final = ("57014", "55P03")  # a statement_timeout, a lock_timeout
_ERRORS: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError, TimeoutError)
_WHERE: Final = (
    "The database is named by PGEBUS_DATABASE__URL, or by its parts: in the environment, in .env, or in the file that "
    "PGEBUS_CONFIG_FILE names."
)


class _Check(NamedTuple):
    name: str
    run: Callable[[Ask], AsyncIterator[Finding]]
    good: str  # what is said when it finds nothing


_ALWAYS: Final = (
    _Check("server", _server.release, "The server is a primary of a supported release."),
    _Check("settings", _server.settings, "No setting loses commits."),
    _Check("clock", _server.clocks, "The clocks of this machine and of the database agree."),
    _Check("notifications", _server.notifications, "The queue of NOTIFY is not filling up."),
    _Check("transactions", _horizon.transactions, "No old transaction keeps dead rows."),
    _Check("replication", _horizon.replication, "No slot and no standby keeps dead rows."),
)
_OF_TABLES: Final = (
    _Check("schema", _tables.version, "The tables are of the version that this release needs."),
    _Check("rights", _tables.rights, "The role that examines may do and see what a worker may."),
    _Check("drift", _tables.drift, "The tables are as this release makes them."),
    _Check("indexes", _tables.indexes, "All indexes are there and valid."),
    _Check("vacuum", _tables.vacuum, "Autovacuum keeps up."),
    _Check("plans", _plans.plans, "No statement of a worker reads a large table as a whole."),
    _Check("statements", _plans.slow_statements, "Nothing is known of slow statements on the tables."),
    _Check("connections", _server.connections, "There are enough connections."),
    _Check("groups", _groups.groups, "All groups are served and keep up."),
    _Check("strays", _groups.strays, "No delivery waits for a group that is not declared."),
    _Check("unhandled", _deliveries.unhandled, "No event type is without a handler."),
    _Check("dead", _deliveries.dead, "There are no dead letters."),
    _Check("schedules", _crew.schedules, "All schedules are declared and up to date."),
)
# Those that look twice where they find something.
_PATIENT: Final = (
    _Check("keys", _deliveries.keys, "No key is held for long."),
    _Check("running", _deliveries.running, "What runs has a worker that is alive, and does not run for long."),
    _Check("workers", _crew.workers, "All workers that have not ended are alive."),
)


async def examine(settings: Settings, limits: Limits | None = None) -> Report:
    """Look at a live system, and say what is wrong and what to do.

    Changes nothing and may be done again at any time. Each statement reads, in a READ ONLY transaction of its own, a
    bounded number of rows for at most `limits.check_seconds`; the comparison with a fresh copy of the tables is that of
    `find_drift()`, whose copy is rolled back. What a running system repairs by itself is looked at twice, with a few
    seconds in between. A database that is not there, and rights that are missing, are findings and no errors.

    Args:
        settings: `database` says where; `event_system.n_workers` how many connections a worker has.
        limits: From when on something counts as wrong.

    Returns:
        What was found, the worst first.
    """
    limits = limits or Limits()
    found: list[Finding] = []
    # asyncpg's unnamed statements: what is prepared on one server connection of a pooler is unknown on another.
    unprepared = {"statement_cache_size": 0, "prepared_statement_cache_size": 0, **settings.database.connect_args}
    database = settings.database.model_copy(update={"connect_args": unprepared})
    settings = settings.model_copy(update={"database": database})
    engine = make_engine(database, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            ask = Ask(driver, settings, limits)
            await _examine(ask, found)
    except _ERRORS as error:
        found.append(_unreachable(error))
    finally:
        await dispose(engine)
    found.sort(key=lambda each: -each.severity.rank)
    return Report(database.schema_name, tuple(found))


async def _examine(ask: Ask, found: list[Finding]) -> None:
    """Add what is found to *found*, which keeps it when the connection is lost."""
    for check in _ALWAYS:
        found += await _run(ask, check)
    if missing := await _missing(ask):
        found.append(missing)
        return
    for check in _OF_TABLES:
        found += await _run(ask, check)
    # Together, so that all of them wait at the same time.
    ended = await asyncio.gather(*(_run(ask, check) for check in _PATIENT), return_exceptions=True)
    for each in ended:
        if isinstance(each, BaseException):
            raise each
        found += each


async def _run(ask: Ask, check: _Check) -> list[Finding]:
    """Return what a check found; what it may not see, and what takes too long, are findings too.

    Raises:
        asyncpg.InterfaceError, OSError: If the connection is lost.
    """
    found: list[Finding] = []
    try:
        # Nothing of it may last for ever, whoever is between us and the server.
        async with asyncio.timeout(ask.limits.look_again_seconds + 4 * ask.limits.check_seconds + 5):
            async for finding in check.run(ask):
                found.append(finding)
    except (asyncpg.PostgresError, DBAPIError, TimeoutError) as error:
        if ask.driver.is_closed():
            raise
        return [*found, _not_found_out(check.name, error)]
    return found or [Finding(check.name, Severity.OK, check.good)]


def _not_found_out(name: str, error: BaseException) -> Finding:
    state = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None)
    if isinstance(error, TimeoutError) or state in _STOPPED:
        return warning(
            "timed-out",
            f"The check {name!r} took too long and was given up: {_text(error)}.",
            "Try again when the server is less busy; look for locks on the tables.",
            name,
        )
    return notice(
        "not-visible",
        f"The check {name!r} could not be made: {_text(error)}.",
        "Examine as a member of the worker's role or of the owner: see 'pgebus roles'.",
        name,
    )


# Our schema, and others that hold tables of pgebus: those with its function.
_LOOK: Final = """
SELECT n.nspname::text AS name, n.nspname = $1::text AS ours, has_schema_privilege(n.oid, 'USAGE') AS usable,
  EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.pronamespace = n.oid AND p.proname = 'schema_version'
    AND p.pronargs = 0) AS migrated,
  EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v')) AS used
FROM pg_catalog.pg_namespace n WHERE n.nspname = $1::text OR EXISTS (SELECT FROM pg_catalog.pg_proc p
  WHERE p.pronamespace = n.oid AND p.proname = 'schema_version' AND p.pronargs = 0) ORDER BY 1"""


async def _missing(ask: Ask) -> Finding | None:
    """Return why the tables cannot be examined; None if they can."""
    rows = await ask.rows(_LOOK, ask.schema)
    ours = next((row for row in rows if row["ours"]), None)
    if ours is not None and ours["migrated"]:
        if ours["usable"]:
            return None
        return problem(
            "no-rights",
            f"The role that examines may not use schema {ask.schema!r}, so nothing in it can be seen.",
            "Examine as a member of the worker's role or of the owner: see 'pgebus roles'.",
        )
    others = [row["name"] for row in rows if row["migrated"]]
    hint = f" Schemas that do: {', '.join(map(repr, others))}; name one by PGEBUS_DATABASE__SCHEMA." if others else ""
    if ours is not None and ours["used"]:
        return problem(
            "not-ours",
            f"Schema {ask.schema!r} holds tables, and none of pgebus.{hint}",
            "Look whether this is the right database; else name another schema by PGEBUS_DATABASE__SCHEMA.",
        )
    return problem(
        "not-migrated",
        f"Schema {ask.schema!r} does not hold the tables of pgebus.{hint}",
        "Run 'alembic upgrade pgebus@head' (or 'pgebus migrate'); or name another database or schema.",
    )


def _unreachable(error: BaseException) -> Finding:
    return problem("unreachable", f"The database could not be asked: {_text(error)}.", _WHERE)


def _text(error: Any) -> str:
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig.__cause__ or error.orig
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0].rstrip(".")
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
