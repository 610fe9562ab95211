"""The three roles: what each may do, and that it may do nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from tests import apart
from tests.conftest import Server
from tests.postgres.units import KINDS, Kind, Units
from tests.roles import Cast, casting
from tests.system.bus import Sql

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventPublisher,
    publish_event,
    publish_events,
)
from pgebus.drift import find_drift
from pgebus.names import quote_identifier
from pgebus.security import _FUNCTIONS, _WORKER, Roles, grant_roles, role_statements

CASES = Path(__file__).with_name("security_cases.py")


@pytest.fixture
async def granted(sql: Sql, database: DatabaseSettings) -> AsyncIterator[Cast]:
    async with casting(sql, database) as cast:
        await cast.grant()
        yield cast


async def test_the_statements_name_everything_that_is_ours(sql: Sql) -> None:
    """A table or a function of a later release would go without its rights."""
    tables = await sql.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'pgebus'::regnamespace AND relkind = 'r'"
    )
    functions = await sql.fetch("SELECT proname FROM pg_proc WHERE pronamespace = 'pgebus'::regnamespace")
    assert {row[0] for row in tables} - {"alembic_version"} == set(_WORKER)
    assert {row[0] for row in functions} == set(_FUNCTIONS)


# What they must not do

EVENT = "(type) VALUES ('a')"
COMPLETE = "SET pgebus.tx = 'm'; SELECT pgebus.complete(1, 'default', 1, 1, 'm')"
DDL = [
    "CREATE TABLE pgebus.more ()",
    "CREATE FUNCTION pgebus.more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 9'",
    "ALTER TABLE pgebus.events ADD COLUMN more int",
    "ALTER TABLE pgebus.events DISABLE TRIGGER fan_out",
    "ALTER TABLE pgebus.events DISABLE TRIGGER ALL",
    "ALTER TABLE pgebus.events DISABLE ROW LEVEL SECURITY",
    "ALTER TABLE pgebus.deliveries OWNER TO CURRENT_USER",
    "DROP TRIGGER fan_out ON pgebus.events",
    "DROP TABLE pgebus.events",
    "DROP FUNCTION pgebus.forget CASCADE",
    "DROP SCHEMA pgebus CASCADE",
    "CREATE INDEX ON pgebus.events (key)",
    "CREATE TRIGGER more AFTER INSERT ON pgebus.events EXECUTE FUNCTION pgebus.fan_out()",
    "CREATE RULE more AS ON INSERT TO pgebus.events DO NOTHING",
    "CREATE POLICY more ON pgebus.events USING (true)",
    "CREATE TEMP TABLE mine (id bigint);"
    " CREATE TRIGGER more AFTER INSERT ON mine FOR EACH STATEMENT EXECUTE FUNCTION pgebus.fan_out()",
    "CREATE TEMP TABLE mine (id bigint);"
    " CREATE TRIGGER more AFTER DELETE ON mine FOR EACH STATEMENT EXECUTE FUNCTION pgebus.forget()",
    "CREATE TEMP TABLE mine (id bigint);"
    " CREATE TRIGGER more AFTER TRUNCATE ON mine FOR EACH STATEMENT EXECUTE FUNCTION pgebus.forget_all()",
    "SET session_replication_role = replica",
    "TRUNCATE pgebus.events",
    "TRUNCATE pgebus.deliveries",
    "TRUNCATE pgebus.workers",
    "TRUNCATE pgebus.consumer_groups CASCADE",
    "SELECT setval('pgebus.events_id_seq', 1)",
    "SELECT pgebus.fan_out()",
    "COMMENT ON TABLE pgebus.events IS 'mine'",
]
WORKER = [
    "UPDATE pgebus.events SET payload = '{}'",
    "UPDATE pgebus.events SET type = 'b'",
    "UPDATE pgebus.events SET key = 'k', run_at = now()",
    "DELETE FROM pgebus.consumer_groups",
    "DELETE FROM pgebus.subscriptions",
]
PUBLISHER = [
    "SELECT payload FROM pgebus.events",
    "SELECT * FROM pgebus.events",
    "SELECT count(*) FILTER (WHERE payload <> '{}') FROM pgebus.events",
    f"INSERT INTO pgebus.events {EVENT} RETURNING payload",
    "COPY pgebus.events TO STDOUT",
    "TABLE pgebus.events",
    "SELECT e::text FROM pgebus.events e",
    "UPDATE pgebus.events SET priority = 9",
    "UPDATE pgebus.events SET payload = '{}'",
    "SELECT id FROM pgebus.events FOR UPDATE",
    "INSERT INTO pgebus.events (type, dedup_key) VALUES ('a', 'k')"
    " ON CONFLICT (channel, dedup_key) WHERE dedup_key IS NOT NULL DO UPDATE SET type = 'b'",
    "DELETE FROM pgebus.events",
    *(
        f"{verb} pgebus.{table}{rest}"
        for table in ("deliveries", "workers", "subscriptions", "consumer_groups")
        for verb, rest in (
            ("SELECT FROM", ""),
            ("INSERT INTO", " DEFAULT VALUES"),
            ("UPDATE", " SET channel = 'c'"),
            ("DELETE FROM", ""),
            ("LOCK TABLE", " IN ACCESS SHARE MODE"),
        )
    ),
    COMPLETE,
    "SELECT * FROM pgebus.alembic_version",
    "SELECT last_value FROM pgebus.events_id_seq",
]


@pytest.mark.parametrize("who", ["publisher", "worker"])
async def test_what_a_role_must_not_do_is_refused(granted: Cast, sql: Sql, who: str) -> None:
    """Every verb on every object, each tried by itself."""
    name = quote_identifier(getattr(granted.roles, who))
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('secret')")
    before = await contents(sql)
    allowed = []
    for statement in DDL + (PUBLISHER if who == "publisher" else WORKER):
        transaction = sql.transaction()
        await transaction.start()
        await sql.execute(f"SET LOCAL ROLE {name}")
        try:
            await sql.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            pass
        else:
            allowed.append(statement)
        finally:
            await transaction.rollback()
    assert allowed == []
    assert await contents(sql) == before


async def contents(sql: Sql) -> list[Any]:
    return [await sql.fetch(f"SELECT t::text FROM pgebus.{table} t ORDER BY 1") for table in _WORKER]


async def test_nobody_else_may_do_anything(granted: Cast, sql: Sql) -> None:
    """A role that was given nothing, whatever PUBLIC had before."""
    await sql.execute("GRANT USAGE ON SCHEMA pgebus TO PUBLIC; GRANT SELECT ON ALL TABLES IN SCHEMA pgebus TO PUBLIC")
    await granted.grant()
    await sql.execute("CREATE ROLE pgebus_test_nobody")
    try:
        await sql.execute("SET ROLE pgebus_test_nobody")
        for table in _WORKER:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await sql.execute(f"SELECT FROM pgebus.{table}")
    finally:
        await sql.execute("RESET ROLE; DROP ROLE pgebus_test_nobody")


async def test_the_owner_owns_all_of_it_and_nothing_else_changes(granted: Cast, sql: Sql) -> None:
    owners = await sql.fetch(
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'pgebus'::regnamespace"
        " UNION SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'pgebus'::regnamespace"
    )
    assert [row[0] for row in owners] == [granted.roles.owner]
    assert await find_drift(granted.database) == []
    login = await granted.login(granted.roles.owner)
    assert login.sqlalchemy_url().username in granted.logins
    async with DatabaseSessionManager(login) as manager, manager.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE pgebus.events ADD COLUMN tenant_id int")
        await connection.exec_driver_sql("TRUNCATE pgebus.events")


@pytest.mark.parametrize("revisions", [["a1b2c3", "pgebus_0002"], ["a1b2c3"], []])
async def test_the_history_of_a_host_stays_its_own(sql: Sql, database: DatabaseSettings, revisions: list[str]) -> None:
    """In a schema that both share, the host's own migrations would be refused from now on."""
    before = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'pgebus.alembic_version'::regclass"
    was = await sql.fetchval(before)
    await sql.execute("DELETE FROM pgebus.alembic_version")
    await sql.executemany("INSERT INTO pgebus.alembic_version VALUES ($1)", [(each,) for each in revisions])
    async with casting(sql, database) as cast:
        await cast.grant()
        assert await sql.fetchval(before) == was
        assert await sql.fetchval(before.replace("alembic_version", "events")) == cast.roles.owner


