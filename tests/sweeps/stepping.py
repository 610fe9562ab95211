"""Drives a coroutine from one suspension to the next, and does something to it at the n-th."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, Generic, TypeVar

_T = TypeVar("_T")

NEVER: Final = 1_000_000


class Steps(Generic[_T]):
    """Awaits *coroutine*, and counts its suspensions.

    Args:
        coroutine: Driven by hand.
        strike: Called at each suspension, with its number from 1; an error that it returns is raised there instead.

    Attributes:
        count: Suspensions so far.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, _T], strike: Callable[[int], BaseException | None]) -> None:
        self._coroutine = coroutine
        self._strike = strike
        self.count = 0

    def __await__(self) -> Generator[Any, Any, _T]:
        inner = self._coroutine.__await__()
        resume: Callable[[], Any] = lambda: inner.send(None)  # noqa: E731 - replaced below, for each step
        while True:
            try:
                waited_for = resume()
            except StopIteration as end:
                result: _T = end.value
                return result
            self.count += 1
            if (error := self._strike(self.count)) is not None:
                if waited_for is not None:
                    # The task does not get to see it.
                    waited_for._asyncio_future_blocking = False
                resume = _throwing(inner, error)
                continue
            try:
                yield waited_for
            except BaseException as raised:  # noqa: BLE001 - whatever is thrown into the task belongs to the coroutine
                resume = _throwing(inner, raised)
            else:
                resume = lambda: inner.send(None)  # noqa: E731


def _throwing(inner: Generator[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: inner.throw(error)


async def cancelled_at(number: int, act: Callable[[], Coroutine[Any, Any, object]]) -> int:
    """Run *act* in a task that is cancelled while it waits for the *number*-th time.

    Returns:
        How often it was suspended; fewer than *number* when it came to its end before.

    Raises:
        BaseException: What it raised that is not the cancellation.
    """
    steps = Steps(act(), cancelling(number))
    task = asyncio.get_running_loop().create_task(_run(steps), name="cancelled")
    await asyncio.wait([task], timeout=30)
    assert task.done(), f"does not end when it is cancelled at its await number {number}"
    if not task.cancelled():
        task.result()
    return steps.count


def cancelling(number: int) -> Callable[[int], None]:
    """Return what cancels the current task when it has begun to wait for the *number*-th time."""

    def strike(count: int) -> None:
        if count == number:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)

    return strike


async def _run(steps: Awaitable[object]) -> None:
    await steps
