"""What every worker does for all of them, once a second: recover, sweep, keep the subscriptions true, prune.

Safe on any number of workers at once: what two of them try, one of them gets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Final, NoReturn

import asyncpg

from pgebus._runtime.faults import is_disconnect
from pgebus._runtime.presence import Presence
from pgebus._runtime.store import Store
from pgebus.health import LoopHealth
from pgebus.routing import EventRouter

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
# All locks vanish at once when the server starts, while the workers live and are on their way back.
FRESH_SERVER_GRACE_SECONDS: Final = 10.0
PRUNE_SECONDS: Final = 60.0
PRUNE_BATCH: Final = 1_000
SUBSCRIBE_SECONDS: Final = 30.0


class Coroner:
    """Decides which workers are dead: pure, the time is given.

    A worker is dead when its lock has been seen absent for the whole grace, on a connection that was up all the time.
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
            owners: (worker id, whether its lock is held, whether it owns running deliveries, whether the server has
                just started).
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


class Maintenance:
    """The loop.

    Args:
        store: On a connection of its own.
        router: Watched for handlers that are registered late.
        presence: This worker is never its own coroner.
        grace: Seconds without a lock after which a worker is dead.
        retention: Seconds after which finished events are removed; None keeps them.
        look: Called when something may have become claimable.
        learned: Called when handlers were registered since the last round.
        health: Told when a round worked.
    """

    def __init__(
        self,
        store: Store,
        router: EventRouter,
        presence: Presence,
        *,
        grace: float,
        retention: float | None,
        look: Callable[[], None],
        learned: Callable[[], None],
        health: LoopHealth,
    ) -> None:
        self._store = store
        self._router = router
        self._presence = presence
        self._coroner = Coroner(grace)
        self._retention = retention
        self._look = look
        self._learned = learned
        self._health = health
        self._subscribed_version: int | None = None
        self._subscribe_at = monotonic()
        self._prune_at = monotonic() + PRUNE_SECONDS

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
        await self._recover()
        await self.subscribe()
        if await self._store.sweep():
            self._look()
        if monotonic() >= self._prune_at:
            await self._prune()

    async def subscribe(self) -> None:
        """Write the subscriptions of all handlers; again when one was registered since, and once in a while."""
        version = self._router.version
        late = self._subscribed_version not in (None, version)
        if version == self._subscribed_version and monotonic() < self._subscribe_at:
            return
        patterns = [(route.handler.group, route.pattern) for route in self._router.routes()]
        if patterns:
            await self._store.subscribe(patterns)
        self._subscribed_version = version
        self._subscribe_at = monotonic() + SUBSCRIBE_SECONDS
        if late:
            self._learned()

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

    async def _prune(self) -> None:
        """Remove what is finished and old enough, in short transactions; the rest of it next time."""
        self._prune_at = monotonic() + PRUNE_SECONDS
        await self._store.prune_workers()
        if self._retention is None:
            return
        try:
            pruned = await self._store.prune_events(self._retention, PRUNE_BATCH)
        except asyncpg.ForeignKeyViolationError as error:
            logger.warning("Finished events are kept, because rows of table %r refer to them.", error.table_name)
            return
        if pruned >= PRUNE_BATCH // 2:
            self._prune_at = monotonic()
