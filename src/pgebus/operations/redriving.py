"""Dead letters put back, and events handled again: `redrive()` and `replay()`.

Both begin a new round of the same row, and commit nothing. They run no handler.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.groups import DEFAULT_GROUP, check_group_name
from pgebus.names import check_channel
from pgebus.operations._statements import NOT_PURGED, UNUSED_CLAIM_SEQ, entry, fetch, promote, schema_of, told
from pgebus.operations.groups import require_group
from pgebus.operations.selection import (
    Changed,
    EventFilters,
    Filters,
    Selection,
    check_event_id,
    check_limit,
)

__all__ = ["redrive", "replay"]

_FINISHED: Final = ("completed", "dead", "cancelled")


async def redrive(
    session: AsyncSession,
    *,
    limit: int = 1_000,
    reason: str | None = None,
    by: str | None = None,
    **filters: Unpack[Filters],
) -> list[Changed]:
    """Put dead letters back: pending at once, in a new round, with all of their attempts.

    Handlers that had succeeded are not called again: `handled` is kept, and so are the errors, with an entry
    `Redriven` after them. Of a key, the first one starts, and the others wait behind it, in the order of their ids; an
    earlier event of the key that is waiting or running, or holds it, is still before them. Sleeping workers are woken
    at the commit.

    Done again it finds nothing, unless they have died again. In the order of the event ids, so that batches keep the
    order of a key. A row that somebody has locked is passed over.

    Args:
        session: Its transaction is yours to commit.
        limit: How many, at most; 1 to 10,000. Call again, after the commit, for more.
        reason: Why; kept in the entry.
        by: Who; the role of the database unless given.
        **filters: Which; see `Filters`. Without any, all dead letters.

    Returns:
        The deliveries, in the order of their event ids.

    Raises:
        ConfigurationError: If an argument is none of its kind; nothing was sent.
    """
    selection = Selection.of(filters)
    parameters = {"limit": check_limit(limit), **told(by, reason), **selection.parameters()}
    s = await schema_of(session)
    rows = await fetch(session, _redrive(s, selection), **parameters)
    return await _begun(session, s, rows)


def _redrive(s: str, selection: Selection) -> str:
    return f"""
