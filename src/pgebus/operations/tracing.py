"""What an event was caused by, what it has caused, and what became of each: read from the headers.

Nothing has to be recorded for it beyond what publishing in a handler writes anyway. No index of the headers is needed,
so that publishers need not pay for one: children are younger than their parents, and are looked for among the ids that
come after, so many and no more.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus._causes import caused_by
from pgebus.errors import ConfigurationError
from pgebus.operations._statements import fetch, moment, schema_of

__all__ = ["SEARCHED_IDS", "Trace", "TracedDelivery", "TracedEvent", "trace"]

SEARCHED_IDS: Final = 100_000
"""How many ids after an event are searched for what it has caused, unless said otherwise."""

_LARGEST: Final = 2**63 - 1
_MOST_EVENTS: Final = 10_000


@dataclass(frozen=True)
class TracedDelivery:
    """What became of an event in one consumer group.

    When a delivery is finished, the moment of its claim is no longer stored: how long it waited and how long its
    handlers took are known apart only while it runs, and together ever after.

    Attributes:
        group: The consumer group.
        status: Its status.
        attempt: The last attempt, counted from 1; 0 before the first.
        round: 1, and one more for each redrive or replay.
        due_at: When it is due, or was for its last attempt; None where the year is none of Python's. What follows
            from such a moment is None too.
        waited: While it runs: from when it was due to its claim.
        ran: While it runs: since its claim.
        took: When it is finished: from when it was first due (in a later round: from when it was due last) to its end,
            with everything between, retries and their delays too.
        error: Type and message of the last error, in one line.
    """

    group: str
    status: str
    attempt: int
    round: int
    due_at: datetime | None
    waited: timedelta | None
    ran: timedelta | None
    took: timedelta | None
    error: str | None


@dataclass(frozen=True)
class TracedEvent:
    """An event and its place in the tree.

    Attributes:
        id: Its id.
        type: Its type.
        channel: Its channel.
        created_at: When it was published; None where the year is none of Python's.
        cause: The id of the event that caused it; None for the root. Where that one is gone, pruned or deleted, it is
            none of the tree's, and this event is below the root.
        depth: How many causes are above it in this tree.
        deliveries: One for each consumer group, by name.
    """

    id: int
    type: str
    channel: str
    created_at: datetime | None
    cause: int | None
    depth: int
    deliveries: tuple[TracedDelivery, ...]


@dataclass(frozen=True)
class Trace:
    """A tree of events.

    Attributes:
        event_id: The event that was asked for.
        at: When it was looked at, by the clock of the database.
        correlation_id: What the events of the tree have in common.
        caused_by: What has caused the root, where that is not in the tree: it is gone, or of another correlation.
        events: The tree: each event, then what it has caused, in the order of the ids.
        more: Whether there are more events of this correlation than were asked for.
        searched_to: The last id that was looked at, where the search ended before the newest event; else None.
    """

    event_id: int
    at: datetime
    correlation_id: str
    caused_by: str | None
    events: tuple[TracedEvent, ...]
    more: bool
    searched_to: int | None


@dataclass(frozen=True)
class _Found:
    """An event with what it says of its cause."""

    id: int
    type: str
    channel: str
    run_at: datetime | None
    created_at: datetime | None
    correlation_id: str
    causation_id: str | None

    @property
    def cause(self) -> int | None:
        """The id of its cause; None where the header holds none, which anybody may have written."""
        said = self.causation_id or ""
        return int(said) if said.isascii() and said.isdigit() and len(said) < 19 else None


async def trace(session: AsyncSession, event_id: int, *, limit: int = 200, within: int = SEARCHED_IDS) -> Trace | None:
    """Return the tree of events that *event_id* is part of; None where there is no such event. Reads only.

    Up, by the causation ids, to the first event of the same correlation id; then down. An event that was published with
    a correlation id of its own begins a tree of its own.

    Args:
        session: Nothing is written.
        event_id: An event of the tree.
        limit: How many events are read, 1 to 10,000: of those above the event, of those after the root, and of those
            after the event itself, each.
        within: How many ids after the root, and after the event, are searched. Where the table of events has an index
            on `((headers ->> 'correlation_id'), id)`, that is used, and nothing limits the search.

    Raises:
        ConfigurationError: If a number is none that can be; nothing was sent.
    """
    _check("event_id", event_id, _LARGEST)
    _check("limit", limit, _MOST_EVENTS)
    _check("within", within, _LARGEST)
    search = await _Search.of(session, limit, within)
    line = await search.up(event_id)
    if not line:
        return None
    root = line[-1]
    found = {event.id: event for event in line}
    more = False
    for first, last in ((root.id, line[0].id), (line[0].id, None)):
        younger, left = await search.down(root.correlation_id, first, last)
        found.update((event.id, event) for event in younger)
        more = more or left
    # Of an earlier id than the root's, it would be the root of another tree.
    absent = {each.cause for each in found.values() if each.cause is not None and root.id < each.cause < each.id}
    gone = await search.gone(absent - found.keys())
    ordered = list(_preorder(root.id, found, gone))
    deliveries = await search.deliveries([event.id for event, _ in ordered])
    return Trace(
        event_id=event_id,
        at=search.at,
        correlation_id=root.correlation_id,
        caused_by=root.causation_id,
        events=tuple(_traced(event, depth, deliveries.get(event.id, ())) for event, depth in ordered),
        more=more or len(line) == limit,
        searched_to=search.searched_to,
    )


def _check(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from 1 to {most:,}, not {value!r}.")


def _preorder(root: int, found: Mapping[int, _Found], gone: Collection[int]) -> Iterable[tuple[_Found, int]]:
    """Return each event with its depth, then its children; what was caused by one that is gone is below the root.

    It ends: each event has one cause, so that a circle, which only a person writes, is reached through nothing but its
    own events; and what has caused the root is not looked at.
    """
    children: dict[int, list[int]] = {}
    for event in found.values():
        if event.cause is not None and event.id != root:
            children.setdefault(root if event.cause in gone else event.cause, []).append(event.id)
    waiting = [(root, 0)]
    while waiting:
        event_id, depth = waiting.pop()
        yield found[event_id], depth
        waiting += [(child, depth + 1) for child in sorted(children.get(event_id, ()), reverse=True)]


def _traced(event: _Found, depth: int, deliveries: Sequence[Any]) -> TracedEvent:
    return TracedEvent(
        event.id,
        event.type,
        event.channel,
        event.created_at,
        event.cause if depth else None,
        depth,
        tuple(_delivery(row, event.run_at) for row in deliveries),
    )


def _delivery(row: Any, run_at: datetime | None) -> TracedDelivery:
    waited = ran = took = None
    if row.claimed_at is not None:
        waited, ran = _between(row.due_at, row.claimed_at), row.now - row.claimed_at
    if row.finished_at is not None:
        took = _between(run_at if row.round == 1 else row.due_at, row.finished_at)
    error = ": ".join(" ".join(part.split()) for part in (row.error_type, row.error_message) if part) or None
    return TracedDelivery(row.consumer_group, row.status, row.attempt, row.round, row.due_at, waited, ran, took, error)


def _between(first: datetime | None, last: datetime) -> timedelta | None:
    return None if first is None else last - first


_EVENT: Final = f"""
SELECT id, type, channel, {moment("run_at")} AS run_at, {moment("created_at")} AS created_at,
  headers ->> 'correlation_id' AS correlation_id, headers ->> 'causation_id' AS causation_id
