"""Runs the contenders' programs, each in a database of its own, and gives back what they have printed."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import asyncpg

from benchmarks.peers import PGEBUS, Contender
from pgebus.embedded import EmbeddedPostgres

# Durable, as in production; large enough that what is measured fits into memory.
SERVER: Final = {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "max_connections": "200",
    "checkpoint_timeout": "30min",
}
SECONDS: Final = 900
BUSINESS: Final = """
CREATE TABLE business AS SELECT n AS id, 0 AS value FROM generate_series(0, 999999) n;
CREATE UNIQUE INDEX business_id ON business (id);
"""


class Arena:
    """A server, and a database for each contender and measure."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres
        self._numbers = count(1)

    def sql(self, dsn: str, *statements: str) -> Any:
        """Run *statements*; return the first column of the last one's first row."""

        async def run() -> Any:
            connection = await asyncpg.connect(dsn)
            try:
                for statement in statements[:-1]:
                    await connection.execute(statement)
                return await connection.fetchval(statements[-1])
            finally:
                await connection.close()

        return asyncio.run(run())

    def server_version(self) -> str:
        """Return which PostgreSQL it is."""
        return str(self.sql(self._postgres.url(None), "SHOW server_version"))

    @contextmanager
    def database(self, contender: Contender, *, business: bool = False) -> Iterator[str]:
        """Yield the address of a new database with the tables of *contender*; it is dropped afterwards."""
        name = f"arena_{next(self._numbers)}"
        self.sql(self._postgres.url(None), f"CREATE DATABASE {name}")
        dsn = self._postgres.url(None, name)
        try:
            # The loops without a library run on the tables of pgebus.
            self.run(contender if contender.packages else PGEBUS, "prepare", dsn)
            if business:
                self.sql(dsn, *BUSINESS.strip().split("\n"))
            yield dsn
        finally:
            self.sql(self._postgres.url(None), f"DROP DATABASE {name} WITH (FORCE)")

    def start(self, contender: Contender, action: str, dsn: str, **options: Any) -> subprocess.Popen[str]:
        """Start an action of a contender."""
        arguments = [str(contender.python), str(contender.script), action, json.dumps({"dsn": dsn, **options})]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own programs

    def run(self, contender: Contender, action: str, dsn: str, **options: Any) -> dict[str, Any]:
        """Run an action to its end; return what it has printed."""
        return self.result(self.start(contender, action, dsn, **options))

    def result(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait for *process*; return what it has printed."""
        try:
            printed, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError(f"{process.args!r} has failed.")
        result: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return result


@contextmanager
def arena() -> Iterator[Arena]:
    """Start a server."""
    with EmbeddedPostgres(SERVER) as postgres:
        yield Arena(postgres)


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: list[float], part: float) -> float:
    """Return the value that *part* of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
