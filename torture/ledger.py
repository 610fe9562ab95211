"""What a publisher knows of its transactions, written outside PostgreSQL, and read again after everything has died.

One line before a transaction begins and one when its outcome is known, each by one write() to a file that is opened for
appending: it outlives the process, though not the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from torture.history import Outcome, Unit


class Ledger:
    """The open ledger of one publisher."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def begins(self, first: int, last: int, way: str, *, business: bool) -> None:
        """Write that the transaction of these numbers is about to begin."""
        self._write(f"begins {first} {last} {way} {int(business)}\n")

    def ended(self, first: int, outcome: Outcome) -> None:
        """Write what became of the transaction whose first number is *first*."""
        self._write(f"ended {first} {outcome}\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: str) -> None:
        os.write(self._file, line.encode())


def read(lines: Iterable[str]) -> list[tuple[Unit, str]]:
    """Return the transactions of a ledger, each with the way in which it published.

    One that has no outcome is unknown: the publisher was killed. So is a last line that is cut off in the middle.
    """
    begun: dict[int, tuple[Unit, str]] = {}
    for line in lines:
        if not line.endswith("\n"):
            continue
        match line.split():
            case ["begins", first, last, way, business]:
                unit = Unit(int(first), int(last), Outcome.UNKNOWN, bool(int(business)))
                begun[unit.first] = unit, way
            case ["ended", first, outcome]:
                unit, way = begun[int(first)]
                begun[unit.first] = unit._replace(outcome=Outcome(outcome)), way
            case _:
                raise ValueError(f"not a line of a ledger: {line!r}")
    return list(begun.values())


def read_file(path: Path) -> list[tuple[Unit, str]]:
    """Return the transactions of the ledger at *path*; none where there is no file yet."""
    return read(path.read_text().splitlines(keepends=True)) if path.exists() else []
