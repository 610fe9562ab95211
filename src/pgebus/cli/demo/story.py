"""The six steps: what a shop does with events, and what can happen to them meanwhile.

Each step publishes as an application would, then shows what the database says about it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from time import monotonic

from sqlalchemy import select, text

from pgebus import Event, publish_event
from pgebus.cli.demo.shop import CHANNEL, Invoice, Order, Payment, Shipment, place_order
from pgebus.cli.demo.stage import Stage, require

# A worker that has inserted a shipment and not yet committed it.
SHIPPING = text(
    "SELECT application_name FROM pg_stat_activity "
    "WHERE state = 'idle in transaction' AND query LIKE 'INSERT INTO shipments %'"
)


async def tell(stage: Stage) -> None:
    """Tell the whole story.

    Raises:
        BrokenPromiseError: When something did not go as it has to.
    """
    order_id = await commit_together(stage)
    await roll_back(stage)
    await deliver_later(stage, order_id)
    await fail_twice(stage, order_id)
    await end_dead(stage, order_id)
    await kill_a_worker(stage, order_id)


async def commit_together(stage: Stage) -> int:
    """Publish in the transaction of an order; return the order's id."""
    stage.screen.step("The order and its event are one transaction")
    stage.screen.code(
        "session.add(order)",
        'await publish_event(session, "order.placed", {"order_id": ...}, "events")',
        "await session.commit()",
    )
    async with stage.sessions.session() as session:
        order, event = await place_order(session, "a lamp")
        await session.commit()

    committed = monotonic()
    await stage.delivered(event)
    milliseconds = (monotonic() - committed) * 1000
    invoice = await stage.until(select(Invoice.pid).where(Invoice.order_id == order.id), "An invoice was to be written")
    stage.screen.fact(f"Worker {invoice.pid} had written the invoice {milliseconds:.0f} ms after the commit.")
    stage.screen.say(
        "No crash between two systems can lose the event: it is a row next to the order. The handler is transactional, "
        'so the invoice and the mark "completed" are one commit, too.'
    )
    return order.id


async def roll_back(stage: Stage) -> None:
    """Publish in a transaction that is rolled back."""
    stage.screen.step("Rolled back: it never happened")
    stage.screen.say("The same for order 2, but the card is refused: session.rollback() instead of commit().")
    async with stage.sessions.session() as session:
        order, event = await place_order(session, "a chair")
        order_id, event_id = order.id, event.id
        await session.rollback()  # the card was refused

    orders = await stage.count(Order, Order.id == order_id)
    events = await stage.count(Event, Event.id == event_id)
    require(orders == events == 0, "A rolled back transaction was to leave neither order nor event")
    stage.screen.fact(f"Rows of order {order_id}: {orders}. Rows of its event: {events}. No worker saw anything.")
    stage.screen.say("Nobody gets an invoice for an order that does not exist.")


async def deliver_later(stage: Stage, order_id: int) -> None:
    """Publish an event for later."""
    stage.screen.step("An event for later")
    stage.screen.say("A reminder, committed now, due in 2 seconds. It would survive a restart of everything.")
    async with stage.sessions.session() as session:
        due = datetime.now(UTC) + timedelta(seconds=2)
        event = await publish_event(session, "order.reminder_due", {"order_id": order_id}, CHANNEL, run_at=due)
        await session.commit()

    delivery = await stage.delivered(event)
    late = delivery.finished_at - due
    require(late >= timedelta(0), "A delayed event was not to be handled before its time")
    stage.screen.fact(f"Handled {late / timedelta(milliseconds=1):.0f} ms after it was due, by PostgreSQL's clock.")


async def fail_twice(stage: Stage, order_id: int) -> None:
    """Publish an event whose handler fails twice."""
    stage.screen.step("A handler that fails is tried again")
    stage.screen.say("It inserts a payment, then asks a bank that does not answer the first two times.")
    async with stage.sessions.session() as session:
        event = await publish_event(session, "order.paid", {"order_id": order_id}, CHANNEL)
        await session.commit()

    delivery = await stage.delivered(event)
    for error in delivery.errors:
        stage.screen.fact(f"Attempt {error['attempt']}: {error['type']}: {error['message']}; rolled back.")
    stage.screen.fact(f"Attempt {delivery.attempt}: {delivery.status}.")
    payments = await stage.count(Payment, Payment.order_id == order_id)
    require(payments == 1, "Three attempts were to leave one payment")
    stage.screen.say(
        f"Three attempts have inserted a payment, and the table holds {payments}. The pauses between them grow and are "
        "random: what has failed together does not come back together."
    )


async def end_dead(stage: Stage, order_id: int) -> None:
    """Publish an event that can never be handled."""
    stage.screen.step("What can't be handled is kept, not lost")
    stage.screen.say(
        "A customer has moved to a postcode that does not exist. The bus cannot know that, so it tries as often as it "
        "was told to."
    )
    async with stage.sessions.session() as session:
        payload = {"order_id": order_id, "postcode": "0000X"}
        event = await publish_event(session, "order.address_changed", payload, CHANNEL)
        await session.commit()

    delivery = await stage.delivered(event, "dead")
    error = delivery.errors[-1]
    stage.screen.fact(f"Dead after attempt {delivery.attempt}: {error['type']}: {error['message']}")
    stage.screen.say(
        "It is kept: the event, and for each attempt the handler, the error and the traceback. Meanwhile it blocks "
        "nothing. (Three attempts are this demo's setting; ten are the default.)"
    )


async def kill_a_worker(stage: Stage, order_id: int) -> None:
    """Kill the process that handles an event, and let the other one finish it."""
    stage.screen.step("kill -9 in the middle of a handler")
    stage.screen.say("This one inserts a shipment, and then is slow. One of the two workers runs it:")
    async with stage.sessions.session() as session:
        event = await publish_event(session, "order.packed", {"order_id": order_id}, CHANNEL)
        await session.commit()

    shipping = await stage.until(SHIPPING, "A worker was to begin with the shipment")
    victim = stage.worker(shipping.application_name)
    stage.screen.fact(f"Worker {victim.pid} has inserted the shipment, and has not committed.")
    victim.kill()
    killed = monotonic()
    stage.screen.fact(f"kill -9 {victim.pid}. Its transaction is gone with it; the event is not.")
    stage.screen.say("The other worker misses a lock that only a living process holds, waits 2 s, and takes over.")

    delivery = await stage.delivered(event)
    seconds = monotonic() - killed
    shipments = await stage.count(Shipment, Shipment.order_id == order_id)
    require(shipments == 1, "An event that two processes began was to leave one shipment")
    shipment = await stage.until(select(Shipment.pid), "A shipment was to be written")
    require(shipment.pid != victim.pid, "The shipment was to be written by the process that lives")
    stage.screen.fact(
        f"Worker {shipment.pid} finished it {seconds:.1f} s after the kill, in attempt {delivery.attempt}. "
        f"Shipments: {shipments}."
    )