async def test_tables_without_a_history_get_their_roles_as_well(sql: Sql, database: DatabaseSettings) -> None:
    await sql.execute("DROP TABLE pgebus.alembic_version")
    async with casting(sql, database) as cast:
        await cast.grant()


# Again, and what is refused


async def test_doing_it_again_takes_back_what_was_granted_meanwhile(granted: Cast, sql: Sql) -> None:
    """What is left over from an earlier release is how a publisher gets to complete what is not his."""
    publisher = quote_identifier(granted.roles.publisher)
    rights = await acls(sql)
    await sql.execute(
        f"GRANT ALL ON ALL TABLES IN SCHEMA pgebus TO {publisher}; GRANT CREATE ON SCHEMA pgebus TO {publisher};"
        f"GRANT UPDATE (payload) ON pgebus.events TO {publisher}; GRANT ALL ON SEQUENCE pgebus.events_id_seq TO PUBLIC;"
        f"GRANT EXECUTE ON FUNCTION pgebus.fan_out TO {publisher}"
    )
    assert await acls(sql) != rights
    await granted.grant()
    assert await acls(sql) == rights


async def acls(sql: Sql) -> set[tuple[Any, ...]]:
    rows = await sql.fetch(
        "SELECT o.name, o.part, a.grantee, a.privilege_type FROM ("
        " SELECT relname AS name, '' AS part, relacl AS acl FROM pg_class WHERE relnamespace = 'pgebus'::regnamespace"
        " UNION ALL SELECT c.relname, attname, attacl FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        "   WHERE c.relnamespace = 'pgebus'::regnamespace AND attacl IS NOT NULL"
        " UNION ALL SELECT nspname, '', nspacl FROM pg_namespace WHERE nspname = 'pgebus'"
        " UNION ALL SELECT proname, '', proacl FROM pg_proc WHERE pronamespace = 'pgebus'::regnamespace"
        ") o CROSS JOIN LATERAL aclexplode(o.acl) a"
    )
    return {tuple(row) for row in rows if row["name"] != "alembic_version"}


