"""Commands that run in processes of their own until a test ends them, and whatever they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from tests.system.waiting import until

PGEBUS = [sys.executable, "-m", "pgebus.cli"]
# Starting Python and importing everything, on a machine that does something else as well.
PATIENCE_SECONDS = 30.0


class Running:
    """A command that runs, in a process group of its own; all that it starts carries a mark in its environment.

    Args:
        directory: Where it runs, and where its output goes.
        arguments: What follows `pgebus`.
        variables: Of its environment, beside those of this process that are not settings of ours.
    """

    def __init__(self, directory: Path, arguments: Sequence[str], **variables: str) -> None:
        self._mark = f"TEST_MARK={uuid4()}"
        name, _, value = self._mark.partition("=")
        kept = {key: each for key, each in os.environ.items() if not key.startswith("PGEBUS_") and key != "COLUMNS"}
        self._log = directory / f"{value}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this Python
                [*PGEBUS, *arguments],
                cwd=directory,
                env={**kept, "PYTHONUNBUFFERED": "1", **variables, name: value},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it and its children have written."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    async def says(self, text: str, times: int = 1) -> None:
        """Wait until it has written *text* so many times."""

        async def written() -> bool:
            assert self.said.count(text) >= times or self.process.poll() is None, self.said
            return self.said.count(text) >= times

        try:
            await until(written, PATIENCE_SECONDS)
        except AssertionError:
            raise AssertionError(f"it did not say {text!r} {times} times: {self.said}") from None

    def signal(self, number: int) -> None:
        """Send it a signal, and to nobody else."""
        assert self.process.poll() is None, self.said
        self.process.send_signal(number)

    async def ends(self) -> int:
        """Wait for its end; return its exit status, negative for a signal."""

        async def ended() -> bool:
            return self.process.poll() is not None

        await until(ended, PATIENCE_SECONDS)
        assert self.process.returncode is not None
        return self.process.returncode

    def left(self) -> list[int]:
        """Return the ids of its processes that are there, its own included."""
        return sorted(
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if self._mark.encode() in _environ_of(process).split(b"\0")
        )

    async def nothing_is_left(self) -> None:
        """Wait until none of its processes is there."""

        async def gone() -> bool:
            return not self.left()

        await until(gone, PATIENCE_SECONDS)

    def bury(self) -> None:
        """End it and all that it has started, whatever state they are in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


def _environ_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended meanwhile, or it is somebody else's
        return b""
