"""`pgebus roles`: who may do what to the tables."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from pgebus import DatabaseSessionManager, DatabaseSettings, Settings
from pgebus.cli.messages import database_errors_as_messages, place_of
from pgebus.security import Roles, grant_roles, role_statements

_DEFAULT = Roles()


def roles(
    owner: Annotated[str, typer.Option(help="Owns the tables, and migrates them.")] = _DEFAULT.owner,
    publisher: Annotated[str, typer.Option(help="May publish.")] = _DEFAULT.publisher,
    worker: Annotated[str, typer.Option(help="May run handlers.")] = _DEFAULT.worker,
    as_sql: Annotated[bool, typer.Option("--sql", help="Only write the SQL, without connecting.")] = False,
) -> None:
    """Make three roles and give each the rights it needs, and no others.

    None of them can log in: grant them to the roles that do. Doing it again
    takes back what else was granted to them. Do it again after a migration.

    It needs a superuser, or a role that may create roles and owns the tables.
    Where to look: as for `pgebus migrate`.
    """
    database = Settings().database
    names = Roles(owner, publisher, worker)
    if as_sql:
        for statement in ("BEGIN", *role_statements(names, schema=database.schema_name), "COMMIT"):
            typer.echo(f"{statement};")
        return
    with database_errors_as_messages(database):
        asyncio.run(_grant(database, names))
    typer.echo(
        f"{place_of(database.sqlalchemy_url())}: in schema {database.schema_name!r}, {owner} owns the tables, "
        f"{publisher} may publish, {worker} may run handlers."
    )


async def _grant(database: DatabaseSettings, names: Roles) -> None:
    async with DatabaseSessionManager(database) as manager, manager.engine.begin() as connection:
        await grant_roles(connection, names, schema=database.schema_name)
