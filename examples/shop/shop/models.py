"""The tables of the shop: what it would have without events, too."""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Names for all constraints, so that migrations can drop them.
_NAMING: Final = {
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
}


class Base(DeclarativeBase):
    """The declarative base of the shop."""

    metadata = MetaData(naming_convention=_NAMING)


class Stock(Base):
    """How much of an item can still be reserved."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("available >= 0", name="available"),)

    item: Mapped[str] = mapped_column(primary_key=True)
    available: Mapped[int]


class Order(Base):
    """What a customer wants; `placed` until the worker has reserved it, then `reserved`."""

    __tablename__ = "orders"
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(index=True)
    item: Mapped[str] = mapped_column(ForeignKey(Stock.item))
    quantity: Mapped[int]
    state: Mapped[str] = mapped_column(default="placed")
