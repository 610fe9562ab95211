"""Migrations of the tables, as calls: for applications without Alembic, tests, and the command line.

Hosts with an Alembic environment of their own use `versions/` as one more version location instead.
"""

from __future__ import annotations

from threading import Lock
from typing import Final

from alembic import command
from alembic.config import Config

from pgebus.settings import DatabaseSettings

__all__ = ["downgrade", "upgrade"]


# Alembic keeps the environment that runs in globals of its modules.
_one_at_a_time: Final = Lock()


def upgrade(settings: DatabaseSettings, revision: str = "pgebus@head") -> None:
    """Bring the tables up to *revision*, creating the schema where it is missing; commits.

    Blocking: from a coroutine, call it with `asyncio.to_thread`. Doing it again does nothing; of several at
    once, one works and the others wait. The revision is kept in `alembic_version` inside the schema, apart
    from a host's own.

    Args:
        settings: Where; `settings.schema_name` is the schema.
        revision: An Alembic revision; the newest unless said otherwise.

    Raises:
        StateError: If an event loop runs in this thread.
        SchemaMismatchError: If the tables are there, but were made by another Alembic environment.
    """
    with _one_at_a_time:
        command.upgrade(_config(settings), revision)


def downgrade(settings: DatabaseSettings, revision: str = "pgebus@base") -> None:
    """Take the tables down to *revision*; at the base **all events are gone**; commits.

    The schema goes too, when nothing else is left in it. Blocking, as `upgrade()`.

    Args:
        settings: Where; `settings.schema_name` is the schema.
        revision: An Alembic revision; the state before our first one unless said otherwise.

    Raises:
        StateError: If an event loop runs in this thread.
        SchemaMismatchError: If the tables are there, but were made by another Alembic environment.
    """
    with _one_at_a_time:
        command.downgrade(_config(settings), revision)


def _config(settings: DatabaseSettings) -> Config:
    config = Config()
    config.set_main_option("script_location", "pgebus:migrations")
    config.attributes["pgebus_settings"] = settings
    config.attributes["pgebus_refuse_others"] = True
    return config
