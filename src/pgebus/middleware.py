"""What stands around a handler: the middleware of its routers, and the dependencies of its parameters.

It decides nothing about deliveries: whatever comes out of here is the handler's own success or failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pgebus._parameters import check_middleware, shown
from pgebus.context import EventContext
from pgebus.errors import ConfigurationError, MiddlewareError

if TYPE_CHECKING:
    from pgebus.depends import Dependencies

CallNext: TypeAlias = Callable[[EventContext], Awaitable[None]]
HandleMiddleware: TypeAlias = Callable[[EventContext, CallNext], Awaitable[None]]
# Calls the handler, with its dependencies by name.
Innermost: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[object]]

_NONE: Final[Mapping[str, Any]] = {}
_SHAPE: Final = "async def middleware(ctx, call_next)"
# How far `call_next` is.
_WAITING, _RUNNING, _RETURNED, _LATE = range(4)


class Around:
    """What one handler is called through.

    Args:
        middleware: The outermost first.
        dependencies: What is made for each call; None where the handler takes none.
    """

    __slots__ = ("_dependencies", "_middleware")

    def __init__(self, middleware: tuple[HandleMiddleware, ...], dependencies: Dependencies | None) -> None:
        self._middleware = middleware
        self._dependencies = dependencies

    def wrap(self, function: Callable[..., Awaitable[object]]) -> Callable[[EventContext, Any], Awaitable[None]]:
        """Return a coroutine function of the context and the payload that calls *function* through all of it."""

        async def call(ctx: EventContext, payload: Any) -> None:
            await self.run(ctx, payload, lambda given: function(ctx, payload, **given))

        return call

    async def run(self, ctx: EventContext, payload: object, innermost: Innermost) -> None:
        """Call *innermost* through the middleware and with the dependencies.

        Raises:
            MiddlewareError: If a middleware has not called the next one, or not exactly once.
            asyncio.CancelledError: Also when a middleware has swallowed it.
        """
        await _Pass(self, ctx, payload, innermost).run()


class _Pass:
    """One call."""

    __slots__ = ("_around", "_borne", "_cancelled", "_ctx", "_innermost", "_misused", "_payload", "_task")

    def __init__(self, around: Around, ctx: EventContext, payload: object, innermost: Innermost) -> None:
        self._around = around
        self._ctx = ctx
        self._payload = payload
        self._innermost = innermost
        self._task = asyncio.current_task()
        # The cancellations that are nobody's here: from before, or the handler has returned in spite of them.
        self._borne = self._cancellations()
        self._cancelled: asyncio.CancelledError | None = None
        self._misused: MiddlewareError | None = None

    async def run(self) -> None:
        await self._step(0)
        if self._cancelled is not None:
            raise self._cancelled
        self._check_cancelled()
        if self._misused is not None:  # and caught, as by a loop that tries again
            raise self._misused

    async def _step(self, index: int) -> None:
        if index == len(self._around._middleware):
            await self._call()
            return
        middleware = self._around._middleware[index]
        state = _WAITING

        async def call_next(ctx: EventContext) -> None:
            nonlocal state
            if state != _WAITING:
                when = "after it had returned" if state == _LATE else "a second time"
                self._misused = MiddlewareError(
                    f"Middleware {shown(middleware)} called call_next() {when}. It is called once: raise Retry, or let "
                    "the error pass, to have the event handled again."
                )
                raise self._misused
            if ctx is not self._ctx:
                raise MiddlewareError(
                    f"Middleware {shown(middleware)} called call_next() with {type(ctx).__name__[:80]!r} instead of "
                    "the context that it was given. Hand something to the handler with a contextvars.ContextVar."
                )
            state = _RUNNING
            await self._step(index + 1)
            state = _RETURNED

        try:
            await middleware(self._ctx, call_next)
        finally:
            reached, state = state, _LATE
        if reached == _WAITING:
            self._check_cancelled()
            raise MiddlewareError(
                f"Middleware {shown(middleware)} returned without 'await call_next(ctx)', so the handler did not run. "
                "To leave an event unhandled on purpose raise Reject, or Snooze for later."
            )

    async def _call(self) -> None:
        try:
            if self._around._dependencies is None:
                await self._innermost(_NONE)
                self._borne = self._cancellations()
            else:
                await self._around._dependencies.call(self._ctx, self._payload, self._called)
        except asyncio.CancelledError as error:
            self._cancelled = error
            raise

    async def _called(self, given: Mapping[str, Any]) -> None:
        await self._innermost(given)
        self._borne = self._cancellations()

    def _check_cancelled(self) -> None:
        """Go on with a cancellation that a middleware has swallowed."""
        if self._cancellations() > self._borne:
            raise asyncio.CancelledError

    def _cancellations(self) -> int:
        return 0 if self._task is None else self._task.cancelling()


def check_handle_middleware(function: object) -> None:
    """Refuse what cannot be called as `await function(ctx, call_next)`.

    Raises:
        ConfigurationError: If so.
    """
    if not check_middleware(function, _SHAPE):
        raise ConfigurationError(
            f"Middleware {shown(function)} is not 'async def'. Around handlers a middleware is '{_SHAPE}', also for "
            "handlers that are plain functions."
        )
