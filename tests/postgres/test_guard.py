"""Every way out of the handlers' transaction is refused, or detected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import asyncpg
import pytest
from sqlalchemy import DDL, Connection, CursorResult, event, func, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession, async_object_session
from sqlalchemy.orm import Session, SessionTransaction, object_session
from tests.postgres.deliveries import BEGIN, Account, Deliveries, Entry, UndoError, opened
from tests.postgres.deliveries import deliveries as deliveries
from tests.postgres.deliveries import ledger as ledger
from tests.postgres.plain_sql import terminate

from pgebus._guard import guard_engine
from pgebus.database import make_engine
from pgebus.errors import SessionControlError
from pgebus.session import FORBIDDEN, GuardedSession
from pgebus.settings import DatabaseSettings


def sync_of(account: Account) -> Session:
    session = object_session(account)
    assert session is not None
    return session


def async_of(account: Account) -> AsyncSession:
    session = async_object_session(account)
    assert session is not None
    return session


async def connection_of(session: GuardedSession) -> Connection:
    """Dig the connection out of a result."""
    return cast("CursorResult[Any]", await session.execute(select(1))).connection


def transaction_of(session: Session) -> SessionTransaction:
    transaction = Session.get_transaction(session)
    assert transaction is not None
    return transaction


Way = Callable[[GuardedSession, Account], Awaitable[object] | object]


async def _result_exec(session: GuardedSession, sql: str) -> object:
    connection = await connection_of(session)
    return await session.run_sync(lambda _: connection.exec_driver_sql(sql))


async def _result_call(session: GuardedSession, name: str) -> object:
    connection = await connection_of(session)
    return await session.run_sync(lambda _: getattr(connection, name)())


async def _second_session(session: GuardedSession) -> object:
    connection = await connection_of(session)

    def commit(_: Session) -> None:
        with Session(connection, join_transaction_mode="control_fully") as second:
            second.execute(select(1))
            second.commit()

    return await session.run_sync(commit)


async def _in_a_hook(session: GuardedSession, account: Account) -> None:
    def commit(hooked: Session, *_: object) -> None:
        hooked.commit()

    event.listen(sync_of(account), "before_flush", commit)
    account.balance = 11
    await session.flush()


def _method(of: Callable[[Account], object], name: str) -> Way:
    return lambda _, account: getattr(of(account), name)()


def _block(name: str) -> Way:
    return lambda _, account: getattr(async_of(account), name)().__aenter__()


SYNC_METHODS = (
    "begin",
    "begin_nested",
    "close",
    "commit",
    "connection",
    "get_nested_transaction",
    "get_transaction",
    "invalidate",
    "prepare",
    "reset",
    "rollback",
)
ASYNC_METHODS = ("aclose", "close", "commit", "connection", "get_transaction", "invalidate", "reset", "rollback")

WAYS: dict[str, Way] = {
    **{f"object_session().{name}": _method(sync_of, name) for name in SYNC_METHODS},
    **{f"async_object_session().{name}": _method(async_of, name) for name in ASYNC_METHODS},
    **{f"async_object_session().{name} block": _block(name) for name in ("begin", "begin_nested")},
    "inspect().session": lambda _, a: cast("Session", inspect(a).session).commit(),
    "inspect().async_session": lambda _, a: cast("AsyncSession", inspect(a).async_session).commit(),
    "async_object_session().bind.commit": lambda _, a: cast("Any", async_of(a).bind).commit(),
    "async_object_session().bind.close": lambda _, a: cast("Any", async_of(a).bind).close(),
    "object_session().bind.commit": lambda s, a: s.run_sync(lambda _: cast("Any", sync_of(a).bind).commit()),
    "object_session().bind_table": lambda _, a: sync_of(a).bind_table(
        Account.__table__,  # type: ignore[arg-type]  # a Table, as SQLAlchemy types it for all mapped classes
        cast("Any", None),
    ),
    "with object_session()": lambda _, a: sync_of(a).__exit__(None, None, None),
    "run_sync commit": lambda s, _: s.run_sync(lambda sync: sync.commit()),
    "run_sync rollback": lambda s, _: s.run_sync(lambda sync: sync.rollback()),
    "run_sync begin_nested": lambda s, _: s.run_sync(lambda sync: sync.begin_nested()),
    "stolen SessionTransaction.commit": lambda s, _: s.run_sync(lambda sync: transaction_of(sync).commit()),
    "stolen SessionTransaction.rollback": lambda s, _: s.run_sync(lambda sync: transaction_of(sync).rollback()),
    "stolen SessionTransaction.close": lambda s, _: s.run_sync(lambda sync: transaction_of(sync).close()),
    "unbound Session.commit": lambda s, _: s.run_sync(Session.commit),
    "unbound Session.rollback": lambda s, _: s.run_sync(Session.rollback),
    "unbound Session.close": lambda s, _: s.run_sync(Session.close),
    "unbound Session.begin_nested": lambda s, _: s.run_sync(
        lambda sync: Session.begin_nested(sync).session.execute(select(1))
    ),
    "result.connection.exec_driver_sql": lambda s, _: _result_exec(s, "COMMIT"),
    "result.connection.commit": lambda s, _: _result_call(s, "commit"),
    "result.connection.rollback": lambda s, _: _result_call(s, "rollback"),
    "result.connection.close": lambda s, _: _result_call(s, "close"),
    "result.connection.begin_nested": lambda s, _: _result_call(s, "begin_nested"),
    "a second session on the connection": lambda s, _: _second_session(s),
    "in a flush hook": _in_a_hook,
    "execute": lambda s, _: s.execute(text("COMMIT")),
    "scalar": lambda s, _: s.scalar(text("COMMIT")),
    "scalars": lambda s, _: s.scalars(text("COMMIT")),
    "stream": lambda s, _: s.stream(text("COMMIT")),
    "stream_scalars": lambda s, _: s.stream_scalars(text("COMMIT")),
    "from_statement": lambda s, _: s.execute(select(Account).from_statement(text("COMMIT"))),
    "DDL": lambda s, _: s.execute(cast("Any", DDL)("COMMIT")),
    "text with parameters": lambda s, _: s.execute(text("COMMIT /* :a */"), {"a": 1}),
    "savepoint as text": lambda s, _: s.execute(text("SAVEPOINT a")),
    "the marker": lambda s, _: s.execute(text("SET LOCAL pgebus.tx = ''")),
    "the marker by set_config": lambda s, _: s.execute(text("SELECT set_config('pgebus.tx', '', true)")),
    "the marker by parameter": lambda s, _: s.execute(select(func.set_config("Pgebus.tx", "", True))),
    "another bind": lambda s, _: s.execute(
        select(1), bind_arguments={"bind": Session().connection}  # any other object
    ),
    "async with": lambda s, _: cast("Any", s).__aenter__(),
}  # fmt: skip


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
async def test_a_way_out_is_refused(deliveries: Deliveries, way: Way) -> None:
    """What the handler did before it tried is rolled back when it raises."""

    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        with pytest.raises(SessionControlError):
            await _awaited(way(session, account))
        raise UndoError

    with pytest.raises(UndoError):
        await deliveries.run(handler)
    assert await deliveries.owners() == []
    assert await deliveries.status() == "running"


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
async def test_a_swallowed_refusal_changes_all_or_nothing(deliveries: Deliveries, way: Way) -> None:
    """The delivery is completed with everything that its handler did, or it fails with nothing."""

    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        session.add(Entry(amount=1, account=account))
        with pytest.raises(SessionControlError):
            await _awaited(way(session, account))

    with suppress(SQLAlchemyError, SessionControlError):
        await deliveries.run(handler)
    accounts = await deliveries.owners()
    entries = await deliveries.sql.fetchval("SELECT count(*) FROM entries")
    whole = (accounts, entries, await deliveries.status())
    assert whole in ((["Ada"], 1, "completed"), ([], 0, "running"))


async def _awaited(used: Awaitable[object] | object) -> None:
    if isinstance(used, Awaitable):
        await used


@pytest.mark.parametrize("name", FORBIDDEN)
async def test_what_the_session_lacks_is_explained(deliveries: Deliveries, name: str) -> None:
    async def handler(session: GuardedSession) -> None:
        with pytest.raises(SessionControlError, match=rf"^GuardedSession has no {name}\(\): .+\.$"):
            getattr(session, name)
        raise UndoError

    with pytest.raises(UndoError):
        await deliveries.run(handler)


async def test_a_misspelt_name_is_an_attribute_error(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        assert not hasattr(session, "comit")

    assert await deliveries.run(handler) == "completed"


async def _driver_of(session: GuardedSession) -> Any:
    connection = await connection_of(session)
    return connection.connection.driver_connection


@pytest.mark.parametrize("sent", ["COMMIT", "COMMIT; BEGIN", "ROLLBACK", "ROLLBACK; BEGIN", "COMMIT AND CHAIN"])
async def test_the_driver_connection_is_detected(deliveries: Deliveries, sent: str) -> None:
    """What no layer can refuse, the completion notices: the marker died with the transaction."""

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        await (await _driver_of(session)).execute(sent)
        await opened(session, 2, "Grace")

    with pytest.raises(asyncpg.PostgresError) as caught:
        await deliveries.run(handler)
    assert caught.value.sqlstate == "PGB02"
    assert await deliveries.status() == "running"


async def _in_a_task(work: Callable[[], Awaitable[object]]) -> object:
    async def run() -> object:
        return await work()

    return await asyncio.create_task(run())


async def _in_a_gather(work: Callable[[], Awaitable[object]]) -> object:
    return await asyncio.gather(work(), asyncio.sleep(0))


async def _in_a_group(work: Callable[[], Awaitable[object]]) -> object:
    async def run() -> None:
        await work()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(run())
    except* SessionControlError as refused:
        raise refused.exceptions[0] from None
    return None


OTHERS = {"create_task": _in_a_task, "gather": _in_a_gather, "TaskGroup": _in_a_group}
USES: dict[str, Callable[[GuardedSession, Account], Awaitable[object]]] = {
    "execute": lambda s, _: s.execute(select(1)),
    "flush": lambda s, _: s.flush(),
    "refresh": lambda s, a: s.refresh(a),
    "object_session": lambda _, a: async_of(a).execute(select(1)),
    "commit": lambda _, a: async_of(a).commit(),
    "connection": lambda _, a: cast("Any", async_of(a).bind).exec_driver_sql("SELECT 1"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("use", USES)
async def test_another_task_is_refused(deliveries: Deliveries, other: str, use: str) -> None:
    async def handler(session: GuardedSession) -> None:
        account = await opened(session)

        async def work() -> object:
            return await USES[use](session, account)

        with pytest.raises(SessionControlError, match="own task"):
            await OTHERS[other](work)
        await opened(session, 2, "Grace")

    assert await deliveries.run(handler) == "completed"
    assert await deliveries.owners() == ["Ada", "Grace"]


async def test_another_task_may_not_even_look(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        looks: list[Callable[[], object]] = [
            lambda: session.add(Account(id=3, owner="Alan", balance=0)),
            lambda: session.new,
            lambda: account in session,
            lambda: list(session),
            lambda: session.unsafe,
            lambda: session.no_autoflush.__enter__(),
        ]

        async def work() -> None:
            for look in looks:
                with pytest.raises(SessionControlError, match="own task"):
                    look()

        await asyncio.create_task(work())

    assert await deliveries.run(handler) == "completed"


async def test_a_thread_is_refused(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        with pytest.raises(SessionControlError, match="own task"):
            await asyncio.to_thread(lambda: sync_of(account).execute(select(1)))

    assert await deliveries.run(handler) == "completed"


@pytest.mark.parametrize("raises", [False, True])
async def test_after_its_delivery_the_session_is_refused(deliveries: Deliveries, raises: bool) -> None:
    kept: list[Any] = []

    async def handler(session: GuardedSession) -> None:
        account = await opened(session)
        kept.extend([session, account, sync_of(account), async_of(account)])
        if raises:
            raise UndoError

    try:
        await deliveries.run(handler)
    except UndoError:
        assert raises
    session, account, stolen, stolen_async = kept
    uses: list[Callable[[], Any]] = [
        lambda: session.execute(select(1)),
        lambda: session.flush(),
        lambda: session.run_sync(lambda sync: sync.execute(select(1))),
        lambda: session.add(account),
        lambda: session.unsafe,
        lambda: session.info,
        lambda: stolen.execute(select(1)),
        lambda: stolen.commit(),
        lambda: stolen.close(),
        lambda: stolen_async.execute(select(1)),
        lambda: stolen_async.commit(),
        lambda: stolen_async.run_sync(lambda sync: sync.connection()),
    ]
    for use in uses:
        with pytest.raises(SessionControlError, match="has ended"):
            await _awaited(use())
    assert object_session(account) is None
    assert account.owner == "Ada"
    await deliveries.check_nothing_leaked()


async def test_a_database_error_aborts_the_delivery_even_when_it_is_swallowed(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1/0"))

    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await deliveries.run(handler)
    assert await deliveries.owners() == []


async def test_a_failed_flush_shows_its_own_error(deliveries: Deliveries) -> None:
    """SQLAlchemy rolls back on its own then; the refusal of a rollback must not hide why."""

    async def handler(session: GuardedSession) -> None:
        session.add(Account(id=1, owner="Ada", balance=-1))
        await session.flush()

    with pytest.raises(IntegrityError):
        await deliveries.run(handler)


async def test_a_failed_flush_cannot_be_swallowed(deliveries: Deliveries) -> None:
    """Not even one that failed in Python after a part was written, of which PostgreSQL knows nothing."""

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        session.add_all([Account(id=2, owner="Grace", balance=0), Account(id=3, owner=7, balance=0)])
        with pytest.raises(StatementError):
            await session.flush()

    with pytest.raises(PendingRollbackError):
        await deliveries.run(handler)
    assert await deliveries.owners() == []


async def test_a_failed_bulk_write_shows_its_own_error(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await session.run_sync(
            lambda sync: sync.bulk_insert_mappings(
                Account,
                [{"id": 1, "owner": "Ada", "balance": -1}],
            )
        )

    with pytest.raises(IntegrityError):
        await deliveries.run(handler)


async def test_a_python_error_rolls_back(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        raise UndoError

    with pytest.raises(UndoError):
        await deliveries.run(handler)
    assert await deliveries.owners() == []


async def test_a_constraint_checked_at_commit_takes_the_completion_along(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        session.add(Entry(amount=1, account_id=404))

    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await deliveries.run(handler)
    assert await deliveries.status() == "running"


async def test_a_lost_lease_rolls_back(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        await opened(session)
        await deliveries.sql.execute("UPDATE pgebus.deliveries SET claim_seq = claim_seq + 1")

    with pytest.raises(asyncpg.PostgresError) as caught:
        await deliveries.run(handler)
    assert caught.value.sqlstate == "PGB01"
    assert await deliveries.owners() == []


async def test_a_handler_cancelled_inside_a_statement_leaves_nothing(deliveries: Deliveries) -> None:
    await deliveries.sql.execute("SELECT pg_advisory_lock(1)")
    reached = asyncio.Event()

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        reached.set()
        await session.execute(text("SELECT pg_advisory_xact_lock(1)"))

    task = asyncio.create_task(deliveries.run(handler))
    async with asyncio.timeout(10):
        await reached.wait()
        while not await deliveries.sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110 - PostgreSQL tells nobody that a lock is waited for
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await deliveries.sql.fetchval("SELECT pg_advisory_unlock(1)")
    assert await deliveries.owners() == []


async def test_a_handler_cancelled_in_python_leaves_nothing(deliveries: Deliveries) -> None:
    reached = asyncio.Event()

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(deliveries.run(handler))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await deliveries.owners() == []


async def test_a_lost_connection_is_not_replaced(deliveries: Deliveries) -> None:
    """On a new connection, what follows would commit without what came before."""

    async def handler(session: GuardedSession) -> None:
        await opened(session)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await terminate(deliveries.sql, pid)
        with pytest.raises((DBAPIError, SessionControlError)):
            await session.execute(select(1))
        for _ in range(2):
            with pytest.raises(SessionControlError, match="lost"):
                await opened(session, 2, "Grace")

    with pytest.raises(SessionControlError, match="lost"):
        await deliveries.run(handler)
    assert await deliveries.owners() == []


async def test_another_isolation_level_cannot_be_set(deliveries: Deliveries) -> None:
    async def handler(session: GuardedSession) -> None:
        connection = await connection_of(session)
        for level in ("READ COMMITTED", "SERIALIZABLE"):
            with pytest.raises(Exception, match=r"isolation_level|isolation level"):
                connection.execution_options(isolation_level=level)
        await opened(session)

    assert await deliveries.run(handler) == "completed"


async def test_the_hosts_engine_stays_as_it_was(database: DatabaseSettings) -> None:
    engine = make_engine(database)
    guarded = guard_engine(engine)
    async with engine.connect() as connection:
        await connection.execute(text("SAVEPOINT a"))
        level = await connection.scalar(text("SELECT current_setting('transaction_isolation')"))
        assert level == "read committed"
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, asyncpg.Connection)
        assert raw.is_in_transaction()
        await connection.commit()
    async with guarded.connect() as connection:
        await connection.execute(text("SELECT 1"))
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, asyncpg.Connection)
        assert not raw.is_in_transaction()
        await raw.execute(BEGIN)
        await raw.execute("ROLLBACK")
    await engine.dispose()
