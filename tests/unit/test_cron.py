"""Times of a cron expression: which are due, what a clock change makes of them, and which were missed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgebus import EventRouter
from pgebus.cron import CATCH_UP_BATCH, Cron, make_cron
from pgebus.errors import ConfigurationError, InvalidEventTypeError

NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


async def handle(ctx: Any, payload: Any) -> None: ...


def at(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=BERLIN)  # type: ignore[arg-type, misc]  # year, month, day, hour, minute


def times(cron: Cron, after: datetime, count: int) -> list[str]:
    return [tick.astimezone(BERLIN).strftime("%d. %H:%M %z") for tick in islice(cron.after(after), count)]


# Clock changes


def test_a_time_that_a_clock_change_leaves_out_comes_when_the_clock_has_gone_forward() -> None:
    nightly = Cron("30 2 * * *", "Europe/Berlin")
    assert times(nightly, at(2026, 3, 28), 3) == ["28. 02:30 +0100", "29. 03:00 +0200", "30. 02:30 +0200"]


def test_a_time_that_comes_twice_comes_the_first_time_only() -> None:
    nightly = Cron("30 2 * * *", "Europe/Berlin")
    assert times(nightly, at(2026, 10, 24), 3) == ["24. 02:30 +0200", "25. 02:30 +0200", "26. 02:30 +0100"]


def test_with_a_wildcard_for_the_hour_a_time_comes_as_often_as_the_clock_shows_it() -> None:
    hourly = Cron("30 * * * *", "Europe/Berlin")
    assert times(hourly, at(2026, 10, 25, 1, 45), 3) == ["25. 02:30 +0200", "25. 02:30 +0100", "25. 03:30 +0100"]
    assert times(hourly, at(2026, 3, 29, 0, 45), 2) == ["29. 01:30 +0100", "29. 03:30 +0200"]


# What is due


def test_nothing_is_due_before_its_time() -> None:
    assert Cron("5 12 * * *").due(NOON, NOON + timedelta(minutes=5) - timedelta(microseconds=1)) == ([], None)


@pytest.mark.parametrize("missed", ["latest", "all", "skip"])
def test_a_time_is_due_when_it_has_come(missed: Any) -> None:
    tick = NOON + timedelta(minutes=5)
    assert Cron("5 12 * * *", missed=missed).due(NOON, tick) == ([tick], tick)
    assert Cron("5 12 * * *", missed=missed).due(tick, tick) == ([], None)


def test_of_missed_times_the_latest_is_published() -> None:
    tick = NOON + timedelta(hours=3)
    assert Cron("0 * * * *").due(NOON, NOON + timedelta(hours=3, minutes=59)) == ([tick], tick)


def test_missed_times_are_skipped() -> None:
    cron, until = Cron("0 * * * *", missed="skip"), NOON + timedelta(hours=3)
    assert cron.due(NOON, until + timedelta(seconds=61)) == ([], until)
    assert cron.due(NOON, until + timedelta(seconds=60)) == ([until], until)


def test_missed_times_are_made_up_for_a_batch_at_a_time() -> None:
    cron, last, seen = Cron("* * * * *", missed="all"), NOON, []
    now = NOON + timedelta(minutes=2.5 * CATCH_UP_BATCH)
    while (due := cron.due(last, now))[1] is not None:
        assert len(due[0]) <= CATCH_UP_BATCH
        seen += due[0]
        last = due[1]
    assert seen == [NOON + timedelta(minutes=n + 1) for n in range(int(2.5 * CATCH_UP_BATCH))]


def test_a_schedule_that_has_slept_for_years_finds_its_latest_time_at_once() -> None:
    ticks, until = Cron("* * * * *").due(NOON - timedelta(days=4_000), NOON)
    assert (ticks, until) == ([NOON], NOON)


@settings(deadline=None)  # a month of half-hours
@given(
    st.sampled_from(["30 2 * * *", "*/30 * * * *", "0 3 * * 0", "15 1,2,3 * * *", "0 0 1 * *"]),
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001 - bounds, naive as they have to be
    st.timedeltas(timedelta(0), timedelta(days=40)),
)
def test_the_latest_is_the_last_of_all(expression: str, last: datetime, later: timedelta) -> None:
    cron = Cron(expression, "Europe/Berlin")
    all_ticks = list(takewhile(lambda tick: tick <= last + later, cron.after(last)))
    assert all(one < other for one, other in pairwise(all_ticks))
    ticks, until = cron.due(last, last + later)
    assert ticks == all_ticks[-1:]
    assert until == (all_ticks[-1] if all_ticks else None)


# What is refused


@pytest.mark.parametrize(
    ("expression", "timezone", "missed", "said"),
    [
        ("* * * *", "UTC", "latest", "five fields"),
        ("* * * * * *", "UTC", "latest", "five fields"),
        ("@daily", "UTC", "latest", "five fields"),
        (None, "UTC", "latest", "five fields"),
        (" ".join(["1," * 200 + "1"] * 5), "UTC", "latest", "five fields"),
        ("61 * * * *", "UTC", "latest", "no cron expression"),
        ("a b c d e", "UTC", "latest", "no cron expression"),
        ("0 0 30 2 *", "UTC", "latest", "never comes|no cron expression"),
        ("* * * * *", "Europe/Nowhere", "latest", "no time zone 'Europe/Nowhere'"),
        ("* * * * *", "../etc/passwd", "latest", "no time zone"),
        ("* * * * *", "", "latest", "no time zone"),
        ("* * * * *", None, "latest", "name of a time zone"),
        ("* * * * *", "UTC", "often", "'skip', 'latest' or 'all'"),
        ("* * * * *", "UTC", None, "'skip', 'latest' or 'all'"),
    ],
)
def test_what_names_no_times_is_refused(expression: object, timezone: object, missed: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make_cron(expression, timezone, missed)


def test_spaces_do_not_make_another_schedule() -> None:
    assert make_cron(" */5  * * * *\t", BERLIN, "all") == Cron("*/5 * * * *", "Europe/Berlin", "all")


def test_without_cronsim_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pgebus\[cron\]'"):
        EventRouter().every("* * * * *")


# Routers


def test_a_schedule_is_under_the_prefixes_of_its_handler() -> None:
    inner, outer = EventRouter("reports"), EventRouter("app")
    inner.every("0 3 * * *", "nightly")(handle)
    outer.include_router(inner)
    (route,) = outer.routes()
    assert (route.pattern, route.handler.cron) == ("app.reports.nightly", Cron("0 3 * * *"))


def test_without_a_path_the_event_type_is_the_name_of_the_function() -> None:
    router = EventRouter()
    router.every("0 3 * * *")(handle)
    assert [route.pattern for route in router.routes()] == ["handle"]


def test_the_clock_publishes_no_pattern() -> None:
    with pytest.raises(InvalidEventTypeError):
        EventRouter().every("0 3 * * *", "reports.*")


def test_a_function_without_a_usable_name_needs_a_path() -> None:
    with pytest.raises(InvalidEventTypeError):
        EventRouter().every("0 3 * * *")(lambda _ctx, _payload: None)


def test_one_schedule_has_one_rule_for_what_it_missed() -> None:
    """Wherever the second one is written: beside the first, or in a router below."""
    router, inner = EventRouter(), EventRouter("a")
    router.every("* * * * *", "a.t", missed="all", group="one")(handle)
    with pytest.raises(ConfigurationError, match="missed='all', and for 'other' with missed='skip'"):
        router.every("* * * * *", "a.t", missed="skip", group="other", name="other")(handle)
    inner.every(" *  * * * *", "t", missed="latest", group="third")(handle)
    with pytest.raises(ConfigurationError, match="It is one schedule"):
        router.include_router(inner)
    assert [route.handler.group for route in router.routes()] == ["one"]


def test_the_same_rule_or_another_schedule_is_no_contradiction() -> None:
    router = EventRouter()
    router.every("* * * * *", "t", missed="all", group="one")(handle)
    router.every("* * * * *", "t", missed="all", group="other")(handle)
    router.every("*/5 * * * *", "t", missed="skip", group="third")(handle)
    router.every("* * * * *", "t", missed="skip", timezone="Europe/Berlin", group="fourth")(handle)
    router.every("* * * * *", "u", missed="skip", group="one")(handle)
    router.on("t", group="fifth")(handle)
    assert len(router.routes()) == 6
