"""Three roles for the tables: one owns them, one may publish, one may run handlers.

Writes the GRANTs and what has to be true before them. It gives nobody a login, and makes nobody a member, except
whoever runs it, of the owner.
"""

# ruff: noqa: S608 - what is filled in are quoted identifiers and literals

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from pgebus.errors import ConfigurationError
from pgebus.names import MAX_IDENTIFIER_BYTES, check_schema, quote_identifier, quote_literal

__all__ = ["Roles", "grant_roles", "role_statements"]

# A table that is being read must not make everybody else wait behind us.
_LOCK_TIMEOUT: Final = "10s"
# All functions of the schema; the first three belong to triggers, and nobody may call them.
_FUNCTIONS: Final = ("fan_out", "forget", "forget_all", "complete", "schema_version")
_VERSION_TABLE: Final = "alembic_version"

# What a worker does with each table. Locking a row of `events`, so that it is not pruned meanwhile, needs UPDATE of
# one column at least: of the one that means nothing any more once the deliveries are there.
_WORKER: Final = {
    "events": "SELECT, INSERT, DELETE, UPDATE (priority)",
    "deliveries": "SELECT, INSERT, UPDATE, DELETE",
    "consumer_groups": "SELECT, INSERT, UPDATE",
    "subscriptions": "SELECT, INSERT, UPDATE",
    "workers": "SELECT, INSERT, UPDATE, DELETE",
    "schedules": "SELECT, INSERT, UPDATE",
}


@dataclass(frozen=True)
class Roles:
    """The names of the three roles; siblings, none of them a member of another.

    Attributes:
        owner: Owns the tables and the functions, and so migrates them.
        publisher: May insert events, and read all of their columns but the payload. Sees no other table.
        worker: May read and write the rows of all tables, and may change none of the tables.

    Raises:
        ConfigurationError: If a name cannot be that of a role, or two are the same.
    """

    owner: str = "pgebus_owner"
    publisher: str = "pgebus_publisher"
    worker: str = "pgebus_worker"

    def __post_init__(self) -> None:
        names = [getattr(self, field.name) for field in fields(self)]
        for name in names:
            _check_role(name)
        if len(set(names)) < len(names):
            raise ConfigurationError(f"The three roles must differ, and they are {', '.join(map(repr, names))}.")


def _check_role(name: object) -> None:
    shown = repr(name[:80]) if isinstance(name, str) else f"of type {type(name).__name__}"
    if not isinstance(name, str) or not name.isprintable() or "$pgebus$" in name:
        raise ConfigurationError(f"Role {shown} is no text that can name a role.")
    if not 1 <= len(name.encode()) <= MAX_IDENTIFIER_BYTES:
        raise ConfigurationError(f"Role {shown} must have 1 to {MAX_IDENTIFIER_BYTES} bytes in UTF-8.")
    if name in ("public", "none") or name.startswith("pg_"):
        raise ConfigurationError(f"Role {shown}: PostgreSQL keeps this name to itself.")


def role_statements(roles: Roles | None = None, *, schema: str = "pgebus") -> list[str]:
    """Return the SQL that makes *roles* and gives them their rights: for one transaction, in this order.

    Running it again takes back what was granted to the publisher, the worker and PUBLIC meanwhile. It has to be run
    again when columns were added to `events`, or tables by a migration.

    Args:
        roles: Their names.
        schema: That of the tables.

    Raises:
        InvalidSchemaError: If *schema* cannot be one.
    """
    roles = roles or Roles()
    s = quote_identifier(check_schema(schema))
    publisher, worker = quote_identifier(roles.publisher), quote_identifier(roles.worker)
    ours = ", ".join(f"{s}.{name}" for name in _WORKER)
    return [
        # Whoever runs this is mostly a superuser: nobody may lead him to operators and functions of his own.
        "SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), "
        f"pg_catalog.set_config('lock_timeout', '{_LOCK_TIMEOUT}', true)",
        *(_create(name) for name in (roles.owner, roles.publisher, roles.worker)),
        _refuse_relatives(roles),
        _own(roles.owner, schema),
        _own_versions(roles.owner, schema),
        *([f"REVOKE ALL ON SCHEMA {s} FROM PUBLIC"] if schema != "public" else []),
        f"REVOKE ALL ON SCHEMA {s} FROM {publisher}, {worker}",
        f"REVOKE ALL ON TABLE {ours} FROM PUBLIC, {publisher}, {worker}",
        f"REVOKE ALL ON FUNCTION {', '.join(f'{s}.{name}' for name in _FUNCTIONS)} FROM {publisher}, {worker}",
        f"GRANT USAGE ON SCHEMA {s} TO {publisher}, {worker}",
        f"GRANT INSERT ON TABLE {s}.events TO {publisher}",
        *(f"GRANT {rights} ON TABLE {s}.{name} TO {worker}" for name, rights in _WORKER.items()),
        f"GRANT EXECUTE ON FUNCTION {s}.complete, {s}.schema_version TO {worker}",
        _grant_columns(roles, schema),
    ]


async def grant_roles(
    session: AsyncSession | AsyncConnection, roles: Roles | None = None, *, schema: str = "pgebus"
) -> None:
    """Make the three roles and give them their rights; commits nothing.

    It needs a superuser, or a role that may create roles and owns the tables, or is a member of their owner.

    Args:
        session: A session or a connection in the database of the tables.
        roles: Their names.
        schema: That of the tables.

    Raises:
        ConfigurationError, InvalidSchemaError: If a name cannot be used; nothing was sent.
        sqlalchemy.exc.DBAPIError: If PostgreSQL refuses it: for want of rights, or of the tables, or because one of
            the roles is a superuser or a member of another.
    """
    connection = await session.connection() if isinstance(session, AsyncSession) else session
    await connection.run_sync(_run, role_statements(roles, schema=schema))