WITH chosen AS MATERIALIZED (
  SELECT d.ctid AS place FROM {s}.deliveries d
  WHERE {" AND ".join(["d.status = 'dead'", *selection.conditions(s, "d")])}
  ORDER BY {selection.order(("dead",))}, d.consumer_group LIMIT :limit FOR UPDATE OF d SKIP LOCKED
), done AS (
  UPDATE {s}.deliveries d
  SET status = CASE WHEN d.key IS NULL THEN 'pending' ELSE 'blocked' END, due_at = now(), finished_at = NULL,
      holds_key = false, attempt = 0, round = least(d.round + 1, 32767), errors = {entry("Redriven")}
  FROM chosen WHERE d.ctid = chosen.place AND d.status = 'dead'
  RETURNING d.event_id, d.consumer_group, d.channel, d.key
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT done.event_id, done.consumer_group, 'dead', done.channel, done.key
FROM done, (SELECT count(*) FROM told) told_count"""


async def replay(
    session: AsyncSession,
    group: str,
    channel: str = "events",
    *,
    after: int = 0,
    missing: bool = True,
    finished_after: datetime | None = None,
    finished_before: datetime | None = None,
    limit: int = 1_000,
    reason: str | None = None,
    by: str | None = None,
    **filters: Unpack[EventFilters],
) -> list[Changed]:
    """Have *group* handle events again that it has finished: completed, dead and cancelled ones alike.

    All of their handlers are called: `handled` is emptied, the attempts begin anew, in a new round; the errors stay,
    with an entry `Replayed` after them. What is not finished is left as it is: it is still to be handled. Effects that
    are not undone by then happen twice, also those in the database.

    Events that the group has no delivery of, and that one of its patterns wants, get one, as they would have if the
    group had been there when they were published; they are not `unhandled` any more then. Of a group that keeps no
    history, those are also the ones that it has completed.

    Of a key, the first one starts and the others wait behind it, in the order of their ids. Sleeping workers are woken
    at the commit. An event that is not due yet waits until it is. What purge_payload() has emptied is left out, and so
    is what somebody has locked, such as what is pruned just now.

    Done again, it finds what has been finished meanwhile. For batches that replay each event once, give the moment of
    the first one as `finished_before`, and the last event id of each as *after* to the next.

    Args:
        session: Its transaction is yours to commit.
        group: The consumer group.
        channel: Its channel.
        after: Only events with a higher id. Events are looked through in the order of their ids.
        missing: Whether events get a delivery that have none.
        finished_after: Of those that have one, only what was finished then, or since.
        finished_before: Of those, only what was finished earlier.
        limit: How many, at most; 1 to 10,000.
        reason: Why; kept in the entry.
        by: Who; the role of the database unless given.
        **filters: Which events; see `EventFilters`.

    Returns:
        The deliveries, in the order of their event ids; `was` is None where there was none.

    Raises:
        ConfigurationError: If there is no such group, or an argument is none of its kind.
    """
    selection, parameters = _asked(group, channel, after, finished_after, finished_before, filters)
    parameters |= {"limit": check_limit(limit), **told(by, reason)}
    await require_group(session, group, channel)
    s = await schema_of(session)
    sql = _replay(s, selection, missing=bool(missing), of_default=group == DEFAULT_GROUP)
    return await _begun(session, s, await fetch(session, sql, **parameters))


async def count_replayable(
    session: AsyncSession,
    group: str,
    channel: str = "events",
    *,
    missing: bool = True,
    finished_after: datetime | None = None,
    finished_before: datetime | None = None,
    **filters: Unpack[EventFilters],
) -> int:
    """Return how many events replay() would replay, without a limit.

    Raises:
        ConfigurationError: As there.
    """
    selection, parameters = _asked(group, channel, 0, finished_after, finished_before, filters)
    await require_group(session, group, channel)
    s = await schema_of(session)
    (row,) = await fetch(session, f"SELECT count(*) FROM {replayable(s, selection, missing=missing)}", **parameters)
    return int(row[0])


def _asked(
    group: str,
    channel: str,
    after: int,
    finished_after: datetime | None,
    finished_before: datetime | None,
    filters: EventFilters,
) -> tuple[Selection, dict[str, Any]]:
    selection = Selection.of(filters, finished_after=finished_after, finished_before=finished_before)
    about = {
        "group": check_group_name(group),
        "channel": check_channel(channel),
        "after": check_event_id(after, "after"),
    }
    return selection, {**about, **selection.parameters()}


def replayable(s: str, selection: Selection, *, missing: bool) -> str:
    """Return the events that `replay()` takes, as `e` with their deliveries as `d`: what follows FROM."""
    about = selection.conditions(s, "e")
    of_event = [each for each in about if "d.finished_at" not in each]
    of_delivery = [each for each in about if "d.finished_at" in each]
    there = " AND ".join([f"d.was IN {_FINISHED}", *of_delivery])
    wanted = f"""d.was IS NULL AND EXISTS (SELECT FROM {s}.subscriptions k
      WHERE k.channel = CAST(:channel AS text) AND k.consumer_group = CAST(:group AS text) AND (k.pattern = e.type
        OR (starts_with(e.type || '.', k.prefix) AND (k.regex IS NULL OR e.type || '.' ~ k.regex))))"""
    return f"""{s}.events e LEFT JOIN LATERAL (
    SELECT d.status AS was, d.finished_at FROM {s}.deliveries d
    WHERE d.event_id = e.id AND d.consumer_group = CAST(:group AS text) ORDER BY d.event_id LIMIT 1) d ON true
  WHERE e.channel = CAST(:channel AS text) AND e.id > CAST(:after AS bigint) AND {NOT_PURGED}
    {"".join(f"AND {each} " for each in of_event)} AND ({there}{f" OR {wanted}" if missing else ""})"""


def _replay(s: str, selection: Selection, *, missing: bool, of_default: bool) -> str:
    # As in a backfill: the event is locked, so that it is not pruned meanwhile, and no longer unhandled.
    unwanted = f"""DELETE FROM {s}.deliveries d USING (
    SELECT u.place FROM made CROSS JOIN LATERAL (
      SELECT u.ctid AS place FROM {s}.deliveries u
      WHERE u.event_id = made.event_id AND u.consumer_group = '{DEFAULT_GROUP}' AND u.status = 'unhandled'
        AND NOT EXISTS (SELECT FROM {s}.subscriptions o
          WHERE o.channel = u.channel AND o.consumer_group = '{DEFAULT_GROUP}' AND (o.pattern = u.type
            OR (starts_with(u.type || '.', o.prefix) AND (o.regex IS NULL OR u.type || '.' ~ o.regex))))
      ORDER BY u.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) u) x
  WHERE d.ctid = x.place AND d.status = 'unhandled'"""
    return f"""
WITH found AS MATERIALIZED (
  SELECT e.id, e.run_at, e.priority, e.channel, e.type, e.key, d.was
  FROM {replayable(s, selection, missing=missing)}
  ORDER BY e.id LIMIT :limit FOR KEY SHARE OF e SKIP LOCKED
), locked AS MATERIALIZED (
  SELECT f.id, f.run_at, f.was, l.place FROM found f CROSS JOIN LATERAL (
    SELECT d.ctid AS place FROM {s}.deliveries d
    WHERE d.event_id = f.id AND d.consumer_group = CAST(:group AS text) AND d.status = f.was
    ORDER BY d.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) l
  WHERE f.was IS NOT NULL
), reset AS (
  UPDATE {s}.deliveries d
  SET status = CASE WHEN d.key IS NULL THEN 'pending' ELSE 'blocked' END, due_at = greatest(locked.run_at, now()),
      finished_at = NULL, holds_key = false, attempt = 0, round = least(d.round + 1, 32767), handled = NULL,
      errors = {entry("Replayed")}
  FROM locked WHERE d.ctid = locked.place AND d.status IN {_FINISHED}
  RETURNING d.event_id, d.consumer_group, locked.was, d.channel, d.key
), made AS (
  INSERT INTO {s}.deliveries (event_id, due_at, priority, channel, consumer_group, type, key, status, claim_seq)
  SELECT f.id, f.run_at, f.priority, f.channel, CAST(:group AS text), f.type, f.key,
         CASE WHEN f.key IS NULL THEN 'pending' ELSE 'blocked' END, {UNUSED_CLAIM_SEQ}
  FROM found f WHERE f.was IS NULL ORDER BY f.id ON CONFLICT DO NOTHING
  RETURNING event_id, consumer_group, channel, key
), {"" if of_default else f"unwanted AS ({unwanted}), "}done AS (
  SELECT * FROM reset UNION ALL SELECT m.event_id, m.consumer_group, NULL, m.channel, m.key FROM made m
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT done.* FROM done, (SELECT count(*) FROM told) told_count"""


async def _begun(session: AsyncSession, s: str, rows: Sequence[Any]) -> list[Changed]:
    """Let the first of each key in; return what was changed."""
    await promote(session, s, ((channel, group, key) for _, group, _, channel, key in rows if key is not None))
    return sorted(Changed(event_id, group, was) for event_id, group, was, _, _ in rows)
