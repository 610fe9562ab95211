"""What happens when an order was placed: stock is reserved, then the customer gets a receipt."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import update

from pgebus import EventContext, EventRouter, Group, Reject
from shop.events import OrderPlaced
from shop.models import Order, Stock

logger = logging.getLogger(__name__)

router = EventRouter()


@router.on(OrderPlaced, transactional=True)
async def reserve_stock(ctx: EventContext, _payload: dict[str, Any]) -> None:
    """Take the order's quantity out of the stock, exactly once.

    The stock, the state of the order, the next event and the completion of this one commit together. It may run
    again after a crash, but then nothing of the earlier run is there.
    """
    assert ctx.session is not None
    assert isinstance(ctx.event, OrderPlaced)
    order = await ctx.session.get_one(Order, ctx.event.order_id)
    reserved = await ctx.session.scalar(
        update(Stock)
        .where(Stock.item == order.item, Stock.available >= order.quantity)
        .values(available=Stock.available - order.quantity)
        .returning(Stock.item)
    )
    if reserved is None:
        # Trying again would not help. The delivery is dead until somebody decides, and the order stays `placed`.
        raise Reject(f"not enough {order.item} in stock for order {order.id}")
    order.state = "reserved"
    receipt = Receipt(order_id=order.id, customer=order.customer, item=order.item, quantity=order.quantity)
    await ctx.publish("stock.reserved", receipt)


class Receipt(BaseModel):
    """The payload of `stock.reserved`."""

    order_id: int
    customer: str
    item: str
    quantity: int


@router.on("stock.*", group=Group("mail", max_running=2), timeout=timedelta(seconds=30))
async def send_receipt(ctx: EventContext, receipt: Receipt) -> None:
    """Send a receipt, at least once.

    In a consumer group of its own: whatever else is done about these events is none of its business, and the mail
    server gets two at a time, however many workers there are. No transaction is open while it answers. No transaction
    can take a mail back either, so this may happen twice after a crash. The id of the event is the same each time: as
    the idempotency key of a mail service, it makes the second one harmless.
    """
    logger.info(
        "receipt-%d to %s: order %d, %d x %s",
        ctx.event_id,
        receipt.customer,
        receipt.order_id,
        receipt.quantity,
        receipt.item,
    )
