"""Servers of the PostgreSQL under test: the wheel's, or the one whose programs PGEBUS_TEST_POSTGRES names."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import pgebus.embedded
from pgebus.embedded import EmbeddedPostgres

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - mkdtemp makes what is in it private
# Ten databases of 8 MB and the log, several times over. In a container there are often 64 MB in all.
_ENOUGH_BYTES: Final = 1 << 30


def embedded(settings: dict[str, str] | None = None) -> EmbeddedPostgres:
    """Return a server to be started. Tests that need one of their own get it here, so that it has the right major."""
    return EmbeddedPostgres(settings, programs=_programs())


def in_memory(settings: dict[str, str] | None = None) -> EmbeddedPostgres:
    """Return a server to be started that makes databases fast: its data is in memory, where there is room for that."""
    return _InMemory(settings, programs=_programs())


def version() -> str:
    """Return which PostgreSQL that is, in its own words: `pg_ctl (PostgreSQL) 18.1`."""
    pg_ctl = embedded()._programs / "pg_ctl"
    return subprocess.run([pg_ctl, "--version"], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def _programs() -> Path | None:
    named = os.environ.get("PGEBUS_TEST_POSTGRES")
    return Path(named) if named else None


class _InMemory(EmbeddedPostgres):
    """A cluster whose data directory is a link into a file system in memory.

    A copy of a database is 300 files: 10 ms of system time there, 10 to 170 ms on a disk, though nothing is synced.
    """

    _data: Path | None = None

    def _prepare(self, home: Path) -> None:
        super()._prepare(home)
        if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _ENOUGH_BYTES:
            return
        self._data = Path(tempfile.mkdtemp(prefix="pgebus-", dir=_MEMORY))
        if pgebus.embedded._is_root():
            shutil.chown(self._data, pgebus.embedded._ORDINARY_USER)
        (home / "data").symlink_to(self._data)

    def stop(self) -> None:
        super().stop()
        if self._data is not None:
            shutil.rmtree(self._data, ignore_errors=True)
            self._data = None
