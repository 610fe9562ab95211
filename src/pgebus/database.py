"""The engine and the sessions of an application.

Makes no tables and starts no transaction by itself; committing is the caller's part.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import asyncpg
from sqlalchemy import URL, event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import QueuePool

from pgebus.errors import StateError
from pgebus.names import check_schema
from pgebus.settings import DatabaseSettings

__all__ = ["DatabaseSessionManager", "make_engine"]

logger = logging.getLogger(__name__)

_MODEL_SCHEMA = "pgebus"
_CLOSE_SECONDS = 5.0
_READ_ONLY = "25006"
_DOUBTED = "pgebus_read_only"

# What each engine has opened: a pool does not say what lies in it.
_opened: WeakKeyDictionary[Engine, WeakSet[asyncpg.Connection[asyncpg.Record]]] = WeakKeyDictionary()


def make_engine(settings: DatabaseSettings, *, url: URL | None = None, **engine_options: Any) -> AsyncEngine:
    """Return an engine for *settings*; it connects at its first use.

    Errors of the engine never show bound parameters: they would hold payloads. A connection that was closed
    while it lay in the pool is replaced when it is taken out; so is one on which a write was refused because the server
    is a standby, or read-only for another reason. One that comes back in an open transaction is thrown away.

    Args:
        settings: The database, the pool and the schema.
        url: Another address than `settings.sqlalchemy_url()`.
        **engine_options: For `create_async_engine`; they go before the settings. `connect_args` and
            `execution_options` are merged.

    Raises:
        InvalidSchemaError: If PostgreSQL would cut or refuse the name of the schema.
    """
    check_schema(settings.schema_name)  # again: model_copy(update=...) checks nothing
    connect_args = _merged(settings.connect_args, engine_options.pop("connect_args", {}))
    connect_args = {"timeout": settings.connect_timeout_seconds, **connect_args}
    connect_args["server_settings"] = {
        "application_name": settings.application_name,
        **connect_args.get("server_settings", {}),
    }
    execution_options = engine_options.pop("execution_options", {})
    if settings.schema_name != _MODEL_SCHEMA:
        execution_options = {
            "schema_translate_map": {_MODEL_SCHEMA: settings.schema_name},
            **execution_options,
        }
    if "pool" not in engine_options and issubclass(engine_options.get("poolclass", QueuePool), QueuePool):
        engine_options = {
            "pool_size": settings.pool_size,
            "max_overflow": settings.max_overflow,
            "pool_timeout": settings.pool_timeout_seconds,
            **engine_options,
        }
    if settings.pool_recycle_seconds is not None:
        engine_options.setdefault("pool_recycle", settings.pool_recycle_seconds)
    engine_options.setdefault("hide_parameters", True)
    engine = create_async_engine(
        url or settings.sqlalchemy_url(),
        connect_args=connect_args,
        execution_options=execution_options,
        **engine_options,
    )
    opened = _opened[engine.sync_engine] = WeakSet()
    event.listen(engine.sync_engine, "connect", lambda connection, _: opened.add(connection.driver_connection))
    event.listen(engine.sync_engine, "checkout", _replace_closed)
    event.listen(engine.sync_engine, "handle_error", _doubt_read_only)
    event.listen(engine.sync_engine, "checkout", _replace_read_only)
    event.listen(engine.sync_engine, "reset", _refuse_open_transaction)
    return engine


async def dispose(engine: AsyncEngine) -> None:
    """Close the connections that lie in the pool of *engine*, within a few seconds, also when that is cancelled.

    A pool that is interrupted while it closes one connection leaves all the others open.
    """
    await to_the_end(_close_all(engine))


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await *work*, which takes a bounded time; who cancels this waits for its end first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _close_all(engine: AsyncEngine) -> None:
    # A polite close waits for the server's answer, and a server that has frozen never gives one.
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await engine.dispose()
    except TimeoutError:
        logger.warning("PostgreSQL did not answer when its connections were closed; they are given up.")
        for connection in _opened.pop(engine.sync_engine, ()):
            connection.terminate()
        await engine.dispose()


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    server_settings = {**ours.get("server_settings", {}), **theirs.get("server_settings", {})}
    return {**ours, **theirs, "server_settings": server_settings}


def _replace_closed(dbapi_connection: Any, _record: object, _proxy: object) -> None:
    # asyncpg has seen the server close it, for example at a restart: no round trip is needed to know.
    if dbapi_connection.driver_connection.is_closed():
        raise DisconnectionError("The connection was closed while it lay in the pool.")


def _doubt_read_only(context: ExceptionContext) -> None:
    """Take note of a connection on which nothing could be written: it may lead to what was the primary once."""
    if context.connection is not None and getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        with suppress(SQLAlchemyError):  # it is closed already
            context.connection.connection.info[_DOUBTED] = True


def _replace_read_only(dbapi_connection: Any, record: Any, _proxy: object) -> None:
    """Replace such a connection where it is still so: a standby stays one for ever, its address may lead elsewhere."""
    if not record.info.pop(_DOUBTED, False):
        return
    try:
        state = dbapi_connection.run_async(lambda driver: driver.fetchval("SHOW transaction_read_only"))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise DisconnectionError("The connection was lost while it lay in the pool.") from error
    if state == "on":
        raise DisconnectionError("The connection leads to a server that cannot be written.")


def _refuse_open_transaction(dbapi_connection: Any, record: Any, _state: object) -> None:
    # SQLAlchemy rolls back only what it began itself: a raw BEGIN would wait here for the next user.
    if dbapi_connection.driver_connection.is_in_transaction():
        record.invalidate()


class DatabaseSessionManager:
    """Sessions on one engine, made at first use and disposed of by `close()`.

    Nothing connects on construction. Belongs to one event loop. `async with` closes it at the end.

    Args:
        settings: The database, usually `Settings().database`.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        if not isinstance(settings, DatabaseSettings):
            raise TypeError(
                f"settings must be DatabaseSettings, not {type(settings).__name__}. Pass settings.database."
            )
        self._settings = settings
        self._engine: AsyncEngine | None = None
        self._sessions: WeakSet[AsyncSession] = WeakSet()
        self._closed = False

    @property
    def engine(self) -> AsyncEngine:
        """The engine, made now if it was not there.

        Raises:
            StateError: After `close()`.
        """
        if self._closed:
            raise _closed()
        if self._engine is None:
            self._engine = make_engine(self._settings)
        return self._engine

    def session(self) -> AsyncSession:
        """Return a new session; use it as `async with manager.session() as session:`.

        Whoever takes it commits. Leaving the block rolls back what was not committed and gives the connection
        back. The session may be used again after that, until the manager is closed. Objects stay readable
        after a commit (`expire_on_commit=False`). A session belongs to one task: never share it between
        tasks, take one for each.

        Raises:
            StateError: After `close()`.
        """
        session = AsyncSession(self.engine, expire_on_commit=False)
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """Close all connections, also those of sessions that are still open: what they did not commit is lost.

        Harmless when repeated. A statement that another task still runs is cancelled, and fails there. A session of
        this manager cannot connect again.
        """
        if self._closed:
            return
        self._closed = True
        if self._engine is None:
            return
        async with AsyncExitStack() as stack:  # goes on to the next one when one of them fails
            event.listen(self._engine.sync_engine, "do_connect", _refuse_to_connect)
            event.listen(self._engine.sync_engine, "reset", _throw_away)
            stack.push_async_callback(dispose, self._engine)
            for session in list(self._sessions):
                # Not close(): in a session that is in use it fails half-way, and its connection would be lost.
                stack.push_async_callback(session.invalidate)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _refuse_to_connect(*_: object) -> None:
    raise _closed()


def _throw_away(_dbapi_connection: object, record: Any, _state: object) -> None:
    # The pool is disposed of: a connection that was lent otherwise would lie in it, open, when it comes back.
    record.invalidate()


def _closed() -> StateError:
    return StateError("This DatabaseSessionManager is closed. Create a new one.")
