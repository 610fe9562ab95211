"""The worker processes of the demo: started, killed, stopped.

What they do is in `worker.py`; they are watched through the database alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_STOP_SECONDS: Final = 5.0
_LOG_LINES: Final = 15


@dataclass(frozen=True)
class WorkerProcess:
    """A process that handles the shop's events.

    Attributes:
        name: What PostgreSQL knows its connections by.
        process: The process.
        log: The file with what it had to say.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def begin(self, url: str) -> None:
        """Tell it the database, which it has been waiting for."""
        assert self.process.stdin is not None  # noqa: S101 - for the type checker: it is a pipe
        with suppress(BrokenPipeError):  # it has died; its log says why, and it will be missed
            self.process.stdin.write(f"{url}\n".encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        """Do `kill -9`: it can neither finish anything nor say goodbye."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and wait for that; after some seconds don't ask."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        finally:
            with suppress(BrokenPipeError):
                self.process.communicate()  # closes the pipe

    def last_words(self) -> list[str]:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [f"{self.name}: {line}" for line in lines[-_LOG_LINES:]]


@contextmanager
def worker_processes(names: Sequence[str], settings: Mapping[str, str]) -> Iterator[list[WorkerProcess]]:
    """Start a process for each of *names*, and stop those that are left at the end.

    Args:
        names: Their names.
        settings: Environment variables; those of the user's own pgebus are not passed on.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("PGEBUS_")}
    with ExitStack() as stack:
        # A working directory of their own: no `.env` is found there.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgebus-demo-")))
        workers = []
        for name in names:
            log = home / f"{name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pgebus.cli.demo.worker"],
                    env={**inherited, **settings, "PGEBUS_DATABASE__APPLICATION_NAME": name},
                    cwd=home,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C in the terminal is for the demo, which then stops them one by one.
                    start_new_session=True,
                )
            worker = WorkerProcess(name, process, log)
            stack.callback(worker.stop)
            workers.append(worker)
        yield workers
