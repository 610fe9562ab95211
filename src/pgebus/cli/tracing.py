"""`pgebus trace`: what an event was caused by, what it has caused, and what became of each.

The tree is that of `pgebus.operations.trace`; here it is shown.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from pgebus import operations
from pgebus.cli.durations import duration
from pgebus.cli.messages import FAILED, fail
from pgebus.cli.showing import look, moment, plain, write

__all__ = ["trace"]

# Deeper, the lines would run out of the terminal: what is below stands beside it.
_DEEPEST: Final = 12


def trace(
    event_id: Annotated[int, typer.Argument(help="An event of the tree.", min=1, show_default=False)],
    limit: Annotated[int, typer.Option(help="How many events at most.", min=1, max=10_000)] = 200,
    within: Annotated[int, typer.Option(help="How many ids after an event are searched for what it caused.", min=1)] = (
        100_000
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show what an event was caused by, what it has caused, and what became of each.

    For a delivery that is finished, only the whole time is known, from when
    it was due to its end: when it was claimed is stored while it runs.
    Where to look: as for `pgebus migrate`.
    """
    found = look(lambda session: operations.trace(session, event_id, limit=limit, within=within))
    if found is None:
        fail(f"There is no event {event_id}.", FAILED)
    if as_json:
        return write(_in_seconds(asdict(found)))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
    if found.caused_by is not None:
        console.print(f"caused by {plain(found.caused_by)}, which is gone, or of another correlation")
    console.print(_tree(found))
    if found.more:
        console.print(f"There are more events of correlation {plain(found.correlation_id)}: raise --limit.")
    if found.searched_to is not None:
        console.print(f"Searched up to event {found.searched_to}, and there are later ones: raise --within.")
    return None


def _tree(found: operations.Trace) -> Tree:
    root, *others = found.events
    tree = _with_deliveries(Tree(_title(root, found)), root, found.at)
    line = [tree]  # the branch of each depth above the event at hand
    for event in others:
        depth = min(event.depth, _DEEPEST)
        del line[depth:]
        line.append(_with_deliveries(line[depth - 1].add(_title(event, found)), event, found.at))
    return tree


def _title(event: operations.TracedEvent, found: operations.Trace) -> Text:
    root = found.events[0]
    title = Text(f"event {event.id}: {event.type}", style="bold" if event.id == found.event_id else "")
    if event.depth == 0:
        title.append(f", {moment(event.created_at)}", style="not bold")
    elif event.created_at is not None and root.created_at is not None:
        title.append(f", {duration(event.created_at - root.created_at)} later", style="not bold")
    if event.depth == 1 and event.cause != root.id:
        title.append(f", of event {event.cause}, which is gone", style="not bold")
    elif event.depth > _DEEPEST:
        title.append(f", of event {event.cause}", style="not bold")
    if event.id == found.event_id and event.depth:
        title.append(", asked for")
    return title


def _with_deliveries(tree: Tree, event: operations.TracedEvent, at: datetime) -> Tree:
    for delivery in event.deliveries:
        tree.add(Text(_said(delivery, at), style="red" if delivery.status == "dead" else ""))
    if not event.deliveries:
        tree.add(Text("no deliveries"))
    return tree


def _said(delivery: operations.TracedDelivery, at: datetime) -> str:
    """Return what became of it in one line."""
    parts = [f"{plain(delivery.group)}: {delivery.status}"]
    if delivery.ran is not None:
        parts[0] += f" for {duration(delivery.ran)}"
        if delivery.waited is not None:
            parts.append(f"had waited {duration(delivery.waited)}")
    elif delivery.took is not None:
        parts[0] += f" {duration(delivery.took)} after it was due"
    elif delivery.due_at is not None and delivery.status not in ("completed", "cancelled", "dead"):
        late = at - delivery.due_at
        parts.append(f"due for {duration(late)}" if late >= timedelta(0) else f"due in {duration(-late)}")
    if delivery.attempt > 1 or (delivery.attempt and delivery.status in ("pending", "dead")):
        parts.append(f"attempt {delivery.attempt}")
    if delivery.round > 1:
        parts.append(f"round {delivery.round}")
    return ", ".join(parts) + (f": {plain(delivery.error)}" if delivery.error else "")


def _in_seconds(value: Any) -> Any:
    """Return it with lengths of time as seconds, which their names then say."""
    if isinstance(value, dict):
        lengths = ("waited", "ran", "took")
        return {f"{name}_seconds" if name in lengths else name: _in_seconds(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_seconds(each) for each in value]
    return value.total_seconds() if isinstance(value, timedelta) else value
