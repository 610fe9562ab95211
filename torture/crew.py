"""The processes: started, killed, and started again, until they are told to stop."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from time import monotonic
from typing import Any, Final, TypeAlias

from torture.publishing import Errand, publish
from torture.tally import Tally
from torture.working import STOP_SECONDS, Duty, work

ParentPipe: TypeAlias = "Connection[str, str]"

# They fork from one that has imported everything: importing would cost each of them a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torture.working", "torture.publishing", "sqlalchemy.dialects.postgresql.asyncpg"])

BIRTH_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.05


class Child:
    """A process, and whoever takes its place.

    Attributes:
        lives: How many there have been.
        endings: How they ended: exit codes, negative for signals.
        frozen: Whether it is stopped by SIGSTOP.
        expected: Whether its end is meant.
    """

    def __init__(self, target: Callable[[Any, Any], None], orders: Any) -> None:
        self.lives = 0
        self.endings: list[int] = []
        self.frozen = False
        self.expected = False
        self._target = target
        self._orders = orders
        self._process: ForkServerProcess | None = None
        self._pipe: ParentPipe | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def ready(self) -> bool:
        """Whether it has said so."""
        return self.alive and self._pipe is not None and self._pipe.poll()

    def begin(self) -> None:
        """Start it."""
        self._pipe, its = _context.Pipe()
        self._process = _context.Process(target=self._target, args=(its, self._orders))
        self._process.start()
        its.close()
        self.lives += 1
        self.frozen = self.expected = False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, and to nobody else."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is dead."""
        self.expected = True
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def bury(self) -> int | None:
        """Take note of its end, if it has ended; return how."""
        if self._process is None or self._process.exitcode is None:
            return None
        code = self._process.exitcode
        self._process.close()
        assert self._pipe is not None
        self._pipe.close()
        self._process = self._pipe = None
        self.endings.append(code)
        return code


class Crew:
    """All workers and publishers.

    Args:
        duties: For each worker.
        errands: For each publisher.
        tally: What workers count.

    Attributes:
        slow_stops: Workers that a SIGTERM did not end in time.
        stop_seconds: How long each graceful stop took.
        unexpected: Ends that nobody had ordered, by exit code.
    """

    def __init__(self, duties: Sequence[Duty], errands: Sequence[Errand], tally: Tally) -> None:
        self.workers = [Child(work, duty) for duty in duties]
        self.publishers = [Child(publish, errand) for errand in errands]
        self.slow_stops = 0
        self.stop_seconds: list[float] = []
        self.unexpected: Counter[int] = Counter()
        self._tally = tally
        self._hiring = True
        self._finished: set[int] = set()

    async def begin(self) -> None:
        """Start the workers, and wait until they work."""
        for child in self.workers:
            child.begin()
        async with asyncio.timeout(BIRTH_SECONDS):
            while not all(child.ready for child in self.workers):
                await asyncio.sleep(_LOOK_SECONDS)

    async def run(self) -> None:
        """Start the publishers, and whoever has died again; until all publishers are done."""
        for child in self.publishers:
            child.begin()
        while len(self._finished) < len(self.publishers):
            self._replace()
            await asyncio.sleep(_LOOK_SECONDS)

    async def keep(self) -> None:
        """Replace workers that die, until cancelled."""
        while True:
            self._replace()
            await asyncio.sleep(_LOOK_SECONDS)

    def _replace(self) -> None:
        for slot, child in enumerate(self.workers):
            expected = child.expected
            code = child.bury()
            if code is None:
                continue
            self._tally.settle(slot)
            if not expected:
                self.unexpected[code] += 1
            child.begin()
        for number, child in enumerate(self.publishers):
            code = child.bury()
            if code == 0:
                self._finished.add(number)
            elif code == -signal.SIGKILL:
                child.begin()
            elif code is not None:
                raise RuntimeError(f"Publisher {number + 1} ended with {code}; its log says why.")

    async def stop_one(self, child: Child) -> bool:
        """Ask a worker to stop, with SIGTERM; return whether it did, in time and without a complaint."""
        process, began = child._process, monotonic()
        if process is None or child.frozen or child.expected:
            return False
        child.expected = True
        child.signal(signal.SIGTERM)
        limit = STOP_SECONDS + 10
        while monotonic() - began < limit:
            if child._process is not process or process.exitcode is not None:
                self.stop_seconds.append(monotonic() - began)
                return (child.endings[-1] if child._process is not process else process.exitcode) == 0
            await asyncio.sleep(_LOOK_SECONDS)
        self.slow_stops += 1
        child.kill()
        return False

    async def stop(self) -> list[int]:
        """Stop all workers gracefully; return their exit codes."""
        await asyncio.gather(*(self.stop_one(child) for child in self.workers))
        codes = [child.bury() for child in self.workers]
        return [-1 if code is None else code for code in codes]

    def end(self) -> None:
        """End whoever is left, whatever state it is in."""
        for child in (*self.workers, *self.publishers):
            child.kill()
            child.bury()