FROM {{s}}.events """

# Between two ids, so that without an index of the correlation ids it is a bounded part of the primary key's. In the
# order of either index.
_DOWN: Final = f"""{_EVENT}
WHERE headers ->> 'correlation_id' = :correlation_id AND id > :first AND id <= :last
ORDER BY headers ->> 'correlation_id', id LIMIT :limit"""

_DELIVERIES: Final = f"""
SELECT event_id, consumer_group, status, attempt, round, {moment("due_at")} AS due_at,
  {moment("claimed_at")} AS claimed_at, {moment("finished_at")} AS finished_at, statement_timestamp() AS now,
  errors -> -1 ->> 'type' AS error_type, errors -> -1 ->> 'message' AS error_message
FROM {{s}}.deliveries WHERE event_id = ANY (:ids) ORDER BY event_id, consumer_group"""

_HAS_INDEX: Final = """
SELECT EXISTS (
  SELECT FROM pg_catalog.pg_index i
  WHERE i.indrelid = CAST(CAST(:events AS text) AS regclass) AND i.indisvalid
    AND pg_catalog.pg_get_indexdef(i.indexrelid, 1, true) = '(headers ->> ''correlation_id''\\:\\:text)'
    AND pg_catalog.pg_get_indexdef(i.indexrelid, 2, true) = 'id'
    AND (i.indpred IS NULL OR pg_catalog.pg_get_expr(i.indpred, i.indrelid, true)
      = '(headers ->> ''correlation_id''\\:\\:text) IS NOT NULL')) AS indexed, statement_timestamp() AS at"""


class _Search:
    """The statements of one trace.

    Attributes:
        at: When it began.
        searched_to: The last id that was looked at, where there are later ones.
    """

    def __init__(self, session: AsyncSession, schema: str, limit: int, within: int, at: datetime) -> None:
        self.at = at
        self._session = session
        self._schema = schema
        self._limit = limit
        self._within = within
        self.searched_to: int | None = None

    @classmethod
    async def of(cls, session: AsyncSession, limit: int, within: int) -> _Search:
        """Return a search on the connection of *session*."""
        schema = await schema_of(session)
        (found,) = await fetch(session, _HAS_INDEX, events=f"{schema}.events".replace("\\:", ":"))
        return cls(session, schema, limit, _LARGEST if found.indexed else within, found.at)

    async def up(self, event_id: int) -> list[_Found]:
        """Return the event, what caused it, what caused that, and so on, as long as they are of one correlation."""
        line: list[_Found] = []
        wanted: int | None = event_id
        while wanted is not None and len(line) < self._limit and wanted not in {event.id for event in line}:
            rows = await self._fetch(f"{_EVENT} WHERE id = :id", id=wanted)
            if not rows or (line and _found(rows[0]).correlation_id != line[0].correlation_id):
                break
            line.append(_found(rows[0]))
            wanted = line[-1].cause
        return line

    async def down(self, correlation_id: str, first: int, last: int | None) -> tuple[list[_Found], bool]:
        """Return the events of this correlation after *first*, up to *last*, and whether there are more than that."""
        end = min(first + self._within, _LARGEST if last is None else last, _LARGEST)
        rows = await self._fetch(_DOWN, correlation_id=correlation_id, first=first, last=end, limit=self._limit + 1)
        more = len(rows) > self._limit
        if last is None and not more and end < _LARGEST:
            newest = (await self._fetch("SELECT max(id) AS newest FROM {s}.events"))[0].newest
            self.searched_to = end if newest is not None and newest > end else None
        return [_found(row) for row in rows[: self._limit]], more

    async def gone(self, ids: Collection[int]) -> set[int]:
        """Return which of these events are not there."""
        rows = await self._fetch("SELECT id FROM {s}.events WHERE id = ANY (:ids)", ids=list(ids)) if ids else ()
        return {*ids} - {row.id for row in rows}

    async def deliveries(self, ids: Sequence[int]) -> dict[int, list[Any]]:
        """Return the rows of their deliveries, by event."""
        found: dict[int, list[Any]] = {}
        for row in await self._fetch(_DELIVERIES, ids=list(ids)):
            found.setdefault(row.event_id, []).append(row)
        return found

    async def _fetch(self, sql: str, **parameters: Any) -> Sequence[Any]:
        return await fetch(self._session, sql.replace("{s}", self._schema), **parameters)


def _found(row: Any) -> _Found:
    # What its children have inherited.
    handed_on = caused_by(row.id, {"correlation_id": row.correlation_id})["correlation_id"]
    return _Found(row.id, row.type, row.channel, row.run_at, row.created_at, handed_on, row.causation_id)
