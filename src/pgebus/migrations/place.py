"""Which schema the migrations work on, and what they may find there.

It makes no tables; the revisions do. Hosts' environments run the revisions too, so nothing here relies on our
own `env.py`.
"""

from __future__ import annotations

import os
import re
from configparser import InterpolationError
from typing import Any, Final

import sqlalchemy as sa
from alembic import context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from pgebus.errors import ConfigurationError, SchemaMismatchError
from pgebus.models import SCHEMA_VERSION
from pgebus.names import check_schema, quote_identifier

SCHEMA_OPTION: Final = "pgebus_schema"
# Of our own environment; inside our schema, so that it is never a host's.
VERSION_TABLE: Final = "alembic_version"
_VARIABLE: Final = "PGEBUS_DATABASE__SCHEMA"


def schema_name() -> str:
    """Return the schema to migrate, from the first place that names one.

    These are: `config.attributes["pgebus_schema"]`, `-x pgebus_schema=…`, the option `pgebus_schema` in
    `alembic.ini` or `pyproject.toml`, and the environment variable `PGEBUS_DATABASE__SCHEMA`; else it is `pgebus`.

    Raises:
        InvalidSchemaError: If PostgreSQL would cut or refuse the name.
        ConfigurationError: If Alembic's file cannot be read where it names the schema.
    """
    chosen = chosen_schema()
    return check_schema(os.environ.get(_VARIABLE) or "pgebus") if chosen is None else chosen


def chosen_schema() -> str | None:
    """Return the schema that this very run of Alembic was told, or None.

    Raises:
        InvalidSchemaError: If PostgreSQL would cut or refuse the name, or there is none where one is said to be.
        ConfigurationError: If Alembic's file cannot be read where it names the schema.
    """
    for told in (
        context.config.attributes.get(SCHEMA_OPTION),
        context.get_x_argument(as_dictionary=True).get(SCHEMA_OPTION),
        _in_the_file(context.config),
    ):
        if told is not None:
            return check_schema(told)
    return None


def _in_the_file(config: Config) -> object:
    """Return the option in `alembic.ini`, else in `pyproject.toml`; in both, a per cent sign begins a reference."""
    try:
        value: object = config.get_alembic_option(SCHEMA_OPTION)
    except (InterpolationError, LookupError, TypeError, ValueError) as error:
        raise _not_doubled() from error
    raw = config.toml_alembic_config.get(SCHEMA_OPTION)
    if isinstance(raw, str) and "%" in re.sub(r"%%|%\(\w+\)s", "", raw):  # Python would make nearly any text of it
        raise _not_doubled()
    return value


def _not_doubled() -> ConfigurationError:
    return ConfigurationError(
        f"The option {SCHEMA_OPTION!r} in Alembic's file cannot be read. Write each per cent sign in it twice."
    )


def execute(migration: MigrationContext, *statements: str) -> None:
    """Run *statements*, offline write them down; `{schema}` becomes the quoted name of our schema."""
    for statement in statements:
        if migration.as_sql:
            # Alembic would double a per cent sign in the name of the schema, for some drivers.
            migration.impl.static_output(f"{_filled(statement.strip())}{migration.impl.command_terminator}")
        else:
            migration.execute(_text(statement.strip()))


def create_schema(migration: MigrationContext) -> None:
    """Create our schema where it is missing."""
    # IF NOT EXISTS asks for CREATE on the database even where the schema exists: a role that was given a
    # schema of its own need not have it.
    if migration.as_sql or not _look(migration, "SELECT to_regnamespace(:name) IS NOT NULL", "{schema}"):
        execute(migration, "CREATE SCHEMA IF NOT EXISTS {schema}")


def drop_schema_if_empty(migration: MigrationContext) -> None:
    """Drop our schema unless something is left in it, it is not ours to drop, or it is `public`."""
    if schema_name() == "public":
        return
    execute(
        migration,
        """
DO $pgebus$ BEGIN
  DROP SCHEMA IF EXISTS {schema} RESTRICT;
EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN NULL;
END $pgebus$
""",
    )


def drop_version_table(migration: MigrationContext) -> None:
    """Drop the version table of our own environment."""
    execute(migration, f"DROP TABLE IF EXISTS {{schema}}.{VERSION_TABLE}")


def lock(migration: MigrationContext) -> None:
    """Wait until nobody else migrates this schema; held to the end of the transaction."""
    key = sa.func.hashtextextended(f"pgebus.migrations {schema_name()}", 0)
    _connection(migration).execute(sa.select(sa.func.pg_advisory_xact_lock(key)))


def refuse_tables_of_others(migration: MigrationContext) -> None:
    """Refuse to go on when a table `events` is there before our first revision has made it.

    Either another Alembic environment has made our tables, or it is no table of ours at all.

    Raises:
        SchemaMismatchError: If so; the message names the ways out.
    """
    if migration.as_sql or not _look(migration, "SELECT to_regclass(:name) IS NOT NULL", "{schema}.events"):
        return
    schema = schema_name()
    if not _look(migration, "SELECT to_regprocedure(:name) IS NOT NULL", "{schema}.schema_version()"):
        raise SchemaMismatchError(
            f"Schema {schema!r} holds a table 'events' that is not ours. Choose another schema for pgebus.",
            schema=schema,
            found=None,
            needed=SCHEMA_VERSION,
        )
    found = _connection(migration).scalar(_text("SELECT {schema}.schema_version()"))
    raise SchemaMismatchError(
        f"The tables of pgebus are in schema {schema!r} already, at version {found}, and another Alembic "
        "environment made them. Go on with that one (in an application's: 'alembic upgrade pgebus@head'), or "
        "hand them over to this one: 'alembic stamp' with the revision that they are at.",
        schema=schema,
        found=found,
        needed=SCHEMA_VERSION,
    )


def _connection(migration: MigrationContext) -> sa.Connection:
    assert migration.connection is not None  # noqa: S101 - for the type checker: only None in offline mode
    return migration.connection


def _look(migration: MigrationContext, query: str, name: str) -> Any:
    return _connection(migration).scalar(sa.text(query), {"name": _filled(name)})


def _text(sql: str) -> sa.TextClause:
    # text() takes a colon before a word for a parameter, and the name of a schema may hold one.
    return sa.text(_filled(sql).replace(":", r"\:"))


def _filled(sql: str) -> str:
    return sql.replace("{schema}", quote_identifier(schema_name()))
