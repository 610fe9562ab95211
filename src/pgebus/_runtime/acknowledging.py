"""Writes down what became of deliveries: completions in batches, everything else one by one.

Nothing decided is forgotten: an outcome stays here until PostgreSQL has confirmed it, or has said that the lease is
somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NoReturn

import asyncpg

from pgebus._runtime.faults import is_disconnect, is_refusal
from pgebus._runtime.leases import Fence, Holdings, Lease
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
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.store import Store, entry_of

logger = logging.getLogger(__name__)

# How soon a row that somebody else has locked is tried again.
LOCKED_SECONDS: Final = 0.25


def _as_it_is(outcome: Outcome) -> Outcome:
    return outcome


def _in_ascii(outcome: Outcome) -> Outcome:
    """Say the same in ASCII: the database's encoding may not have the characters of the message."""
    if isinstance(outcome, (Reschedule, DeadLetter)) and outcome.failure is not None:
        return replace(outcome, failure=outcome.failure.in_ascii())
    return outcome


# What is tried after each refusal.
_PLAINER: Final = (_as_it_is, _in_ascii, _as_it_is)


class Acknowledger:
    """The loop that writes outcomes.

    Args:
        store: Where to, on a connection of its own.
        holdings: The leases that are held; one leaves when its outcome is written.
        settled: Called after each write with the seconds after which one of the deliveries is due again, or None.
        health: Told when a write worked.
        forgets: Returns whether a group keeps no history.
    """

    def __init__(
        self,
        store: Store,
        holdings: Holdings,
        settled: Callable[[float | None], None],
        health: Pulse,
        *,
        forgets: Callable[[str], bool] = lambda _group: False,
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._settled = settled
        self._health = health
        self._forgets = forgets
        self._waiting: list[tuple[Lease, Outcome]] = []
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        # After a lost answer, a row that no longer matches may well be our own earlier write.
        self._uncertain = False
        self._locked: list[tuple[Lease, Outcome]] = []
        self._refusals: dict[Fence, int] = {}

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
            if not self._locked:
                await self._arrived.wait()
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), LOCKED_SECONDS)
            self._arrived.clear()
            batch, self._waiting, self._locked = self._waiting + self._locked, [], []
            try:
                while batch:
                    await self._write(batch)
            except BaseException as error:
                if is_refusal(error):
                    self._refused(batch, error)
                elif not isinstance(error, asyncpg.PostgresError) or is_disconnect(error):
                    self._uncertain = True
                self._waiting = batch + self._waiting
                self._arrived.set()
                raise
            self._uncertain = False
            self._health.well()
            if not self._waiting and not self._locked:
                self._empty.set()

    def _refused(self, batch: list[tuple[Lease, Outcome]], error: BaseException) -> None:
        """PostgreSQL refuses what was written first in *batch*: try it last, then in its plainest form, then not."""
        lease, outcome = batch.pop(0)
        times = self._refusals[lease.fence] = self._refusals.get(lease.fence, 0) + 1
        if times <= len(_PLAINER):
            batch.append((lease, _PLAINER[times - 1](outcome)))
            return
        del self._refusals[lease.fence]
        self._holdings.drop(lease)
        self._settled(None)
        logger.error(
            "The outcome of event %d for group %r cannot be written (%s); the delivery will be given back.",
            lease.fence.event_id,
            lease.fence.group,
            type(error).__name__,
        )

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
            kind, forget = type(outcome), isinstance(outcome, Complete) and self._forgets(lease.fence.group)
            alike, others = list[tuple[Lease, Outcome]](), list[tuple[Lease, Outcome]]()
            for item in batch:
                fence, similar = item[0].fence, type(item[1]) is kind
                if similar and kind is Complete:
                    similar = self._forgets(fence.group) == forget
                (alike if similar and fence.worker_id == worker_id else others).append(item)
            if self._refusals:  # what was refused once goes alone, or a whole batch would be blamed for one row
                alike, others = batch[:1], batch[1:]
            leases = [each for each, _ in alike]
            if isinstance(outcome, Complete):
                kept = await (self._store.forget if forget else self._store.complete)(leases)
                again: float | None = None
            else:
                kept = await self._store.release(lease.fence for lease in leases)
                again = 0.0
            if len(kept) == len(leases):
                batch[:] = others
                for each in leases:
                    self._holdings.drop(each)
                    if self._refusals:
                        self._refusals.pop(each.fence, None)
            else:
                # A row that is not there any more is lost; one that somebody else has locked is only late.
                locked = await self._store.still_held([each.fence for each in leases if each.fence[:2] not in kept])
                self._locked += [item for item in alike if item[0].fence[:2] in locked]
                batch[:] = others
                for each in leases:
                    if each.fence[:2] not in locked:
                        self._written(each, held=each.fence[:2] in kept)
            # A promotion made something of this key claimable.
            self._settled(0.0 if any(each.keyed for each in leases) else again)
            return
        held = await self._write_one(lease, outcome)
        late = not held and bool(await self._store.still_held([lease.fence]))
        batch.pop(0)
        if late:
            self._locked.append((lease, outcome))
            return
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
        self._refusals.pop(lease.fence, None)
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
