"""The LISTEN connection: wake-ups, and the lock that says that this worker lives.

Losing it costs latency, never an event: nothing is claimed until it is back, and then everything due is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from datetime import datetime
from typing import Final, NoReturn

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from pgebus._runtime.presence import Presence
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, driver_of
from pgebus._runtime.supervision import DATABASE_ERRORS
from pgebus._runtime.waking import Wakeup
from pgebus.errors import SessionlessConnectionError

logger = logging.getLogger(__name__)

# A half-open connection is deaf without an error. Beat and answer together bound how long that can last.
BEAT_SECONDS: Final = 4.0
ANSWER_SECONDS: Final = 5.0
_SLICES: Final = 10

# So that the server, too, notices within seconds that we are gone, and lets go of the lock. A unix socket ignores them.
_KEEPALIVE: Final = (
    "SET tcp_keepalives_idle = 2; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; "
    "SET tcp_user_timeout = 8000; SET statement_timeout = 0; SET lock_timeout = 0; "
    "SET default_transaction_read_only = off; SET search_path = pg_catalog, pg_temp; "
    # Before PostgreSQL 14 there is none.
    "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'idle_session_timeout'"
)

_NOT_OURS: Final = (
    "The connection for LISTEN keeps no session, or leads to another database than the pool: a notification did not "
    "arrive, or the worker's lock or the tables were not there. A transaction pooler such as PgBouncer does that. Set "
    "`database.listen_url` to a direct connection to the same database; where there is none, set "
    "`event_system.liveness` to 'beat': such a worker needs no session, and only polls."
)


class Listener:
    """The loop that owns the LISTEN connection.

    Args:
        engine: Makes the connection; without a pool, and never through a transaction pooler.
        other: A line to the same database through the worker's own pool.
        statements: The statements for the schema.
        channel: What to LISTEN on.
        groups: Returns the groups that this worker serves.
        presence: Told when the worker's lock is held, and when it is not.
        wakeup: Told of notifications.
        health: Told when the connection works.
        version: The version of this library, for the row in `workers`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        other: Line,
        statements: Statements,
        *,
        channel: str,
        groups: Callable[[], list[str]],
        presence: Presence,
        wakeup: Wakeup,
        health: Pulse,
        version: str,
    ) -> None:
        self._engine = engine
        self._other = other
        self._sql = statements
        self._channel = channel
        self._groups = groups
        self._presence = presence
        self._wakeup = wakeup
        self._health = health
        self._version = version
        self._backend: tuple[int, datetime] | None = None
        self._proved = False

    async def run(self) -> NoReturn:
        """Connect, take the lock, LISTEN, and stay until the connection is lost.

        Raises:
            ConnectionError: When it is lost; begin again.
            SessionlessConnectionError: When the connection keeps no session; only the first time.
        """
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(ANSWER_SECONDS * 3):  # a connection may go deaf before it is ours
                connection = await stack.enter_async_context(self._engine.connect())
                raw = await driver_of(connection)
            lost = asyncio.Event()
            # The driver calls it in the loop's own thread.
            raw.add_termination_listener(lambda _: self._went_away(lost))
            try:
                async with asyncio.timeout(ANSWER_SECONDS * 3):
                    await self._take_lock(raw)
                    await raw.add_listener(self._channel, self._notified)
                    await self._prove(raw)
                self._presence.arrive()
                self._health.well()
                # Only now: what was notified between two connections was notified to nobody.
                self._wakeup.doubt()
                while not lost.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(lost.wait(), BEAT_SECONDS)
                    if not lost.is_set():
                        await self._beat(raw)
                raise ConnectionError("The LISTEN connection was lost.")
            except asyncio.CancelledError:
                self._presence.leave()
                with contextlib.suppress(*DATABASE_ERRORS):
                    await raw.close(timeout=2)  # a stop: the server is told, and lets go of the lock
                raise
            finally:
                self._presence.leave()
                raw.terminate()  # at once: a lost connection would let a polite close wait
                with contextlib.suppress(*DATABASE_ERRORS):
                    await connection.invalidate()

    def _went_away(self, lost: asyncio.Event) -> None:
        self._presence.leave()
        lost.set()

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._wakeup.notified(str(payload))

    async def _beat(self, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        answer = asyncio.ensure_future(raw.fetchval(self._sql.listens, self._channel))
        # Not a timeout() around it, and in slices: a handler that blocks the loop uses up one slice, however long it
        # takes, and in the others the answer can still arrive.
        try:
            for _ in range(_SLICES):
                if not answer.done():
                    await asyncio.wait([answer], timeout=ANSWER_SECONDS / _SLICES)
        finally:
            answer.cancel()
        if not answer.done() or answer.cancelled():
            raise TimeoutError("The LISTEN connection does not answer.")
        if not answer.result():
            raise ConnectionError("The LISTEN connection answers, but it no longer listens.")
        self._health.well()

    async def _take_lock(self, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        """Be the worker that this process was before, or a new one where others have ended that one."""
        await raw.execute(_KEEPALIVE)
        worker_id = self._presence.worker_id
        if worker_id is not None:
            if not await raw.fetchval(self._sql.lock, worker_id):
                await self._end_ghost(raw)
                raise ConnectionError(
                    "This worker's lock is still held: by its own lost connection, or by a recoverer."
                )
            if await raw.fetchval(self._sql.return_to_duty, worker_id) is None:
                await raw.fetchval(self._sql.unlock, worker_id)
                logger.warning(
                    "This worker was cut off for too long: its deliveries were given to others. Its handlers are "
                    "cancelled, and it goes on under a new identity."
                )
                self._presence.depart()
                worker_id = None
        if worker_id is None:
            worker_id = self._presence.new_id()
            # The lock first: a row without a lock is that of a dead worker.
            if not await raw.fetchval(self._sql.lock, worker_id):
                self._presence.depart()
                raise ConnectionError("A new worker's lock is held by somebody else.")
            try:
                await raw.execute(
                    self._sql.register,
                    worker_id,
                    self._channel,
                    self._groups(),
                    socket.gethostname(),
                    os.getpid(),
                    self._version,
                )
            except asyncpg.UndefinedTableError as error:
                if self._proved:
                    raise
                # The pool has just seen the tables: this is another database.
                raise SessionlessConnectionError(_NOT_OURS) from error
        row = await raw.fetchrow(self._sql.backend)
        self._backend = (row["pid"], row["backend_start"]) if row is not None else None

    async def _end_ghost(self, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        """End our own former backend, if it is what holds the lock: the server may not know that its client is gone."""
        if self._backend is not None:
            await raw.fetch(self._sql.end_ghost, *self._backend)

    async def _prove(self, raw: asyncpg.Connection[asyncpg.Record]) -> None:
        """Make sure, once, that this connection keeps its session between statements.

        Behind a transaction pooler both LISTEN and the advisory lock seem to work, and belong to somebody else a
        moment later. So: a notification sent from the other side must arrive, and the lock must be seen from there,
        held by the backend that still answers here.
        """
        if self._proved:
            return
        probe = f"pgebus_probe_{secrets.token_hex(8)}"
        arrived = asyncio.Event()

        def hear(*_: object) -> None:
            arrived.set()

        await raw.add_listener(probe, hear)
        await self._other.fetch(self._sql.notify, probe, "")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(arrived.wait(), ANSWER_SECONDS)
        pid = await raw.fetchval("SELECT pg_backend_pid()")
        held = await self._other.value(self._sql.holds_lock, self._presence.worker_id, pid)
        if not (arrived.is_set() and held):
            # One that has just been lost has lost its lock with it. It is no pooler's, and this says so by raising.
            await raw.fetchval("SELECT pg_backend_pid()")
            raise SessionlessConnectionError(_NOT_OURS)
        await raw.remove_listener(probe, hear)
        self._proved = True
