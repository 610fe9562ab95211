"""An example that runs: a copy of its folder, a database of its own, and its processes, which end with the test."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from tests.system.bus import Sql
from tests.system.waiting import until

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
PATIENCE: Final = 60.0
SOON: Final = 20.0

_ADDRESS: Final = re.compile(r"Uvicorn running on (http://\S+)")


@dataclass(frozen=True)
class Program:
    """A process that runs until it is told to stop, and the file with all that it prints."""

    command: str
    process: Process
    log: Path

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    async def prints(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait until it has printed *pattern*."""

        async def look() -> bool:
            if found := pattern.search(self.printed()):
                matches.append(found)
            elif self.process.returncode is not None:
                raise AssertionError(f"{self.command} has ended with {self.process.returncode}:\n{self.printed()}")
            return bool(matches)

        matches: list[re.Match[str]] = []
        try:
            await until(look, SOON)
        except AssertionError:
            raise AssertionError(f"{self.command} has not printed {pattern.pattern!r}:\n{self.printed()}") from None
        return matches[0]


class Application:
    """A copy of an example in a folder of its own.

    Args:
        name: Its folder in `examples`.
        folder: Where the copy and the logs go.
        sql: A connection to its database, to look.
        **environment: Variables that its reader would export.
    """

    def __init__(self, name: str, folder: Path, sql: Sql, **environment: str) -> None:
        self.folder = folder / name
        self.sql = sql
        self.programs: list[Program] = []
        shutil.copytree(EXAMPLES / name, self.folder, ignore=shutil.ignore_patterns("__pycache__", ".env"))
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PGEBUS_")}
        # As in an activated virtual environment; a warning in an example is a mistake.
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        self._environment = {**kept, "PATH": path, "PYTHONWARNINGS": "error", **environment}

    async def run(self, command: str, **environment: str) -> str:
        """Run a command to its end, which has to be a good one; return what it wrote to stdout."""
        process = await self._execute(command, stdout=PIPE, stderr=PIPE, env={**self._environment, **environment})
        try:
            async with asyncio.timeout(PATIENCE):
                stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, f"{command} has ended with {process.returncode}:\n{stderr.decode()}"
        return stdout.decode().strip()

    async def start(self, command: str, **environment: str) -> Program:
        """Start a program that stays."""
        log = self.folder.parent / f"{len(self.programs)}.log"
        with log.open("wb") as file:
            process = await self._execute(command, stdout=file, stderr=STDOUT, env={**self._environment, **environment})
        program = Program(command, process, log)
        self.programs.append(program)
        return program

    async def serve(self, command: str) -> httpx.AsyncClient:
        """Start the API on a free port of the loopback interface; return a client when it answers."""
        api = await self.start(f"{command} --host 127.0.0.1 --port 0")
        address = await api.prints(_ADDRESS)
        return httpx.AsyncClient(base_url=address[1], trust_env=False, timeout=PATIENCE)

    async def stop(self, number: signal.Signals) -> dict[str, int]:
        """Send a signal to all programs; return the exit code of each, by its command."""
        for program in self.programs:
            program.process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            codes = {program.command: await program.process.wait() for program in self.programs}
        self.programs.clear()
        return codes

    async def end(self) -> None:
        """Leave nothing running, whatever became of the test."""
        for program in self.programs:
            if program.process.returncode is None:
                program.process.kill()
            await program.process.wait()

    async def _execute(self, command: str, **options: Any) -> Process:
        return await asyncio.create_subprocess_exec(*shlex.split(command), cwd=self.folder, **options)
