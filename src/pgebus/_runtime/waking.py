"""When to look for work again: wake-ups, due times, and the looks that nothing asked for.

Counts in monotonic seconds and in the database's clock; the machine's own wall clock is never read.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

# The first look after going idle; each further one waits as long again as the worker has been idle.
FIRST_LOOK_SECONDS: Final = 0.010


def next_look(idle_for: float, poll_interval: float) -> float:
    """Return in how many seconds to look again, *idle_for* seconds after the idle flag was committed.

    A publisher whose transaction began before the flag was set sends no wake-up. By doubling, what it commits is found
    at the latest after as much time again as the worker has been idle, and never later than the poll interval.
    """
    return min(poll_interval, max(FIRST_LOOK_SECONDS, idle_for))


class DatabaseClock:
    """The database's clock, carried on by the monotonic one since it was last read."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def read(self, epoch: float) -> None:
        """Take note that the database's clock says *epoch* now."""
        self._offset = epoch - monotonic()

    def epoch(self) -> float:
        """Return what the database's clock says now, in seconds since the epoch."""
        return (self._offset or 0.0) + monotonic()

    def until(self, epoch: float) -> float:
        """Return the seconds until *epoch*; zero as long as the clock was never read."""
        return 0.0 if self._offset is None else max(0.0, epoch - self._offset - monotonic())


class Wakeup:
    """What wakes the claim loop, and when it should wake by itself.

    Called `wakeup`, never `event`: an event is a row.
    """

    def __init__(self, clock: DatabaseClock) -> None:
        self._clock = clock
        self._flag = asyncio.Event()
        self._wanted = True
        self._doubted = False
        self.next_due: float | None = None

    def look(self) -> None:
        """There may be work: look at once."""
        self._wanted = True
        self._flag.set()

    def doubt(self) -> None:
        """Notifications may have been missed: look, and ask anew what is due next."""
        self._doubted = True
        self.look()

    def doubted(self) -> bool:
        """Return whether that was so, and forget it."""
        doubted, self._doubted = self._doubted, False
        return doubted

    def stir(self) -> None:
        """Something in this process changed, a slot for example; there is no reason to ask the database for it."""
        self._flag.set()

    def due(self, epoch: float) -> None:
        """Something becomes due at *epoch* of the database's clock."""
        if self._clock.until(epoch) <= 0:
            self.look()
        elif self.next_due is None or epoch < self.next_due:
            self.next_due = epoch
            self._flag.set()

    def due_in(self, seconds: float) -> None:
        """Something becomes due in *seconds*."""
        self.due(self._clock.epoch() + seconds)

    def notified(self, payload: str) -> None:
        """A NOTIFY came; its payload is the due time, empty for now. What is foreign means now, too."""
        try:
            epoch = float(payload)
        except ValueError:
            epoch = float("nan")
        if epoch - epoch == 0:  # finite
            self.due(epoch)
        else:
            self.look()

    def take(self) -> bool:
        """Return whether a look was asked for or is due, and forget it."""
        wanted = self._wanted
        if self.next_due is not None and self._clock.until(self.next_due) <= 0:
            self.next_due = None
            wanted = True
        self._wanted = False
        self._flag.clear()
        return wanted

    async def wait(self, at_most: float) -> None:
        """Wait until something stirs, the next due time comes, or *at_most* seconds have passed."""
        if self.next_due is not None:
            at_most = min(at_most, self._clock.until(self.next_due))
        await asyncio.sleep(0)  # a loop that finds its flag set every time must still let the others run
        if at_most <= 0:
            return
        try:
            async with asyncio.timeout(at_most):
                await self._flag.wait()
        except TimeoutError:
            return
