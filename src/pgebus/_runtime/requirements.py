"""What must be true of the database before a worker starts.

Creates nothing: it says what is missing, and the command that mends it.
"""

from __future__ import annotations

import logging
from typing import Final

from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line
from pgebus.errors import ConfigurationError, SchemaMismatchError
from pgebus.inheritance import family
from pgebus.models import SCHEMA_VERSION
from pgebus.names import quote_identifier, quote_literal

logger = logging.getLogger(__name__)

# In a rolling deploy the database is migrated first, and until the last process is replaced, those of the release
# before may be started again: by a crash, by more load. So each revision keeps that release running; one that can't
# raises the version by two.
MIGRATED_AHEAD: Final = 1


# At another isolation level a claim would fail on rows that others take at the same time. With an asynchronous commit
# it could be undone by a crash after a handler has started, and handed out again under the same fence.
CLAIM_DEFAULTS: Final = (
    ("default_transaction_isolation", ("read committed", "read uncommitted"), "read committed"),
    ("synchronous_commit", ("on", "local", "remote_write", "remote_apply"), "on"),
    ("default_transaction_read_only", ("off",), "off"),
)


# Where triggers do not fire, an event gets no delivery: PostgreSQL's CREATE TRIGGER and ALTER TABLE say under which.
TRIGGERS_FIRE: Final = ("origin", "local")


async def require_triggers(line: Line, statements: Statements) -> None:
    """Refuse a role or a database for which no trigger fires: what handlers publish would reach nobody.

    A worker cannot mend that for itself, as it may be set by a superuser alone.

    Raises:
        ConfigurationError: If so; the message holds the command to run.
    """
    (row,) = await line.fetch(statements.defaults, ["session_replication_role"])
    if row["value"] not in TRIGGERS_FIRE:
        raise ConfigurationError(
            f"session_replication_role is {row['value']!r} by default for this role or database: no trigger fires, so "
            "an event would get no delivery, and be lost. Run 'ALTER ROLE … RESET session_replication_role', or the "
            "same with ALTER DATABASE, and look for events that have no delivery."
        )


async def require_defaults(line: Line, statements: Statements) -> None:
    """Refuse defaults of the role or the database under which a claim would not be what it has to be.

    Only for a worker behind a transaction pooler: any other sets them for its own sessions.

    Raises:
        ConfigurationError: If there are any; the message holds the command to run.
    """
    rows = await line.fetch(statements.defaults, [name for name, _, _ in CLAIM_DEFAULTS])
    found = {row["name"]: row["value"] for row in rows}
    for name, accepted, right in CLAIM_DEFAULTS:
        if found[name] not in accepted:
            raise ConfigurationError(
                f"{name} is {found[name]!r} by default, under which a claim would not be what it has to be. A worker "
                "behind a transaction pooler cannot set it for itself: a SET would reach strangers. Run 'ALTER ROLE "
                f"… SET {name} = {quote_literal(right)}', and reconnect the pooler."
            )


async def _require_columns(line: Line, statements: Statements) -> None:
    """Refuse a table of events without the columns of the application's subclasses: nothing could be claimed."""
    wanted = {str(column.name) for column in family.table.columns if column.key not in family.own_columns}
    if not wanted:
        return
    missing = wanted - {row["attname"] for row in await line.fetch(statements.event_columns, statements.schema)}
    if missing:
        raise SchemaMismatchError(
            f"Table {statements.schema!r}.events lacks columns that subclasses of Event declare: "
            f"{', '.join(sorted(missing))}. Run the application's own migrations; 'alembic revision --autogenerate' "
            "writes the missing one.",
            schema=statements.schema,
            found=SCHEMA_VERSION,
            needed=SCHEMA_VERSION,
        )


async def require_schema(line: Line, statements: Statements) -> None:
    """Refuse a database whose tables are not those of this release, or of the next one.

    Raises:
        SchemaMismatchError: If so; the message holds the command to run.
        ConfigurationError: If the role may not read what it needs.
    """
    schema = statements.schema
    found: int | None = None
    if await line.value(statements.has_version, schema):
        found = await line.value(statements.version)
    if found is not None and SCHEMA_VERSION <= found <= SCHEMA_VERSION + MIGRATED_AHEAD:
        if found > SCHEMA_VERSION:
            logger.info("Schema %r is at version %d, one ahead of this release, which may go on.", schema, found)
        await _require_columns(line, statements)
        if not await line.value(statements.may_read_sequence, schema):
            raise ConfigurationError(
                f"The role may not read the sequence of the event ids, so no group could begin 'from now'. Grant it: "
                f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {quote_identifier(schema)} TO …"
            )
        return
    command = "Run 'alembic upgrade pgebus@head' (or 'pgebus migrate')."
    if found is None:
        message = f"Schema {schema!r} does not hold the tables of pgebus. {command}"
    elif found < SCHEMA_VERSION:
        message = f"Schema {schema!r} is at version {found}, this release needs {SCHEMA_VERSION}. {command}"
    else:
        message = (
            f"Schema {schema!r} is at version {found}, this release works with {SCHEMA_VERSION} and one ahead of it. "
            "Install the release of pgebus that the database was migrated for."
        )
    raise SchemaMismatchError(message, schema=schema, found=found, needed=SCHEMA_VERSION)
