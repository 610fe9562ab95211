"""What every step of the demo needs: the screen, sessions, the worker processes, and a way to wait for a state.

Waiting is looking: the demo sees of the workers only what the database says.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from sqlalchemy import ColumnElement, Executable, Row, func, select

from pgebus import DatabaseSessionManager, Event, metadata
from pgebus.cli.demo.crew import WorkerProcess
from pgebus.cli.demo.screen import Screen

deliveries: Final = metadata.tables["pgebus.deliveries"]

PATIENCE_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.01


class BrokenPromiseError(Exception):
    """Something that the demo promises did not happen."""


@dataclass(frozen=True)
class Stage:
    """What the steps share."""

    screen: Screen
    sessions: DatabaseSessionManager
    workers: list[WorkerProcess]

    def worker(self, name: str) -> WorkerProcess:
        """Return the worker process of that name."""
        return next(worker for worker in self.workers if worker.name == name)

    async def look(self, query: Executable) -> Row[Any] | None:
        """Return the row of *query*, or None; in a transaction of its own."""
        async with self.sessions.session() as session:
            return (await session.execute(query)).one_or_none()

    async def count(self, entity: type[object], *where: ColumnElement[bool]) -> int:
        """Return how many rows of *entity* are there."""
        row = await self.look(select(func.count()).select_from(entity).where(*where))
        return 0 if row is None else int(row[0])

    async def until(self, query: Executable, promise: str) -> Row[Any]:
        """Wait until *query* finds a row, and return that.

        Raises:
            BrokenPromiseError: With *promise*, when there is none after 20 seconds.
        """
        deadline = monotonic() + PATIENCE_SECONDS
        while (row := await self.look(query)) is None:
            if monotonic() > deadline:
                raise BrokenPromiseError(f"{promise}, but that did not happen within {PATIENCE_SECONDS:.0f} s")
            await asyncio.sleep(_LOOK_SECONDS)
        return row

    async def delivered(self, event: Event, status: str = "completed") -> Row[Any]:
        """Wait until the delivery of *event* has *status*, and return its row."""
        query = select(deliveries).where(deliveries.c.event_id == event.id, deliveries.c.status == status)
        return await self.until(query, f"The delivery of {event.type!r} was to be {status}")


def require(held: bool, promise: str) -> None:
    """Go on only when a promise was kept.

    Raises:
        BrokenPromiseError: With *promise*, when it was not.
    """
    if not held:
        raise BrokenPromiseError(promise)
