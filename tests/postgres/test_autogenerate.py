"""Autogenerate in an application's environment: its own changes, all of them, and nothing of ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Server
from tests.postgres.hosts import HEAD, MODELS, SUBCLASS, CommandError, Host, Template
from tests.schema_names import ODD, schemas_in
from tests.system.bus import Sql

from pgebus.migrations import upgrade
from pgebus.names import quote_identifier
from pgebus.settings import DatabaseSettings

# Alembic's operations would take it for two names.
WITHOUT_A_DOT = [name.replace(".", "") for name in ODD if name != "public"]
BOTH = "[models.Base.metadata, models.pgebus.metadata]"


@pytest.fixture
def host(tmp_path: Path, empty_database: DatabaseSettings) -> Iterator[Host]:
    with Host(tmp_path, "generic", empty_database) as host:
        yield host


@pytest.fixture
async def sql(server: Server, empty_database: DatabaseSettings) -> Any:
    connection = await server.connect(empty_database.sqlalchemy_url().database)
    yield connection
    await connection.close()


def is_clean(host: Host) -> bool:
    return "No new upgrade operations" in host.alembic("check")


def differences(host: Host) -> str:
    with pytest.raises(CommandError, match="New upgrade operations detected") as failed:
        host.alembic("check")
    (operations,) = re.findall(r"^FAILED: .*$", str(failed.value), re.MULTILINE)
    return str(operations)


def operations(revision: Path) -> list[str]:
    """The names of what the revision's upgrade() does, and on which table."""
    body = revision.read_text(encoding="utf-8").partition("def upgrade()")[2].partition("def downgrade()")[0]
    return re.findall(r"^    op\.(\w+)\(", body, re.MULTILINE)


async def test_with_our_metadata_a_host_sees_what_its_subclasses_add(host: Host, sql: Sql) -> None:
    """Nothing is configured but `target_metadata`."""
    host.env(BOTH)
    host.alembic("upgrade", "pgebus@head")
    assert operations(host.revise("orders", "--autogenerate")) == ["create_table"]
    host.alembic("upgrade", "heads")
    assert is_clean(host)

    host.models(MODELS + SUBCLASS)
    (head,) = [each for each in host.heads() if not each.startswith("pgebus")]
    made = host.revise("order_id", "--autogenerate", "--head", head)
    assert operations(made) == ["add_column", "create_index", "create_foreign_key"]
    source = made.read_text(encoding="utf-8")
    assert "op.create_foreign_key(op.f('fk_events_order_id'), 'events', 'orders'" in source
    # It cannot run before our tables are there, and it was not merged with ours.
    assert re.search(rf"^depends_on: .* = '{HEAD}'$", source, re.MULTILINE)
    host.alembic("upgrade", "heads")
    assert is_clean(host)

    # What is in our schema and nobody's model is not ours to drop; what is missing is seen.
    await sql.execute("CREATE TABLE pgebus.of_somebody_else (id int)")
    assert is_clean(host)
    await sql.execute("DROP INDEX pgebus.ix_deliveries_dead; ALTER TABLE pgebus.workers ADD surplus int")
    found = differences(host)
    assert "ix_deliveries_dead" in found
    assert "surplus" in found

    # From scratch, in one go.
    await sql.execute("ALTER TABLE pgebus.workers DROP surplus; DROP TABLE pgebus.of_somebody_else")
    await sql.execute(
        "CREATE INDEX ix_deliveries_dead ON pgebus.deliveries (channel, consumer_group, finished_at)"
        " WHERE status = 'dead'"
    )
    host.alembic("downgrade", "base")
    assert await sql.fetchval("SELECT to_regnamespace('pgebus')") is None
    host.alembic("upgrade", "heads")
    assert is_clean(host)


async def test_without_our_metadata_a_host_never_hears_of_us(
    host: Host, sql: Sql, empty_database: DatabaseSettings
) -> None:
    """In whatever schemas we are, shared with the host's tables or not, and whoever has made our tables."""
    for schema in ("public", "pgebus", "second"):
        settings = empty_database.model_copy(update={"schema_name": schema})
        await asyncio.to_thread(upgrade, settings)
    assert await sql.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'deliveries'") == 3
    assert operations(host.revise("orders", "--autogenerate")) == ["create_table"]
    host.alembic("upgrade", "heads")
    for options in ({}, {"include_schemas": True}):
        host.env("models.Base.metadata", **options)
        assert is_clean(host)

    # The guard is no blindfold: what is the host's is seen, also in a schema that it shares with us.
    await sql.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.stock (id int); CREATE TABLE leftover (id int)")
    found = differences(host)
    assert "leftover" in found
    assert "stock" in found
    assert "deliveries" not in found


