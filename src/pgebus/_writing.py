"""The two ways an event becomes a row: by the flush of a session, and by an INSERT on a connection.

It commits nothing, and knows nothing of duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ClauseElement, Column, Connection, TwoPhaseTransaction, insert, inspect
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, make_transient_to_detached, object_session
from sqlalchemy.orm.attributes import set_committed_value

from pgebus._guard import DispatchSession
from pgebus._outgoing import INSERTED_BY_US
from pgebus.errors import TWO_PHASE, PublishError, SessionStateError
from pgebus.inheritance import family, loaded_columns
from pgebus.models import Event
from pgebus.names import quote_identifier

# In the session's info, while one of our functions flushes it: where it leaves the connection that it inserts on.
_PUBLISHING: Final = "pgebus.publishing"
AUTOCOMMIT: Final = (
    "The connection is in AUTOCOMMIT: the event would be handled even if you roll back. Use an isolation level with "
    "transactions."
)
# What only the server can know about a transaction: it refuses every INSERT, or the savepoint before it.
REFUSED_STATES: Final = {
    "25006": "The transaction is read-only, or the server is a standby, so nothing can be published in it. Use a "
    "read-write transaction on the primary.",
    "25P01": AUTOCOMMIT,
    "25P02": "The transaction has failed, so nothing can be published in it. Roll it back first.",
}


def table_of(connection: Connection) -> tuple[str, str]:
    """Return the schema of the table of events as *connection* translates it, and both names, quoted."""
    own = family.table.schema
    schema = (connection.get_execution_options().get("schema_translate_map") or {}).get(own) or str(own)
    return schema, f"{quote_identifier(schema)}.{quote_identifier(family.table.name)}"


def flush(session: Session, events: Sequence[Event], taken: list[Connection] | None = None) -> Sequence[Event]:
    """Add *events* and flush the session; when that fails, what was added is taken back.

    Args:
        session: The session.
        events: The events, in it or not.
        taken: Gets the connection that they are inserted on, also when that fails.
    """
    new = [event for event in events if event not in session]
    session.info[_PUBLISHING] = [] if taken is None else taken
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
    return events


@listens_for(Event, "before_insert", propagate=True)
def _check_connection_of_the_flush(_mapper: Mapper[Event], connection: Connection, target: Event) -> None:
    """Look at the connection that a session has chosen itself, which could not be asked before."""
    session = object_session(target)
    if session is None or (taken := session.info.get(_PUBLISHING)) is None:
        return
    taken[:] = [connection]
    if not isinstance(session, DispatchSession):
        check_connection(connection)


def insert_rows(connection: Connection, prepared: Sequence[tuple[Event, dict[str, Any]]]) -> list[Event]:
    """Do what a flush does, as far as it can be done without a session."""
    returned: list[tuple[Event, Sequence[tuple[str, Column[Any]]], Sequence[Any]]] = []
    # One statement for each run of events that name the same columns: events keep their order. An SQL expression can
    # only be given to a statement with a single row, and its value has to be asked for.
    for (cls, given, alone), group in groupby(prepared, key=kind):
        run = list(group)
        missing = missing_columns(cls, given)
        statement = insert(family.table).returning(
            *(column for _, column in missing), sort_by_parameter_order=len(run) > 1
        )
        rows = [row for _, row in run]
        if len(rows) > 1 and alone is None:
            results = connection.execute(statement, rows, execution_options=INSERTED_BY_US).all()
        else:
            results = [
                connection.execute(statement.values(row), execution_options=INSERTED_BY_US).one() for row in rows
            ]
        returned += [(event, missing, values) for (event, _), values in zip(run, results, strict=True)]
    # Only when all of it has worked: else the events could not be published again.
    for event, columns, values in returned:
        fill(event, columns, values)
    return [event for event, _ in prepared]


def kind(prepared: tuple[Event, dict[str, Any]]) -> tuple[type[Event], tuple[str, ...], int | None]:
    """Return what events have in common that are inserted by one statement."""
    event, row = prepared
    expressions = [name for name, value in row.items() if isinstance(value, ClauseElement)]
    return type(event), tuple(name for name in row if name not in expressions), id(event) if expressions else None


def missing_columns(cls: type[Event], columns: Sequence[str]) -> list[tuple[str, Column[Any]]]:
    """Return the attributes of a class that a row does not give: the database says what they are."""
    mapper = inspect(cls, raiseerr=True)
    return [(key, column) for key, column in loaded_columns(mapper) if column.key not in columns]


def fill(event: Event, missing: Sequence[tuple[str, Column[Any]]], values: Sequence[Any]) -> None:
    """Make a new event what a flush and a detachment would have made of it."""
    for (key, _), value in zip(missing, values, strict=True):
        set_committed_value(event, key, value)
    make_transient_to_detached(event)


def _columns_of(cls: type[Event]) -> set[str]:
    return {key for key, _ in loaded_columns(inspect(cls, raiseerr=True))}


def row_of(event: Event, index: int) -> dict[str, Any]:
    """Return the values of the columns that are set, as a flush would take them."""
    refuse_related(event, index)
    state = inspect(event)
    return dict(_set_columns(state.dict, state.mapper))


def refuse_related(event: Event, index: int) -> None:
    state = inspect(event)
    for related in state.mapper.relationships:
        if state.dict.get(related.key) and not related.viewonly:
            raise PublishError(
                f"events[{index}].{related.key} is a related object, which only the flush of a session can insert "
                "along with the event. Set the column instead; or publish in a session, without a dedup_key."
            )


def _set_columns(values: dict[str, Any], mapper: Any) -> Iterator[tuple[str, Any]]:
    column: Column[Any]
    for key, column in loaded_columns(mapper):
        value = values.get(key)
        if value is not None or (key in values and column.type.should_evaluate_none):
            yield column.key, value


def check_connection(connection: Connection) -> None:
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        raise SessionStateError(TWO_PHASE)
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise SessionStateError(AUTOCOMMIT)
    if connection.get_execution_options().get("postgresql_readonly"):
        raise SessionStateError(REFUSED_STATES["25006"])


def sqlstate(error: DBAPIError) -> str | None:
    # psycopg2 has another name for it than asyncpg and psycopg.
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
