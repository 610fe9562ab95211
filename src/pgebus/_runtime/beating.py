"""The beat that says that this worker lives, where no connection keeps a session that could hold a lock.

It goes through a transaction pooler: each beat is one statement, and nothing depends on which backend runs it. Others
end a worker whose beat is absent; then the next beat finds no row.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Final, NoReturn

from pgebus._runtime.presence import Presence
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line
from pgebus._runtime.waking import Wakeup

logger = logging.getLogger(__name__)

BEAT_SECONDS: Final = 1.0
# After so long without an answer another connection is tried: three of them before the beat counts as absent.
BEAT_ANSWER_SECONDS: Final = 4.0


class Beater:
    """The loop that beats.

    Args:
        line: A connection of its own, so that a beat waits for no other statement.
        statements: The statements for the schema.
        channel: What the worker serves.
        groups: Returns the groups that it serves.
        presence: Told when the row is there, and when nobody can tell whether it is.
        wakeup: Told to look when the worker is present again.
        health: Told when a beat was written.
        version: The version of this library, for the row in `workers`.
    """

    def __init__(
        self,
        line: Line,
        statements: Statements,
        *,
        channel: str,
        groups: Callable[[], list[str]],
        presence: Presence,
        wakeup: Wakeup,
        health: Pulse,
        version: str,
    ) -> None:
        self._line = line
        self._sql = statements
        self._channel = channel
        self._groups = groups
        self._presence = presence
        self._wakeup = wakeup
        self._health = health
        self._version = version

    async def run(self) -> NoReturn:
        """Beat each second, until that fails."""
        try:
            while True:
                await self._beat()
                self._health.well()
                if not self._presence.here:
                    self._presence.arrive()
                    self._wakeup.doubt()
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            self._presence.leave()

    async def _beat(self) -> None:
        """Be the worker that this process was before, or a new one where others have ended that one."""
        worker_id = self._presence.worker_id
        if worker_id is not None:
            if await self._line.value(self._sql.beat, worker_id) is not None:
                return
            logger.warning(
                "This worker did not beat for too long: its deliveries were given to others. Its handlers are "
                "cancelled, and it goes on under a new identity."
            )
            self._presence.depart()
        await self._line.fetch(
            self._sql.register_beating,
            self._presence.new_id(),
            self._channel,
            self._groups(),
            socket.gethostname(),
            os.getpid(),
            self._version,
        )