@pytest.mark.parametrize(
    "schema", ["second", "public", *(pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_A_DOT)]
)
async def test_in_another_schema_a_host_asks_for_our_metadata_by_name(host: Host, schema: str, sql: Sql) -> None:
    host.models(MODELS + SUBCLASS)
    host.env(f"[models.Base.metadata, models.pgebus.metadata_for({schema!r})]")
    host.alembic("-x", f"pgebus_schema={schema}", "upgrade", "pgebus@head")
    made = host.revise("first", "--autogenerate")
    assert operations(made) == ["create_table", "add_column", "create_index", "create_foreign_key"]
    assert f"source_schema={schema!r}" in made.read_text(encoding="utf-8")
    host.alembic("-x", f"pgebus_schema={schema}", "upgrade", "heads")
    assert is_clean(host)

    subscriptions = f"{quote_identifier(schema)}.subscriptions"
    await sql.execute(
        f"ALTER TABLE {subscriptions} DROP CONSTRAINT fk_subscriptions_group, ADD CONSTRAINT fk_subscriptions_group"
        f" FOREIGN KEY (channel, consumer_group) REFERENCES {quote_identifier(schema)}.consumer_groups"
    )
    found = differences(host)
    assert "remove_fk" in found
    assert "add_fk" in found
    await sql.execute(f"ALTER TABLE {subscriptions} DROP CONSTRAINT fk_subscriptions_group")
    found = differences(host)
    assert "remove_fk" not in found
    assert "add_fk" in found


async def test_a_host_sees_several_schemas_apart(host: Host, sql: Sql, empty_database: DatabaseSettings) -> None:
    """One for each tenant, and one that somebody else uses in the same database."""
    tenants = ("first", ODD[0])
    host.alembic("-x", f"pgebus_schema={tenants[0]}", "upgrade", "pgebus@head")
    for schema in (tenants[1], "of somebody else"):
        await asyncio.to_thread(upgrade, empty_database.model_copy(update={"schema_name": schema}))
    copies = ", ".join(f"models.pgebus.metadata_for({schema!r})" for schema in tenants)
    host.env(f"[models.Base.metadata, {copies}]")
    assert operations(host.revise("orders", "--autogenerate")) == ["create_table"]
    host.alembic("upgrade", "heads")
    await sql.execute('DROP INDEX "of somebody else".ix_deliveries_due')
    assert is_clean(host)
    await sql.execute(f"ALTER TABLE {quote_identifier(ODD[0])}.workers ADD surplus int")
    found = differences(host)
    assert found.count("remove_column") == 1
    assert ODD[0].partition("'")[0] in found  # Alembic writes what the terminal can't show as question marks


@pytest.mark.parametrize("template", ["generic", "pyproject"])
async def test_a_host_names_the_schema_in_its_file(
    template: Template, tmp_path: Path, sql: Sql, empty_database: DatabaseSettings
) -> None:
    """What else names one: the command line goes before it, the environment behind it."""
    with Host(tmp_path, template, empty_database) as host:
        host.variables["PGEBUS_DATABASE__SCHEMA"] = "of the environment"
        host.alembic("upgrade", "pgebus@head")
        host.alembic("downgrade", "pgebus@base")
        host.option("pgebus_schema", ODD[0])
        host.env(f"[models.Base.metadata, models.pgebus.metadata_for({ODD[0]!r})]")
        host.alembic("upgrade", "pgebus@head")
        assert await schemas_in(sql) == [ODD[0], "public"]
        assert operations(host.revise("orders", "--autogenerate")) == ["create_table"]
        host.alembic("upgrade", "heads")
        assert is_clean(host)
        host.alembic("downgrade", "base")
        host.alembic("-x", "pgebus_schema=a=b", "upgrade", "pgebus@head")
        assert await schemas_in(sql) == ["a=b", "public"]


@pytest.mark.parametrize("own", [False, True], ids=["", "with a table of its own called events"])
async def test_a_schema_of_ours_in_the_search_path_is_no_schema_of_the_hosts(
    host: Host, sql: Sql, empty_database: DatabaseSettings, own: bool
) -> None:
    """There, reflection finds our tables in the default schema too."""
    if own:
        host.models(MODELS + OWN_EVENTS)
    host.alembic("upgrade", "pgebus@head")
    host.revise("own", "--autogenerate")
    host.alembic("upgrade", "heads")
    url = empty_database.sqlalchemy_url()
    await sql.execute(
        f"ALTER ROLE {quote_identifier(url.username or '')} IN DATABASE {quote_identifier(url.database or '')}"
        " SET search_path = public, pgebus"
    )
    for target in ("models.Base.metadata", BOTH):
        for options in ({}, {"include_schemas": True}):
            host.env(target, **options)
            assert is_clean(host), (target, options)
    await sql.execute("CREATE TABLE leftover (id int)")
    assert "leftover" in differences(host)


OWN_EVENTS = """

class Happening(Base):
    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
"""

REFERRING = """

class Seen(Base):
    __tablename__ = "seen"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[int] = mapped_column(ForeignKey(pgebus.Event.__table__.c.id))
"""


async def test_a_table_of_the_hosts_that_refers_to_ours_comes_after_it(host: Host, sql: Sql) -> None:
    """And goes before it."""
    host.models(MODELS + REFERRING)
    host.env(BOTH)
    host.alembic("upgrade", "pgebus@head")
    made = host.revise("seen", "--autogenerate")
    assert re.search(rf"^depends_on: .* = '{HEAD}'$", made.read_text(encoding="utf-8"), re.MULTILINE)
    host.alembic("upgrade", "heads")
    assert is_clean(host)
    host.alembic("downgrade", "pgebus@base")
    assert await sql.fetchval("SELECT to_regclass('seen')") is None
    host.alembic("upgrade", made.stem.partition("_")[0])
    assert await sql.fetchval("SELECT to_regclass('seen')") is not None
