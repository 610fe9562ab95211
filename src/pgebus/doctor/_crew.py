"""The workers and the schedules: who is alive, who only seems to be, and what nobody declares any more."""

# ruff: noqa: S608 - what is filled in are quoted identifiers and text of this package

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, Final

from pgebus.cron import make_cron
from pgebus.doctor._asking import LISTED, LOCKS, Ask, age, moment
from pgebus.doctor._findings import Finding, notice, warning
from pgebus.errors import ConfigurationError
from pgebus.models import BEAT_ABSENT_SECONDS

# A running process says every 30 seconds which schedules it has.
_NOT_DECLARED: Final = timedelta(minutes=5)
# It looks at them every 30 seconds.
_SCHEDULE_LATE: Final = timedelta(seconds=90)

_WORKERS: Final = f"""
WITH {LOCKS}
SELECT w.id, w.channel, w.host, w.pid, w.version, w.backend_pid, w.beat_at, w.started_at, l.pid AS lock_pid,
  w.backend_pid IS NULL AND w.beat_at > clock_timestamp() - interval '{BEAT_ABSENT_SECONDS} seconds' AS beats,
  extract(epoch FROM clock_timestamp() - a.xact_start)::double precision AS seconds, a.state
FROM {{s}}.workers w LEFT JOIN locks l ON l.id = w.id LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = w.backend_pid
WHERE w.ended_at IS NULL ORDER BY w.started_at, w.id LIMIT 1000"""


def _suspect(row: Any) -> bool:
    """Whether it is not alive, or its lock is another session's."""
    return not row["beats"] if row["backend_pid"] is None else row["lock_pid"] != row["backend_pid"]


async def workers(ask: Ask) -> AsyncIterator[Finding]:
    """Workers without a lock or a beat, of several releases, or in a transaction where they listen."""
    rows = await ask.rows(_WORKERS)
    before = {row["id"] for row in rows if _suspect(row)}
    if before:
        await ask.pause()
        rows = [row for row in await ask.rows(_WORKERS) if not _suspect(row) or row["id"] in before]
    for row in [row for row in rows if _suspect(row)][:LISTED]:
        yield _of_suspect(row)
    for row in rows:
        if row["seconds"] is not None and row["seconds"] >= ask.limits.transaction_seconds and not _suspect(row):
            yield warning(
                "listener-in-transaction",
                f"The session in which worker {row['id']} listens ({row['backend_pid']}, {row['state']}) is in a "
                f"transaction for {age(row['seconds'])}: the queue of NOTIFY fills up for everybody.",
                f"SELECT pg_terminate_backend({row['backend_pid']}); the worker connects again by itself.",
                str(row["id"]),
            )
    versions = sorted({row["version"] or "unknown" for row in rows if not _suspect(row)})
    if len(versions) > 1:
        yield notice(
            "releases-differ",
            f"Workers of several releases are alive: {', '.join(versions)}. That is right while a deploy goes on.",
            "Finish the deploy.",
        )


def _of_suspect(row: Any) -> Finding:
    who = f"Worker {row['id']} (process {row['pid']} on {row['host']}, version {row['version']})"
    subject = str(row["id"])
    end = "Start a worker: it ends the entries of those that are gone."
    if row["backend_pid"] is None:
        return warning(
            "beat-absent",
            f"{who} has not ended, and its last beat was at {moment(row['beat_at'])}.",
            f"Look whether its process lives and reaches the database. {end}",
            subject,
        )
    if row["lock_pid"] is not None:
        return warning(
            "listener-behind-pooler",
            f"{who} has its lock in session {row['lock_pid']}, and not in session {row['backend_pid']} where it "
            "listens: its connection does not keep its session, as behind a transaction pooler.",
            'Give it a listen_url that reaches PostgreSQL directly, or liveness = "beat": docs/guides/poolers.md.',
            subject,
        )
    return warning(
        "worker-without-lock",
        f"{who} has not ended, and its lock is not held: it was killed, has lost its connection, or is behind a "
        "transaction pooler.",
        f'{end} Behind a pooler: listen_url, or liveness = "beat".',
        subject,
    )


async def schedules(ask: Ask) -> AsyncIterator[Finding]:
    """Schedules that nobody declares, and such as are behind."""
    rows = await ask.rows(
        "SELECT channel, type, cron, timezone, last_at, declared_at, clock_timestamp() AS clock FROM {s}.schedules"
        " ORDER BY channel, type, cron, timezone LIMIT 1000"
    )
    for row in rows:
        what = f"Schedule {row['cron']!r} ({row['timezone']}) of {row['type']!r}"
        subject = f"{row['channel']}/{row['type']}"
        if row["clock"] - row["declared_at"] > _NOT_DECLARED:
            yield notice(
                "schedule-forgotten",
                f"{what} was declared last at {moment(row['declared_at'])}: nobody publishes for it.",
                f"Start a process that has it. If it was changed or taken away, delete its row from {ask.s}.schedules.",
                subject,
            )
            continue
        try:
            due = next(make_cron(row["cron"], row["timezone"], "latest").after(row["last_at"]), None)
        except ConfigurationError as error:
            yield notice("not-visible", f"Whether {what} is behind: {error}", None, "schedules")
            continue
        if due is not None and row["clock"] - due > _SCHEDULE_LATE:
            yield warning(
                "schedule-behind",
                f"{what} was due at {moment(due)}, and was not published.",
                "Look at the log of the processes that have it, and at their health().",
                subject,
            )
