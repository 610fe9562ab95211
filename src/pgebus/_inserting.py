"""How events get into the transaction of a session or of a connection.

It checks no event and commits nothing: what comes here is valid, and ends with the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ClauseElement, Column, Connection, TwoPhaseTransaction, insert, inspect, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Mapper, Session, make_transient_to_detached, object_session
from sqlalchemy.orm.attributes import set_committed_value

from pgebus._guard import DispatchSession
from pgebus.errors import TWO_PHASE, PublishError, RetryTransactionError, SessionStateError
from pgebus.inheritance import family, loaded_columns
from pgebus.models import Event

# In the session's info, while one of our functions flushes it.
_PUBLISHING: Final = "pgebus.publishing"
_SERIALIZATION_FAILURE: Final = "40001"
_TRIES: Final = 5
# What only the server can know about a transaction: it refuses every INSERT.
_REFUSED_STATES: Final = {
    "25006": "The transaction is read-only, so nothing can be published in it. Use a read-write transaction.",
    "25P02": "The transaction has failed, so nothing can be published in it. Roll it back first.",
}


def insert_events(into: Session | Connection, events: Sequence[Event]) -> list[Event]:
    """Insert *events* in the transaction of *into*, beginning one where there is none.

    Returns:
        The events, each in its place; where its `dedup_key` was there, the one that is there.

    Raises:
        SessionStateError: If nothing can be published in it.
        PublishError: If an event has a related object, which only a flush could insert, and is not flushed.
        RetryTransactionError: If an event with its `dedup_key` is there, and this transaction can't see it.
        sqlalchemy.exc.SQLAlchemyError: If the INSERT fails.
    """
    try:
        _check(into)
        rows = [
            _row(event, index) if event.dedup_key is not None or isinstance(into, Connection) else None
            for index, event in enumerate(events)
        ]
        published: list[Event] = []
        # Events keep their order: a run of those without a dedup_key, then each that has one by itself.
        for alone, run in groupby(zip(events, rows, strict=True), key=lambda each: each[0].dedup_key is not None):
            batch = list(run)
            if alone:
                published += [_insert_once(into, event, row or {}) for event, row in batch]
            elif isinstance(into, Connection):
                _insert(into, [(event, row or {}) for event, row in batch])
                published += [event for event, _ in batch]
            else:
                _flush(into, [event for event, _ in batch])
                published += [event for event, _ in batch]
    except DBAPIError as error:
        refusal = _REFUSED_STATES.get(_sqlstate(error) or "")
        if refusal is None:
            raise
        raise SessionStateError(refusal) from error
    return published


def prepared(into: Session | Connection) -> Connection:
    """Return the connection to publish on, with whatever is pending in the session flushed.

    Raises:
        SessionStateError: If nothing can be published in it.
    """
    _check(into)
    if isinstance(into, Connection):
        return into
    into.flush()
    if isinstance(into, DispatchSession):
        return into.guard.connection
    return into.connection(bind_arguments={"mapper": Event})


def _check(into: Session | Connection) -> None:
    """Refuse what cannot publish, before anything is sent or added."""
    if isinstance(into, Connection):
        try:
            _check_dialect("connection", into.dialect.name)
            _check_connection(into)
        except InvalidRequestError as error:
            raise SessionStateError(f"The connection cannot be used to publish now: {error}") from error
        return
    if not into.is_active:
        raise SessionStateError(
            "The session's transaction has failed, so nothing can be published in it. Roll it back first."
        )
    if into.twophase:
        raise SessionStateError(TWO_PHASE)
    try:
        # The dispatcher's session refuses here what comes from another task or too late, before anything is added.
        _check_dialect("session", into.get_bind(Event).dialect.name)
        # A session that chooses its connection itself, by statement or tenant, may choose another at the flush;
        # and the dispatcher's own, which is one of these, runs its transactions on a connection in AUTOCOMMIT.
        if type(into).get_bind is Session.get_bind:
            # It is the one that the flush would take. Nothing is sent yet, not even BEGIN.
            _check_connection(into.connection(bind_arguments={"mapper": Event}))
        if into._flushing:
            raise SessionStateError(
                "The session is being flushed, and cannot be flushed again inside. In a before_flush hook use "
                "session.add(); in hooks like after_insert publish on the connection that they are given."
            )
    except InvalidRequestError as error:
        raise SessionStateError(f"The session cannot be used to publish now: {error}") from error


def _flush(session: Session, events: Sequence[Event]) -> None:
    """Add *events* and flush the session; when that fails, what was added is taken back."""
    new = [event for event in events if event not in session]
    session.info[_PUBLISHING] = True
    try:
        session.add_all(events)
        session.flush()
        for event in events:
            # What the flush could not know, such as the value of an SQL expression.
            if unknown := inspect(event).expired_attributes & _columns_of(type(event)):
                session.refresh(event, sorted(unknown))
    except BaseException:
        for event in new:
            if event in session.new:
                session.expunge(event)
        raise
    finally:
        session.info.pop(_PUBLISHING, None)


@listens_for(Event, "before_insert", propagate=True)
def _check_connection_of_the_flush(_mapper: Mapper[Event], connection: Connection, target: Event) -> None:
    """Look at the connection that a session has chosen itself, which could not be asked before."""
    session = object_session(target)
    if session is not None and session.info.get(_PUBLISHING) and not isinstance(session, DispatchSession):
        _check_connection(connection)


def _insert(connection: Connection, prepared: Sequence[tuple[Event, dict[str, Any]]]) -> None:
    """Do what a flush does, as far as it can be done without a session."""
    returned: list[tuple[Event, Sequence[tuple[str, Column[Any]]], Sequence[Any]]] = []
    # One statement for each run of events that name the same columns: events keep their order. An SQL expression can
    # only be given to a statement with a single row, and its value has to be asked for.
    for (cls, given, alone), group in groupby(prepared, key=_kind):
        run = list(group)
        missing = _missing(cls, given)
        statement = insert(family.table).returning(
            *(column for _, column in missing), sort_by_parameter_order=len(run) > 1
        )
        rows = [row for _, row in run]
        if len(rows) > 1 and alone is None:
            results = connection.execute(statement, rows).all()
        else:
            results = [connection.execute(statement.values(row)).one() for row in rows]
        returned += [(event, missing, values) for (event, _), values in zip(run, results, strict=True)]
    # Only when all of it has worked: else the events could not be published again.
    for event, columns, values in returned:
        _fill(event, columns, values)


def _kind(prepared: tuple[Event, dict[str, Any]]) -> tuple[type[Event], tuple[str, ...], int | None]:
    """Return what events have in common that are inserted by one statement."""
    event, row = prepared
    expressions = [name for name, value in row.items() if isinstance(value, ClauseElement)]
    return type(event), tuple(name for name in row if name not in expressions), id(event) if expressions else None


def _insert_once(into: Session | Connection, event: Event, row: dict[str, Any]) -> Event:
    """Insert an event unless its `dedup_key` is there; return it, or the one that is there."""
    if isinstance(into, Session):
        if event in into:
            into.expunge(event)
        into.flush()  # what else is pending comes before it
    _, given, _ = _kind((event, row))
    missing = _missing(type(event), given)
    statement = (
        postgresql.insert(family.table)
        .values(row)
        .on_conflict_do_nothing(
            index_elements=[family.table.c.channel, family.table.c.dedup_key],
            index_where=family.table.c.dedup_key.is_not(None),
        )
        .returning(*(column for _, column in missing))
    )
    there = select(Event).where(Event.channel == (event.channel or "events"), Event.dedup_key == event.dedup_key)
    # Between the two statements the other one may be pruned, and a third one be published.
    for _ in range(_TRIES):
        try:
            values = _execute(into, statement).one_or_none()
        except DBAPIError as error:
            if _sqlstate(error) != _SERIALIZATION_FAILURE:
                raise
            raise RetryTransactionError(
                f"An event with dedup_key {event.dedup_key!r} was committed by another transaction, and this one "
                "began before, so it cannot see it. Roll back, and do the whole transaction again.",
                dedup_key=event.dedup_key or "",
            ) from error
        if values is not None:
            _fill(event, missing, values)
            if isinstance(into, Session):
                into.add(event)
            return event
        if (found := _load(into, there)) is not None:
            found.duplicate = True
            return found
    raise RetryTransactionError(
        f"An event with dedup_key {event.dedup_key!r} comes and goes. Roll back, and do the whole transaction again.",
        dedup_key=event.dedup_key or "",
    )


def _execute(into: Session | Connection, statement: Any) -> Any:
    if isinstance(into, Connection):
        return into.execute(statement)
    return into.execute(statement, bind_arguments={"mapper": Event})


def _load(into: Session | Connection, statement: Any) -> Event | None:
    if isinstance(into, Session):
        found: Event | None = into.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
        return found
    # It ends without a trace: neither closing it nor dropping it touches the caller's transaction.
    session = Session(into, join_transaction_mode="rollback_only", expire_on_commit=False)
    loaded: Event | None = session.scalars(statement).one_or_none()
    session.expunge_all()
    return loaded


def _columns_of(cls: type[Event]) -> set[str]:
    return {key for key, _ in loaded_columns(inspect(cls, raiseerr=True))}


def _missing(cls: type[Event], columns: Sequence[str]) -> list[tuple[str, Column[Any]]]:
    """Return the attributes of a class that a row does not give: the database says what they are."""
    mapper = inspect(cls, raiseerr=True)
    return [(key, column) for key, column in loaded_columns(mapper) if column.key not in columns]


def _fill(event: Event, missing: Sequence[tuple[str, Column[Any]]], values: Sequence[Any]) -> None:
    """Make a new event what a flush and a detachment would have made of it."""
    for (key, _), value in zip(missing, values, strict=True):
        set_committed_value(event, key, value)
    make_transient_to_detached(event)


def _sqlstate(error: DBAPIError) -> str | None:
    # psycopg2 has another name for it than asyncpg and psycopg.
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def _row(event: Event, index: int) -> dict[str, Any]:
    """Return the values of the columns that are set, as a flush would take them."""
    state = inspect(event)
    for related in state.mapper.relationships:
        if state.dict.get(related.key) and not related.viewonly:
            raise PublishError(
                f"events[{index}].{related.key} is a related object, which only the flush of a session can insert "
                "along with the event. Set the column instead; or publish in a session, without a dedup_key."
            )
    return dict(_set_columns(state.dict, state.mapper))


def _set_columns(values: dict[str, Any], mapper: Any) -> Iterator[tuple[str, Any]]:
    column: Column[Any]
    for key, column in loaded_columns(mapper):
        value = values.get(key)
        if value is not None or (key in values and column.type.should_evaluate_none):
            yield column.key, value


def _check_dialect(what: str, dialect: str) -> None:
    if dialect != "postgresql":
        raise SessionStateError(f"The {what} is bound to {dialect!r}; events are published on PostgreSQL.")


def _check_connection(connection: Connection) -> None:
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        raise SessionStateError(TWO_PHASE)
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise SessionStateError(
            "The connection is in AUTOCOMMIT: the event would be handled even if you roll back. "
            "Use an isolation level with transactions."
        )
    if connection.get_execution_options().get("postgresql_readonly"):
        raise SessionStateError(_REFUSED_STATES["25006"])
