"""What a person does to consumer groups and keys: functions that take a session, and commit nothing.

So each commits together with whatever else the caller does. It runs no handler.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Text, and_, case, cast, delete, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from pgebus.errors import ConfigurationError, StateError
from pgebus.models import ConsumerGroup, Delivery, Subscription, Worker
from pgebus.names import check_channel

__all__ = [
    "BlockedKey",
    "GroupState",
    "blocked_keys",
    "limit_group",
    "list_groups",
    "pause_group",
    "remove_group",
    "remove_pattern",
    "resume_group",
]

# A running process says about once a minute what it has handlers for.
_NOT_DECLARED_MINUTES: Final = 5


@dataclass(frozen=True)
class GroupState:
    """A consumer group as the database has it.

    Attributes:
        channel: Its channel.
        group: Its name.
        patterns: What it wants.
        forgotten: Those of the patterns that no running process has declared in the last five minutes.
        paused_at: Since when it claims nothing; None when it does.
        max_running: How many of its deliveries run at once, over all workers; None without a limit.
        workers: How many running workers serve it.
        pending: Deliveries that are due or will be, those that are tried again included.
        blocked: Those that wait for another one of their key.
        running: Those that are claimed.
        dead: Dead letters.
        unhandled: Those that no worker had a handler for.
    """

    channel: str
    group: str
    patterns: tuple[str, ...]
    forgotten: tuple[str, ...]
    paused_at: datetime | None
    max_running: int | None
    workers: int
    pending: int
    blocked: int
    running: int
    dead: int
    unhandled: int


@dataclass(frozen=True)
class BlockedKey:
    """A key for which deliveries wait.

    Attributes:
        channel: Its channel.
        group: The consumer group.
        key: The key.
        waiting: How many deliveries wait.
        head: The id of the event that they wait for; None for a moment, until the next sweep.
        status: Its status: `running`, `pending` (due later, or tried again), or `dead` where that holds the key.
        since: Since when: it was claimed, is due, or died.
    """

    channel: str
    group: str
    key: str
    waiting: int
    head: int | None
    status: str | None
    since: datetime | None


async def list_groups(session: AsyncSession, channel: str | None = None) -> list[GroupState]:
    """Return the consumer groups of *channel*, or of all channels, in the order of their names.

    Counts the deliveries that are not finished, and the dead ones.
    """
    counted = {
        status: func.count().filter(Delivery.status == status).label(status)
        for status in ("pending", "blocked", "running", "dead", "unhandled")
    }
    counts = (
        select(Delivery.channel, Delivery.consumer_group, *counted.values())
        .where(Delivery.status.in_(counted))
        .group_by(Delivery.channel, Delivery.consumer_group)
        .subquery()
    )
    lately = func.now() - func.make_interval(0, 0, 0, 0, 0, _NOT_DECLARED_MINUTES)
    in_order = aggregate_order_by(Subscription.pattern, Subscription.pattern)
    patterns = (
        select(
            Subscription.channel,
            Subscription.consumer_group,
            func.array_agg(in_order).label("patterns"),
            func.array_agg(in_order).filter(Subscription.declared_at < lately).label("forgotten"),
        )
        .group_by(Subscription.channel, Subscription.consumer_group)
        .subquery()
    )
    serving = (
        select(func.count())
        .where(
            Worker.ended_at.is_(None),
            Worker.channel == ConsumerGroup.channel,
            ConsumerGroup.consumer_group == func.any(Worker.groups),
        )
        .scalar_subquery()
    )
    of_group = [ConsumerGroup.channel, ConsumerGroup.consumer_group]
    query = (
        select(
            *of_group,
            patterns.c.patterns,
            patterns.c.forgotten,
            ConsumerGroup.paused_at,
            ConsumerGroup.max_running,
            serving,
            *(func.coalesce(counts.c[status], 0) for status in counted),
        )
        .outerjoin(patterns, and_(patterns.c.channel == of_group[0], patterns.c.consumer_group == of_group[1]))
        .outerjoin(counts, and_(counts.c.channel == of_group[0], counts.c.consumer_group == of_group[1]))
        .order_by(*of_group)
    )
    if channel is not None:
        query = query.where(ConsumerGroup.channel == check_channel(channel))
    rows: list[Any] = list(await session.execute(query))
    return [GroupState(row[0], row[1], tuple(row[2] or ()), tuple(row[3] or ()), *row[4:]) for row in rows]


async def pause_group(session: AsyncSession, group: str, channel: str = "events") -> bool:
    """Let *group* claim nothing more, from the commit on and until it is resumed; what runs goes on.

    Returns:
        Whether it ran until now.

    Raises:
        ConfigurationError: If there is no such group.
    """
    return await _change(session, group, channel, ConsumerGroup.paused_at.is_(None), paused_at=func.now())


async def resume_group(session: AsyncSession, group: str, channel: str = "events") -> bool:
    """Let *group* claim again; sleeping workers are woken at the commit.

    Returns:
        Whether it was paused.

    Raises:
        ConfigurationError: If there is no such group.
    """
    resumed = await _change(session, group, channel, ConsumerGroup.paused_at.is_not(None), paused_at=None)
    if resumed:
        await _wake(session, channel)
    return resumed


async def limit_group(session: AsyncSession, group: str, max_running: int | None, channel: str = "events") -> bool:
    """Let at most *max_running* deliveries of *group* run at once, over all workers; None lifts the limit.

    Holds until a process starts whose code declares another limit.

    Returns:
        Whether that changed anything.

    Raises:
        ConfigurationError: If there is no such group, or the limit is no whole number from 1.
    """
    if max_running is not None and not (type(max_running) is int and 1 <= max_running < 2**31):
        raise ConfigurationError(f"max_running must be a whole number from 1 or None, not {max_running!r}.")
    another = ConsumerGroup.max_running.is_distinct_from(max_running)
    changed = await _change(session, group, channel, another, max_running=max_running)
    if changed:
        await _wake(session, channel)
    return changed


async def remove_group(session: AsyncSession, group: str, channel: str = "events") -> int:
    """Remove *group* with its patterns, and cancel all of its deliveries that are not completed.

    A delivery that runs is taken from its worker: it cannot be completed any more.

    Returns:
        How many deliveries were cancelled.

    Raises:
        ConfigurationError: If there is no such group.
        StateError: If a running worker serves it; it would be there again a moment later.
    """
    await _existing(session, group, channel)
    serving = select(func.count()).where(
        Worker.ended_at.is_(None), Worker.channel == channel, literal(group) == func.any(Worker.groups)
    )
    if count := (await session.scalars(serving)).one():
        raise StateError(
            f"Group {group!r} is served by {count} running worker(s). Stop them, or take its handlers away, first."
        )
    await session.execute(
        delete(ConsumerGroup).where(ConsumerGroup.channel == channel, ConsumerGroup.consumer_group == group)
    )
    cancelled: Any = await session.execute(
        update(Delivery)
        .where(
            Delivery.channel == channel,
            Delivery.consumer_group == group,
            Delivery.status.not_in(("completed", "cancelled")),
        )
        .values(
            status="cancelled", worker_id=None, claimed_at=None, finished_at=func.clock_timestamp(), holds_key=False
        )
        .execution_options(synchronize_session=False)
    )
    return int(cancelled.rowcount)


async def remove_pattern(session: AsyncSession, group: str, pattern: str, channel: str = "events") -> bool:
    """Remove one pattern of *group*: events that nothing else of it matches get no delivery of it any more.

    A running process that has a handler for it writes it down again within a minute.

    Returns:
        Whether it was there.

    Raises:
        ConfigurationError: If there is no such group.
    """
    await _existing(session, group, channel)
    removed: Any = await session.execute(
        delete(Subscription).where(
            Subscription.channel == channel, Subscription.consumer_group == group, Subscription.pattern == pattern
        )
    )
    return bool(removed.rowcount)


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
        ConfigurationError: If *limit* is less than 1.
    """
    if limit < 1:
        raise ConfigurationError(f"limit must be 1 or more, not {limit!r}.")
    of_key = [Delivery.channel, Delivery.consumer_group, Delivery.key]
    waiting = select(*of_key, func.count().label("waiting")).where(Delivery.status == "blocked").group_by(*of_key)
    if channel is not None:
        waiting = waiting.where(Delivery.channel == check_channel(channel))
    if group is not None:
        waiting = waiting.where(Delivery.consumer_group == group)
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
        (first.c.status == "pending", first.c.due_at),
        else_=first.c.finished_at,
    )
    query: Any = (
        select(*keys.c, first.c.event_id, first.c.status, since)
        .select_from(keys.outerjoin(first, literal(True)))
        .order_by(keys.c.waiting.desc(), keys.c.channel, keys.c.consumer_group, keys.c.key)
    )
    rows: list[Any] = list(await session.execute(query))
    return [BlockedKey(*row) for row in rows]


async def _existing(session: AsyncSession, group: str, channel: str) -> None:
    there = select(ConsumerGroup.consumer_group).where(
        ConsumerGroup.channel == check_channel(channel), ConsumerGroup.consumer_group == group
    )
    if (await session.scalars(there)).one_or_none() is None:
        raise ConfigurationError(
            f"Channel {channel!r} has no consumer group {group!r}. list_groups() shows which there are."
        )


async def _change(session: AsyncSession, group: str, channel: str, another: ColumnElement[bool], **values: Any) -> bool:
    """Set the values of a group where they are *another*; return whether they were."""
    await _existing(session, group, channel)
    changed: Any = await session.execute(
        update(ConsumerGroup)
        .where(ConsumerGroup.channel == channel, ConsumerGroup.consumer_group == group, another)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    return bool(changed.rowcount)


async def _wake(session: AsyncSession, channel: str) -> None:
    await session.execute(select(func.pg_notify(cast(channel, Text), "")))
