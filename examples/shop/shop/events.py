"""The events of the shop that have columns of their own.

Imported by the API, by the worker and by Alembic: whoever reads or writes events has to know their classes.
"""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column, relationship

from pgebus import Event
from shop.models import Order


class OrderPlaced(Event, event_type="order.placed"):
    """A customer has placed an order; the foreign key says which, and that it is there."""

    # Optional, because the rows of other events have the column too; indexed, because PostgreSQL looks here whenever
    # an order is deleted.
    order_id: Mapped[int | None] = mapped_column(ForeignKey(Order.__table__.c.id), index=True)
    order: Mapped[Order | None] = relationship(Order)
