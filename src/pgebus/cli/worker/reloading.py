"""Which Python files have changed: for development, by looking at them twice a second.

Needs no library, and works where no file system tells of changes; a tree of ten thousand files costs a few
milliseconds of each look.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

__all__ = ["changes", "snapshot"]

LOOK_SECONDS: Final = 0.5
_NOT_OURS: Final = ("__pycache__", "node_modules", "site-packages")

Snapshot = dict[str, tuple[int, int]]


def snapshot(directories: Iterable[Path]) -> Snapshot:
    """Return the time of change and the size of each `.py` file below *directories*.

    Hidden directories, virtual environments and installed packages are left out.
    """
    seen: Snapshot = {}
    for directory in directories:
        for parent, below, files in os.walk(directory):
            below[:] = [
                name
                for name in below
                if not name.startswith(".")
                and name not in _NOT_OURS
                and not os.path.exists(os.path.join(parent, name, "pyvenv.cfg"))  # noqa: PTH110, PTH118 - a Path for each costs more than the look
            ]
            for name in files:
                if name.endswith(".py"):
                    path = os.path.join(parent, name)  # noqa: PTH118 - as above
                    try:
                        found = os.stat(path)  # noqa: PTH116 - as above
                    except OSError:  # gone meanwhile
                        continue
                    seen[path] = (found.st_mtime_ns, found.st_size)
    return seen


async def changes(directories: tuple[Path, ...]) -> AsyncIterator[set[str]]:
    """Return the files that were changed, made or removed, each time that there are any; for ever."""
    before = await asyncio.to_thread(snapshot, directories)
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = await asyncio.to_thread(snapshot, directories)
        if different := {path for path, _ in before.items() ^ now.items()}:
            before = now
            yield different
