"""The commands, and what they say when something is wrong.

The work itself is done elsewhere: `pgebus.migrations` migrates, `pgebus.drift` compares, `pgebus.cli.demo` tells
the story.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from io import TextIOWrapper
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from pgebus import ConfigurationError, PgebusError, Settings, __version__
from pgebus.cli import deliveries, doctor, groups, roles, verbs
from pgebus.cli.messages import FAILED, MISUSED, database_errors_as_messages, fail, place_of
from pgebus.cli.status import status
from pgebus.cli.tracing import trace
from pgebus.cli.worker.command import worker
from pgebus.drift import find_drift
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade

__all__ = ["app", "run"]

# As one needs them: to set up, to run, to look, to look closer, to act.
_ORDER: Final = [
    "migrate",
    "check",
    "roles",
    "worker",
    "status",
    "doctor",
    "groups",
    "routes",
    "deliveries",
    "show",
    "trace",
    "blocked",
    "redrive",
    "replay",
    "cancel",
    "release-key",
    "prune",
    "purge",
    "demo",
]


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the help; those that it does not know come last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


app = typer.Typer(
    cls=_InOrder,
    add_completion=False,
    no_args_is_help=True,
    # typer's own tracebacks show local variables, and a password may be among them.
    pretty_exceptions_enable=False,
    help="A durable, transactional event bus on PostgreSQL. "
    "Exit status: 0 done, 1 it failed, 2 the command line or the settings are wrong, 130 interrupted.",
)


app.add_typer(groups.app, name="groups")
app.command()(groups.blocked)
app.command()(groups.routes)
app.command()(roles.roles)
app.command()(doctor.doctor)
app.command()(deliveries.deliveries)
app.command()(deliveries.show)
app.command()(verbs.redrive)
app.command()(verbs.replay)
app.command()(verbs.cancel)
app.command("release-key")(verbs.release_key)
app.command()(verbs.prune)
app.command()(verbs.purge)
app.command()(worker)
app.command()(status)
app.command()(trace)


def run() -> None:
    """Run the command that the arguments name; exits, and turns mistakes into messages."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no message is lost to a locale that lacks a letter of it
    try:
        app(prog_name="pgebus")
    except ConfigurationError as error:
        fail(str(error), MISUSED)
    except PgebusError as error:
        fail(str(error), FAILED)


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
    with database_errors_as_messages(database):
        upgrade(database, revision)
    typer.echo(f"{place_of(database.sqlalchemy_url())}: schema {database.schema_name!r} is migrated to {revision}.")


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
    with database_errors_as_messages(database):
        differences = asyncio.run(find_drift(database))
    if as_json:
        found = {"schema": database.schema_name, "differences": [asdict(difference) for difference in differences]}
        typer.echo(json.dumps(found, indent=2))
    else:
        for difference in differences:
            typer.echo(str(difference))
        schema = f"{place_of(database.sqlalchemy_url())}: schema {database.schema_name!r}"
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
        fail(str(error), FAILED)
    try:
        kept = play(postgres)
    except subprocess.CalledProcessError as error:  # initdb or pg_ctl, which have said why
        fail(f"The embedded PostgreSQL does not run. {error} {(error.stderr or b'').decode(errors='replace')}", FAILED)
    raise typer.Exit(0 if kept else FAILED)
