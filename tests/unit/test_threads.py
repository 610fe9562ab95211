"""Threads for plain functions: nobody waits for one, and nothing waits for theirs in the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pgebus._runtime.threads import Abandoned, Threads


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    made = Threads()
    yield made
    made.close()


async def test_calls_at_once_have_a_thread_each(threads: Threads) -> None:
    """Each waits for all the others: one that had to wait for a thread would wait for ever."""
    barrier = threading.Barrier(20, timeout=10)
    calls = [threads.call(lambda *_: barrier.wait() and None, None, None) for _ in range(20)]
    assert all([await call.is_over(10) for call in calls])
    assert [call.error for call in calls] == [None] * 20


async def test_a_thread_is_used_again(threads: Threads) -> None:
    seen: set[str] = set()
    for _ in range(20):
        call = threads.call(lambda *_: seen.add(threading.current_thread().name), None, None)
        await call.wait()
    assert seen == {"pgebus-handler-1"}


async def test_a_call_is_over_when_its_function_has_returned(threads: Threads) -> None:
    gate = threading.Event()
    call = threads.call(lambda *_: gate.wait(10) and None, None, None)
    assert not await call.is_over(0.01)
    waiting = asyncio.ensure_future(call.wait())
    for _ in range(3):
        await asyncio.sleep(0)
        waiting.cancel()
    gate.set()
    await waiting
    assert call.error is None
    assert await call.is_over(0)


@pytest.mark.parametrize(
    "error", [StopIteration(1), KeyboardInterrupt(), SystemExit(1), GeneratorExit(), asyncio.CancelledError()]
)
async def test_whatever_a_function_raises_is_kept_and_not_raised(threads: Threads, error: BaseException) -> None:
    def fails(*_: Any) -> None:
        raise error

    call = threads.call(fails, None, None)
    await call.wait()
    assert call.error is error


async def test_what_runs_in_the_end_is_abandoned_and_its_thread_ends_by_itself() -> None:
    threads, gate, found = Threads(), threading.Event(), list[threading.Thread]()

    def waits(*_: Any) -> None:
        found.append(threading.current_thread())
        gate.wait(10)

    idle, running = threads.call(waits, None, None), threads.call(waits, None, None)
    gate.set()
    await idle.wait()
    await running.wait()
    gate.clear()
    running = threads.call(waits, None, None)
    waiting = asyncio.ensure_future(running.wait())
    assert not await running.is_over(0.01)
    threads.close()
    with pytest.raises(Abandoned):
        await waiting
    with pytest.raises(Abandoned):
        await running.is_over(None)
    assert all(thread.daemon for thread in found)
    gate.set()
    for thread in found:
        thread.join(10)
        assert not thread.is_alive()
