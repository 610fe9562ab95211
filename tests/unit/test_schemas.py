"""Our tables under another schema's name."""

from __future__ import annotations

import pytest

from pgebus import InvalidSchemaError, metadata, metadata_for


def test_the_schema_pgebus_has_the_metadata_itself() -> None:
    """A later subclass is seen there too."""
    assert metadata_for("pgebus") is metadata


def test_another_schema_has_the_same_tables_with_the_same_names_of_everything() -> None:
    copied = metadata_for("second")
    assert copied.schema is None
    assert sorted(copied.tables) == sorted(each.replace("pgebus.", "second.", 1) for each in metadata.tables)
    for table in metadata.tables.values():
        copy = copied.tables[f"second.{table.name}"]
        assert sorted(copy.columns.keys()) == sorted(table.columns.keys())
        assert {each.name for each in copy.indexes} == {each.name for each in table.indexes}
        assert {each.name for each in copy.constraints} == {each.name for each in table.constraints}
    (key,) = copied.tables["second.subscriptions"].foreign_key_constraints
    assert key.referred_table is copied.tables["second.consumer_groups"]


@pytest.mark.parametrize("schema", ["", "é" * 32, "pg_mine", "tab\tbed", "a.b"])
def test_a_name_that_postgresql_would_cut_or_alembic_would_split_is_refused(schema: str) -> None:
    with pytest.raises(InvalidSchemaError):
        metadata_for(schema)
