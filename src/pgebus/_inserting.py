"""How events get into the transaction of a session or of a connection.

It checks no event and commits nothing: what comes here is valid, and ends with the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Column, Connection, TwoPhaseTransaction, insert, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from pgebus.errors import TWO_PHASE, PublishError, SessionStateError
from pgebus.inheritance import family, loaded_columns
from pgebus.models import Event

# What only the server can know about a transaction: it refuses every INSERT.
_REFUSED_STATES: Final = {
    "25006": "The transaction is read-only, so nothing can be published in it. Use a read-write transaction.",
    "25P02": "The transaction has failed, so nothing can be published in it. Roll it back first.",
}


def insert_events(into: Session | Connection, events: Sequence[Event]) -> None:
    """Insert *events* in the transaction of *into*, beginning one where there is none.

    Raises:
        SessionStateError: If nothing can be published in it.
        PublishError: If a connection is given an event that only a session could insert.
        sqlalchemy.exc.SQLAlchemyError: If the INSERT fails.
    """
    try:
        if isinstance(into, Connection):
            _insert(into, events)
        else:
            _flush(into, events)
    except DBAPIError as error:
        # psycopg2 has another name for it than asyncpg and psycopg.
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        refusal = _REFUSED_STATES.get(state or "")
        if refusal is None:
            raise
        raise SessionStateError(refusal) from error


def _flush(session: Session, events: Sequence[Event]) -> None:
    if not session.is_active:
        raise SessionStateError(
            "The session's transaction has failed, so nothing can be published in it. Roll it back first."
        )
    if session.twophase:
        raise SessionStateError(TWO_PHASE)
    try:
        # The dispatcher's session refuses here what comes from another task or too late, before anything is added.
        _check_dialect("session", session.get_bind(Event).dialect.name)
        # A session that chooses its connection itself, by statement or tenant, may choose another at the flush;
        # and the dispatcher's own, which is one of these, runs its transactions on a connection in AUTOCOMMIT.
        if type(session).get_bind is Session.get_bind:
            # It is the one that the flush would take. Nothing is sent yet, not even BEGIN.
            _check_connection(session.connection(bind_arguments={"mapper": Event}))
    except InvalidRequestError as error:
        raise SessionStateError(f"The session cannot be used to publish now: {error}") from error
    session.add_all(events)
    session.flush()


def _insert(connection: Connection, events: Sequence[Event]) -> None:
    """Do what a flush does, as far as it can be done without a session."""
    try:
        _check_dialect("connection", connection.dialect.name)
        _check_connection(connection)
    except InvalidRequestError as error:
        raise SessionStateError(f"The connection cannot be used to publish now: {error}") from error
    prepared = [(event, _row(event, index)) for index, event in enumerate(events)]
    # One statement for each run of events that name the same columns: events keep their order.
    for (cls, columns), group in groupby(prepared, key=lambda each: (type(each[0]), tuple(each[1]))):
        run = list(group)
        missing = [
            (key, column) for key, column in loaded_columns(inspect(cls, raiseerr=True)) if column.key not in columns
        ]
        statement = insert(family.table).returning(
            *(column for _, column in missing), sort_by_parameter_order=len(run) > 1
        )
        rows = [row for _, row in run]
        # values(): a single row may hold SQL expressions.
        result = connection.execute(statement, rows) if len(rows) > 1 else connection.execute(statement.values(rows[0]))
        for (event, _), values in zip(run, result.all(), strict=True):
            for (key, _), value in zip(missing, values, strict=True):
                set_committed_value(event, key, value)
    for event in events:
        make_transient_to_detached(event)


def _row(event: Event, index: int) -> dict[str, Any]:
    """Return the values of the columns that are set, as a flush would take them."""
    state = inspect(event)
    for related in state.mapper.relationships:
        if state.dict.get(related.key) and not related.viewonly:
            raise PublishError(
                f"events[{index}].{related.key} is a related object, which only a session can insert along with the "
                "event. Set the column instead, or publish in a session."
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
