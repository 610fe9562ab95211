"""How far behind each consumer group is: one look at the database, at a bounded cost.

It counts up to a limit and no further, so that a backlog of millions is as cheap to look at as one of thousands.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this module

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.models import BEAT_ABSENT_SECONDS
from pgebus.names import check_channel
from pgebus.operations._statements import fetch, schema_of

__all__ = ["COUNT_LIMIT", "GroupStatus", "status"]

COUNT_LIMIT: Final = 10_000
"""How far each number is counted."""

_COUNTED: Final = ("pending", "due", "running", "blocked", "dead", "unhandled")
_RATE_SECONDS: Final = 60.0


@dataclass(frozen=True)
class GroupStatus:
    """What waits for a consumer group, what it does, and how fast.

    Attributes:
        channel: Its channel.
        group: Its name.
        declared: Whether a process has declared it; else there are only deliveries in its name.
        paused_at: Since when it claims nothing; None when it does.
        workers: How many workers that are alive serve it.
        pending: Deliveries that are due or will be, those that are tried again included.
        due: Those of them that are due now: the backlog.
        running: Those that are claimed.
        blocked: Those that wait for another one of their key.
        dead: Dead letters.
        unhandled: Those that no worker had a handler for.
        oldest_due: How long the delivery that has been due longest has been; None where nothing is due.
        per_second: How many are completed in a second: over the last minute, or over the last 10,000 that any group
            has finished where those are younger. What has been deleted since is not counted, and so nothing of a
            group that keeps no history.
        capped: The names of the counts that stopped at `COUNT_LIMIT`: there are more.
    """

    channel: str
    group: str
    declared: bool
    paused_at: datetime | None
    workers: int
    pending: int
    due: int
    running: int
    blocked: int
    dead: int
    unhandled: int
    oldest_due: timedelta | None
    per_second: float
    capped: tuple[str, ...]


async def status(session: AsyncSession, channel: str | None = None) -> list[GroupStatus]:
    """Return the status of the consumer groups of *channel*, or of all channels, in the order of their names.

    Also those that are gone, or were never declared, and have deliveries all the same. Reads only, and touches at most
    some ten thousand rows for each number and group, however long the backlog and the history are.

    Raises:
        InvalidChannelError: If the channel cannot be one.
    """
    of_channel = None if channel is None else check_channel(channel)
    sql = _statement(await schema_of(session), COUNT_LIMIT)
    return [_status(row) for row in await fetch(session, sql, channel=of_channel)]


def _status(row: Any) -> GroupStatus:
    counts = {name: int(getattr(row, name)) for name in _COUNTED}
    capped = tuple(name for name, count in counts.items() if count > COUNT_LIMIT)
    return GroupStatus(
        channel=row.channel,
        group=row.consumer_group,
        declared=row.declared,
        paused_at=row.paused_at,
        workers=row.workers,
        **{name: min(count, COUNT_LIMIT) for name, count in counts.items()},
        oldest_due=row.oldest_due,
        per_second=float(row.per_second),
        capped=capped,
    )


# The columns that lead the index of each status, from one group to the next: as many steps as there are groups.
_WALK: Final = """
of_{status}(channel, consumer_group) AS (
  (SELECT channel, consumer_group FROM {schema}.deliveries WHERE status = '{status}'
   ORDER BY channel, consumer_group LIMIT 1)
  UNION ALL
  SELECT next.* FROM of_{status} this, LATERAL (
    SELECT d.channel, d.consumer_group FROM {schema}.deliveries d
    WHERE d.status = '{status}' AND (d.channel, d.consumer_group) > (this.channel, this.consumer_group)
    ORDER BY d.channel, d.consumer_group LIMIT 1) next
)"""

# ORDER BY is what makes the planner take the index, which it would not always do for the sake of a LIMIT alone.
_COUNT: Final = """
  (SELECT count(*) FROM (
    SELECT FROM {schema}.deliveries d
    WHERE d.status = '{status}' AND d.channel = g.channel AND d.consumer_group = g.consumer_group
    ORDER BY {order} LIMIT {most}) x) AS {status}"""

_ORDERS: Final = {
    "pending": "d.channel, d.consumer_group, d.priority, d.due_at, d.event_id",
    "blocked": "d.channel, d.consumer_group, d.key, d.event_id",
    "dead": "d.channel, d.consumer_group, d.finished_at",
    "unhandled": "d.channel, d.consumer_group, d.type, d.event_id",
}


def _statement(schema: str, limit: int) -> str:
    """Return the statement; `:channel` may be NULL."""
    most = limit + 1
    walks = ",".join(_WALK.format(schema=schema, status=name) for name in _ORDERS)
    counts = ",".join(
        _COUNT.format(schema=schema, status=name, order=order, most=most) for name, order in _ORDERS.items()
    )
    # What is due is looked for in each priority, as a claim does: the index has the priority before the time.
    due = f"""generate_series(0, 9) p, LATERAL (
      SELECT d.due_at FROM {schema}.deliveries d
      WHERE d.status = 'pending' AND d.channel = g.channel AND d.consumer_group = g.consumer_group
        AND d.priority = p AND d.due_at <= statement_timestamp()
      ORDER BY d.channel, d.consumer_group, d.priority, d.due_at LIMIT {{}}) x"""
    return f"""
