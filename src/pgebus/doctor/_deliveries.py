"""The deliveries: those that nobody has a handler for, that are dead, that wait for a key, that run for long."""

# ruff: noqa: S608 - what is filled in are quoted identifiers and text of this package

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from shlex import quote
from typing import Any, Final

from pgebus.doctor._asking import COUNTED, LISTED, LOCKS, Ask, age, counted, moment
from pgebus.doctor._findings import Finding, notice, problem, warning
from pgebus.models import BEAT_ABSENT_SECONDS

# A skip scan over channel, group and type: one index probe for each, however many deliveries there are.
_UNHANDLED: Final = f"""
WITH RECURSIVE t AS (
  (SELECT d.channel, d.consumer_group, d.type FROM {{s}}.deliveries d WHERE d.status = 'unhandled'
   ORDER BY d.channel, d.consumer_group, d.type LIMIT 1)
  UNION ALL
  SELECT n.channel, n.consumer_group, n.type FROM t CROSS JOIN LATERAL (
    SELECT d.channel, d.consumer_group, d.type FROM {{s}}.deliveries d
    WHERE d.status = 'unhandled' AND (d.channel, d.consumer_group, d.type) > (t.channel, t.consumer_group, t.type)
    ORDER BY d.channel, d.consumer_group, d.type LIMIT 1) n
)
SELECT t.channel, t.consumer_group AS name, t.type, first.created_at, (SELECT count(*) FROM (
    SELECT FROM {{s}}.deliveries d WHERE d.status = 'unhandled' AND d.channel = t.channel
      AND d.consumer_group = t.consumer_group AND d.type = t.type LIMIT {COUNTED}) x) AS count,
  array(SELECT DISTINCT k.consumer_group::text FROM {{s}}.subscriptions k WHERE k.channel = t.channel
    AND (k.pattern = t.type OR (starts_with(t.type || '.', k.prefix) AND (k.regex IS NULL OR t.type || '.' ~ k.regex)))
    ORDER BY 1 LIMIT {LISTED}) AS wanted
FROM (SELECT * FROM t LIMIT {LISTED + 1}) t LEFT JOIN LATERAL (
  SELECT e.created_at FROM (SELECT d.event_id FROM {{s}}.deliveries d WHERE d.status = 'unhandled'
    AND d.channel = t.channel AND d.consumer_group = t.consumer_group AND d.type = t.type ORDER BY d.event_id LIMIT 1) f
  JOIN {{s}}.events e ON e.id = f.event_id) first ON true ORDER BY 1, 2, 3"""


async def unhandled(ask: Ask) -> AsyncIterator[Finding]:
    """Event types for which no worker had a handler."""
    rows = await ask.rows(_UNHANDLED)
    for row in rows[:LISTED]:
        wanted = ", ".join(map(repr, row["wanted"]))
        now = f"Wanted now by: {wanted}." if wanted else "No group wants them now."
        yield warning(
            "unhandled-type",
            f"{counted(row['count'], 'event', 'events')} of type {row['type']!r} of channel {row['channel']!r} "
            f"{'is' if row['count'] == 1 else 'are'} unhandled, the first since {moment(row['created_at'])}. {now}",
            "Start a worker with a handler for it in "
            f"group {row['name']!r}; or: pgebus cancel --status unhandled --type {row['type']}",
            f"{row['channel']}/{row['type']}",
        )
    if len(rows) > LISTED:
        yield warning(
            "unhandled-type", "There are more unhandled types than these.", "pgebus deliveries --status unhandled"
        )


_DEAD: Final = f"""
WITH RECURSIVE t AS (
  (SELECT d.channel, d.consumer_group FROM {{s}}.deliveries d WHERE d.status = 'dead'
   ORDER BY d.channel, d.consumer_group LIMIT 1)
  UNION ALL
  SELECT n.channel, n.consumer_group FROM t CROSS JOIN LATERAL (
    SELECT d.channel, d.consumer_group FROM {{s}}.deliveries d
    WHERE d.status = 'dead' AND (d.channel, d.consumer_group) > (t.channel, t.consumer_group)
    ORDER BY d.channel, d.consumer_group LIMIT 1) n
)
SELECT t.channel, t.consumer_group AS name, last.finished_at, last.event_id, last.errors -> -1 ->> 'type' AS error,
  last.errors -> -1 ->> 'message' AS message, (SELECT count(*) FROM (SELECT FROM {{s}}.deliveries d
    WHERE d.status = 'dead' AND d.channel = t.channel AND d.consumer_group = t.consumer_group
    LIMIT {COUNTED}) x) AS count
FROM (SELECT * FROM t LIMIT 100) t CROSS JOIN LATERAL (
  SELECT d.finished_at, d.event_id, d.errors FROM {{s}}.deliveries d
  WHERE d.status = 'dead' AND d.channel = t.channel AND d.consumer_group = t.consumer_group
  ORDER BY d.finished_at DESC LIMIT 1) last ORDER BY 1, 2"""


