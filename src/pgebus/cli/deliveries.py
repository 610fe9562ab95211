"""`pgebus deliveries` and `pgebus show`: what became of events.

The work is that of `pgebus.operations`; here it is shown.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import ConfigurationError, operations
from pgebus.cli.messages import FAILED, fail
from pgebus.cli.options import (
    AsJson,
    CreatedAfter,
    CreatedBefore,
    EventIds,
    FinishedAfter,
    FinishedBefore,
    OfChannel,
    OfGroup,
    OfKey,
    OfType,
    moment_of,
)
from pgebus.cli.showing import look, moment, plain, table, write
from pgebus.operations import DeliveryState, EventState

__all__ = ["deliveries", "show"]


def deliveries(
    event_ids: EventIds = None,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Only of this status; may be given several times.", show_default=False),
    ] = None,
    group: OfGroup = None,
    channel: OfChannel = None,
    event_type: OfType = None,
    key: OfKey = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    finished_after: FinishedAfter = None,
    finished_before: FinishedBefore = None,
    after: Annotated[
        str | None,
        typer.Option(help="Only what follows this one, EVENT_ID:GROUP: the last of the page before."),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many, at most; up to 10,000.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List deliveries, those of the newest events first.

    Statuses: pending, blocked, running, unhandled, completed, dead,
    cancelled. Where to look: as for `pgebus migrate`.
    """

    async def find(session: AsyncSession) -> list[DeliveryState]:
        clock = await clock_of(session)
        return await operations.list_deliveries(
            session,
            status=status or None,
            after=_cursor(after),
            limit=limit,
            group=group,
            channel=channel,
            event_type=event_type,
            key=key,
            event_ids=event_ids or None,
            created_after=moment_of(created_after, clock),
            created_before=moment_of(created_before, clock),
            finished_after=moment_of(finished_after, clock),
            finished_before=moment_of(finished_before, clock),
        )

    found = look(find)
    if as_json:
        return write([asdict(each) for each in found])
    if not found:
        return typer.echo("There are no such deliveries.")
    table(
        ["event", "group", "type", "key", "status", "attempt", "round", "since", "error"],
        [
            (
                each.event_id,
                each.group,
                each.type,
                each.key or "-",
                each.status,
                each.attempt,
                each.round,
                moment(since(each)),
                _shortened(_last_error(each), 60),
            )
            for each in found
        ],
    )
    if len(found) == limit:
        typer.echo(f"There may be more: --after {found[-1].event_id}:{found[-1].group}", err=True)
    return None


def show(
    event_id: Annotated[int, typer.Argument(help="The event.", show_default=False)], as_json: AsJson = False
) -> None:
    """Show an event with its payload, its deliveries and their errors.

    Exit status 1 where there is no such event.
    """
    found = look(lambda session: operations.show_event(session, event_id))
    if found is None:
        fail(f"There is no event {event_id}: it was never committed, or it was pruned.", FAILED)
    if as_json:
        return write(asdict(found))
    for line in _lines(found):
        typer.echo(line)
    return None


def _lines(event: EventState) -> list[str]:
    said: list[tuple[str, object]] = [
        ("channel", event.channel),
        ("key", event.key),
        ("dedup_key", event.dedup_key),
        ("priority", event.priority or None),
        ("created", moment(event.created_at)),
        ("run at", moment(event.run_at) if event.run_at != event.created_at else None),
        ("headers", _json(event.headers)),
        ("payload", _json(event.payload)),
    ]
    lines = [f"event {event.id}: {plain(event.type)}"]
    lines += [f"  {name:<10} {plain(value)}" for name, value in said if value is not None]
    for each in event.deliveries:
        counts = f"attempt {each.attempt}, round {each.round}" + (f", lost {each.lost}" if each.lost else "")
        holds = ", holds its key" if each.holds_key else ""
        lines.append(f"{plain(each.group)}: {each.status} since {moment(since(each))}, {counts}{holds}")
        if each.handled:
            lines.append(f"  succeeded  {plain(', '.join(each.handled))}")
        for error in each.errors:
            at = str(error.get("at"))
            whose = f" in {error['handler']}" if error.get("handler") else ""
            lines.append(
                f"  {plain(_local(at))}  {plain(error.get('type'))}{plain(whose)}: {plain(error.get('message'))}"
            )
            lines += [f"    {plain(line)}" for line in str(error.get("traceback") or "").splitlines()]
    return lines


def since(delivery: DeliveryState) -> datetime | None:
    """Return since when it is as it is: finished, claimed, or due."""
    return delivery.finished_at or delivery.claimed_at or delivery.due_at


def _last_error(delivery: DeliveryState) -> str:
    if not delivery.errors:
        return "-"
    last = delivery.errors[-1]
    return f"{last.get('type')}: {last.get('message')}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _local(at: str) -> str:
    try:
        return moment(datetime.fromisoformat(at))
    except (ValueError, OverflowError):
        return at


def _json(value: object) -> str | None:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cursor(after: str | None) -> tuple[int, str] | None:
    if after is None:
        return None
    event_id, _, group = after.partition(":")
    if not (event_id.isascii() and event_id.isdigit() and group):
        raise ConfigurationError(f"{after!r} is no place in a list. Write EVENT_ID:GROUP, like 7:default.")
    return int(event_id), group


async def clock_of(session: AsyncSession) -> datetime:
    """Return the time of the database's clock."""
    clock: datetime = (await session.execute(text("SELECT clock_timestamp()"))).scalar_one()
    return clock
