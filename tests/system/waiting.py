"""Waiting for a state, in one place: tests never sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic


async def until(check: Callable[[], Awaitable[object]], within: float = 10.0) -> float:
    """Wait until *check* returns something true; return the seconds that it took.

    Raises:
        AssertionError: When it did not within *within* seconds; shows what it returned last.
    """
    began = monotonic()
    while True:
        seen = await check()
        took = monotonic() - began
        if seen:
            return took
        if took > within:
            raise AssertionError(f"not within {within} s; last seen: {seen!r}")
        await asyncio.sleep(0.01)
