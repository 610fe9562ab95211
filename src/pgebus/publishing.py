"""Publishing in the caller's transaction: an event commits or rolls back with everything else.

Nothing here commits, and nothing here notifies: the trigger on the table does, at the caller's commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from sqlalchemy import Connection, TwoPhaseTransaction, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from pgebus.errors import PublishError, SessionStateError, SessionTypeError
from pgebus.inheritance import family
from pgebus.models import Event
from pgebus.names import check_event_type
from pgebus.payloads import check_headers
from pgebus.session import GuardedSession

__all__ = ["publish_event", "publish_events"]

PublishingSession: TypeAlias = AsyncSession | async_scoped_session[Any] | GuardedSession

if TYPE_CHECKING:  # a default is for Python 3.13; at run time nothing asks for it
    from typing_extensions import TypeVar

    _E = TypeVar("_E", bound=Event, default=Event)

# What only the server can know about a transaction: it refuses every INSERT.
_REFUSED_STATES: Final = {
    "25006": "The transaction is read-only, so nothing can be published in it. Use a read-write transaction.",
    "25P02": "The transaction has failed, so nothing can be published in it. Roll it back first.",
}
_TWO_PHASE: Final = (
    "Events cannot be published in a two-phase transaction: PostgreSQL cannot prepare a NOTIFY. "
    "Publish in a session without twophase=True."
)


async def publish_event(
    session: PublishingSession,
    event_type: str,
    payload: dict[str, Any],
    channel: str,
    run_at: datetime | None = None,
    *,
    headers: dict[str, Any] | None = None,
    event_class: type[_E] | None = None,
    **columns: Any,
) -> _E:
    """Publish one event in the transaction of *session*: it is handled if, and only if, the caller commits.

    The event is added and flushed, with whatever else is pending in the session; nothing is committed. The
    payload is copied now: changing the dict later changes no event.

    Args:
        session: An AsyncSession on PostgreSQL, an async_scoped_session, or a handler's `ctx.session`. With
            the latter the headers say which event caused this one, unless *headers* says otherwise.
        event_type: Dotted words, like `order.placed`.
        payload: A JSON object; `check_payload()` has the rules.
        channel: The queue to publish to; a running system listens to `settings.event_system.channel`.
        run_at: Not handled before this moment, an aware datetime; at once by default.
        headers: A JSON object beside the payload, at most 64 KiB.
        event_class: The class of the event; by default the one that its type is loaded as: the subclass of Event
            that declares the type, else the most special class without a type.
        columns: Given to the constructor of that class: the columns that it adds, like `order_id=7`.

    Returns:
        The event, with its id and all columns loaded. Where the server fills in a column of a subclass, that costs
        another round trip.

    Raises:
        TypeError: If the class has no attribute of a name in *columns*, or it is one of Event's own.
        InvalidEventTypeError, InvalidChannelError, PublishError: If an argument is invalid; nothing was sent,
            and the session can go on.
        SessionTypeError: If *session* is none.
        SessionStateError: If *session* cannot publish: two-phase, AUTOCOMMIT, read-only, failed, or not on
            PostgreSQL.
        sqlalchemy.exc.SQLAlchemyError: If the flush fails; then, as always, the session needs a rollback.
    """
    target, inherited = _target_of(session)
    event = _instance(check_event_type(event_type), event_class, columns)
    event.type = event_type
    event.channel = channel
    event.payload = payload
    if run_at is not None:
        event.run_at = run_at
    if headers is not None:
        event.headers = headers
    await _publish(target, [event], inherited)
    return cast("_E", event)


async def publish_events(session: PublishingSession, events: Iterable[Event]) -> list[Event]:
    """Publish many events in the transaction of *session*, in their order: all, or none with an error.

    Like `publish_event()`, with events made by the caller: subclasses of Event and all columns can be used::

        await publish_events(session, [Event(type="order.placed", payload={"order": 7}), ...])

    Args:
        session: As for `publish_event()`.
        events: New events; read to its end before anything is added to the session.

    Returns:
        The events as a list, with their ids. An empty one for no events, without any SQL.

    Raises:
        PublishError: If an item is no Event, has been published already, belongs to another session, or
            appears twice; the message names its index. Nothing was sent, and the session can go on.
        InvalidEventTypeError: If an event has no type.
        SessionTypeError: If *session* is none.
        SessionStateError: If *session* cannot publish; as for `publish_event()`.
        sqlalchemy.exc.SQLAlchemyError: If the flush fails; then, as always, the session needs a rollback.
    """
    target, inherited = _target_of(session)
    if isinstance(events, Event) or not isinstance(events, Iterable):
        raise PublishError(f"events must be an iterable of Event, not {_type_name(events)}.")
    batch = list(events)
    _check_batch(batch, target.sync_session)
    if batch:
        await _publish(target, batch, inherited)
    return batch


def _target_of(session: object) -> tuple[AsyncSession, dict[str, Any]]:
    """Return the session to flush, and the headers that its events inherit."""
    if isinstance(session, GuardedSession):
        return session._checked, session._headers
    if isinstance(session, AsyncSession):
        return session, {}
    if isinstance(session, async_scoped_session):
        return _target_of(session())
    if isinstance(session, (Session, scoped_session)):
        advice = "In synchronous code session.add(Event(...)) publishes too."
    elif isinstance(session, (Connection, AsyncConnection, AsyncEngine)):
        advice = "Make one: AsyncSession(bind). Inserting into the table of events with Core publishes too."
    elif session is None:
        advice = "In a handler, ctx.session is None unless the handler is registered with transactional=True."
    else:
        advice = "Pass the session of the transaction that the event belongs to."
    raise SessionTypeError(
        f"Events are published in an AsyncSession, an async_scoped_session or a handler's ctx.session, "
        f"not in {_type_name(session)}. {advice}"
    )


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


def _check_batch(batch: Sequence[object], session: Session) -> None:
    seen: set[int] = set()
    for index, event in enumerate(batch):
        if not isinstance(event, Event):
            raise PublishError(f"events[{index}] is no Event but {_type_name(event)}. Make one: Event(type=...).")
        if id(event) in seen:
            raise PublishError(f"events[{index}] appears twice. Make one Event for each time it is published.")
        seen.add(id(event))
        state = inspect(event)
        if not (state.transient or state.pending):
            raise PublishError(f"events[{index}] has been published already. Make a new Event.")
        if state.session is not None and state.session is not session:
            raise PublishError(f"events[{index}] belongs to another session. Publish it there.")
        check_event_type(state.dict.get("type"), what=f"Type of events[{index}]")


async def _publish(target: AsyncSession, events: Sequence[Event], inherited: dict[str, Any]) -> None:
    if inherited:
        # Computed for all before any is changed: headers that become too large refuse the whole batch.
        merged = [check_headers({**inherited, **(event.headers or {})}) for event in events]
        for event, headers in zip(events, merged, strict=True):
            event.headers = headers
    try:
        await target.run_sync(_flush, events)
    except DBAPIError as error:
        refusal = _REFUSED_STATES.get(getattr(error.orig, "sqlstate", None) or "")
        if refusal is None:
            raise
        raise SessionStateError(refusal) from error


def _flush(session: Session, events: Sequence[Event]) -> None:
    if not session.is_active:
        raise SessionStateError(
            "The session's transaction has failed, so nothing can be published in it. Roll it back first."
        )
    if session.twophase:
        raise SessionStateError(_TWO_PHASE)
    try:
        # The dispatcher's session refuses here what comes from another task or too late, before anything is added.
        dialect = session.get_bind(Event).dialect.name
        if dialect != "postgresql":
            raise SessionStateError(f"The session is bound to {dialect!r}; events are published on PostgreSQL.")
        # A session that chooses its connection itself, by statement or tenant, may choose another at the flush;
        # and the dispatcher's own, which is one of these, runs its transactions on a connection in AUTOCOMMIT.
        if type(session).get_bind is Session.get_bind:
            # It is the one that the flush would take. Nothing is sent yet, not even BEGIN.
            _check_connection(session.connection(bind_arguments={"mapper": Event}))
    except InvalidRequestError as error:
        raise SessionStateError(f"The session cannot be used to publish now: {error}") from error
    session.add_all(events)
    session.flush()


def _check_connection(connection: Connection) -> None:
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        raise SessionStateError(_TWO_PHASE)
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise SessionStateError(
            "The session's connection is in AUTOCOMMIT: the event would be handled even if you roll back. "
            "Use an isolation level with transactions."
        )
    if connection.get_execution_options().get("postgresql_readonly"):
        raise SessionStateError(_REFUSED_STATES["25006"])


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
