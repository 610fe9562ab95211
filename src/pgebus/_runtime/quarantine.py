"""When a delivery that a worker died with may start again.

Pure: the time is given. One such delivery may be what killed the worker, so it should start with nothing beside it.
But one that lost its worker to a restart is as innocent as any, and must not stand in the way of the others for long.
"""

from __future__ import annotations

from typing import Final

# How long nothing is claimed for its sake, while what runs comes to its end, and how long everything goes on as usual
# after that was in vain. Each further time both are twice as long, for handlers that take longer.
DRAIN_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 5.0
LONGEST_DRAIN_SECONDS: Final = 8.0
# After so long it starts beside others: handlers that run for an hour would keep it waiting for an hour.
LONGEST_WAIT_SECONDS: Final = 60.0
# What kills a process mostly does so at once. After so long others may start beside it.
ALONE_SECONDS: Final = 10.0
# How often to look for one.
LOOK_SECONDS: Final = 1.0


class Quarantine:
    """The state of one worker's dealings with suspects."""

    def __init__(self) -> None:
        self._waiting_since: float | None = None
        self._drain = DRAIN_SECONDS
        self._drain_until = float("-inf")
        self._retry_at = float("-inf")
        self._alone_until = float("-inf")
        self._started_at = float("-inf")
        self.look_at = float("-inf")

    def looked(self, found: bool, now: float) -> None:
        """Take note of whether a suspect is due."""
        self.look_at = now + LOOK_SECONDS
        if not found:
            self._waiting_since = None
            self._drain, self._drain_until = DRAIN_SECONDS, now
            return
        if self._waiting_since is None:
            self._waiting_since = now
        if now >= self._retry_at and now >= self._alone_until:
            self._drain_until = now + self._drain
            self._retry_at = self._drain_until + self._drain * RETRY_SECONDS / DRAIN_SECONDS
            self._drain = min(LONGEST_DRAIN_SECONDS, self._drain * 2)

    def closed(self, now: float) -> bool:
        """Return whether nothing else may be claimed or started."""
        return now < self._drain_until or now < self._alone_until

    def may_start(self, now: float, held: int) -> bool:
        """Return whether a suspect may be claimed now, with *held* other deliveries in hand."""
        if self._waiting_since is None or now < self._alone_until:
            return False
        return held == 0 or now - self._waiting_since >= LONGEST_WAIT_SECONDS

    def started(self, now: float) -> None:
        """A suspect has started."""
        self._alone_until = now + ALONE_SECONDS
        self._started_at = now
        self._waiting_since = None
        self._drain_until = self._retry_at = now

    def ended(self, now: float) -> None:
        """It has ended, and this process is still there: look for the next one, after the others had as long."""
        self._alone_until = now
        self.look_at = now + min(now - self._started_at, RETRY_SECONDS)

    def opens_at(self) -> float:
        """Return when to look again, at the latest."""
        return max(self._drain_until, self._alone_until)
