"""Our own Alembic environment: behind `pgebus.migrations.upgrade()` and the repository's `alembic.ini`.

Hosts never run it; they run the revisions from an environment of theirs.

It looks at `config.attributes`: `pgebus_settings` (DatabaseSettings; else `Settings()` is read),
`pgebus_schema` (wins over the settings), `connection` (when it is in a transaction, its owner commits).
"""

from __future__ import annotations

import asyncio
import logging.config
from collections.abc import MutableMapping
from typing import Any, Final

import sqlalchemy as sa
from alembic import context
from sqlalchemy.pool import NullPool

from pgebus.database import make_engine
from pgebus.errors import StateError
from pgebus.migrations import place
from pgebus.schemas import tables_in
from pgebus.settings import DatabaseSettings, Settings

config = context.config
# Every statement here names its schema. Translated, the version table of the schema `pgebus` would be looked for in the
# schema of the settings, and one with square brackets in its name would be refused.
TRANSLATION: Final = "schema_translate_map"


def database_settings() -> DatabaseSettings:
    """Return the caller's settings, else those of the environment."""
    given = config.attributes.get("pgebus_settings")
    return given if isinstance(given, DatabaseSettings) else Settings().database


def is_ours(name: str | None, kind: str, parents: MutableMapping[Any, str | None]) -> bool:
    """Keep autogenerate to our tables; what else is in the database, or in our schema, is somebody else's."""
    default = context.get_context().dialect.default_schema_name  # Alembic names it None
    if kind == "schema":
        return (name or default) == schema
    return kind != "table" or f"{parents['schema_name'] or default}.{name}" in target.tables


def migrate(connection: sa.Connection) -> None:
    """Run what Alembic was asked for, on *connection*."""
    context.configure(
        connection=connection,
        target_metadata=target,
        version_table=place.VERSION_TABLE,
        version_table_schema=schema,
        include_schemas=True,
        include_name=is_ours,
        compare_server_default=True,
    )
    migration = context.get_context()
    with context.begin_transaction():
        if migration.opts.get("dont_mutate"):  # `alembic current` only looks
            context.run_migrations()
            return
        place.lock(migration)
        if config.attributes.get("pgebus_refuse_others") and not migration.get_current_heads():
            place.refuse_tables_of_others(migration)
        place.create_schema(migration)
        context.run_migrations()
        if not migration.get_current_heads():
            place.drop_version_table(migration)
            place.drop_schema_if_empty(migration)


def migrate_online() -> None:
    """Run on the caller's connection, or on one of our own."""
    connection = config.attributes.get("connection")
    if isinstance(connection, sa.Connection):
        translated = connection.get_execution_options().get(TRANSLATION)
        connection.execution_options(**{TRANSLATION: None})
        try:
            migrate(connection)
        finally:
            connection.execution_options(**{TRANSLATION: translated})
        return
    if a_loop_runs_here():
        raise StateError(
            "Migrations block, and an event loop runs in this thread. "
            "Call them in another one: await asyncio.to_thread(upgrade, settings)."
        )
    asyncio.run(migrate_on_own_engine())


def a_loop_runs_here() -> bool:
    """Tell whether this thread runs an event loop; `asyncio.run` would refuse in words that do not help."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def migrate_on_own_engine() -> None:
    """Connect, migrate, disconnect."""
    # READ COMMITTED: who waited for the lock must see what its holder has done.
    engine = make_engine(
        database_settings(),
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        execution_options={TRANSLATION: None},
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    finally:
        await engine.dispose()


def migrate_offline() -> None:
    """Write the SQL down; needs no database, and no settings that name one."""
    context.configure(
        # asyncpg's paramstyle leaves per cent signs as they are.
        url="postgresql+asyncpg://",
        target_metadata=target,
        literal_binds=True,
        version_table=place.VERSION_TABLE,
        version_table_schema=schema,
    )
    migration = context.get_context()
    to_base = context.get_revision_argument() is None
    with context.begin_transaction():
        if not to_base:
            place.create_schema(migration)
        context.run_migrations()
        if to_base:
            place.drop_version_table(migration)
            place.drop_schema_if_empty(migration)


# From the command line only: a program that calls us keeps its own logging.
if config.cmd_opts is not None and config.config_file_name is not None and config.file_config.has_section("loggers"):
    logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)

config.attributes[place.SCHEMA_OPTION] = place.chosen_schema() or database_settings().schema_name
schema = place.schema_name()
target = tables_in(schema)
if context.is_offline_mode():
    migrate_offline()
else:
    migrate_online()
