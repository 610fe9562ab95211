"""Deliveries and events, as the database has them: listed, counted, shown.

It changes nothing.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.errors import ConfigurationError
from pgebus.groups import check_group_name
from pgebus.operations._statements import fetch, moment, schema_of
from pgebus.operations.selection import (
    LARGEST_BATCH,
    STATUSES,
    Filters,
    Selection,
    check_event_id,
    check_limit,
    check_statuses,
    status_condition,
)

__all__ = ["DeliveryState", "EventState", "count_deliveries", "list_deliveries", "show_event"]


@dataclass(frozen=True)
class DeliveryState:
    """One group's progress on one event.

    Attributes:
        event_id: The event.
        group: The consumer group.
        channel: The channel of both.
        type: The type of the event.
        key: Its key.
        status: pending, blocked, running, unhandled, completed, dead or cancelled.
        priority: 0 is claimed first.
        attempt: Attempts in this round.
        round: 1, and one more for each redrive and replay.
        lost: How often its worker died.
        holds_key: Whether it holds its key although nobody is at work on it.
        created_at: When the event was created; None where the event is gone, or the year is none of Python's.
        due_at: When it is due, or was; None where the year is none of Python's.
        claimed_at: Since when it runs.
        finished_at: When it was completed, cancelled or dead.
        worker: The id of the worker that it runs on, in digits, as in the errors.
        handled: The handlers that have succeeded in this round, of those that a retry leaves out.
        errors: The last few, newest last; see "Errors in a delivery" in the reference.
    """

    event_id: int
    group: str
    channel: str
    type: str
    key: str | None
    status: str
    priority: int
    attempt: int
    round: int
    lost: int
    holds_key: bool
    created_at: datetime | None
    due_at: datetime | None
    claimed_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    handled: tuple[str, ...]
    errors: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class EventState:
    """An event with all of its deliveries.

    Attributes:
        id: Its id.
        type: Its type.
        channel: Its channel.
        key: Its key.
        dedup_key: Its dedup_key.
        priority: 0 is claimed first.
        created_at: When it was created; None where the year is none of Python's. So the next.
        run_at: Before when it is not handled.
        headers: Its headers.
        payload: Its payload. This and the headers are text, as PostgreSQL writes them, where Python cannot read it.
        deliveries: One for each group, in the order of their names.
    """

    id: int
    type: str
    channel: str
    key: str | None
    dedup_key: str | None
    priority: int
    created_at: datetime | None
    run_at: datetime | None
    headers: dict[str, Any] | str
    payload: dict[str, Any] | str
    deliveries: tuple[DeliveryState, ...]


async def list_deliveries(
    session: AsyncSession,
    *,
    status: str | Collection[str] | None = None,
    after: tuple[int, str] | None = None,
    limit: int = 100,
    **filters: Unpack[Filters],
) -> list[DeliveryState]:
    """Return deliveries, those of the newest events first.

    Args:
        session: Nothing is written.
        status: Only of this status, or of these.
        after: Only what follows this one, `(event_id, group)`: the last one of the page before.
        limit: How many, at most; 1 to 10,000.
        **filters: Which; see `Filters`.

    Raises:
        ConfigurationError: If an argument is none of its kind; nothing was sent.
    """
    selection = Selection.of(filters)
    statuses = check_statuses(status)
    parameters = {"limit": check_limit(limit), **selection.parameters()}
    conditions = [*_of_status(status, statuses), *selection.conditions("{s}", "d")]
    if after is not None:
        conditions.append("(d.event_id, d.consumer_group) < (CAST(:last_id AS bigint), CAST(:last_group AS text))")
        parameters["last_id"], parameters["last_group"] = _cursor(after)
    s = await schema_of(session)
    where = " AND ".join(conditions or ["true"])
    sql = _deliveries(f"WHERE {where} ORDER BY {selection.order(statuses)} DESC, d.consumer_group DESC LIMIT :limit")
    return [_delivery(row) for row in await fetch(session, sql.replace("{s}", s), **parameters)]


async def count_deliveries(
    session: AsyncSession, *, status: str | Collection[str] | None = None, **filters: Unpack[Filters]
) -> int:
    """Return how many deliveries there are; see `list_deliveries()`.

    Of what is completed or cancelled, all of the history may have to be read.
    """
    selection = Selection.of(filters)
    statuses = check_statuses(status)
    s = await schema_of(session)
    where = " AND ".join([*_of_status(status, statuses), *selection.conditions(s, "d")] or ["true"])
    (row,) = await fetch(session, f"SELECT count(*) FROM {s}.deliveries d WHERE {where}", **selection.parameters())
    return int(row[0])


async def show_event(session: AsyncSession, event_id: int) -> EventState | None:
    """Return an event with its payload and its deliveries; None where there is no such event.

    Args:
        session: Nothing is written.
        event_id: Its id.

    Raises:
        ConfigurationError: If the id can be none; nothing was sent.
    """
    check_event_id(event_id)
    s = await schema_of(session)
    events = await fetch(session, _EVENT.replace("{s}", s), event_id=event_id)
    if not events:
        return None
    sql = _deliveries(f"WHERE d.event_id = :event_id ORDER BY d.consumer_group LIMIT {LARGEST_BATCH}").replace("{s}", s)
    deliveries = tuple(_delivery(row) for row in await fetch(session, sql, event_id=event_id))
    *columns, headers, payload = events[0]
    values: list[Any] = [*columns, _read(headers), _read(payload), deliveries]
    return EventState(*values)


_EVENT: Final = f"""
SELECT e.id, e.type, e.channel, e.key, e.dedup_key, e.priority, {moment("e.created_at")}, {moment("e.run_at")},
  CAST(e.headers AS text), CAST(e.payload AS text)
FROM {{s}}.events e WHERE e.id = :event_id"""


def _deliveries(which: str) -> str:
    return f"""
SELECT d.event_id, d.consumer_group, d.channel, d.type, d.key, d.status, d.priority, d.attempt, d.round, d.lost,
  d.holds_key, (SELECT {moment("e.created_at")} FROM {{s}}.events e WHERE e.id = d.event_id), {moment("d.due_at")},
  {moment("d.claimed_at")}, {moment("d.finished_at")}, CAST(d.worker_id AS text), d.handled, CAST(d.errors AS text)
FROM {{s}}.deliveries d {which}"""


def _delivery(row: Any) -> DeliveryState:
    *columns, handled, errors = row
    read = _read(errors) if errors is not None else []
    kept = tuple(each for each in read if isinstance(each, dict)) if isinstance(read, list) else ()
    values: list[Any] = [*columns, tuple(handled or ()), kept]
    return DeliveryState(*values)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a number of 5,000 digits, or a depth that only others write
        return text


def _of_status(status: object, statuses: Collection[str]) -> list[str]:
    return [] if status is None or len(statuses) == len(STATUSES) else [status_condition(statuses)]


def _cursor(after: object) -> tuple[int, str]:
    if isinstance(after, tuple) and len(after) == 2:
        return check_event_id(after[0], "after[0]"), check_group_name(after[1])
    raise ConfigurationError("after must be a pair: the event id and the group of the last delivery before.")
