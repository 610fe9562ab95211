"""A dedup_key is published once for as long as its event is kept, and the caller's transaction stays usable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Connection, ForeignKey, create_engine, inspect, select, text
from sqlalchemy.event import listen, listens_for, remove
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    relationship,
    with_loader_criteria,
)
from sqlalchemy.schema import CreateSchema
from tests import apart
from tests.conftest import Server
from tests.postgres.test_publishing import Sql, handling, published, stored_headers
from tests.postgres.units import KINDS, SESSIONS, Kind, Unit, Units
from tests.system.bus import delivery, finished, publish, running
from tests.system.waiting import until

from pgebus import (
    DatabaseSessionManager,
    Event,
    EventContext,
    EventRouter,
    InvalidKeyError,
    InvalidPriorityError,
    PublishError,
    RetryTransactionError,
    SessionControlError,
    SessionStateError,
    publish_event,
    publish_event_sync,
    publish_events,
)
from pgebus._guard import DispatchSession
from pgebus.models import ConsumerGroup
from pgebus.settings import DatabaseSettings

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@every_kind
async def test_publishing_a_key_again_returns_the_event_that_is_there(
    database: DatabaseSettings, sql: Sql, kind: Kind
) -> None:
    async with Units(database).open(kind) as unit:
        first = await unit.publish("a", {"n": 1}, "events", dedup_key="k", key="order:7", priority=3)
        first_id = first.id
        assert (first.duplicate, first.key, first.priority, first.dedup_key) == (False, "order:7", 3, "k")
        await unit.end("commit")
        again = await unit.publish("b", {"n": 2}, "events", dedup_key="k")
        assert (again.id, again.type, again.payload, again.duplicate) == (first_id, "a", {"n": 1}, True)
        inside = await unit.publish("c", {}, "events", dedup_key="l")
        twice = await unit.publish("d", {}, "events", dedup_key="l")
        assert (twice.id, twice.duplicate) == (inside.id, False)
        elsewhere = await unit.publish("e", {}, "other", dedup_key="k")
        assert not elsewhere.duplicate
        await unit.end("commit")
        await unit.publish("gone", {}, "events", dedup_key="m")
        await unit.end("rollback")
        assert not (await unit.publish("back", {}, "events", dedup_key="m")).duplicate
        await unit.end("commit")
    assert [row[1:3] for row in await published(sql)] == [
        ("a", "events"), ("c", "events"), ("e", "other"), ("back", "events")
    ]  # fmt: skip


@every_kind
async def test_a_batch_keeps_its_order_around_duplicates(database: DatabaseSettings, sql: Sql, kind: Kind) -> None:
    async with Units(database).open(kind) as unit:
        await unit.publish("a", {}, "events", dedup_key="k")
        await unit.end("commit")
        batch = [Event(type="b"), Event(type="c", dedup_key="k"), Event(type="d", dedup_key="l"), Event(type="e")]
        found = await unit.publish_many(batch)
        assert [(each.type, each.duplicate) for each in found] == [
            ("b", False), ("a", True), ("d", False), ("e", False)
        ]  # fmt: skip
        await unit.end("commit")
    assert [row[1] for row in await published(sql)] == ["a", "b", "d", "e"]


async def test_a_pending_object_is_flushed_before_and_an_added_event_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        session.add(Event(type="pending"))
        mine = Event(type="mine", dedup_key="k")
        session.add(mine)
        assert (await publish_events(session, [mine, Event(type="other", dedup_key="k")])) == [mine, mine]
        assert mine in session
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["pending", "mine"]


async def test_another_transaction_that_has_not_ended_is_waited_for(sm: DatabaseSessionManager, sql: Sql) -> None:
    """If it commits, its event is returned; if it rolls back, ours is published."""
    for end in ("commit", "rollback"):
        async with sm.session() as one, sm.session() as two:
            theirs = (await publish_event(one, "theirs", {}, "events", dedup_key=end)).id
            waiting = asyncio.create_task(publish_event(two, "ours", {}, "events", dedup_key=end))
            await until(lambda: sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            assert not waiting.done()
            await getattr(one, end)()
            ours = await waiting
            assert ours.duplicate == (end == "commit")
            assert (ours.id == theirs) == (end == "commit")
            await publish_event(two, "usable", {}, "events")
            await two.commit()
    assert [row[1] for row in await published(sql)] == ["theirs", "usable", "ours", "usable"]


async def test_a_hundred_at_once_publish_one(sm: DatabaseSessionManager, sql: Sql) -> None:
    async def one(number: int) -> bool:
        async with sm.session() as session:
            event = await publish_event(session, "a", {"n": number}, "events", dedup_key="k")
            await session.commit()
            return event.duplicate

    assert sorted(await asyncio.gather(*map(one, range(100)))) == [False] + [True] * 99
    assert len(await published(sql)) == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_row_that_cannot_be_seen_asks_for_another_transaction(
    sm: DatabaseSessionManager, sql: Sql, level: Any
) -> None:
    async with AsyncSession(sm.engine.execution_options(isolation_level=level)) as session:
        await publish_event(session, "snapshot", {}, "events")
        async with sm.session() as other:
            await publish_event(other, "theirs", {}, "events", dedup_key="k")
            await other.commit()
        with pytest.raises(RetryTransactionError) as caught:
            await publish_event(session, "ours", {}, "events", dedup_key="k")
        assert caught.value.dedup_key == "k"
        await session.rollback()
        again = await publish_event(session, "ours", {}, "events", dedup_key="k")
        assert (again.type, again.duplicate) == ("theirs", True)
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["theirs"]


async def test_adding_an_event_with_a_used_key_is_an_integrity_error(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        session.add(Event(type="a", dedup_key="k"))
        await session.commit()
        session.add(Event(type="a", dedup_key="k"))
        with pytest.raises(IntegrityError):
            await session.flush()


async def test_a_key_is_free_again_when_its_event_is_gone(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        first = await publish_event(session, "a", {}, "events", dedup_key="k")
        await session.commit()
        await sql.execute("DELETE FROM pgebus.events")
        second = await publish_event(session, "a", {}, "events", dedup_key="k")
        assert (second.duplicate, second.id > first.id) == (False, True)
        await session.commit()
        with session.no_autoflush:
            await session.delete(second)
            third = await publish_event(session, "a", {}, "events", dedup_key="k")
        assert (third.duplicate, third.id > second.id) == (False, True)


async def test_in_a_handlers_session_as_well(sm: DatabaseSessionManager, sql: Sql) -> None:
    for duplicate in (False, True):
        async with handling(sm) as session:
            event = await publish_event(session, "a", {}, "events", dedup_key="k")
            await publish_event(session, "b", {}, "events")
        assert event.headers == {"correlation_id": "c-1", "causation_id": "17"}
        assert event.duplicate == duplicate
    assert [row[1] for row in await published(sql)] == ["a", "b", "b"]


BAD_KEYS: list[Any] = ["", "k" * 256, "é" * 128, "a\x00", "\ud800", b"k", 1, True, ["k"]]
BAD_PRIORITIES: list[Any] = [-1, 10, 2**31, 10**5000, True, 1.0, "1", float("nan"), [1]]


async def test_bad_keys_and_priorities_are_refused_before_any_sql(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:
        for name in ("key", "dedup_key"):
            for key in BAD_KEYS:
                with pytest.raises(InvalidKeyError):
                    await publish_event(session, "a", {}, "events", **{name: key})
        for priority in BAD_PRIORITIES:
            with pytest.raises(InvalidPriorityError):
                await publish_event(session, "a", {}, "events", priority=priority)
        assert not session.in_transaction()
        await publish_event(session, "a", {}, "events", key="k" * 255, dedup_key="é" * 127, priority=9)
        await session.commit()
    assert len(await published(sql)) == 1


# In a session the event is flushed, inside a savepoint


@pytest.fixture
def rival(database: DatabaseSettings) -> Iterator[Connection]:
    """Somebody else's connection, for hooks: they are synchronous, whatever the session is."""
    engine = create_engine(database.sqlalchemy_url().set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def overtaken(session: Any, rival: Connection, key: str) -> list[str]:
    """Let *rival* commit an event with *key* when *session* has looked for one, and before it inserts its own."""
    seen: list[str] = []

    def overtake(flushed: Session, *_: object) -> None:
        for event in flushed.new:
            if isinstance(event, Event) and event.dedup_key == key:
                seen.append(event.type)
                if len(seen) == 1:
                    publish_event_sync(rival, "theirs", {}, "events", dedup_key=key)
                    rival.commit()

    listen(session, "before_flush", overtake)
    return seen


def sync_session(unit: Unit) -> Session:
    """Return the Session that the hooks are for."""
    session = unit.target() if "scoped" in type(unit.target).__name__ else unit.target
    return cast("Session", getattr(session, "sync_session", session))


every_session = pytest.mark.parametrize("kind", SESSIONS, ids=str)


@every_session
async def test_who_is_overtaken_between_the_look_and_the_insert_loses_nothing(
    database: DatabaseSettings, sql: Sql, kind: Kind, rival: Connection
) -> None:
    """Only the event is undone: not what was pending, not what was loaded, not the caller's own savepoint."""
    await sql.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'old')")
    async with Units(database).open(kind) as unit:
        session = sync_session(unit)
        seen = overtaken(session, rival, "k")
        found = await unit.execute(select(ConsumerGroup))
        old, new = found.scalar_one(), ConsumerGroup(channel="events", consumer_group="new")
        async with unit.savepoint():
            old.max_running = 7
            session.add(new)
            mine = Event(type="mine", dedup_key="k")
            [event] = await unit.publish_many([mine])
            assert seen == ["mine"]
            assert (event.type, event.duplicate) == ("theirs", True)
            assert inspect(mine).transient
            assert (old.max_running, new.consumer_group) == (7, "new")
            assert not any(inspect(each).expired_attributes for each in (old, new, event))
            assert inspect(new).persistent
            await unit.publish("after", {}, "events")
        await unit.end("commit")
    assert sorted(row[1] for row in await published(sql)) == ["after", "theirs"]
    groups = await sql.fetch("SELECT consumer_group, max_running FROM pgebus.consumer_groups ORDER BY 1")
    assert list(map(tuple, groups)) == [("new", None), ("old", 7)]


