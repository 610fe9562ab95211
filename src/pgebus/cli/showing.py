"""What the commands have in common: work in a session, tables for people, JSON for programs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from typing import Final, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus import DatabaseSessionManager, Settings
from pgebus.cli.messages import database_errors_as_messages

_T = TypeVar("_T")

# How long a command that reads waits for somebody who has locked a table, as for a migration.
PATIENCE: Final = text("SET LOCAL lock_timeout = '3s'")


def run(what: Callable[[AsyncSession], Awaitable[_T]]) -> _T:
    """Do *what* in a session on the database of the settings, and commit."""
    database = Settings().database

    async def work() -> _T:
        async with DatabaseSessionManager(database) as manager, manager.session() as session:
            done = await what(session)
            await session.commit()
            return done

    with database_errors_as_messages(database):
        return asyncio.run(work())


def look(what: Callable[[AsyncSession], Awaitable[_T]]) -> _T:
    """Do *what*, which only reads, in a session as `run()` does, and wait for no table that is locked for long."""

    async def work(session: AsyncSession) -> _T:
        await session.execute(PATIENCE)
        return await what(session)

    return run(work)


def moment(when: datetime | None) -> str:
    """Return a moment in the time zone of whoever reads it."""
    return "-" if when is None else f"{when.astimezone():%Y-%m-%d %H:%M:%S}"


def write(found: object) -> None:
    """Write JSON."""
    typer.echo(json.dumps(found, indent=2, default=lambda value: value.isoformat()))


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows under titles; in a terminal that is too narrow for them, a sentence for each row.

    Nothing is ever cut off: the next command needs the ids and the names.
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        console = Console(highlight=False, markup=False)
        for each in fitting(titles, cells, console):
            console.print(each)
        return
    # Piped into a file or another program, a line is as long as it has to be, and there may be thousands.
    lines = [list(titles), *cells]
    widths = [max(cell_len(row[place]) for row in lines) for place in range(len(titles))]
    for row in lines:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


def fitting(titles: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> Iterator[RenderableType]:
    """Yield a table, or what says the same where *console* is too narrow for one."""
    made = Table(*titles, box=None, pad_edge=False)
    for row in cells:
        made.add_row(*map(Text, row))
    if console.measure(made, options=console.options.update(width=10_000)).maximum <= console.width:
        yield made
        return
    for row in cells:
        said = [f"{title} {cell}" for title, cell in zip(titles, row, strict=True) if cell != "-"]
        yield Text(", ".join(said), overflow="fold")


def plain(value: object) -> str:
    """Return it as text in one line, that moves no cursor: keys and messages come from anywhere."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(value))
