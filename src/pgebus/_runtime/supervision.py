"""Tasks that live and die together: the only place that creates any.

A loop that fails on the database begins again after a pause; a loop that fails on anything else ends the whole system,
loudly, because nobody knows what it left behind.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, NoReturn
from weakref import WeakSet

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pgebus._runtime.pulse import Pulse

logger = logging.getLogger(__name__)

# What a database, a network or an operator can do to us. All of it may be over in a moment.
DATABASE_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    DBAPIError,
    PoolTimeoutError,
    OSError,
    TimeoutError,
    EOFError,
)

# A loop that has run this long was well again; its next failure starts with a short pause.
_WELL_AFTER_SECONDS: Final = 10.0
_FAILURES_AT_START: Final = 3


@dataclass(slots=True)
class Pause:
    """The pauses between restarts: doubling, with full jitter, so that a fleet doesn't return as one.

    The first one is nothing at all: most losses are one connection's, and the next one works.
    """

    ceiling: float
    first: float = 0.05
    _failures: int = field(default=0, init=False)

    def next(self) -> float:
        """Return how long to wait now, in seconds."""
        self._failures += 1
        if self._failures == 1:
            return 0.0
        bound = min(self.ceiling, self.first * 2.0 ** min(self._failures - 2, 32))
        return random.uniform(bound / 2, bound)  # noqa: S311 - spreads load, protects nothing

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._failures = 0


async def keep_running(
    body: Callable[[], Awaitable[NoReturn]],
    health: Pulse,
    *,
    proven: asyncio.Event,
    longest_pause: float = 5.0,
) -> NoReturn:
    """Run *body*, again and again when the database fails it, for ever.

    Args:
        body: A loop; it never returns.
        health: Told of every failure; *body* itself says when it is well again.
        proven: Set when the system runs. Before that a few failures in a row are final: more likely than not they
            are a mistake in the settings, and somebody waits to hear of it.
        longest_pause: Seconds between two attempts, at most.

    Raises:
        BaseException: Whatever *body* raises that is no database error.
    """
    pause = Pause(longest_pause)
    while True:
        began = monotonic()
        try:
            await body()
        except DATABASE_ERRORS as error:
            if not proven.is_set() and health.failures + 1 >= _FAILURES_AT_START:
                raise
            if monotonic() - began > _WELL_AFTER_SECONDS:
                pause.reset()
            delay = pause.next()
            health.failed(error)
            logger.warning(
                "The %s loop failed on the database (%s); it starts again in %.2f s.",
                health.name,
                health.last_error,
                delay,
                extra={"pgebus_loop": health.name},
            )
            await asyncio.sleep(delay)
        except Exception as error:
            health.failed(error)
            raise


def spawn(coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a task of its own; the caller awaits it."""
    return asyncio.create_task(coroutine, name=name)


async def cancel(task: asyncio.Task[None], within: float) -> bool:
    """Cancel *task* and wait for its end, at most *within* seconds; return whether it ended."""
    task.cancel()
    await asyncio.wait([task], timeout=within)
    return task.done()


class Loops:
    """The loops of one system: as long as it runs, all of them do."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[NoReturn]] = {}

    def start(self, name: str, coroutine: Coroutine[Any, Any, NoReturn]) -> None:
        """Start one."""
        self._tasks[name] = asyncio.create_task(coroutine, name=f"pgebus-{name}")

    def alive(self, name: str) -> bool:
        """Return whether the loop *name* has not failed."""
        return name in self._tasks and not self._tasks[name].done()

    async def until(self, *waits: Coroutine[Any, Any, object]) -> None:
        """Wait until one of *waits* is over.

        Raises:
            BaseException: What a loop raised, as soon as one did.
        """
        waiting = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait([*waiting, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waiting:
                wait.cancel()
        for task in self._tasks.values():
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_name()} should never return")

    async def end(self) -> None:
        """Cancel all of them and wait for their end; what one of them raised before was heard by `until()`."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


_dismissed: WeakSet[asyncio.Task[Any]] = WeakSet()


def is_dismissed(task: asyncio.Task[Any] | None) -> bool:
    """Return whether it was the crew that cancelled *task*, and not the handler's own code."""
    return task in _dismissed


class Crew:
    """The tasks of the deliveries that run now."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start one; it is forgotten when it has ended, and must not raise."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def includes(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether *task* is one of these."""
        return task in self._tasks

    async def wait(self, within: float) -> bool:
        """Wait until none runs, at most *within* seconds; return whether that is so."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within)
        return not self._tasks

    def cancel(self) -> None:
        """Ask all of them to end."""
        for task in tuple(self._tasks):
            _dismissed.add(task)
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("A delivery's task failed outside its handlers: this is a bug in pgebus.", exc_info=error)
