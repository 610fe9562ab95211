"""Writes down what became of deliveries: completions in batches, everything else one by one.

Nothing decided is forgotten: an outcome stays here until PostgreSQL has confirmed it, or has said that the lease is
somebody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

import asyncpg

from pgebus._runtime.faults import is_disconnect
from pgebus._runtime.leases import Holdings, Lease
from pgebus._runtime.outcome import (
    Committed,
    Complete,
    DeadLetter,
    Lost,
    Outcome,
    Release,
    Reschedule,
    Unhandle,
)
from pgebus._runtime.store import Store, entry_of
from pgebus.health import LoopHealth

logger = logging.getLogger(__name__)


class Acknowledger:
    """The loop that writes outcomes.

    Args:
        store: Where to, on a connection of its own.
        holdings: The leases that are held; one leaves when its outcome is written.
        settled: Called after each write with the seconds after which one of the deliveries is due again, or None.
        health: Told when a write worked.
    """

    def __init__(
        self, store: Store, holdings: Holdings, settled: Callable[[float | None], None], health: LoopHealth
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._settled = settled
        self._health = health
        self._waiting: list[tuple[Lease, Outcome]] = []
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        # After a lost answer, a row that no longer matches may well be our own earlier write.
        self._uncertain = False

    def put(self, lease: Lease, outcome: Outcome) -> None:
        """Hand over the *outcome* of *lease*."""
        if isinstance(outcome, (Committed, Lost)):
            self._holdings.drop(lease)
            self._settled(None)
            return
        self._waiting.append((lease, outcome))
        self._empty.clear()
        self._arrived.set()

    async def run(self) -> NoReturn:
        """Write outcomes as they come; whatever gathered during one write goes into the next."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            batch, self._waiting = self._waiting, []
            try:
                while batch:
                    await self._write(batch)
            except BaseException as error:
                if isinstance(error, asyncpg.PostgresError) and not is_disconnect(error):
                    batch.append(batch.pop(0))  # what PostgreSQL refuses must not hold up the others
                else:
                    self._uncertain = True
                self._waiting = batch + self._waiting
                self._arrived.set()
                raise
            self._uncertain = False
            self._health.well()
            if not self._waiting:
                self._empty.set()

    async def drained(self, within: float) -> bool:
        """Wait until everything handed over is written, at most *within* seconds; return whether it is."""
        try:
            async with asyncio.timeout(within):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def _write(self, batch: list[tuple[Lease, Outcome]]) -> None:
        """Write part of *batch*, and take out of it what is written."""
        lease, outcome = batch[0]
        worker_id = lease.fence.worker_id
        if isinstance(outcome, (Complete, Release)):
            same = [
                i
                for i, (other, its) in enumerate(batch)
                if type(its) is type(outcome) and other.fence.worker_id == worker_id
            ]
            leases = [batch[i][0] for i in same]
            if isinstance(outcome, Complete):
                kept = await self._store.complete(leases)
                again: float | None = None
            else:
                kept = await self._store.release(lease.fence for lease in leases)
                again = 0.0
            done = set(same)
            batch[:] = [item for i, item in enumerate(batch) if i not in done]
            for each in leases:
                self._written(each, held=each.fence[:2] in kept)
            # A promotion made something of this key claimable.
            self._settled(0.0 if any(each.keyed for each in leases) else again)
            return
        held = await self._write_one(lease, outcome)
        batch.pop(0)
        self._written(lease, held=held)
        if isinstance(outcome, Reschedule):
            self._settled(outcome.delay.total_seconds())
        else:
            self._settled(0.0 if lease.keyed else None)

    async def _write_one(self, lease: Lease, outcome: Outcome) -> bool:
        match outcome:
            case Reschedule(delay=delay, counted=counted, failure=failure, handled=handled):
                entry = entry_of(failure, attempt=lease.attempt, worker_id=lease.fence.worker_id)
                return await self._store.reschedule(
                    lease.fence,
                    delay=delay.total_seconds(),
                    give_back=0 if counted else 1,
                    handled=handled,
                    entry=entry,
                )
            case DeadLetter(failure=failure, handled=handled):
                entry = entry_of(failure, attempt=lease.attempt, worker_id=lease.fence.worker_id)
                return await self._store.bury(lease.fence, handled=handled, entry=entry)
            case Unhandle():
                return await self._store.unhandle(lease.fence)
            case _:
                raise AssertionError(f"{outcome!r} is written elsewhere")

    def _written(self, lease: Lease, *, held: bool) -> None:
        self._holdings.drop(lease)
        if held:
            return
        level = logging.DEBUG if self._uncertain else logging.WARNING
        logger.log(
            level,
            "The lease on event %d for group %r is lost: another worker owns the delivery, or it was finished by hand.",
            lease.fence.event_id,
            lease.fence.group,
            extra={"pgebus_event_id": lease.fence.event_id, "pgebus_group": lease.fence.group},
        )
