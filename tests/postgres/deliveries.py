"""Runs handlers as the dispatcher does, on a delivery of its own, with tables to write to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import asyncpg
import pytest
from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgebus._guard import dispatch_session, guard_engine
from pgebus.database import make_engine
from pgebus.session import GuardedSession
from pgebus.settings import DatabaseSettings


class Server(Protocol):
    """What is needed of the server under test."""

    def settings(self, database: str) -> DatabaseSettings: ...
    async def connect(self, database: str | None = None) -> asyncpg.Connection[asyncpg.Record]: ...
    async def execute(self, *statements: str) -> None: ...


WORKER = 7
MARKER = "the marker"
BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL pgebus.tx = '{MARKER}'"

TABLES = """
CREATE TABLE accounts (id int PRIMARY KEY, owner text NOT NULL, balance int NOT NULL CHECK (balance >= 0));
CREATE TABLE entries (
  id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, amount int NOT NULL,
  account_id int NOT NULL REFERENCES accounts DEFERRABLE INITIALLY DEFERRED
);
"""


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    balance: Mapped[int]
    entries: Mapped[list[Entry]] = relationship(back_populates="account", order_by="Entry.id")


class Entry(Base):
    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    account: Mapped[Account] = relationship(back_populates="entries")


Handler = Callable[[GuardedSession], Awaitable[object]]


class UndoError(Exception):
    """Raised by a handler that has seen what it wanted to see."""


@dataclass
class Deliveries:
    """Deliveries of one worker, each completed in the transaction of its handlers."""

    engine: AsyncEngine
    sql: asyncpg.Connection[asyncpg.Record]

    async def run(self, *handlers: Handler) -> str:
        """Run the handlers of one delivery, and raise what goes wrong.

        Returns:
            The status of the delivery.
        """
        event_id = await self.claimed()
        try:
            await self._transaction(event_id, handlers)
        finally:
            await self.check_nothing_leaked()
        return await self.status(event_id)

    async def claimed(self) -> int:
        """Return the event of a delivery that is running, claimed once."""
        event_id: int = await self.sql.fetchval(
            "INSERT INTO pgebus.events (type, payload) VALUES ('account.opened', '{}') RETURNING id"
        )
        await self.sql.execute(
            "UPDATE pgebus.deliveries SET status = 'running', worker_id = $2, claimed_at = now(), claim_seq = 1"
            " WHERE event_id = $1",
            event_id,
            WORKER,
        )
        return event_id

    async def status(self, event_id: int | None = None) -> str:
        """Return the status of a delivery, by default of the last one."""
        status: str = await self.sql.fetchval(
            "SELECT status FROM pgebus.deliveries WHERE event_id = coalesce($1, event_id)"
            " ORDER BY event_id DESC LIMIT 1",
            event_id,
        )
        return status

    async def owners(self) -> list[str]:
        """Return the owners of all accounts that are committed."""
        return [row["owner"] for row in await self.sql.fetch("SELECT owner FROM accounts ORDER BY id")]

    async def _transaction(self, event_id: int, handlers: tuple[Handler, ...]) -> None:
        async with self.engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert isinstance(raw, asyncpg.Connection)
            try:
                await raw.execute(BEGIN)
                async with dispatch_session(connection, begin=BEGIN) as session:
                    guarded = GuardedSession(session)
                    for handler in handlers:
                        await handler(guarded)
                    await session.flush()
                end = f"SELECT pgebus.complete({event_id}, 'default', 1, {WORKER}, '{MARKER}'); COMMIT"
                assert await raw.execute(end) == "COMMIT"
            finally:
                if connection.closed:  # by the handler: the pool has thrown it away
                    pass
                elif raw.is_closed():
                    await connection.invalidate()
                elif raw.is_in_transaction():
                    await raw.execute("ROLLBACK")

    async def check_nothing_leaked(self) -> None:
        """Make sure that the next user of the connection finds it as new."""
        pool = self.engine.sync_engine.pool
        assert "Current Checked out connections: 0" in pool.status()
        async with self.engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert isinstance(raw, asyncpg.Connection)
            assert not raw.is_in_transaction()
            assert await raw.fetchval("SELECT nullif(current_setting('pgebus.tx', true), '')") is None
            assert connection.sync_connection is not None
            assert "pgebus" not in connection.sync_connection.info


async def opened(session: GuardedSession, number: int = 1, owner: str = "Ada") -> Account:
    """Open an account, as a handler would."""
    account = Account(id=number, owner=owner, balance=10)
    session.add(account)
    await session.flush()
    return account


@pytest.fixture(scope="module")
def ledger(server: Server, template: str) -> Iterator[DatabaseSettings]:
    """A migrated database with the tables of an application, for all tests of a module: copying takes long."""
    name = "pgebus_test_ledger"
    asyncio.run(server.execute(f'CREATE DATABASE {name} TEMPLATE "{template}"'))
    yield server.settings(name)
    asyncio.run(server.execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def deliveries(server: Server, ledger: DatabaseSettings) -> AsyncIterator[Deliveries]:
    """Deliveries on an engine with a single connection: what one leaves behind, the next one finds."""
    sql = await server.connect(ledger.sqlalchemy_url().database)
    await sql.execute(f"DROP TABLE IF EXISTS entries, accounts; TRUNCATE pgebus.events, pgebus.deliveries; {TABLES}")
    engine = make_engine(ledger, pool_size=1, max_overflow=0)
    yield Deliveries(guard_engine(engine), sql)
    await engine.dispose()
    with suppress(OSError):
        await sql.close(timeout=2)
