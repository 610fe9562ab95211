"""Deliveries that are not to be handled any more: `cancel()`.

It interrupts no handler, and commits nothing.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.operations._statements import entry, fetch, promote, schema_of, told, wake
from pgebus.operations.selection import (
    Changed,
    Filters,
    Selection,
    check_limit,
    check_statuses,
    status_condition,
)

__all__ = ["cancel"]

# All but what cannot be taken back, and what is cancelled already.
CANCELLABLE: Final = ("pending", "blocked", "running", "unhandled", "dead")


async def cancel(
    session: AsyncSession,
    *,
    status: str | Collection[str] | None = None,
    limit: int = 1_000,
    reason: str | None = None,
    by: str | None = None,
    **filters: Unpack[Filters],
) -> list[Changed]:
    """Cancel deliveries: pending, blocked, running, unhandled and dead ones; those that are completed stay completed.

    A running one is taken from its worker. Its handlers are not interrupted; but in a transaction nothing of what they
    write is committed, because their completion finds no delivery any more, and everything is rolled back. Effects
    outside of that transaction stay. The next delivery of its key starts at the commit, while those handlers may still
    be running.

    An entry `Cancelled` is added to the errors. Sleeping workers are woken when something can be claimed now. Done
    again it finds nothing. A row that somebody has locked at this moment, such as one that is being claimed or
    completed, is passed over: what is returned is what is cancelled, so call again for the rest.

    Args:
        session: Its transaction is yours to commit.
        status: Only deliveries of this status, or of these; all but completed unless given.
        limit: How many, at most; 1 to 10,000.
        reason: Why; kept in the entry.
        by: Who; the role of the database unless given.
        **filters: Which; see `Filters`. At least one besides the channel, or a status.

    Returns:
        The deliveries, in the order of their event ids, with the status that each had.

    Raises:
        ConfigurationError: If an argument is none of its kind, or everything there is would be cancelled.
    """
    selection = Selection.of(filters)
    statuses = check_statuses(status, CANCELLABLE)
    if status is None:
        selection.refuse_everything("cancel()")
    parameters = {"limit": check_limit(limit), **selection.parameters()}
    said = told(by, reason)
    s = await schema_of(session)
    where = " AND ".join([status_condition(statuses), *selection.conditions(s, "d")])
    found = await fetch(
        session,
        f"""
SELECT d.event_id, d.consumer_group, d.status FROM {s}.deliveries d WHERE {where}
ORDER BY {selection.order(statuses)}, d.consumer_group LIMIT :limit FOR UPDATE OF d SKIP LOCKED""",
        **parameters,
    )
    if not found:
        return []
    # A statement of its own: it sees the rows as they were locked, also those that were claimed a moment ago.
    locked = {"ids": [row[0] for row in found], "groups": [row[1] for row in found]}
    rows = await fetch(session, _CANCEL.replace("{s}", s), **locked, **said)
    left = [(channel, group, key) for _, group, channel, key in rows if key is not None]
    was = {(event_id, group): status for event_id, group, status in found}
    await promote(session, s, left)
    # A place in a group that is limited has come free.
    await wake(session, {channel for event_id, group, channel, _ in rows if was[event_id, group] == "running"})
    return sorted(Changed(event_id, group, was[event_id, group]) for event_id, group, _, _ in rows)


_CANCEL: Final = f"""
WITH chosen AS MATERIALIZED (
  SELECT h.place FROM unnest(CAST(:ids AS bigint[]), CAST(:groups AS text[])) u(event_id, consumer_group)
  CROSS JOIN LATERAL (
    SELECT d.ctid AS place FROM {{s}}.deliveries d
    WHERE d.event_id = u.event_id AND d.consumer_group = u.consumer_group ORDER BY d.event_id LIMIT 1) h
)
UPDATE {{s}}.deliveries d
SET status = 'cancelled', worker_id = NULL, claimed_at = NULL, finished_at = clock_timestamp(), holds_key = false,
    errors = {entry("Cancelled")}
FROM chosen WHERE d.ctid = chosen.place AND d.status NOT IN ('completed', 'cancelled')
RETURNING d.event_id, d.consumer_group, d.channel, d.key"""
