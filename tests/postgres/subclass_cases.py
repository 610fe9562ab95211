"""Subclasses of Event in sessions. Runs apart, see tests/apart.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, func, insert, inspect, literal, null, select, update
from sqlalchemy.exc import IntegrityError, MissingGreenlet, NoSuchColumnError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, aliased, selectin_polymorphic, selectinload, with_polymorphic
from tests.subclasses import (
    Channel,
    Order,
    OrderPlaced,
    OrderPlacedAgain,
    PaymentTaken,
    StockCounted,
    TenantEvent,
    add_columns,
    statements,
)
from tests.system.bus import Sql

from pgebus import (
    DatabaseSessionManager,
    Event,
    EventPublisher,
    InvalidEventTypeError,
    PublishError,
    add_publish_middleware,
    publish_event,
    publish_event_sync,
    publish_events,
    publish_events_sync,
    remove_publish_middleware,
)
from pgebus.settings import DatabaseSettings


@pytest.fixture(autouse=True)
async def columns(sm: DatabaseSessionManager) -> None:
    async with sm.engine.begin() as connection:
        await connection.run_sync(add_columns)


@pytest.fixture
async def one_of_each(columns: None, sql: Sql) -> None:
    """Rows that no session has seen."""
    await sql.execute(
        "INSERT INTO orders (id, total) VALUES (7, 100);"
        "INSERT INTO pgebus.events (type, order_id, tenant_id, times, note, reference) VALUES"
        " ('order.placed', 7, 1, NULL, 'first', NULL), ('order.placed.again', 7, 2, 3, 'second', NULL),"
        " ('stock.counted', NULL, NULL, NULL, 'third', NULL), ('payment.taken', NULL, NULL, NULL, NULL, 'ref'),"
        " ('nobody.knows', NULL, 5, NULL, NULL, NULL)"
    )


EACH = [OrderPlaced, OrderPlacedAgain, StockCounted, PaymentTaken, TenantEvent]


async def classes(sm: DatabaseSessionManager, statement: Any) -> list[type[Event]]:
    async with sm.session() as session:
        return [type(event) for event in await session.scalars(statement.order_by(Event.id))]


# Queries


async def test_a_query_returns_the_classes_that_it_names(sm: DatabaseSessionManager, one_of_each: None) -> None:
    assert await classes(sm, select(Event)) == EACH
    assert await classes(sm, select(TenantEvent)) == [OrderPlaced, OrderPlacedAgain, TenantEvent]
    assert await classes(sm, select(OrderPlaced)) == [OrderPlaced, OrderPlacedAgain]
    assert await classes(sm, select(OrderPlacedAgain)) == [OrderPlacedAgain]
    assert await classes(sm, select(StockCounted)) == [StockCounted]


async def test_every_column_is_loaded_whatever_was_selected(sm: DatabaseSessionManager, one_of_each: None) -> None:
    """Nothing can be loaded later in an AsyncSession."""
    async with sm.session() as session, statements(sm.engine) as sent:
        placed, again, counted, paid, other = await session.scalars(select(Event).order_by(Event.id))
        assert isinstance(placed, OrderPlaced)
        assert (placed.order_id, placed.tenant_id, placed.reason) == (7, 1, "none given")
        assert isinstance(again, OrderPlacedAgain)
        assert (again.times, again.note) == (3, "second")
        assert isinstance(counted, StockCounted)
        assert counted.note == "third"
        assert isinstance(paid, PaymentTaken)
        assert paid.reference == "ref"
        assert isinstance(other, TenantEvent)
        assert (other.type, other.tenant_id) == ("nobody.knows", 5)
        assert len(sent) == 1
    for statement in (select(TenantEvent), select(OrderPlaced)):
        async with sm.session() as session:
            (found,) = [event for event in await session.scalars(statement) if type(event) is OrderPlacedAgain]
            assert found.times == 3


async def test_the_type_can_be_compared(sm: DatabaseSessionManager, one_of_each: None) -> None:
    assert await classes(sm, select(Event).where(Event.type == "order.placed")) == [OrderPlaced]
    listed = Event.type.in_(["order.placed", "nobody.knows"])
    assert await classes(sm, select(Event).where(listed)) == [OrderPlaced, TenantEvent]


async def test_aliases_counts_and_joins(sm: DatabaseSessionManager, one_of_each: None) -> None:
    async with sm.session() as session:
        placed = aliased(OrderPlaced)
        assert len((await session.scalars(select(placed).where(placed.order_id == 7))).all()) == 2
        assert await session.scalar(select(func.count()).select_from(TenantEvent)) == 3
        joined = select(OrderPlaced, Order).join(OrderPlaced.order).order_by(OrderPlaced.id)
        assert [(type(event), order.id) for event, order in await session.execute(joined)] == [
            (OrderPlaced, 7),
            (OrderPlacedAgain, 7),
        ]
        empty = select(Order, StockCounted).outerjoin(StockCounted, StockCounted.id == -1)
        (row,) = await session.execute(empty)
        order, nothing = row
        assert order.id == 7
        assert nothing is None


async def test_polymorphic_loading_can_be_asked_for(sm: DatabaseSessionManager, one_of_each: None) -> None:
    both = with_polymorphic(Event, [OrderPlaced, StockCounted])
    async with sm.session() as session:
        found = await session.scalars(select(both).where(both.OrderPlaced.order_id == 7).order_by(both.id))
        assert [type(each) for each in found] == [OrderPlaced, OrderPlacedAgain]
        found = await session.scalars(select(Event).options(selectin_polymorphic(Event, [OrderPlaced])))
        assert len(found.all()) == 5


async def test_updates_and_deletes_are_for_the_rows_of_the_class(sm: DatabaseSessionManager, one_of_each: None) -> None:
    async with sm.session() as session:
        changed = await session.scalars(update(TenantEvent).values(tenant_id=9).returning(TenantEvent.type))
        assert sorted(changed) == ["nobody.knows", "order.placed", "order.placed.again"]
        assert list(await session.scalars(delete(StockCounted).returning(StockCounted.type))) == ["stock.counted"]
        assert await session.scalar(select(func.count()).select_from(Event)) == 4


async def test_get_finds_rows_of_the_class_only(sm: DatabaseSessionManager, one_of_each: None) -> None:
    async with sm.session() as session:
        ids = {event.type: event.id for event in await session.scalars(select(Event))}
    async with sm.session() as session:
        assert await session.get(StockCounted, ids["order.placed"]) is None
        assert type(await session.get(OrderPlaced, ids["order.placed"])) is OrderPlaced
        assert type(await session.get(Event, ids["order.placed.again"])) is OrderPlacedAgain


async def test_instances_can_be_merged_and_pickled(sm: DatabaseSessionManager, one_of_each: None) -> None:
    async with sm.session() as session:
        found = (await session.scalars(select(OrderPlaced).order_by(OrderPlaced.id))).first()
    copy = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own
    assert type(copy) is OrderPlaced
    assert copy.order_id == 7
    async with sm.session() as session:
        assert type(await session.merge(copy, load=False)) is OrderPlaced
    async with sm.session() as session:
        copy.note = "changed"
        merged = await session.merge(copy)
        await session.flush()
        assert (type(merged), merged.note) == (OrderPlaced, "changed")


async def test_a_class_that_is_defined_after_the_first_query_is_left_out_of_it(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The rows of a class beside the general one are none of the general class, since when it ever was defined."""
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('a.sibling'), ('a.child')")
    tenant, every = select(TenantEvent), select(Event)
    assert await classes(sm, tenant) == [TenantEvent, TenantEvent]
    assert await classes(sm, every) == [TenantEvent, TenantEvent]

    class Sibling(Event, event_type="a.sibling"):
        pass

    class Child(TenantEvent, event_type="a.child"):
        pass

    assert await classes(sm, tenant) == [Child]
    assert await classes(sm, every) == [Sibling, Child]


