"""One worker process: imports the program, runs its EventSystem until it is asked to end."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

from pgebus import ConfigurationError, EventRouter, EventSystem, SchemaMismatchError, SystemState
from pgebus.cli.importing import imported, told_with_place
from pgebus.cli.messages import FAILED, MISUSED, database_errors_as_messages, fail, place_of
from pgebus.cli.worker.asking import Asked
from pgebus.cli.worker.logs import set_up_logs
from pgebus.cli.worker.orders import Order

__all__ = ["work"]


def work(order: Order) -> int:
    """Run a worker in this process; return its exit status. Exits with a message when it cannot be started.

    Raises:
        PgebusError: What the program has got wrong, or the tables.
    """
    factory = _loop_factory(order.loop)
    target = imported(order.target, "EventSystem")
    set_up_logs(order.log_level)  # after the import: what the program has set up itself goes before
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_work(order, target))


async def _work(order: Order, target: object) -> int:
    system = await _system(order.target, target)
    if order.groups:
        system.serve(*order.groups)
    database, patience = system.settings.database, system.settings.event_system.shutdown_timeout_seconds
    asked, changed, main = Asked(), asyncio.Event(), asyncio.current_task()
    assert main is not None  # noqa: S101 - for the type checker: this is a coroutine of the loop
    asked.listen(changed.set, patience, order.life)
    ender = asyncio.create_task(_end(system, asked, changed, patience, main))
    try:
        with database_errors_as_messages(database):
            await system.start()
            if order.life is not None:
                with suppress(OSError):  # the supervisor is gone, and that is noticed elsewhere
                    os.write(order.life, b"r")
            await system.wait()
    except SchemaMismatchError as error:
        fail(f"{place_of(database.sqlalchemy_url())}: {error}", FAILED)
    except asyncio.CancelledError:
        if not asked.times:
            raise
    finally:
        ender.cancel()
        await asyncio.wait([ender])
    return asked.status


async def _end(
    system: EventSystem, asked: Asked, changed: asyncio.Event, patience: float, main: asyncio.Task[object]
) -> None:
    """Stop the system as it is asked for, and again when it is asked for again."""
    await changed.wait()
    if system.health().state in (SystemState.NEW, SystemState.STARTING):
        main.cancel()
        return
    changed.clear()
    stopping = asyncio.create_task(_stop(system, patience))
    again = asyncio.create_task(changed.wait())
    try:
        if asked.times < 2:
            await asyncio.wait([stopping, again], return_when=asyncio.FIRST_COMPLETED)
        await _stop(system, 0)
    finally:
        again.cancel()
        stopping.cancel()


async def _stop(system: EventSystem, patience: float) -> None:
    with suppress(Exception):  # what it raises, its waiter hears
        await system.stop(timeout=patience)


async def _system(where: str, target: object) -> EventSystem:
    """Return the system that is meant.

    Raises:
        ConfigurationError: If it is none.
    """
    made = target
    if callable(target) and not isinstance(target, (EventSystem, EventRouter)):
        try:
            made = target()
            if inspect.isawaitable(made):
                made = await made
        except (Exception, SystemExit) as error:
            raise ConfigurationError(f"{where!r} makes no EventSystem: {told_with_place(error)}.") from error
    if isinstance(made, EventSystem):
        return made
    if isinstance(made, EventRouter):
        raise ConfigurationError(
            f"{where!r} is an EventRouter, which knows no database. Write system = EventSystem(router, Settings())."
        )
    how = f"returns {type(made).__name__}" if made is not target else f"is {type(made).__name__}"
    raise ConfigurationError(f"{where!r} {how}. It must be an EventSystem, or a function that returns one.")


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; None: asyncio's own."""
    if name == "asyncio":
        return None
    try:
        uvloop: ModuleType = importlib.import_module("uvloop")
    except ImportError:
        if name == "auto":
            return None
        fail("uvloop is not installed: pip install uvloop, or leave out --loop uvloop.", MISUSED)
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
