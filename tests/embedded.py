"""Servers of the PostgreSQL under test: the wheel's, or the one whose programs PGEBUS_TEST_POSTGRES names."""

from __future__ import annotations

import os
from pathlib import Path

from pgebus.embedded import EmbeddedPostgres


def embedded(settings: dict[str, str] | None = None) -> EmbeddedPostgres:
    """Return a server to be started. Tests that need one of their own get it here, so that it has the right major."""
    programs = os.environ.get("PGEBUS_TEST_POSTGRES")
    return EmbeddedPostgres(settings, programs=Path(programs) if programs else None)