async def test_a_statement_that_is_older_than_a_class_loads_it(sm: DatabaseSessionManager, sql: Sql) -> None:
    """Nothing has used the new class yet, so nothing has configured it."""
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('quite.new')")
    statement = select(Event)
    async with sm.session() as session:
        assert type((await session.scalars(statement)).one()) is TenantEvent

    class QuiteNew(TenantEvent, event_type="quite.new"):
        pass

    async with sm.session() as session:
        assert type((await session.scalars(statement)).one()) is QuiteNew


# Publishing


async def test_adding_publishes_as_the_type_of_the_class(sm: DatabaseSessionManager, sql: Sql) -> None:
    """A default of one class is in every INSERT into the one table: SQLAlchemy and PostgreSQL know no classes there."""
    async with sm.session() as session, session.begin():
        session.add(Order(id=7, total=100))
        session.add(OrderPlaced(order_id=7, came_by=Channel.WEB, amount=Decimal("9.99"), tags={"a"}, payload={"n": 1}))
        session.add(StockCounted(3))
        session.add(TenantEvent(type="tenant.made", tenant_id=1))
    rows = await sql.fetch(
        "SELECT e.type, order_id, came_by, amount, tenant_id, reason, attempts, payload, d.status"
        " FROM pgebus.events e JOIN pgebus.deliveries d ON d.event_id = e.id ORDER BY e.type"
    )
    assert [tuple(row) for row in rows] == [
        ("order.placed", 7, "WEB", 999, None, "none given", 1, '{"n": 1}', "unhandled"),
        ("stock.counted", None, None, None, None, "none given", 1, '{"counted": 3}', "unhandled"),
        ("tenant.made", None, None, None, 1, "none given", 1, "{}", "unhandled"),
    ]


