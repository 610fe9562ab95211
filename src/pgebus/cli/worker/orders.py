"""What a worker process is to do: made of the command line, and handed to the processes that are started for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

__all__ = ["Order"]


@dataclass(frozen=True)
class Order:
    """What one worker process is to do.

    Attributes:
        target: Of an EventSystem, or of what makes one: `package.module:name`.
        groups: The consumer groups to serve; none: those of the settings.
        loop: Which event loop: `auto`, `asyncio` or `uvloop`.
        log_level: From which level on it logs.
        life: The descriptor of a socket to the supervisor, which reads one byte when events are handled, and whose end
            is the supervisor's; None without one.
    """

    target: str
    groups: tuple[str, ...] = ()
    loop: str = "auto"
    log_level: str = "info"
    life: int | None = None

    def text(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Order:
        """Return what `text()` has written."""
        fields = json.loads(text)
        return cls(**{**fields, "groups": tuple(fields["groups"])})
