"""What a handler may do with its session, and what `unsafe` really does."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, make_transient_to_detached, selectinload
from tests.postgres.deliveries import Account, Deliveries, Entry, UndoError, opened
from tests.postgres.deliveries import deliveries as deliveries
from tests.postgres.deliveries import ledger as ledger
from tests.postgres.plain_sql import terminate

from pgebus.errors import SessionControlError, UnsafeSessionWarning
from pgebus.session import GuardedSession


async def test_all_handlers_share_one_unit_of_work(deliveries: Deliveries) -> None:
    async def first(session: GuardedSession) -> None:
        session.add(Account(id=1, owner="Ada", balance=10))
        session.info["first"] = True

    async def second(session: GuardedSession) -> None:
        account = await session.get_one(Account, 1)
        account.balance = 5
        assert session.info["first"]

    assert await deliveries.run(first, second) == "completed"
    assert await deliveries.sql.fetchval("SELECT balance FROM accounts") == 5


async def test_objects_are_written_and_read(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        ada, grace = Account(id=1, owner="Ada", balance=10), Account(id=2, owner="Grace", balance=20)
        session.add_all([ada, grace])
        assert ada in session
        assert ada in session.new
        await session.flush()
        session.add(Entry(amount=3, account=ada))
        ada.balance = 13
        assert ada in session.dirty
        assert session.is_modified(ada)
        await session.flush()
        await session.refresh(ada, ["entries", "balance"])
        assert [entry.amount for entry in ada.entries] == [3]
        assert ada.balance == 13
        await session.delete(grace)
        assert grace in session.deleted
        await session.flush()
        assert await session.get(Account, 2) is None
        with pytest.raises(NoResultFound):
            await session.get_one(Account, 2)
        merged = await session.merge(Account(id=1, owner="Ada L.", balance=13))
        assert merged is ada
        session.expire(ada, ["owner"])
        await session.refresh(ada)
        session.expire_all()
        found = await session.scalars(select(Account).options(selectinload(Account.entries)))
        assert found.one() is ada
        assert set(session) == {ada, *ada.entries}
        session.expunge(ada.entries[0])
        session.expunge_all()
        assert ada not in session

    assert await deliveries.run(handler) == "completed"


async def test_many_objects_at_once(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        merged = await session.merge_all([Account(id=i, owner=f"{i}", balance=0) for i in (1, 2, 3)])
        await session.flush()
        await session.delete_all(merged[1:])

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["1"]


async def test_statements_of_every_kind(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        rows = [{"id": number, "owner": f"{number}", "balance": number} for number in range(1, 51)]
        await session.execute(insert(Account), rows)
        await session.execute(text("UPDATE accounts SET balance = balance + :by"), {"by": 1})
        await session.execute(update(Account).where(Account.id == 1).values(owner="Ada"))
        assert await session.scalar(select(Account.owner).order_by(Account.id)) == "Ada"
        assert (await session.scalars(select(Account.balance).order_by(Account.id))).first() == 2
        streamed = await session.stream(select(Account.id), execution_options={"yield_per": 7})
        assert len([row async for row in streamed]) == 50
        scalars = await session.stream_scalars(select(Account).order_by(Account.id))
        assert [account.id async for account in scalars][-1] == 50
        unfinished = await session.stream(select(Account.id), execution_options={"yield_per": 7})
        assert await unfinished.fetchone() is not None

    assert await deliveries.run(handler) == "completed"
    assert len(await deliveries.owners()) == 50


async def test_synchronous_code_loads_lazily(deliveries: Deliveries) -> None:
    def work(session: Session, amount: int, *, times: int) -> int:
        account = session.get_one(Account, 1)
        for _ in range(times):
            account.entries.append(Entry(amount=amount))
        session.flush()
        session.expire(account)
        return sum(entry.amount for entry in account.entries)

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        assert await session.run_sync(work, 2, times=3) == 6

    assert await deliveries.run(handler) == "completed"


async def test_without_autoflush_a_query_writes_nothing(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        with session.no_autoflush as same:
            assert same is session
            session.add(Account(id=1, owner="Ada", balance=0))
            assert await session.scalar(select(Account.id)) is None
        assert await session.scalar(select(Account.id)) == 1

    assert await deliveries.run(handler) == "completed"


async def test_attaching_needs_no_statement_and_keeps_what_is_there(deliveries: Deliveries) -> None:
    def detached() -> Account:
        account = Account(id=1, owner="Ada", balance=10)
        make_transient_to_detached(account)
        return account

    async def handler(session: GuardedSession) -> None:
        account = session.attach(detached())
        assert account in session
        assert session.attach(detached()) is account

    assert await deliveries.run(handler) == "completed"


async def test_a_time_limit_stays_in_the_task(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        async with asyncio.timeout(10):
            await opened(session)

    assert await deliveries.run(handler) == "completed"


async def test_control_words_in_ordinary_statements(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        for ordinary in (
            "SELECT 'commit'",
            "-- commit\nSELECT 1",
            "/* begin; /* commit */ */ WITH begin AS (SELECT 1) SELECT * FROM begin",
            "SET LOCAL statement_timeout = '1min'",
            "SET CONSTRAINTS ALL DEFERRED",
            "SELECT set_config('app.user', 'Ada', true)",
            "SELECT current_setting('pgebus.tx')",
            "CREATE TEMPORARY TABLE start (release int) ON COMMIT DROP",
            "PREPARE transaction_of AS SELECT 1",
            "DEALLOCATE transaction_of",
        ):
            await session.execute(text(ordinary))

    assert await deliveries.run(handler) == "completed"


def unsafe(session: GuardedSession) -> AsyncSession:
    with pytest.warns(UnsafeSessionWarning, match="at least once"):
        return session.unsafe


async def test_unsafe_is_loud_once(deliveries: Deliveries, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(session: GuardedSession) -> None:
        with caplog.at_level(logging.WARNING, "pgebus.session"):
            first = unsafe(session)
            assert session.unsafe is first
        assert [record.message for record in caplog.records] == [
            "ctx.session.unsafe is used: this delivery is at least once from here on."
        ]

    assert await deliveries.run(handler) == "completed"


async def test_a_warning_made_an_error_keeps_the_lock(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnsafeSessionWarning):
                session.unsafe  # noqa: B018 - the access warns
        with pytest.raises(SessionControlError):
            await session.run_sync(lambda sync: sync.commit())
        assert account in session

    assert await deliveries.run(handler) == "completed"


async def test_the_guarded_session_stays_guarded_beside_unsafe(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        unsafe(session)
        with pytest.raises(SessionControlError):
            session.commit  # type: ignore[attr-defined]  # noqa: B018 - what a type checker forbids is tried

    assert await deliveries.run(handler) == "completed"


COMMITS: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "commit": lambda session: session.commit(),
    "connection": lambda session: _through_connection(session, "commit"),
    "transaction": lambda session: _through_transaction(session, "commit"),
    "sync": lambda session: session.run_sync(lambda sync: sync.commit()),
}
ROLLBACKS: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
    "connection": lambda session: _through_connection(session, "rollback"),
    "transaction": lambda session: _through_transaction(session, "rollback"),
}


async def _through_connection(session: AsyncSession, name: str) -> None:
    connection = await session.connection()
    await getattr(connection, name)()
    await session.close()  # its transaction is over, as with any session


async def _through_transaction(session: AsyncSession, name: str) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    await getattr(transaction, name)()


@pytest.mark.parametrize("way", COMMITS)
async def test_unsafe_commits_in_postgresql(deliveries: Deliveries, way: str) -> None:
    """What was committed is seen by others at once and stays; the rest is still one unit of work."""

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        await COMMITS[way](unsafe(session))
        assert await deliveries.owners() == ["Ada"]
        await opened(session, 2, "Grace")
        assert await deliveries.owners() == ["Ada"]
        raise UndoError

    with pytest.raises(UndoError):
        await deliveries.run(handler)
    assert await deliveries.owners() == ["Ada"]
    assert await deliveries.status() == "running"


@pytest.mark.parametrize("way", ROLLBACKS)
async def test_unsafe_rolls_back_in_postgresql(deliveries: Deliveries, way: str) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        await ROLLBACKS[way](unsafe(session))
        assert await session.scalar(select(Account.id)) is None
        await opened(session, 2, "Grace")

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["Grace"]


async def test_after_unsafe_commit_the_delivery_is_completed(deliveries: Deliveries) -> None:
    async def first(session: GuardedSession) -> None:
        for number in (1, 2):
            session.add(Account(id=number, owner=f"{number}", balance=0))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnsafeSessionWarning)
                await session.unsafe.commit()

    async def second(session: GuardedSession) -> None:
        await opened(session, 3, "3")

    assert await deliveries.run(first, second) == "completed"
    assert await deliveries.owners() == ["1", "2", "3"]


async def test_unsafe_savepoints_undo_a_part(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        raw = unsafe(session)
        with pytest.raises(IntegrityError):
            async with raw.begin_nested():
                session.add(Account(id=2, owner="Grace", balance=-1))
        async with raw.begin_nested():
            await opened(session, 3, "Alan")
        nested = await raw.begin_nested()
        await opened(session, 4, "Edsger")
        await nested.rollback()

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["Ada", "Alan"]


async def test_an_unsafe_block_commits(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        raw = unsafe(session)
        await raw.commit()
        async with raw.begin():
            raw.add(Account(id=1, owner="Ada", balance=0))
        assert await deliveries.owners() == ["Ada"]

    assert await deliveries.run(handler) == "completed"


async def test_unsafe_commit_of_an_aborted_transaction_is_an_error(deliveries: Deliveries) -> None:
    """PostgreSQL answers it with ROLLBACK, and asyncpg raises nothing."""

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1/0"))
        with pytest.raises(DBAPIError, match="aborted"):
            await unsafe(session).commit()
        raise UndoError

    with pytest.raises(UndoError):
        await deliveries.run(handler)
    assert await deliveries.owners() == []


async def test_an_unsafe_commit_that_fails_raises_what_sqlalchemy_would(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        session.add(Entry(amount=1, account_id=404))
        raw = unsafe(session)
        with pytest.raises(IntegrityError):
            await raw.commit()
        await raw.rollback()
        await opened(session)

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["Ada"]
    assert await deliveries.sql.fetchval("SELECT count(*) FROM entries") == 0


async def test_after_a_failed_flush_unsafe_can_roll_back(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        raw = unsafe(session)
        session.add(Account(id=2, owner="Grace", balance=-1))
        with pytest.raises(IntegrityError):
            await session.flush()
        with pytest.raises(PendingRollbackError):
            await session.execute(select(1))
        await raw.rollback()
        await opened(session, 3, "Alan")

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["Alan"]


async def test_unsafe_commit_as_text_is_detected(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        await unsafe(session).execute(text("COMMIT"))

    with pytest.raises(asyncpg.PostgresError) as caught:
        await deliveries.run(handler)
    assert caught.value.sqlstate == "PGB02"


async def test_unsafe_belongs_to_the_task_and_the_delivery_too(deliveries: Deliveries) -> None:
    kept: list[AsyncSession] = []

    async def handler(session: GuardedSession) -> None:
        raw = unsafe(session)
        await opened(session)
        kept.append(raw)
        for use in (raw.commit, raw.rollback, raw.close, lambda: raw.execute(select(1))):

            async def work(use: Callable[[], Awaitable[object]] = use) -> None:
                await use()

            with pytest.raises(SessionControlError, match="own task"):
                await asyncio.create_task(work())

    assert await deliveries.run(handler) == "completed"
    for use in (kept[0].commit, kept[0].rollback, kept[0].close, lambda: kept[0].execute(select(1))):
        with pytest.raises(SessionControlError, match="has ended"):
            await use()
    await deliveries.check_nothing_leaked()


async def test_a_connection_lost_beside_unsafe_is_not_replaced(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        raw = unsafe(session)
        await opened(session)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await terminate(deliveries.sql, pid)
        with pytest.raises((DBAPIError, SessionControlError)):
            await session.execute(select(1))
        await raw.rollback()
        with session.no_autoflush, pytest.raises(SessionControlError, match="lost"):
            await session.execute(text("INSERT INTO accounts VALUES (3, 'Alan', 0)"))
        with pytest.raises(SessionControlError, match="lost"):
            await opened(session, 2, "Grace")

    with pytest.raises(SessionControlError, match="lost"):
        await deliveries.run(handler)
    assert await deliveries.owners() == []