async def test_a_column_that_was_added_is_readable_the_next_time(granted: Cast, sql: Sql) -> None:
    await sql.execute('ALTER TABLE pgebus.events ADD COLUMN "Odd ""one" int')
    await granted.grant()
    readable = await sql.fetchval(
        "SELECT has_column_privilege($1, 'pgebus.events', 'Odd \"one', 'SELECT')", granted.roles.publisher
    )
    assert readable


@pytest.mark.parametrize(("member", "of"), [("publisher", "worker"), ("worker", "owner"), ("publisher", "owner")])
async def test_roles_that_are_members_of_each_other_are_refused(granted: Cast, sql: Sql, member: str, of: str) -> None:
    names = [quote_identifier(getattr(granted.roles, which)) for which in (of, member)]
    await sql.execute("GRANT {} TO {}".format(*names))
    with pytest.raises(DBAPIError, match="is a member of"):
        await granted.grant()


async def test_a_superuser_is_refused(granted: Cast, sql: Sql) -> None:
    await sql.execute(f"ALTER ROLE {quote_identifier(granted.roles.worker)} SUPERUSER")
    with pytest.raises(DBAPIError, match="is a superuser"):
        await granted.grant()


async def test_whoever_may_create_roles_and_owns_the_tables_can_do_it(sql: Sql, database: DatabaseSettings) -> None:
    """No superuser is needed, also for the second time."""
    async with casting(sql, database) as cast:
        await sql.execute("CREATE ROLE pgebus_test_dba")
        try:
            login = await cast.login("pgebus_test_dba", "CREATEROLE")
            name = cast.logins[0]
            for table in (*_WORKER, "alembic_version"):
                await sql.execute(f"ALTER TABLE pgebus.{table} OWNER TO {name}")
            for function in _FUNCTIONS:
                await sql.execute(f"ALTER FUNCTION pgebus.{function} OWNER TO {name}")
            await sql.execute(f"ALTER SCHEMA pgebus OWNER TO {name}")
            for _ in range(2):
                async with DatabaseSessionManager(login) as manager, manager.engine.begin() as connection:
                    await grant_roles(connection, cast.roles)
        finally:
            for name in cast.logins:
                await sql.execute(
                    f"ALTER SCHEMA pgebus OWNER TO CURRENT_USER; REASSIGN OWNED BY {name} TO CURRENT_USER"
                )
        worker = await cast.login(cast.roles.worker)
        async with DatabaseSessionManager(worker) as manager, manager.engine.begin() as connection:
            await connection.exec_driver_sql("SELECT FROM pgebus.deliveries")
    await sql.execute("DROP ROLE pgebus_test_dba")


