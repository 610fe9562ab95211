"""Subclasses of Event in a running system. Runs apart, see tests/apart.py."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import inspect, select
from sqlalchemy.orm import Mapped

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    EventSystem,
    SchemaMismatchError,
    publish_event,
)
from pgebus.inheritance import loaded_columns
from tests.subclasses import (
    Channel,
    Order,
    OrderPlaced,
    OrderPlacedAgain,
    PaymentTaken,
    StockCounted,
    TenantEvent,
    add_columns,
)
from tests.system.bus import Sql, delivery, finished, publish, running, settings
from tests.system.waiting import until

FULL: dict[str, Any] = {
    "order_id": 7,
    "note": "a note",
    "came_by": Channel.SHOP,
    "amount": Decimal("9.99"),
    "tags": {"a", "b"},
    "details": {"n": [1, None]},
    "weights": [Decimal("0.5")],
    "share": 0.25,
    "exact": Decimal("1.10"),
    "until": date(2030, 1, 2),
    "seen_at": datetime(2030, 1, 2, 3, 4, tzinfo=UTC),
    "opens": time(9, 30),
    "takes": timedelta(hours=2),
    "status": "mine",
    "odd": "value",
    "tenant_id": 3,
}


@pytest.fixture(autouse=True)
async def columns(request: pytest.FixtureRequest, sm: DatabaseSessionManager, sql: Sql) -> None:
    if "without_columns" in request.node.name:
        return
    async with sm.engine.begin() as connection:
        await connection.run_sync(add_columns)
    await sql.execute("INSERT INTO orders VALUES (7, 100)")


class Seen(list[Event]):
    """The events that handlers were given."""

    async def see(self, ctx: EventContext, payload: dict[str, Any]) -> None:
        self.append(ctx.event)


def columns_of(event: Event) -> dict[str, Any]:
    return {key: getattr(event, key) for key, _ in loaded_columns(inspect(type(event)))}


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_handler_gets_the_subclass_with_its_columns(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    """With the claim: a column that had to be loaded would raise, in an AsyncSession as without one."""
    seen: list[tuple[type[Event], dict[str, Any]]] = []
    router = EventRouter("not.in.front.of.a.class")

    @router.on(OrderPlaced, transactional=transactional)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert isinstance(ctx.event, OrderPlaced)
        assert not inspect(ctx.event).modified
        assert inspect(ctx.event).persistent is transactional
        seen.append((type(ctx.event), columns_of(ctx.event)))

    async with running(router, database):
        event_id = await publish(sm, "order.placed", {"n": 1}, **FULL)
        await finished(sql, event_id)
    async with sm.session() as session:
        queried = (await session.scalars(select(OrderPlaced))).one()
        assert seen == [(OrderPlaced, columns_of(queried))]
    assert {key: seen[0][1][key] for key in FULL} == FULL
    assert seen[0][1]["reason"] == "none given"


async def test_each_type_comes_as_its_class(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    """Also those that are adopted: they were published before any worker knew their type."""
    early = await publish(sm, "order.placed.again", times=2)
    router, seen = EventRouter(), Seen()
    paths: list[str | type[Event]] = [OrderPlaced, OrderPlacedAgain, StockCounted, PaymentTaken, "nobody.knows"]
    for path in paths:
        router.on(path)(seen.see)
    async with running(router, database):
        await finished(sql, early)
        ids = [
            await publish(sm, "order.placed"),
            await publish(sm, "stock.counted", counted=1),
            await publish(sm, "payment.taken", reference="r"),
            await publish(sm, "nobody.knows", tenant_id=5),
        ]
        await finished(sql, *ids)
    by_id = {event.id: event for event in seen}
    assert [type(by_id[each]) for each in (early, *ids)] == [
        OrderPlacedAgain,
        OrderPlaced,
        StockCounted,
        PaymentTaken,
        TenantEvent,
    ]
    assert columns_of(by_id[early])["times"] == 2
    assert columns_of(by_id[ids[2]])["reference"] == "r"
    assert columns_of(by_id[ids[3]])["tenant_id"] == 5


async def test_a_handler_works_with_its_event_in_its_session(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router = EventRouter()

    @router.on(OrderPlaced, transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        event, session = ctx.event, ctx.session
        assert isinstance(event, OrderPlaced)
        assert session is not None
        await session.refresh(event, ["order"])
        assert isinstance(event.order, Order)
        event.order.total += 1
        again = await publish_event(
            session, "order.placed.again", {}, "events", event_class=OrderPlacedAgain, order=event.order, times=2
        )
        assert (await session.scalars(select(OrderPlaced).where(OrderPlaced.id == event.id))).one() is event
        assert again.headers["causation_id"] == str(event.id)

    async with running(router, database):
        event_id = await publish(sm, "order.placed", order_id=7)
        await finished(sql, event_id)
    assert await sql.fetchval("SELECT total FROM orders") == 101
    row = await sql.fetchrow("SELECT times, order_id FROM pgebus.events WHERE type = 'order.placed.again'")
    assert row is not None
    assert tuple(row) == (2, 7)


async def test_a_value_that_cannot_be_read_costs_its_own_delivery_only(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Claimed together, one of them must not fail the others."""
    router, seen = EventRouter(), Seen()
    router.on(OrderPlaced)(seen.see)
    deep = "[" * 3000 + "]" * 3000
    async with running(router, database, max_attempts=1, n_workers=10):
        rows = await sql.fetch(
            "INSERT INTO pgebus.events (type, note, came_by, details, seen_at, until, opens, takes) VALUES"
            " ('order.placed', 'enum', 'NONE', NULL, NULL, NULL, NULL, NULL),"
            " ('order.placed', 'good', 'WEB', '[1]', 'infinity', NULL, NULL, NULL),"
            " ('order.placed', 'far', NULL, NULL, '20000-01-01', '0044-03-15 BC', '24:00', '4000000 years'),"
            " ('order.placed', 'deep', NULL, $1::text::json, NULL, NULL, NULL, NULL) RETURNING id",
            deep,
        )
        enum, good, far, nested = (row["id"] for row in rows)
        await finished(sql, good, far)
        await finished(sql, enum, status="dead")
        await until(lambda: sql.fetchval("SELECT bool_and(status IN ('completed', 'dead')) FROM pgebus.deliveries"))
    assert (await delivery(sql, enum))["attempt"] == 1
    by_id = {event.id: columns_of(event) for event in seen}
    assert by_id[good]["seen_at"].year == 9999
    assert [by_id[far][key] for key in ("seen_at", "until", "opens", "takes")] == [None] * 4
    assert nested not in by_id or by_id[nested]["details"]


