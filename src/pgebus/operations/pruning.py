"""Events that are finished and old, removed: `prune()`, and the statements that workers prune with.

It commits nothing.

An event is locked first, and looked at by a statement of its own then. In one statement, what a replay or a backfill
commits between its snapshot and its lock would be deleted with the event, and never be handled.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.errors import ConfigurationError
from pgebus.operations._statements import fetch, require_fresh_snapshots, schema_of
from pgebus.operations.selection import check_limit

__all__ = ["prune"]

_LONGEST: Final = timedelta(days=365_000)
_EVENTS_LOOKED_AT: Final = 10_000
# The classes of what the application's own constraints and triggers raise.
_REFUSED: Final = ("23", "P0")


async def prune(session: AsyncSession, older_than: timedelta, *, limit: int = 1_000) -> int:
    """Delete events that every group has finished longer ago than *older_than*, and their deliveries with them.

    What workers do by themselves after their retention, for another age and for all event types and channels alike.
    Finished is completed or cancelled: an event with a delivery that is dead, unhandled or still to be handled is kept.
    One that no delivery is left of, because no group that wanted it keeps its history, goes when it was published, and
    due, longer ago than that. Their `dedup_key`s are free again.

    Done again it finds nothing. An event is passed over when somebody has locked it, or one of its deliveries, and
    when your database refuses to delete it: because a table of yours refers to it, or a trigger says so. A batch that
    is refused is tried again in halves, each behind a savepoint.

    Args:
        session: Its transaction is yours to commit; at READ COMMITTED.
        older_than: By the database's clock; from zero.
        limit: How many events, at most; 1 to 10,000. Call again, after the commit, until it is zero.

    Returns:
        How many events were deleted; zero when there was none that could be.

    Raises:
        ConfigurationError: If an argument is none of its kind; nothing was sent.
        SessionStateError: If the session is in AUTOCOMMIT, or at REPEATABLE READ or above, where a statement would not
            see what was committed before its event was locked; nothing was changed.
    """
    seconds, limit = check_age(older_than), check_limit(limit)
    s = await schema_of(session)
    await require_fresh_snapshots(session, "prune()")
    finished = f"""
WITH {_CUT}
SELECT d.event_id, d.finished_at FROM {prunable(s)}
  AND (d.finished_at, d.event_id) > (coalesce(CAST(:at AS timestamptz), '-infinity'), CAST(:after AS bigint))
ORDER BY d.finished_at, d.event_id LIMIT :limit"""
    gone, at, after = 0, None, 0
    while gone < limit:
        rows = await fetch(session, finished, seconds=seconds, at=at, after=after, limit=limit - gone)
        if not rows:
            break
        after, at = rows[-1]
        gone += await _delete(session, s, sorted({row[0] for row in rows}), seconds)
    after = 0
    while gone < limit and (bare := await _bare(session, s, seconds, after, limit - gone)):
        after = bare[-1]
        gone += await _delete(session, s, bare, seconds)
    return gone


async def _delete(session: AsyncSession, s: str, ids: list[int], seconds: float) -> int:
    """Delete those that can go, each but those that the application refuses to; return how many."""
    kept: dict[str, float | None] = {"dead": None, "unhandled": None}
    rows = await fetch(session, lock_ripe(s, _NAMED), ids=ids, seconds=[seconds] * len(ids), **kept)
    gone, connection = 0, await session.connection()
    parts = [[row[0] for row in rows]] if rows else []
    while parts:
        part = parts.pop()
        try:
            async with connection.begin_nested():
                sql = delete_ripe(s, _NAMED)
                (row,) = await fetch(session, sql, ids=part, seconds=[seconds] * len(part), **kept)
                gone += int(row[0])
        except DBAPIError as error:
            if str(getattr(error.orig, "sqlstate", ""))[:2] not in _REFUSED:
                raise
            if half := len(part) // 2:
                parts += part[half:], part[:half]
    return gone


async def count_prunable(session: AsyncSession, older_than: timedelta) -> int:
    """Return how many events prune() would delete, without a limit.

    Raises:
        ConfigurationError: As there.
    """
    seconds = check_age(older_than)
    s = await schema_of(session)
    sql = f"""
