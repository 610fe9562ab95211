"""How a running system is doing, as plain data.

Asks nobody: what is here was last seen by the loops themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SystemState(Enum):
    """Where a system is in its one life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(slots=True)
class LoopHealth:
    """How one loop is doing.

    Attributes:
        name: Which loop: listen (or beat), claim, acknowledge, maintain or schedule.
        ok: False from a failure until the loop works again.
        failures: How often it has failed since the start.
        last_error: Type and message of the last failure.
    """

    name: str
    ok: bool = True
    failures: int = 0
    last_error: str | None = None

    def well(self) -> None:
        """Say that the loop has just done its work."""
        self.ok = True


@dataclass(frozen=True, slots=True)
class SystemHealth:
    """How a system is doing.

    Attributes:
        state: Where it is in its life.
        present: Whether PostgreSQL sees it alive; while it does not, nothing is claimed.
        loops: One entry for each loop.
        running: Deliveries whose handlers run now.
        held: Deliveries that are claimed and not finished, the running ones included.
    """

    state: SystemState
    present: bool
    loops: tuple[LoopHealth, ...]
    running: int
    held: int

    @property
    def ok(self) -> bool:
        """Whether events are being handled."""
        return self.state is SystemState.RUNNING and self.present and all(loop.ok for loop in self.loops)
