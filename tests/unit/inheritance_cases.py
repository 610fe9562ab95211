"""The rules for defining subclasses of Event. Runs apart, see tests/apart.py."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
from sqlalchemy import ForeignKey, Table, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from tests.subclasses import Order, OrderPlaced, OrderPlacedAgain, PaymentTaken, StockCounted, TenantEvent

from pgebus import (
    ConfigurationError,
    DuplicateHandlerError,
    Event,
    EventRouter,
    InvalidEventTypeError,
    metadata,
)
from pgebus.inheritance import family

TABLE: Table = family.table


def state() -> tuple[object, ...]:
    """What a definition adds to."""
    return (
        TABLE.columns.keys(),
        {str(index.name) for index in TABLE.indexes},
        len(TABLE.constraints),
        len(TABLE.foreign_keys),
        dict(family.classes),
        family.class_of("nobody.knows"),
    )


def test_a_new_event_has_the_type_of_its_class() -> None:
    assert OrderPlaced(order_id=7).type == "order.placed"
    assert OrderPlacedAgain().type == "order.placed.again"
    assert StockCounted(3).type == "stock.counted"
    assert PaymentTaken(reference="r").type == "payment.taken"


def test_a_general_event_has_no_type_of_its_own() -> None:
    assert TenantEvent().type is None
    assert TenantEvent(type="anything").type == "anything"


def test_another_type_than_that_of_the_class_is_refused() -> None:
    with pytest.raises(InvalidEventTypeError) as raised:
        OrderPlaced(type="order.cancelled")
    assert raised.value.value == "order.cancelled"
    event = OrderPlaced()
    with pytest.raises(InvalidEventTypeError):
        event.type = "order.cancelled"
    assert OrderPlaced(type="order.placed").type == "order.placed"


def test_the_checks_of_event_hold_for_subclasses() -> None:
    with pytest.raises(ValueError, match="Payload"):
        OrderPlaced(payload=[1])


def test_types_find_their_classes() -> None:
    assert family.class_of("order.placed") is OrderPlaced
    assert family.class_of("order.placed.again") is OrderPlacedAgain
    assert family.class_of("stock.counted") is StockCounted
    assert family.class_of("nobody.knows") is TenantEvent


def test_a_class_that_is_defined_later_is_found() -> None:
    assert family.class_of("defined.later") is TenantEvent

    class Later(TenantEvent, event_type="defined.later"):
        pass

    assert family.class_of("defined.later") is Later


def test_a_general_class_may_have_a_more_special_one() -> None:
    """Only once in this file: general classes form a line that cannot be taken back."""
    assert family.general_class() is TenantEvent
    compiled = str(select(TenantEvent).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]  # untyped
    assert "ALL" in compiled.upper()

    class StaffEvent(TenantEvent):
        pass

    assert family.class_of("nobody.knows") is StaffEvent
    assert family.foreign_types(frozenset({"*tests.subclasses.TenantEvent"})) == ["payment.taken", "stock.counted"]


def test_a_type_that_is_declared_already_is_refused() -> None:
    before = state()
    with pytest.raises(ConfigurationError, match=r"tests\.subclasses\.OrderPlaced"):

        class Twice(Event, event_type="order.placed"):
            more: Mapped[int | None] = mapped_column(index=True)

    assert state() == before


def test_a_rival_of_the_general_class_is_refused() -> None:
    before = state()
    with pytest.raises(ConfigurationError, match="has no event type"):

        class Rival(Event):
            more: Mapped[int | None]

    assert state() == before


def test_a_general_class_below_a_class_with_a_type_is_refused() -> None:
    before = state()
    with pytest.raises(ConfigurationError):

        class Vague(OrderPlaced):
            pass

    assert state() == before


@pytest.mark.parametrize("event_type", ["", "two words", "*", "a..b", "x" * 256, 7])
def test_an_event_type_that_is_none_is_refused(event_type: Any) -> None:
    before = state()
    with pytest.raises(InvalidEventTypeError):

        class Wrong(Event, event_type=event_type):
            pass

    assert state() == before


def test_a_table_of_its_own_is_refused() -> None:
    before = state()
    with pytest.raises(ConfigurationError, match="__tablename__"):

        class Joined(Event, event_type="joined"):
            __tablename__ = "joined"

    class Named:
        @declared_attr.directive
        @classmethod
        def __tablename__(cls) -> str:
            return cls.__name__.lower()

    with pytest.raises(ConfigurationError, match="__tablename__"):

        class Mixed(Named, Event, event_type="mixed"):
            pass

    assert state() == before
    assert not any(name.endswith(("joined", "mixed")) for name in metadata.tables)


@pytest.mark.parametrize("arguments", [{"polymorphic_identity": "x"}, {"polymorphic_on": "type"}, {"concrete": True}])
def test_polymorphic_options_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="event_type"):
        type("Own", (Event,), {"__mapper_args__": arguments, "__module__": __name__}, event_type="own.arguments")


def test_other_mapper_options_are_kept() -> None:
    class Sealed(TenantEvent, event_type="sealed"):
        __mapper_args__ = {"confirm_deleted_rows": False}  # noqa: RUF012 - as applications write it

    assert not family.classes["sealed"].confirm_deleted_rows
    assert Sealed().type == "sealed"


def test_an_abstract_class_stands_for_nothing() -> None:
    class Audited(TenantEvent):
        __abstract__ = True
        auditor: Mapped[str | None] = mapped_column(use_existing_column=True)

    class One(Audited, event_type="audited.one"):
        pass

    class Two(Audited, event_type="audited.two"):
        pass

    assert (One(auditor="x").type, Two(auditor="y").type) == ("audited.one", "audited.two")
    assert family.class_of("nobody.knows") is not Audited
    with pytest.raises(ConfigurationError, match="abstract"):

        class Typed(Event, event_type="typed"):
            __abstract__ = True


def test_a_class_that_could_not_be_mapped_leaves_nothing_and_can_be_defined_again() -> None:
    """The table is shared: a column left by a failed class would be in every query."""
    before = state()
    with pytest.raises(ArgumentError, match="note"):

        class Clash(Event, event_type="clash"):
            fresh: Mapped[int | None] = mapped_column(ForeignKey(Order.__table__.c.id), index=True)
            note: Mapped[int | None]

    assert state() == before
    gc.collect()  # SQLAlchemy warns of a second class of that name while it knows the first

    class Clash(Event, event_type="clash"):  # type: ignore[no-redef]  # what is being tested
        fresh: Mapped[int | None] = mapped_column(index=True)
        note: Mapped[str | None] = mapped_column(use_existing_column=True)

    assert Clash(fresh=1).type == "clash"
    assert "fresh" in TABLE.columns
    assert "ix_events_fresh" in {index.name for index in TABLE.indexes}


def test_names_of_indexes_and_keys_do_not_hold_the_schema() -> None:
    indexes = {index.name for index in TABLE.indexes}
    assert "ix_events_order_id" in indexes
    assert {key.name for key in TABLE.foreign_key_constraints} == {"fk_events_order_id"}


def test_an_event_can_be_pickled() -> None:
    event = OrderPlaced(order_id=7, payload={"a": 1})
    copy = pickle.loads(pickle.dumps(event))  # noqa: S301 - our own
    assert type(copy) is OrderPlaced
    assert (copy.type, copy.order_id, copy.payload) == ("order.placed", 7, {"a": 1})


# Routing


async def handle(ctx: Any, payload: dict[str, Any]) -> None:
    """Do nothing."""


def test_a_class_stands_for_its_event_type_under_any_prefix() -> None:
    """A class names its full type; a prefix would make it another one."""
    root, shop, orders = EventRouter("root"), EventRouter("shop"), EventRouter("orders")
    orders.on(OrderPlaced)(handle)
    shop.include_router(orders, prefix="v1")
    root.include_router(shop)
    assert [each.pattern for each in root.routes()] == ["order.placed"]
    assert [each.function for each in root.handlers_for("order.placed")] == [handle]


def test_a_class_stands_for_its_own_type_only() -> None:
    router = EventRouter()
    router.on(OrderPlaced)(handle)
    assert router.handlers_for("order.placed.again") == ()


def test_a_class_and_its_type_are_the_same_path() -> None:
    router = EventRouter()
    router.on(OrderPlaced)(handle)
    with pytest.raises(DuplicateHandlerError):
        router.on("order.placed")(handle)
    with pytest.raises(DuplicateHandlerError):
        router.on(OrderPlaced)(handle)


def test_a_router_that_is_included_twice_handles_a_class_once() -> None:
    root, one, two, shared = EventRouter(), EventRouter("one"), EventRouter("two"), EventRouter()
    one.include_router(shared)
    two.include_router(shared)
    root.include_router(one)
    root.include_router(two)
    shared.on(OrderPlaced)(handle)
    shared.on("x")(handle)
    assert [each.pattern for each in root.routes()] == ["order.placed", "one.x", "two.x"]
    other = EventRouter()
    other.include_router(shared, prefix="a")
    other.include_router(shared, prefix="b")
    assert sorted(each.pattern for each in other.routes()) == ["a.x", "b.x", "order.placed"]


def test_a_handler_of_a_class_cannot_be_registered_twice_by_nesting() -> None:
    root, one, two = EventRouter(), EventRouter("one"), EventRouter("two")
    one.on(OrderPlaced)(handle)
    two.on(OrderPlaced)(handle)
    root.include_router(one)
    with pytest.raises(DuplicateHandlerError):
        root.include_router(two)


@pytest.mark.parametrize("path", [Event, TenantEvent, Order, int])
def test_a_class_without_an_event_type_is_no_path(path: Any) -> None:
    with pytest.raises(InvalidEventTypeError):
        EventRouter().on(path)
