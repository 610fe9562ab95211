"""What clock changes make of a schedule: the table of the guide, and rules that hold in every zone at every moment."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgebus.cron import Cron

BERLIN: Final = ZoneInfo("Europe/Berlin")
MINUTE: Final = timedelta(minutes=1)
GUIDE: Final = Path(__file__).parents[2] / "docs" / "guides" / "schedules.md"

# Days of changes: of an hour, of half an hour, of two hours, at midnight, a minute past it, for a month, by a day.
CHANGES: Final = [
    ("Europe/Berlin", datetime(2026, 3, 29, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2026, 10, 25, tzinfo=UTC)),
    ("America/New_York", datetime(2026, 11, 1, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 4, 5, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 10, 4, tzinfo=UTC)),
    ("Antarctica/Troll", datetime(2026, 3, 29, tzinfo=UTC)),
    ("Antarctica/Troll", datetime(2026, 10, 25, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 3, 8, tzinfo=UTC)),
    ("America/Havana", datetime(2026, 11, 1, tzinfo=UTC)),
    ("America/St_Johns", datetime(2010, 3, 14, tzinfo=UTC)),
    ("America/St_Johns", datetime(2010, 11, 7, tzinfo=UTC)),
    ("Africa/Casablanca", datetime(2026, 2, 15, tzinfo=UTC)),
    ("Pacific/Apia", datetime(2011, 12, 30, tzinfo=UTC)),
    ("UTC", datetime(2026, 3, 29, tzinfo=UTC)),
]

minutes = st.sampled_from(["*", "*/30", "*/7", "0", "30", "59", "0,30", "0-59/30", "5-10"])
hours = st.sampled_from(["*", "*/2", "0", "1", "2", "3", "23", "1,2,3", "0-23/2", "2-3"])
days = st.sampled_from(["* * *", "* * 0", "1-15 * *", "* 3,10,11 *", "* * 0,6"])
expressions = st.builds("{} {} {}".format, minutes, hours, days)
changes = st.sampled_from(CHANGES)
seconds = st.integers(0, 60 * 3_600).map(lambda count: timedelta(seconds=count))


def field(text: str, lowest: int, highest: int) -> set[int]:
    """Return what a field of an expression names; read here once more, and more simply."""
    found = set()
    for part in text.split(","):
        bounds, _, step = part.partition("/")
        first, _, last = (f"{lowest}-{highest}" if bounds == "*" else bounds).partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def matches(expression: str, shown: datetime) -> bool:
    minute, hour, day, month, weekday = expression.split()
    return (
        shown.minute in field(minute, 0, 59)
        and shown.hour in field(hour, 0, 23)
        and shown.day in field(day, 1, 31)
        and shown.month in field(month, 1, 12)
        and shown.isoweekday() % 7 in field(weekday, 0, 6)
    )


def clock_watched(expression: str, zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[datetime]:
    """Yield the times that somebody finds who looks at a clock on the wall each minute, and knows what it has shown."""
    wildcard = any(part.startswith("*") for part in expression.split()[:2])
    now = begin
    latest = now.astimezone(zone).replace(tzinfo=None)
    while (now := now + MINUTE) <= end:
        shown = now.astimezone(zone).replace(tzinfo=None)
        if wildcard:
            due = matches(expression, shown)
        else:  # whatever the clock has come to, or gone past, since it was farthest
            due = any(matches(expression, latest + n * MINUTE) for n in range(1, (shown - latest) // MINUTE + 1))
            latest = max(latest, shown)
        if due:
            yield now


def until(cron: Cron, after: datetime, end: datetime) -> list[datetime]:
    return list(takewhile(lambda tick: tick <= end, cron.after(after)))


@settings(deadline=None, max_examples=60)
@given(expressions, changes)
def test_the_times_are_those_that_a_clock_on_the_wall_shows(expression: str, change: tuple[str, datetime]) -> None:
    name, day = change
    begin = day - timedelta(hours=18)
    end = begin + timedelta(hours=48)
    watched = list(clock_watched(expression, ZoneInfo(name), begin, end))
    assert until(Cron(expression, name), begin, end) == watched


@settings(deadline=None, max_examples=60)
@given(expressions, changes, st.integers(0, 599))
def test_whoever_looks_later_sees_the_same_times(expression: str, change: tuple[str, datetime], shift: int) -> None:
    """And never one that is not later than the moment that was asked for."""
    name, day = change
    begin = day - timedelta(hours=18)
    cron, end = Cron(expression, name), begin + timedelta(hours=48)
    ticks = until(cron, begin, end)
    assert all(one < following for one, following in pairwise([begin, *ticks]))
    for number in range(48 * 6):  # every ten minutes: before, in and after whatever is repeated
        moment = begin + timedelta(minutes=10 * number, seconds=shift)
        coming = next(cron.after(moment))
        assert coming > moment
        assert coming == next((tick for tick in ticks if tick > moment), coming)
    for one, following in pairwise(ticks[:50]):  # as a worker goes from one to the next
        assert next(cron.after(one)) == following


@settings(deadline=None, max_examples=40)
@given(expressions, changes, seconds, seconds, st.timedeltas(timedelta(0), timedelta(days=20)))
def test_a_schedule_never_goes_back(
    expression: str, change: tuple[str, datetime], one: timedelta, other: timedelta, outage: timedelta
) -> None:
    name, day = change
    begin = day - timedelta(hours=24)
    last, now = begin + min(one, other) - outage, begin + max(one, other)
    for cron in (Cron(expression, name), Cron(expression, name, "all"), Cron(expression, name, "skip")):
        ticks, reached = cron.due(last, now)
        assert all(last < tick <= now for tick in ticks)
        assert reached is None or last < reached <= now
        assert (reached is None) == (next(cron.after(last)) > now)
    assert Cron(expression, name).due(last, now)[0] == until(Cron(expression, name), last, now)[-1:]


def test_in_the_hour_that_comes_twice_the_next_time_is_not_in_the_past() -> None:
    """At 02:05 for the second time, 02:30 was the first time over: it is tomorrow's that comes."""
    moment = datetime(2026, 10, 25, 1, 5, tzinfo=UTC)
    for cron in (Cron("30 2 * * *", "Europe/Berlin"), Cron("30 2 * * *", "Europe/Berlin", "all")):
        assert next(cron.after(moment)) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)
        assert cron.due(moment - MINUTE, moment) == ([], None)


