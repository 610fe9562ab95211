"""An application's own events. Import it only in tests that run apart: the classes stay for the life of the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    Interval,
    Numeric,
    Text,
    Time,
    event,
    text,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    column_property,
    mapped_column,
    relationship,
)
from sqlalchemy.schema import AddConstraint, CreateColumn, CreateIndex
from sqlalchemy.types import TypeDecorator

from pgebus import Event
from pgebus.inheritance import family


class Base(DeclarativeBase):
    """The application's own."""


class Order(Base):
    """A table of the application."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    total: Mapped[int] = mapped_column(default=0)


class Channel(Enum):
    """How an order came in; stored by its name."""

    WEB = "w"
    SHOP = "s"


class Cents(TypeDecorator[Decimal]):
    """An amount of money, stored as a whole number."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


class Tags(TypeDecorator[set[str]]):
    """A set, stored as JSON."""

    impl = JSONB
    cache_ok = True

    def process_bind_param(self, value: set[str] | None, dialect: Dialect) -> list[str] | None:
        return None if value is None else sorted(value)

    def process_result_value(self, value: list[str] | None, dialect: Dialect) -> set[str] | None:
        return None if value is None else set(value)


class TenantEvent(Event):
    """Every event of this application whose type has no class of its own."""

    tenant_id: Mapped[int | None]


class OrderPlaced(TenantEvent, event_type="order.placed"):
    """With what a column can have."""

    order_id: Mapped[int | None] = mapped_column(ForeignKey(Order.__table__.c.id), index=True)
    note: Mapped[str | None]
    reason: Mapped[str] = mapped_column(server_default="none given")
    attempts: Mapped[int | None] = mapped_column(default=1)
    came_by: Mapped[Channel | None] = mapped_column(EnumType(Channel, native_enum=False, length=10))
    amount: Mapped[Decimal | None] = mapped_column(Cents)
    tags: Mapped[set[str] | None] = mapped_column(Tags)
    details: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    weights: Mapped[list[Decimal] | None] = mapped_column(ARRAY(Numeric))
    share: Mapped[float | None]
    exact: Mapped[Decimal | None]
    until: Mapped[date | None] = mapped_column(Date)
    seen_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    opens: Mapped[time | None] = mapped_column(Time)
    takes: Mapped[timedelta | None] = mapped_column(Interval)
    # Called like something that a claim returns.
    status: Mapped[str | None]
    # Another name in the database, and one that has to be quoted.
    odd: Mapped[str | None] = mapped_column('Odd "name" of a column', Text)
    order: Mapped[Order | None] = relationship(Order)


OrderPlaced.shout = column_property(OrderPlaced.note + "!")
Order.placed = relationship(OrderPlaced, viewonly=True)


class OrderPlacedAgain(OrderPlaced, event_type="order.placed.again"):
    """A subclass of a class with a type."""

    times: Mapped[int | None]


class StockCounted(Event, event_type="stock.counted"):
    """Beside the general class; has a column that another class has too."""

    note: Mapped[str | None] = mapped_column(use_existing_column=True)

    def __init__(self, counted: int) -> None:
        self.payload = {"counted": counted}


class PaymentTaken(MappedAsDataclass, Event, event_type="payment.taken"):
    """A dataclass."""

    reference: Mapped[str | None] = mapped_column(default=None)


def add_columns(connection: Connection) -> None:
    """Do what the application's migration does."""
    Base.metadata.create_all(connection)
    table, dialect = family.table, connection.dialect
    added = [column for column in table.columns if column.key not in family.own_columns]
    for column in added:
        connection.execute(
            text(f"ALTER TABLE pgebus.events ADD COLUMN {CreateColumn(column).compile(dialect=dialect)}")
        )
    for constraint in table.foreign_key_constraints:
        connection.execute(AddConstraint(constraint))
    for index in table.indexes:
        if index.name != "uq_events_dedup_key":
            connection.execute(CreateIndex(index))


@asynccontextmanager
async def statements(engine: AsyncEngine) -> AsyncIterator[list[str]]:
    """Record what is sent to the database inside the block."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine.sync_engine, "before_cursor_execute", note)
