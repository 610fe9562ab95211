"""A worker process: an `EventSystem` with every kind of handler, some of which fail, wait or take their time."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from pgebus import EventContext, EventRouter, EventSystem, Reject, Retry, Settings, Snooze
from pgebus.health import SystemState
from torture.tables import ACCOUNTS, EVERY, MAX_ATTEMPTS, draw
from torture.tally import Tally

Pipe: TypeAlias = "Connection[str, str]"

DATABASE_ERRORS: Final = (
    DBAPIError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

GRACE_SECONDS: Final = 2.0
STOP_SECONDS: Final = 10.0
N_WORKERS: Final = 8
STOPPED: Final = 0
# PostgreSQL did not answer when it started; a process manager would start it again, and so does the crew.
NOT_STARTED: Final = 2
# The system has ended by itself: never without a bug.
CRASHED: Final = 3

_EFFECT: Final = text(
    "INSERT INTO effects (event_id, consumer_group, handler, claim_seq, attempt)"
    " VALUES (:event, :grp, :handler, :seq, :n)"
)
_BUMP: Final = text("UPDATE balances SET amount = amount + 1 WHERE account = :account")
_START: Final = "INSERT INTO starts (event_id, consumer_group, handler, claim_seq, attempt) VALUES ($1, $2, $3, $4, $5)"


@dataclass(frozen=True)
class Duty:
    """What a worker is told.

    Attributes:
        slot: Its place in the crew.
        slots: How large the crew is.
        url: How it reaches PostgreSQL.
        seed: Decides which handlers fail.
        home: Where logs, counters and the file of the plain functions are.
    """

    slot: int
    slots: int
    url: str
    seed: int
    home: str


def work(pipe: Pipe, duty: Duty) -> None:
    """Be a worker until told to stop; the exit code says how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    logging.basicConfig(
        filename=Path(duty.home) / f"worker-{duty.slot}.log",
        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s",
        level=logging.INFO,
    )
    try:
        sys.exit(asyncio.run(_work(pipe, duty)))
    except Exception:
        logging.getLogger("torture").exception("The worker has failed.")
        sys.exit(CRASHED)


async def _work(pipe: Pipe, duty: Duty) -> int:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    loop.add_reader(pipe.fileno(), lambda: os._exit(1))  # the parent is gone
    tally = Tally(Path(duty.home) / "tally", duty.slots)
    logging.getLogger("pgebus._runtime.acknowledging").setLevel(logging.DEBUG)  # refusals after a lost answer
    logging.getLogger().addHandler(_Counting(tally, duty.slot))
    journal = os.open(Path(duty.home) / "audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    notes = asyncpg.create_pool(
        duty.url,
        min_size=0,
        max_size=4,
        timeout=5,
        command_timeout=5,
        server_settings={"application_name": f"torture-notes-{duty.slot}"},
    )
    async with notes:
        system = EventSystem(_router(notes, tally, duty, journal), _settings(duty))
        try:
            await system.start()
        except DATABASE_ERRORS as error:
            logging.getLogger("torture").warning("Not started: %s", error)
            return NOT_STARTED
        pipe.send("ready")
        ended, before = CRASHED, tally.get(duty.slot, "reconnects")

        def note_failures() -> None:
            tally.set(duty.slot, "reconnects", before + sum(loop.failures for loop in system.health().loops))

        while system.health().state is SystemState.RUNNING:
            note_failures()
            try:
                await asyncio.wait_for(told.wait(), 0.25)
            except TimeoutError:
                continue
            ended = STOPPED
            break
        await system.stop(timeout=STOP_SECONDS)
        note_failures()
        notes.terminate()
    return ended


def _settings(duty: Duty) -> Settings:
    return Settings(
        database={
            "url": duty.url,
            "application_name": f"torture-worker-{duty.slot}",
            "connect_timeout_seconds": 5.0,
        },
        event_system={
            "n_workers": N_WORKERS,
            "max_attempts": MAX_ATTEMPTS,
            "backoff_first_seconds": 0.05,
            "backoff_ceiling_seconds": 0.5,
            "poll_interval_seconds": 2.0,
            "recovery_grace_seconds": GRACE_SECONDS,
            "retention_seconds": None,
        },
    )


