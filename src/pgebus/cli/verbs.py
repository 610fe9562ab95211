"""`pgebus redrive`, `replay`, `cancel`, `release-key`, `prune` and `purge`: what changes deliveries and events.

Each says first how many there are, and asks. The work is that of `pgebus.operations`, batch by batch, each in a
transaction of its own; what is done when a command is interrupted stays done, and the rest is done by the next one.
"""

from __future__ import annotations

import getpass
from datetime import datetime
from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import Settings, operations
from pgebus.cli.acting import Act
from pgebus.cli.deliveries import clock_of
from pgebus.cli.messages import FAILED, fail
from pgebus.cli.options import (
    AsJson,
    By,
    CreatedAfter,
    CreatedBefore,
    DryRun,
    EventIds,
    FinishedAfter,
    FinishedBefore,
    OfChannel,
    OfGroup,
    OfKey,
    OfType,
    Reason,
    Yes,
    age_of,
    moment_of,
)
from pgebus.cli.showing import look
from pgebus.operations.cancelling import CANCELLABLE
from pgebus.operations.pruning import count_prunable
from pgebus.operations.purging import count_purgeable
from pgebus.operations.redriving import count_replayable
from pgebus.operations.selection import Selection, check_statuses

__all__ = ["cancel", "prune", "purge", "redrive", "release_key", "replay"]


