"""Child processes of a test, and a worker in the test's own process that takes over from them.

A child dies with its test: by the fixture, or because its pipe closes when the test run itself is killed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeAlias

from pgebus import DatabaseSettings
from pgebus._runtime.maintenance import Coroner
from tests.system.bus import running
from tests.system.waiting import until
from tests.system.worker_process import Orders, Pipe, Stage, router_for, taking_notes

ParentPipe: TypeAlias = "Connection[str, tuple[str, int]]"

# Processes fork from one that has imported everything: importing costs each of them a second and more.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pgebus", "sqlalchemy.dialects.postgresql.asyncpg"])

BIRTH_SECONDS = 20.0


class Child:
    """A process that this test has started.

    Args:
        target: What it does.
        orders: What it is told.
    """

    def __init__(self, target: Callable[[Pipe, Orders], None], orders: Orders) -> None:
        self._pipe: ParentPipe
        self._pipe, its = _context.Pipe()
        self._process: ForkServerProcess = _context.Process(target=target, args=(its, orders))
        self._process.start()
        its.close()
        self.heard: list[tuple[str, int]] = []
        self._pipe_open = True
        self._loop = asyncio.get_running_loop()
        # All the time: a child whose words nobody takes would stand still when the pipe is full.
        self._loop.add_reader(self._pipe.fileno(), self._listen)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, and to nobody else."""
        assert self.exit_code is None, "it is dead already, and its pid may be another's"
        os.kill(self.pid, number)

    def go(self) -> None:
        """Open its gate."""
        self._pipe.send("go")

    async def says(self, word: str, times: int = 1, within: float = BIRTH_SECONDS) -> list[int]:
        """Wait until it has said *word* so many times; return the event ids that it said it of."""

        async def heard() -> bool:
            assert self._pipe_open or len(self.said(word)) >= times, f"died with {self.exit_code}; said {self.heard}"
            return len(self.said(word)) >= times

        await until(heard, within)
        return self.said(word)

    def said(self, word: str) -> list[int]:
        """Return the event ids of which it was heard to say *word*."""
        return [event_id for said, event_id in self.heard if said == word]

    async def dies(self, within: float = BIRTH_SECONDS) -> int:
        """Wait for its end; return its exit code, negative for a signal."""

        async def dead() -> bool:
            return self.exit_code is not None

        await until(dead, within)
        assert self.exit_code is not None
        return self.exit_code

    async def killed(self) -> None:
        """Kill it with SIGKILL and wait until it is dead."""
        self.signal(signal.SIGKILL)
        assert await self.dies() == -signal.SIGKILL

    def bury(self) -> None:
        """End it, whatever state it is in."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()

    def _listen(self) -> None:
        try:
            while self._pipe.poll():
                self.heard.append(self._pipe.recv())
        except (EOFError, OSError):
            self._pipe_open = False
            self._loop.remove_reader(self._pipe.fileno())


@dataclass
class Inquest:
    """What the coroner in the test's own process has seen.

    Attributes:
        witnessed: Workers whose lock was seen held.
        condemned: Workers that were found dead, once for each look.
        looks: How often it has looked.
    """

    witnessed: set[int] = field(default_factory=set)
    condemned: list[int] = field(default_factory=list)
    looks: int = 0


def watched(inquest: Inquest, *, patient: bool) -> type[Coroner]:
    """Return a coroner that tells *inquest* what it sees; one that is not patient knows no fresh servers."""

    class Watched(Coroner):
        def __init__(self, grace: float) -> None:
            if patient:
                super().__init__(grace)
            else:
                super().__init__(grace, fresh_grace=0.0)

        def blinded(self) -> None:
            super().blinded()
            inquest.witnessed.clear()

        def look(self, owners: list[tuple[int, bool, bool, bool]], now: float) -> list[int]:
            dead = super().look(owners, now)
            inquest.witnessed.update(worker_id for worker_id, alive, *_ in owners if alive)
            inquest.condemned.extend(dead)
            inquest.looks += 1
            return dead

    return Watched


@asynccontextmanager
async def rescuing(
    database: DatabaseSettings,
    *,
    gate_open: bool = True,
    say: Callable[[str, int], None] = lambda *_: None,
    **event_system: Any,
) -> AsyncIterator[Stage]:
    """Run a healthy worker in this process, with the handlers of the children."""
    async with taking_notes(database) as notes:
        stage = Stage(notes, say=say)
        if gate_open:
            stage.gate.set()
        async with running(router_for(stage), database, **event_system):
            yield stage
