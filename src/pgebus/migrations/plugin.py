"""What autogenerate does with our tables in an application's own Alembic environment.

It compares no table itself: it says in which schemas Alembic looks, takes back what Alembic would do to tables
that are none of the application's, and keeps the application's revisions out of our folder. `_pgebus_alembic`
calls it.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from alembic import util
from alembic.operations import ops
from alembic.script import Script, ScriptDirectory

from pgebus.migrations.place import VERSION_TABLE
from pgebus.models import metadata
from pgebus.names import quote_identifier

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

_OURS: Final = frozenset(table.name for table in metadata.tables.values())
_VERSIONS: Final = Path(__file__).resolve().with_name("versions")

# Not schema_version() alone: an application may well have a function of that name.
_SCHEMAS: Final = sa.text("""
SELECT n.nspname FROM pg_catalog.pg_namespace n
WHERE EXISTS (SELECT FROM pg_catalog.pg_proc p
              WHERE p.pronamespace = n.oid AND p.proname = 'schema_version' AND p.pronargs = 0)
  AND EXISTS (SELECT FROM pg_catalog.pg_proc p
              WHERE p.pronamespace = n.oid AND p.proname = 'fan_out' AND p.pronargs = 0)
  AND EXISTS (SELECT FROM pg_catalog.pg_class c
              WHERE c.relnamespace = n.oid AND c.relname = 'deliveries' AND c.relkind IN ('r', 'p'))
""")

_SCHEMA_OF: Final = sa.text("""
SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(:name)
""").bindparams(sa.bindparam("name", type_=sa.Text))


def choose_schemas(context: AutogenContext, schemas: set[str | None]) -> None:
    """Make Alembic look into our schemas when the application's metadata hold our tables, else not."""
    wanted = _wanted(context)
    schemas |= wanted
    used = {_or_default(context, table.schema) for table in context.sorted_tables}
    schemas -= _present(context) - used


def leave_ours_alone(context: AutogenContext, operations: ops.UpgradeOps) -> None:
    """Take back every change to a table in a schema of ours that the application's metadata do not hold."""
    known = {(_or_default(context, table.schema), table.name) for table in context.sorted_tables}
    wanted = _wanted(context)
    present = _present(context)
    # Nobody asked for these schemas but we: what else is in them is not the application's.
    looked_into_by_us = wanted - {None} if not context.opts.get("include_schemas") else set()

    def is_none_of_theirs(operation: ops.MigrateOperation) -> bool:
        if not isinstance(operation, (ops.DropTableOp, ops.ModifyTableOps)):
            return False
        schema = _or_default(context, operation.schema)
        if (schema, operation.table_name) in known:
            return False
        if schema is None and operation.table_name in _OURS | {VERSION_TABLE}:
            # With a schema of ours in the search_path, the default schema seems to hold our tables.
            schema = _found_in(context, operation.table_name)
        is_ours = schema in present and operation.table_name in (_OURS | {VERSION_TABLE})
        return is_ours or schema in looked_into_by_us

    kept = [operation for operation in operations.ops if not is_none_of_theirs(operation)]
    operations.ops[:] = [operation for operation in kept if not _only_names_the_default_schema(context, operation)]


def place_revision(context: AutogenContext, operations: ops.UpgradeOps) -> None:
    """Keep the revision that is being made out of our folder, and behind ours when it changes our tables.

    An application's first revision would be written where the only head is: among our files, on top of our head.
    """
    making = context.opts.get("revision_context")
    scripts = getattr(making, "script_directory", None)
    revisions = getattr(making, "generated_revisions", None)
    if not isinstance(scripts, ScriptDirectory) or not revisions or Path(scripts.dir).resolve() == _VERSIONS.parent:
        return
    script = revisions[-1]
    heads = _revisions(scripts, script.head or "head")
    own = [place for place in _locations(scripts) if place.resolve() != _VERSIONS]
    if script.version_path is None and own and heads and _is_ours(heads[0]):
        script.version_path = str(own[0])
        if script.head in (None, "head"):
            script.head = "base"
            heads = []
    if script.depends_on is None and _changes_ours(context, operations):
        behind = [each for head in heads for each in scripts.iterate_revisions(head.revision, "base")]
        newest = next((each for each in scripts.walk_revisions() if _is_ours(each)), None)
        if newest is not None and not any(_is_ours(each) for each in behind):
            script.depends_on = newest.revision