def redrive(
    event_ids: EventIds = None,
    group: OfGroup = None,
    channel: OfChannel = None,
    event_type: OfType = None,
    key: OfKey = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    finished_after: FinishedAfter = None,
    finished_before: FinishedBefore = None,
    reason: Reason = None,
    by: By = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Put dead letters back, with all of their attempts.

    Without a filter, all of them. Handlers that had succeeded are not called
    again.
    """
    filters = _filters(
        event_ids, group, channel, event_type, key, created_after, created_before, finished_after, finished_before
    )
    # What dies again meanwhile is not redriven once more: it would stand before the others, batch after batch.
    filters["finished_before"] = filters["finished_before"] or look(clock_of)
    act = Act("redrive", "dead letter", "dead letters", "redriven", dry_run=dry_run, yes=yes, as_json=as_json)
    act.ask(look(lambda session: operations.count_deliveries(session, status="dead", **filters)))
    act.do(
        lambda session, _done, limit: operations.redrive(
            session, limit=limit, reason=reason, by=by or _user(), **filters
        )
    )


def replay(
    group: Annotated[str, typer.Argument(help="The consumer group.", show_default=False)],
    event_ids: EventIds = None,
    channel: OfChannel = None,
    event_type: OfType = None,
    key: OfKey = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    finished_after: FinishedAfter = None,
    finished_before: FinishedBefore = None,
    missing: Annotated[
        bool, typer.Option("--missing/--no-missing", help="Also events that the group has no delivery of.")
    ] = True,
    reason: Reason = None,
    by: By = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Have a group handle events again that it has finished.

    All of their handlers are called, also those that had succeeded. Without
    --channel, in the channel of the settings.
    """
    filters = _filters(
        event_ids, None, None, event_type, key, created_after, created_before, finished_after, finished_before
    )
    where = Settings().event_system.channel if channel is None else channel
    # What is completed meanwhile is not replayed once more.
    filters["finished_before"] = filters["finished_before"] or look(clock_of)
    act = Act("replay", "event", "events", f"replayed for group {group!r}", dry_run=dry_run, yes=yes, as_json=as_json)
    act.ask(look(lambda session: count_replayable(session, group, where, missing=missing, **filters)))
    act.do(
        lambda session, done, limit: operations.replay(
            session,
            group,
            where,
            after=done[-1].event_id if done else 0,
            missing=missing,
            limit=limit,
            reason=reason,
            by=by or _user(),
            **filters,
        )
    )


def cancel(
    event_ids: EventIds = None,
    status: Annotated[
        list[str] | None,
        typer.Option(help=f"Only of this status: {', '.join(CANCELLABLE)}.", show_default=False),
    ] = None,
    group: OfGroup = None,
    channel: OfChannel = None,
    event_type: OfType = None,
    key: OfKey = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    reason: Reason = None,
    by: By = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Cancel deliveries that are not completed; needs a filter.

    One that runs is taken from its worker: its handlers are not interrupted,
    but nothing that they write through ctx.session is committed.
    """
    filters = _filters(event_ids, group, channel, event_type, key, created_after, created_before, None, None)
    act = Act("cancel", "delivery", "deliveries", "cancelled", dry_run=dry_run, yes=yes, as_json=as_json)

    statuses = check_statuses(status or None, CANCELLABLE)
    if not status:
        Selection.of(filters).refuse_everything("cancel")
    filters["created_before"] = _until_now(filters)
    act.ask(look(lambda session: operations.count_deliveries(session, status=statuses, **filters)))
    act.do(
        lambda session, _done, limit: operations.cancel(
            session, status=statuses, limit=limit, reason=reason, by=by or _user(), **filters
        )
    )


def release_key(
    group: Annotated[str, typer.Argument(help="The consumer group.", show_default=False)],
    key: Annotated[str, typer.Argument(help="The key.", show_default=False)],
    channel: OfChannel = None,
    reason: Reason = None,
    by: By = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let go of a key that a dead letter or an unhandled delivery holds.

    They stay what they are; the next of the key starts. `pgebus blocked`
    lists the keys. Without --channel, in the channel of the settings.
    """
    where = Settings().event_system.channel if channel is None else channel
    act = Act(
        "release-key",
        "delivery",
        "deliveries",
        f"made to let go of key {key!r}",
        dry_run=False,
        yes=yes,
        as_json=as_json,
    )

    async def count(session: AsyncSession) -> int:
        held = await operations.release_key(session, group, key, where, reason=reason, by=by)
        await session.rollback()
        return len(held)

    act.ask(look(count))
    act.do(
        lambda session, _done, _limit: operations.release_key(
            session, group, key, where, reason=reason, by=by or _user()
        ),
        once=True,
    )


def prune(
    older_than: Annotated[str, typer.Option(help="Finished so long ago: 90s, 30m, 2h, 7d, 4w.", show_default=False)],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete events that every group has completed or cancelled long ago.

    Workers do so by themselves after the retention of their settings.
    """
    age = age_of(older_than)
    act = Act("prune", "event", "events", "deleted", dry_run=dry_run, yes=yes, as_json=as_json)
    act.ask(look(lambda session: count_prunable(session, age)))

    async def batch(session: AsyncSession, _done: list[Any], limit: int) -> list[Any]:
        return [None] * await operations.prune(session, age, limit=limit)

    act.do(batch, short="had changed meanwhile, are locked, or are kept by a table or a trigger of yours")


def purge(
    event_ids: EventIds = None,
    channel: OfChannel = None,
    event_type: OfType = None,
    key: OfKey = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Erase the payload of finished events, their headers and the texts of their errors.

    Needs a filter. Exit status 1 also where events are left, because they
    are still to be handled: cancel those first. Your own columns stay.
    """
    filters = _filters(event_ids, None, channel, event_type, key, created_after, created_before, None, None)
    which = {
        name: value for name, value in filters.items() if name not in ("group", "finished_after", "finished_before")
    }
    act = Act("purge", "event", "events", "emptied", dry_run=dry_run, yes=yes, as_json=as_json)
    Selection.of(which).refuse_everything("purge")
    which["created_before"] = _until_now(which)
    finished, unfinished = look(lambda session: count_purgeable(session, **which))
    act.ask(finished)

    async def batch(session: AsyncSession, _done: list[Any], limit: int) -> list[Any]:
        return list((await operations.purge_payload(session, limit=limit, **which)).event_ids)

    act.do(batch)
    if unfinished:
        fail(f"Left, because they are still to be handled: {unfinished} events. Cancel them, and purge again.", FAILED)


def _filters(
    event_ids: list[int] | None,
    group: str | None,
    channel: str | None,
    event_type: str | None,
    key: str | None,
    created_after: str | None,
    created_before: str | None,
    finished_after: str | None,
    finished_before: str | None,
) -> dict[str, Any]:
    """Return the filters that are meant; the database's clock is asked where an age is given."""
    moments = {
        "created_after": created_after,
        "created_before": created_before,
        "finished_after": finished_after,
        "finished_before": finished_before,
    }
    given = [each for each in moments.values() if each is not None]
    clock = look(clock_of) if given else None
    return {
        "event_ids": event_ids or None,
        "event_type": event_type,
        "key": key,
        **({} if group is None else {"group": group}),
        **({} if channel is None else {"channel": channel}),
        **{name: None if clock is None else moment_of(value, clock) for name, value in moments.items()},
    }


def _until_now(filters: dict[str, Any]) -> datetime:
    """Return before when what is meant was published: nobody was asked about what comes after that."""
    clock = look(clock_of)
    given: datetime | None = filters["created_before"]
    return clock if given is None else min(given, clock)


def _user() -> str | None:
    """Return who is at the keyboard, as the operating system knows; None leaves it to the role of the database."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None
