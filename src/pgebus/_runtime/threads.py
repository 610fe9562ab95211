"""Where handlers that are plain functions run: threads of our own, so that nobody else can use them up.

A thread cannot be cancelled: what has timed out, or runs when the system stops, goes on to its end.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pgebus.errors import InvalidHandlerError


class Threads:
    """A pool of threads, made when the first plain function is called.

    Args:
        count: How many run at once.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[[Any, Any], object], context: object, payload: object) -> None:
        """Call *function* in a thread, with the context variables of this task.

        Raises:
            InvalidHandlerError: If it returned something to be awaited, which nobody would do.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="pgebus-handler")
        variables = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        returned = await loop.run_in_executor(self._pool, variables.run, function, context, payload)
        if inspect.isawaitable(returned):
            if inspect.iscoroutine(returned):
                returned.close()
            raise InvalidHandlerError(
                f"{getattr(function, '__qualname__', 'The handler')} is a plain function that returned something to be "
                "awaited, so it did nothing. Make it 'async def'."
            )

    def close(self) -> None:
        """Start nothing more; what runs is not waited for."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
