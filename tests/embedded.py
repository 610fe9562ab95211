"""Servers of the PostgreSQL under test: the wheel's, or the one whose programs PGEBUS_TEST_POSTGRES names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pgebus.embedded import EmbeddedPostgres


def embedded(settings: dict[str, str] | None = None) -> EmbeddedPostgres:
    """Return a server to be started. Tests that need one of their own get it here, so that it has the right major."""
    programs = os.environ.get("PGEBUS_TEST_POSTGRES")
    return EmbeddedPostgres(settings, programs=Path(programs) if programs else None)


def version() -> str:
    """Return which PostgreSQL that is, in its own words: `pg_ctl (PostgreSQL) 18.1`."""
    pg_ctl = embedded()._programs / "pg_ctl"
    return subprocess.run([pg_ctl, "--version"], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
