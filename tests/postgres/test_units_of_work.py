"""Whatever an application calls its unit of work, publishing in it is one INSERT that ends with it."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, inspect, select, text
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError, IntegrityError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from tests.conftest import Server
from tests.postgres.plain_sql import drain, listen, sleeper
from tests.postgres.test_publishing import BAD_PAYLOADS, Sql, handling, published, stored_headers
from tests.postgres.units import CONNECTIONS, KINDS, SESSIONS, Kind, Unit, Units

from pgebus import (
    DatabaseSessionManager,
    Event,
    InvalidPayloadError,
    PublishError,
    SessionStateError,
    SessionTypeError,
    publish_event,
    publish_event_sync,
    publish_events,
    publish_events_sync,
)
from pgebus._guard import DispatchSession
from pgebus.embedded import EmbeddedPostgres
from pgebus.settings import DatabaseSettings

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@pytest.fixture
def units(database: DatabaseSettings) -> Units:
    return Units(database)


async def types(sql: Sql) -> list[str]:
    return [row[1] for row in await published(sql)]


# Every kind


@every_kind
async def test_an_event_ends_with_its_unit_of_work(units: Units, sql: Sql, kind: Kind) -> None:
    """Published with everything loaded, seen by nobody before the commit, gone with a rollback."""
    await sleeper(sql)
    heard = await listen(sql, "events")
    async with units.open(kind) as unit:
        event = await unit.publish("a.b", {"x": 1}, "events", headers={"h": 1})
        moment = datetime(2030, 1, 1, tzinfo=UTC)
        later = await unit.publish("later", {}, "events", moment)
        assert 0 < event.id < later.id
        assert (event.type, event.payload, event.headers, event.priority) == ("a.b", {"x": 1}, {"h": 1}, 0)
        assert (event.key, later.run_at, event.run_at == event.created_at) == (None, moment, True)
        assert await published(sql) == []
        await unit.end("commit")
        await unit.publish("undone", {}, "events")
        await unit.end("rollback")
        await unit.publish("forgotten", {}, "events")
    assert await types(sql) == ["a.b", "later"]
    # One wake-up says "now", and the other one when; what was rolled back woke nobody.
    now, when = await drain(heard, sql, "events")
    assert (now, float(when)) == ("", moment.timestamp())  # as text it has decimals from PostgreSQL 14 on


async def publish_and_undo(unit: Unit) -> None:
    with suppress(LookupError):
        async with unit.savepoint():
            await unit.publish("inside", {}, "events")
            raise LookupError


@every_kind
async def test_a_savepoint_that_is_rolled_back_publishes_nothing(units: Units, sql: Sql, kind: Kind) -> None:
    await sleeper(sql)
    heard = await listen(sql, "events")
    async with units.open(kind) as unit:
        await publish_and_undo(unit)
        await unit.end("commit")
        assert await drain(heard, sql, "events") == []
        await publish_and_undo(unit)
        async with unit.savepoint():
            await unit.publish("kept", {}, "events")
        await unit.publish("after", {}, "events")
        await unit.end("commit")
    assert await types(sql) == ["kept", "after"]


@every_kind
async def test_many_events_keep_their_order_and_get_their_ids(units: Units, sql: Sql, kind: Kind) -> None:
    async with units.open(kind) as unit:
        assert await unit.publish_many([]) == []
        made = [Event(type="n", payload={"n": n}, **({"key": "k"} if n == 1_500 else {})) for n in range(3_000)]
        ids = [each.id for each in await unit.publish_many(made)]
        await unit.end("commit")
    assert ids == sorted(set(ids))
    assert [(row[0], row[3]["n"]) for row in await published(sql)] == list(zip(ids, range(3_000), strict=True))


@every_kind
async def test_bad_input_leaves_the_transaction_usable(units: Units, sql: Sql, kind: Kind) -> None:
    async with units.open(kind) as unit:
        await unit.publish("first", {}, "events")
        for payload in BAD_PAYLOADS:
            with pytest.raises(InvalidPayloadError):
                await unit.publish("bad", payload, "events")
        with pytest.raises(PublishError, match=r"events\[1\]"):
            await unit.publish_many([Event(type="a"), None])  # type: ignore[list-item]  # that is what is tested
        await unit.publish("last", {}, "events")
        await unit.end("commit")
    assert await types(sql) == ["first", "last"]


@every_kind
async def test_a_core_insert_publishes(units: Units, sql: Sql, kind: Kind) -> None:
    """With one row and with thousands, by an execution of many and by many VALUES, with and without RETURNING."""
    async with units.open(kind) as unit:
        await unit.execute(insert(Event).values(type="one"))
        await unit.execute(insert(Event.__table__), {"type": "table", "payload": {"n": 1}})  # type: ignore[arg-type]
        await unit.execute(insert(Event), [{"type": "many", "payload": {"n": n}} for n in range(3_000)])
        await unit.execute(insert(Event).values([{"type": "values"}, {"type": "values"}]))
        returned = await unit.execute(
            insert(Event).returning(Event.id, sort_by_parameter_order=True),
            [{"type": "returned"} for _ in range(1_500)],
        )
        ids = [row.id for row in returned]
        await unit.end("commit")
    rows = await published(sql)
    assert [row[0] for row in rows if row[1] == "returned"] == ids
    assert [row[1] for row in rows] == ["one", "table"] + ["many"] * 3_000 + ["values"] * 2 + ["returned"] * 1_500


@pytest.mark.parametrize("kind", [each for each in SESSIONS if each.driver != "asyncpg"], ids=str)
async def test_a_session_in_two_phase_mode_publishes_nothing(units: Units, sql: Sql, kind: Kind) -> None:
    async with units.open(kind) as unit:
        if kind.what == "scoped_session":
            unit.target().twophase = True
        else:
            getattr(unit.target, "sync_session", unit.target).twophase = True
        for attempt in (
            unit.publish("a", {}, "events"),
            unit.publish_many([Event(type="a")]),
            unit.execute(insert(Event), [{"type": "a"}, {"type": "b"}]),
            unit.execute(insert(Event).values(type="a", key="k")),
        ):
            with pytest.raises(SessionStateError, match="two-phase"):
                await attempt
            await unit.end("rollback")
    assert await published(sql) == []


async def test_a_connection_in_a_two_phase_transaction_publishes_nothing(
    units: Units, database: DatabaseSettings, sql: Sql
) -> None:
    """The error comes at the INSERT, and it is our own; not at the PREPARE, and only when a worker sleeps."""
    for driver in ("psycopg", "psycopg2"):
        engine = create_engine(database.sqlalchemy_url().set(drivername=f"postgresql+{driver}"))
        statements: list[Any] = [
            (insert(Event), {"type": "a"}),
            (insert(Event), [{"type": "a"}, {"type": "b", "dedup_key": "d"}]),
            (insert(Event).values(type="a").returning(Event.id),),
            (insert(Event).from_select(["type"], select(text("'a'"))),),
            (insert(Event.__table__), {"type": "a", "dedup_key": "d"}),  # type: ignore[arg-type]  # it is a Table
        ]
        for arguments in statements:
            with engine.connect() as connection, connection.begin_twophase() as transaction:
                with pytest.raises(SessionStateError, match="two-phase"):
                    connection.execute(*arguments)
                transaction.rollback()
        for publish in (
            lambda target: publish_event_sync(target, "a", {}, "events"),
            lambda target: publish_events_sync(target, [Event(type="a")]),
        ):
            with engine.connect() as connection, connection.begin_twophase() as transaction:
                with pytest.raises(SessionStateError, match="two-phase"):
                    publish(connection)
                transaction.rollback()
        with engine.connect() as connection:
            connection.begin_twophase()
            with Session(connection) as session:
                session.add(Event(type="a", key="k", dedup_key="d"))
                with pytest.raises(SessionStateError, match="two-phase"):
                    session.flush()  # which rolls back
        engine.dispose()
    assert await published(sql) == []


@every_kind
async def test_a_read_only_transaction_publishes_nothing_and_says_why(units: Units, sql: Sql, kind: Kind) -> None:
    async with units.open(kind) as unit:
        await unit.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(SessionStateError, match="read-only"):
            await unit.publish("a", {}, "events")
        await unit.end("rollback")
        await unit.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError, match="cannot execute INSERT in a read-only transaction"):
            await unit.execute(insert(Event).values(type="a"))
        await unit.end("rollback")
    async with units.open(kind, execution_options={"postgresql_readonly": True}) as unit:
        with pytest.raises(SessionStateError, match="read-only"):
            await unit.publish("a", {}, "events")
    assert await published(sql) == []


@every_kind
async def test_a_unit_of_work_that_cannot_publish_is_refused(units: Units, sql: Sql, kind: Kind) -> None:
    async with units.open(kind, isolation_level="AUTOCOMMIT") as unit:
        with pytest.raises(SessionStateError, match="AUTOCOMMIT"):
            await unit.publish("a", {}, "events")
    async with units.open(kind) as unit:
        with pytest.raises(IntegrityError):
            await unit.execute(text("INSERT INTO pgebus.events (type) VALUES (NULL)"))
        with pytest.raises(SessionStateError, match="has failed"):
            await unit.publish("a", {}, "events")
        await unit.end("rollback")
        await unit.publish("works.again", {}, "events")
        await unit.end("commit")
    assert await types(sql) == ["works.again"]


@every_kind
async def test_another_schema_is_reached_by_translation(
    units: Units, sql: Sql, kind: Kind, database: DatabaseSettings
) -> None:
    await sql.execute("ALTER SCHEMA pgebus RENAME TO other")
    await sql.execute(
        (await sql.fetchval("SELECT pg_get_functiondef('other.fan_out'::regproc)")).replace("pgebus", "other")
    )
    async with units.open(kind, execution_options={"schema_translate_map": {"pgebus": "other"}}) as unit:
        await unit.publish("a", {}, "events")
        await unit.publish_many([Event(type="b")])
        await unit.execute(insert(Event), [{"type": "c"}])
        await unit.end("commit")
    assert await sql.fetchval("SELECT string_agg(type, ',' ORDER BY event_id) FROM other.deliveries") == "a,b,c"


# Connections


@pytest.mark.parametrize("kind", CONNECTIONS, ids=str)
async def test_on_a_connection_the_event_is_detached_and_can_join_a_session(
    units: Units, sm: DatabaseSessionManager, kind: Kind
) -> None:
    async with units.open(kind) as unit:
        event = await unit.publish("a", {"x": 1}, "events")
        assert inspect(event).detached
        assert not inspect(event).modified
        assert inspect(event).unloaded == set()
        with pytest.raises(PublishError, match="already"):
            await unit.publish_many([event])
        await unit.end("commit")
    async with sm.session() as session:
        session.add(event)
        await session.refresh(event)
        assert event.payload == {"x": 1}


async def test_a_connection_that_is_closed_or_not_open_yet_is_refused(database: DatabaseSettings) -> None:
    engine = create_async_engine(database.sqlalchemy_url())
    connection = engine.connect()
    with pytest.raises(SessionStateError, match="not been started"):
        await publish_event(connection, "a", {}, "events")
    await connection.start()
    await connection.close()
    with pytest.raises(SessionStateError, match="closed"):
        await publish_event(connection, "a", {}, "events")
    await engine.dispose()
    sync = create_engine(database.sqlalchemy_url().set(drivername="postgresql+psycopg"))
    with sync.connect() as closed:
        pass
    with pytest.raises(SessionStateError, match="closed"):
        publish_event_sync(closed, "a", {}, "events")
    sync.dispose()


def test_a_connection_to_another_database_is_refused() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(SessionStateError, match="sqlite"):
        publish_event_sync(connection, "a", {}, "events")
    engine.dispose()


# Sessions


async def test_what_is_of_the_other_kind_is_told_where_to_go(sm: DatabaseSessionManager) -> None:
    wrong: list[Any] = [None, object(), Session, create_engine("sqlite://"), sm, sm.engine]
    asynchronous: list[Any] = [sm.session(), sm.engine.connect()]
    for what in [*wrong, *asynchronous]:
        with pytest.raises(SessionTypeError) as caught:
            publish_event_sync(what, "a", {}, "events")
        assert ("await publish_event()" in str(caught.value)) == (what in asynchronous)
        with pytest.raises(SessionTypeError):
            publish_events_sync(what, [])
    with pytest.raises(SessionTypeError, match=r"publish_event_sync\(\)"):
        await publish_event(Session(), "a", {}, "events")  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(SessionTypeError, match=r"engine\.begin\(\)"):
        await publish_event(sm.engine, "a", {}, "events")  # type: ignore[arg-type]  # that is what is tested


async def test_expired_events_are_read_again_where_that_is_possible(units: Units) -> None:
    async with units.open(Kind("Session", "psycopg", (("expire_on_commit", True),))) as unit:
        event = await unit.publish("a", {"x": 1}, "events")
        await unit.end("commit")
        assert event.payload == {"x": 1}
    async with units.open(Kind("AsyncSession", "asyncpg", (("expire_on_commit", True),))) as unit:
        event = await unit.publish("a", {"x": 1}, "events")
        await unit.end("commit")
        with pytest.raises(MissingGreenlet):
            _ = event.payload


async def test_synchronous_code_in_a_handler_publishes_as_the_handler_does(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    async with handling(sm) as session:

        def work(sync: Session) -> None:
            assert isinstance(sync, DispatchSession)
            publish_event_sync(sync, "one", {}, "events")
            publish_events_sync(sync, [Event(type="two", headers={"mine": 1})])

        await session.run_sync(work)
    stamped = {"correlation_id": "c-1", "causation_id": "17"}
    assert await stored_headers(sql) == [stamped, {**stamped, "mine": 1}]


async def test_publishing_on_the_connection_of_a_session_joins_its_transaction(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    async with sm.session() as session:
        await publish_event(await session.connection(), "a", {}, "events")
        await session.rollback()
        await publish_events(await session.connection(), [Event(type="b")])
        await session.commit()
    assert await types(sql) == ["b"]


async def test_what_could_not_be_published_does_not_stay_in_the_session(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Whatever failed, and whether or not the caller goes on."""

    class Refusing(Session):
        refuse = True

    @listens_for(Refusing, "before_flush")
    def refuse(session: Refusing, *_: object) -> None:
        if session.refuse:
            raise LookupError

    async with AsyncSession(sm.engine, sync_session_class=Refusing) as session:
        for call in (
            lambda: publish_event(session, "a", {}, "events"),
            lambda: publish_events(session, [Event(type="a"), Event(type="b")]),
        ):
            with pytest.raises(LookupError):
                await call()
            assert not session.new
        session.sync_session.refuse = False  # type: ignore[attr-defined]  # it is a Refusing
        await publish_event(session, "good", {}, "events")
        await session.commit()
    assert await types(sql) == ["good"]


