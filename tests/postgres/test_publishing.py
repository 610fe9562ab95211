"""An event is published by the transaction that inserts it, and by nothing else; bad input costs no transaction."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, event, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgebus._guard import dispatch_session, guard_engine
from pgebus.database import DatabaseSessionManager
from pgebus.errors import (
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidPayloadError,
    InvalidRunAtError,
    PayloadTooLargeError,
    PublishError,
    SessionControlError,
    SessionStateError,
    SessionTypeError,
)
from pgebus.models import Event, Subscription
from pgebus.publishing import publish_event, publish_events
from pgebus.session import GuardedSession

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def published(sql: Sql) -> list[tuple[int, str, str, Any]]:
    """Return what was published: an event without its delivery, or the reverse, is an error."""
    rows = await sql.fetch(
        "SELECT e.id, e.type, e.channel, e.payload, d.event_id, d.type = e.type AND d.due_at = e.run_at AS same"
        " FROM pgebus.events e FULL JOIN pgebus.deliveries d ON d.event_id = e.id ORDER BY e.id"
    )
    assert all(row["id"] == row["event_id"] and row["same"] for row in rows)
    return [(row["id"], row["type"], row["channel"], json.loads(row["payload"])) for row in rows]


@pytest.fixture
def statements(sm: DatabaseSessionManager) -> list[str]:
    """Every statement that goes through the engine; BEGIN and COMMIT do not."""
    sent: list[str] = []

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(sm.engine.sync_engine, "before_cursor_execute", record)
    return sent


async def test_a_committed_event_is_there_with_its_delivery(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        published_event = await publish_event(session, "order.placed", {"order": 7}, "shop")
        assert await published(sql) == []
        await session.commit()
    assert await published(sql) == [(published_event.id, "order.placed", "shop", {"order": 7})]


async def test_every_argument_can_be_given_by_keyword(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        await publish_event(
            session=session, event_type="a.b", payload={"x": 1}, channel="c", run_at=None, headers={"h": 1}
        )
        await session.commit()
    assert [row[1:] for row in await published(sql)] == [("a.b", "c", {"x": 1})]
    assert await sql.fetchval("SELECT headers FROM pgebus.events") == '{"h": 1}'


async def test_publishing_is_one_statement_and_loads_the_event(
    sm: DatabaseSessionManager, statements: list[str]
) -> None:
    async with sm.session() as session:
        before = datetime.now(UTC) - timedelta(seconds=5)
        found = await publish_event(session, "a", {"x": 1}, "events")
        assert (found.type, found.channel, found.payload, found.headers) == ("a", "events", {"x": 1}, {})
        assert (found.priority, found.key, found.dedup_key) == (0, None, None)
        assert before < found.created_at == found.run_at
        assert found.id > 0
    [statement] = statements
    assert statement.startswith("INSERT")


async def test_publishing_does_not_commit(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        await publish_event(session, "a", {}, "events")
        assert session.in_transaction()
        await session.rollback()
    async with sm.session() as session:
        await publish_event(session, "a", {}, "events")
    assert await published(sql) == []


async def test_a_savepoint_that_is_rolled_back_takes_its_event_along(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        await publish_event(session, "before", {}, "events")
        savepoint = await session.begin_nested()
        await publish_event(session, "inside", {}, "events")
        await savepoint.rollback()
        async with session.begin_nested():
            await publish_event(session, "kept", {}, "events")
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["before", "kept"]


async def test_a_session_can_publish_after_its_block_has_ended(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        pass
    await publish_event(session, "a", {}, "events")
    await session.commit()
    await session.close()
    assert len(await published(sql)) == 1


async def test_what_happens_to_the_payload_later_changes_nothing(sm: DatabaseSessionManager, sql: Sql) -> None:
    payload: dict[str, Any] = {"list": [1]}
    async with sm.session() as session:
        found = await publish_event(session, "a", payload, "events")
        payload["list"].append(2)
        assert found.payload == {"list": [1]}
        found.payload["more"] = True
        assert not session.dirty
        await session.commit()
    assert (await published(sql))[0][3] == {"list": [1]}


async def test_a_due_time_is_stored_as_the_same_moment(sm: DatabaseSessionManager, sql: Sql) -> None:
    moments = [
        datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        datetime.max.replace(tzinfo=UTC) - timedelta(microseconds=1),
        datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1),
        datetime(2000, 1, 1, tzinfo=UTC),
    ]
    async with sm.session() as session:
        for moment in moments:
            assert (await publish_event(session, "a", {}, "events", moment)).run_at == moment
        await session.commit()
    rows = await sql.fetch("SELECT due_at FROM pgebus.deliveries ORDER BY event_id")
    assert [row["due_at"] for row in rows] == moments


BAD_TYPES: list[Any] = [
    "", " ", ".", "a..b", ".a", "a.", "a b", "a" * 256, "a" * 10_000, "é", "\U0001f600" * 16, "a\x00", "a\n", "a\x1b",
    "\ud800", "e\u0301", "\u202ea", "a\u200bb", "*", "#", "a.*", ">", "'; DROP TABLE pgebus.events", "%s", ":bind",
    "{0.__class__}", "\\", b"a", 1, None, ["a"], object(),
]  # fmt: skip
BAD_CHANNELS: list[Any] = [
    "", "a" * 64, "é" * 32, "\U0001f600" * 16, "a\x00", "\ud800", b"events", 1, None, ["events"], True, object(),
]  # fmt: skip
BAD_PAYLOADS: list[Any] = [
    None, [], "{}", b"{}", 1, True, (), object(), {1: 1}, {None: 1}, {"a": 1, 2: 2}, {"\x00": 1}, {"a": "\x00"},
    {"a": "\ud800"}, {"\udfff": 1}, {"a": float("nan")}, {"a": float("inf")}, {"a": -float("inf")},
    {"a": Decimal("NaN")}, {"a": Decimal("0.1")}, {"a": 10**4000}, {"a": 10**5000}, {"a": datetime.now(UTC)},
    {"a": timedelta(1)}, {"a": UUID(int=1)}, {"a": b"x"}, {"a": {1}}, {"a": 1j}, {"a": object()}, {"a": print},
    {"a": [{"b": (1, {2})}]}, {"a": "x" * 1_048_576}, {"a": iter([1])}, {"a": range(2)}, {"a": int},
    json.loads('{"d":' * 201 + "1" + "}" * 201), {"a": ["\x00"] * 1000},
]  # fmt: skip
BAD_MOMENTS: list[Any] = [
    0, 1.5, float("inf"), "infinity", "2030-01-01T00:00:00Z", b"", True, object(), timedelta(1),
    datetime.now(UTC).date(), datetime.now(UTC).replace(tzinfo=None),
    datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
]  # fmt: skip
BAD_HEADERS: list[Any] = [
    [], "{}", 1, True, {1: 1}, {"a": "\x00"}, {"a": float("nan")}, {"a": object()}, {"a": "x" * 65_536},
    {"traceparent": b"00"}, {"correlation_id": UUID(int=1)},
]  # fmt: skip


def bad_calls() -> Iterator[tuple[type[Exception], dict[str, Any]]]:
    good: dict[str, Any] = {"event_type": "a.b", "payload": {"fine": 1}, "channel": "events"}
    for error, name, values in (
        (InvalidEventTypeError, "event_type", BAD_TYPES),
        (InvalidChannelError, "channel", BAD_CHANNELS),
        (InvalidPayloadError, "payload", BAD_PAYLOADS),
        (InvalidRunAtError, "run_at", BAD_MOMENTS),
        (InvalidPayloadError, "headers", BAD_HEADERS),
    ):
        for value in values:
            yield error, {**good, name: value}


@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
async def test_bad_input_is_a_typed_error_that_leaves_the_transaction_usable(
    sm: DatabaseSessionManager, sql: Sql, statements: list[str], level: Any
) -> None:
    calls = list(bad_calls())
    assert len(calls) >= 100
    engine = sm.engine.execution_options(isolation_level=level)
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    async with AsyncSession(engine) as session:
        for error, arguments in calls:
            statements.clear()
            with pytest.raises(error) as caught:
                await publish_event(session, **arguments)
            assert isinstance(caught.value, ValueError)
            assert statements == []
            assert not session.new
            await publish_event(session, "still.works", {}, "events")
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["still.works"] * len(calls)


async def test_a_payload_may_have_one_mebibyte_and_not_a_byte_more(sm: DatabaseSessionManager, sql: Sql) -> None:
    fitting = {"a": "x" * (Event.max_payload_bytes - len('{"a":""}'))}
    async with sm.session() as session:
        with pytest.raises(PayloadTooLargeError):
            await publish_event(session, "a", {"a": fitting["a"] + "x"}, "events")
        await publish_event(session, "a", fitting, "events")
        await session.commit()
    assert (await published(sql))[0][3] == fitting


async def test_a_channel_is_stored_as_it_is(sm: DatabaseSessionManager, sql: Sql) -> None:
    channels = ["c", "c" * 63, "é" * 31, 'a "quoted"; one', "\\", "UPPER.lower", "a\nb"]
    async with sm.session() as session:
        for channel in channels:
            await publish_event(session, "a", {}, channel)
        await session.commit()
    assert [row[2] for row in await published(sql)] == channels


# Sessions


async def test_what_is_no_session_is_refused() -> None:
    engine = create_async_engine("postgresql+asyncpg://nobody@localhost/nowhere")
    none_of_them: list[Any] = [
        None, "session", object(), Session, AsyncSession, Session(), scoped_session(sessionmaker()),
        create_engine("sqlite://"), engine, async_sessionmaker(engine),
    ]  # fmt: skip
    for what in none_of_them:
        for call in (publish_event(what, "a", {}, "events"), publish_events(what, [])):
            with pytest.raises(SessionTypeError) as caught:
                await call
            assert isinstance(caught.value, TypeError)


async def test_a_scoped_session_publishes(sm: DatabaseSessionManager, sql: Sql) -> None:
    scoped = async_scoped_session(async_sessionmaker(sm.engine), scopefunc=asyncio.current_task)
    await publish_event(scoped, "a", {}, "events")
    await publish_events(scoped, [Event(type="b")])
    await scoped.commit()
    await scoped.remove()
    assert [row[1] for row in await published(sql)] == ["a", "b"]


class ChoosySession(Session):
    """A session that chooses its connection itself."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_bind(*args, **kwargs)


