"""What every worker does for all of them, once a second: recover, sweep, keep the subscriptions true, prune.

Safe on any number of workers at once: what two of them try, one of them gets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from time import monotonic
from typing import Final, NoReturn

import asyncpg

from pgebus._runtime.faults import is_disconnect
from pgebus._runtime.fitness import ASK_SECONDS
from pgebus._runtime.presence import Presence
from pgebus._runtime.pruning import Pruner
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.retention import Retention
from pgebus._runtime.store import Backfill, KeyPlace, Store
from pgebus.groups import Group
from pgebus.routing import EventRouter

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
# All locks vanish at once when the server starts, while the workers live and are on their way back.
FRESH_SERVER_GRACE_SECONDS: Final = 10.0
SUBSCRIBE_SECONDS: Final = 30.0
# How many events a statement of the backfill looks at, and how long it goes on in one round.
BACKFILL_BATCH: Final = 10_000
BACKFILL_SECONDS: Final = 0.5
# How many keys a sweep looks at, and how many times as long as it took it pauses.
SWEEP_BATCH: Final = 5_000
SWEEP_PAUSE: Final = 20


class Coroner:
    """Decides which workers are dead: pure, the time is given.

    A worker is dead when its lock, or its beat, has been seen absent for the whole grace, on a connection that was up
    all the time. A beat is absent when it is some seconds old; the grace comes on top of that.
    Right after a server start the grace is longer, except for a worker whose lock was seen held since; and for one that
    owns nothing there is no hurry. That one is ended all the same: its idle flag would make every publisher notify.

    Args:
        grace: Seconds without the lock.
        fresh_grace: The same in the first minute of a server, and for workers that own nothing.
    """

    def __init__(self, grace: float, fresh_grace: float = FRESH_SERVER_GRACE_SECONDS) -> None:
        self._grace = grace
        self._fresh_grace = max(grace, fresh_grace)
        self._absent_since: dict[int, float] = {}
        self._witnessed: set[int] = set()

    def blinded(self) -> None:
        """Our own connection was down: begin to count again."""
        self._absent_since.clear()
        self._witnessed.clear()

    def look(self, owners: list[tuple[int, bool, bool, bool]], now: float) -> list[int]:
        """Return the ids of workers that are dead.

        Args:
            owners: (worker id, whether its lock is held or its beat is there, whether it owns running deliveries,
                whether the server has just started).
            now: Monotonic seconds.
        """
        dead = []
        absent: dict[int, float] = {}
        for worker_id, alive, owns, fresh in owners:
            if alive:
                self._witnessed.add(worker_id)
                continue
            since = absent[worker_id] = self._absent_since.get(worker_id, now)
            urgent = owns and not (fresh and worker_id not in self._witnessed)
            if now - since >= (self._grace if urgent else self._fresh_grace):
                dead.append(worker_id)
        self._absent_since = absent
        self._witnessed &= {worker_id for worker_id, *_ in owners}
        return dead


class Backfiller:
    """Gives new patterns the events that their subscription came too late for.

    A transaction that began before the subscription was committed does not see it, and may insert events for a long
    time. So whoever is in a transaction when a new pattern is first seen here is waited for, without a lock; from then
    on the trigger serves everybody, and what lies between is made up for. After a crash it begins again.

    Args:
        store: On the connection of the maintenance.
        look: Called when there is something to claim.
    """

    def __init__(self, store: Store, look: Callable[[], None]) -> None:
        self._store = store
        self._look = look
        self._waiting: dict[Backfill, frozenset[tuple[str, bool]]] = {}
        self._in_flight: frozenset[tuple[str, bool]] = frozenset()  # at the last look
        self._reached: dict[Backfill, int] = {}  # up to which id it has been done, by us

    async def round(self) -> None:
        """Look for new patterns, and make up for those that nobody has to be waited for any more: a bit each time."""
        wanted = await self._store.backfills()
        self._reached = {each: above for each, above in self._reached.items() if each in wanted}
        if not wanted:
            self._waiting.clear()
            return
        before, self._in_flight = self._in_flight, await self._store.in_flight()
        self._waiting = {each: self._others(each, before) for each in wanted}
        until = monotonic() + BACKFILL_SECONDS
        for each, others in self._waiting.items():
            if not others and monotonic() < until:
                await self._make_up(each, until)

    def _others(self, what: Backfill, before: frozenset[tuple[str, bool]]) -> frozenset[tuple[str, bool]]:
        """Return who is still to be waited for."""
        waiting = self._waiting.get(what)
        if waiting is None:
            return self._in_flight
        still = waiting & self._in_flight
        if still == waiting:
            return still
        # One that is gone from there may be a prepared one now, under a name that tells nothing of the other.
        return still | {each for each in self._in_flight - before if each[1]}

    async def _make_up(self, what: Backfill, until: float) -> None:
        # Whoever takes a higher id from now on is served by the trigger.
        last = await self._store.last_event_id()
        while True:
            above = self._reached.get(what, what.since)
            looked = await self._store.backfill(what, above, last, BACKFILL_BATCH)
            if looked is None:
                return  # whether it is still to be done is asked again in the next round
            made, reached, missed = looked
            if made:
                self._look()
            if reached is None:
                break
            self._reached[what] = reached if missed is None else missed - 1
            if missed is not None or monotonic() >= until:
                return
        await self._store.backfilled(what)
        self._look()
        logger.info("Group %r is up to date with %r.", what.group, what.pattern)


def _start_of(group: Group) -> str:
    return group.start.isoformat() if isinstance(group.start, datetime) else group.start or "now"


class Maintenance:
    """The loop.

    Args:
        store: On a connection of its own.
        router: Watched for handlers that are registered late.
        presence: This worker is never its own coroner.
        served: Returns the groups that this worker serves.
        grace: Seconds without a lock after which a worker is dead.
        retention: How long this worker was told to keep what.
        look: Called when something may have become claimable.
        learned: Called when handlers were registered since the last round.
        complaints: Returns why nothing can be claimed, though no statement has failed.
        health: Told when a round worked.
    """

    def __init__(
        self,
        store: Store,
        router: EventRouter,
        presence: Presence,
        served: Callable[[], Sequence[str]],
        *,
        grace: float,
        retention: Retention,
        look: Callable[[], None],
        learned: Callable[[], None],
        complaints: Callable[[], Awaitable[tuple[str, ...]]],
        health: Pulse,
    ) -> None:
        self._store = store
        self._router = router
        self._presence = presence
        self._served = served
        self._coroner = Coroner(grace)
        self._look = look
        self._learned = learned
        self._complaints = complaints
        self._ask_at = monotonic() + ASK_SECONDS
        self._health = health
        self._backfiller = Backfiller(store, look)
        self._pruner = Pruner(
            store, presence, retention, forgets=lambda: any(router.forgets(group.name) for group in router.groups())
        )
        self._subscribed_version: int | None = None
        self._subscribe_at = monotonic()
        self._configured = False
        self._sweep_at = monotonic()
        self._swept: KeyPlace | None = None

    async def run(self) -> NoReturn:
        """Do a round each second."""
        # The tables may have been made anew since the last failure.
        self._subscribe_at = monotonic()
        while True:
            try:
                await self._round()
            except asyncpg.PostgresError as error:
                if is_disconnect(error):
                    self._coroner.blinded()
                raise
            except BaseException:
                self._coroner.blinded()
                raise
            self._health.well()
            await asyncio.sleep(LOOK_SECONDS)

    async def _round(self) -> None:
        if monotonic() >= self._ask_at:
            self._health.complaints = await self._complaints()
            self._ask_at = monotonic() + ASK_SECONDS
        await self._recover()
        await self.subscribe()
        if monotonic() >= self._sweep_at:
            await self._sweep()
        await self._pruner.round()
        await self._backfiller.round()

    async def _sweep(self) -> None:
        """Promote keys that lost their head unseen: some thousand at a time, for a twentieth of the time at most."""
        began = monotonic()
        await self._store.let_go()
        promoted, ended = await self._store.sweep(self._swept or ("", "", ""), SWEEP_BATCH)
        self._swept = ended
        self._sweep_at = monotonic() + SWEEP_PAUSE * (monotonic() - began)
        if promoted:
            self._look()

    async def subscribe(self) -> None:
        """Write the subscriptions of all handlers; again when one was registered since, and once in a while."""
        version = self._router.version
        late = self._subscribed_version not in (None, version)
        if version == self._subscribed_version and monotonic() < self._subscribe_at:
            return
        groups = {group.name: group for group in self._router.groups()}
        if groups:
            # What is declared is written once: later on, an operator may have had reason to write something else.
            configured = await self._store.declare_groups(list(groups.values()), configure=not self._configured)
            self._configured = self._configured or configured
            await self._store.subscribe(
                [
                    (route.handler.group, route.pattern, _start_of(groups[route.handler.group]))
                    for route in self._router.routes()
                ]
            )
        self._subscribed_version = version
        self._subscribe_at = monotonic() + (SUBSCRIBE_SECONDS if self._configured or not groups else 0)
        if late:
            self._learned()
            if self._presence.worker_id is not None:
                await self._store.serve(self._presence.worker_id, self._served())

    async def _recover(self) -> None:
        rows: list[asyncpg.Record] = await self._store.owners()
        owners = [
            (row["worker_id"], row["alive"], row["owns"], row["fresh"])
            for row in rows
            if row["worker_id"] != self._presence.worker_id
        ]
        dead = self._coroner.look(owners, monotonic())
        if not dead:
            return
        if count := await self._store.recover(dead):
            logger.warning(
                "Deliveries recovered from workers that are gone, and pending again: %d (workers: %d).",
                count,
                len(dead),
                extra={"pgebus_dead_workers": dead},
            )
            self._look()