async def test_hooks_of_a_flush_are_told_what_they_may_do(sm: DatabaseSessionManager, sql: Sql) -> None:
    class Hooked(Session):
        error: Exception | None = None

    @listens_for(Hooked, "before_flush")
    def derive(session: Hooked, *_: object) -> None:
        if any(each.type == "root" for each in session.new):
            try:
                publish_event_sync(session, "derived", {}, "events")
            except SessionStateError as error:
                session.error = error
            session.add(Event(type="added"))

    async with AsyncSession(sm.engine, sync_session_class=Hooked) as session:
        session.add(Event(type="root"))
        await session.commit()
        assert "before_flush" in str(session.sync_session.error)  # type: ignore[attr-defined]  # it is a Hooked
    assert await types(sql) == ["root", "added"]


async def test_a_session_that_chooses_a_connection_in_autocommit_is_refused(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    autocommit = sm.engine.execution_options(isolation_level="AUTOCOMMIT").sync_engine

    class Routed(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return autocommit

    async with AsyncSession(sync_session_class=Routed) as session:
        with pytest.raises(SessionStateError, match="AUTOCOMMIT"):
            await publish_event(session, "a", {}, "events")
    assert await types(sql) == []


@every_kind
async def test_events_that_were_rolled_back_are_not_published_again(units: Units, sql: Sql, kind: Kind) -> None:
    """They have an id, which the server would refuse: a clear error before any SQL, and the transaction goes on."""
    async with units.open(kind) as unit:
        made = [Event(type="a"), Event(type="b")]
        await unit.publish_many(made)
        await unit.end("rollback")
        with pytest.raises(PublishError, match="rolled back"):
            await unit.publish_many(made)
        with pytest.raises(PublishError, match="has an id"):
            await unit.publish_many([Event(id=5, type="c")])
        await unit.publish("good", {}, "events")
        await unit.end("commit")
    assert await types(sql) == ["good"]


async def test_a_batch_that_fails_half_way_on_a_connection_can_be_published_again(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    late = Event(type="late")
    late.__dict__["priority"] = 99  # behind the check
    made = [Event(type="early", payload={}), late]
    async with sm.engine.connect() as connection:
        with pytest.raises(IntegrityError):
            await publish_events(connection, made)
        await connection.rollback()
        late.priority = 9
        await publish_events(connection, made)
        await connection.commit()
    assert await types(sql) == ["early", "late"]


# Without SQLAlchemy


async def test_copy_publishes(sql: Sql) -> None:
    await sql.copy_records_to_table("events", schema_name="pgebus", columns=["type"], records=[("copy",)] * 2_000)
    assert await types(sql) == ["copy"] * 2_000


async def test_psql_publishes(server: Server, sql: Sql, database: DatabaseSettings) -> None:
    url = server.url.set(drivername="postgresql", database=database.sqlalchemy_url().database)
    script = (
        "BEGIN; INSERT INTO pgebus.events (type) VALUES ('undone'); ROLLBACK;\n"
        "INSERT INTO pgebus.events (type, payload) VALUES ('psql', '{\"x\": 1}');\n"
        "\\copy pgebus.events (type) FROM stdin\nfrom.psql\n\\.\n"
    )
    process = await asyncio.create_subprocess_exec(
        psql_program(),
        *("-v", "ON_ERROR_STOP=1", "-X", "-q", url.render_as_string(hide_password=False)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    answer = await process.communicate(script.encode())
    assert (process.returncode, *answer) == (0, b"", b"")
    assert await types(sql) == ["psql", "from.psql"]


def psql_program() -> str:
    """The one of the wheel, else the one that is installed."""
    bundled = EmbeddedPostgres()._programs / "psql"
    found = str(bundled) if bundled.exists() else shutil.which("psql")
    assert found
    return found
