"""Keys: which ones wait and for what, and how one is let go.

It runs no handler, and commits nothing.
"""

# ruff: noqa: S608 - the only thing ever filled in is a quoted identifier and text of this package

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import case, func, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from pgebus.errors import ConfigurationError
from pgebus.groups import check_group_name
from pgebus.models import Delivery
from pgebus.names import check_channel
from pgebus.operations._statements import entry, fetch, promote, schema_of, told, wake
from pgebus.operations.selection import Changed, Selection

__all__ = ["BlockedKey", "blocked_keys", "release_key"]


@dataclass(frozen=True)
class BlockedKey:
    """A key for which deliveries wait.

    Attributes:
        channel: Its channel.
        group: The consumer group.
        key: The key.
        waiting: How many deliveries wait.
        head: The id of the event that they wait for; None for a moment, until the next sweep.
        status: Its status: `running`, `pending` (due later, or tried again), or `dead` or `unhandled` where that holds
            the key.
        since: Since when: it was claimed, is due, or died.
    """

    channel: str
    group: str
    key: str
    waiting: int
    head: int | None
    status: str | None
    since: datetime | None


async def blocked_keys(
    session: AsyncSession, channel: str | None = None, group: str | None = None, limit: int = 100
) -> list[BlockedKey]:
    """Return the keys for which deliveries wait, those with most of them first.

    Args:
        session: Nothing is written.
        channel: Only of this channel.
        group: Only of this consumer group.
        limit: How many, at most; from 1.

    Raises:
        ConfigurationError: If *limit* is no whole number from 1, or a name cannot be one.
    """
    if not (type(limit) is int and 1 <= limit < 2**63):
        raise ConfigurationError(f"limit must be a whole number from 1 to {2**63 - 1}, not {limit!r}.")
    of_key = [Delivery.channel, Delivery.consumer_group, Delivery.key]
    waiting = select(*of_key, func.count().label("waiting")).where(Delivery.status == "blocked").group_by(*of_key)
    if channel is not None:
        waiting = waiting.where(Delivery.channel == check_channel(channel))
    if group is not None:
        waiting = waiting.where(Delivery.consumer_group == check_group_name(group))
    keys = waiting.order_by(func.count().desc(), *of_key).limit(limit).subquery()
    head = aliased(Delivery)
    first: Any = (
        select(head)
        .where(
            head.channel == keys.c.channel,
            head.consumer_group == keys.c.consumer_group,
            head.key == keys.c.key,
            or_(head.status.in_(("pending", "running")), head.holds_key),
        )
        .order_by(head.event_id)
        .limit(1)
        .lateral()
    )
    since = case(
        (first.c.status == "running", first.c.claimed_at),
        (first.c.status.in_(("pending", "unhandled")), first.c.due_at),
        else_=first.c.finished_at,
    )
    query: Any = (
        select(*keys.c, first.c.event_id, first.c.status, since)
        .select_from(keys.outerjoin(first, literal(True)))
        .order_by(keys.c.waiting.desc(), keys.c.channel, keys.c.consumer_group, keys.c.key)
    )
    rows: list[Any] = list(await session.execute(query))
    return [BlockedKey(*row) for row in rows]


async def release_key(
    session: AsyncSession,
    group: str,
    key: str,
    channel: str = "events",
    *,
    reason: str | None = None,
    by: str | None = None,
) -> list[Changed]:
    """Let what holds *key* without being handled let go of it: dead letters and unhandled deliveries of the group.

    They stay what they are, and can be redriven, or be handled by a worker that knows them, later: out of order then.
    The next delivery of the key starts at the commit; sleeping workers are woken. One that is pending (tried again, or
    for later) or running is at work on the key, and does not let go: cancel() it, or wait.

    An entry `Released` is added to the errors. Done again it finds nothing. A row that somebody has locked is passed
    over.

    Args:
        session: Its transaction is yours to commit.
        group: The consumer group.
        key: The key; blocked_keys() shows which ones wait, and for what.
        channel: The channel of the group.
        reason: Why; kept in the entry.
        by: Who; the role of the database unless given.

    Returns:
        The deliveries that have let go, at most 10,000; `was` is their status, which they keep.

    Raises:
        ConfigurationError: If an argument is none of its kind; nothing was sent.
    """
    values = Selection.of({"channel": check_channel(channel), "group": check_group_name(group), "key": key}).values
    if "key" not in values:
        raise ConfigurationError("key must be text of 1 to 255 bytes, not None.")
    said = told(by, reason)
    s = await schema_of(session)
    rows = await fetch(session, _RELEASE.replace("{s}", s), **values, **said)
    # Also when nothing has let go: the key may have been left to the next sweep.
    await promote(session, s, [(channel, group, key)])
    if rows:
        await wake(session, [channel])
    return sorted(Changed(*row) for row in rows)


_RELEASE: Final = f"""
WITH holders AS MATERIALIZED (
  SELECT d.ctid AS place FROM {{s}}.deliveries d
  WHERE d.key IS NOT NULL AND d.holds_key AND d.status IN ('dead', 'unhandled')
    AND d.channel = CAST(:channel AS text) AND d.consumer_group = CAST(:group AS text) AND d.key = CAST(:key AS text)
  ORDER BY d.event_id LIMIT 10000 FOR UPDATE SKIP LOCKED
)
UPDATE {{s}}.deliveries d SET holds_key = false, errors = {entry("Released")}
FROM holders WHERE d.ctid = holders.place
RETURNING d.event_id, d.consumer_group, d.status"""
