"""Publishing without a unit of work: each event in a transaction of its own, which is one statement.

For what has nothing else to write. Whoever has a transaction publishes in it, with `publish_event()`: an event that is
committed by itself may tell of something that was rolled back.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgebus._bulk import Row, as_events, as_rows, checked_row, driver_error, is_complete, makers_of
from pgebus._outgoing import has_middleware, let_pass, mark_passed
from pgebus._runtime.store import Line
from pgebus.database import dispose, make_engine
from pgebus.errors import RetryTransactionError, StateError
from pgebus.inheritance import family
from pgebus.names import quote_identifier
from pgebus.publishing import publish_events
from pgebus.settings import DatabaseSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["EventPublisher", "Published"]

_TRIES: Final = 5


class Published(NamedTuple):
    """What became of a publish.

    Attributes:
        id: The id of the event.
        duplicate: Whether it is that of an earlier event with the same `dedup_key`, and nothing was published.
    """

    id: int
    duplicate: bool


class EventPublisher:
    """Publishes events in transactions of their own, on a few connections that it keeps.

    Nothing connects on construction. Belongs to one event loop; any number of its tasks may use it. `async with` closes
    it at the end.

    Args:
        settings: The database, usually `Settings().database`.
        connections: How many statements it sends at once; the others wait for their turn.
    """

    def __init__(self, settings: DatabaseSettings, *, connections: int = 5) -> None:
        if not isinstance(settings, DatabaseSettings):
            raise TypeError(
                f"settings must be DatabaseSettings, not {type(settings).__name__}. Pass settings.database."
            )
        if connections < 1:
            raise ValueError(f"connections must be at least 1, not {connections!r}.")
        self._settings = settings
        self._connections = connections
        self._engine: AsyncEngine | None = None
        self._idle: list[Line] = []
        self._turns = asyncio.Semaphore(connections)
        self._statements: dict[tuple[str, ...], str] = {}
        self._closed = False

    async def publish(
        self,
        event_type: str,
        payload: dict[str, Any] | BaseModel | DataclassInstance,
        channel: str = "events",
        run_at: datetime | None = None,
        *,
        headers: dict[str, Any] | None = None,
        key: str | None = None,
        dedup_key: str | None = None,
        priority: int | None = None,
        **columns: Any,
    ) -> Published:
        """Publish one event, and commit.

        Committed when this returns. When it raises because the connection was lost, nobody knows: publish it again,
        with the same *dedup_key* where it must not be there twice.

        Args:
            event_type: As for `publish_event()`; so all the others.
            payload: A JSON object, or a pydantic model or dataclass.
            channel: The queue.
            run_at: Not handled before this moment.
            headers: A JSON object beside the payload.
            key: Order per key.
            dedup_key: Published once.
            priority: 0 to 9.
            columns: Those that the class of this event type adds.

        Raises:
            InvalidEventTypeError, InvalidChannelError, PublishError: If an argument is invalid; nothing was sent.
            RetryTransactionError: If an event with *dedup_key* comes and goes.
            StateError: After `close()`.
            sqlalchemy.exc.DBAPIError, OSError, TimeoutError: If the INSERT fails, or the connection.
        """
        given = {
            "channel": channel, "run_at": run_at, "headers": headers, "key": key, "dedup_key": dedup_key,
            "priority": priority, **columns,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        row = checked_row({"type": event_type, "payload": payload, **given})
        if has_middleware():
            row = _passed(row)
        if self._closed:
            raise StateError("This EventPublisher is closed. Create a new one.")
        async with self._turns:
            if not is_complete(row):
                return await self._publish_in_a_session(row)
            line = self._idle.pop() if self._idle else Line(self._connect())
            try:
                return await self._publish(line, row)
            finally:
                if self._closed:
                    await line.close()
                else:
                    self._idle.append(line)

    async def _publish(self, line: Line, row: Row) -> Published:
        names = tuple(row)
        sql = self._statements.get(names) or self._statement(names)
        values = [make(row) for make in makers_of(names, self._connect().dialect)]
        with driver_error(sql):
            for _ in range(_TRIES):
                if (event_id := await line.value(sql, *values)) is not None:
                    return Published(event_id, duplicate=False)
                # Between the two statements the other one may be pruned.
                if (event_id := await line.value(self._existing, row.get("channel"), row["dedup_key"])) is not None:
                    return Published(event_id, duplicate=True)
        raise RetryTransactionError(
            f"An event with dedup_key {row['dedup_key']!r} comes and goes. Publish it again.",
            dedup_key=row["dedup_key"],
        )

    async def _publish_in_a_session(self, row: Row) -> Published:
        """Do it the ordinary way: it needs what SQLAlchemy knows of the columns."""
        engine = self._connect().execution_options(isolation_level="READ COMMITTED")
        if self._idle:
            await self._idle.pop().close()  # its connection goes back to the pool
        async with AsyncSession(engine, expire_on_commit=False) as session:
            events = as_events([row])
            mark_passed(events)
            (event,) = await publish_events(session, events)
            await session.commit()
            return Published(event.id, event.duplicate)

    def _statement(self, names: tuple[str, ...]) -> str:
        columns = ", ".join(quote_identifier(str(family.table.columns[name].name)) for name in names)
        places = ", ".join(f"${number}" for number in range(1, len(names) + 1))
        once = (
            " ON CONFLICT (channel, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING" if "dedup_key" in names else ""
        )
        sql = self._statements[names] = f"INSERT INTO {self._table} ({columns}) VALUES ({places}){once} RETURNING id"  # noqa: S608 - quoted names
        return sql

    @property
    def _table(self) -> str:
        return f"{quote_identifier(self._settings.schema_name)}.events"

    @property
    def _existing(self) -> str:
        return f"SELECT id FROM {self._table} WHERE channel = $1::text AND dedup_key = $2::text"  # noqa: S608 - as above

    def _connect(self) -> AsyncEngine:
        if self._engine is None:
            self._engine = make_engine(
                self._settings, pool_size=self._connections, max_overflow=0, isolation_level="AUTOCOMMIT"
            )
        return self._engine

    async def close(self) -> None:
        """Close all connections, those in use when their statement has been answered. Harmless when repeated."""
        self._closed = True
        while self._idle:
            await self._idle.pop().close()
        if self._engine is not None:
            await dispose(self._engine)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _passed(row: Row) -> Row:
    """Return what the publish middleware makes of a row."""
    events = as_events([row])
    let_pass(events)
    return checked_row(as_rows(events)[0])
