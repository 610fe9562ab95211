"""What happens when an order was placed: stock is reserved, then the customer gets a receipt."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import update

from pgebus import EventContext, EventRouter, Reject, publish_event
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
    receipt = {"order_id": order.id, "customer": order.customer, "item": order.item, "quantity": order.quantity}
    await publish_event(ctx.session, "stock.reserved", receipt, ctx.event.channel)


@router.on("stock.reserved")
async def send_receipt(ctx: EventContext, payload: dict[str, Any]) -> None:
    """Send a receipt, at least once.

    No transaction is open while a slow mail server answers. No transaction can take a mail back either, so this may
    happen twice after a crash. The id of the event is the same each time: as the idempotency key of a mail
    service, it makes the second one harmless.
    """
    logger.info(
        "receipt-%d to %s: order %d, %d x %s",
        ctx.event_id,
        payload["customer"],
        payload["order_id"],
        payload["quantity"],
        payload["item"],
    )
