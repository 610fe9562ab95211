"""The groups: whether somebody serves each of them, and whether it keeps up."""

# ruff: noqa: S608 - what is filled in are quoted identifiers and text of this package

from __future__ import annotations

from collections.abc import AsyncIterator
from shlex import quote
from typing import Any, Final

from pgebus.doctor._asking import COUNTED, LISTED, LOCKS, Ask, age, counted, moment
from pgebus.doctor._findings import Finding, notice, problem, warning
from pgebus.models import BEAT_ABSENT_SECONDS

# Lane by lane, as a claim looks: each is an index range, read up to the limit.
_GROUPS: Final = f"""
WITH {LOCKS}, alive AS MATERIALIZED (
  SELECT w.channel, w.groups FROM {{s}}.workers w LEFT JOIN locks l ON l.id = w.id
  WHERE w.ended_at IS NULL AND (l.id IS NOT NULL OR (w.backend_pid IS NULL
    AND w.beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds'))
)
SELECT g.channel, g.consumer_group AS name, g.paused_at, g.max_running, clock_timestamp() AS clock,
  (SELECT count(*) FROM alive a WHERE a.channel = g.channel AND g.consumer_group = ANY (a.groups)) AS workers,
  (SELECT max(k.declared_at) FROM {{s}}.subscriptions k
   WHERE k.channel = g.channel AND k.consumer_group = g.consumer_group) AS declared_at, due.count AS due, due.oldest,
  CASE WHEN g.max_running IS NOT NULL THEN (SELECT count(*) FROM {{s}}.deliveries r WHERE r.status = 'running'
    AND r.channel = g.channel AND r.consumer_group = g.consumer_group) END AS running
FROM {{s}}.consumer_groups g CROSS JOIN LATERAL (
  SELECT count(*) AS count, min(x.due_at) AS oldest FROM (
    SELECT d.due_at FROM generate_series(0, 9) p(level) CROSS JOIN LATERAL (
      SELECT d.due_at FROM {{s}}.deliveries d
      WHERE d.status = 'pending' AND d.channel = g.channel AND d.consumer_group = g.consumer_group
        AND d.priority = p.level AND d.due_at <= now()
      ORDER BY d.due_at LIMIT {COUNTED // 10}) d) x) due
ORDER BY 1, 2 LIMIT 1000"""


async def groups(ask: Ask) -> AsyncIterator[Finding]:
    """Groups that nobody serves, that are paused, full or behind."""
    for row in await ask.rows(_GROUPS):
        finding = _of_group(ask, row)
        if finding is not None:
            yield finding


def _of_group(ask: Ask, row: Any) -> Finding | None:
    name, channel = row["name"], row["channel"]
    who = f"Group {name!r} of channel {channel!r}"
    since = None if row["oldest"] is None else (row["clock"] - row["oldest"]).total_seconds()
    late = since is not None and since >= ask.limits.waiting_seconds
    # A lane is counted up to its share: with less than that in each, the count is exact.
    due = f"at least {row['due']}" if row["due"] >= COUNTED // 10 else str(row["due"])
    backlog = f"{due} {'delivery is' if row['due'] == 1 else 'deliveries are'} due, the oldest since {age(since)}"
    subject = f"{channel}/{name}"
    if row["paused_at"] is not None:
        make = warning if row["due"] else notice
        return make(
            "group-paused",
            f"{who} is paused since {moment(row['paused_at'])}; {backlog if row['due'] else 'nothing is due'}.",
            f"pgebus groups --channel {quote(channel)} resume {name}",
            subject,
        )
    if not row["workers"]:
        seen = f"No worker that is alive serves group {name!r} of channel {channel!r}; "
        last = f", last declared {moment(row['declared_at'])}." if row["declared_at"] else "."
        if late:
            return problem(
                "group-unserved",
                f"{seen}{backlog}{last}",
                "Start a worker with its handlers; or, where it is not needed: "
                f"pgebus groups --channel {quote(channel)} remove {name}",
                subject,
            )
        return notice(
            "group-unserved",
            f"{seen}{backlog if row['due'] else 'nothing is due'}{last}",
            "Start a worker with its handlers before events come.",
            subject,
        )
    if not late:
        return None
    if row["max_running"] is not None and row["running"] >= row["max_running"]:
        return warning(
            "group-full",
            f"{who} is at its limit of {row['max_running']} running; {backlog}.",
            f"pgebus groups --channel {quote(channel)} limit {name} N, if more may run at once.",
            subject,
        )
    return warning(
        "group-behind",
        f"{who} is served by {row['workers']} worker{'s' if row['workers'] > 1 else ''}, and behind: {backlog}.",
        "Start more workers, raise n_workers, or make the handlers faster.",
        subject,
    )


# Groups that have deliveries which wait, and are not declared: one index probe for each.
_STRAYS: Final = f"""
WITH RECURSIVE t AS (
  (SELECT d.channel, d.consumer_group FROM {{s}}.deliveries d WHERE d.status = 'pending'
   ORDER BY d.channel, d.consumer_group LIMIT 1)
  UNION ALL
  SELECT n.channel, n.consumer_group FROM t CROSS JOIN LATERAL (
    SELECT d.channel, d.consumer_group FROM {{s}}.deliveries d
    WHERE d.status = 'pending' AND (d.channel, d.consumer_group) > (t.channel, t.consumer_group)
    ORDER BY d.channel, d.consumer_group LIMIT 1) n
)
SELECT t.channel, t.consumer_group AS name, (SELECT count(*) FROM (SELECT FROM {{s}}.deliveries d
  WHERE d.status = 'pending' AND d.channel = t.channel AND d.consumer_group = t.consumer_group
  LIMIT {COUNTED}) x) AS count
FROM (SELECT * FROM t LIMIT 1000) t WHERE NOT EXISTS (SELECT FROM {{s}}.consumer_groups g
  WHERE g.channel = t.channel AND g.consumer_group = t.consumer_group) ORDER BY 1, 2 LIMIT {LISTED}"""


async def strays(ask: Ask) -> AsyncIterator[Finding]:
    """Deliveries of groups that are not declared, because somebody has removed them."""
    for row in await ask.rows(_STRAYS):
        yield warning(
            "group-not-declared",
            f"{counted(row['count'], 'delivery waits', 'deliveries wait')} for group {row['name']!r} of channel "
            f"{row['channel']!r}, which is not declared: nobody claims them.",
            f"Start a worker that declares it; or: pgebus cancel --group {row['name']} "
            f"--channel {quote(row['channel'])}",
            f"{row['channel']}/{row['name']}",
        )
