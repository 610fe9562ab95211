"""The HTTP side: takes orders and tells their state. It publishes, and handles no event."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from sqlalchemy import func, select

from shop.database import Session, connected
from shop.events import OrderPlaced
from shop.models import Order, Stock

LIMIT: Final = 50

app = FastAPI(title="shop", lifespan=connected)


class NewOrder(BaseModel):
    """What a customer sends."""

    customer: str
    item: str
    quantity: PositiveInt


class OrderView(BaseModel):
    """What a customer sees."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    item: str
    quantity: int
    state: str


class StockLevel(BaseModel):
    """How much of an item there is."""

    model_config = ConfigDict(from_attributes=True)

    available: NonNegativeInt


@app.post("/orders", status_code=201)
async def place_order(new: NewOrder, session: Session) -> OrderView:
    """Store an order and publish that it was placed, in one transaction: both are there, or neither."""
    if await session.get(Stock, new.item) is None:
        raise HTTPException(404, "no such item")
    order = Order(customer=new.customer, item=new.item, quantity=new.quantity)
    session.add(OrderPlaced(order=order))
    # The query flushes both rows first, so it counts this order too. Raising leaves without a commit, and nobody
    # will ever see the order or the event.
    ordered = select(func.sum(Order.quantity)).where(Order.customer == new.customer, Order.item == new.item)
    if (await session.scalars(ordered)).one() > LIMIT:
        raise HTTPException(409, f"no more than {LIMIT} of an item for each customer")
    await session.commit()
    return OrderView.model_validate(order)


@app.get("/orders/{order_id}")
async def show_order(order_id: int, session: Session) -> OrderView:
    """Show how far an order is."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "no such order")
    return OrderView.model_validate(order)


@app.put("/stock/{item}")
async def fill_stock(item: str, level: StockLevel, session: Session) -> StockLevel:
    """Say how much of an item there is now."""
    await session.merge(Stock(item=item, available=level.available))
    await session.commit()
    return level


@app.get("/stock/{item}")
async def show_stock(item: str, session: Session) -> StockLevel:
    """Show how much of an item can still be reserved."""
    stock = await session.get(Stock, item)
    if stock is None:
        raise HTTPException(404, "no such item")
    return StockLevel.model_validate(stock)
