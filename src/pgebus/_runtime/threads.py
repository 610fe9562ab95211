"""Where handlers that are plain functions run: threads of our own, one for each call that is running.

A thread can be neither cancelled nor ended from outside. So a call is over when its function has returned, and not
before; only the end of the process waits for none of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from time import monotonic
from typing import Any

from pgebus.errors import InvalidHandlerError


class Abandoned(asyncio.CancelledError):
    """Nobody waits for this call any more, though its thread still runs: the system has ended."""


class Call:
    """A function that runs in a thread, with the context variables of the task that called it.

    Attributes:
        error: What it raised, once it has ended. It is never raised here: a thread may raise what would end the event
            loop, such as KeyboardInterrupt, or what no coroutine can, such as StopIteration.
    """

    def __init__(self, function: Callable[[Any, Any], object], context: object, payload: object) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._arguments = context, payload
        self._variables = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        self.over: asyncio.Future[None] = self._loop.create_future()

    def make(self) -> None:
        """Call the function; in its thread."""
        self._began = monotonic()
        try:
            _check_nothing_awaits(self._function, self._variables.run(self._function, *self._arguments))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is this handler's failure
            self.error = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    async def is_over(self, within: float | None) -> bool:
        """Wait for its end, at most *within* seconds from its beginning; return whether that has come.

        Raises:
            asyncio.CancelledError: When the task was cancelled; the function goes on.
            Abandoned: When the system has ended first.
        """
        while not self.over.done():
            left = within
            if within is not None and self._began is not None:
                left = within - (monotonic() - self._began)
                if left <= 0:
                    return False
            await asyncio.wait([self.over], timeout=left)
        self._check_not_abandoned()
        return True

    async def wait(self) -> None:
        """Wait for its end, however often the task is cancelled meanwhile.

        Raises:
            Abandoned: When the system has ended first.
        """
        while not self.over.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self.over])
        self._check_not_abandoned()

    def _check_not_abandoned(self) -> None:
        if self.over.cancelled():
            raise Abandoned


class Threads:
    """The threads of one system: as many as there are calls at once, kept for the next ones."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._idle: list[_Thread] = []
        self._running: dict[Call, _Thread] = {}

    def call(self, function: Callable[[Any, Any], object], context: object, payload: object) -> Call:
        """Call *function* in a thread that has nothing else to do."""
        thread = self._idle.pop() if self._idle else _Thread(f"pgebus-handler-{next(self._numbers)}")
        call = Call(function, context, payload)
        call.over.add_done_callback(lambda _: self._free(call))
        self._running[call] = thread
        thread.calls.put(call)
        return call

    def close(self) -> None:
        """Abandon what runs, and let the threads end: at once, or when their function returns."""
        for thread in (*self._idle, *self._running.values()):
            thread.calls.put(None)
        self._idle.clear()
        running, self._running = self._running, {}
        for call in running:
            call.over.cancel()

    def _free(self, call: Call) -> None:
        if (thread := self._running.pop(call, None)) is not None:
            self._idle.append(thread)


class _Thread:
    """A thread that makes one call after the other, until it is given None."""

    def __init__(self, name: str) -> None:
        self.calls: SimpleQueue[Call | None] = SimpleQueue()
        # A daemon: the interpreter would wait for any other, however long its function takes.
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            call.make()
            del call  # while it waits, it keeps nothing alive


def _check_nothing_awaits(function: object, returned: object) -> None:
    if not inspect.isawaitable(returned):
        return
    if inspect.iscoroutine(returned):
        returned.close()
    raise InvalidHandlerError(
        f"{getattr(function, '__qualname__', 'The handler')} is a plain function that returned something to be "
        "awaited, so it did nothing. Make it 'async def'."
    )
