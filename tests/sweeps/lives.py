"""The start and the stop of a system, cut at every message."""

from __future__ import annotations

import asyncio
from typing import Final

from pgebus import EventSystem
from tests.sweeps.bench import DRIVER_ERRORS, Bench
from tests.sweeps.conversations import NEVER
from tests.sweeps.cutting import Armed, Cut, Origin

START_ROLES: Final = ("control", "listen")
STOP_ROLES: Final = ("handlers", "writes", "rounds", "listen")
# More than all limits on the way add up to.
_END_SECONDS: Final = 15.0


async def messages_of_a_start(bench: Bench, role: str) -> dict[Origin, list[str]]:
    """Return the names of the messages of a start."""
    armed = bench.proxy.arm(Cut(role, "client", NEVER, "before", "RST"), only_new=True)
    async with bench.system():
        pass
    bench.proxy.heal()
    return armed.trace


async def survive_a_start(bench: Bench, cut: Cut) -> str | None:
    """Start a system whose connection is cut: it starts all the same, or says why not and leaves nothing behind."""
    armed = bench.proxy.arm(cut, only_new=True)
    system: EventSystem | None = bench.system()
    assert system is not None
    try:
        async with asyncio.timeout(_END_SECONDS):
            await system.start()
    except DRIVER_ERRORS:
        system = None
    bench.proxy.heal()
    await bench.publish(order_placed=1, mail_sent=1)
    if system is None:
        await bench.at_rest(None)
        system = bench.system(bench.direct)
        await system.start()
    await bench.finished()
    async with asyncio.timeout(_END_SECONDS):
        await system.stop()
    await bench.at_rest(None)
    return _message(armed)


async def messages_of_a_stop(bench: Bench, role: str) -> dict[Origin, list[str]]:
    """Return the names of the messages of a stop in which a handler is cancelled."""
    armed = await _stop(bench, Cut(role, "client", NEVER, "before", "RST"))
    await _finish(bench, 0)
    return armed.trace


async def survive_a_stop(bench: Bench, cut: Cut) -> str | None:
    """Stop a system whose connection is cut: it ends in time, and another one does the rest."""
    armed = await _stop(bench, cut)
    bench.proxy.heal()
    await bench.at_rest(None)
    await _finish(bench, 1)
    await bench.at_rest(None)
    return _message(armed)


async def _stop(bench: Bench, cut: Cut) -> Armed:
    bench.gate.clear()
    bench.inside.clear()
    system = bench.system()
    await system.start()
    # The line for outcomes has had something to do, so that it is there.
    await bench.publish(mail_sent=1)
    await bench.finished()
    await bench.publish(job_long=1, mail_sent=1)
    await asyncio.wait_for(bench.inside.wait(), 5)
    armed = bench.proxy.arm(cut)
    async with asyncio.timeout(_END_SECONDS):
        await system.stop(wait_for_completion=False)
    return armed


async def _finish(bench: Bench, lost: int) -> None:
    bench.gate.set()
    async with bench.system(bench.direct):
        await bench.finished(lost=lost)


def _message(armed: Armed) -> str | None:
    return armed.message if armed.happened.is_set() else None
