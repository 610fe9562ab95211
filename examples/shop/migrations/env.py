"""The Alembic environment of the shop: `alembic init -t async`, with the database of the settings.

What it compares with are our tables and those of pgebus, since `shop.events` adds a column there. Nothing else in
here is about pgebus.
"""

from __future__ import annotations

import asyncio
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection

import pgebus
import shop.events  # noqa: F401 - only what is imported is compared, and it adds a column to the table of events
from shop.models import Base

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

target_metadata = [Base.metadata, pgebus.metadata]


def migrate(connection: Connection) -> None:
    """Run what `alembic` was asked for."""
    context.configure(connection=connection, target_metadata=target_metadata)
    with context.begin_transaction():
        context.run_migrations()


async def migrate_online() -> None:
    """Connect as the application does, and migrate."""
    settings = pgebus.Settings().database
    async with pgebus.DatabaseSessionManager(settings) as database, database.engine.connect() as connection:
        await connection.run_sync(migrate)


def migrate_offline() -> None:
    """Write the SQL down, for `alembic upgrade head --sql`."""
    context.configure(url="postgresql+asyncpg://", target_metadata=target_metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    migrate_offline()
else:
    asyncio.run(migrate_online())
