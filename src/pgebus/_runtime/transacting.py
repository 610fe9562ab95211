"""The connections on which handlers' transactions run: kept between deliveries, thrown away when in doubt.

Taking a connection out of a pool, and putting it back, costs as much as a short handler. It decides nothing about
deliveries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgebus._runtime.leases import Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import driver_of
from pgebus._runtime.supervision import DATABASE_ERRORS

# A half-open connection gives no error. The commit may have to wait: for deferred constraints, or for a standby.
BEGIN_SECONDS: Final = 15.0
COMMIT_SECONDS: Final = 60.0
_CLEANUP_SECONDS: Final = 5.0


class NotBegunError(Exception):
    """The transaction could not even be opened: no handler has run, so none of them is to blame."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


@dataclass(slots=True, eq=False)
class Transaction:
    """One that is open.

    Attributes:
        connection: SQLAlchemy's side of it, in AUTOCOMMIT.
        raw: The driver's.
        begin: The message that has begun it.
        marker: What it is marked with.
        spoilt: Whether the connection has to be thrown away at its end.
    """

    connection: AsyncConnection
    raw: asyncpg.Connection[asyncpg.Record]
    begin: str = ""
    marker: str = ""
    spoilt: bool = False


class Transactions:
    """Opens the transactions of one worker.

    Args:
        engine: The guarded engine, in AUTOCOMMIT: SQLAlchemy opens and ends nothing. Its pool has a connection for
            each delivery that runs at once.
        statements: The statements for the schema.
        isolation_level: Of the transactions.
        rng: Makes the markers.
    """

    def __init__(self, engine: AsyncEngine, statements: Statements, *, isolation_level: str, rng: Random) -> None:
        self._engine = engine
        self._sql = statements
        self._isolation_level = isolation_level
        self._rng = rng
        self._idle: list[Transaction] = []

    @contextlib.asynccontextmanager
    async def open(self, lease: Lease) -> AsyncIterator[Transaction]:
        """Begin a transaction for *lease*; what is left of it at the end of the block is rolled back.

        Raises:
            NotBegunError: If that was not possible.
        """
        fence = lease.fence
        marker = f"{fence.event_id}:{fence.claim_seq}:{fence.worker_id}:{self._rng.getrandbits(32)}"
        begin = self._sql.begin(self._isolation_level, marker)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(BEGIN_SECONDS):
                    transaction = await self._take()
                    stack.push_async_callback(self._put_back, transaction)
                    with answered(transaction.raw):
                        await transaction.raw.execute(self._sql.CLEAN + begin)
            except DATABASE_ERRORS as error:
                raise NotBegunError(error) from error
            transaction.begin, transaction.marker = begin, marker
            yield transaction

    async def complete(self, lease: Lease, transaction: Transaction) -> str:
        """Complete *lease* and commit, in one message; return what the COMMIT was answered with."""
        with answered(transaction.raw):
            return await transaction.raw.execute(
                self._sql.end(*lease.fence, transaction.marker), timeout=COMMIT_SECONDS
            )

    async def make_room(self) -> None:
        """Give one connection back to the pool, for somebody else who wants one."""
        if self._idle:
            await _close(self._idle.pop())

    async def close(self) -> None:
        """Give all connections back to the pool."""
        while self._idle:
            await _close(self._idle.pop())

    async def _take(self) -> Transaction:
        while self._idle:
            kept = self._idle.pop()
            if not kept.raw.is_closed():
                return kept
            await _close(kept)  # it was lost while nothing was done with it, for example at a restart
        connection = await self._engine.connect()
        try:
            return Transaction(connection, await driver_of(connection))
        except BaseException:
            await connection.close()
            raise

    async def _put_back(self, transaction: Transaction) -> None:
        connection, raw = transaction.connection, transaction.raw
        await _roll_back(connection, raw)
        # A handler that has dug the connection out may have changed what SQLAlchemy knows of it; the pool's own net
        # catches what comes back with a transaction.
        if (
            transaction.spoilt
            or connection.closed
            or raw.is_closed()
            or connection.invalidated
            or connection.in_transaction()
        ):
            await _close(transaction)
        else:
            self._idle.append(transaction)


async def _close(transaction: Transaction) -> None:
    if not transaction.connection.closed:
        with contextlib.suppress(*DATABASE_ERRORS):  # it is being given up
            await transaction.connection.close()


@contextlib.contextmanager
def answered(raw: asyncpg.Connection[asyncpg.Record]) -> Iterator[None]:
    """Break a connection that was not waited for to the end: nobody knows what the next statement would meet there."""
    try:
        yield
    except (TimeoutError, asyncio.CancelledError):
        raw.terminate()
        raise


async def _roll_back(connection: AsyncConnection, raw: asyncpg.Connection[asyncpg.Record]) -> None:
    """End a transaction that is still open; a connection on which that fails is thrown away."""
    if connection.closed:  # a handler dug it out and gave it back; the pool's own net has caught it
        return
    if raw.is_closed():
        await connection.invalidate()
        return
    if not raw.is_in_transaction():
        return
    try:
        async with asyncio.timeout(_CLEANUP_SECONDS):
            await raw.execute("ROLLBACK")
    except BaseException as error:
        raw.terminate()
        with contextlib.suppress(*DATABASE_ERRORS):
            await connection.invalidate()
        if not isinstance(error, DATABASE_ERRORS):
            raise
