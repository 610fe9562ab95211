"""Databases for several benches at once: most of the time of a sweep is waiting."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

import pytest

from tests.conftest import Server
from tests.sweeps.bench import Bench, bench, in_a_hurry
from tests.system.faults import tasks_of_ours

Benches: TypeAlias = Callable[[int], Awaitable[list[Bench]]]

_numbers = itertools.count(1)


@asynccontextmanager
async def _apart(server: Server, template: str) -> AsyncIterator[Bench]:
    name = f"pgebus_sweep_{os.getpid()}_{next(_numbers)}"
    await server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        async with bench(server.settings(name)) as made:
            yield made
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def hurry() -> Iterator[None]:
    """Shorten what the library waits for."""
    with in_a_hurry():
        yield


@pytest.fixture
async def benches(server: Server, template: str, hurry: None) -> AsyncIterator[Benches]:
    """Make benches, each with a database of its own."""
    async with AsyncExitStack() as stack:

        async def make(count: int) -> list[Bench]:
            return [await stack.enter_async_context(_apart(server, template)) for _ in range(count)]

        yield make
    assert not {task.get_name() for task in tasks_of_ours() if not task.done()}