async def test_the_callers_transaction_is_as_it_was(sql: Sql, database: DatabaseSettings) -> None:
    async with casting(sql, database) as cast, DatabaseSessionManager(database) as manager:
        async with manager.session() as session:
            connection = await session.connection()
            await connection.exec_driver_sql('SET LOCAL search_path = public, "o\'dd"')
            await connection.exec_driver_sql("SET LOCAL lock_timeout = '7s'")
            await grant_roles(session, cast.roles)
            for setting, value in (("search_path", 'public, "o\'dd"'), ("lock_timeout", "7s")):
                assert (await connection.exec_driver_sql(f"SHOW {setting}")).scalar_one() == value
            await session.rollback()
        assert not await sql.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", cast.roles.owner)


BAD: list[Any] = ["", "x" * 64, "ä" * 32, "a\nb", "a\0", "public", "none", "pg_more", "$pgebus$", None, 7, "\ud800"]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_cannot_name_a_role_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError):
        Roles(publisher=name)


def test_the_roles_must_differ() -> None:
    with pytest.raises(ConfigurationError, match="differ"):
        Roles(owner="a", publisher="b", worker="a")
    with pytest.raises(ConfigurationError):
        role_statements(schema="pg_catalog")


# What a publisher may do


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_a_publisher_publishes_in_every_kind_of_unit(granted: Cast, sql: Sql, kind: Kind) -> None:
    login = await granted.login(granted.roles.publisher)
    async with Units(login).open(kind) as unit:
        await unit.publish("a.b", {"n": 1}, "events", key="k", headers={"h": 1}, priority=3)
        await unit.publish("a.b", {"n": 2}, "events")
        await unit.publish_many([Event(type="a.b", payload={}, key="k"), Event(type="a.c", payload={"n": 3})])
        await unit.end("commit")
        for duplicate in (False, True):
            event = await unit.publish("a.b", {"secret": 1}, "events", dedup_key="once")
            await unit.end("commit")
            assert event.duplicate is duplicate
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 5


async def test_the_payload_of_an_event_that_was_there_is_not_loaded(granted: Cast) -> None:
    """It may be somebody else's."""
    async with DatabaseSessionManager(granted.database) as manager, manager.session() as session:
        await publish_event(session, "theirs", {"secret": 1}, "events", dedup_key="k")
        await session.commit()
    login = await granted.login(granted.roles.publisher)
    async with DatabaseSessionManager(login) as manager, manager.session() as session:
        event = await publish_event(session, "mine", {}, "events", dedup_key="k")
        assert (event.duplicate, event.type) == (True, "theirs")
        with pytest.raises(InvalidRequestError, match="payload"):
            _ = event.payload


async def test_a_publisher_sends_many_rows_by_copy(granted: Cast, sql: Sql) -> None:
    login = await granted.login(granted.roles.publisher)
    await sql.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO notes VALUES (current_query()); RETURN NULL; END $$; CREATE TABLE notes (query text);"
        "GRANT INSERT ON notes TO PUBLIC;"
        "CREATE TRIGGER note AFTER INSERT ON pgebus.events EXECUTE FUNCTION note()"
    )
    async with DatabaseSessionManager(login) as manager, manager.session() as session:
        rows = [{"type": "a.b", "payload": {"n": n}, "key": f"k{n % 3}"} for n in range(200)]
        assert len(await publish_events(session, rows)) == 200
        await session.commit()
    assert (await sql.fetchval("SELECT query FROM notes")).startswith("COPY")
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 200


async def test_a_publisher_of_its_own_transactions(granted: Cast, sql: Sql) -> None:
    login = await granted.login(granted.roles.publisher)
    async with EventPublisher(login) as publisher:
        first = await publisher.publish("a.b", {}, key="k", dedup_key="once")
        again = await publisher.publish("a.b", {}, key="k", dedup_key="once")
        assert (first.id, again.duplicate) == (again.id, True)
        await publisher.publish("a.b", {"n": 1})
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 2


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, str]:
    return apart.outcomes(CASES, PGEBUS_TEST_URL=server.url.render_as_string(hide_password=False))


@pytest.mark.parametrize("name", apart.cases(CASES))
def test_apart(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
