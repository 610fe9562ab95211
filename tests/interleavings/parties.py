"""The sessions of a spec: each has a task and connections of its own, and does what a step says, one after the other.

What a step sends is not committed until another step commits it, so that the others can come in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
from asyncpg.transaction import Transaction
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from pgebus._guard import dispatch_session, guard_engine
from pgebus._runtime.faults import sqlstate
from pgebus._runtime.leases import Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store, driver_of
from pgebus.database import make_engine
from pgebus.errors import PgebusError
from pgebus.session import GuardedSession
from pgebus.settings import DatabaseSettings

# A deadlock is a finding, not something to wait a second for.
SERVER_SETTINGS: Final = {"deadlock_timeout": "50ms"}
MARKER: Final = "the marker"


@dataclass(frozen=True)
class Step:
    """One thing that a session does; its name is what a spec and a report call it."""

    name: str
    do: Callable[[Party], Awaitable[object]]


@dataclass(frozen=True)
class FailedStep:
    """What became of a step that raised: the SQLSTATE, or the name of the error."""

    code: str
    error: Exception


class HeldLine(Line):
    """A line whose statements fall into one transaction at READ COMMITTED, which a later step ends."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self.raw: asyncpg.Connection[asyncpg.Record] | None = None
        self._begun: Transaction | None = None

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        async with self.transaction() as fetch:
            return await fetch(sql, *args)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Callable[..., Awaitable[list[asyncpg.Record]]]]:
        raw = await self.driver()
        if self._begun is None:
            self._begun = raw.transaction(isolation="read_committed")
            await self._begun.start()
        async with raw.transaction():  # a savepoint: a claim that meets the unique index is repeated
            yield raw.fetch

    async def driver(self) -> asyncpg.Connection[asyncpg.Record]:
        if self.raw is None:
            self.raw = await self._connect()
        return self.raw

    async def end(self, how: str) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            await (begun.commit() if how == "COMMIT" else begun.rollback())
        elif self.raw is not None and self.raw.is_in_transaction():
            assert await self.raw.execute(how) == how


class Party:
    """One session of a spec.

    Args:
        name: As the spec calls it.
        worker_id: What it claims as.
        settings: The database.
        isolation: The level of what it publishes and handles; a worker's own statements are always READ COMMITTED.
        statements: What its store sends.
    """

    def __init__(
        self, name: str, worker_id: int, settings: DatabaseSettings, isolation: str, statements: Statements
    ) -> None:
        self.name = name
        self.worker_id = worker_id
        self.isolation = isolation
        self.statements = statements
        self.pids: set[int] = set()
        self.leases: list[Lease] = []
        one = settings.model_copy(update={"pool_size": 1, "max_overflow": 0})
        options: dict[str, Any] = {"connect_args": {"server_settings": SERVER_SETTINGS}}
        self._engines = [
            make_engine(one, isolation_level="AUTOCOMMIT", **options),
            make_engine(one, isolation_level=isolation, **options),
        ]
        guard_engine(self._engines[0])
        for engine in self._engines:
            event.listen(engine.sync_engine, "connect", self._connected)
        self.line = HeldLine(self._engines[0])
        self.store = Store(self.line, statements, "events")
        # The same connection, each statement committed at once: for a session that does not use the other one.
        self.at_once = Store(Line(self._engines[0]), statements, "events")
        self.session = AsyncSession(self._engines[1], expire_on_commit=False)
        self.guarded: GuardedSession | None = None
        self._dispatch = AsyncExitStack()
        self._steps: asyncio.Queue[tuple[Step, asyncio.Future[object]]] = asyncio.Queue()
        self._task = asyncio.create_task(self._live(), name=f"party {name}")

    def start(self, step: Step) -> asyncio.Future[object]:
        """Begin *step*; the future has what it returned, or a `FailedStep`."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._steps.put_nowait((step, future))
        return future

    async def begin(self) -> None:
        """Open the handlers' transaction as the dispatcher does."""
        raw = await self.line.driver()
        begin = self.statements.begin(self.isolation, MARKER)
        await raw.execute(self.statements.CLEAN + begin)
        connection = self.line._connection
        assert isinstance(connection, AsyncConnection)
        assert await driver_of(connection) is raw
        session = await self._dispatch.enter_async_context(dispatch_session(connection, begin=begin))
        self.guarded = GuardedSession(session)

    async def complete(self, lease: Lease, *, forget: bool = False) -> None:
        """Send what the dispatcher ends that transaction with, except for its COMMIT."""
        await self._dispatch.aclose()
        raw = await self.line.driver()
        end = self.statements.end(*lease.fence, MARKER, forget=forget)
        assert end.endswith("; COMMIT")
        await raw.execute(end.removesuffix("; COMMIT"))

    async def end(self, how: str) -> None:
        """COMMIT or ROLLBACK whatever is open."""
        await self._dispatch.aclose()
        await self.line.end(how)
        if how == "COMMIT":
            await self.session.commit()
        else:
            await self.session.rollback()
        self.session.expunge_all()

    async def close(self) -> None:
        """End its task, its transactions and its connections."""
        self._task.cancel()
        await asyncio.wait([self._task])
        raw = self.line.raw
        await self._dispatch.aclose()
        if raw is not None and raw.is_in_transaction():  # after a failure
            raw.terminate()
        await self.session.close()
        await self.line.close()
        await self.at_once._line.close()
        for engine in self._engines:
            await engine.dispose()

    def _connected(self, connection: Any, _record: object) -> None:
        self.pids.add(connection.driver_connection.get_server_pid())

    async def _live(self) -> None:
        while True:
            step, future = await self._steps.get()
            try:
                done = await step.do(self)
            except Exception as error:  # noqa: BLE001 - which error may come is for the spec to say
                name = type(error).__name__
                done = FailedStep(name if isinstance(error, PgebusError) else sqlstate(error) or name, error)
                await self.end("ROLLBACK")
            if not future.done():
                future.set_result(done)
