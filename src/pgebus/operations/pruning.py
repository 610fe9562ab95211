"""Events that are finished and old, removed: `prune()`, and the statement that workers prune with.

It commits nothing.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.errors import ConfigurationError
from pgebus.operations._statements import fetch, schema_of
from pgebus.operations.selection import check_limit

__all__ = ["prune"]

_LONGEST: Final = timedelta(days=365_000)


async def prune(session: AsyncSession, older_than: timedelta, *, limit: int = 1_000) -> int:
    """Delete events that every group has finished longer ago than *older_than*, and their deliveries with them.

    What workers do by themselves after `retention_seconds`, for another age. Finished is completed or cancelled: an
    event with a delivery that is dead, unhandled or still to be handled is kept. Their `dedup_key`s are free again.

    Done again it finds nothing. A row that somebody has locked is passed over.

    Args:
        session: Its transaction is yours to commit.
        older_than: By the database's clock; from zero.
        limit: How many deliveries are looked at, at most; 1 to 10,000. Call again, after the commit, until it is zero.

    Returns:
        How many events were deleted: fewer than *limit* also where several groups have finished the same events.

    Raises:
        ConfigurationError: If an argument is none of its kind; nothing was sent.
        sqlalchemy.exc.IntegrityError: If a table of yours refers to an event; the transaction has to be rolled back.
    """
    parameters = {"seconds": check_age(older_than), "limit": check_limit(limit)}
    s = await schema_of(session)
    (row,) = await fetch(session, prune_events(s, "CAST(:seconds AS double precision)", ":limit"), **parameters)
    return int(row[0])


async def count_prunable(session: AsyncSession, older_than: timedelta) -> int:
    """Return how many events prune() would delete, without a limit.

    Raises:
        ConfigurationError: As there.
    """
    seconds = check_age(older_than)
    s = await schema_of(session)
    sql = f"""
WITH cut AS MATERIALIZED (SELECT now() - make_interval(secs => CAST(:seconds AS double precision)) AS at)
SELECT count(DISTINCT d.event_id) FROM {prunable(s)}"""
    (row,) = await fetch(session, sql, seconds=seconds)
    return int(row[0])


def prune_events(s: str, seconds: str, limit: str) -> str:
    """Return the statement: *s* is the quoted schema, the others are how the driver writes its parameters.

    A dead or unfinished delivery keeps its event. Deliveries go with their event.
    """
    return f"""
WITH cut AS MATERIALIZED (SELECT now() - make_interval(secs => {seconds}) AS at), old AS MATERIALIZED (
  SELECT d.event_id FROM {prunable(s)}
  ORDER BY d.finished_at LIMIT {limit}
), ids AS MATERIALIZED (
  SELECT e.id FROM {s}.events e WHERE e.id IN (SELECT event_id FROM old) ORDER BY e.id FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {s}.events e USING ids WHERE e.id = ids.id RETURNING e.id
), orphans AS (
  -- left by a deletion without triggers, they would fill every batch for ever
  DELETE FROM {s}.deliveries d USING old
  WHERE d.event_id = old.event_id AND NOT EXISTS (SELECT FROM {s}.events e WHERE e.id = d.event_id)
  RETURNING d.event_id
)
SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM orphans)"""


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
