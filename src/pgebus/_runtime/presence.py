"""Who this worker is, and whether PostgreSQL can see that it is alive.

Present means: the row in `workers` is there, and its advisory lock is held by the listener's connection, or its beat
was written. Without that nothing may be claimed, because others are free to take it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from secrets import randbits


class Presence:
    """The worker's identity.

    Args:
        departed: Called with the id when it was ended by others: its deliveries have been given away.
    """

    def __init__(self, departed: Callable[[int], None]) -> None:
        self._departed = departed
        self._here = asyncio.Event()
        self.worker_id: int | None = None

    @property
    def here(self) -> bool:
        """Whether others can see that this worker lives, as far as this process knows."""
        return self._here.is_set()

    async def wait(self) -> int:
        """Wait until the worker is present; return its id."""
        await self._here.wait()
        if self.worker_id is None:
            raise AssertionError("a worker without an id can't be present")
        return self.worker_id

    def new_id(self) -> int:
        """Return an id for a new life: random, so that no crash or failover can hand it out again."""
        self.worker_id = randbits(62) + 1
        return self.worker_id

    def arrive(self) -> None:
        """The lock is held, or the beat was written."""
        self._here.set()

    def leave(self) -> None:
        """The connection that held the lock is gone, or a beat has failed."""
        self._here.clear()

    def depart(self) -> None:
        """This id was ended by others; a new one is needed."""
        ended, self.worker_id = self.worker_id, None
        if ended is not None:
            self._departed(ended)
