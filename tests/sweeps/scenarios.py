"""What is cancelled at each of its awaits: public coroutines, each with what has to be true afterwards.

A scenario yields the coroutine function to cancel; what follows uses the same objects again, and closes them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgebus import DatabaseSessionManager, Event, EventPublisher, EventSystem, publish_event, publish_events
from pgebus.drift import find_drift
from pgebus.operations import (
    blocked_keys,
    limit_group,
    list_groups,
    pause_group,
    resume_group,
)
from tests.sweeps.bench import Bench

Act: TypeAlias = Callable[[], Coroutine[Any, Any, object]]
Scenario: TypeAlias = Callable[[Bench], AbstractAsyncContextManager[Act]]
Work: TypeAlias = Callable[[AsyncSession, int], Awaitable[object]]

_numbers = itertools.count(1)


def _unused(engine: AsyncEngine) -> None:
    assert "Current Checked out connections: 0" in engine.sync_engine.pool.status()


def transaction(work: Work) -> Scenario:
    """Return a scenario that writes an order and does *work* in one transaction, on new and on kept connections."""

    @asynccontextmanager
    async def scenario(bench: Bench) -> AsyncIterator[Act]:
        async with DatabaseSessionManager(bench.direct) as manager:

            async def act() -> None:
                number = next(_numbers)
                async with manager.session() as session:
                    await session.execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})
                    await work(session, number)
                    await session.commit()

            yield act
            _unused(manager.engine)
            await act()
            _unused(manager.engine)

    return scenario


async def _publish(session: AsyncSession, number: int) -> None:
    await publish_event(session, "order.placed", {"number": number}, "events")


async def _publish_once(session: AsyncSession, number: int) -> None:
    await publish_event(session, "order.placed", {"number": number}, "events", dedup_key=str(number))


async def _publish_some(session: AsyncSession, number: int) -> None:
    await publish_events(session, [Event(type="order.placed", payload={"number": number}), Event(type="mail.sent")])


async def _publish_many(session: AsyncSession, number: int) -> None:
    rows = [{"type": "mail.sent", "payload": {}} for _ in range(2_000)]
    await publish_events(session, [{"type": "order.placed", "payload": {"number": number}}, *rows])


def operation(call: Callable[[AsyncSession], Awaitable[object]]) -> Scenario:
    """Return a scenario that does *call* in a transaction of its own."""

    async def work(session: AsyncSession, number: int) -> None:
        await _publish(session, number)
        await call(session)

    return transaction(work)


@asynccontextmanager
async def _publisher(bench: Bench) -> AsyncIterator[Act]:
    async with EventPublisher(bench.direct, connections=1) as publisher:

        async def act() -> None:
            for _ in range(2):
                await publisher.publish("mail.sent", {})
            await publisher.publish("mail.sent", {}, dedup_key=str(next(_numbers)))

        yield act
        await asyncio.wait_for(act(), 10)


@asynccontextmanager
async def _close_publisher(bench: Bench) -> AsyncIterator[Act]:
    publisher = EventPublisher(bench.direct, connections=2)
    await asyncio.gather(publisher.publish("mail.sent", {}), publisher.publish("mail.sent", {}))
    yield publisher.close
    await publisher.close()


@asynccontextmanager
async def _close_manager(bench: Bench) -> AsyncIterator[Act]:
    manager = DatabaseSessionManager(bench.direct)
    session, other = manager.session(), manager.session()
    await session.execute(text("INSERT INTO orders VALUES (0)"))
    await other.execute(text("SELECT 1"))
    yield manager.close
    await manager.close()
    for each in (session, other):
        await each.close()


@asynccontextmanager
async def _start(bench: Bench) -> AsyncIterator[Act]:
    system = bench.system(bench.direct)
    yield system.start
    await asyncio.wait_for(system.stop(), 10)


@asynccontextmanager
async def _stop(bench: Bench) -> AsyncIterator[Act]:
    system = bench.system(bench.direct)
    await system.start()
    await bench.publish(order_placed=1, mail_sent=1)
    yield system.stop
    await asyncio.wait_for(system.stop(), 10)


def living(live: Callable[[EventSystem], Coroutine[Any, Any, object]]) -> Scenario:
    """Return a scenario in which a system lives for a moment, with something to do."""

    @asynccontextmanager
    async def scenario(bench: Bench) -> AsyncIterator[Act]:
        system = bench.system(bench.direct)
        bench.inside.clear()
        bench.gate.clear()
        await bench.publish(job_long=1, mail_sent=1)

        async def act() -> None:
            await live(system)

        async def open_gate() -> None:
            await bench.inside.wait()
            bench.gate.set()

        opening = asyncio.ensure_future(open_gate())
        yield act
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
        bench.gate.set()
        await asyncio.wait_for(system.stop(), 10)

    return scenario


async def _inside(system: EventSystem) -> None:
    async with system:
        pass


async def _run(system: EventSystem) -> None:
    asyncio.get_running_loop().call_later(0.2, asyncio.ensure_future, _stop_soon(system))
    await system.run()


async def _stop_soon(system: EventSystem) -> None:
    await system.stop()


@asynccontextmanager
async def _find_drift(bench: Bench) -> AsyncIterator[Act]:
    async def act() -> None:
        assert not await find_drift(bench.direct)

    yield act


SCENARIOS: Final[dict[str, Scenario]] = {
    "publish_event": transaction(_publish),
    "publish_event, once": transaction(_publish_once),
    "publish_events": transaction(_publish_some),
    "publish_events, COPY": transaction(_publish_many),
    "list_groups": operation(list_groups),
    "blocked_keys": operation(blocked_keys),
    "pause_group": operation(lambda session: pause_group(session, "spare")),
    "resume_group": operation(lambda session: resume_group(session, "spare")),
    "limit_group": operation(lambda session: limit_group(session, "spare", 3)),
    "EventPublisher.publish": _publisher,
    "EventPublisher.close": _close_publisher,
    "DatabaseSessionManager.close": _close_manager,
    "EventSystem.start": _start,
    "EventSystem.stop": _stop,
    "EventSystem, async with": living(_inside),
    "EventSystem.run": living(_run),
    "find_drift": _find_drift,
}
