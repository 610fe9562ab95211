"""Keeps the handlers of a delivery inside the dispatcher's transaction, however they reach the database.

It begins and ends nothing by itself: the dispatcher does, on the driver connection, in messages that SQLAlchemy
does not see. Only after `unsafe` are SQLAlchemy's own commit and rollback made real here.

Below the allow-list of `GuardedSession` there are three layers, each for what the one above cannot close: a
session class, for what is reached through an instance (`object_session(order).commit()`); engine listeners, for
transaction control as text or through a connection; and a marker, set by the dispatcher and checked by the
completion, which detects what was sent on the driver connection itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction, object_session

from pgebus._causes import inherit
from pgebus._control_text import find_control, sets_marker
from pgebus.errors import SessionControlError
from pgebus.models import Event
from pgebus.payloads import check_headers

_INFO_KEY: Final = "pgebus"
# As SQLAlchemy writes it.
_SAVEPOINT: Final = re.compile(r"(?:RELEASE |ROLLBACK TO )?SAVEPOINT sa_savepoint_\d+")


class Guard:
    """What the handlers of one delivery may do, and who they are."""

    def __init__(self, connection: Connection, begin: str) -> None:
        self.connection = connection
        self.driver: Any = connection.connection.driver_connection  # asyncpg's own connection
        self.begin = begin
        self.owner: asyncio.Task[Any] | None = asyncio.current_task()
        self.root: SessionTransaction | None = None
        # What the events that are published in this session inherit from the one that is handled.
        self.headers: Mapping[str, Any] = {}
        self.unsafe = False
        # How many statements the handlers have sent.
        self.statements = 0
        self.flushing = 0
        # While an event is published inside a savepoint of ours, which only takes back what was added for it.
        self.publishing = False

    def check(self) -> None:
        """Refuse a caller that is not the handler's task, or that comes too late."""
        if self.owner is None:
            raise SessionControlError(
                "The dispatch that this session belonged to has ended. Use ctx.session only inside the handler."
            )
        if _current_task() is not self.owner:
            raise SessionControlError(
                "ctx.session belongs to the handler's own task: two tasks cannot share a session. Await its "
                "methods in the handler itself; for a time limit use asyncio.timeout(), which stays in the task "
                "(before Python 3.12 asyncio.wait_for() starts another one)."
            )

    def check_control(self, what: str) -> None:
        """Refuse what moves the transaction, unless the handler took `unsafe`."""
        self.check()
        if not self.unsafe:
            _refuse(what)

    def check_whole(self, session: DispatchSession) -> None:
        """Refuse to go on in a transaction of which a part is lost."""
        if self.driver.is_closed():
            raise SessionControlError("The connection of this delivery is lost, and its transaction with it.")
        if not self.unsafe and self.root is not None and Session.get_transaction(session) is not self.root:
            raise SessionControlError(
                "The transaction of ctx.session was ended behind it, and its pending changes were dropped: the "
                "delivery can only be rolled back."
            )

    def commit(self) -> None:
        """Commit in PostgreSQL, and go on in a new transaction that carries the marker."""
        try:
            # PostgreSQL answers the COMMIT of an aborted transaction with ROLLBACK, and without an error. This
            # raises one.
            self.connection.exec_driver_sql("SELECT 1")
            self.connection.exec_driver_sql("COMMIT")
        finally:
            if not self.driver.is_closed() and not self.driver.is_in_transaction():
                self._send(self.begin)

    def rollback(self) -> None:
        """Roll back in PostgreSQL, and go on in a new transaction that carries the marker."""
        if not self.driver.is_closed():
            self._send(f"ROLLBACK; {self.begin}")

    def _send(self, message: str) -> None:
        adapted: Any = self.connection.connection.dbapi_connection
        adapted.run_async(lambda driver: driver.execute(message))


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without an event loop
        return None


def _refuse(what: str) -> NoReturn:
    raise SessionControlError(
        f"{what} belongs to the dispatcher: the unit of work commits when all handlers have returned. Raise to "
        "roll back."
    )