WITH RECURSIVE {walks},
held AS MATERIALIZED (
  SELECT channel, consumer_group FROM {schema}.deliveries WHERE status = 'running'
  ORDER BY worker_id, event_id LIMIT {most}
),
finished AS MATERIALIZED (
  SELECT channel, consumer_group, status, finished_at FROM {schema}.deliveries
  WHERE status IN ('completed', 'cancelled')
    AND finished_at > statement_timestamp() - interval '{_RATE_SECONDS} seconds'
  ORDER BY finished_at DESC LIMIT {limit}
),
span AS MATERIALIZED (
  SELECT CASE WHEN count(*) < {limit} THEN {_RATE_SECONDS}
    ELSE greatest(0.001, extract(epoch FROM statement_timestamp() - min(finished_at))) END AS seconds
  FROM finished
),
alive AS MATERIALIZED (
  SELECT channel, groups FROM {schema}.workers
  WHERE ended_at IS NULL AND (id IN (
    SELECT (CAST(classid AS bigint) << 32) | CAST(objid AS bigint) FROM pg_catalog.pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
      AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
    OR (backend_pid IS NULL AND beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds'))
),
g AS (
  SELECT channel, consumer_group FROM {schema}.consumer_groups
  UNION SELECT channel, consumer_group FROM held
  {" ".join(f"UNION SELECT channel, consumer_group FROM of_{name}" for name in _ORDERS)}
)
SELECT g.channel, g.consumer_group, c.consumer_group IS NOT NULL AS declared, c.paused_at,
  (SELECT count(*) FROM alive a WHERE a.channel = g.channel AND g.consumer_group = ANY (a.groups)) AS workers,
  {counts},
  (SELECT count(*) FROM (SELECT FROM {due.format(most)} LIMIT {most}) y) AS due,
  (SELECT statement_timestamp() - min(x.due_at) FROM {due.format(1)}) AS oldest_due,
  (SELECT count(*) FROM held h WHERE h.channel = g.channel AND h.consumer_group = g.consumer_group) AS running,
  (SELECT count(*) FROM finished f
   WHERE f.channel = g.channel AND f.consumer_group = g.consumer_group AND f.status = 'completed')
    / (SELECT seconds FROM span) AS per_second
FROM g LEFT JOIN {schema}.consumer_groups c ON c.channel = g.channel AND c.consumer_group = g.consumer_group
WHERE CAST(:channel AS text) IS NULL OR g.channel = CAST(:channel AS text)
ORDER BY g.channel, g.consumer_group"""