async def test_a_general_event_without_a_type_is_refused(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        session.add(TenantEvent(tenant_id=1))
        with pytest.raises(InvalidEventTypeError):
            await session.flush()


async def test_a_relationship_gives_the_key(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session, session.begin():
        session.add(OrderPlaced(order=Order(id=8, total=1)))
    assert await sql.fetchval("SELECT order_id FROM pgebus.events") == 8
    async with sm.session() as session:
        loaded = (await session.scalars(select(OrderPlaced).options(selectinload(OrderPlaced.order)))).one()
        assert loaded.order is not None
        assert loaded.order.total == 1
        order = (await session.scalars(select(Order).options(selectinload(Order.placed)))).one()  # type: ignore[attr-defined]  # added to the class later
        assert vars(order)["placed"] == [loaded]


async def test_a_foreign_key_is_held(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        with pytest.raises(IntegrityError, match="fk_events_order_id"):
            await publish_event(session, "order.placed", {}, "events", order_id=404)


async def test_publish_event_makes_the_class_of_the_type(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        event = await publish_event(session, "order.placed", {"n": 1}, "events", note="x", tenant_id=4)
        assert type(event) is OrderPlaced
        assert (event.note, event.tenant_id, event.payload) == ("x", 4, {"n": 1})
        other = await publish_event(session, "nobody.knows", {}, "events", tenant_id=4)
        assert type(other) is TenantEvent
        taken = await publish_event(session, "payment.taken", {"a": 1}, "events", reference="r")
        assert type(taken) is PaymentTaken
        assert (taken.reference, taken.payload) == ("r", {"a": 1})
        counted = await publish_event(session, "stock.counted", {"own": 1}, "events", counted=2)
        assert type(counted) is StockCounted
        assert counted.payload == {"own": 1}


async def test_publish_event_takes_the_class(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session:
        event = await publish_event(session, "order.placed", {}, "events", event_class=OrderPlaced, note="x")
        assert event.note == "x"
        plain = await publish_event(session, "nobody.knows", {}, "events", event_class=Event)
        assert type(plain) is Event


@pytest.mark.parametrize(
    ("event_type", "event_class"),
    [
        ("order.cancelled", OrderPlaced),
        ("order.placed", OrderPlacedAgain),
        ("order.placed.again", OrderPlaced),
        ("order.placed", TenantEvent),
        ("order.placed", Event),
        ("order.placed", Order),
        ("order.placed", "OrderPlaced"),
    ],
)
async def test_publish_event_refuses_a_class_that_the_type_is_not_loaded_as(
    sm: DatabaseSessionManager, event_type: str, event_class: Any
) -> None:
    async with sm.session() as session:
        with pytest.raises(PublishError):
            await publish_event(session, event_type, {}, "events", event_class=event_class)
        assert not session.new
        assert not session.in_transaction()


@pytest.mark.parametrize("name", ["nonsense", "counted", "created_at", "id", "type"])
async def test_publish_event_refuses_a_column_that_the_class_does_not_add(
    sm: DatabaseSessionManager, name: str
) -> None:
    columns: dict[str, Any] = {name: 1}
    async with sm.session() as session:
        with pytest.raises(TypeError, match=name):
            await publish_event(session, "order.placed", {}, "events", None, **columns)
        assert not session.new


async def test_publishing_without_defaults_of_the_server_is_one_statement(sm: DatabaseSessionManager) -> None:
    async with sm.session() as session, statements(sm.engine) as sent:
        event = await publish_event(session, "payment.taken", {}, "events", event_class=PaymentTaken, reference="r")
        tenant = await publish_event(session, "nobody.knows", {}, "events", event_class=TenantEvent)
        await publish_event(session, "nobody.knows", {}, "events", event_class=Event)
        assert (event.reference, event.key, event.created_at.tzinfo is None, tenant.tenant_id) == (
            "r",
            None,
            False,
            None,
        )
        assert [text.split()[0] for text in sent] == ["INSERT"] * 3


async def test_a_default_of_the_server_is_loaded_by_the_flush(sm: DatabaseSessionManager) -> None:
    """With a SELECT for each event that leaves the column out; none when it is given."""
    async with sm.session() as session, statements(sm.engine) as sent:
        many = [OrderPlaced(), OrderPlaced(reason="given"), OrderPlacedAgain()]
        session.add_all(many)
        await session.flush()
        assert [each.reason for each in many] == ["none given", "given", "none given"]
        assert sum(each.startswith("SELECT") for each in sent) == 2
        event = await publish_event(session, "order.placed", {}, "events")
        assert isinstance(event, OrderPlaced)
        assert (event.reason, event.attempts, event.order_id) == ("none given", 1, None)
        assert not session.dirty


async def test_inserts_by_statement_fill_the_type(sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.session() as session, session.begin():
        await session.execute(insert(OrderPlaced).values(note="values"))
        await session.execute(insert(OrderPlaced), [{"note": "a"}, {"note": "b"}])
        await session.execute(insert(PaymentTaken), {"reference": "r"})
        connection = await session.connection()
        await connection.execute(insert(OrderPlaced), {"note": "core"})
        await session.run_sync(lambda sync: sync.bulk_save_objects([OrderPlaced(note="saved")]))
    rows = await sql.fetch("SELECT type, count(*) FROM pgebus.events GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in rows] == [("order.placed", 5), ("payment.taken", 1)]


async def test_inserts_that_name_no_class_need_the_type(sm: DatabaseSessionManager) -> None:
    """The guide says so."""

    def mappings(session: Session) -> None:
        session.bulk_insert_mappings(inspect(OrderPlaced), [{"note": "x"}])

    async with sm.session() as session:
        with pytest.raises(IntegrityError):
            await session.execute(insert(Event.__table__).values(note="x"))  # type: ignore[arg-type]  # it is a Table
        await session.rollback()
        with pytest.raises(IntegrityError):
            await session.run_sync(mappings)
        await session.rollback()
        with pytest.raises(IntegrityError):
            await session.execute(insert(TenantEvent).values(tenant_id=1))


async def test_an_insert_that_returns_instances_goes_through_a_select(sm: DatabaseSessionManager) -> None:
    """The discriminator is an expression, which RETURNING does not hold by itself; the guide says how."""
    discriminator = inspect(Event).polymorphic_on
    assert discriminator is not None
    statement = select(OrderPlaced).from_statement(insert(OrderPlaced).returning(*Event.__table__.c, discriminator))
    async with sm.session() as session:
        made = (await session.scalars(statement, [{"note": "a"}, {"note": "b"}])).all()
        assert [(type(each), each.type, each.note) for each in made] == [
            (OrderPlaced, "order.placed", "a"),
            (OrderPlaced, "order.placed", "b"),
        ]
        with pytest.raises(NoSuchColumnError):
            (await session.scalars(insert(OrderPlaced).returning(OrderPlaced), [{"note": "c"}])).all()


async def test_a_batch_is_one_statement_for_each_run_of_a_class(sm: DatabaseSessionManager) -> None:
    """Events keep their order, so interleaved classes cost more statements; the guide says so."""
    async with sm.session() as session, statements(sm.engine) as sent:
        await publish_events(session, [PaymentTaken() for _ in range(50)])
        assert len(sent) == 1
        del sent[:]
        mixed: list[Event] = [
            PaymentTaken(reference="r") if n % 2 else TenantEvent(type="x", tenant_id=1) for n in range(20)
        ]
        await publish_events(session, mixed)
        assert len(sent) > 2
        assert [each.id for each in mixed] == sorted(each.id for each in mixed)


async def test_an_event_whose_type_has_a_class_is_of_that_class(sm: DatabaseSessionManager) -> None:
    """Another one would stay in the session as what it is, and be loaded as what it should have been."""
    async with sm.session() as session:
        for wrong in (Event(type="order.placed"), TenantEvent(type="payment.taken"), Event(type="stock.counted")):
            with pytest.raises(InvalidEventTypeError, match="is loaded as"):
                await publish_events(session, [wrong])
            with pytest.raises(InvalidEventTypeError, match="is loaded as"):
                await publish_events(await session.connection(), [wrong])
            session.add(wrong)
            with pytest.raises(InvalidEventTypeError, match="is loaded as"):
                await session.flush()
            await session.rollback()


async def test_an_sql_expression_is_a_value(sm: DatabaseSessionManager) -> None:
    """It is loaded, in a session and on a connection, alone and among others."""
    async with sm.engine.begin() as connection, sm.session() as session:
        for target in (session, connection):
            event = await publish_event(
                target, "order.placed", {}, "events", event_class=OrderPlaced, attempts=literal(4) + 1, note=null()
            )
            assert (event.attempts, event.note) == (5, None)
            made = [
                OrderPlaced(attempts=literal(1) + n, note="x") if n % 2 else OrderPlaced(note="y") for n in range(5)
            ]
            await publish_events(target, made)
            assert [each.attempts for each in made] == [1, 2, 1, 4, 1]
            assert [each.id for each in made] == sorted(each.id for each in made)


async def test_thousands_of_mixed_classes_are_published_in_their_order(sm: DatabaseSessionManager, sql: Sql) -> None:
    """However they are added: to a session or on a connection, by ourselves or by the application."""

    def mixed() -> list[Event]:
        made: tuple[Any, ...] = (
            lambda n: OrderPlaced(order_id=None, note=str(n), reason="r"),
            lambda n: PaymentTaken(reference=str(n)),
            lambda n: TenantEvent(type="nobody.knows", tenant_id=n),
            lambda n: StockCounted(n),
        )
        return [made[n % 4](n) for n in range(1_200)]

    async with sm.session() as session, session.begin():
        session.add_all(mixed())
    async with sm.session() as session, session.begin():
        await publish_events(session, mixed())
    async with sm.engine.begin() as connection:
        await publish_events(connection, mixed())
    rows = await sql.fetch(
        "SELECT e.type, e.note, e.reference, e.tenant_id FROM pgebus.events e JOIN pgebus.deliveries d"
        " ON d.event_id = e.id AND d.type = e.type ORDER BY e.id"
    )
    expected: list[tuple[Any, ...]] = [
        [
            ("order.placed", str(n), None, None),
            ("payment.taken", None, str(n), None),
            ("nobody.knows", None, None, n),
            ("stock.counted", None, None, None),
        ][n % 4]
        for n in range(1_200)
    ]
    assert [tuple(row) for row in rows] == expected * 3


async def test_a_connection_takes_every_kind_of_column(sm: DatabaseSessionManager, sql: Sql) -> None:
    """What the database and SQLAlchemy fill in comes back with the INSERT: one statement, and nothing is unloaded."""
    await sql.execute("INSERT INTO orders (id, total) VALUES (7, 100)")
    given: dict[str, Any] = {
        "order_id": 7, "came_by": Channel.SHOP, "amount": Decimal("1.50"), "tags": {"a", "b"}, "details": {"x": [1]},
        "weights": [Decimal("0.5")], "share": 0.25, "exact": Decimal("0.1"), "status": "s", "odd": "o", "note": None,
    }  # fmt: skip
    async with sm.engine.begin() as connection:
        async with statements(sm.engine) as sent:
            event = await publish_event(connection, "order.placed", {}, "events", event_class=OrderPlaced, **given)
        assert len(sent) == 1
        assert (event.reason, event.attempts, event.tenant_id, event.until) == ("none given", 1, None, None)
        assert {name: getattr(event, name) for name in given} == given
        with pytest.raises(PublishError, match=r"events\[0\]\.order is a related object"):
            await publish_event(connection, "order.placed", {}, "events", order=Order(id=8))
    async with sm.session() as session:
        loaded = (await session.scalars(select(OrderPlaced))).one()
        assert {name: getattr(loaded, name) for name in given} == given


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
async def test_synchronous_code_publishes_subclasses(database: DatabaseSettings, sql: Sql, driver: str) -> None:
    await sql.execute("INSERT INTO orders (id, total) VALUES (7, 100)")
    engine = create_engine(database.sqlalchemy_url().set(drivername=f"postgresql+{driver}"))
    with Session(engine) as session:
        session.add(OrderPlaced(order_id=7, payload={"n": 1}))
        event = publish_event_sync(session, "order.placed", {}, "events", event_class=OrderPlaced, order_id=7)
        assert (event.reason, event.order) == ("none given", session.get(Order, 7))
        publish_event_sync(session.connection(), "payment.taken", {}, "events", reference="r")
        publish_events_sync(session, [StockCounted(3), TenantEvent(type="nobody.knows", tenant_id=1)])
        session.execute(insert(OrderPlaced), [{"order_id": 7, "note": str(n)} for n in range(2_000)])
        ids = session.scalars(
            insert(OrderPlaced).returning(OrderPlaced.id, sort_by_parameter_order=True), [{"note": "x"}, {"note": "y"}]
        ).all()
        session.commit()
        assert list(session.scalars(select(OrderPlaced.note).where(OrderPlaced.id.in_(ids)))) == ["x", "y"]
    engine.dispose()
    rows = await sql.fetch("SELECT type, count(*) FROM pgebus.deliveries GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("nobody.knows", 1), ("order.placed", 2_004), ("payment.taken", 1), ("stock.counted", 1)
    ]  # fmt: skip


async def test_expired_columns_cannot_be_read_after_the_commit(sm: DatabaseSessionManager) -> None:
    """As for any class; the guide says so."""
    async with AsyncSession(sm.engine) as session:
        event = await publish_event(session, "payment.taken", {}, "events")
        await session.commit()
        with pytest.raises(MissingGreenlet):
            _ = event.id


async def test_the_column_of_a_later_class_is_loaded_by_a_query_that_is_older(
    sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The last test of this file: the column stays in the table of this process."""
    every = select(Event)
    assert await classes(sm, every) == []
    await sql.execute("ALTER TABLE pgebus.events ADD COLUMN newest integer")

    class Newest(Event, event_type="newest"):
        newest: Mapped[int | None]

    async with sm.session() as session, session.begin():
        event = await publish_event(session, "newest", {}, "events", newest=3)
        assert type(event) is Newest
    async with sm.session() as session:
        found = (await session.scalars(every)).one()
        assert isinstance(found, Newest)
        assert found.newest == 3


@pytest.mark.parametrize("count", [3, 200])
async def test_rows_may_give_the_columns_of_their_class(sm: DatabaseSessionManager, count: int) -> None:
    """A class whose columns have defaults goes the ordinary way: COPY would not ask for them."""
    async with sm.session() as session:
        session.add(Order(id=7, total=100))
        ids = await publish_events(
            session,
            [{"type": "order.placed", "payload": {}, "order_id": 7, "tenant_id": n} for n in range(count)],
        )
        found = (await session.scalars(select(OrderPlaced).order_by(OrderPlaced.id))).all()
        assert [(each.id, each.tenant_id) for each in found] == [(id_, n) for n, id_ in enumerate(ids)]
        with pytest.raises(PublishError, match="OrderPlaced takes no 'reference'"):
            await publish_events(session, [{"type": "order.placed", "reference": "r"}])


async def test_a_publisher_gives_columns_of_their_class_and_their_defaults(
    sm: DatabaseSessionManager, database: DatabaseSettings, sql: Sql
) -> None:
    await sql.execute("INSERT INTO orders (id, total) VALUES (7, 100)")
    async with EventPublisher(database) as publisher:
        published = await publisher.publish("order.placed", {}, order_id=7, tenant_id=3)
    async with sm.session() as session:
        event = await session.get_one(OrderPlaced, published.id)
        assert (event.order_id, event.tenant_id) == (7, 3)


@pytest.mark.parametrize("way", ["publisher", "few rows", "many rows", "added"])
async def test_a_publish_middleware_sets_a_column_of_the_class_once(
    sm: DatabaseSessionManager, database: DatabaseSettings, sql: Sql, way: str
) -> None:
    """Also where a default of the class sends it the ordinary way."""
    await sql.execute("INSERT INTO orders (id, total) VALUES (7, 100)")
    passed: list[type[Event]] = []

    def belong(event: Event, call_next: Callable[[Event], None]) -> None:
        passed.append(type(event))
        assert isinstance(event, OrderPlaced)
        event.tenant_id = len(passed)
        call_next(event)

    add_publish_middleware(belong)
    try:
        if way == "publisher":
            async with EventPublisher(database) as publisher:
                await publisher.publish("order.placed", {}, order_id=7)
        else:
            async with sm.session() as session, session.begin():
                if way == "added":
                    session.add(OrderPlaced(order_id=7))
                else:
                    rows = [{"type": "order.placed", "order_id": 7}] * (3 if way == "few rows" else 200)
                    await publish_events(session, rows)
    finally:
        remove_publish_middleware(belong)
    async with sm.session() as session:
        tenants = (await session.scalars(select(OrderPlaced.tenant_id).order_by(OrderPlaced.id))).all()
    assert passed == [OrderPlaced] * len(tenants)
    assert tenants == [number + 1 for number in range(len(tenants))]
    assert len(tenants) == {"few rows": 3, "many rows": 200}.get(way, 1)