@asynccontextmanager
async def session_with(sm: DatabaseSessionManager, what: str) -> AsyncIterator[AsyncSession]:
    if what == "two-phase session":
        session = AsyncSession(sm.engine, twophase=True)
    elif what == "two-phase session of its own kind":
        session = AsyncSession(sm.engine, twophase=True, sync_session_class=ChoosySession)
    elif what == "AUTOCOMMIT session":
        session = AsyncSession(sm.engine)
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    elif what == "AUTOCOMMIT engine":
        session = AsyncSession(sm.engine.execution_options(isolation_level="AUTOCOMMIT"))
    elif what == "read-only engine":
        session = AsyncSession(sm.engine.execution_options(postgresql_readonly=True))
    elif what == "another database":
        session = AsyncSession()
        session.sync_session.bind = create_engine("sqlite://")
    elif what == "no database":
        session = AsyncSession()
    elif what == "no begin":
        session = AsyncSession(sm.engine, autobegin=False)
    elif what == "closed for good":
        session = AsyncSession(sm.engine, close_resets_only=False)
        await session.close()
    else:
        async with sm.engine.connect() as connection:
            await connection.run_sync(Connection.begin_twophase)
            async with AsyncSession(connection) as session:
                yield session
        return
    async with session:
        yield session


async def test_a_session_that_cannot_publish_is_refused_before_any_sql(
    sm: DatabaseSessionManager, sql: Sql, statements: list[str]
) -> None:
    for what in (
        "two-phase session",
        "two-phase session of its own kind",
        "two-phase connection",
        "AUTOCOMMIT session",
        "AUTOCOMMIT engine",
        "read-only engine",
        "another database",
        "no database",
        "no begin",
        "closed for good",
    ):
        async with session_with(sm, what) as session:
            with pytest.raises(SessionStateError):
                await publish_event(session, "a", {}, "events")
            with pytest.raises(SessionStateError):
                await publish_events(session, [Event(type="a")])
            assert not session.new, what
            assert session.is_active, what
    assert statements == []
    assert await published(sql) == []


