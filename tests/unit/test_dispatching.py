"""One delivery without a database: what is decided about handlers that run in threads."""

from __future__ import annotations

import asyncio
import threading
from random import Random
from typing import Any, cast

import pytest

from pgebus import EventContext, EventRouter, RetryPolicy
from pgebus._runtime.dispatching import Dispatcher
from pgebus._runtime.leases import Fence, Lease
from pgebus._runtime.outcome import Complete, Lost, Outcome, Unhandle
from pgebus._runtime.supervision import Crew
from pgebus._runtime.threads import Threads
from pgebus._runtime.transacting import Transactions

ROW = {"id": 1, "payload": "{}", "headers": "{}", "channel": "events"}


def dispatcher(router: EventRouter, threads: Threads) -> Dispatcher:
    """Return one that opens no transaction and publishes nothing."""
    nothing = cast("Any", None)
    return Dispatcher(
        router,
        Transactions(nothing, nothing, isolation_level="READ COMMITTED", rng=Random(1)),
        policy=RetryPolicy(),
        rng=Random(1),
        threads=threads,
        own=nothing,
    )


async def test_a_type_that_nobody_here_knows_is_left_to_others() -> None:
    router, threads = EventRouter(), Threads()
    lease = Lease(Fence(1, "default", 1, 1), "unknown", False, 1, 0, (), cast("Any", ROW))
    assert await dispatcher(router, threads).dispatch(lease) == Unhandle()
    threads.close()


@pytest.mark.parametrize("abandoned", [True, False])
async def test_a_delivery_that_was_abandoned_with_its_thread_is_left_as_it_is(abandoned: bool) -> None:
    """The system has ended, and the function has not: nothing is known about it, and nothing may be written."""
    router, threads, crew = EventRouter(), Threads(), Crew()
    gate, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    outcomes: list[Outcome] = []

    @router.on("a")
    def slow(ctx: EventContext, payload: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(started.set)
        gate.wait(10)

    async def work() -> None:
        lease = Lease(Fence(1, "default", 1, 1), "a", False, 1, 0, (), cast("Any", ROW))
        outcomes.append(await dispatcher(router, threads).dispatch(lease))

    crew.start(work(), "test")
    await started.wait()
    crew.cancel()
    await asyncio.sleep(0)
    assert len(crew) == 1
    if abandoned:
        threads.close()
    else:
        gate.set()
    assert await crew.wait(10)
    assert outcomes == [Lost() if abandoned else Complete()]
    gate.set()
    threads.close()
