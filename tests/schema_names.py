"""Names of schemas that break what is careless about names, and names that must be refused."""

from __future__ import annotations

from typing import Final

import asyncpg

from pgebus.names import quote_identifier

# In the default lane: each has several dangers at once.
ODD: Final = (
    """Tenant "7" 'ä'; -- %s 100% :name \\:x""",
    # 63 bytes, the last two of which are one character.
    "x" * 61 + "ä",
    "select",
    "{lost}{schema}{0} [a] $1 $$ a.b",
    "%(type) %d",
    "public",
)

MORE: Final = (
    "'",
    '"',
    '""',
    'pgebus"."events',
    "UPPER",
    "user",
    "values",
    "größe 漢字 😀",
    "漢" * 21,
    "e\u0301",
    "\u200b",
    "\u017f",
    "%",
    "%%",
    "%s",
    ":name",
    "a:b::c",
    "a\\",
    "\\:x",
    ";",
    "--",
    "/*",
    " ",
    " blanks at both ends ",
    "]",
    "[",
    "a[pgebus]",
    "{",
    "{schema}",
    "{lost}",
    "{0}",
    "$1",
    "$$",
    "$pgebus",
    "1st",
    ".",
    "pgebus.events",
    "pgebus2",
    "Pgebus",
    "PG_mine",
    "pg",
    "events",
    "d",
    "_none",
    "None",
    "null",
    "E'x'",
    'U&"\\0041"',
    "${HOME}",
)

REFUSED: Final = (
    "",
    "x" * 64,
    "ä" * 32,
    "x" * 62 + "ä",
    "x" * 1000,
    "a\x00",
    "\ud800",
    "pg_mine",
    "pg_",
    "information_schema",
    "a\nb",
    "a\n",
    "a\r",
    "tab\tbed",
    "\x7f",
    "\x85",
    "a$pgebus$b",
    "__[SCHEMA_pgebus]",
    "__[POSTCOMPILE_x]",
    "__EXECMANY_TOKEN__",
    "%(type)s",
    "collation",
    "concurrently",
    "lateral",
    "system_user",
    "tablesample",
)


async def schemas_in(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    """Return the schemas that are not PostgreSQL's own."""
    rows = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_|^information_' ORDER BY 1")
    return [row["nspname"] for row in rows]


async def clear(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Leave nothing but an empty `public`: what a test that failed has left is not to fail the next."""
    for name in await schemas_in(connection):
        await connection.execute(f"DROP SCHEMA {quote_identifier(name)} CASCADE")
    await connection.execute("CREATE SCHEMA public")