async def test_a_class_may_be_defined_while_the_system_runs(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    router, seen = EventRouter(), Seen()
    router.on("late.comer")(seen.see)
    async with running(router, database):
        before = await publish(sm, "late.comer", tenant_id=1)
        await finished(sql, before)
        await sql.execute("ALTER TABLE pgebus.events ADD COLUMN late integer")

        class LateComer(TenantEvent, event_type="late.comer"):
            late: Mapped[int | None]

        # By hand: in this process nothing but the worker has used the class yet.
        after = await sql.fetchval("INSERT INTO pgebus.events (type, late) VALUES ('late.comer', 7) RETURNING id")
        await finished(sql, after)
    assert [type(event) for event in seen] == [TenantEvent, LateComer]
    assert isinstance(seen[1], LateComer)
    assert seen[1].late == 7
    # Tests that come later have databases without it, as if it had not been migrated.
    await sql.execute("ALTER TABLE pgebus.events DROP COLUMN late")
    with pytest.raises(SchemaMismatchError, match="late"):
        await EventSystem(router, settings(database)).start()


async def test_a_start_without_columns_is_refused(database: DatabaseSettings) -> None:
    """Nothing could be claimed; the message names what is missing, and what to do."""
    with pytest.raises(SchemaMismatchError, match=r"order_id.*migrations"):
        async with asyncio.timeout(30):
            await EventSystem(EventRouter(), settings(database)).start()