async def dead(ask: Ask) -> AsyncIterator[Finding]:
    """Dead letters, and what the newest one died of."""
    for row in await ask.rows(_DEAD):
        text = " ".join(str(row["message"] or "").split())
        error = f"{row['error']}: {text[:100]}" if row["error"] else "no error was kept"
        yield warning(
            "dead-letters",
            f"Group {row['name']!r} of channel {row['channel']!r} has "
            f"{counted(row['count'], 'dead letter', 'dead letters')}, the newest since {moment(row['finished_at'])} "
            f"(event {row['event_id']}: {error}).",
            f"pgebus show {row['event_id']}; when the cause is mended: pgebus redrive --group {row['name']} "
            f"--channel {quote(row['channel'])}",
            f"{row['channel']}/{row['name']}",
        )


# The first keys that something waits for, by a skip scan, and what holds each.
_KEYS: Final = f"""
WITH RECURSIVE k AS (
  (SELECT d.channel, d.consumer_group, d.key FROM {{s}}.deliveries d WHERE d.status = 'blocked'
   ORDER BY d.channel, d.consumer_group, d.key LIMIT 1)
  UNION ALL
  SELECT n.channel, n.consumer_group, n.key FROM k CROSS JOIN LATERAL (
    SELECT d.channel, d.consumer_group, d.key FROM {{s}}.deliveries d
    WHERE d.status = 'blocked' AND (d.channel, d.consumer_group, d.key) > (k.channel, k.consumer_group, k.key)
    ORDER BY d.channel, d.consumer_group, d.key LIMIT 1) n
)
SELECT k.channel, k.consumer_group AS name, k.key, h.event_id, h.status, h.attempt, h.due_at,
  clock_timestamp() AS clock,
  CASE h.status WHEN 'running' THEN h.claimed_at WHEN 'dead' THEN h.finished_at ELSE h.due_at END AS since,
  h.errors -> -1 ->> 'type' AS error
FROM (SELECT * FROM k LIMIT {COUNTED}) k LEFT JOIN LATERAL (
  SELECT d.* FROM {{s}}.deliveries d
  WHERE d.channel = k.channel AND d.consumer_group = k.consumer_group AND d.key = k.key
    AND (d.status IN ('pending', 'running') OR d.holds_key)
  ORDER BY d.event_id LIMIT 1) h ON true"""


_WAITING: Final = f"""
SELECT count(*) FROM (SELECT FROM {{s}}.deliveries d WHERE d.status = 'blocked' AND d.channel = $1::text
  AND d.consumer_group = $2::text AND d.key = $3::text LIMIT {COUNTED}) x"""


def _place(row: Any) -> tuple[str, str, str]:
    return row["channel"], row["name"], row["key"]


async def keys(ask: Ask) -> AsyncIterator[Finding]:
    """Keys that are held for long, or that deliveries wait for although nothing holds them."""
    rows = await ask.rows(_KEYS)
    if any(row["event_id"] is None for row in rows):
        # A sweep lets them in within a second or two: only what is still so is wrong.
        before = {_place(row) for row in rows if row["event_id"] is None}
        await ask.pause()
        rows = [row for row in await ask.rows(_KEYS) if row["event_id"] is not None or _place(row) in before]
    found = [(row, finding) for row in rows if (finding := _of_key(ask, row)) is not None]
    found.sort(key=lambda each: -each[1].severity.rank)
    for row, finding in found[:LISTED]:
        (count,) = await ask.row(_WAITING, *_place(row))
        waiting = counted(count, "delivery waits", "deliveries wait")
        yield replace(finding, seen=f"{waiting} {finding.seen}")
    if len(found) > LISTED:
        yield notice(
            "keys-more", f"There are {len(found) - LISTED} keys more like these.", "pgebus blocked --limit 1000"
        )


