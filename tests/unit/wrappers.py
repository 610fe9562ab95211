"""Decorators as another module would have them: none of a handler's names are known here."""

from __future__ import annotations

import functools
from typing import Any


def named(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(ctx: Any, payload: Any) -> None:
        await function(ctx, payload)

    return wrapper


def renamed(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(context: Any, given: Any) -> None:
        await function(context, given)

    return wrapper


def starred(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> None:
        await function(*args, **kwargs)

    return wrapper


def giving(function: Any) -> Any:
    """The wrapped function takes one more, before the others."""

    @functools.wraps(function)
    async def wrapper(ctx: Any, payload: Any) -> None:
        await function(7, ctx, payload)

    return wrapper
