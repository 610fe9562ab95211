"""Counters that outlive the process that counts: shared memory, a row for each slot of the crew."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

FIELDS: Final = (
    "entered",  # handlers that have begun
    "left",  # handlers that have ended, whichever way
    "refused",  # completions that found no row: the delivery was another's by then
    "departed",  # lives that others had ended: the process went on as somebody new
    "reconnects",  # failures of the loops of a worker, each of which connects again
    "wait",  # set for a publisher that is to wait, because too much is waiting to be handled
    "published",  # events that a publisher has got confirmed
    "alarms",  # what is logged as critical, or by asyncio as an error
)
_SIZE: Final = 8
_ROW: Final = _SIZE * len(FIELDS)


class Tally:
    """The counters of all slots; one process writes a row, and any may read it."""

    def __init__(self, path: Path, slots: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(_ROW * slots))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._slots = slots

    def add(self, slot: int, name: str, amount: int = 1) -> None:
        """Count *amount* more."""
        self.set(slot, name, self.get(slot, name) + amount)

    def set(self, slot: int, name: str, value: int) -> None:
        """Write a counter."""
        struct.pack_into("q", self._memory, self._place(slot, name), value)

    def get(self, slot: int, name: str) -> int:
        """Return a counter."""
        value: int = struct.unpack_from("q", self._memory, self._place(slot, name))[0]
        return value

    def inside(self, slot: int) -> int:
        """Return how many handlers run; after a SIGKILL, how many it has hit."""
        return self.get(slot, "entered") - self.get(slot, "left")

    def settle(self, slot: int) -> None:
        """Take what runs as ended, because its process has."""
        self.set(slot, "left", self.get(slot, "entered"))

    def total(self, name: str) -> int:
        """Return a counter over all slots."""
        return sum(self.get(slot, name) for slot in range(self._slots))

    def all_inside(self) -> int:
        """Return how many handlers run anywhere."""
        return sum(self.inside(slot) for slot in range(self._slots))

    @staticmethod
    def _place(slot: int, name: str) -> int:
        return slot * _ROW + FIELDS.index(name) * _SIZE