@every_kind
async def test_what_this_transaction_has_published_is_no_duplicate(
    database: DatabaseSettings, sql: Sql, kind: Kind
) -> None:
    """Nor does it become one by being returned again; for the next transaction it is one."""
    async with Units(database).open(kind) as unit:
        first = await unit.publish("a", {}, "events", dedup_key="k")
        again = await unit.publish("a", {}, "events", dedup_key="k")
        assert (first.duplicate, again.duplicate, again.id) == (False, False, first.id)
        await unit.publish("a", {}, "events", dedup_key="forgotten")
        assert not (await unit.publish("a", {}, "events", dedup_key="forgotten")).duplicate
        one, two = await unit.publish_many([Event(type="a", dedup_key="x"), Event(type="a", dedup_key="x")])
        assert (one.duplicate, two.duplicate, one.id) == (False, False, two.id)
        if kind in SESSIONS:
            assert first is again
            assert one is two
            sync_session(unit).add(Event(type="a", dedup_key="added"))
            assert not (await unit.publish("a", {}, "events", dedup_key="added")).duplicate
        async with unit.savepoint():
            assert not (await unit.publish("a", {}, "events", dedup_key="k")).duplicate
        await unit.end("commit")
        assert (await unit.publish("a", {}, "events", dedup_key="k")).duplicate
        assert all(each.duplicate for each in await unit.publish_many([Event(type="a", dedup_key="x")]))