def test_a_schedule_that_has_slept_since_the_first_century_finds_its_latest_time() -> None:
    now = datetime(2026, 10, 25, tzinfo=UTC)
    assert Cron("* * * * *").due(datetime(1, 1, 2, tzinfo=UTC), now) == ([now], now)


def rows_of_the_guide() -> list[tuple[str, str, str]]:
    lines = [line for line in GUIDE.read_text().splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|"))[:3] for line in lines]  # type: ignore[misc]  # three cells


@pytest.mark.parametrize(("expression", "spring", "autumn"), rows_of_the_guide())
def test_the_table_of_the_guide(expression: str, spring: str, autumn: str) -> None:
    cron = Cron(expression.strip("`"), "Europe/Berlin")
    for cell, day in ((spring, datetime(2026, 3, 29, tzinfo=BERLIN)), (autumn, datetime(2026, 10, 25, tzinfo=BERLIN))):
        from_two, to_half_past_three = day.replace(hour=1, minute=59), day.replace(hour=3, minute=30)
        ticks = [tick.astimezone(BERLIN) for tick in until(cron, from_two, to_half_past_three)]
        said, _, listed = cell.partition(": ")
        assert int(said) == len(ticks)
        assert listed in ("", ", ".join(f"{tick:%H:%M}" for tick in ticks))


def test_the_guide_has_a_table() -> None:
    assert len(rows_of_the_guide()) == 8
