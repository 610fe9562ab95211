"""Handlers that note what they do, and the processes that run them until they are killed.

Decides nothing about what should be true; that is the tests' work. The hooks replace methods in the child only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeAlias
from unittest.mock import patch

import asyncpg
from sqlalchemy import text

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    Group,
    Settings,
    publish_event,
)
from pgebus._runtime.dispatching import Dispatcher, Following
from pgebus._runtime.leases import Lease
from pgebus._runtime.listening import Listener
from pgebus._runtime.outcome import Outcome
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Store

Pipe: TypeAlias = "Connection[tuple[str, int], str]"

# Without a unique constraint, which would hide a double; `runs` is written outside the handlers' transactions.
TABLES = """
CREATE TABLE effects (event_id bigint NOT NULL, handler text NOT NULL, attempt int NOT NULL, pid int NOT NULL);
CREATE TABLE runs (
  id bigint GENERATED ALWAYS AS IDENTITY, event_id bigint NOT NULL, attempt int NOT NULL, pid int NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(), ended_at timestamptz
);
"""
EFFECT = "INSERT INTO effects (event_id, handler, attempt, pid) VALUES (:event_id, :handler, :attempt, :pid)"


@dataclass
class Stage:
    """What the handlers of one process need.

    Attributes:
        notes: Connections of their own, so that what they note stays when a transaction doesn't.
        gate: Handlers of `job.gated` wait for it.
        reached: Called at each named point; where the process should die, it does.
        say: Called with a word and an event id, for the test to hear.
    """

    notes: asyncpg.Pool[asyncpg.Record]
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    reached: Callable[[str], None] = lambda _: None
    say: Callable[[str, int], None] = lambda *_: None


@asynccontextmanager
async def taking_notes(database: DatabaseSettings) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """Open the connections for notes."""
    url = database.sqlalchemy_url().set(drivername="postgresql").render_as_string(hide_password=False)
    async with asyncpg.create_pool(url, min_size=1, max_size=5) as pool:
        yield pool


def router_for(stage: Stage, group: Group | None = None) -> EventRouter:
    """Return the handlers of all tests with processes."""
    router = EventRouter(group=group)

    @asynccontextmanager
    async def noted(ctx: EventContext) -> AsyncIterator[None]:
        run = await stage.notes.fetchval(
            "INSERT INTO runs (event_id, attempt, pid) VALUES ($1, $2, $3) RETURNING id",
            ctx.event_id,
            ctx.attempt,
            os.getpid(),
        )
        try:
            yield
        finally:
            await stage.notes.execute("UPDATE runs SET ended_at = clock_timestamp() WHERE id = $1", run)

    async def effect(ctx: EventContext, handler: str) -> None:
        row = {"event_id": ctx.event_id, "handler": handler, "attempt": ctx.attempt, "pid": os.getpid()}
        assert ctx.session is not None
        await ctx.session.execute(text(EFFECT), row)

    @router.on("order.placed", transactional=True, name="reserve")
    async def reserve(ctx: EventContext, payload: dict[str, Any]) -> None:
        stage.reached("first handler entered")
        await effect(ctx, "reserve")
        stage.reached("first handler wrote")

    @router.on("order.placed", transactional=True, name="bill")
    async def bill(ctx: EventContext, payload: dict[str, Any]) -> None:
        stage.reached("second handler entered")
        await effect(ctx, "bill")
        stage.reached("second handler wrote")

    @router.on("mail.sent", name="send")
    async def send(ctx: EventContext, payload: dict[str, Any]) -> None:
        async with noted(ctx):
            stage.reached("first handler entered")

    @router.on("job.gated", transactional=True, name="gated")
    async def gated(ctx: EventContext, payload: dict[str, Any]) -> None:
        async with noted(ctx):
            await effect(ctx, "gated")
            stage.say("inside", ctx.event_id)
            try:
                await stage.gate.wait()
            except asyncio.CancelledError:
                stage.say("cancelled", ctx.event_id)
                raise
            if payload.get("fails") and ctx.attempt == 1:
                raise RuntimeError("as told")

    @router.on("job.deadly", transactional=True, name="deadly")
    async def deadly(ctx: EventContext, payload: dict[str, Any]) -> None:
        async with noted(ctx):
            os.kill(os.getpid(), signal.SIGKILL)

    @router.on("job.innocent", transactional=True, name="innocent")
    async def innocent(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await effect(ctx, "innocent")
        # Long enough to be still at it when the deadly one beside it strikes.
        await ctx.session.execute(text("SELECT pg_sleep(0.1)"))

    return router


@dataclass(frozen=True)
class Orders:
    """What a child is told at its birth; it travels through a pipe, since arguments of a process are public.

    Attributes:
        url: The database.
        event_system: Settings of the worker.
        through: By which address it reaches the database itself, where that is another than the one for its notes.
        die_at: The point at which it kills itself.
        returns_late: Whether it takes its lock again only after its handlers' outcome is known.
        group: The group of its handlers, where it is more than a name.
    """

    url: str
    event_system: dict[str, Any] = field(default_factory=dict)
    through: str | None = None
    die_at: str | None = None
    returns_late: bool = False
    group: Group | None = None

    def reached(self, point: str) -> None:
        if point == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(parent: Pipe, orders: Orders) -> None:
    """Be a worker until killed."""
    asyncio.run(_work(parent, orders))


async def _work(parent: Pipe, orders: Orders) -> None:
    database = DatabaseSettings.model_validate({"url": orders.through or orders.url})
    settings = Settings(database=database, event_system=orders.event_system)
    async with taking_notes(DatabaseSettings.model_validate({"url": orders.url})) as notes:
        stage = Stage(notes, reached=orders.reached, say=lambda word, event_id: parent.send((word, event_id)))
        asyncio.get_running_loop().add_reader(parent.fileno(), _listen, parent, stage.gate)
        with _hooks(stage, returns_late=orders.returns_late):
            async with EventSystem(router_for(stage, orders.group), settings):
                stage.say("ready", 0)
                await asyncio.Event().wait()


def outlast(parent: Pipe, orders: Orders) -> None:
    """Be a worker whose handler never returns; when told, stop, and come to the end of the program."""
    with patch("pgebus.system._CANCELLED_SECONDS", 0.05):
        asyncio.run(_outlast(parent, orders))


async def _outlast(parent: Pipe, orders: Orders) -> None:
    settings = Settings(database=DatabaseSettings.model_validate({"url": orders.url}), event_system=orders.event_system)
    router, gate = EventRouter(), asyncio.Event()

    @router.on("job.endless", name="endless")
    def endless(ctx: EventContext, payload: dict[str, Any]) -> None:
        parent.send(("inside", ctx.event_id))
        threading.Event().wait()

    asyncio.get_running_loop().add_reader(parent.fileno(), _listen, parent, gate)
    async with EventSystem(router, settings) as system:
        parent.send(("ready", 0))
        await gate.wait()
        await system.stop(wait_for_completion=False)
    asyncio.get_running_loop().remove_reader(parent.fileno())
    parent.send(("stopped", 0))


def _listen(parent: Pipe, gate: asyncio.Event) -> None:
    try:
        word = parent.recv()
    except (EOFError, OSError):
        os._exit(1)  # the test run is gone, however it went
    assert word == "go"
    gate.set()


def publish(parent: Pipe, orders: Orders) -> None:
    """Place an order, publish that, and commit both."""
    asyncio.run(_publish(parent, orders))


async def _publish(parent: Pipe, orders: Orders) -> None:
    manager = DatabaseSessionManager(DatabaseSettings.model_validate({"url": orders.url}))
    async with manager.session() as session:
        await session.execute(text("INSERT INTO orders (id) VALUES (7)"))
        event = await publish_event(session, "order.placed", {"order": 7}, "events")
        parent.send(("published", event.id))
        orders.reached("published")
        await session.commit()
        orders.reached("committed")
    await manager.close()


@contextmanager
def _hooks(stage: Stage, *, returns_late: bool) -> Iterator[None]:
    """Name the points between the handlers, and tell the test the outcome of each dispatch."""
    claim, complete = Store.claim, Store.complete
    dispatch = Dispatcher.dispatch
    begin, end = Statements.begin, Statements.end
    take_lock = Listener._take_lock
    decided = asyncio.Event()

    async def claim_(self: Store, *args: Any) -> list[Lease]:
        leases = await claim(self, *args)
        if leases:
            stage.reached("claimed")
        return leases

    async def complete_(self: Store, leases: list[Lease]) -> set[tuple[int, str]]:
        stage.reached("completion about to be written")
        kept = await complete(self, leases)
        stage.reached("completion written")
        return kept

    async def dispatch_(self: Dispatcher, lease: Lease, following: Following | None = None) -> Outcome:
        stage.reached("dispatched")
        outcome = await dispatch(self, lease, following)
        stage.reached("outcome known")
        stage.say(type(outcome).__name__, lease.fence.event_id)
        decided.set()
        return outcome

    def begin_(*args: Any) -> str:
        stage.reached("transaction about to begin")
        return begin(*args)

    def end_(self: Statements, *args: Any, **options: Any) -> str:
        stage.reached("handlers returned")
        return end(self, *args, **options)

    async def take_lock_(self: Listener, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        if returns_late and self._presence.worker_id is not None:
            await decided.wait()
        await take_lock(self, raw)

    with ExitStack() as stack:
        for owner, name, hook in (
            (Store, "claim", claim_),
            (Store, "complete", complete_),
            (Dispatcher, "dispatch", dispatch_),
            (Statements, "begin", staticmethod(begin_)),
            (Statements, "end", end_),
            (Listener, "_take_lock", take_lock_),
        ):
            stack.enter_context(patch.object(owner, name, hook))
        yield