@every_session
async def test_hooks_run_for_what_is_published_and_for_no_duplicate(
    database: DatabaseSettings, sql: Sql, kind: Kind
) -> None:
    seen: list[str] = []

    def before_insert(_mapper: object, _connection: object, target: Event) -> None:
        seen.append("before_insert")
        target.headers = {"stamped": True}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    listen(Event, "before_insert", before_insert, propagate=True)
    try:
        async with Units(database).open(kind) as unit:
            session = sync_session(unit)
            for name in ("before_flush", "after_flush", "pending_to_persistent", "before_commit", "after_commit"):
                listen(session, name, note(name))
            event = await unit.publish("a", {}, "events", dedup_key="k")
            assert event.headers == {"stamped": True}
            assert seen == ["before_flush", "before_insert", "after_flush", "pending_to_persistent"]
            await unit.publish("a", {}, "events", dedup_key="k")
            assert seen[4:] == []
            await unit.end("commit")
            assert seen[4:] == ["before_commit", "after_commit"]
    finally:
        remove(Event, "before_insert", before_insert)
    assert await stored_headers(sql) == [{"stamped": True}]


async def test_a_hook_before_the_commit_publishes_once(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session:

        def hook(of: Session) -> None:
            publish_event_sync(of, "hook", {}, "events")
            publish_event_sync(of, "hook.once", {}, "events", dedup_key="h")

        listen(session.sync_session, "before_commit", hook)
        await publish_event(session, "a", {}, "events", dedup_key="k")
        await session.commit()
        await publish_event(session, "a", {}, "events", dedup_key="k")
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["a", "hook", "hook.once", "hook"]


@every_session
async def test_after_a_rollback_an_event_is_like_any_other(database: DatabaseSettings, sql: Sql, kind: Kind) -> None:
    async with Units(database).open(kind) as unit:
        session = sync_session(unit)
        rolled_back = []
        with suppress(LookupError):
            async with unit.savepoint():
                rolled_back.append(await unit.publish("a", {"n": 1}, "events", dedup_key="k"))
                raise LookupError
        assert rolled_back[0] not in session
        rolled_back.append(await unit.publish("b", {"n": 1}, "events", dedup_key="k"))
        await unit.end("rollback")
        for event in rolled_back:
            assert inspect(event).transient
            assert (event.payload, event.dedup_key) == ({"n": 1}, "k")
        assert not (await unit.publish("c", {}, "events", dedup_key="k")).duplicate
        await unit.end("commit")
    assert [row[1] for row in await published(sql)] == ["c"]


async def test_many_with_events_that_are_pending_already(sm: DatabaseSessionManager, sql: Sql) -> None:
    """The flush of the first one leaves those with a dedup_key alone."""
    async with sm.session() as session:
        await publish_event(session, "earlier", {}, "events", dedup_key="l")
        await session.commit()
        plain, once, used = Event(type="a"), Event(type="b", dedup_key="k"), Event(type="c", dedup_key="l")
        session.add_all([used, once, plain])
        found = await publish_events(session, [plain, once, used])
        assert [(each.type, each.duplicate) for each in found] == [("a", False), ("b", False), ("earlier", True)]
        assert found[1] is once
        await session.commit()
    assert [row[1] for row in await published(sql)] == ["earlier", "a", "b"]


class Base(DeclarativeBase):
    """The application's own."""


class Order(Base):
    """Refers to events, which do not know of it."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    event_id: Mapped[int | None] = mapped_column(ForeignKey(Event.__table__.c.id))
    event: Mapped[Event | None] = relationship(Event)


async def test_what_refers_to_an_event_that_may_be_there_already_is_refused(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Nothing is lost silently: neither the reference nor the object that refers."""
    async with sm.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sm.session() as session:
        event = Event(type="a", dedup_key="k")
        order = Order(id=1, event=event)
        session.add(order)
        with pytest.raises(PublishError, match=r"Order\.event refers to events\[1\]"):
            await publish_events(session, [Event(type="b"), event])
        assert set(session.new) == {order, event}
        order.event = None
        session.expunge(event)
        order.event = (await publish_events(session, [event]))[0]
        changed = Order(id=2)
        session.add(changed)
        await session.commit()
        changed.event = other = Event(type="c", dedup_key="l")
        with pytest.raises(PublishError, match=r"Order\.event"):
            await publish_events(session, [other])
    orders = await sql.fetch("SELECT id, event_id FROM orders ORDER BY id")
    assert list(map(tuple, orders)) == [(1, event.id), (2, None)]


class OwnBind(Session):
    """A session that chooses its connection itself."""

    chosen: Any

    def get_bind(self, *_: Any, **__: Any) -> Any:
        return self.chosen


async def test_a_session_with_a_get_bind_of_its_own_is_refused_as_well(database: DatabaseSettings, sql: Sql) -> None:
    for driver in ("psycopg", "psycopg2"):
        engine = create_engine(database.sqlalchemy_url().set(drivername=f"postgresql+{driver}"))
        with OwnBind() as session:
            session.chosen = engine.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(SessionStateError, match="AUTOCOMMIT"):
                publish_event_sync(session, "a", {}, "events", dedup_key="k")
        with engine.connect() as connection:
            connection.begin_twophase()
            with OwnBind(join_transaction_mode="control_fully") as session:
                session.chosen = connection
                with pytest.raises(SessionStateError, match="two-phase"):
                    publish_event_sync(session, "a", {}, "events", dedup_key="k", key="k")
        engine.dispose()
    engine_async = create_async_engine(database.sqlalchemy_url(), isolation_level="AUTOCOMMIT")
    async with AsyncSession(sync_session_class=OwnBind) as asynchronous:
        cast("OwnBind", asynchronous.sync_session).chosen = engine_async.sync_engine
        with pytest.raises(SessionStateError, match="AUTOCOMMIT"):
            await publish_event(asynchronous, "a", {}, "events", dedup_key="k")
    await engine_async.dispose()
    assert await published(sql) == []


async def test_a_session_that_reads_a_replica_inserts_where_it_writes(
    sm: DatabaseSessionManager, sql: Sql, empty_database: DatabaseSettings
) -> None:
    """What the replica has not got yet is met at the INSERT; then nothing can be returned, and it says so."""
    behind = DatabaseSessionManager(empty_database)
    async with behind.engine.begin() as connection:
        await connection.execute(CreateSchema("pgebus"))
        await connection.run_sync(Event.metadata.create_all)
    async with sm.session() as session:
        await publish_event(session, "a", {}, "events", dedup_key="k")
        await session.commit()

    class Routing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return (sm if self._flushing else behind).engine.sync_engine

    async with AsyncSession(sync_session_class=Routing) as routing:
        assert not (await publish_event(routing, "new", {}, "events", dedup_key="l")).duplicate
        with pytest.raises(PublishError, match="replica"):
            await publish_event(routing, "b", {}, "events", dedup_key="k")
        await publish_event(routing, "usable", {}, "events")
        await routing.commit()
    await behind.close()
    assert [row[1] for row in await published(sql)] == ["a", "new", "usable"]


# In a handler


async def test_a_handler_that_is_overtaken_goes_on(sm: DatabaseSessionManager, sql: Sql, rival: Connection) -> None:
    """The savepoint passes its guard, and opens it for nobody else."""
    async with handling(sm) as session:
        sync = await session.run_sync(lambda sync: cast("DispatchSession", sync))
        seen = overtaken(sync, rival, "k")
        refused: list[str] = []

        def meddle(*_: object) -> None:
            for statement in ("SAVEPOINT mine", "ROLLBACK", "RELEASE SAVEPOINT sa_savepoint_1; COMMIT"):
                with pytest.raises(SessionControlError):
                    sync.guard.connection.execute(text(statement))
                refused.append(statement)

        listen(sync, "after_flush", meddle)
        await publish_event(session, "new", {}, "events", dedup_key="l")
        event = await publish_event(session, "mine", {}, "events", dedup_key="k")
        assert (event.type, event.duplicate) == ("theirs", True)
        assert (seen, len(refused)) == (["mine"], 3)
        for statement in ("SAVEPOINT sa_savepoint_1", "ROLLBACK TO SAVEPOINT sa_savepoint_1"):
            with pytest.raises(SessionControlError):
                await session.execute(text(statement))
        await publish_event(session, "after", {}, "events")
    assert sorted(row[1] for row in await published(sql)) == ["after", "new", "theirs"]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_handler_whose_snapshot_is_too_old_runs_again_within_its_attempt(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, level: str
) -> None:
    router = EventRouter()
    found: list[bool] = []

    @router.on("a", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("SELECT FROM pgebus.events"))
        if not found:
            found.append(False)
            await publish(sm, "theirs", dedup_key="k")
        found.append((await ctx.publish("ours", {}, "events", dedup_key="k")).duplicate)

    async with running(router, database, isolation_level=level):
        event_id = await publish(sm, "a")
        await finished(sql, event_id)
    assert (found, (await delivery(sql, event_id))["attempt"]) == ([False, True], 1)


# What cannot be seen


async def test_an_event_that_the_session_filters_away_is_not_returned(database: DatabaseSettings, sql: Sql) -> None:
    """Doing the transaction again would not help, so that is not what it says; and nothing of another tenant's is."""
    engine = create_engine(database.sqlalchemy_url().set(drivername="postgresql+psycopg"))
    with Session(engine) as session:

        @listens_for(session, "do_orm_execute")
        def only_mine(state: ORMExecuteState) -> None:
            if state.is_select:
                state.statement = state.statement.options(
                    with_loader_criteria(Event, Event.type == "mine", include_aliases=True)
                )

        publish_event_sync(session, "theirs", {}, "events", dedup_key="k")
        session.commit()
        with pytest.raises(PublishError, match="with_loader_criteria"):
            publish_event_sync(session, "mine", {}, "events", dedup_key="k")
        publish_event_sync(session, "mine", {}, "events", dedup_key="l")
        assert publish_event_sync(session, "mine", {}, "events", dedup_key="l").type == "mine"
        session.commit()
    engine.dispose()
    assert [row[1] for row in await published(sql)] == ["theirs", "mine"]


@asynccontextmanager
async def role(sql: Sql, *rights: str) -> AsyncIterator[str]:
    """A role with USAGE of the schema and *rights* on the events."""
    name: str = await sql.fetchval("SELECT quote_ident(current_database() || '_publisher')")
    await sql.execute(f"CREATE ROLE {name}; GRANT USAGE ON SCHEMA pgebus TO {name}")
    for right in rights:
        await sql.execute(f"GRANT {right} ON pgebus.events TO {name}")
    try:
        yield name
    finally:
        await sql.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
@every_kind
async def test_an_event_that_row_level_security_hides_is_not_returned(
    database: DatabaseSettings, sql: Sql, kind: Kind, level: str
) -> None:
    async with role(sql, "INSERT", "SELECT") as name, Units(database).open(kind, isolation_level=level) as unit:
        await sql.execute(
            "ALTER TABLE pgebus.events ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY reading ON pgebus.events FOR SELECT USING (type = 'mine');"
            "CREATE POLICY writing ON pgebus.events FOR INSERT WITH CHECK (true)"
        )
        await unit.publish("theirs", {}, "events", dedup_key="k")
        await unit.end("commit")
        await unit.execute(text(f"SET LOCAL ROLE {name}"))
        await unit.publish("mine", {}, "events", dedup_key="l")
        error = RetryTransactionError if kind in SESSIONS and level == "REPEATABLE READ" else PublishError
        with pytest.raises(error, match="row-level security"):
            await unit.publish("mine", {}, "events", dedup_key="k")
        await unit.publish("mine", {}, "events")
        await unit.end("commit")
    assert [row[1] for row in await published(sql)] == ["theirs", "mine", "mine"]


PLAIN = "SELECT (id, run_at, created_at, priority, channel, headers, payload, key, dedup_key)"


@every_kind
async def test_the_rights_that_a_publisher_needs(database: DatabaseSettings, sql: Sql, kind: Kind) -> None:
    """INSERT, and SELECT of what the database fills in; of all columns where an earlier event may be returned."""
    async with Units(database).open(kind) as unit:
        async with role(sql, "INSERT", PLAIN) as name:
            await unit.execute(text(f"SET LOCAL ROLE {name}"))
            await unit.publish("a", {}, "events")
            await unit.publish_many([Event(type="a"), Event(type="b", key="k", priority=3, headers={"h": 1})])
            await unit.end("commit")
            await unit.publish("a", {}, "events", dedup_key="k")
            await unit.end("commit")
            await unit.execute(text(f"SET LOCAL ROLE {name}"))
            with pytest.raises(DBAPIError, match="permission denied"):
                await unit.publish("a", {}, "events", dedup_key="k")
            await unit.end("rollback")
        async with role(sql, "INSERT", "SELECT") as name:
            for duplicate in (False, True):
                await unit.execute(text(f"SET LOCAL ROLE {name}"))
                assert (await unit.publish("a", {}, "events", dedup_key="l")).duplicate == duplicate
                await unit.end("commit")


async def test_many_rows_need_no_right_to_the_sequence(sm: DatabaseSessionManager, sql: Sql) -> None:
    """With it they go by COPY, without it by INSERT."""
    async with role(sql, "INSERT", "SELECT") as name, sm.session() as session:
        sent: list[str] = []
        await session.run_sync(
            lambda sync: listen(sync.connection().engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
        )
        for right, inserts in (("SELECT", True), ("USAGE", False)):
            await sql.execute(f"GRANT {right} ON SEQUENCE pgebus.events_id_seq TO {name}")
            sent.clear()
            await session.execute(text(f"SET LOCAL ROLE {name}"))
            ids = await publish_events(session, [{"type": "a"} for _ in range(100)])
            await session.commit()
            assert (len(ids), any(statement.startswith("INSERT") for statement in sent)) == (100, inserts)
    assert len(await published(sql)) == 200


async def test_a_serialization_failure_when_it_is_looked_for_asks_for_another_transaction(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """We read what the second has written since, and the second has read what the third had written by then."""
    await sql.execute("CREATE TABLE notes (id int); INSERT INTO notes VALUES (1)")
    engine = sm.engine.execution_options(isolation_level="SERIALIZABLE")
    async with AsyncSession(engine) as session, AsyncSession(engine) as second, AsyncSession(engine) as third:
        await second.execute(text("SELECT * FROM notes"))
        await session.execute(text("CREATE TABLE ours ()"))
        await third.execute(text("UPDATE notes SET id = 2"))
        await third.commit()
        await publish_event(second, "theirs", {}, "events", dedup_key="k")
        await second.commit()
        with pytest.raises(RetryTransactionError) as caught:
            await publish_event(session, "ours", {}, "events", dedup_key="k")
        failed = caught.value.__cause__
        assert isinstance(failed, DBAPIError)
        assert (failed.statement or "").startswith("SELECT")
        await session.rollback()
        assert (await publish_event(session, "ours", {}, "events", dedup_key="k")).duplicate


async def test_keys_in_opposite_order_are_a_deadlock_that_postgresql_ends(sm: DatabaseSessionManager, sql: Sql) -> None:
    async def second(session: AsyncSession, key: str) -> str:
        try:
            await publish_event(session, "a", {}, "events", dedup_key=key)
        except DBAPIError as error:
            await session.rollback()
            return str(getattr(error.orig, "sqlstate", None))
        await session.commit()
        return "committed"

    async with sm.session() as one, sm.session() as two:
        await publish_event(one, "a", {}, "events", dedup_key="x")
        await publish_event(two, "a", {}, "events", dedup_key="y")
        assert sorted(await asyncio.gather(second(one, "y"), second(two, "x"))) == ["40P01", "committed"]
    assert len(await published(sql)) == 2


# Subclasses; they are run apart

CASES = Path(__file__).with_name("dedup_cases.py")


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, str]:
    return apart.outcomes(CASES, PGEBUS_TEST_URL=server.url.render_as_string(hide_password=False))


@pytest.mark.parametrize("name", apart.cases(CASES))
def test_apart(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
