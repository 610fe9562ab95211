"""`pgebus status`: how far behind each consumer group is, once or again and again.

The numbers are those of `pgebus.operations.status`; here they are shown.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from datetime import datetime
from itertools import groupby
from typing import Annotated, Any, Final

import asyncpg
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from pgebus import DatabaseSessionManager, DatabaseSettings, Settings, operations
from pgebus.cli.durations import duration
from pgebus.cli.messages import MISUSED, database_errors_as_messages, fail, told
from pgebus.cli.showing import PATIENCE, look, plain, table

__all__ = ["status"]

_SECONDS: Final = 2.0
_TITLES: Final = ("workers", "pending", "due", "oldest", "running", "blocked", "dead", "unhandled", "per s")


def status(
    seconds: Annotated[
        float | None, typer.Argument(help="With --watch: seconds between two looks; 2.", min=0.1, show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until Ctrl-C.")] = False,
    channel: Annotated[str | None, typer.Option(help="Only of this channel.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON; with --watch a line for each look.")] = False,
) -> None:
    """Say how far behind each consumer group is: what waits, since when, and how fast it goes.

    Counts end at 10,000, which is shown as 10000+. 'per s' is what was
    completed in the last minute, or of the last 10,000 where those were
    younger. Where to look: as for `pgebus migrate`.
    """
    if seconds is not None and not watch:
        fail(f"{seconds:g} seconds between two looks are for --watch.", MISUSED)
    if not watch:
        found = look(lambda session: operations.status(session, channel))
        if as_json:
            typer.echo(json.dumps([_as_json(each) for each in found], indent=2))
        else:
            _show(found, channel)
        return
    try:
        asyncio.run(_watch(Settings().database, channel, seconds or _SECONDS, as_json))
    except KeyboardInterrupt:
        raise typer.Exit from None  # the only way to end it


async def _watch(database: DatabaseSettings, channel: str | None, seconds: float, as_json: bool) -> None:
    """Look again and again. In a terminal, an error of the database is shown until that is back; else it is the end."""
    with ExitStack() as stack:
        live: Live | None = None
        async with DatabaseSessionManager(database) as manager:
            while True:
                try:
                    # Around the question alone: a reader that leaves is an OSError too.
                    with database_errors_as_messages(database) if live is None else nullcontext():
                        async with manager.session() as session:
                            await session.execute(PATIENCE)
                            found = await operations.status(session, channel)
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError) as error:
                    _update(live, seconds, Text(told(error).partition(" [SQL:")[0], style="red"))
                else:
                    if as_json:
                        typer.echo(json.dumps([_as_json(each) for each in found]))
                    elif not sys.stdout.isatty():
                        _show(found, channel)
                        typer.echo("")
                    else:
                        live = live or stack.enter_context(Live(console=_console(), auto_refresh=False))
                        _update(live, seconds, *_tables(found, channel, live.console))
                await asyncio.sleep(seconds)


def _update(live: Live | None, seconds: float, *shown: RenderableType) -> None:
    if live is not None:
        live.update(Group(*shown, _footer(seconds)), refresh=True)


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _footer(seconds: float) -> Text:
    return Text(f"{datetime.now().astimezone():%H:%M:%S}, every {seconds:g} s; Ctrl-C ends it", style="dim")


def _show(found: Sequence[operations.GroupStatus], channel: str | None) -> None:
    if sys.stdout.isatty() or not found:
        console = _console()
        for each in _tables(found, channel, console):
            console.print(each)
        return
    table(["channel", "group", *_TITLES, "state"], [(each.channel, *_cells(each), _state(each)) for each in found])


def _tables(found: Sequence[operations.GroupStatus], channel: str | None, console: Console) -> Iterator[RenderableType]:
    """Return a table for each channel; where the terminal is too narrow for one, lines."""
    if not found:
        of = "" if channel is None else f" on channel {channel!r}"
        yield Text(f"There are no consumer groups{of}: no worker has started yet.")
    for name, groups in groupby(found, lambda each: each.channel):
        of_channel = list(groups)
        yield Text(f"channel {plain(name)}", style="bold")
        wide = _table(of_channel)
        if console.measure(wide, options=console.options.update(width=10_000)).maximum <= console.width:
            yield wide
        else:
            yield from (_lines(each) for each in of_channel)


def _table(groups: Sequence[operations.GroupStatus]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("group")
    for title in _TITLES:
        made.add_column(title, justify="right")
    if any(_state(each) for each in groups):
        made.add_column("state")
    for each in groups:
        cells = [Text(cell, style=_style(title, cell)) for title, cell in zip(_TITLES, _cells(each)[1:], strict=True)]
        made.add_row(Text(_cells(each)[0]), *cells, _state(each))
    return made


def _lines(group: operations.GroupStatus) -> Text:
    name, *cells = _cells(group)
    said = [f"{cell} {title}" for title, cell in zip(_TITLES, cells, strict=True) if cell not in ("0", "-")]
    return Text(f"{name}: {', '.join([*said, _state(group)]).rstrip(', ') or 'nothing'}")


def _style(title: str, cell: str) -> str:
    return "red" if title == "dead" and cell != "0" else "yellow" if title == "unhandled" and cell != "0" else ""


def _cells(group: operations.GroupStatus) -> tuple[str, ...]:
    def count(name: str) -> str:
        return f"{getattr(group, name)}{'+' if name in group.capped else ''}"

    return (
        plain(group.group),
        str(group.workers),
        count("pending"),
        count("due"),
        "-" if group.oldest_due is None else duration(group.oldest_due),
        *(count(name) for name in ("running", "blocked", "dead", "unhandled")),
        f"{group.per_second:.1f}",
    )


def _state(group: operations.GroupStatus) -> str:
    return "paused" if group.paused_at else "" if group.declared else "not declared"


def _as_json(group: operations.GroupStatus) -> dict[str, Any]:
    fields = asdict(group)
    oldest = fields.pop("oldest_due")
    fields["paused_at"] = None if group.paused_at is None else group.paused_at.isoformat()
    return {**fields, "oldest_due_seconds": None if oldest is None else oldest.total_seconds()}
