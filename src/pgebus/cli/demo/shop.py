"""The shop: its tables, and what it does when something has happened to an order.

An application like any other; it knows nothing of the demo around it, save that its `ship` is slow the first time.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgebus import Event, EventContext, EventRouter, GuardedSession, publish_event

CHANNEL: Final = "events"


class Base(DeclarativeBase):
    """The tables of the shop; those of pgebus are in a schema of their own."""


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Effect:
    """What a handler has written: for which order, and in which process."""

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    # No unique constraint: nothing but the bus keeps a second row away.
    pid: Mapped[int] = mapped_column(default=os.getpid)


class Invoice(Effect, Base):
    """Written when an order was placed."""

    __tablename__ = "invoices"


class Payment(Effect, Base):
    """Written when an order was paid."""

    __tablename__ = "payments"


class Shipment(Effect, Base):
    """Written when an order was packed."""

    __tablename__ = "shipments"


async def place_order(session: AsyncSession, item: str) -> tuple[Order, Event]:
    """Add an order, and the event that says so, to the transaction of *session*; the caller commits both, or neither.

    This is the transactional outbox: the event is a row next to the order.
    """
    order = Order(item=item)
    session.add(order)
    await session.flush()  # gives the order its id
    event = await publish_event(session, "order.placed", {"order_id": order.id}, CHANNEL)
    return order, event


router = EventRouter(prefix="order")


@router.on("placed", transactional=True)
async def write_invoice(ctx: EventContext, payload: dict[str, Any]) -> None:
    """Write the invoice in the transaction that completes the delivery: neither is ever there without the other."""
    session_of(ctx).add(Invoice(order_id=payload["order_id"]))


@router.on("reminder_due")
async def remind(_ctx: EventContext, _payload: dict[str, Any]) -> None:
    """Send a mail. Not transactional: no transaction is opened, and after a crash it may be sent again."""


@router.on("paid", transactional=True)
async def book_payment(ctx: EventContext, payload: dict[str, Any]) -> None:
    """Book the payment; the bank does not answer the first two times."""
    session_of(ctx).add(Payment(order_id=payload["order_id"]))
    if ctx.attempt <= 2:
        raise ConnectionError("the bank did not answer")


@router.on("address_changed")
async def change_address(_ctx: EventContext, payload: dict[str, Any]) -> None:
    """Fail as often as it is tried: no retry mends bad data."""
    raise ValueError(f"there is no postcode {payload['postcode']!r}")


@router.on("packed", transactional=True)
async def ship(ctx: EventContext, payload: dict[str, Any]) -> None:
    """Write the shipment; the first time there is a minute between that and the end, to be killed in."""
    session = session_of(ctx)
    session.add(Shipment(order_id=payload["order_id"]))
    await session.flush()
    if ctx.attempt == 1:
        await asyncio.sleep(60)


def session_of(ctx: EventContext) -> GuardedSession:
    """Return the session of a transactional handler; all that this adds is certainty for the type checker."""
    if ctx.session is None:
        raise TypeError("The handler is not registered with transactional=True.")
    return ctx.session
