"""What differs between the tables in a database and those that this release would make.

It repairs nothing, and leaves nothing behind. The measure is a fresh copy, built by the migrations and rolled
back, so that no definition is written down twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO
from itertools import zip_longest
from typing import Any, Final
from uuid import uuid4

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from pgebus._catalog import Facts, read_facts
from pgebus.database import make_engine
from pgebus.errors import PgebusError
from pgebus.migrations import _one_at_a_time
from pgebus.migrations.place import SCHEMA_OPTION, VERSION_TABLE
from pgebus.models import SCHEMA_VERSION
from pgebus.names import quote_identifier
from pgebus.settings import DatabaseSettings

__all__ = ["Difference", "DriftCheckError", "find_drift"]

_UPGRADE: Final = "Run 'alembic upgrade pgebus@head' (or 'pgebus migrate')."
_TEMPORARY: Final = "pg_temp"


class DriftCheckError(PgebusError):
    """The database cannot be compared: there is nowhere to build the fresh copy. The message says what is needed."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the migrations make it; `str()` says it in one line.

    Attributes:
        kind: `schema`, `table`, `column`, `check`, `primary key`, `foreign key`, `unique constraint`, `index`,
            `trigger` or `function`.
        name: Which one, for example `events.priority`.
        aspect: What about it, for example `type`; `existence` when it is missing.
        expected: What the migrations make.
        found: What is there.
        remedy: What to do, where one command puts it right.
    """

    kind: str
    name: str
    aspect: str
    expected: str
    found: str
    remedy: str | None = None

    def __str__(self) -> str:
        name = repr(self.name) if self.kind == "schema" else self.name
        advice = f". {self.remedy}" if self.remedy else ""
        if self.aspect == "existence":
            return f"{self.kind} {name}: {self.found}{advice}"
        expected, found = (" ".join(text.split()) for text in (self.expected, self.found))
        return f"{self.kind} {name}, {self.aspect}: expected {expected}, found {found}{advice}"


async def find_drift(settings: DatabaseSettings) -> list[Difference]:
    """Compare the tables in the database with those that this release would make; empty when they are equal.

    Compared are tables, columns, constraints, indexes, triggers, functions, storage parameters, owners, and who may
    run our functions. What a host has added is no difference: columns, indexes, constraints, triggers, tables,
    grants to roles.

    Builds a copy in a schema of its own, in a transaction that is always rolled back: nobody else ever sees it, and
    nothing is left of it, however this ends. That takes the right to CREATE in the database; without it, TEMPORARY is
    enough. The tables themselves are locked as by a SELECT. When the schema is at another version, or holds nothing
    of ours, that is the only difference.

    Args:
        settings: Where; `settings.schema_name` is the schema.

    Raises:
        DriftCheckError: If the role may create neither schemas nor temporary tables, or the server is a standby.
    """
    engine = make_engine(settings, poolclass=NullPool, isolation_level="READ COMMITTED")
    try:
        async with engine.connect() as connection:
            there = await _look(connection, settings.schema_name)
        if there.version is not None and there.version != SCHEMA_VERSION:
            return [_other_version(settings.schema_name, there.version)]
        if there.oid is None:
            return [_not_installed(settings.schema_name)]
        copy = _where_to_build(there)
        script = await asyncio.to_thread(_script, copy)
        async with engine.connect() as connection:  # nothing in it commits: leaving it rolls back
            expected, found = await _both(connection, script, copy, settings.schema_name, there.oid)
    finally:
        await engine.dispose()
    if there.version is None and not any(key in found for key in expected if key[0] == "table"):
        return [_not_installed(settings.schema_name)]
    return list(_compare(expected, found))


@dataclass(frozen=True)
class _There:
    """What has to be known before anything is built."""

    role: str
    database: str
    is_standby: bool
    may_create: bool
    may_create_temporary: bool
    oid: int | None
    version: int | None = None


_LOOK: Final = sa.text("""
SELECT current_user, current_database(), pg_is_in_recovery(),
  has_database_privilege(current_database(), 'CREATE'), has_database_privilege(current_database(), 'TEMPORARY'),
  (SELECT CAST(n.oid AS bigint) FROM pg_namespace n WHERE n.nspname = :schema),
  EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
          WHERE n.nspname = :schema AND p.proname = 'schema_version' AND p.pronargs = 0)