def _run(connection: Connection, statements: list[str]) -> None:
    kept = ("search_path", "lock_timeout")
    before = [connection.exec_driver_sql(f"SELECT pg_catalog.current_setting('{name}')").scalar_one() for name in kept]
    for statement in statements:
        connection.exec_driver_sql(statement)
    for name, value in zip(kept, before, strict=True):
        connection.exec_driver_sql(f"SELECT pg_catalog.set_config('{name}', {quote_literal(value)}, true)")


def _do(body: str, declare: str = "") -> str:
    return f"DO $pgebus${f' DECLARE {declare};' if declare else ''} BEGIN\n{body}\nEND $pgebus$"


def _create(name: str) -> str:
    return _do(
        f"""  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {quote_literal(name)}) THEN
    CREATE ROLE {quote_identifier(name)} NOLOGIN;
  END IF;"""
    )


def _refuse_relatives(roles: Roles) -> str:
    owner, publisher, worker = (quote_literal(name) for name in (roles.owner, roles.publisher, roles.worker))
    return _do(
        f"""  FOR item IN SELECT a.rolname AS one, a.rolsuper, b.rolname AS other
    FROM pg_catalog.pg_roles a, pg_catalog.pg_roles b
    WHERE a.rolname IN ({publisher}, {worker}) AND b.rolname IN ({owner}, {publisher}, {worker}) AND a.oid <> b.oid
      AND pg_catalog.pg_has_role(a.oid, b.oid, 'MEMBER')
  LOOP
    IF item.rolsuper THEN
      RAISE EXCEPTION USING MESSAGE = 'role ' || pg_catalog.quote_ident(item.one)
        || ' is a superuser, whom no right can be refused', HINT = 'Choose another role.';
    END IF;
    RAISE EXCEPTION USING MESSAGE = 'role ' || pg_catalog.quote_ident(item.one) || ' is a member of '
      || pg_catalog.quote_ident(item.other) || ', and would have its rights',
      HINT = 'REVOKE it, or choose other roles.';
  END LOOP;""",
        "item record",
    )


def _own(owner: str, schema: str) -> str:
    """Return what makes *owner* the owner of everything of ours, and the current user, if need be, a member of it."""
    role, of_schema = quote_identifier(owner), quote_literal(schema)
    names = ", ".join(quote_literal(name) for name in _WORKER)
    functions = ", ".join(quote_literal(name) for name in _FUNCTIONS)
    another = f"(SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname = {quote_literal(owner)})"
    return _do(
        f"""  IF NOT pg_catalog.pg_has_role({quote_literal(owner)}, 'USAGE') THEN
    GRANT {role} TO CURRENT_USER;
  END IF;
  GRANT USAGE, CREATE ON SCHEMA {quote_identifier(schema)} TO {role};
  FOR item IN SELECT 'TABLE ' || pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS what
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = {of_schema} AND c.relkind = 'r' AND c.relname IN ({names}) AND c.relowner <> {another}
    UNION ALL SELECT 'FUNCTION ' || p.oid::pg_catalog.regprocedure
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = {of_schema} AND p.proname IN ({functions}) AND p.proowner <> {another}
  LOOP
    EXECUTE 'ALTER ' || item.what || ' OWNER TO ' || {quote_literal(role)};
  END LOOP;""",
        "item record",
    )


def _own_versions(owner: str, schema: str) -> str:
    """Return what gives *owner* Alembic's table, unless rows of another history stand in it: then it is the host's."""
    table = f"{quote_identifier(schema)}.{_VERSION_TABLE}"
    return _do(
        f"""  IF pg_catalog.has_table_privilege(pg_catalog.to_regclass({quote_literal(table)}), 'SELECT')
    AND (SELECT c.relowner <> r.oid FROM pg_catalog.pg_class c, pg_catalog.pg_roles r
      WHERE c.oid = pg_catalog.to_regclass({quote_literal(table)}) AND r.rolname = {quote_literal(owner)})
  THEN
    SELECT pg_catalog.bool_and(pg_catalog.starts_with(v.version_num, 'pgebus_')) INTO ours FROM {table} v;
    IF ours THEN
      ALTER TABLE {table} OWNER TO {quote_identifier(owner)};
    END IF;
  END IF;""",
        "ours boolean",
    )


def _grant_columns(roles: Roles, schema: str) -> str:
    """Return what grants what depends on the table: the columns that an application has added, and the sequence."""
    events = quote_literal(f"{quote_identifier(schema)}.events")
    publisher, worker = quote_identifier(roles.publisher), quote_identifier(roles.worker)
    return _do(
        f"""  sequence := pg_catalog.pg_get_serial_sequence({events}, 'id');
  EXECUTE 'REVOKE ALL ON SEQUENCE ' || sequence || {quote_literal(f" FROM PUBLIC, {publisher}, {worker}")};
  EXECUTE 'GRANT USAGE ON SEQUENCE ' || sequence || {quote_literal(f" TO {publisher}")};
  EXECUTE 'GRANT USAGE, SELECT ON SEQUENCE ' || sequence || {quote_literal(f" TO {worker}")};
  SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO readable
  FROM pg_catalog.pg_attribute a
  WHERE a.attrelid = {events}::pg_catalog.regclass AND a.attnum > 0 AND NOT a.attisdropped
    AND a.attname <> 'payload';
  EXECUTE 'GRANT SELECT (' || readable || ') ON TABLE ' || {events} || {quote_literal(f" TO {publisher}")};""",
        "sequence text; readable text",
    )
