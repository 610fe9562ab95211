"""When the clock publishes an event: a cron expression in a time zone, and what becomes of the times that were missed.

Pure: the time is given. Expressions are read by cronsim (the extra `cron`), and mean what Debian's cron makes of them.
What a clock change makes of them is decided here: cronsim is asked for the times on a clock that is never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from math import ceil, floor
from typing import Final, Literal, TypeAlias, cast, get_args
from zoneinfo import ZoneInfo

from pgebus.errors import ConfigurationError

__all__ = ["Cron", "Missed", "make_cron"]

Missed: TypeAlias = Literal["skip", "latest", "all"]

# A time that is published so late at most has not been missed: every process was just being replaced.
ON_TIME: Final = timedelta(seconds=60)
# How many missed times are made up for in one transaction.
CATCH_UP_BATCH: Final = 100
_LONGEST: Final = 255
# How far back the latest of the missed times is looked for first, and so many times as far each time there is none.
_NEAR: Final = timedelta(minutes=15)
_FARTHER: Final = 8
# No clock is changed twice in a day.
_DAY: Final = 86_400
_SECOND: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """Times at which an event is published.

    Attributes:
        expression: Five fields: minute, hour, day of the month, month, day of the week.
        timezone: The name of the time zone that they are read in.
        missed: What to do about times at which no process had the schedule.
    """

    expression: str
    timezone: str = "UTC"
    missed: Missed = "latest"

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Yield the times after *moment*, in UTC, each later than the one before."""
        zone, (minute, hour) = ZoneInfo(self.timezone), self.expression.split()[:2]
        if minute.startswith("*") or hour.startswith("*"):
            return self._as_often_as_shown(moment, zone)
        return self._once(moment, zone)

    def _once(self, moment: datetime, zone: ZoneInfo) -> Iterator[datetime]:
        """Yield when the clock first shows each of the times, or has gone past it."""
        # In the hour that comes twice, those that it shows again are not after *moment*.
        for shown in self._on_an_unchanged_clock(moment.astimezone(zone).replace(tzinfo=None)):
            if (at := _first_shown(shown, zone)) > moment:
                yield at
                moment = at

    def _as_often_as_shown(self, moment: datetime, zone: ZoneInfo) -> Iterator[datetime]:
        """Yield all moments at which the clock shows one of the times."""
        begin = moment.astimezone(zone).replace(tzinfo=None)
        while True:
            change, offset = None, _offset(moment.timestamp(), zone)
            for shown in self._on_an_unchanged_clock(begin):
                at = shown.replace(tzinfo=UTC) - offset
                if (change := _first_change(moment, at, zone)) is not None:
                    break
                yield at
                moment = at
            if change is None:
                return
            moment = change
            begin = change.astimezone(zone).replace(tzinfo=None) - _SECOND  # what it is changed to, it shows

    def _on_an_unchanged_clock(self, shown: datetime) -> Iterator[datetime]:
        from cronsim import CronSim

        return CronSim(self.expression, shown)

    def due(self, last: datetime, now: datetime) -> tuple[list[datetime], datetime | None]:
        """Return the times to publish now, and up to which time nothing remains to be done.

        Args:
            last: Up to which time that was so before.
            now: The database's clock.

        Returns:
            The times, and the last that was looked at; None when nothing was due.
        """
        if self.missed == "all":
            ticks = list(islice(takewhile(lambda tick: tick <= now, self.after(last)), CATCH_UP_BATCH))
            return ticks, ticks[-1] if ticks else None
        latest = self._latest(last, now)
        if latest is None:
            return [], None
        if self.missed == "latest":
            return [latest], latest
        late = max(last, now - ON_TIME - datetime.resolution)
        return list(takewhile(lambda tick: tick <= now, self.after(late))), latest

    def _latest(self, last: datetime, now: datetime) -> datetime | None:
        """Return the last time after *last* that is not after *now*; None if there is none."""
        first = next(self.after(last), None)
        if first is None or first > now:
            return None
        back = _NEAR
        while True:  # as years of minutes are too many to go through
            near = list(takewhile(lambda tick: tick <= now, self.after(max(last, now - back))))
            if near:
                return near[-1]
            back = min(back * _FARTHER, now - last)


def _offset(timestamp: float, zone: ZoneInfo) -> timedelta:
    offset = datetime.fromtimestamp(timestamp, zone).utcoffset()
    return timedelta(0) if offset is None else offset


def _first_shown(shown: datetime, zone: ZoneInfo) -> datetime:
    """Return when the clock first shows a time, or, where a change leaves it out, when it is changed."""
    first = shown.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if first.astimezone(zone).replace(tzinfo=None) == shown:
        return first
    # What would have shown it without the change is after it; what would show it after the change is before (PEP 495).
    change = _first_change(shown.replace(tzinfo=zone, fold=1).astimezone(UTC), first, zone)
    return first if change is None else change


def _first_change(early: datetime, late: datetime, zone: ZoneInfo) -> datetime | None:
    """Return when the clock is changed after *early* and not after *late*; clocks are changed on the second."""
    before, end = floor(early.timestamp()), ceil(late.timestamp())
    offset = _offset(before, zone)
    while before < end:
        after = min(before + _DAY, end)
        if _offset(after, zone) == offset:
            before = after
            continue
        while after - before > 1:
            between = (before + after) // 2
            before, after = (between, after) if _offset(between, zone) == offset else (before, between)
        return datetime.fromtimestamp(after, UTC)
    return None


def make_cron(expression: object, timezone: object, missed: object) -> Cron:
    """Return the times that *expression* names.

    Raises:
        ConfigurationError: If the expression is none, or names no time at all, if there is no such time zone, or if
            cronsim is not installed.
    """
    try:
        from cronsim import CronSim, CronSimError
    except ImportError as error:
        raise ConfigurationError("every() needs cronsim. Install it: pip install 'pgebus[cron]'.") from error
    if not isinstance(missed, str) or missed not in get_args(Missed):
        raise ConfigurationError(f"missed must be 'skip', 'latest' or 'all', not {missed!r:.80}.")
    name = timezone.key if isinstance(timezone, ZoneInfo) else timezone
    if not isinstance(name, str):
        raise ConfigurationError(f"timezone must be the name of a time zone or a ZoneInfo, not {name!r:.80}.")
    try:
        zone = ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise ConfigurationError(f"There is no time zone {name!r:.80}. Write 'Europe/Berlin', for example.") from error
    if not isinstance(expression, str) or len(expression) > _LONGEST or len(expression.split()) != 5:
        raise ConfigurationError(
            f"A cron expression has five fields, like '*/5 * * * *': minute, hour, day of the month, month, day of "
            f"the week; not {expression!r:.80}."
        )
    expression = " ".join(expression.split())
    try:
        ticks = CronSim(expression, datetime(2000, 1, 1, tzinfo=zone))
    except CronSimError as error:
        raise ConfigurationError(f"{expression!r} is no cron expression: {error}.") from error
    if next(ticks, None) is None:
        raise ConfigurationError(f"The cron expression {expression!r} names a day that never comes.")
    return Cron(expression, name, cast("Missed", missed))
