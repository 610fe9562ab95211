"""Units of work of every kind, on every driver, behind one face, for the tests of publishing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgebus import Event, publish_event, publish_event_sync, publish_events, publish_events_sync
from pgebus.settings import DatabaseSettings


class Kind(NamedTuple):
    """What the application has in its hands."""

    what: str
    driver: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.what, self.driver, *(f"{name}={value}" for name, value in self.options)])


_EXPIRING: Final = [(("expire_on_commit", True),), (("expire_on_commit", False),)]
SESSIONS: Final = [
    *(Kind("AsyncSession", driver, options) for driver in ("asyncpg", "psycopg") for options in _EXPIRING),
    *(Kind("Session", driver, options) for driver in ("psycopg", "psycopg2") for options in _EXPIRING),
    Kind("async_scoped_session", "asyncpg"),
    Kind("scoped_session", "psycopg2"),
]
CONNECTIONS: Final = [
    *(Kind("AsyncConnection", driver) for driver in ("asyncpg", "psycopg")),
    *(Kind("Connection", driver) for driver in ("psycopg", "psycopg2")),
]
KINDS: Final = [*SESSIONS, *CONNECTIONS]


class Unit:
    """An open unit of work of an asynchronous kind."""

    def __init__(self, target: Any) -> None:
        self.target = target

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        return await publish_event(self.target, *args, **kwargs)

    async def publish_many(self, events: Iterable[Event]) -> list[Event]:
        return await publish_events(self.target, events)

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        return await self.target.execute(*args, **kwargs)

    async def end(self, how: str) -> None:
        """Commit or roll back."""
        await getattr(self.target, how)()

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        async with self.target.begin_nested():
            yield


class UnitSync(Unit):
    """An open unit of work of a synchronous kind."""

    async def publish(self, *args: Any, **kwargs: Any) -> Any:
        return publish_event_sync(self.target, *args, **kwargs)

    async def publish_many(self, events: Iterable[Event]) -> list[Event]:
        return publish_events_sync(self.target, events)

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.target.execute(*args, **kwargs)

    async def end(self, how: str) -> None:
        getattr(self.target, how)()

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        with self.target.begin_nested():
            yield


@dataclass(frozen=True)
class Units:
    """Opens units of work on one database."""

    settings: DatabaseSettings

    @asynccontextmanager
    async def open(self, kind: Kind, **engine_options: Any) -> AsyncIterator[Unit]:
        """Open one; what it has not committed is rolled back."""
        url = self.settings.sqlalchemy_url().set(drivername=f"postgresql+{kind.driver}")
        if kind.what.lower().startswith("async"):
            engine = create_async_engine(url, **engine_options)
            try:
                async with _asynchronous(kind, engine) as target:
                    yield Unit(target)
            finally:
                await engine.dispose()
        else:
            engine_sync = create_engine(url, **engine_options)
            try:
                with _synchronous(kind, engine_sync) as target:
                    yield UnitSync(target)
            finally:
                engine_sync.dispose()


@asynccontextmanager
async def _asynchronous(
    kind: Kind, engine: Any
) -> AsyncIterator[AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection]:
    if kind.what == "AsyncConnection":
        async with engine.connect() as connection:
            yield connection
    elif kind.what == "AsyncSession":
        async with AsyncSession(engine, **dict(kind.options)) as session:
            yield session
    else:
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        yield scoped
        await scoped.remove()


@contextmanager
def _synchronous(kind: Kind, engine: Engine) -> Iterator[Session | scoped_session[Session] | Connection]:
    with ExitStack() as stack:
        if kind.what == "Connection":
            yield stack.enter_context(engine.connect())
        elif kind.what == "Session":
            yield stack.enter_context(Session(engine, **dict(kind.options)))
        else:
            scoped = scoped_session(sessionmaker(engine))
            stack.callback(scoped.remove)
            yield scoped
