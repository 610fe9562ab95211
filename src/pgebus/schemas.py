"""Our tables under the name of the schema that they are in, for what does not go through SQLAlchemy's translation.

It makes no schema and reads none; the models themselves stay where they are.
"""

from __future__ import annotations

from sqlalchemy import Column, ForeignKeyConstraint, MetaData, Table

from pgebus.errors import InvalidSchemaError
from pgebus.models import metadata
from pgebus.names import check_schema

__all__ = ["metadata_for"]


def metadata_for(schema: str) -> MetaData:
    """Return our tables, with the columns that subclasses of `Event` have added so far, as those of *schema*.

    For `target_metadata` in the `env.py` of an application whose tables of ours are in another schema than
    `pgebus`: autogenerate compares names as they are, and `schema_translate_map` does not reach it. Import the
    subclasses first: the copy does not follow later changes. For the schema `pgebus` it is `pgebus.metadata`.

    Args:
        schema: The name, unquoted.

    Raises:
        InvalidSchemaError: If PostgreSQL would cut or refuse the name, or it holds a dot: Alembic's operations would
            take it for two names.
    """
    if "." in check_schema(schema):
        raise InvalidSchemaError(
            f"Schema {schema!r}: Alembic's operations take a dot for the end of a name, and would change tables in "
            "another schema or none. Choose another name, or write the changes to our tables in SQL.",
            value=schema,
        )
    return tables_in(schema)


def tables_in(schema: str) -> MetaData:
    """Return the same for comparing alone, where a dot does no harm.

    Raises:
        InvalidSchemaError: If PostgreSQL would cut or refuse the name.
    """
    if check_schema(schema) == metadata.schema:
        return metadata
    # Without a default schema: the application's tables that ours refer to would move along.
    renamed = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        _refer_to_the_same_tables(table, _copied(table, renamed, schema))
    return renamed


def _copied(table: Table, into: MetaData, schema: str) -> Table:
    def moved(_table: Table, _to: str | None, _constraint: ForeignKeyConstraint, referred: str | None) -> str | None:
        return schema if referred == metadata.schema else referred

    return table.to_metadata(into, schema=schema, referred_schema_fn=moved)


def _refer_to_the_same_tables(table: Table, copy: Table) -> None:
    """Point the foreign keys of *copy* at the application's columns: `to_metadata` kept no more than their names."""
    for original in table.foreign_key_constraints:
        if original.referred_table.metadata is metadata:
            continue
        named_only = next(each for each in copy.foreign_key_constraints if each.column_keys == original.column_keys)
        for element in named_only.elements:
            copy.foreign_keys.discard(element)
            element.parent.foreign_keys.discard(element)
        copy.constraints.discard(named_only)
        columns: list[Column[object]] = [element.column for element in original.elements]
        copy.append_constraint(
            ForeignKeyConstraint(
                original.column_keys,
                columns,
                name=original.name,
                onupdate=original.onupdate,
                ondelete=original.ondelete,
                deferrable=original.deferrable,
                initially=original.initially,
                match=original.match,
            )
        )
