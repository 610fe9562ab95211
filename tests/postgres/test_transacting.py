"""The transaction that is begun in the message that ends the one before it: opened, forgone, lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random
from typing import Any, cast

import pytest
from tests.postgres.plain_sql import Sql, publish, subscribe

from pgebus import DatabaseSettings
from pgebus._guard import guard_engine
from pgebus._runtime.leases import Fence, Lease
from pgebus._runtime.statements import Statements
from pgebus._runtime.transacting import Transactions
from pgebus.database import dispose, make_engine


@pytest.fixture
async def transactions(database: DatabaseSettings) -> AsyncIterator[Transactions]:
    """Transactions of a single slot: there is no second connection to take."""
    engine = make_engine(database, pool_size=1, max_overflow=0, pool_timeout=2)
    made = Transactions(guard_engine(engine), Statements("pgebus"), isolation_level="READ COMMITTED", rng=Random(1))
    yield made
    await made.close()
    await dispose(engine)


@pytest.fixture
async def leases(sql: Sql) -> list[Lease]:
    """Two deliveries that run in our name."""
    await subscribe(sql, "default", "a.b")
    ids = [await publish(sql), await publish(sql)]
    await sql.execute(
        "UPDATE pgebus.deliveries SET status = 'running', worker_id = 1, claimed_at = now(), claim_seq = 1, attempt = 1"
    )
    return [Lease(Fence(id_, "default", 1, 1), "a.b", False, 1, 0, (), cast("Any", None)) for id_ in ids]


async def _first(transactions: Transactions, leases: list[Lease]) -> None:
    async with transactions.open(leases[0]) as transaction:
        await transactions.complete(leases[0], transaction, leases[1])
    assert transactions.begun


async def _statuses(sql: Sql) -> list[str]:
    return [row[0] for row in await sql.fetch("SELECT status FROM pgebus.deliveries ORDER BY event_id")]


IN_TRANSACTION = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in tr%'"


async def test_the_next_one_goes_on_in_what_was_begun_for_it(
    transactions: Transactions, leases: list[Lease], sql: Sql
) -> None:
    await _first(transactions, leases)
    assert await _statuses(sql) == ["completed", "running"]
    assert await sql.fetchval(IN_TRANSACTION) == 1
    async with transactions.open(leases[1]) as transaction:
        await transactions.complete(leases[1], transaction, None)
    assert await _statuses(sql) == ["completed", "completed"]
    assert await sql.fetchval(IN_TRANSACTION) == 0


async def test_what_was_begun_for_nothing_is_ended(transactions: Transactions, leases: list[Lease], sql: Sql) -> None:
    """An open transaction would keep backfills waiting, and dead rows in the tables."""
    await _first(transactions, leases)
    await transactions.forgo(leases[1])
    assert not transactions.begun
    assert await sql.fetchval(IN_TRANSACTION) == 0
    assert await _statuses(sql) == ["completed", "running"]


async def test_where_its_connection_is_lost_another_one_is_taken(
    transactions: Transactions, leases: list[Lease], sql: Sql
) -> None:
    """And the lost one is given back first: the pool has no more than one."""
    await _first(transactions, leases)
    transactions._begun[leases[1]].raw.terminate()
    async with transactions.open(leases[1]) as transaction:
        await transactions.complete(leases[1], transaction, None)
    assert await _statuses(sql) == ["completed", "completed"]
