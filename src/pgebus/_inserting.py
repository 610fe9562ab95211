"""How events get into the transaction of a session or of a connection.

It checks no event and commits nothing: what comes here is valid, and ends with the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session

from pgebus._deduplicating import flush_once, insert_once, set_apart
from pgebus._guard import DispatchSession
from pgebus._writing import REFUSED_STATES, check_connection, flush, insert_rows, row_of, sqlstate
from pgebus.errors import TWO_PHASE, SessionStateError
from pgebus.models import Event


def insert_events(into: Session | Connection, events: Sequence[Event]) -> list[Event]:
    """Insert *events* in the transaction of *into*, beginning one where there is none.

    Returns:
        The events, each in its place; where its `dedup_key` was there, the one that is there.

    Raises:
        SessionStateError: If nothing can be published in it.
        PublishError: If an event has a related object, which only a flush could insert, and is not flushed, or an
            object refers to one with a `dedup_key`. Or if one with its `dedup_key` is there, and is never seen here.
        RetryTransactionError: If an event with its `dedup_key` is there, and this transaction can't see it.
        sqlalchemy.exc.SQLAlchemyError: If the INSERT fails.
    """
    try:
        _check(into)
        published: list[Event] = []
        # Events keep their order: a run of those without a dedup_key, then each that has one by itself.
        if isinstance(into, Connection):
            rows = [(event, row_of(event, index)) for index, event in enumerate(events)]
            for once, grouped in groupby(rows, key=lambda each: each[0].dedup_key is not None):
                prepared = list(grouped)
                published += [insert_once(into, *each) for each in prepared] if once else insert_rows(into, prepared)
        else:
            set_apart(into, events)
            for once, group in groupby(events, key=lambda event: event.dedup_key is not None):
                run = list(group)
                published += [flush_once(into, event) for event in run] if once else flush(into, run)
    except DBAPIError as error:
        refusal = REFUSED_STATES.get(sqlstate(error) or "")
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
            check_connection(into)
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
            check_connection(into.connection(bind_arguments={"mapper": Event}))
        if into._flushing:
            raise SessionStateError(
                "The session is being flushed, and cannot be flushed again inside. In a before_flush hook use "
                "session.add(); in hooks like after_insert publish on the connection that they are given."
            )
    except InvalidRequestError as error:
        raise SessionStateError(f"The session cannot be used to publish now: {error}") from error


def _check_dialect(what: str, dialect: str) -> None:
    if dialect != "postgresql":
        raise SessionStateError(f"The {what} is bound to {dialect!r}; events are published on PostgreSQL.")
