"""Names of schemas against the server: quoting, and SQL that is applied by somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url
from tests.conftest import Server
from tests.postgres.plain_sql import Sql
from tests.postgres.test_migrations import facts, in_schema, own_config
from tests.schema_names import MORE, ODD, clear, schemas_in

from pgebus.errors import InvalidSchemaError
from pgebus.migrations import downgrade, upgrade
from pgebus.names import check_schema, quote_identifier
from pgebus.settings import DatabaseSettings

NAMES = [*ODD, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]

# Half of them from what has a meaning to somebody on the way.
names = st.text(
    st.sampled_from("\"'%:;\\[]{}$.-_ ()sSaAä\u017f漢0\t\n") | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=64,
)


@pytest.fixture(scope="module")
def plain(server: Server) -> Iterator[psycopg.Connection]:
    """A plain connection, to ask the server; nothing in it commits."""
    url = server.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        yield connection
        connection.rollback()


def written_by_sqlalchemy(name: str) -> str:
    return make_url("postgresql+asyncpg://").get_dialect()().identifier_preparer.quote_schema(name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(name=names)
@example("\u017f")
@example("public")
@example("x" * 61 + "ä")
def test_a_name_that_is_accepted_is_what_the_server_understands(plain: psycopg.Connection, name: str) -> None:
    """As we quote it, and as SQLAlchemy does for the sessions of an application."""
    try:
        check_schema(name)
    except InvalidSchemaError:
        assume(False)
    quoted = quote_identifier(name)
    by_server, ours, theirs = plain.execute(
        "SELECT quote_ident(%s), parse_ident(%s), parse_ident(%s)",
        (name, quoted, written_by_sqlalchemy(name)),
    ).fetchone() or (None, None, None)
    assert by_server in (name, quoted)
    assert ours == theirs == [name]
    with plain.transaction(force_rollback=True):
        before = plain.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (name,)).fetchone()
        if before == (0,):  # 'public' is there
            plain.execute(f"CREATE SCHEMA {quoted}".encode())
        assert plain.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (name,)).fetchone() == (1,)


def test_a_word_of_sql_is_a_schema_unless_sqlalchemy_forgets_to_quote_it(plain: psycopg.Connection) -> None:
    """A later PostgreSQL may have more of them, a later SQLAlchemy may know them."""
    forgotten, refused = set(), set()
    for (word,) in plain.execute("SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')").fetchall():
        try:
            check_schema(word)
        except InvalidSchemaError:
            refused.add(word)
        written = written_by_sqlalchemy(word)
        try:
            with plain.transaction(force_rollback=True):
                plain.execute(f'CREATE SCHEMA "{word}"; CREATE TABLE {written}.a ()'.encode())
        except psycopg.errors.SyntaxError:
            forgotten.add(word)
    assert forgotten <= refused
    assert {"lateral", "tablesample"} <= refused


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[DatabaseSettings]:
    """A database for all tests of this module; each leaves it as it was."""
    name = "pgebus_test_schema_names"
    asyncio.run(server.execute(f"CREATE DATABASE {name}"))
    yield server.settings(name)
    asyncio.run(server.execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def sql(server: Server, shared: DatabaseSettings) -> object:
    connection = await server.connect(shared.sqlalchemy_url().database)
    yield connection
    await clear(connection)
    await connection.close()


HOST = """
from alembic import context
context.configure(url="postgresql+psycopg://", literal_binds=True, version_table_schema="v")
with context.begin_transaction():
    context.run_migrations()
"""


@pytest.mark.parametrize("schema", NAMES)
async def test_sql_that_was_written_down_makes_the_schema_and_drops_it(
    schema: str, shared: DatabaseSettings, sql: Sql, tmp_path: Path
) -> None:
    """From our own environment, and from one of a host on a driver for which per cent signs are doubled."""
    (tmp_path / "env.py").write_text(HOST)
    (tmp_path / "versions").mkdir()
    written = StringIO()
    host = Config(output_buffer=written)
    for option, value in (
        ("script_location", str(tmp_path)),
        ("path_separator", "newline"),
        ("version_locations", f"{tmp_path}/versions\npgebus:migrations/versions"),
    ):
        host.set_main_option(option, value)
    host.attributes["pgebus_schema"] = schema
    await sql.execute("DROP SCHEMA IF EXISTS v CASCADE; CREATE SCHEMA v")
    odd = in_schema(shared, schema)
    await asyncio.to_thread(upgrade, odd)
    expected = await facts(sql, schema)
    await asyncio.to_thread(downgrade, odd)
    for config in (own_config(odd, output_buffer=written), host):
        for direction, revisions in ((command.upgrade, "pgebus@head"), (command.downgrade, "pgebus@head:base")):
            written.seek(0)
            written.truncate()
            await asyncio.to_thread(direction, config, revisions, sql=True)
            await sql.execute(written.getvalue())
            if direction is command.upgrade:
                assert await facts(sql, schema) == expected
        assert await schemas_in(sql) == ["public", "v"]


@pytest.mark.parametrize("schema", NAMES)
async def test_autogenerate_in_our_own_environment_is_clean(schema: str, shared: DatabaseSettings, sql: Sql) -> None:
    odd = in_schema(shared, schema)
    await asyncio.to_thread(upgrade, odd)
    await asyncio.to_thread(command.check, own_config(odd, stdout=StringIO()))
    await asyncio.to_thread(downgrade, odd)