# Of asyncpg, when a connection is cut while it asks for TLS: a future of the driver's own that nobody awaits any more.
_DRIVERS_OWN: Final = "unexpected connection_lost() call"


class _Counting(logging.Handler):
    """Counts what is said once, and rarely, in the log."""

    def __init__(self, tally: Tally, slot: int) -> None:
        super().__init__()
        self._tally = tally
        self._slot = slot

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.CRITICAL or (record.name == "asyncio" and record.levelno >= logging.ERROR):
            self._tally.add(self._slot, "alarms", _DRIVERS_OWN not in record.getMessage())
        elif record.msg.endswith("What its handlers did was rolled back.") or record.msg.startswith("The lease on"):
            self._tally.add(self._slot, "refused")
        elif record.msg.startswith("This worker was cut off"):
            self._tally.add(self._slot, "departed")


def _router(notes: asyncpg.Pool[asyncpg.Record], tally: Tally, duty: Duty, journal: int) -> EventRouter:
    router = EventRouter()
    billing, mail, audit = (EventRouter(group=name) for name in ("billing", "mail", "audit"))

    @contextmanager
    def inside() -> Iterator[None]:
        tally.add(duty.slot, "entered")
        try:
            yield
        finally:
            tally.add(duty.slot, "left")

    async def effect(ctx: EventContext, handler: str) -> None:
        assert ctx.session is not None
        await ctx.session.execute(
            _EFFECT,
            {"event": ctx.event_id, "grp": ctx.group, "handler": handler, "seq": ctx.claim_seq, "n": ctx.attempt},
        )

    async def bump(ctx: EventContext, number: int) -> None:
        assert ctx.session is not None
        await ctx.session.execute(_BUMP, {"account": number % ACCOUNTS})

    async def start(ctx: EventContext, handler: str) -> None:
        await notes.execute(_START, ctx.event_id, ctx.group, handler, ctx.claim_seq, ctx.attempt)

    async def stumble(ctx: EventContext, payload: dict[str, Any], handler: str) -> None:
        await _stumble(ctx, draw(duty.seed, handler, payload["number"], ctx.attempt, ctx.claim_seq))

    @billing.on("order.placed", transactional=True, name="bill")
    async def bill(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await effect(ctx, "bill")
            await stumble(ctx, payload, "bill")

    @billing.on("order.placed", transactional=True, name="reserve")
    async def reserve(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await effect(ctx, "reserve")
            if payload["number"] % EVERY == 0:
                await ctx.publish("order.billed", {"number": -payload["number"]})
            await stumble(ctx, payload, "reserve")
            await bump(ctx, payload["number"])

    @billing.on("stock.moved", transactional=True, name="move")
    async def move(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await effect(ctx, "move")
            await stumble(ctx, payload, "move")
            await bump(ctx, payload["number"])

    @billing.on("order.refused", transactional=True, name="refuse")
    async def refuse(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await effect(ctx, "refuse")
            raise Reject("as announced")

    @mail.on("order.#", name="send")
    @mail.on("note.*", name="send")
    async def send(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await start(ctx, "send")
            await stumble(ctx, payload, "send")

    @mail.on("stock.moved", name="count")
    async def count(ctx: EventContext, payload: dict[str, Any]) -> None:
        with inside():
            await start(ctx, "count")
            await stumble(ctx, payload, "count")

    @audit.on("order.placed", name="note")
    def note(ctx: EventContext, payload: dict[str, Any]) -> None:
        os.write(journal, f"{ctx.event_id} {ctx.claim_seq}\n".encode())
        if draw(duty.seed, "note", payload["number"], ctx.attempt) < 10:
            raise RuntimeError("one of a hundred")

    for each in (billing, mail, audit):
        router.include_router(each)
    return router


async def _stumble(ctx: EventContext, drawn: int) -> None:
    """Fail, wait or go on: decided by *drawn*, below a thousand."""
    if drawn < 10:
        raise RuntimeError("one of a hundred")
    if drawn < 15:
        raise Retry(delay=timedelta(milliseconds=50))
    if drawn < 20:
        raise Snooze(timedelta(milliseconds=50))
    if drawn < 120:
        await asyncio.sleep(random.uniform(0.005, 0.05))
    elif drawn < 130 and ctx.session is not None:
        await ctx.session.execute(text("SELECT pg_sleep(0.2)"))
