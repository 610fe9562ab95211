"""The commands, and what they say when something is wrong.

The work itself is done elsewhere: `pgebus.migrations` migrates, `pgebus.drift` compares, `pgebus.cli.demo` tells
the story.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from typing import Annotated, Final, NoReturn

import asyncpg
import typer
from alembic.util import CommandError
from rich.console import Console
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from pgebus import ConfigurationError, DatabaseSettings, PgebusError, Settings, __version__
from pgebus.drift import find_drift
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade

__all__ = ["app", "run"]

# Exit statuses: it could not be done; the command line or the settings are wrong. typer adds 130 for Ctrl-C.
FAILED: Final = 1
MISUSED: Final = 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    # typer's own tracebacks show local variables, and a password may be among them.
    pretty_exceptions_enable=False,
    help="A durable, transactional event bus on PostgreSQL. "
    "Exit status: 0 done, 1 it failed, 2 the command line or the settings are wrong, 130 interrupted.",
)


def run() -> None:
    """Run the command that the arguments name; exits, and turns mistakes into messages."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no message is lost to a locale that lacks a letter of it
    try:
        app(prog_name="pgebus")
    except ConfigurationError as error:
        _fail(str(error), MISUSED)
    except PgebusError as error:
        _fail(str(error), FAILED)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def pgebus(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command()
def migrate(
    revision: Annotated[str, typer.Option(help="Upgrade to this Alembic revision.")] = "pgebus@head",
) -> None:
    """Create or upgrade the tables of pgebus; doing it again does nothing.

    For applications without an Alembic environment of their own.

    Where: PGEBUS_DATABASE__URL (or __HOST, __USER and so on) and
    PGEBUS_DATABASE__SCHEMA, in the environment or in .env, or the TOML file
    that PGEBUS_CONFIG_FILE names.
    """
    database = Settings().database
    with _database_errors_as_messages(database):
        upgrade(database, revision)
    typer.echo(f"{_place(database.sqlalchemy_url())}: schema {database.schema_name!r} is migrated to {revision}.")


@app.command()
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Write the differences as JSON.")] = False,
) -> None:
    """Say what differs between the tables and those that this release makes.

    What an application has added is no difference. Exit status: 0 no
    difference, 1 some, or it could not be found out, 2 the command line or
    the settings are wrong.

    The copy that it compares with is made in a transaction that is rolled
    back. Where to look: as for `pgebus migrate`.
    """
    database = Settings().database
    with _database_errors_as_messages(database):
        differences = asyncio.run(find_drift(database))
    if as_json:
        found = {"schema": database.schema_name, "differences": [asdict(difference) for difference in differences]}
        typer.echo(json.dumps(found, indent=2))
    else:
        for difference in differences:
            typer.echo(str(difference))
        schema = f"{_place(database.sqlalchemy_url())}: schema {database.schema_name!r}"
        count = "1 difference" if len(differences) == 1 else f"{len(differences) or 'no'} differences"
        typer.echo(f"{schema}: {count} from what pgebus {__version__} makes.")
    raise typer.Exit(FAILED if differences else 0)


@app.command()
def demo() -> None:
    """Show what pgebus does, in under 20 seconds, on a PostgreSQL server that is removed afterwards."""
    from pgebus.cli.demo.play import play

    try:
        postgres = EmbeddedPostgres()
    except ConfigurationError as error:  # the extra `embedded` is missing, which no setting can mend
        _fail(str(error), FAILED)
    try:
        kept = play(postgres)
    except subprocess.CalledProcessError as error:  # initdb or pg_ctl, which have said why
        _fail(f"The embedded PostgreSQL does not run. {error} {(error.stderr or b'').decode(errors='replace')}", FAILED)
    raise typer.Exit(0 if kept else FAILED)


@contextmanager
def _database_errors_as_messages(database: DatabaseSettings) -> Iterator[None]:
    """Tell of a database that cannot be used in one line: which one, and what it said; never the password."""
    place = _place(database.sqlalchemy_url())
    try:
        yield
    except CommandError as error:
        _fail(str(error), MISUSED)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError) as error:
        _fail(
            f"{place}: {_said(error)}. The database is named by PGEBUS_DATABASE__URL, or by its parts: in the "
            "environment, in .env, or in the file that PGEBUS_CONFIG_FILE names.",
            FAILED,
        )


def _place(url: URL) -> str:
    """Return where *url* leads to, without the password and without parameters that may hold one."""
    host = url.host or url.query.get("host") or "localhost"
    hosts = host if isinstance(host, str) else ",".join(host)
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"{user}{hosts}{port}/{url.database or ''}"


def _said(error: BaseException) -> str:
    """Return what the driver said."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        # The dialect's error adds the name of a class to the text of the driver's.
        error = error.orig.__cause__ or error.orig
    if text := str(error).strip().rstrip("."):
        return text
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style="red")
    sys.exit(status)
