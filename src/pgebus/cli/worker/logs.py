"""What a worker logs, and how: one line for each record, on standard error."""

from __future__ import annotations

import logging
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_FORMAT: Final = "%(asctime)s %(levelname)-8s [%(process)d] %(name)s: %(message)s"


def set_up_logs(level: str) -> None:
    """Log from *level* on; what the program itself has set up stays, but for the level of `pgebus`."""
    chosen = getattr(logging, level.upper())
    if not logging.getLogger().handlers:
        logging.basicConfig(format=_FORMAT, level=chosen)
    logging.getLogger("pgebus").setLevel(chosen)