async def test_a_transaction_that_only_the_server_knows_to_be_read_only_is_refused(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    async with sm.session() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(SessionStateError, match="read-only") as caught:
            await publish_event(session, "a", {}, "events")
        assert isinstance(caught.value.__cause__, DBAPIError)
        await session.rollback()
        await publish_event(session, "a", {}, "events")
        await session.commit()
    assert len(await published(sql)) == 1


async def test_a_transaction_that_has_failed_is_refused_until_it_is_rolled_back(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    async with sm.session() as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1/0"))
        with pytest.raises(SessionStateError, match="failed"):
            await publish_event(session, "a", {}, "events")
        with pytest.raises(SessionStateError, match="failed"):
            await publish_event(session, "a", {}, "events")
        await session.rollback()
        await publish_event(session, "a", {}, "events")
        await session.commit()
    assert len(await published(sql)) == 1


async def test_a_session_closed_inside_its_block_is_refused(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session, session.begin():
        await session.close()
        with pytest.raises(SessionStateError):
            await publish_event(session, "a", {}, "events")


async def test_the_error_of_other_pending_objects_surfaces_unchanged(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        session.add(Subscription(channel="events", consumer_group="nobody", pattern="a"))
        with pytest.raises(IntegrityError):
            await publish_event(session, "a", {}, "events")
        await session.rollback()
        await publish_event(session, "a", {}, "events")
        await session.commit()
    assert len(await published(sql)) == 1


async def test_a_session_that_chooses_its_connection_is_asked_only_by_the_flush(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """A connection taken before the flush could be that of a read replica."""
    main, replica = sm.engine.sync_engine, sm.engine.execution_options(postgresql_readonly=True).sync_engine

    class RoutingSession(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return main if self._flushing else replica

    async with AsyncSession(sync_session_class=RoutingSession) as session:
        await publish_event(session, "a", {}, "events")
        await session.commit()
    assert len(await published(sql)) == 1


# The handler's session


@asynccontextmanager
async def handling(sm: DatabaseSessionManager, end: str = "COMMIT") -> AsyncIterator[GuardedSession]:
    """The dispatcher's side of a transactional handler."""
    async with guard_engine(sm.engine).connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute("BEGIN")
        try:
            async with dispatch_session(connection, begin="BEGIN") as session:
                yield GuardedSession(session, {"correlation_id": "c-1", "causation_id": "17"})
        finally:
            await driver.execute(end)


async def stored_headers(sql: Sql) -> list[Any]:
    return [json.loads(row[0]) for row in await sql.fetch("SELECT headers FROM pgebus.events ORDER BY id")]


async def test_a_handlers_events_say_what_caused_them(sm: DatabaseSessionManager, sql: Sql) -> None:
    stamped = {"correlation_id": "c-1", "causation_id": "17"}
    async with handling(sm) as session:
        await publish_event(session, "a", {}, "events")
        await publish_event(session, "a", {}, "events", headers={"mine": 1, "correlation_id": "other"})
        await publish_events(session, [Event(type="a"), Event(type="a", headers={"causation_id": "none"})])
        session.add(Event(type="a"))
        await session.flush()
    assert await stored_headers(sql) == [
        stamped,
        {**stamped, "mine": 1, "correlation_id": "other"},
        stamped,
        {**stamped, "causation_id": "none"},
        stamped,
    ]


async def test_a_handlers_events_end_with_its_transaction(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with handling(sm, end="ROLLBACK") as session:
        await publish_event(session, "a", {}, "events")
    assert await published(sql) == []


async def test_a_handlers_session_takes_bad_input_like_any_other(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with handling(sm) as session:
        for error, arguments in bad_calls():
            with pytest.raises(error):
                await publish_event(session, **arguments)
        with pytest.raises(PayloadTooLargeError):  # by what it inherits
            await publish_events(session, [Event(type="a"), Event(type="a", headers={"x": "x" * 65_520})])
        await publish_event(session, "a", {}, "events")
    assert len(await published(sql)) == 1


async def test_a_handlers_session_publishes_nothing_from_another_task_or_too_late(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    async with handling(sm) as session:
        with pytest.raises(SessionControlError):
            await asyncio.create_task(publish_event(session, "a", {}, "events"))
        await session.flush()
    with pytest.raises(SessionControlError):
        await publish_event(session, "a", {}, "events")
    assert await published(sql) == []


# Many


async def test_many_events_keep_their_order(sm: DatabaseSessionManager, sql: Sql, statements: list[str]) -> None:
    async with sm.session() as session:
        found = await publish_events(session, (Event(type="n", payload={"n": n}) for n in range(3_000)))
        ids = [each.id for each in found]
        await session.commit()
    assert ids == sorted(set(ids))
    assert len(statements) <= 4
    assert [(row[0], row[3]["n"]) for row in await published(sql)] == list(zip(ids, range(3_000), strict=True))


async def test_no_events_are_no_sql(sm: DatabaseSessionManager, statements: list[str]) -> None:
    async with sm.session() as session:
        assert await publish_events(session, []) == []
        assert not session.in_transaction()
    assert statements == []


def breaking() -> Iterator[Event]:
    yield Event(type="a")
    raise LookupError


async def test_many_events_are_published_all_or_none(
    sm: DatabaseSessionManager, sql: Sql, statements: list[str]
) -> None:
    async with sm.session() as session, sm.session() as elsewhere:
        twice, theirs, done = Event(type="a"), Event(type="a"), Event(type="done")
        elsewhere.add(theirs)
        await publish_events(session, [done])
        statements.clear()
        bad: list[tuple[type[Exception], Any, str]] = [
            (PublishError, [Event(type="a"), {"type": "a"}], "events[1]"),
            (PublishError, [Event(type="a"), Event(type="a"), None], "events[2]"),
            (PublishError, [Event], "events[0]"),
            (PublishError, [twice, twice], "events[1]"),
            (PublishError, [Event(type="a"), theirs], "events[1]"),
            (PublishError, [done], "events[0]"),
            (InvalidEventTypeError, [Event(type="a"), Event(payload={})], "events[1]"),
            (PublishError, Event(type="a"), "iterable"),
            (PublishError, None, "iterable"),
            (PublishError, 1, "iterable"),
            (PublishError, "ab", "events[0]"),
            (LookupError, breaking(), ""),
        ]
        for error, events, shown in bad:
            with pytest.raises(error) as caught:
                await publish_events(session, events)
            assert shown in str(caught.value)
            assert not session.new
        assert statements == []
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["done"]


async def test_an_event_that_is_pending_already_is_published_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        pending = Event(type="a")
        session.add(pending)
        await publish_events(session, [pending, Event(type="b")])
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["a", "b"]


# Without publish_event


async def test_adding_an_event_to_a_session_publishes_it(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        session.add(Event(type="a", payload={"x": 1}))
        await session.commit()
        session.add(Event(type="b"))
        await session.rollback()
    assert [row[1:] for row in await published(sql)] == [("a", "events", {"x": 1})]


# Round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**300), 10**300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)
ODD: list[dict[str, Any]] = [
    {},
    {"": ""},
    {"-0.0": -0.0, "least": 5e-324, "most": sys.float_info.max, "minus": -sys.float_info.max, "1e22": 1e22},
    {"1e16": 1e16, "1e23": 1e23, "2^53+1": 2**53 + 1, "2^63": 2**63, "1.0": 1.0, "1e-7": 1e-7},
    {"most digits": 10**4000 - 1, "negative": 1 - 10**4000},
    {"control": "".join(map(chr, range(1, 32))) + "\x7f\u2028\u2029\ufeff\U0010ffff", "escape": "\\u0000 \\ud800"},
    {"nfc": "\u00e9", "nfd": "e\u0301", "rtl": "\u202e", "__proto__": {"constructor": 1}, "$1": ":x %s %(y)s"},
    {str(n): n for n in range(20_000)},
    json.loads('{"d":' * 199 + "{}" + "}" * 199),
    {"deep": json.loads("[" * 199 + "]" * 199)},
]


async def test_what_is_read_back_equals_what_was_published(sm: DatabaseSessionManager, sql: Sql) -> None:
    payloads = list(ODD)

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(TEXT, JSON, max_size=4))
    def collect(payload: dict[str, Any]) -> None:
        payloads.append(payload)

    collect()
    async with sm.session() as session:
        await publish_events(session, [Event(type="odd", payload=payload) for payload in payloads])
        await session.commit()
    async with sm.session() as session:
        read = (await session.scalars(select(Event).order_by(Event.id))).all()
    assert [each.payload for each in read] == payloads
    assert [row[3] for row in await published(sql)] == payloads


async def test_a_tuple_comes_back_as_a_list(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        found = await publish_event(session, "a", {"t": (1, (2,))}, "events")
        assert found.payload == {"t": [1, [2]]}
        await session.refresh(found)
        assert found.payload == {"t": [1, [2]]}
        assert inspect(found).persistent