def _of_key(ask: Ask, row: Any) -> Finding | None:
    """Return what is wrong with it, to be read behind how many wait; None where nothing is."""
    where = f"for key {row['key']!r} of group {row['name']!r}"
    subject = f"{row['channel']}/{row['name']}/{row['key']}"
    release = f"pgebus release-key {row['name']} {quote(row['key'])} --channel {quote(row['channel'])}"
    if row["event_id"] is None:
        return problem(
            "key-without-head",
            f"{where}, and nothing holds it: no sweep has come.",
            f"Start a worker; it sweeps each second. Or: {release}",
            subject,
        )
    since = (row["clock"] - row["since"]).total_seconds()
    if row["status"] in ("dead", "unhandled"):
        return warning(
            "key-held",
            f"{where}, which event {row['event_id']} holds, {row['status']} since {age(since)}.",
            f"Mend and redrive it (pgebus redrive {row['event_id']}), or let go: {release}",
            subject,
        )
    if row["status"] == "running" and since >= ask.limits.running_seconds:
        return warning(
            "key-held",
            f"{where}, which event {row['event_id']} holds, running since {age(since)}.",
            f"Wait for it, or: pgebus cancel {row['event_id']}",
            subject,
        )
    if row["status"] == "pending" and row["attempt"] > 0 and -since >= ask.limits.waiting_seconds:
        return notice(
            "key-held",
            f"{where}, which event {row['event_id']} holds: it failed ({row['error']}), and is tried "
            f"again in {age(-since)}.",
            f"Wait for it, or: pgebus cancel {row['event_id']}",
            subject,
        )
    return None


_RUNNING: Final = f"""
WITH RECURSIVE {LOCKS}, r AS (
  (SELECT d.worker_id FROM {{s}}.deliveries d WHERE d.status = 'running' ORDER BY d.worker_id LIMIT 1)
  UNION ALL
  SELECT n.worker_id FROM r CROSS JOIN LATERAL (SELECT d.worker_id FROM {{s}}.deliveries d
    WHERE d.status = 'running' AND d.worker_id > r.worker_id ORDER BY d.worker_id LIMIT 1) n
)
SELECT r.worker_id AS id, w.host, w.pid, (SELECT count(*) FROM (SELECT FROM {{s}}.deliveries d
    WHERE d.status = 'running' AND d.worker_id = r.worker_id LIMIT {COUNTED}) x) AS count
FROM (SELECT * FROM r LIMIT 1000) r LEFT JOIN {{s}}.workers w ON w.id = r.worker_id
WHERE NOT EXISTS (SELECT FROM locks l WHERE l.id = r.worker_id)
  AND NOT coalesce(w.ended_at IS NULL AND w.backend_pid IS NULL
    AND w.beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds', false) ORDER BY 1"""

_OLDEST: Final = f"""
SELECT d.event_id, d.consumer_group AS name, d.worker_id AS id, d.claimed_at, clock_timestamp() AS clock FROM (
  SELECT * FROM {{s}}.deliveries d WHERE d.status = 'running' ORDER BY d.worker_id, d.event_id LIMIT {10 * COUNTED}) d
ORDER BY d.claimed_at LIMIT 1"""


async def running(ask: Ask) -> AsyncIterator[Finding]:
    """Deliveries whose worker is gone, and the one that runs longest."""
    gone = await ask.rows(_RUNNING)
    if gone:
        before = {row["id"] for row in gone}
        await ask.pause()
        gone = [row for row in await ask.rows(_RUNNING) if row["id"] in before]
    for row in gone:
        who = f"process {row['pid']} on {row['host']}" if row["host"] else "unknown"
        yield problem(
            "running-without-worker",
            f"{counted(row['count'], 'delivery is', 'deliveries are')} running in the hands of worker {row['id']} "
            f"({who}), which holds no lock and does not beat; nobody has taken "
            f"{'it' if row['count'] == 1 else 'them'} back.",
            "Start a worker: each recovers what others leave within a few seconds, and 10 after a server's start.",
            str(row["id"]),
        )
    for row in await ask.rows(_OLDEST):
        since = (row["clock"] - row["claimed_at"]).total_seconds()
        if since >= ask.limits.running_seconds:
            yield notice(
                "running-long",
                f"Event {row['event_id']} of group {row['name']!r} is running since {age(since)}, in worker "
                f"{row['id']}.",
                f"If it hangs: pgebus cancel {row['event_id']}, or give its handler a timeout.",
                str(row["event_id"]),
            )
