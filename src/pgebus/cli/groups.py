"""`pgebus groups`, `pgebus blocked` and `pgebus routes`: who gets which events, and what holds them up.

The work is that of `pgebus.operations` and of the router; here it is shown.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Final

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import ConfigurationError, EventRouter, EventSystem, Settings, operations
from pgebus.cli.acting import BATCH, Act
from pgebus.cli.importing import imported
from pgebus.cli.messages import FAILED, MISUSED, fail
from pgebus.cli.options import Yes
from pgebus.cli.showing import look, moment, run, table, write
from pgebus.names import check_event_type
from pgebus.operations.cancelling import CANCELLABLE

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Channel = Annotated[
    str | None, typer.Option(help="Only of this channel; that of the settings where one is needed.", show_default=False)
]
Group = Annotated[str, typer.Argument(help="The consumer group.", show_default=False)]

app: Final = typer.Typer(invoke_without_command=True, no_args_is_help=False, help="List the consumer groups; or act.")


@app.callback()
def groups(context: typer.Context, channel: Channel = None, as_json: AsJson = False) -> None:
    """List the consumer groups with their patterns and deliveries, or act on one.

    A pattern in brackets was declared by no running process lately. A group
    that is not declared has deliveries only. Where to look: as for
    `pgebus migrate`.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            fail(f"--json is for the list. Leave it out with {context.invoked_subcommand!r}.", MISUSED)
        context.obj = channel
        return None
    found = look(lambda session: operations.list_groups(session, channel))
    if as_json:
        return write([asdict(each) for each in found])
    if not found:
        return typer.echo(_no_groups(channel))
    table(
        ["channel", "group", "patterns", "state", "workers", "pending", "blocked", "running", "dead", "unhandled"],
        [
            (
                each.channel,
                each.group,
                " ".join(f"[{one}]" if one in each.forgotten else one for one in each.patterns) or "-",
                _state(each),
                each.workers,
                each.pending,
                each.blocked,
                each.running,
                each.dead,
                each.unhandled,
            )
            for each in found
        ],
    )
    return None


def _no_groups(channel: str | None) -> str:
    others = look(operations.list_groups) if channel is not None else []
    if not others:
        return "There are no consumer groups: no worker has started yet."
    names = ", ".join(repr(name) for name in sorted({each.channel for each in others}))
    return f"Channel {channel!r} has no consumer groups. Channels that have: {names}."


def _state(group: operations.GroupState) -> str:
    if not group.declared:
        return "not declared"
    limit = f", at most {group.max_running}" if group.max_running else ""
    return (f"paused since {moment(group.paused_at)}" if group.paused_at else "active") + limit


@app.command()
def pause(context: typer.Context, group: Group, channel: Channel = None) -> None:
    """Let a group claim nothing more until it is resumed; what runs goes on."""
    changed = run(lambda session: operations.pause_group(session, group, _channel(context, channel)))
    typer.echo(f"Group {group!r} is paused." if changed else f"Group {group!r} was paused already.")


@app.command()
def resume(context: typer.Context, group: Group, channel: Channel = None) -> None:
    """Let a paused group claim again."""
    changed = run(lambda session: operations.resume_group(session, group, _channel(context, channel)))
    typer.echo(f"Group {group!r} is resumed." if changed else f"Group {group!r} was not paused.")


@app.command()
def limit(
    context: typer.Context,
    group: Group,
    max_running: Annotated[int, typer.Argument(help="How many deliveries at once; 0 lifts the limit.")],
    channel: Channel = None,
) -> None:
    """Limit how many deliveries of a group run at once, over all workers."""
    most = max_running or None
    run(lambda session: operations.limit_group(session, group, most, _channel(context, channel)))
    typer.echo(f"Group {group!r} runs {'without a limit' if most is None else f'at most {most} at once'}.")


@app.command()
def remove(
    context: typer.Context,
    group: Group,
    pattern: Annotated[str | None, typer.Option(help="Remove this pattern alone.", show_default=False)] = None,
    channel: Channel = None,
    yes: Yes = False,
) -> None:
    """Remove a group that no running worker serves, and cancel its deliveries."""
    if pattern is not None:
        if not run(lambda session: operations.remove_pattern(session, group, pattern, _channel(context, channel))):
            fail(f"Group {group!r} has no pattern {pattern!r}. 'pgebus groups' lists those that it has.", FAILED)
        typer.echo(f"Pattern {pattern!r} of group {group!r} is removed.")
        return
    where = _channel(context, channel)
    act = Act(
        "remove", "delivery", "deliveries", f"cancelled with group {group!r}", dry_run=False, yes=yes, as_json=False
    )
    act.ask(look(lambda session: operations.count_deliveries(session, status=CANCELLABLE, group=group, channel=where)))
    count = run(lambda session: _removed(session, group, where))
    typer.echo(f"Group {group!r} is removed; deliveries cancelled: {count}.")


async def _removed(session: AsyncSession, group: str, channel: str) -> int:
    """Remove the group, and cancel its deliveries batch by batch; return how many there were."""
    count = await operations.remove_group(session, group, channel, limit=BATCH)
    await session.commit()
    total = count
    while count == BATCH:
        try:
            count = await operations.remove_group(session, group, channel, limit=BATCH)
        except ConfigurationError:  # there were no more
            break
        await session.commit()
        total += count
    return total


def blocked(
    channel: Channel = None,
    group: Annotated[str | None, typer.Option(help="Only of this consumer group.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="How many keys, at most.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Say which keys wait, for which event, and since when."""
    found = look(lambda session: operations.blocked_keys(session, channel, group, limit))
    if as_json:
        return write([asdict(each) for each in found])
    if not found:
        return typer.echo("No key waits.")
    table(
        ["channel", "group", "key", "waiting", "for event", "which is", "since"],
        [
            (
                each.channel,
                each.group,
                each.key,
                each.waiting,
                each.head or "-",
                each.status or "nothing: the next sweep lets the first one in",
                moment(each.since),
            )
            for each in found
        ],
    )
    return None


def routes(
    where: Annotated[str, typer.Argument(help="Of a router or a system: package.module:name.", show_default=False)],
    event_type: Annotated[
        str | None, typer.Argument(help="Only what gets this event type.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which handlers get an event type, in which group, and by which path.

    Imports the program; asks no database.
    """
    router = _found(where)
    found = router.routes() if event_type is None else tuple(router.matching(check_event_type(event_type)))
    rows = [
        {
            "group": route.handler.group,
            "path": route.pattern,
            "handler": route.handler.name,
            "transactional": route.handler.transactional,
        }
        for route in found
    ]
    if as_json:
        return write(rows)
    if not rows:
        whom = "no handler" if event_type is None else f"no handler of {event_type!r}, which waits as unhandled"
        return typer.echo(f"{where} has {whom}.")
    table(
        ["group", "path", "handler", "in a transaction"],
        [(row["group"], row["path"], row["handler"], "yes" if row["transactional"] else "no") for row in rows],
    )
    return None


def _found(where: str) -> EventRouter:
    """Return the router that is meant.

    Raises:
        ConfigurationError: If there is none, or the program cannot be imported.
    """
    value = imported(where, "router")
    value = value.router if isinstance(value, EventSystem) else value
    if not isinstance(value, EventRouter):
        raise ConfigurationError(f"{where!r} is neither an EventRouter nor an EventSystem.")
    return value


def _channel(context: typer.Context, channel: str | None) -> str:
    """Return the channel that is meant: said behind the command, before it, or in the settings."""
    said = context.obj if channel is None else channel
    return Settings().event_system.channel if said is None else str(said)
