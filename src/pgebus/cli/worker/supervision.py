"""What a supervisor of worker processes decides: when one is started, told to end, and killed.

Pure: it is told what has happened and what time it is, and says what to do. It starts and signals nothing itself.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeAlias

from pgebus.cli.worker.asking import AT_ONCE_SECONDS

__all__ = ["Action", "Finish", "Send", "Start", "Supervisor"]

# The pauses before a process is started again: doubling, with jitter, so that a fleet does not return as one.
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
# One that has run this long was well; its next failure starts with a short pause.
WELL_AFTER_SECONDS: Final = 60.0
# Beyond what a process that ends at once takes by itself.
KILL_AFTER_SECONDS: Final = AT_ONCE_SECONDS + 2.0
# While developing nobody wants to wait for a handler whose code has just been changed.
RELOAD_PATIENCE_SECONDS: Final = 2.0
_NEVER: Final = float("inf")


@dataclass(frozen=True)
class Start:
    """Start a process in this place."""

    place: int


@dataclass(frozen=True)
class Send:
    """Send a signal to the process in this place."""

    place: int
    number: int


@dataclass(frozen=True)
class Finish:
    """Nothing runs any more: end with this exit status."""

    status: int


Action: TypeAlias = Start | Send | Finish


@dataclass
class _Place:
    """One of the processes, over all its lives.

    Attributes:
        running: Whether it is there.
        due: When it may be started, where it is not.
        began: When its last life began.
        failures: How often it has failed in a row.
        sent: How many signals this life got, SIGKILL not counted.
        kill_at: When it is killed, if it is still there.
    """

    running: bool = False
    due: float = 0.0
    began: float = 0.0
    failures: int = 0
    sent: int = 0
    sent_at: float = 0.0
    kill_at: float = _NEVER


@dataclass
class Supervisor:
    """Keeps so many worker processes alive, until it is told to end.

    The first one has to be ready before the others are started: so a mistake in the program or in the settings is told
    once, and ends everything. From then on what ends is started again.

    Args:
        count: How many processes.
        rng: The jitter.
        reloading: A process that ends waits for a change of the program, which restarts those that run.
    """

    count: int
    rng: Random
    reloading: bool = False
    _places: list[_Place] = field(init=False)
    _proven: bool = field(default=False, init=False)
    _failed: int | None = field(default=None, init=False)
    _times: int = field(default=0, init=False)
    _number: int = field(default=signal.SIGTERM, init=False)
    _asked_at: float = field(default=0.0, init=False)
    _changed_at: float = field(default=-_NEVER, init=False)

    def __post_init__(self) -> None:
        self._places = [_Place() for _ in range(self.count)]

    def started(self, place: int, now: float) -> None:
        """A process was started."""
        it = self._places[place]
        it.running, it.began, it.sent, it.kill_at = True, now, 0, _NEVER

    def ready(self) -> None:
        """A process handles events."""
        self._proven = True

    def ended(self, place: int, status: int, now: float) -> float | None:
        """A process has ended, with an exit status, or by a signal where that is negative.

        Returns:
            Seconds until it is started again because it has failed; None where it waits for a change of the program;
            0 where it ended as it should, or everything ends with it.
        """
        it = self._places[place]
        it.running = False
        if self._times or self._failed is not None:
            it.due = _NEVER
            if status != 0 and -status not in (signal.SIGINT, signal.SIGTERM):
                self._failed = self._failed or abs(status)
            return 0.0
        if self.reloading:
            changed = it.began < self._changed_at
            it.due = now if changed else _NEVER
            return 0.0 if changed else None
        if not self._proven and status > 0:
            self._failed = status
            it.due = _NEVER
            return 0.0
        if now - it.began >= WELL_AFTER_SECONDS:
            it.failures = 0
        it.failures += 1
        bound = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(it.failures - 1, 32))
        it.due = now + self.rng.uniform(bound / 2, bound)
        return it.due - now

    def told(self, number: int, now: float) -> None:
        """The supervisor got a signal."""
        self._times, self._number, self._asked_at = self._times + 1, number, now

    def changed(self, now: float) -> None:
        """The program was changed."""
        self._changed_at = now
        for it in self._places:
            it.due = min(it.due, now)

    def decide(self, now: float) -> list[Action]:
        """Return what is to be done now, in this order."""
        if self._times or self._failed is not None:
            return self._end(now)
        actions: list[Action] = []
        for place, it in enumerate(self._places):
            if it.running and self.reloading and it.began < self._changed_at:
                actions += self._signals(place, 1 + (it.sent > 0 and now >= it.sent_at + RELOAD_PATIENCE_SECONDS), now)
            elif not it.running and now >= it.due and (self._proven or self.reloading or self._alone(place)):
                actions.append(Start(place))
        return actions

    def next_look(self) -> float:
        """Return when there may be something to do though nothing has happened; infinity: never."""
        looks = [_NEVER]
        ending = self._times > 0 or self._failed is not None
        for place, it in enumerate(self._places):
            if it.running:
                looks.append(it.kill_at)
                if it.sent == 1 and self.reloading and not ending:
                    looks.append(it.sent_at + RELOAD_PATIENCE_SECONDS)
            elif not ending and (self._proven or self._alone(place)):
                looks.append(it.due)
        return min(looks)

    def _alone(self, place: int) -> bool:
        return place == 0 and not any(it.running for it in self._places)

    def _end(self, now: float) -> list[Action]:
        running = [place for place, it in enumerate(self._places) if it.running]
        if not running:
            return [Finish(self._status())]
        if self._times > 2:
            return [Send(place, signal.SIGKILL) for place in running if self._killed(place)]
        return [action for place in running for action in self._signals(place, max(1, self._times), now)]

    def _signals(self, place: int, times: int, now: float) -> list[Action]:
        """Return the signals after which the process has got so many; and SIGKILL, when it has not heard them."""
        it = self._places[place]
        if now >= it.kill_at and self._killed(place):
            return [Send(place, signal.SIGKILL)]
        missing = times - it.sent
        if missing <= 0:
            return []
        it.sent, it.sent_at = times, now
        if times > 1:
            it.kill_at = now + KILL_AFTER_SECONDS
        # Whatever the supervisor got: SIGINT would be a KeyboardInterrupt in a process that has just been started.
        return [Send(place, signal.SIGTERM)] * missing

    def _killed(self, place: int) -> bool:
        """Note that it is killed; return whether it was not yet."""
        first = self._places[place].kill_at != -_NEVER
        self._places[place].kill_at = -_NEVER
        return first

    def _status(self) -> int:
        if self._times > 1:
            return 128 + self._number
        if self._failed is None:
            return 0
        return self._failed if not self._times else 1
