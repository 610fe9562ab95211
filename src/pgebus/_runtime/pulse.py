"""What a loop notes about itself while it runs; `EventSystem.health()` makes plain data of it.

Notes, and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Final

from pgebus.health import LoopHealth, SystemHealth, SystemState

# A statement of ours that is not answered for so long: the connection may be half open, or the server overloaded.
# Well below what is waited for before the connection is given up, which is more than health may be wrong for.
PATIENCE_SECONDS: Final = 7.0
# Each loop but one comes round every few seconds. When none has for so long, something blocks the event loop.
SILENT_SECONDS: Final = 9.0


@dataclass(slots=True)
class Pulse:
    """The notes of one loop.

    Attributes:
        name: Which loop: listen, claim, acknowledge or maintain.
        ok: False from a failure until the loop works again.
        failures: How often it has failed since the start.
        last_error: Type and message of the last failure.
        well_at: When it last did its work, on the monotonic clock.
        complaints: Why it finds that nothing can be claimed, though no statement has failed.
    """

    name: str
    ok: bool = True
    failures: int = 0
    last_error: str | None = None
    well_at: float | None = None
    complaints: tuple[str, ...] = ()

    def well(self) -> None:
        """Say that the loop has just done its work."""
        self.ok = True
        self.well_at = monotonic()

    def failed(self, error: BaseException) -> None:
        """Say that the loop has just failed."""
        self.ok = False
        self.failures += 1
        # The first line only: what PostgreSQL adds as DETAIL may quote a row.
        self.last_error = f"{type(error).__name__}: {error}".partition("\n")[0]

    def health(self, now: float, waiting_since: float | None = None) -> LoopHealth:
        """Return how the loop is doing.

        Args:
            now: The monotonic clock.
            waiting_since: When it sent what is not answered yet, if there is anything.
        """
        waiting = 0.0 if waiting_since is None else now - waiting_since
        return LoopHealth(
            self.name,
            self.ok and not self.complaints and waiting < PATIENCE_SECONDS,
            self.failures,
            self.last_error,
            None if self.well_at is None else now - self.well_at,
            waiting,
        )

    def reasons(self, health: LoopHealth) -> list[str]:
        """Say in plain words why *health* is not well, but for the complaints."""
        said = []
        if not self.ok:
            said.append(
                f"The {self.name} loop fails ({self.failures} times so far), the last time with: {self.last_error}"
            )
        if health.waiting_seconds >= PATIENCE_SECONDS:
            said.append(f"The {self.name} loop has been waiting for PostgreSQL for {health.waiting_seconds:.0f} s.")
        return said


_NOT_RUNNING: Final = {
    SystemState.NEW: "has not been started",
    SystemState.STARTING: "is starting",
    SystemState.STOPPING: "is stopping",
    SystemState.STOPPED: "has ended",
}


def report(
    state: SystemState,
    pulses: Iterable[Pulse],
    *,
    present: bool,
    waiting_since: Mapping[str, float | None],
    running: int,
    held: int,
) -> SystemHealth:
    """Make plain data of what the loops have noted.

    Args:
        state: Where the system is in its life.
        pulses: The notes of its loops.
        present: Whether the worker holds its lock.
        waiting_since: By the name of a loop, when it sent what is not answered yet, on the monotonic clock.
        running: How many deliveries run.
        held: How many are claimed and not finished.
    """
    now = monotonic()
    loops = [(pulse, pulse.health(now, waiting_since.get(pulse.name))) for pulse in pulses]
    reasons = [f"The system {_NOT_RUNNING[state]}."] if state in _NOT_RUNNING else []
    if state is SystemState.RUNNING and not present:
        reasons.append("PostgreSQL does not see this worker: it claims nothing until it has shown itself again.")
    warnings: list[str] = []
    for pulse, loop in loops:
        reasons += pulse.complaints
        # Without these two events are handled all the same, if not for ever.
        beside = state is SystemState.RUNNING and pulse.name in ("maintain", "schedule")
        (warnings if beside else reasons).extend(pulse.reasons(loop))
    # The acknowledge loop works only when there is something to write; one that never did yet says nothing.
    ages = [loop.worked_seconds_ago for _, loop in loops if loop.name != "acknowledge"]
    silent = min((age for age in ages if age is not None), default=0.0)
    if state is SystemState.RUNNING and silent >= SILENT_SECONDS and not reasons:
        reasons.append(f"No loop has come round for {silent:.0f} s: something blocks the event loop.")
    return SystemHealth(
        state, present, tuple(loop for _, loop in loops), running, held, tuple(reasons), tuple(warnings)
    )
