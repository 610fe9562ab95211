"""Consumer groups: listed, paused, resumed, limited and removed.

It runs no handler, and commits nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    ScalarSelect,
    Subquery,
    Text,
    and_,
    cast,
    column,
    delete,
    func,
    literal,
    or_,
    select,
    table,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.errors import ConfigurationError, StateError
from pgebus.groups import check_group_name
from pgebus.models import BEAT_ABSENT_SECONDS, ConsumerGroup, Delivery, Subscription, Worker
from pgebus.names import check_channel
from pgebus.patterns import check_pattern

__all__ = [
    "GroupState",
    "limit_group",
    "list_groups",
    "pause_group",
    "remove_group",
    "remove_pattern",
    "resume_group",
]

# A running process says about once a minute what it has handlers for.
_NOT_DECLARED_MINUTES: Final = 5

# What is not over, or may yet be put back to pending; in the order of the fields. Each has an index of its own.
_UNFINISHED: Final = ("pending", "blocked", "running", "dead", "unhandled")


@dataclass(frozen=True)
class GroupState:
    """A consumer group as the database has it.

    Attributes:
        channel: Its channel.
        group: Its name.
        declared: Whether a process has declared it, and nobody has removed it since. False where there are only
            deliveries in its name: of a publisher that was under way when it was removed, or of `default`, unhandled.
        patterns: What it wants.
        forgotten: Those of the patterns that no running process has declared in the last five minutes.
        paused_at: Since when it claims nothing; None when it does.
        max_running: How many of its deliveries run at once, over all workers; None without a limit.
        workers: How many workers that are alive serve it.
        pending: Deliveries that are due or will be, those that are tried again included.
        blocked: Those that wait for another one of their key.
        running: Those that are claimed.
        dead: Dead letters.
        unhandled: Those that no worker had a handler for.
    """

    channel: str
    group: str
    declared: bool
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


async def list_groups(session: AsyncSession, channel: str | None = None) -> list[GroupState]:
    """Return the consumer groups of *channel*, or of all channels, in the order of their names.

    Also those that are gone, or were never declared, and have deliveries all the same. Counts the deliveries that are
    not finished, and the dead ones.
    """
    of_channel = None if channel is None else check_channel(channel)
    counts = _counts(of_channel)
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
    declared = [ConsumerGroup.channel, ConsumerGroup.consumer_group]
    of_group = [func.coalesce(declared[0], counts.c.channel), func.coalesce(declared[1], counts.c.consumer_group)]
    query = (
        select(
            *of_group,
            ConsumerGroup.consumer_group.is_not(None),
            patterns.c.patterns,
            patterns.c.forgotten,
            ConsumerGroup.paused_at,
            ConsumerGroup.max_running,
            _alive(*of_group),
            *(func.coalesce(counts.c[status], 0) for status in _UNFINISHED),
        )
        .outerjoin_from(
            ConsumerGroup,
            counts,
            and_(counts.c.channel == declared[0], counts.c.consumer_group == declared[1]),
            full=True,
        )
        .outerjoin(patterns, and_(patterns.c.channel == declared[0], patterns.c.consumer_group == declared[1]))
        .order_by(*of_group)
    )
    if of_channel is not None:
        query = query.where(of_group[0] == of_channel)
    rows: list[Any] = list(await session.execute(query))
    return [GroupState(row[0], row[1], row[2], tuple(row[3] or ()), tuple(row[4] or ()), *row[5:]) for row in rows]


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


async def remove_group(session: AsyncSession, group: str, channel: str = "events", *, limit: int | None = None) -> int:
    """Remove *group* with its patterns, and cancel all of its deliveries that are not completed.

    A delivery that runs is taken from its worker: it cannot be completed any more. Where the group itself is gone
    already, what is left of its deliveries is cancelled. It waits for rows that somebody has locked.

    Args:
        session: Its transaction is yours to commit.
        group: The consumer group.
        channel: Its channel.
        limit: How many deliveries are cancelled, at most; None for all of them. Where as many were, call again, after
            the commit: there may be more.

    Returns:
        How many deliveries were cancelled.

    Raises:
        ConfigurationError: If there is neither such a group nor an unfinished delivery of it, or *limit* is no whole
            number from 1.
        StateError: If a worker that is alive serves it; or if one of the channel is alive, and a pattern of the group
            was declared in the last five minutes. It would be there again a moment later.
    """
    check_channel(channel)
    check_group_name(group)
    if limit is not None and not (type(limit) is int and 1 <= limit < 2**63):
        raise ConfigurationError(f"limit must be a whole number from 1 to {2**63 - 1}, or None, not {limit!r}.")
    served = select(_alive(literal(channel), literal(group)))
    if count := (await session.scalars(served)).one():
        raise StateError(
            f"Group {group!r} is served by {count} running worker(s). Stop them, or take its handlers away, first."
        )
    await _refuse_declared(session, group, channel)
    removed: Any = await session.execute(
        delete(ConsumerGroup).where(ConsumerGroup.channel == channel, ConsumerGroup.consumer_group == group)
    )
    # Not IN: only so is the index of each of them used.
    theirs = Delivery.channel == channel, Delivery.consumer_group == group, or_(*map(_has, _UNFINISHED))
    some = select(Delivery.event_id).where(*theirs).limit(limit)
    cancelled: Any = await session.execute(
        update(Delivery)
        .where(*theirs, *([] if limit is None else [Delivery.event_id.in_(some)]))
        # The transaction's clock: so a group that is declared again is younger than what its removal has cancelled.
        .values(status="cancelled", worker_id=None, claimed_at=None, finished_at=func.now(), holds_key=False)
        .execution_options(synchronize_session=False)
    )
    if not (removed.rowcount or cancelled.rowcount):
        raise _missing(group, channel)
    return int(cancelled.rowcount)


async def remove_pattern(session: AsyncSession, group: str, pattern: str, channel: str = "events") -> bool:
    """Remove one pattern of *group*: events that nothing else of it matches get no delivery of it any more.

    Returns:
        Whether it was there.

    Raises:
        ConfigurationError: If there is no such group, or the pattern is none.
        StateError: If a worker of the channel is alive, and the pattern was declared in the last five minutes. It would
            be there again a moment later, and the group would miss what is published until then.
    """
    check_pattern(pattern, what="Pattern")
    await require_group(session, group, channel)
    await _refuse_declared(session, group, channel, Subscription.pattern == pattern)
    removed: Any = await session.execute(
        delete(Subscription).where(
            Subscription.channel == channel, Subscription.consumer_group == group, Subscription.pattern == pattern
        )
    )
    return bool(removed.rowcount)


def _has(status: str) -> ColumnElement[bool]:
    """Return the condition, with the status in the text: a parameter would hide the partial index from the planner."""
    return Delivery.status == literal(status, literal_execute=True)


def _counts(channel: str | None) -> Subquery:
    """Return a row for each group that has unfinished deliveries, with how many of each status.

    One index after the other, so that the history costs nothing.
    """
    parts = [
        select(
            Delivery.channel,
            Delivery.consumer_group,
            literal(status, Text, literal_execute=True).label("status"),
            func.count().label("count"),
        )
        .where(_has(status), *(() if channel is None else (Delivery.channel == channel,)))
        .group_by(Delivery.channel, Delivery.consumer_group)
        for status in _UNFINISHED
    ]
    each = union_all(*parts).subquery()
    return (
        select(
            each.c.channel,
            each.c.consumer_group,
            *(func.max(each.c.count).filter(each.c.status == status).label(status) for status in _UNFINISHED),
        )
        .group_by(each.c.channel, each.c.consumer_group)
        .subquery()
    )


def _alive(channel: ColumnElement[str], group: ColumnElement[str] | None = None) -> ScalarSelect[int]:
    """Return how many workers of a channel, or of a group of it, are alive: their lock is held, or they beat.

    `ended_at` alone would count for ever those that were killed, when nobody is left to notice.
    """
    locks = table(
        "pg_locks",
        *(column(name) for name in ("locktype", "database", "classid", "objid", "objsubid", "granted")),
        schema="pg_catalog",
    )
    databases = table("pg_database", column("oid"), column("datname"), schema="pg_catalog")
    here = select(databases.c.oid).where(databases.c.datname == func.current_database()).scalar_subquery()
    # The halves of the 64-bit key.
    key = cast(locks.c.classid, BigInteger).op("<<")(literal(32, Integer)).op("|")(cast(locks.c.objid, BigInteger))
    held = select(key).where(
        locks.c.locktype == "advisory", locks.c.objsubid == 1, locks.c.granted, locks.c.database == here
    )
    silent = func.extract("epoch", func.clock_timestamp() - Worker.beat_at)
    beats = and_(Worker.backend_pid.is_(None), silent < BEAT_ABSENT_SECONDS)
    alive = select(func.count()).where(
        Worker.ended_at.is_(None), Worker.channel == channel, or_(Worker.id.in_(held), beats)
    )
    if group is not None:
        alive = alive.where(group == func.any(Worker.groups))
    return alive.scalar_subquery()


async def _refuse_declared(session: AsyncSession, group: str, channel: str, *which: ColumnElement[bool]) -> None:
    """Refuse what a process has declared lately, and may be about to declare again.

    Whoever serves other groups only declares this one all the same, so any worker of the channel counts. Locks the
    patterns: nobody declares them between this look and the removal.

    Raises:
        StateError: If so.
    """
    age = func.extract("epoch", func.clock_timestamp() - Subscription.declared_at)
    declared = (
        select(Subscription.pattern, age)
        .where(Subscription.channel == channel, Subscription.consumer_group == group, *which)
        .order_by(Subscription.pattern)
        .with_for_update()
    )
    lately = [(float(seconds), pattern) for pattern, seconds in await session.execute(declared)]
    seconds, pattern = min(lately, default=(math.inf, ""))
    if seconds >= 60 * _NOT_DECLARED_MINUTES:
        return
    if count := (await session.scalars(select(_alive(literal(channel))))).one():
        raise StateError(
            f"Pattern {pattern!r} of group {group!r} was declared {max(0, int(seconds))} s ago, and {count} worker(s) "
            f"of channel {channel!r} are running. Stop those that have a handler for it, or deploy them without it. "
            f"While others run, it can be removed {_NOT_DECLARED_MINUTES} minutes after its last declaration."
        )


def _missing(group: str, channel: str) -> ConfigurationError:
    return ConfigurationError(
        f"Channel {channel!r} has no consumer group {group!r}. 'pgebus groups', or list_groups(), shows which there "
        "are."
    )


async def require_group(session: AsyncSession, group: str, channel: str) -> None:
    """Refuse a group that is not there.

    Raises:
        ConfigurationError: If so, or if a name cannot be one.
    """
    there = select(ConsumerGroup.consumer_group).where(
        ConsumerGroup.channel == check_channel(channel), ConsumerGroup.consumer_group == check_group_name(group)
    )
    if (await session.scalars(there)).one_or_none() is None:
        raise _missing(group, channel)


async def _change(session: AsyncSession, group: str, channel: str, another: ColumnElement[bool], **values: Any) -> bool:
    """Set the values of a group where they are *another*; return whether they were."""
    await require_group(session, group, channel)
    changed: Any = await session.execute(
        update(ConsumerGroup)
        .where(ConsumerGroup.channel == channel, ConsumerGroup.consumer_group == group, another)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    return bool(changed.rowcount)


async def _wake(session: AsyncSession, channel: str) -> None:
    await session.execute(select(func.pg_notify(cast(channel, Text), "")))
