"""The end of the demo: what the database holds, and whether that is what was promised.

It remembers nothing of the steps; every number is read.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import func, select

from pgebus.cli.demo.shop import Base, Invoice, Order, Payment, Shipment
from pgebus.cli.demo.stage import Stage, deliveries, require

EFFECTS: Final[dict[str, type[Base]]] = {"order.placed": Invoice, "order.paid": Payment, "order.packed": Shipment}


class Line(NamedTuple):
    """The deliveries of one event type in one status, and the rows that their handlers wrote."""

    type: str
    status: str
    deliveries: int
    attempts: int
    effects: str


PROMISED: Final = [
    Line("order.placed", "completed", 1, 1, "1 in invoices"),
    Line("order.reminder_due", "completed", 1, 1, "-"),
    Line("order.paid", "completed", 1, 3, "1 in payments"),
    Line("order.address_changed", "dead", 1, 3, "-"),
    Line("order.packed", "completed", 1, 2, "1 in shipments"),
]


async def draw_up(stage: Stage) -> None:
    """Show the balance and check it.

    Raises:
        BrokenPromiseError: If the database holds anything else than was promised.
    """
    lines = await read(stage)
    stage.screen.step("What the database holds in the end")
    stage.screen.table(
        ["Event type", "Status", "Deliveries", "Attempts", "Rows written"],
        [[line.type, line.status, str(line.deliveries), str(line.attempts), line.effects] for line in lines],
    )
    wrong = [line for line in lines if line not in PROMISED] or [line for line in PROMISED if line not in lines]
    require(not wrong, f"The table was to be as promised, but these lines are wrong or missing: {wrong}")
    require(await stage.count(Order) == 1, "One order was to be there: the other one was rolled back")


async def read(stage: Stage) -> list[Line]:
    """Return the lines, in the order in which the events were published."""
    query = (
        select(
            deliveries.c.type,
            deliveries.c.status,
            func.count().label("deliveries"),
            func.sum(deliveries.c.attempt).label("attempts"),
        )
        .group_by(deliveries.c.type, deliveries.c.status)
        .order_by(func.min(deliveries.c.event_id))
    )
    async with stage.sessions.session() as session:
        lines = []
        for row in (await session.execute(query)).all():
            effect = EFFECTS.get(row.type)
            written = "-"
            if effect is not None:
                rows = await session.scalar(select(func.count()).select_from(effect))
                written = f"{rows} in {effect.__tablename__}"
            lines.append(Line(row.type, row.status, row.deliveries, row.attempts, written))
        return lines
