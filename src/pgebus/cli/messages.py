"""What the commands say when something is wrong, and the exit statuses that go with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import asyncpg
from alembic.util import CommandError
from rich.console import Console
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from pgebus import DatabaseSettings

# Exit statuses: it could not be done; the command line or the settings are wrong. typer adds 130 for Ctrl-C.
FAILED: Final = 1
MISUSED: Final = 2

# No such table, no such schema.
_NOT_THERE: Final = ("42P01", "3F000")
# A lock_timeout.
_LOCKED: Final = "55P03"
_WHO_HAS_LOCKED: Final = (
    "A table is locked by another session, as by a migration or VACUUM FULL. Who it is: SELECT pid, usename, state, "
    "query FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks WHERE granted AND mode = 'AccessExclusiveLock')"
)


@contextmanager
def database_errors_as_messages(database: DatabaseSettings) -> Iterator[None]:
    """Tell of a database that cannot be used in one line: which one, and what it said; never the password."""
    place = place_of(database.sqlalchemy_url())
    try:
        yield
    except CommandError as error:
        fail(str(error), MISUSED)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError) as error:
        if _sqlstate(error) == _LOCKED:
            fail(f"{place}: {said(error)}. {_WHO_HAS_LOCKED}", FAILED)
        fail(
            f"{place}: {said(error)}. The tables of pgebus are not there: run 'pgebus migrate'."
            if _sqlstate(error) in _NOT_THERE
            else f"{place}: {said(error)}. The database is named by PGEBUS_DATABASE__URL, or by its parts: in the "
            "environment, in .env, or in the file that PGEBUS_CONFIG_FILE names.",
            FAILED,
        )


def _sqlstate(error: BaseException) -> str | None:
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None)


def place_of(url: URL) -> str:
    """Return where *url* leads to, without the password and without parameters that may hold one."""
    host = url.host or url.query.get("host") or "localhost"
    hosts = host if isinstance(host, str) else ",".join(host)
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"{user}{hosts}{port}/{url.database or ''}"


def said(error: BaseException) -> str:
    """Return what the driver said."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        # The dialect's error adds the name of a class to the text of the driver's.
        error = error.orig.__cause__ or error.orig
    if text := str(error).strip().rstrip("."):
        return text
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def told(error: BaseException) -> str:
    """Return the type and the text of *error*, in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def fail(message: str, status: int) -> NoReturn:
    """Say what is wrong on standard error, and exit with *status*."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style="red")
    sys.exit(status)
