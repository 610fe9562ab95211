"""The connections on which handlers' transactions run: kept between deliveries, thrown away when in doubt.

Taking a connection out of a pool, and putting it back, costs as much as a short handler. It decides nothing about
deliveries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgebus._runtime.leases import Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import driver_of, give_up
from pgebus._runtime.supervision import DATABASE_ERRORS

# A half-open connection gives no error. The commit may have to wait: for deferred constraints, or for a standby.
BEGIN_SECONDS: Final = 15.0
COMMIT_SECONDS: Final = 60.0
_CLEANUP_SECONDS: Final = 5.0


class LostAheadError(Exception):
    """The transaction was begun ahead, and lost before its handlers had an answer in it: they are not to blame."""


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
        ahead: Whether it was begun before its delivery's turn came, so that nobody knows whether it is still there.
        begun_for: The delivery for which the next one has been begun already, on the same connection.
    """

    connection: AsyncConnection
    raw: asyncpg.Connection[asyncpg.Record]
    begin: str = ""
    marker: str = ""
    spoilt: bool = False
    ahead: bool = False
    begun_for: Lease | None = None


class Transactions:
    """Opens the transactions of one worker.

    Under a backlog one message ends a transaction and begins the next: a transaction is open between two deliveries,
    for as long as it takes to go from one to the other.

    Args:
        engine: The guarded engine, in AUTOCOMMIT: SQLAlchemy opens and ends nothing. Its pool has a connection for
            each delivery that runs at once.
        statements: The statements for the schema.
        isolation_level: Of the transactions.
        rng: Makes the markers.
        forgets: Returns whether a group keeps no history.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        statements: Statements,
        *,
        isolation_level: str,
        rng: Random,
        forgets: Callable[[str], bool] = lambda _group: False,
    ) -> None:
        self._engine = engine
        self._sql = statements
        self._isolation_level = isolation_level
        self._rng = rng
        self._forgets = forgets
        self._idle: list[Transaction] = []
        self._begun: dict[Lease, Transaction] = {}

    @contextlib.asynccontextmanager
    async def open(self, lease: Lease) -> AsyncIterator[Transaction]:
        """Begin a transaction for *lease*; what is left of it at the end of the block is rolled back.

        Raises:
            NotBegunError: If that was not possible.
        """
        async with contextlib.AsyncExitStack() as stack:
            begun = self._begun.pop(lease, None)
            if begun is not None:
                begun.begun_for, begun.ahead = None, True
                if not begun.raw.is_closed():
                    stack.push_async_callback(self._put_back, begun)
                    yield begun
                    return
                await self._put_back(begun)  # before another is taken: the pool has one for each slot
            begin, marker = self._begin(lease)
            try:
                async with asyncio.timeout(BEGIN_SECONDS):
                    transaction = await self._take()
                    stack.push_async_callback(self._put_back, transaction)
                    async with answered(transaction.raw):
                        await self._send_begin(transaction, begin)
            except DATABASE_ERRORS as error:
                raise NotBegunError(error) from error
            transaction.begin, transaction.marker, transaction.ahead = begin, marker, False
            yield transaction

    async def _send_begin(self, transaction: Transaction, begin: str) -> None:
        try:
            await transaction.raw.execute(self._sql.CLEAN + begin)
        except DATABASE_ERRORS:
            # Where not even this works, nothing ever will: a standby refuses a transaction that is to write. Kept, the
            # connection would lead there as long as the standby runs.
            transaction.spoilt = True
            transaction.raw.terminate()
            raise

    async def complete(self, lease: Lease, transaction: Transaction, following: Lease | None) -> None:
        """Complete *lease* and commit, in one message.

        Where *following* is given, the same message begins its transaction: it must be opened at once, or forgone.

        Raises:
            asyncpg.PostgresError: If nothing was committed, or nobody knows; `faults` has the states of ours.
        """
        forget = self._forgets(lease.fence.group)
        message = self._sql.end(*lease.fence, transaction.marker, forget=forget)
        begin = marker = ""
        if following is not None and not transaction.spoilt:
            begin, marker = self._begin(following)
            message = f"{message}; {self._sql.CLEAN}{begin}"
        async with answered(transaction.raw):
            tag = await transaction.raw.execute(message, timeout=COMMIT_SECONDS)
        if begin:
            transaction.begin, transaction.marker, transaction.begun_for = begin, marker, following
        elif tag != "COMMIT":
            # A COMMIT that PostgreSQL answers with ROLLBACK raises nothing. It would have to follow a statement that
            # has failed, and complete() does not succeed after one: so the longer message, which returns another tag,
            # is safe without this.
            raise asyncpg.InFailedSQLTransactionError(f"COMMIT was answered with {tag}")

    def _begin(self, lease: Lease) -> tuple[str, str]:
        """Return the message that begins a transaction for *lease*, and its marker."""
        fence = lease.fence
        marker = f"{fence.event_id}:{fence.claim_seq}:{fence.worker_id}:{self._rng.getrandbits(32)}"
        return self._sql.begin(self._isolation_level, marker), marker

    @property
    def begun(self) -> bool:
        """Whether any transaction was begun and not opened."""
        return bool(self._begun)

    async def forgo(self, lease: Lease) -> None:
        """End the transaction that was begun for *lease*, if it was not opened."""
        if (begun := self._begun.pop(lease, None)) is not None:
            begun.begun_for = None
            await self._put_back(begun)

    async def make_room(self) -> None:
        """Give one connection back to the pool, for somebody else who wants one."""
        if self._idle:
            await _close(self._idle.pop())

    async def close(self) -> None:
        """Give all connections back to the pool."""
        self._idle += self._begun.values()
        self._begun.clear()
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
        if transaction.begun_for is None:
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
            self._keep(transaction)

    def _keep(self, transaction: Transaction) -> None:
        if transaction.begun_for is None:
            self._idle.append(transaction)
        else:
            self._begun[transaction.begun_for] = transaction


async def _close(transaction: Transaction) -> None:
    if not transaction.connection.closed:
        with contextlib.suppress(*DATABASE_ERRORS):  # it is being given up
            await transaction.connection.close()


@contextlib.asynccontextmanager
async def answered(raw: asyncpg.Connection[asyncpg.Record]) -> AsyncIterator[None]:
    """Break a connection that was not waited for to the end: nobody knows what the next statement would meet there."""
    try:
        yield
    except (TimeoutError, asyncio.CancelledError) as error:
        await give_up(raw, error)
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
