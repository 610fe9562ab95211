"""A worker in a process of its own, which is killed at a message."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgebus import DatabaseSettings
from tests.sweeps.bench import Bench, in_a_hurry, system_on
from tests.sweeps.conversations import Conversation, soon
from tests.sweeps.cutting import Cut
from tests.system.processes import Child
from tests.system.worker_process import Orders, Pipe, _listen


def work(parent: Pipe, orders: Orders) -> None:
    """Be a worker until killed."""
    asyncio.run(_work(parent, orders))


async def _work(parent: Pipe, orders: Orders) -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().add_reader(parent.fileno(), _listen, parent, gate)
    with in_a_hurry(patience=10.0):  # it has to begin on a busy machine, and will not live to wait
        async with system_on(DatabaseSettings.model_validate({"url": orders.url}), gate, asyncio.Event()):
            parent.send(("ready", 0))
            await asyncio.Event().wait()


@asynccontextmanager
async def victim(bench: Bench) -> AsyncIterator[Child]:
    """Start a worker that connects through the proxy, and wait until it runs."""
    child = Child(work, Orders(bench.proxy.text_url()))
    try:
        await child.says("ready")
        yield child
    finally:
        child.bury()


async def survive_a_kill(bench: Bench, conversation: Conversation, cut: Cut) -> str | None:
    """Kill a worker once, have another one do the rest, and check; return the message that was cut."""
    async with victim(bench) as child:
        bench.proxy.kill = lambda: child.signal(signal.SIGKILL)
        await bench.publish(order_placed=2, mail_sent=1, order_refused=1)
        await bench.finished()
        armed = await conversation.provoke(bench, cut)
        happened = await soon(bench, conversation, armed.happened)
        if happened:
            assert await child.dies() == -signal.SIGKILL
        bench.proxy.heal()
    await bench.publish(order_placed=1, mail_sent=1)
    async with bench.system(bench.direct):
        await bench.finished(lost=1)
    await bench.at_rest(None)
    return armed.message if happened else None