WITH {_CUT}
SELECT (SELECT count(DISTINCT d.event_id) FROM {prunable(s)}) + (
  SELECT count(*) FROM {s}.events e, cut WHERE greatest(e.created_at, e.run_at) < cut.at
    AND NOT EXISTS (SELECT FROM {s}.deliveries d WHERE d.event_id = e.id))"""
    (row,) = await fetch(session, sql, seconds=seconds)
    return int(row[0])


async def _bare(session: AsyncSession, s: str, seconds: float, after: int, limit: int) -> list[int]:
    """Return up to *limit* old events without a delivery after an id, looking on until all are too young."""
    sql = f"""
WITH {_CUT}
SELECT max(u.id), bool_and(u.created_at >= cut.at), array_agg(u.id ORDER BY u.id) FILTER (
  WHERE greatest(u.created_at, u.run_at) < cut.at AND NOT {_has_delivery(s, "u")})
FROM cut, (SELECT e.id, e.created_at, e.run_at FROM {s}.events e
  WHERE e.id > CAST(:after AS bigint) ORDER BY e.id LIMIT {_EVENTS_LOOKED_AT}) u"""
    found: list[int] = []
    young = False
    while len(found) < limit and not young:
        ((last, young, bare),) = await fetch(session, sql, seconds=seconds, after=after)
        if last is None:
            break
        after = last
        found += bare or ()
    return found[:limit]


class Written(NamedTuple):
    """How a driver writes the parameters: event ids, and for each the seconds for which what is finished is kept.

    Attributes:
        ids: An array.
        seconds: An array as long; NULL keeps the event.
        dead: Seconds for which the dead are kept; NULL, for ever.
        unhandled: The same for the unhandled.
    """

    ids: str
    seconds: str
    dead: str
    unhandled: str


_NAMED: Final = Written(
    "CAST(:ids AS bigint[])",
    "CAST(:seconds AS double precision[])",
    "CAST(:dead AS double precision)",
    "CAST(:unhandled AS double precision)",
)
NUMBERED: Final = Written("$1::bigint[]", "$2::double precision[]", "$3::double precision", "$4::double precision")
_CUT: Final = "cut AS MATERIALIZED (SELECT now() - make_interval(secs => CAST(:seconds AS double precision)) AS at)"


def ripe(kept: Written, *, of: str = "u") -> str:
    """Return whether a delivery `d` has been kept for its time: NULL where it has no end.

    Nothing says when a delivery became unhandled: so its time begins when it was due, or at its event's creation.
    """
    return f"""(CASE WHEN d.status IN ('completed', 'cancelled')
      THEN d.finished_at < now() - make_interval(secs => {of}.seconds)
      WHEN d.status = 'dead' THEN d.finished_at < now() - make_interval(secs => {kept.dead})
      WHEN d.status = 'unhandled'
      THEN greatest(d.due_at, {of}.created_at) < now() - make_interval(secs => {kept.unhandled}) END)"""


def bare_ripe(of: str) -> str:
    """Return whether an event has been kept for its time that no delivery is left of, as such groups leave it."""
    return f"greatest({of}.created_at, {of}.run_at) < now() - make_interval(secs => {of}.seconds)"


def _has_delivery(s: str, of: str) -> str:
    return f"""(
    SELECT d.event_id FROM {s}.deliveries d WHERE d.event_id = {of}.id ORDER BY d.event_id LIMIT 1) IS NOT NULL"""


def lock_ripe(s: str, kept: Written) -> str:
    """Return the first statement: lock those events that are ripe; *s* is the quoted schema.

    Deliveries without an event are named too: left by a deletion without triggers, nothing else would remove them.
    """
    return f"""
