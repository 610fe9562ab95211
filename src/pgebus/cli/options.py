"""The options by which the commands select deliveries and events.

It decides nothing: what a filter means is said in `pgebus.operations`.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Final

import typer

from pgebus import ConfigurationError

__all__ = ["age_of", "moment_of"]

_AGE: Final = re.compile(r"(\d{1,9})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_WHEN: Final = "A moment, like 2026-01-31T12:00, or an age, like 90s, 30m, 2h, 7d, 4w."

EventIds = Annotated[
    list[int] | None, typer.Argument(help="Only of these events.", metavar="[EVENT_ID]...", show_default=False)
]
OfGroup = Annotated[str | None, typer.Option("--group", help="Only of this consumer group.", show_default=False)]
OfChannel = Annotated[str | None, typer.Option("--channel", help="Only of this channel.", show_default=False)]
OfType = Annotated[
    str | None,
    typer.Option("--type", help="Only of this event type, or pattern of types, like 'order.*'.", show_default=False),
]
OfKey = Annotated[str | None, typer.Option("--key", help="Only of this key.", show_default=False)]
CreatedAfter = Annotated[
    str | None, typer.Option(help=f"Only events that were created then, or since. {_WHEN}", show_default=False)
]
CreatedBefore = Annotated[str | None, typer.Option(help="Only events that were created earlier.", show_default=False)]
FinishedAfter = Annotated[
    str | None,
    typer.Option(help="Only what was completed, cancelled or dead then, or since.", show_default=False),
]
FinishedBefore = Annotated[
    str | None, typer.Option(help="Only what was completed, cancelled or dead earlier.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
Reason = Annotated[str | None, typer.Option(help="Why; kept with each delivery.", show_default=False)]
By = Annotated[str | None, typer.Option(help="Who; kept with each delivery.", show_default="your user name")]


def age_of(text: str) -> timedelta:
    """Return an age.

    Raises:
        ConfigurationError: If it is none.

    >>> age_of("30m")
    datetime.timedelta(seconds=1800)
    """
    if found := _AGE.fullmatch(text):
        try:
            return timedelta(**{_UNITS[found[2]]: int(found[1])})
        except OverflowError:
            pass
    raise ConfigurationError(f"{text!r} is no age. Write a number and s, m, h, d or w, like 30m or 7d.")


def moment_of(text: str | None, clock: datetime) -> datetime | None:
    """Return the moment that is meant, an age back from *clock*; without a time zone it is in that of the computer.

    Raises:
        ConfigurationError: If it is none.
    """
    if text is None:
        return None
    try:
        if _AGE.fullmatch(text):
            return clock - age_of(text)
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise ConfigurationError(f"{text!r} is no moment. {_WHEN}") from None