""").bindparams(sa.bindparam("schema", type_=sa.Text))


async def _look(connection: AsyncConnection, schema: str) -> _There:
    row = (await connection.execute(_LOOK, {"schema": schema})).one()
    there = _There(*row[:-1])
    if not row[-1]:
        return there
    # The driver takes a name as it is; SQLAlchemy would look for parameters in it.
    version = await (await _driver(connection)).fetchval(f"SELECT {quote_identifier(schema)}.schema_version()")
    return replace(there, version=version)


def _where_to_build(there: _There) -> str:
    """Return the name of a schema for the copy.

    Raises:
        DriftCheckError: If there is none.
    """
    if there.is_standby:
        raise DriftCheckError(
            f"Database {there.database!r} is on a standby, where no copy can be built to compare with. "
            "Check the primary."
        )
    if there.may_create:
        return _new_name()
    if there.may_create_temporary:
        return _TEMPORARY
    raise DriftCheckError(
        f"Role {there.role!r} may create nothing in database {there.database!r}, not even a temporary table, and the "
        "check builds a copy of our tables, which it rolls back. Check as the role that migrates, or "
        f"GRANT TEMPORARY ON DATABASE {quote_identifier(there.database)} TO {quote_identifier(there.role)}."
    )


async def _both(connection: AsyncConnection, script: str, copy: str, schema: str, oid: int) -> tuple[Facts, Facts]:
    """Return the facts about a fresh copy, which it builds, and about the schema."""
    # Before anything else: the role may be one that only reads unless it says otherwise.
    await connection.execute(sa.text("SET TRANSACTION READ WRITE"))
    # Rights that this role gives or takes by default are not what our migrations mean.
    await connection.execute(sa.text("ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC"))
    await (await _driver(connection)).execute(script)
    its_oid, its_name = (await connection.execute(_COPY, {"copy": copy, "temporary": copy == _TEMPORARY})).one()
    schemas = (schema, copy, its_name)
    expected = await read_facts(connection, its_oid, schemas=schemas)
    found = await read_facts(connection, oid, schemas=schemas)
    return {key: thing for key, thing in expected.items() if VERSION_TABLE not in (key[1], thing.table)}, found


_COPY: Final = sa.text(
    "SELECT CAST(oid AS bigint), nspname FROM pg_namespace"
    " WHERE CASE WHEN :temporary THEN oid = pg_my_temp_schema() ELSE nspname = :copy END"
).bindparams(sa.bindparam("temporary", type_=sa.Boolean), sa.bindparam("copy", type_=sa.Text))


def _script(schema: str) -> str:
    """Return the SQL of all migrations, which makes *schema* and everything in it; it commits nothing."""
    name = _new_name() if schema == _TEMPORARY else schema  # our migrations take no name that begins with pg_
    buffer = StringIO()
    config = Config()
    config.set_main_option("script_location", "pgebus:migrations")
    config.attributes[SCHEMA_OPTION] = name
    revisions = ScriptDirectory.from_config(config)

    def upgrade(revision: Any, _context: object) -> Any:
        return revisions._upgrade_revs("pgebus@head", revision)

    # Alembic keeps the environment that runs in globals of its modules.
    with _one_at_a_time, EnvironmentContext(config, revisions, fn=upgrade, as_sql=True) as environment:
        environment.configure(
            url="postgresql+asyncpg://",
            literal_binds=True,
            output_buffer=buffer,
            # The transaction is ours. The COMMIT that goes before a revision's autocommit_block() would keep the copy;
            # without it, PostgreSQL refuses what stands in such a block.
            transactional_ddl=False,
            version_table=VERSION_TABLE,
            version_table_schema=name,
        )
        environment.run_migrations()
    create_schema = f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(name)};"
    script = f"{create_schema}\n{buffer.getvalue()}"
    if schema != _TEMPORARY:
        return script
    return script.replace(create_schema, "").replace(quote_identifier(name), quote_identifier(_TEMPORARY))


def _new_name() -> str:
    # With a blank, so that everybody quotes it, and all its places in a script are found.
    return f"pgebus check {uuid4().hex}"


async def _driver(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


def _other_version(schema: str, found: int) -> Difference:
    remedy = _UPGRADE if found < SCHEMA_VERSION else "Install the release that the database was migrated for."
    return Difference("schema", schema, "version", str(SCHEMA_VERSION), str(found), remedy)


def _not_installed(schema: str) -> Difference:
    return Difference("schema", schema, "existence", "the tables of pgebus", "holds no tables of pgebus", _UPGRADE)


def _compare(expected: Facts, found: Facts) -> Iterator[Difference]:
    """Say what is missing in *found*, and what is another; what it has besides is nobody's business."""
    owner = _common_owner(expected, found)
    whole_tables = {
        name
        for (kind, name), thing in expected.items()
        if kind == "table" and (kind, name) in found and found[kind, name].aspects["kind"] == thing.aspects["kind"]
    }
    for (kind, name), thing in expected.items():
        if thing.table is not None and thing.table not in whole_tables:
            continue  # its table is missing, which says it all
        there = found.get((kind, name))
        if there is None:
            yield Difference(kind, name, "existence", "there", "missing")
            continue
        if kind == "table" and name not in whole_tables:
            yield Difference(kind, name, "kind", thing.aspects["kind"], there.aspects["kind"])
            continue
        wanted = {**thing.aspects, "owner": owner} if "owner" in thing.aspects else thing.aspects
        for aspect, one, other in _aspects(wanted, there.aspects):
            yield Difference(kind, name, aspect, one, other)


def _aspects(expected: dict[str, str], found: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield what differs of one thing; its whole definition only when nothing else tells the difference."""
    told = False
    for aspect, wanted in expected.items():
        if aspect == "definition" or (is_there := found[aspect]) == wanted:
            continue
        if aspect == "may be run by" and "some roles" in (wanted, is_there) and is_there != "everybody":
            continue  # somebody has granted it with a purpose
        told = True
        yield _shortened(aspect, wanted, is_there)
    if not told and expected.get("definition") != found.get("definition"):
        yield _shortened("definition", expected["definition"], found["definition"])


def _shortened(aspect: str, expected: str, found: str) -> tuple[str, str, str]:
    """Return the aspect, or where two bodies of functions part: nobody wants to read both of them in full."""
    if aspect != "body" and not ("\n" in expected and "\n" in found):
        return aspect, expected, found
    lines = enumerate(zip_longest(expected.split("\n"), found.split("\n")), 1)
    number, (wanted, is_there) = next((number, pair) for number, pair in lines if pair[0] != pair[1])
    shown = ["the end" if line is None else repr(line.strip()) for line in (wanted, is_there)]
    if shown[0] == shown[1]:  # they are indented differently
        shown = [repr(wanted), repr(is_there)]
    return f"{aspect}, line {number}", shown[0], shown[1]


def _common_owner(expected: Facts, found: Facts) -> str:
    """Return who owns most of what is ours: one role has to own it all, because our triggers act as their owner."""
    owners = Counter(
        found[key].aspects["owner"] for key, thing in expected.items() if "owner" in thing.aspects and key in found
    )
    return owners.most_common(1)[0][0] if owners else ""
