"""Publishing what may have been published: an event whose `dedup_key` is there is returned instead.

It begins and ends no transaction; in a session it makes a savepoint, and ends that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, and_, inspect, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, defer, object_session

from pgebus._guard import DispatchSession
from pgebus._outgoing import INSERTED_BY_US
from pgebus._writing import fill, flush, kind, missing_columns, refuse_related, sqlstate, table_of
from pgebus.errors import PublishError, RetryTransactionError
from pgebus.inheritance import family
from pgebus.models import Event

_SERIALIZATION_FAILURE: Final = "40001"
_UNIQUE_VIOLATION: Final = "23505"
_UNIQUE: Final = "uq_events_dedup_key"
_TRIES: Final = 5

# The ids of the events with a dedup_key that were inserted in the transactions that are open, each by its root.
_inserted: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def set_apart(session: Session, events: Sequence[Event]) -> None:
    """Take the events with a dedup_key out of the session, so that each is flushed by itself, if at all.

    Raises:
        PublishError: If something refers to one, which would be lost if it turned out to be a duplicate.
    """
    once = {id(event): index for index, event in enumerate(events) if event.dedup_key is not None}
    if not once:
        return
    for index in once.values():
        refuse_related(events[index], index)
    for owner in (*session.new, *session.dirty, *events):
        for name, referred in _events_of(owner):
            if (index := once.get(id(referred), -1)) >= 0:
                raise PublishError(
                    f"{type(owner).__name__}.{name} refers to events[{index}], which has a dedup_key: it may turn out "
                    "to be there already. Publish it first, and set the attribute to the event that is returned."
                )
    for index in once.values():
        if events[index] in session:
            session.expunge(events[index])


def _events_of(owner: object) -> Iterator[tuple[str, object]]:
    """Yield the events that an object has been made to refer to, without loading anything."""
    state: Any = inspect(owner)
    for related in state.mapper.relationships:
        if issubclass(related.mapper.class_, Event) and not related.viewonly:
            for event in state.attrs[related.key].history.added or ():
                yield related.key, event


def flush_once(session: Session, event: Event) -> Event:
    """Flush an event, unless its `dedup_key` is there; return it, or the one that is there.

    It is looked for first, so that no hook is called for a duplicate and nothing fails. What another transaction has
    inserted meanwhile is met by the INSERT, which waits for its end, inside a savepoint.
    """
    session.flush()  # what else is pending comes before it, and is not undone with it
    with _serialization_failure_explained(event):
        found = _load(session, _same_key(event))
        for tries in reversed(range(_TRIES)):
            if found is not None:
                return _returned(session, found)
            taken: list[Connection] = []
            try:
                with _savepoint(session):
                    flush(session, [event], taken)
            except DBAPIError as error:
                if sqlstate(error) != _UNIQUE_VIOLATION or _constraint(error) != _UNIQUE:
                    raise
                if not tries:
                    raise _unseen(taken[0], event) from error
                found = _find(session, taken[0], event, error)
            else:
                return event
    raise AssertionError("the last try returns or raises")


def insert_once(connection: Connection, event: Event, row: dict[str, Any]) -> Event:
    """Insert an event unless its `dedup_key` is there; return it, or the one that is there."""
    _, given, _ = kind((event, row))
    missing = missing_columns(type(event), given)
    statement = (
        postgresql.insert(family.table)
        .values(row)
        .on_conflict_do_nothing(
            index_elements=[family.table.c.channel, family.table.c.dedup_key],
            index_where=family.table.c.dedup_key.is_not(None),
        )
        .returning(*(column for _, column in missing))
    )
    with _serialization_failure_explained(event):
        # Between the two statements the other one may be pruned, and a third one be published.
        for _ in range(_TRIES):
            values = connection.execute(statement, execution_options=INSERTED_BY_US).one_or_none()
            if values is not None:
                fill(event, missing, values)
                _inserted_in(connection).add(event.id)
                return event
            if (found := _find(connection, connection, event, None)) is not None:
                return _returned(connection, found)
        raise _unseen(connection, event)


@contextmanager
def _savepoint(session: Session) -> Iterator[None]:
    """Undo what fails inside, alone; to the hooks of the session it is no commit."""
    guard = session.guard if isinstance(session, DispatchSession) else None
    if guard is not None:
        guard.publishing = True
    try:
        savepoint = Session.begin(session, nested=True)  # not through its own method, which is closed to handlers
        try:
            yield
            _release(savepoint)
        except BaseException:
            savepoint.rollback()
            raise
    finally:
        if guard is not None:
            guard.publishing = False


def _release(savepoint: SessionTransaction) -> None:
    """Do what `commit()` does, without what it does first: before_commit and after_commit are for the caller's own.

    An application that uses no savepoints would take them for its commit.
    """
    for _, transaction, _, _ in set(savepoint._connections.values()):
        transaction.commit()
    savepoint._remove_snapshot()
    savepoint.close()


def _find(into: Session | Connection, connection: Connection, event: Event, cause: Exception | None) -> Event | None:
    """Return the event that *event* has met at its INSERT on *connection*; None if another try may find it.

    Raises:
        PublishError: If the session does not show it.
        RetryTransactionError: If this transaction never will.
    """
    if (found := _load(into, _same_key(event))) is not None:
        return found
    there = connection.execute(select(family.table.c.id).where(_same_key(event, family.table.c))).scalar_one_or_none()
    if there is None:
        # For a connection PostgreSQL itself raises this: DO NOTHING does not pass over what the snapshot does not show.
        if cause is not None and _knows(connection, "current_setting('transaction_isolation') <> 'read committed'"):
            hint = " It may also be that row-level security hides it." if _row_security(connection) else ""
            raise _committed_since(event, hint) from cause
        return None
    found = _load(into, Event.id == there)
    if found is None and _load_id(connection, there):
        raise PublishError(
            f"An event with dedup_key {event.dedup_key!r} is on the channel already, and the session does not show it: "
            "with_loader_criteria() hides it, or a replica is read that has not got it yet. What must not see each "
            "other needs different keys, for example with the tenant in them."
        ) from cause
    return found


def _unseen(connection: Connection, event: Event) -> Exception:
    """Say why the event was never there when it was looked for, and never gone when its key was inserted."""
    if _row_security(connection):
        return PublishError(
            f"An event with dedup_key {event.dedup_key!r} is on the channel already, and row-level security hides it "
            "from this role. What must not see each other needs different keys, for example with the tenant in them."
        )
    return RetryTransactionError(
        f"An event with dedup_key {event.dedup_key!r} comes and goes. Roll back, and do the whole transaction again.",
        dedup_key=event.dedup_key or "",
    )


def _row_security(connection: Connection) -> bool:
    _, table = table_of(connection)
    return _knows(connection, "row_security_active(CAST(:table AS regclass))", table=table)


def _knows(connection: Connection, condition: str, **parameters: str) -> bool:
    return bool(connection.execute(text(f"SELECT {condition}"), parameters).scalar_one())


def _same_key(event: Event, columns: Any = Event) -> ColumnElement[bool]:
    return and_(columns.channel == (event.channel or "events"), columns.dedup_key == event.dedup_key)


def _load_id(connection: Connection, id_: int) -> bool:
    return connection.execute(select(family.table.c.id).where(family.table.c.id == id_)).first() is not None


def _load(into: Session | Connection, condition: ColumnElement[bool]) -> Event | None:
    if isinstance(into, Session):
        return _load_in(into, condition)
    # It ends without a trace: neither closing it nor dropping it touches the caller's transaction.
    session = Session(into, join_transaction_mode="rollback_only", expire_on_commit=False)
    loaded = _load_in(session, condition)
    session.expunge_all()
    return loaded


def _load_in(session: Session, condition: ColumnElement[bool]) -> Event | None:
    if session.scalars(select(Event.id).where(condition)).first() is None:
        return None
    statement, fresh = select(Event).where(condition), True
    if not _may_read_payload(session):
        # A publisher need not be able to read what others have published: the payload can't be loaded later either.
        statement, fresh = statement.options(defer(Event.payload, raiseload=True)), False
    # unique(): a subclass may have a collection that comes by a JOIN.
    return session.scalars(statement, execution_options={"populate_existing": fresh}).unique().one_or_none()


def _may_read_payload(session: Session) -> bool:
    if isinstance(session, DispatchSession):
        connection = session.guard.connection
    else:
        connection = session.connection(bind_arguments={"mapper": Event})
    _, table = table_of(connection)
    return _knows(connection, "has_column_privilege(CAST(:table AS regclass), 'payload', 'SELECT')", table=table)


def _returned(into: Session | Connection, found: Event) -> Event:
    found.duplicate = found.id not in _inserted_in(into)
    return found


@listens_for(Event, "after_insert", propagate=True)
def _remember(_mapper: Mapper[Event], _connection: Connection, target: Event) -> None:
    """Note what a session has inserted itself, however it was added: it is no duplicate in this transaction."""
    if target.__dict__.get("dedup_key") is not None and (session := object_session(target)) is not None:
        _inserted_in(session).add(target.__dict__["id"])


def _inserted_in(into: Session | Connection) -> set[int]:
    # Not through the method: in a handler's session it is closed to handlers.
    root = Session.get_transaction(into) if isinstance(into, Session) else into.get_transaction()
    return set() if root is None else _inserted.setdefault(root, set())


@contextmanager
def _serialization_failure_explained(event: Event) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) != _SERIALIZATION_FAILURE:
            raise
        raise _committed_since(event) from error


def _committed_since(event: Event, hint: str = "") -> RetryTransactionError:
    return RetryTransactionError(
        f"An event with dedup_key {event.dedup_key!r} was committed by another transaction, and this one began "
        f"before, so it cannot see it. Roll back, and do the whole transaction again.{hint}",
        dedup_key=event.dedup_key or "",
    )


def _constraint(error: DBAPIError) -> str | None:
    # asyncpg's own error is the cause of the one that SQLAlchemy's adapter raises.
    said = getattr(error.orig, "diag", None) or getattr(error.orig, "__cause__", None)
    return getattr(said, "constraint_name", None)
