"""The publisher and subclasses of Event. Runs apart, see tests/apart.py."""

from __future__ import annotations

from tests.roles import casting
from tests.subclasses import OrderPlaced, TenantEvent, add_columns
from tests.system.bus import Sql

from pgebus import DatabaseSessionManager, DatabaseSettings, EventPublisher, publish_event, publish_events


async def test_a_publisher_publishes_with_columns_of_its_own(database: DatabaseSettings, sql: Sql) -> None:
    async with DatabaseSessionManager(database) as manager, manager.engine.begin() as connection:
        await connection.run_sync(add_columns)
    await sql.execute("INSERT INTO orders (id, total) VALUES (7, 100)")
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.publisher)
        async with DatabaseSessionManager(login) as manager, manager.session() as session:
            session.add(OrderPlaced(order_id=7, note="added", payload={}))
            await session.flush()
            event = await publish_event(session, "order.placed", {}, "events", order_id=7, dedup_key="k")
            assert isinstance(event, OrderPlaced)
            assert event.reason == "none given"
            await publish_events(session, [TenantEvent(type="a.b", tenant_id=1, payload={}, key="k")])
            await session.commit()
            again = await publish_event(session, "order.placed", {}, "events", dedup_key="k")
            assert isinstance(again, OrderPlaced)
            assert (again.duplicate, again.order_id) == (True, 7)
            await session.rollback()
        async with EventPublisher(login) as publisher:
            await publisher.publish("order.placed", {}, order_id=7)
    rows = await sql.fetch("SELECT order_id, tenant_id, note FROM pgebus.events ORDER BY id")
    assert [tuple(row) for row in rows] == [(7, None, "added"), (7, None, None), (None, 1, None), (7, None, None)]