def _only_names_the_default_schema(context: AutogenContext, operation: ops.MigrateOperation) -> bool:
    """Take back that a foreign key of ours goes and comes again as it was; return whether that was all.

    Alembic compares the default schema, which has no name in what it reads, with the name that our metadata hold.
    """
    if not isinstance(operation, ops.ModifyTableOps) or operation.table_name not in _OURS:
        return False
    gone, made = [], []
    for each in operation.ops:
        reverse = each.reverse() if isinstance(each, ops.DropConstraintOp) else None
        if isinstance(reverse, ops.CreateForeignKeyOp):
            gone.append((each, _meaning(context, reverse)))
        elif isinstance(each, ops.CreateForeignKeyOp):
            made.append((each, _meaning(context, each)))
    equal = {id(each) for one, other in product(gone, made) if one[1] == other[1] for each in (one[0], other[0])}
    operation.ops[:] = [each for each in operation.ops if id(each) not in equal]
    return not operation.ops


def _meaning(context: AutogenContext, key: ops.CreateForeignKeyOp) -> dict[str, object]:
    options = {name: value for name, value in key.kw.items() if value is not None}
    for schema in ("source_schema", "referent_schema"):
        options[schema] = _or_default(context, options.get(schema))
    return {
        "name": key.constraint_name,
        "tables": (key.source_table, key.referent_table),
        "columns": (list(key.local_cols), list(key.remote_cols)),
        **options,
    }


def _changes_ours(context: AutogenContext, operations: ops.UpgradeOps) -> bool:
    """Tell whether a revision needs our tables: it changes one of them, or refers to one."""
    wanted = _wanted(context)
    for operation in operations.ops:
        if isinstance(operation, ops.ModifyTableOps):
            if operation.table_name in _OURS and _or_default(context, operation.schema) in wanted:
                return True
            parts = list(operation.ops)
        else:
            parts = [operation]
        if any(_refers_to_ours(context, wanted, part) for part in parts):
            return True
    return False


def _refers_to_ours(context: AutogenContext, wanted: set[str | None], operation: ops.MigrateOperation) -> bool:
    """Tell whether an operation makes a foreign key to a table of ours."""
    if isinstance(operation, ops.CreateForeignKeyOp):
        schema = operation.kw.get("referent_schema")
        return operation.referent_table in _OURS and _or_default(context, schema) in wanted
    if isinstance(operation, ops.CreateTableOp):
        keys = operation.to_table().foreign_keys
    elif isinstance(operation, ops.AddColumnOp):
        keys = operation.column.foreign_keys
    else:
        return False
    for key in keys:
        schema, _, table = key._get_colspec().rpartition(".")[0].rpartition(".")
        if table in _OURS and _or_default(context, schema or None) in wanted:
            return True
    return False


def _wanted(context: AutogenContext) -> set[str | None]:
    """Return the schemas in which the application's metadata hold our tables; None is the default one."""
    tables: dict[str | None, set[str]] = {}
    for table in context.sorted_tables:
        tables.setdefault(_or_default(context, table.schema), set()).add(table.name)
    return {schema for schema, names in tables.items() if names >= _OURS}


def _present(context: AutogenContext) -> set[str | None]:
    """Return the schemas of the database in which our tables are, whoever has made them."""
    if context.connection is None:
        return set()
    return {_or_default(context, name) for name in context.connection.scalars(_SCHEMAS)}


def _found_in(context: AutogenContext, table: str) -> str | None:
    """Return the schema of a table that is named without one; None for the default schema."""
    if context.connection is None:
        return None
    return _or_default(context, context.connection.scalar(_SCHEMA_OF, {"name": quote_identifier(table)}))


def _or_default(context: AutogenContext, schema: str | None) -> str | None:
    """Return *schema* as Alembic names it: the default one is None."""
    return None if schema == context.migration_context.dialect.default_schema_name else schema


def _revisions(scripts: ScriptDirectory, names: str | list[str] | tuple[str, ...]) -> list[Script]:
    try:
        found = scripts.get_revisions(names)
    except util.CommandError:  # Alembic says it better, a moment later
        return []
    return [each for each in found if each is not None]  # type: ignore[redundant-expr] # None is the base


def _locations(scripts: ScriptDirectory) -> list[Path]:
    return [util.coerce_resource_to_filename(each) for each in scripts.version_locations]


def _is_ours(revision: Script) -> bool:
    return Path(revision.path).parent.resolve() == _VERSIONS
