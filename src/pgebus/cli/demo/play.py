"""The demo from its beginning to its end: a server, the tables, two workers, the story, the balance.

Whatever happens, the server and the workers are gone afterwards.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from pydantic import SecretStr
from sqlalchemy import select

from pgebus import DatabaseSessionManager, DatabaseSettings, __version__, metadata
from pgebus.cli.demo.balance import draw_up
from pgebus.cli.demo.crew import WorkerProcess, worker_processes
from pgebus.cli.demo.screen import Screen
from pgebus.cli.demo.shop import Base
from pgebus.cli.demo.stage import BrokenPromiseError, Stage
from pgebus.cli.demo.story import tell
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade

WORKERS: Final = ["worker-1", "worker-2"]

# What the shop would set in production, with other numbers: here nobody wants to wait.
WORKER_SETTINGS: Final = {
    "PGEBUS_EVENT_SYSTEM__MAX_ATTEMPTS": "3",
    "PGEBUS_EVENT_SYSTEM__BACKOFF_FIRST_SECONDS": "0.3",
    "PGEBUS_EVENT_SYSTEM__BACKOFF_CEILING_SECONDS": "0.6",
    "PGEBUS_EVENT_SYSTEM__SHUTDOWN_TIMEOUT_SECONDS": "0.5",
}


def play(postgres: EmbeddedPostgres) -> bool:
    """Run the demo; return whether everything went as promised.

    Args:
        postgres: A server that does not run yet.

    Raises:
        KeyboardInterrupt: When it was interrupted or told to end; nothing is left behind.
    """
    screen = Screen()
    try:
        with _every_end_cleans_up(), ExitStack() as stack:
            _introduce(screen)
            stack.callback(postgres.stop)
            with _nothing_in_between():
                workers = stack.enter_context(worker_processes(WORKERS, WORKER_SETTINGS))
            kept = _perform(screen, postgres, workers)
    except KeyboardInterrupt:
        screen.verdict("Interrupted. The server, its data and the workers are gone.", good=False)
        raise
    if kept:
        screen.verdict(f"All promises kept, in {screen.seconds:.1f} s. The server and its data are gone.", good=True)
        screen.say("The program that you have just seen is pgebus/cli/demo; begin with shop.py, then worker.py.")
    return kept


def _introduce(screen: Screen) -> None:
    screen.title(f"pgebus {__version__}: the life of an order")
    screen.say(
        "A shop keeps its data in PostgreSQL. Other parts of it want to know what happens to an order: reliably, once, "
        "and without a message broker beside the database."
    )
    screen.say("Starting a PostgreSQL server and two worker processes ...")


def _perform(screen: Screen, postgres: EmbeddedPostgres, workers: list[WorkerProcess]) -> bool:
    """Prepare the database and tell the story; show what went wrong while the workers' logs are still there."""
    with _nothing_in_between():
        postgres.start()
    # Finished settings: what the environment says about the user's own database does not matter here.
    database = DatabaseSettings(url=SecretStr(postgres.url()))
    upgrade(database)
    for worker in workers:
        worker.begin(postgres.url())
    try:
        asyncio.run(_tell(screen, database, workers))
    except BrokenPromiseError as broken:
        screen.verdict(f"Promise broken after {screen.seconds:.1f} s: {broken}.", good=False)
        screen.code(*(line for worker in workers for line in worker.last_words()))
        return False
    return True


async def _tell(screen: Screen, database: DatabaseSettings, workers: list[WorkerProcess]) -> None:
    async with DatabaseSessionManager(database) as sessions:
        stage = Stage(screen, sessions, workers)
        await _set_up(stage)
        await tell(stage)
        await draw_up(stage)


async def _set_up(stage: Stage) -> None:
    """Make the shop's tables, and wait for the workers to wait for events."""
    async with stage.sessions.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    table = metadata.tables["pgebus.workers"]
    for worker in stage.workers:
        query = select(table.c.id).where(table.c.pid == worker.pid, table.c.idle)
        await stage.until(query, f"{worker.name} was to start")
    pids = " and ".join(str(worker.pid) for worker in stage.workers)
    stage.screen.say(
        f"Here are a fresh PostgreSQL server, the tables of pgebus, and two worker processes (pid {pids}) that handle "
        "events. This process is the shop: it takes orders and publishes. They share nothing but the database."
    )


@contextmanager
def _every_end_cleans_up() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo as Ctrl-C does: through every `finally`."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    # What is ignored stays so: nohup means it.
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _nothing_in_between() -> Iterator[None]:
    """Put an interrupt off until the block has ended, so that all that is made in it is known and can be removed."""
    came: list[int] = []
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
