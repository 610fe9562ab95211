"""What an event says, erased, while its skeleton stays: `purge_payload()`.

It deletes no row, and commits nothing.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.operations._statements import NOT_PURGED, PURGED_AT, fetch, promote, require_fresh_snapshots, schema_of
from pgebus.operations.selection import EventFilters, Selection, check_limit

__all__ = ["Purged", "purge_payload"]

_IS_FINISHED: Final = """(SELECT o.event_id FROM {s}.deliveries o WHERE o.event_id = e.id AND o.finished_at IS NULL
  ORDER BY o.event_id LIMIT 1) IS NULL"""


@dataclass(frozen=True)
class Purged:
    """What became of the events.

    Attributes:
        event_ids: Those that were emptied now.
        unfinished: Those that were not, because a delivery of them is still to be handled or being handled: up to
            *limit* of them. cancel() these, and purge again.
    """

    event_ids: tuple[int, ...]
    unfinished: tuple[int, ...]


async def purge_payload(
    session: AsyncSession, *, channel: str | None = None, limit: int = 1_000, **filters: Unpack[EventFilters]
) -> Purged:
    """Empty events that are finished: their payload, their headers, and what their errors quote.

    The payload becomes `{}`; of the headers `correlation_id`, `causation_id` and `traceparent` are left, and
    `pgebus_purged_at` is added; of the errors the messages and the tracebacks are taken out of every delivery. What is
    left is the skeleton: id, type, channel, `key`, `dedup_key`, the times, the statuses. Columns of your own are yours
    to empty, in the same transaction. Old versions of the rows stay on disk until the next VACUUM, and in backups.

    An event with a delivery that is pending, blocked, running or unhandled is left alone: its handlers would get an
    empty payload, and might write what they know into the errors afterwards. It is named in the result. What is emptied
    is never handled again: its dead letters are cancelled, and let go of their keys; replay() and new groups leave it
    out.

    Done again it finds nothing. An event is passed over while somebody has locked it, or a delivery of it.

    Args:
        session: Its transaction is yours to commit; at READ COMMITTED.
        channel: Only of this channel.
        limit: How many events, at most; 1 to 10,000. Call again, after the commit, for more.
        **filters: Which events; see `EventFilters`. At least one.

    Raises:
        ConfigurationError: If an argument is none of its kind, or all events would be emptied.
        SessionStateError: If the session is in AUTOCOMMIT, or at another isolation level: it would not see that an
            event has just been replayed for a group, and leave that group nothing.
    """
    selection = Selection.of(filters, channel=channel)
    selection.refuse_everything("purge_payload()")
    await require_fresh_snapshots(session, "purge_payload()")
    parameters = {"limit": check_limit(limit), **selection.parameters()}
    s = await schema_of(session)
    # Locked first, and looked at in statements of their own then: nobody replays an event that is locked.
    locked = await fetch(
        session,
        f"SELECT e.id FROM {purgeable(s, selection)} ORDER BY e.id LIMIT :limit FOR UPDATE OF e SKIP LOCKED",
        **parameters,
    )
    ids = [row[0] for row in await fetch(session, _WHOLE.replace("{s}", s), ids=[row[0] for row in locked])]
    if ids:
        await fetch(session, _EMPTY_EVENTS.replace("{s}", s), ids=ids)
        emptied = await fetch(session, _EMPTY_DELIVERIES.replace("{s}", s), ids=ids)
        await promote(session, s, ((channel, group, key) for channel, group, key in emptied if key is not None))
    unfinished = await fetch(
        session,
        f"SELECT e.id FROM {unpurgeable(s, selection)} ORDER BY e.id LIMIT :limit",
        **parameters,
    )
    return Purged(tuple(ids), tuple(row[0] for row in unfinished))


async def count_purgeable(
    session: AsyncSession, *, channel: str | None = None, **filters: Unpack[EventFilters]
) -> tuple[int, int]:
    """Return how many events purge_payload() would empty, without a limit, and how many it would leave.

    Raises:
        ConfigurationError: As there.
    """
    selection = Selection.of(filters, channel=channel)
    selection.refuse_everything("purge_payload()")
    s = await schema_of(session)
    counts = [
        await fetch(session, f"SELECT count(*) FROM {which(s, selection)}", **selection.parameters())
        for which in (purgeable, unpurgeable)
    ]
    return int(counts[0][0][0]), int(counts[1][0][0])


def purgeable(s: str, selection: Selection) -> str:
    """Return the events that `purge_payload()` empties, as `e`: what follows FROM."""
    conditions = [*selection.conditions(s, "e"), NOT_PURGED, _IS_FINISHED.replace("{s}", s)]
    return f"{s}.events e WHERE {' AND '.join(conditions)}"


def unpurgeable(s: str, selection: Selection) -> str:
    """Return those that it leaves alone."""
    conditions = [*selection.conditions(s, "e"), NOT_PURGED, f"NOT ({_IS_FINISHED.replace('{s}', s)})"]
    return f"{s}.events e WHERE {' AND '.join(conditions)}"


# Those of which every delivery is finished, and locked by us now.
_WHOLE: Final = """
WITH u AS MATERIALIZED (
  SELECT id FROM unnest(CAST(:ids AS bigint[])) u(id)
), ours AS MATERIALIZED (
  SELECT u.id, d.place FROM u LEFT JOIN LATERAL (
    SELECT d.ctid AS place FROM {s}.deliveries d WHERE d.event_id = u.id AND d.finished_at IS NOT NULL
    ORDER BY d.consumer_group FOR UPDATE SKIP LOCKED) d ON true
)
SELECT o.id FROM (SELECT id, count(place) AS n FROM ours GROUP BY id) o
WHERE o.n = (SELECT count(*) FROM {s}.deliveries d WHERE d.event_id = o.id) ORDER BY o.id"""

_EMPTY_EVENTS: Final = f"""
UPDATE {{s}}.events e SET payload = '{{}}', headers = (
  SELECT coalesce(jsonb_object_agg(h.key, h.value), '{{}}') FROM jsonb_each(e.headers) h
  WHERE h.key IN ('correlation_id', 'causation_id', 'traceparent')
) || jsonb_build_object('{PURGED_AT}', now())
WHERE e.id = ANY (CAST(:ids AS bigint[])) RETURNING e.id"""

_EMPTY_DELIVERIES: Final = """
UPDATE {s}.deliveries d SET holds_key = false, status = CASE WHEN d.status = 'dead' THEN 'cancelled' ELSE d.status END,
  errors = CASE WHEN jsonb_typeof(d.errors) = 'array' THEN (
    SELECT jsonb_agg(x.entry || '{"message": "(purged)", "traceback": null}' ORDER BY x.place)
    FROM jsonb_array_elements(d.errors) WITH ORDINALITY x(entry, place)) END
WHERE d.event_id = ANY (CAST(:ids AS bigint[])) AND d.status IN ('completed', 'dead', 'cancelled')
RETURNING d.channel, d.consumer_group, d.key"""
