"""The supervisor of worker processes: starts them, signals them, hears of their ends.

What to do, and when, `supervision` decides.

POSIX only. Processes are started anew, never forked: each imports the program itself, and has its own connections.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from time import monotonic
from typing import Any

from pgebus.cli.worker.orders import Order
from pgebus.cli.worker.reloading import changes
from pgebus.cli.worker.supervision import Finish, Send, Start, Supervisor

__all__ = ["supervise"]

logger = logging.getLogger(__name__)


def supervise(order: Order, processes: int, reload: tuple[Path, ...]) -> int:
    """Keep *processes* workers running; return the exit status.

    Args:
        order: What each of them does.
        processes: How many.
        reload: Directories whose changes restart them; none: what ends is started again by itself.
    """
    return asyncio.run(_Crew(order, Supervisor(processes, SystemRandom(), reloading=bool(reload))).run(reload))


class _Crew:
    """The processes.

    Each has one end of a socket, and the supervisor holds the other one: when it is gone, however it ended, they read
    the end of it, and end too. Each is in a session of its own, so that Ctrl-C in the terminal is not for them: they
    would take it and what the supervisor forwards for two signals.
    """

    def __init__(self, order: Order, supervisor: Supervisor) -> None:
        self._order = order
        self._supervisor = supervisor
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._happened: asyncio.Queue[Callable[[], None]] = asyncio.Queue()

    async def run(self, reload: tuple[Path, ...]) -> int:
        """Do what the supervisor decides, until it has finished; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._happened.put_nowait, lambda number=number: self._told(number))
        if reload:
            self._spawn(self._watch(reload))
        try:
            while True:
                for action in self._supervisor.decide(monotonic()):
                    match action:
                        case Start(place):
                            await self._start(place)
                        case Send(place, its):
                            with suppress(ProcessLookupError):
                                self._processes[place].send_signal(its)
                        case Finish(status):
                            return status
                await self._wait()
        finally:
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    process.kill()
            for task in self._tasks:
                task.cancel()

    async def _wait(self) -> None:
        """Wait until something has happened, or it is time to look."""
        look = self._supervisor.next_look()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if look == float("inf") else max(0.0, look - monotonic())):
                (await self._happened.get())()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, place: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "pgebus.cli.worker",
                    replace(self._order, life=theirs.fileno()).text(),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:  # no memory, or too many processes: the others are not to end for it
                ours.close()
                logger.error(
                    "Worker process %d of %d could not be started: %s.", place + 1, self._supervisor.count, error
                )
                self._supervisor.started(place, monotonic())
                self._happened.put_nowait(lambda: self._never_started(place))
                return
        self._processes[place] = process
        self._supervisor.started(place, monotonic())
        logger.info("Worker process %d is started, %d of %d.", process.pid, place + 1, self._supervisor.count)
        self._spawn(self._live(place, process, ours))

    def _never_started(self, place: int) -> None:
        self._supervisor.ended(place, 1, monotonic())

    async def _live(self, place: int, process: asyncio.subprocess.Process, life: socket.socket) -> None:
        """Follow one life of a process."""
        with life:
            life.setblocking(False)
            ready = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(life, 1))
            ended = asyncio.ensure_future(process.wait())
            try:
                # Its end, too: what it has started may hold the other end of the socket, and live on.
                await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
                if ready.done() and ready.result():
                    self._happened.put_nowait(self._supervisor.ready)
                status = await ended
            finally:
                ready.cancel()
                ended.cancel()
        self._happened.put_nowait(lambda: self._ended(place, process.pid, status))

    def _ended(self, place: int, pid: int, status: int) -> None:
        del self._processes[place]
        pause = self._supervisor.ended(place, status, monotonic())
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        if pause:
            logger.warning("Worker process %d has ended %s; it is started again in %.1f s.", pid, how, pause)
        elif pause is None and self._supervisor.reloading:
            logger.warning("Worker process %d has ended %s; it is started again when a file changes.", pid, how)
        else:
            logger.info("Worker process %d has ended %s.", pid, how)

    def _told(self, number: int) -> None:
        logger.info("%s: it is handed on to %d worker processes.", signal.Signals(number).name, len(self._processes))
        self._supervisor.told(number, monotonic())

    async def _watch(self, directories: tuple[Path, ...]) -> None:
        async for paths in changes(directories):
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            logger.info("Changed: %s%s. The worker is started again.", min(paths), more)
            self._happened.put_nowait(lambda: self._supervisor.changed(monotonic()))
