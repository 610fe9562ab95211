"""The PostgreSQL under torture: a private cluster, with fsync, whose database lives on a disk that can be full.

The disk is a tmpfs, which only root can mount; the WAL is not on it, but in the cluster's own directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.embedded import embedded

from pgebus import DatabaseSettings
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade
from torture.tables import TABLES

DATABASE: Final = "torture"
SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "200",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %a ",
    "deadlock_timeout": "1s",
    "checkpoint_timeout": "30s",
}
# What is left of a disk that is made full.
_SLACK_BYTES: Final = 128 * 1024
_FILL_TRIES: Final = 20


class Disk:
    """A tmpfs for the tables.

    Attributes:
        why_not: Why there is none, in the words of the machine; None when there is one.
    """

    def __init__(self, size: int) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="torture-", dir="/tmp"))
        self._size = size
        self.why_not: str | None = "only root can mount a tmpfs"
        if os.geteuid() == 0:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.path)],  # noqa: S607
                capture_output=True,
                text=True,
                check=False,
            )
            self.why_not = done.stderr.strip() or f"mount: status {done.returncode}" if done.returncode else None
        if self.why_not is None:
            shutil.chown(self.path, "nobody")
            self.path.chmod(0o700)

    def fill(self) -> None:
        """Leave almost nothing free: the disk is made as small as what it holds."""
        for _ in range(_FILL_TRIES):
            with suppress(subprocess.CalledProcessError):  # it has grown beyond that meanwhile
                self._resize(shutil.disk_usage(self.path).used + _SLACK_BYTES)
                return
        raise RuntimeError("The disk grows faster than it can be made small.")

    def empty(self) -> None:
        """Give the space back."""
        self._resize(self._size)

    def close(self) -> None:
        """Unmount it."""
        if self.why_not is None:
            subprocess.run(["umount", str(self.path)], check=True)  # noqa: S607
        self.path.rmdir()

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True, capture_output=True)  # noqa: S607


@dataclass
class Server:
    """The running cluster.

    Attributes:
        postgres: The cluster.
        disk: Where the database is, if it has a disk of its own.
    """

    postgres: EmbeddedPostgres
    disk: Disk

    @property
    def socket(self) -> str:
        """The path of the unix socket."""
        return f"{self.postgres.host}/.s.PGSQL.{self.postgres.port}"

    def url(self) -> str:
        """Return how to reach it directly."""
        return self.postgres.url(None, DATABASE)

    def crash(self) -> None:
        """Stop it without any goodbye, and start it again."""
        self.postgres.restart("immediate")

    def processes(self) -> list[int]:
        """Return the postmaster and its children."""
        with suppress(OSError, ValueError):
            postmaster = int((Path(self.postgres.host) / "data" / "postmaster.pid").read_text().split("\n")[0])
            return [postmaster, *_children(postmaster)]
        return []

    def pause(self, pids: list[int]) -> None:
        """Freeze *pids*, which are its processes."""
        _signal(pids, signal.SIGSTOP)

    def resume(self, pids: list[int]) -> None:
        """Let them go on."""
        _signal(pids, signal.SIGCONT)

    def log(self) -> str:
        """Return what the server has logged."""
        return (Path(self.postgres.host) / "log").read_text(errors="replace")


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # The name of the program, in parentheses, may hold anything.
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def running(disk_bytes: int) -> Iterator[Server]:
    """Run a migrated database inside the block."""
    disk = Disk(disk_bytes)
    try:
        with embedded(SETTINGS) as postgres:
            server = Server(postgres, disk)
            _make_database(server)
            yield server
    finally:
        disk.close()


def _make_database(server: Server) -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(server.postgres.url("psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        where = ""
        if server.disk.why_not is None:
            connection.execute(text(f"CREATE TABLESPACE small LOCATION '{server.disk.path}'"))
            where = " TABLESPACE small"
        connection.execute(text(f"CREATE DATABASE {DATABASE}{where}"))
    engine.dispose()
    upgrade(DatabaseSettings.model_validate({"url": server.url()}))
    engine = create_engine(server.postgres.url("psycopg", DATABASE))
    with engine.begin() as connection:
        connection.exec_driver_sql(TABLES)
    engine.dispose()
