"""What every contender's program shares: its command line, the payload, the count of what was handled.

Only the standard library: the programs run in virtual environments that have nothing else in common. A contender is
run as `python <contender>.py <action> <options as JSON>` and prints one line of JSON at its end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
from collections.abc import Awaitable, Callable
from time import monotonic, perf_counter
from typing import Any

Action = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
# How many handlers run at once, where a library lets one say so.
SLOTS = 10


def payload(number: int) -> dict[str, Any]:
    """Return a payload of about 100 bytes that says which one it is."""
    return {"n": number, "customer": "c-1042", "lines": [{"sku": "a-17", "count": 2}], "note": "thank you, come again"}


def cpu() -> float:
    """Return the seconds of CPU that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mebibytes() -> float:
    """Return the most memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Tally:
    """Counts what a handler is called with; a handler of a benchmark does nothing else.

    Args:
        expected: How many different events there are.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.calls = 0
        self.seen: set[int] = set()
        self.began: dict[int, float] = {}
        self.all_seen = asyncio.Event()
        self.first = 0.0
        self.first_cpu = 0.0

    def count(self, number: int) -> None:
        """Take note of one call."""
        if not self.calls:
            self.first, self.first_cpu = perf_counter(), cpu()
        self.calls += 1
        self.seen.add(number)
        if len(self.seen) == self.expected:
            self.all_seen.set()

    def time(self, number: int) -> None:
        """Take note of one call, and of when it was; the clock is the same in all processes of a machine."""
        self.began.setdefault(number, monotonic())
        self.count(number)

    async def drained(self, unfinished: Callable[[], Awaitable[int]]) -> dict[str, Any]:
        """Wait until everything was handled, and *unfinished* says that it is in the database as well."""
        await self.all_seen.wait()
        while await unfinished():
            await asyncio.sleep(0.005)
        return {
            "seconds": perf_counter() - self.first,
            "cpu": cpu() - self.first_cpu,
            "calls": self.calls,
            "distinct": len(self.seen),
            "peak": peak_mebibytes(),
        }


async def in_parallel(events: int, connections: int, publisher: Callable[[], Any]) -> float:
    """Publish *events*, one after another on each of *connections*; return the seconds.

    Args:
        events: How many.
        connections: How many at the same time.
        publisher: Makes an asynchronous context manager that yields a coroutine function, given a number.
    """
    numbers = iter(range(events))
    open_ = asyncio.Barrier(connections + 1)

    async def publish() -> None:
        async with publisher() as one:
            await open_.wait()
            for number in numbers:
                await one(number)

    tasks = [asyncio.create_task(publish()) for _ in range(connections)]
    await open_.wait()
    began = perf_counter()
    await asyncio.gather(*tasks)
    return perf_counter() - began


async def trickle(events: int, per_second: float, one: Callable[[int], Awaitable[object]]) -> dict[str, Any]:
    """Publish *events* at an even pace; return when each was committed."""
    committed = {}
    start = monotonic()
    for number in range(events):
        await asyncio.sleep(max(0.0, start + number / per_second - monotonic()))
        await one(number)
        committed[number] = monotonic()
    return {"committed": committed}


def ready() -> None:
    """Tell the program that started this one that the worker is running."""
    print("ready", flush=True)


def main(actions: dict[str, Action]) -> None:
    """Run what the command line names."""
    action, options = actions[sys.argv[1]], json.loads(sys.argv[2])
    gc.collect()
    try:
        import uvloop  # where a virtual environment has it, all that it has use it
    except ImportError:
        result = asyncio.run(_run(action, options))
    else:
        result = uvloop.run(_run(action, options))
    print(json.dumps(result or {}), flush=True)


async def _run(action: Action, options: dict[str, Any]) -> dict[str, Any] | None:
    return await action(options)
