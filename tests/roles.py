"""The three roles in a test's own database, and logins that are members of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from pgebus import DatabaseSessionManager, DatabaseSettings
from pgebus.names import quote_identifier
from pgebus.security import Roles, grant_roles
from tests.system.bus import Sql

_numbers = count(1)


@dataclass
class Cast:
    """Roles are the whole server's: so they have names of their own, and are dropped at the end."""

    sql: Sql
    database: DatabaseSettings
    roles: Roles
    logins: list[str] = field(default_factory=list)

    async def grant(self) -> None:
        """Grant them their rights, by the role that the tests have anyway."""
        async with DatabaseSessionManager(self.database) as manager, manager.session() as session:
            await grant_roles(session, self.roles, schema=self.database.schema_name)
            await session.commit()

    async def login(self, role: str, options: str = "", *, word: str = "none") -> DatabaseSettings:
        """Return settings of a new login that is a member of *role*."""
        name = f"login_{next(_numbers)}_{await self.sql.fetchval('SELECT pg_backend_pid()')}"
        await self.sql.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{word}' {options} IN ROLE {quote_identifier(role)}")
        self.logins.append(name)
        url = self.database.sqlalchemy_url().set(username=name, password=word)
        given = self.database.model_dump(exclude_unset=True, by_alias=True)
        return DatabaseSettings.model_validate({**given, "url": url.render_as_string(hide_password=False)})


@asynccontextmanager
async def casting(sql: Sql, database: DatabaseSettings, *names: str) -> AsyncIterator[Cast]:
    """Have three roles in the block, which exist only when they are granted something."""
    if not names:
        number = f'{await sql.fetchval("SELECT pg_backend_pid()")} "{next(_numbers)}"'
        names = tuple(f"{name} {number}" for name in ("Owner's", "Publisher", "Worker"))
    cast = Cast(sql, database, Roles(*names))
    try:
        yield cast
    finally:
        for name in (*cast.logins, *map(quote_identifier, names)):
            if await sql.fetchval("SELECT true FROM pg_roles WHERE quote_ident(rolname) = $1 OR rolname = $1", name):
                await sql.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}")