WITH u AS MATERIALIZED (
  SELECT i.id, i.seconds, e.created_at, e.run_at, e.id IS NULL AS orphaned
  FROM unnest({kept.ids}, {kept.seconds}) i(id, seconds)
  LEFT JOIN LATERAL (
    SELECT e.id, e.created_at, e.run_at FROM {s}.events e WHERE e.id = i.id ORDER BY e.id LIMIT 1) e ON true
), ripe AS MATERIALIZED (
  SELECT u.id, u.orphaned FROM u WHERE (
    SELECT d.event_id FROM {s}.deliveries d WHERE d.event_id = u.id AND {ripe(kept)} IS NOT TRUE
    ORDER BY d.event_id LIMIT 1) IS NULL AND ({bare_ripe("u")} OR u.orphaned OR {_has_delivery(s, "u")})
  ORDER BY u.id
), free AS MATERIALIZED (
  SELECT f.id FROM ripe CROSS JOIN LATERAL (
    SELECT e.id FROM {s}.events e WHERE e.id = ripe.id ORDER BY e.id LIMIT 1 FOR UPDATE SKIP LOCKED) f
)
SELECT f.id FROM free f UNION ALL SELECT r.id FROM ripe r WHERE r.orphaned"""


def delete_ripe(s: str, kept: Written) -> str:
    """Return the second: delete those that still are, with a snapshot that is newer than the locks.

    Nobody gives a locked event a new delivery: so one without any has none either when it is deleted. The deliveries
    that it has are locked too, and passed over with their event where somebody else has them: a claim, a redrive, or a
    person's open transaction, which nobody waits for.
    """
    return f"""
WITH u AS MATERIALIZED (
  SELECT i.id, i.seconds, e.created_at, e.run_at, e.place FROM unnest({kept.ids}, {kept.seconds}) i(id, seconds)
  LEFT JOIN LATERAL (
    SELECT e.created_at, e.run_at, e.ctid AS place FROM {s}.events e WHERE e.id = i.id ORDER BY e.id LIMIT 1) e ON true
), locked AS MATERIALIZED (
  SELECT u.id, u.place AS event, l.place FROM u CROSS JOIN LATERAL (
    SELECT d.ctid AS place FROM {s}.deliveries d WHERE d.event_id = u.id AND {ripe(kept)}
    ORDER BY d.consumer_group FOR UPDATE SKIP LOCKED) l
), whole AS MATERIALIZED (
  SELECT l.id, l.event FROM (SELECT id, event, count(*) AS n FROM locked GROUP BY id, event) l
  WHERE l.n = (SELECT count(*) FROM {s}.deliveries d WHERE d.event_id = l.id)
  UNION ALL SELECT u.id, u.place FROM u
  WHERE u.place IS NOT NULL AND {bare_ripe("u")} AND NOT {_has_delivery(s, "u")}
), gone AS (
  DELETE FROM {s}.events e USING whole WHERE e.ctid = whole.event RETURNING e.id
), orphans AS (
  DELETE FROM {s}.deliveries d USING locked WHERE locked.event IS NULL AND d.ctid = locked.place RETURNING d.event_id
)
SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM orphans) AS gone"""


def prunable(s: str) -> str:
    """Return the deliveries whose events can go, as `d` beside `cut`: what follows FROM."""
    return f"""{s}.deliveries d, cut
  WHERE d.status IN ('completed', 'cancelled') AND d.finished_at < cut.at
    AND NOT EXISTS (SELECT FROM {s}.deliveries o WHERE o.event_id = d.event_id
                    AND (o.finished_at IS NULL OR o.finished_at >= cut.at OR o.status = 'dead'))"""


def check_age(older_than: object) -> float:
    """Return it in seconds.

    Raises:
        ConfigurationError: If it is no timedelta from zero to a thousand years.
    """
    if isinstance(older_than, timedelta) and timedelta(0) <= older_than <= _LONGEST:
        return older_than.total_seconds()
    raise ConfigurationError("older_than must be a timedelta, from zero to a thousand years.")
