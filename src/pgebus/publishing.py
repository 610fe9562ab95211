"""Publishing in the caller's transaction: an event commits or rolls back with everything else.

Nothing here commits, and nothing here notifies: the trigger on the table does, at the caller's commit. Each call comes
twice, for asynchronous and for synchronous code; the two do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, overload

from pydantic import BaseModel
from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from pgebus._bulk import COPY_FROM, Row, as_events, as_rows, checked_rows, copy_rows
from pgebus._causes import inherit
from pgebus._guard import DispatchSession
from pgebus._inserting import insert_events, prepared
from pgebus._outgoing import has_middleware, let_pass
from pgebus.errors import InvalidEventTypeError, PublishError, SessionStateError, SessionTypeError
from pgebus.inheritance import family
from pgebus.models import Event, check_class
from pgebus.names import check_event_type
from pgebus.payloads import check_headers
from pgebus.session import GuardedSession

__all__ = ["publish_event", "publish_event_sync", "publish_events", "publish_events_sync"]

UnitOfWork: TypeAlias = AsyncSession | async_scoped_session[Any] | GuardedSession | AsyncConnection
UnitOfWorkSync: TypeAlias = Session | scoped_session[Any] | Connection

_R = TypeVar("_R")

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    # A default is for Python 3.13; at run time nothing asks for it.
    from typing_extensions import TypeVar as TypeVarWithDefault

    _E = TypeVarWithDefault("_E", bound=Event, default=Event)


async def publish_event(
    session: UnitOfWork,
    event_type: str,
    payload: dict[str, Any] | BaseModel | DataclassInstance,
    channel: str,
    run_at: datetime | None = None,
    *,
    headers: dict[str, Any] | None = None,
    key: str | None = None,
    dedup_key: str | None = None,
    priority: int | None = None,
    event_class: type[_E] | None = None,
    **columns: Any,
) -> _E:
    """Publish one event in the transaction of *session*: it is handled if, and only if, the caller commits.

    In a session the event is added and flushed, with whatever else is pending there; on a connection it is inserted.
    Nothing is committed. The payload is copied now: changing the dict later changes no event.

    Args:
        session: An AsyncSession on PostgreSQL, an async_scoped_session, an AsyncConnection, or a handler's
            `ctx.session`. With the latter the headers say which event caused this one, unless *headers* says otherwise.
        event_type: Dotted words, like `order.placed`.
        payload: A JSON object, or a pydantic model or dataclass to be made one; `check_payload()` has the rules.
        channel: The queue to publish to; a running system listens to `settings.event_system.channel`.
        run_at: Not handled before this moment, an aware datetime; at once by default.
        headers: A JSON object beside the payload, at most 64 KiB.
        key: Events of one key are handled in the order of their ids, one at a time, within each consumer group; text of
            1 to 255 bytes.
        dedup_key: As long as an event with this key is kept on the channel, no other one is published: the one that is
            there is returned, with `duplicate` true unless this transaction has published it. Text of 1 to 255 bytes.
            Waits for a transaction that has just published one and has not ended. In a session the event is flushed
            inside a savepoint, after everything else that is pending.
        priority: 0, handled first and the default, to 9.
        event_class: The class of the event; by default the one that its type is loaded as: the subclass of Event
            that declares the type, else the most special class without a type.
        columns: Given to the constructor of that class: the columns that it adds, like `order_id=7`.

    Returns:
        The event, with its id and all columns loaded; detached when it was inserted on a connection. Where the server
        fills in a column of a subclass, a session makes another round trip for it. With *dedup_key* perhaps an earlier
        one, whatever it holds.

    Raises:
        TypeError: If the class has no attribute of a name in *columns*, or it is one of Event's own.
        InvalidEventTypeError, InvalidChannelError, PublishError: If an argument is invalid; nothing was sent,
            and the session can go on. Also if an event with *dedup_key* is there that *session* never sees: row-level
            security or `with_loader_criteria()` hides it.
        MiddlewareError: If a publish middleware has not called the next one exactly once; what it raises is raised.
        RetryTransactionError: If an event with *dedup_key* is there that a transaction of this isolation level cannot
            see; roll back, and do all of it again.
        SessionTypeError: If *session* is none.
        SessionStateError: If *session* cannot publish: two-phase, AUTOCOMMIT, read-only, failed, or not on
            PostgreSQL.
        sqlalchemy.exc.SQLAlchemyError: If the INSERT fails; then, as always, the session needs a rollback.
    """
    target = _asynchronous(session)
    own = {"run_at": run_at, "headers": headers, "key": key, "dedup_key": dedup_key, "priority": priority}
    event = _made(event_type, payload, channel, own, event_class, columns)
    return cast("_E", (await _run(target, _insert, [event]))[0])


def publish_event_sync(
    session: UnitOfWorkSync,
    event_type: str,
    payload: dict[str, Any] | BaseModel | DataclassInstance,
    channel: str,
    run_at: datetime | None = None,
    *,
    headers: dict[str, Any] | None = None,
    key: str | None = None,
    dedup_key: str | None = None,
    priority: int | None = None,
    event_class: type[_E] | None = None,
    **columns: Any,
) -> _E:
    """Publish one event from synchronous code: `publish_event()` for a Session, a scoped_session or a Connection.

    Also for the Session that `AsyncSession.run_sync()` hands out, a handler's included. Arguments, result and errors
    are those of `publish_event()`.
    """
    target = _synchronous(session)
    own = {"run_at": run_at, "headers": headers, "key": key, "dedup_key": dedup_key, "priority": priority}
    event = _made(event_type, payload, channel, own, event_class, columns)
    return cast("_E", _insert(target, [event])[0])


@overload
async def publish_events(session: UnitOfWork, events: Iterable[Event]) -> list[Event]: ...


@overload
async def publish_events(session: UnitOfWork, events: Iterable[Mapping[str, Any]]) -> list[int]: ...


async def publish_events(
    session: UnitOfWork, events: Iterable[Event] | Iterable[Mapping[str, Any]]
) -> list[Event] | list[int]:
    """Publish many events in the transaction of *session*, in their order: all, or none with an error.

    Like `publish_event()`, with events made by the caller: subclasses of Event and all columns can be used::

        await publish_events(session, [Event(type="order.placed", payload={"order": 7}), ...])

    As for SQLAlchemy's bulk INSERT, they may also be plain rows, by the names of the columns. Unless there is a publish
    middleware no Event is made of them, so hooks of the session are not run for them, and from a hundred on they go by
    COPY where asyncpg is the driver: several times as fast::

        await publish_events(session, [{"type": "order.placed", "payload": {"order": 7}}, ...])

    Args:
        session: As for `publish_event()`.
        events: New events, or rows, not both; read to its end before anything is added to the session.

    Returns:
        The events as a list, with their ids; for rows, the ids. An empty one for no events, without any SQL. In the
        place of one whose `dedup_key` was there, the one that is there, with `duplicate` true; so two of the same key
        are one event, published once, and not a duplicate.

    Raises:
        PublishError: If an item is no Event, has been published already, belongs to another session, or
            appears twice; the message names its index. Nothing was sent, and the session can go on. Also if an event
            for a connection, or with a `dedup_key`, has a related object, or an object of the session refers to one
            with a `dedup_key`. And, when some may have been sent, if an event with a `dedup_key` is there that
            *session* never sees; as for `publish_event()`.
        InvalidEventTypeError: If an event has no type, or one that another class stands for.
        RetryTransactionError: If an event with a `dedup_key` is there that a transaction of this isolation level cannot
            see; roll back, and do all of it again.
        SessionTypeError: If *session* is none.
        SessionStateError: If *session* cannot publish; as for `publish_event()`.
        sqlalchemy.exc.SQLAlchemyError: If the INSERT fails; then, as always, the session needs a rollback.
    """
    target = _asynchronous(session)
    items = _listed(events)
    if items and not isinstance(items[0], Event):
        rows = checked_rows(items)
        return await _run(target, _insert_rows, rows)
    batch = _batch(items, target.sync_session if isinstance(target, AsyncSession) else None)
    return await _run(target, _insert, batch)


@overload
def publish_events_sync(session: UnitOfWorkSync, events: Iterable[Event]) -> list[Event]: ...


@overload
def publish_events_sync(session: UnitOfWorkSync, events: Iterable[Mapping[str, Any]]) -> list[int]: ...


def publish_events_sync(
    session: UnitOfWorkSync, events: Iterable[Event] | Iterable[Mapping[str, Any]]
) -> list[Event] | list[int]:
    """Publish many events from synchronous code: `publish_events()` for what `publish_event_sync()` takes."""
    target = _synchronous(session)
    items = _listed(events)
    if items and not isinstance(items[0], Event):
        return _insert_rows(target, checked_rows(items))
    return _insert(target, _batch(items, target if isinstance(target, Session) else None))


def _asynchronous(session: object) -> AsyncSession | AsyncConnection:
    """Return what has the transaction."""
    if isinstance(session, GuardedSession):
        return session._checked
    if isinstance(session, async_scoped_session):
        return _asynchronous(session())
    if isinstance(session, (AsyncSession, AsyncConnection)):
        return session
    if isinstance(session, (Session, scoped_session, Connection)):
        advice = "In synchronous code call publish_event_sync() or publish_events_sync(); session.add() publishes too."
    elif session is None:
        advice = "In a handler, ctx.session is None unless the handler is registered with transactional=True."
    else:
        advice = _advice(session)
    raise SessionTypeError(
        "Events are published in an AsyncSession, an async_scoped_session, an AsyncConnection or a handler's "
        f"ctx.session, not in {_type_name(session)}. {advice}"
    )


def _synchronous(session: object) -> Session | Connection:
    """Return what has the transaction."""
    if isinstance(session, scoped_session):
        return _synchronous(session())
    if isinstance(session, (Session, Connection)):
        return session
    if isinstance(session, (AsyncSession, async_scoped_session, GuardedSession, AsyncConnection)):
        advice = "In a coroutine call 'await publish_event()' or 'await publish_events()'."
    else:
        advice = _advice(session)
    raise SessionTypeError(
        "Synchronous code publishes in a Session, a scoped_session or a Connection, "
        f"not in {_type_name(session)}. {advice}"
    )


def _advice(session: object) -> str:
    if isinstance(session, (AsyncEngine, Engine)):
        return "Take a connection: engine.begin() commits it, with the event, at the end of its block."
    return "Pass the session of the transaction that the event belongs to."


async def _run(
    target: AsyncSession | AsyncConnection, insert: Callable[[Any, Sequence[Any]], list[_R]], events: Sequence[Any]
) -> list[_R]:
    try:
        return await target.run_sync(insert, events)
    except InvalidRequestError as error:
        if isinstance(target, AsyncConnection) and target.sync_connection is None:
            raise SessionStateError(f"The connection cannot be used to publish now: {error}") from error
        raise


def _insert(target: Session | Connection, events: Sequence[Event]) -> list[Event]:
    if not events:
        return []
    _prepare(target, events)
    return insert_events(target, events)


def _prepare(target: Session | Connection, events: Sequence[Event]) -> None:
    """Say what has caused *events*, and let them pass the publish middleware."""
    inherited = target.guard.headers if isinstance(target, DispatchSession) else {}
    if inherited:
        # Computed for all before any is changed: headers that become too large refuse the whole batch.
        merged = [check_headers(inherit(inherited, event.headers or {})) for event in events]
        for event, headers in zip(events, merged, strict=True):
            event.headers = headers
    let_pass(events)


def _insert_rows(target: Session | Connection, rows: Sequence[Row]) -> list[int]:
    inherited = target.guard.headers if isinstance(target, DispatchSession) else {}
    events: list[Event] | None = None
    if has_middleware():
        events = as_events(rows)
        _prepare(target, events)
        rows = checked_rows(as_rows(events))
    ids = copy_rows(prepared(target), rows, inherited) if len(rows) >= COPY_FROM else None
    if ids is None:
        return [event.id for event in _insert(target, as_events(rows) if events is None else events)]
    return ids


def _made(
    event_type: str,
    payload: object,
    channel: str,
    own: dict[str, Any],
    event_class: object,
    columns: dict[str, Any],
) -> Event:
    event = _instance(check_event_type(event_type), event_class, columns)
    event.type = event_type
    event.channel = channel
    event.payload = payload  # type: ignore[assignment]  # it is checked, and a model is made a dict
    for name, value in own.items():
        if value is not None:
            setattr(event, name, value)
    return event


def _instance(event_type: str, event_class: object, columns: dict[str, Any]) -> Event:
    """Make an event of the class that *event_type* is loaded as; its own columns are still to be set."""
    loaded_as = family.class_of(event_type)
    if event_class is None:
        event_class = loaded_as
    elif not (isinstance(event_class, type) and issubclass(event_class, Event)):
        raise PublishError(f"event_class must be Event or a subclass of it, not {_type_name(event_class)}.")
    elif not issubclass(loaded_as, event_class) or loaded_as.__event_type__ != event_class.__event_type__:
        raise PublishError(
            f"An event of type {event_type!r} is loaded as {loaded_as.__qualname__}, not as "
            f"{event_class.__qualname__}. Leave event_class out, or publish the type that it stands for."
        )
    for name in columns:
        if name in family.own_columns:
            raise TypeError(f"publish_event() got an unexpected keyword argument {name!r}")
    return cast("type[Event]", event_class)(**columns)


def _listed(events: object) -> list[Any]:
    if isinstance(events, (Event, Mapping)) or not isinstance(events, Iterable):
        raise PublishError(f"events must be an iterable of Event or of rows, not {_type_name(events)}.")
    return list(events)


def _batch(batch: list[Event], session: Session | None) -> list[Event]:
    """Return *batch*, all of which can be published in *session*."""
    seen: set[int] = set()
    for index, event in enumerate(batch):
        if not isinstance(event, Event):
            raise PublishError(f"events[{index}] is no Event but {_type_name(event)}. Make one: Event(type=...).")
        if id(event) in seen:
            raise PublishError(f"events[{index}] appears twice. Make one Event for each time it is published.")
        seen.add(id(event))
        state = inspect(event)
        if not (state.transient or state.pending):
            raise PublishError(
                f"events[{index}] has been published already, if only in a transaction that was rolled back. Make a "
                "new Event."
            )
        if "id" in state.dict:
            raise PublishError(
                f"events[{index}] has an id, which the database gives: it was published in a transaction that was "
                "rolled back, or was made with one. Make a new Event, without."
            )
        if state.session is not None and state.session is not session:
            raise PublishError(f"events[{index}] belongs to another session. Publish it there.")
        if state.dict.get("type") is None:
            raise InvalidEventTypeError(
                f"events[{index}] has no type. Write Event(type='order.placed', …).", value=None
            )
        check_class(event)
    return batch


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