def _controlled(name: str) -> Any:
    """Override a method that moves the transaction or the session's life."""
    original: Callable[..., object] = getattr(Session, name)

    def method(self: DispatchSession, *args: object, **kwargs: object) -> object:
        self.guard.check_control(f"{name}()")
        return original(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, original.__doc__
    return method


def _flushing(name: str) -> Any:
    """Override a method that, where it fails, rolls SQLAlchemy's transaction back on its own."""
    original: Callable[..., object] = getattr(Session, name)

    def method(self: DispatchSession, *args: object, **kwargs: object) -> object:
        self.guard.check()
        self.guard.check_whole(self)
        if not self.is_active:
            # A part of an earlier flush may have been written, even when its error was swallowed and PostgreSQL
            # saw none. SQLAlchemy would say nothing if nothing is pending; this raises PendingRollbackError.
            Session.connection(self)
        self.guard.flushing += 1
        try:
            return original(self, *args, **kwargs)
        finally:
            self.guard.flushing -= 1

    method.__name__, method.__doc__ = name, original.__doc__
    return method


class DispatchSession(Session):
    """The session behind `ctx.session`: what a handler finds through an instance is guarded as well."""

    guard: Guard

    begin = _controlled("begin")
    begin_nested = _controlled("begin_nested")
    bind_mapper = _controlled("bind_mapper")
    bind_table = _controlled("bind_table")
    close = _controlled("close")
    commit = _controlled("commit")
    connection = _controlled("connection")
    get_nested_transaction = _controlled("get_nested_transaction")
    get_transaction = _controlled("get_transaction")
    invalidate = _controlled("invalidate")
    prepare = _controlled("prepare")
    reset = _controlled("reset")
    rollback = _controlled("rollback")

    bulk_insert_mappings = _flushing("bulk_insert_mappings")
    bulk_save_objects = _flushing("bulk_save_objects")
    bulk_update_mappings = _flushing("bulk_update_mappings")
    flush = _flushing("flush")

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Return the delivery's connection: every statement, flush and lazy load asks here first."""
        self.guard.check()
        self.guard.check_whole(self)
        bind = super().get_bind(*args, **kwargs)
        if bind is not self.guard.connection:
            raise SessionControlError(
                "ctx.session works on the connection of its delivery only: what it did elsewhere would never be "
                "committed. Open a session of your own for another database."
            )
        return bind


@event.listens_for(Event, "before_insert", propagate=True)
def _say_what_caused_it(_mapper: object, _connection: object, target: Event) -> None:
    """Stamp the events that a handler has added, however it did it, and those that its session's hooks add."""
    session = object_session(target)
    if isinstance(session, DispatchSession) and session.guard.headers:
        target.headers = check_headers(inherit(session.guard.headers, target.headers or {}))


class DispatchAsyncSession(AsyncSession):
    """The asynchronous side of `DispatchSession`."""

    sync_session_class = DispatchSession
    sync_session: DispatchSession


# What an application may listen to, and where it may send statements.
_TRANSACTION_HOOKS: Final = (
    "after_begin",
    "after_transaction_create",
    "after_transaction_end",
    "after_rollback",
    "after_soft_rollback",
)


@asynccontextmanager
async def dispatch_session(connection: AsyncConnection, *, begin: str) -> AsyncIterator[DispatchAsyncSession]:
    """Open the session of one delivery, for the current task.

    Before the end of the block the caller flushes it, which also raises when anything was lost on the way. At the
    end it is closed and refuses further use; the transaction in PostgreSQL stays as it is, for the caller to end.

    Args:
        connection: A connection of an engine from `guard_engine()`, with a transaction begun on its driver.
        begin: The message that began it and set the marker; sent again after a commit or rollback by `unsafe`.
    """
    sync_connection = cast("Connection", connection.sync_connection)
    info = sync_connection.info  # kept: on a connection that was lost meanwhile, the property would reconnect
    guard = Guard(sync_connection, begin)
    session = DispatchAsyncSession(connection, expire_on_commit=False, join_transaction_mode="control_fully")
    quiet = not any(getattr(session.sync_session.dispatch, name) for name in _TRANSACTION_HOOKS)
    if quiet:
        _open(session.sync_session, guard)  # in AUTOCOMMIT SQLAlchemy has nothing to send, so nothing waits
    else:
        await session.run_sync(_open, guard)
    info[_INFO_KEY] = guard
    try:
        yield session
    finally:
        guard.owner = None
        info.pop(_INFO_KEY, None)
        if quiet and not guard.unsafe and not guard.driver.is_closed():
            Session.close(session.sync_session)
        else:
            await session.run_sync(Session.close)


async def flush(session: DispatchAsyncSession) -> None:
    """Flush *session*, with all its checks; where nothing is to be sent, without the detour that sending takes.

    Raises:
        SessionControlError: If the transaction was ended, or lost, behind the session.
        sqlalchemy.exc.SQLAlchemyError: If the flush fails.
    """
    inner = session.sync_session
    inner.guard.check()
    inner.guard.check_whole(inner)
    if not inner.is_active or inner.new or inner.deleted or inner.dirty:
        await session.flush()


def _open(session: Session, guard: Guard) -> None:
    """Begin SQLAlchemy's side of the transaction, so that its end can be noticed."""
    cast("DispatchSession", session).guard = guard
    guard.root = Session.begin(session)
    Session.connection(session)


def guard_engine(engine: AsyncEngine) -> AsyncEngine:
    """Return an engine whose connections obey the guard; *engine*, whose pool it shares, stays as it was.

    It is in SQLAlchemy's AUTOCOMMIT mode: SQLAlchemy sends no BEGIN, COMMIT or ROLLBACK, the dispatcher does.
    """
    guarded = engine.execution_options(isolation_level="AUTOCOMMIT")
    target = guarded.sync_engine
    event.listen(target, "before_cursor_execute", _on_statement)
    event.listen(target, "commit", _on_commit)
    event.listen(target, "rollback", _on_rollback)
    return guarded


def _guard_of(connection: Connection) -> Guard | None:
    if connection.invalidated:
        return None
    return cast("Guard | None", connection.info.get(_INFO_KEY))


def _on_statement(connection: Connection, _cursor: object, statement: str, parameters: object, *_: object) -> None:
    guard = _guard_of(connection)
    if guard is None:
        return
    guard.check()
    guard.statements += 1
    if guard.unsafe or (guard.publishing and _SAVEPOINT.fullmatch(statement)):
        return
    if words := find_control(statement):
        _refuse(words)
    if sets_marker(statement, parameters):
        _refuse("The setting that marks the transaction")


def _on_commit(connection: Connection) -> None:
    if guard := _guard_of(connection):
        guard.check_control("commit()")
        guard.commit()


def _on_rollback(connection: Connection) -> None:
    guard = _guard_of(connection)
    if guard is None:
        return
    if guard.flushing and not guard.unsafe:
        return  # a failed flush, which raises by itself; refusing here would hide its error
    guard.check_control("rollback()")
    guard.rollback()
