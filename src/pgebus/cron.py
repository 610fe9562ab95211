"""When the clock publishes an event: a cron expression in a time zone, and what becomes of the times that were missed.

Pure: the time is given. Expressions are read by cronsim (the extra `cron`), and mean what Debian's cron makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Final, Literal, TypeAlias, cast, get_args
from zoneinfo import ZoneInfo

from pgebus.errors import ConfigurationError

__all__ = ["Cron", "Missed", "make_cron"]

Missed: TypeAlias = Literal["skip", "latest", "all"]

# A time that is published so late at most has not been missed: every process was just being replaced.
ON_TIME: Final = timedelta(seconds=60)
# How many missed times are made up for in one transaction.
CATCH_UP_BATCH: Final = 100
# Further than any clock change moves a time of day.
_ANY_CHANGE: Final = timedelta(hours=3)
_LONGEST: Final = 255


@dataclass(frozen=True, slots=True)
class Cron:
    """Times at which an event is published.

    Attributes:
        expression: Five fields: minute, hour, day of the month, month, day of the week.
        timezone: The name of the time zone that they are read in.
        missed: What to do about times at which no process ran.
    """

    expression: str
    timezone: str = "UTC"
    missed: Missed = "latest"

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Yield the times after *moment*, in UTC."""
        from cronsim import CronSim

        local = moment.astimezone(ZoneInfo(self.timezone))
        return (tick.astimezone(UTC) for tick in CronSim(self.expression, local))

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
        ticks = list(takewhile(lambda tick: tick <= now, self.after(max(last, self._shortly_before(now)))))
        if not ticks:
            return [], None
        if self.missed == "latest":
            return ticks[-1:], ticks[-1]
        return [tick for tick in ticks if now - tick <= ON_TIME], ticks[-1]

    def _shortly_before(self, now: datetime) -> datetime:
        """Return a moment that has at least one time between it and *now*, and not very many."""
        from cronsim import CronSim

        # Backwards, a time that a clock change has moved may be found where it would be without the change.
        earlier = next(CronSim(self.expression, now.astimezone(ZoneInfo(self.timezone)), reverse=True), None)
        return datetime.min.replace(tzinfo=UTC) if earlier is None else earlier.astimezone(UTC) - _ANY_CHANGE


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
