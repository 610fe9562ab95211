"""When a delivery that a worker died with may start, and how long it keeps others waiting."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus._runtime.quarantine import (
    ALONE_SECONDS,
    DRAIN_SECONDS,
    LONGEST_DRAIN_SECONDS,
    LONGEST_WAIT_SECONDS,
    LOOK_SECONDS,
    RETRY_SECONDS,
    Quarantine,
)

NOW = 1_000.0
A_MOMENT = 0.001


@pytest.fixture
def quarantine() -> Quarantine:
    return Quarantine()


# Nothing there


def test_at_first_it_wants_to_know(quarantine: Quarantine) -> None:
    assert quarantine.look_at <= NOW
    assert not quarantine.closed(NOW)
    assert not quarantine.may_start(NOW, held=0)


def test_where_there_is_no_suspect_nobody_waits(quarantine: Quarantine) -> None:
    quarantine.looked(found=False, now=NOW)
    assert not quarantine.closed(NOW)
    assert not quarantine.may_start(NOW, held=0)
    assert quarantine.look_at == NOW + LOOK_SECONDS


# An idle worker


def test_an_idle_worker_may_start_it_at_once(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    assert quarantine.may_start(NOW, held=0)


def test_beside_it_nothing_starts_for_a_while(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    quarantine.started(NOW)
    assert quarantine.opens_at() == NOW + ALONE_SECONDS
    assert quarantine.closed(NOW + ALONE_SECONDS - A_MOMENT)
    assert not quarantine.closed(NOW + ALONE_SECONDS)


def test_its_end_opens_at_once_and_gives_the_others_as_long_before_the_next_one(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    quarantine.started(NOW)
    quarantine.ended(NOW + 0.5)
    assert not quarantine.closed(NOW + 0.5)
    assert quarantine.look_at == NOW + 1.0
    assert not quarantine.may_start(NOW + 1.0, held=0)  # not before it is known that there is another
    quarantine.looked(found=True, now=NOW + 1.0)
    assert quarantine.may_start(NOW + 1.0, held=0)


def test_no_second_one_starts_beside_it(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    quarantine.started(NOW)
    quarantine.looked(found=True, now=NOW + 1.0)
    assert not quarantine.may_start(NOW + ALONE_SECONDS - A_MOMENT, held=0)
    assert not quarantine.may_start(NOW + ALONE_SECONDS + A_MOMENT, held=1)


# A busy worker


def test_a_busy_worker_drains_and_then_goes_on_as_usual(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    assert not quarantine.may_start(NOW, held=1)
    assert quarantine.closed(NOW)
    assert quarantine.opens_at() == NOW + DRAIN_SECONDS
    assert quarantine.closed(NOW + DRAIN_SECONDS - A_MOMENT)
    assert not quarantine.closed(NOW + DRAIN_SECONDS)


def test_looking_again_makes_no_drain_longer(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    quarantine.looked(found=True, now=NOW + DRAIN_SECONDS / 2)
    assert not quarantine.closed(NOW + DRAIN_SECONDS)


def test_after_a_drain_in_vain_it_goes_on_as_usual_for_longer_than_it_stood_still(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    opened = NOW + DRAIN_SECONDS
    quarantine.looked(found=True, now=opened + RETRY_SECONDS - A_MOMENT)
    assert not quarantine.closed(opened + RETRY_SECONDS - A_MOMENT)
    quarantine.looked(found=True, now=opened + RETRY_SECONDS)
    assert quarantine.closed(opened + RETRY_SECONDS)
    assert RETRY_SECONDS > DRAIN_SECONDS


def test_a_suspect_that_others_took_opens_at_once(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    quarantine.looked(found=False, now=NOW + A_MOMENT)
    assert not quarantine.closed(NOW + A_MOMENT)
    assert not quarantine.may_start(NOW + A_MOMENT, held=0)


def test_it_starts_as_soon_as_what_ran_has_ended(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    assert not quarantine.may_start(NOW + 0.1, held=1)
    assert quarantine.may_start(NOW + 0.1, held=0)


def test_after_the_longest_wait_it_starts_beside_others(quarantine: Quarantine) -> None:
    """Handlers that run for an hour would keep it waiting for an hour."""
    quarantine.looked(found=True, now=NOW)
    quarantine.looked(found=True, now=NOW + LONGEST_WAIT_SECONDS / 2)
    assert not quarantine.may_start(NOW + LONGEST_WAIT_SECONDS - A_MOMENT, held=5)
    assert quarantine.may_start(NOW + LONGEST_WAIT_SECONDS, held=5)


def test_the_next_one_waits_anew(quarantine: Quarantine) -> None:
    quarantine.looked(found=True, now=NOW)
    now = NOW + LONGEST_WAIT_SECONDS
    quarantine.started(now)
    quarantine.ended(now)
    quarantine.looked(found=True, now=now)
    assert not quarantine.may_start(now + LONGEST_WAIT_SECONDS - A_MOMENT, held=1)


# Whatever happens


@dataclass(frozen=True)
class Step:
    after: float
    found: bool
    held: int
    ends: bool


steps = st.lists(
    st.builds(
        Step,
        after=st.sampled_from([0.0, A_MOMENT, 0.3, 1.0]) | st.floats(min_value=0.0, max_value=15.0),
        found=st.booleans(),
        held=st.integers(min_value=0, max_value=2),
        ends=st.booleans(),
    ),
    max_size=60,
)


@given(steps)
def test_it_is_never_closed_for_longer_than_the_longest_drain_or_one_suspect_allows(course: list[Step]) -> None:
    quarantine, now = Quarantine(), NOW
    started: float | None = None  # the suspect that runs
    for step in course:
        now += step.after
        if started is not None and step.ends:
            quarantine.ended(now)
            started = None
        if now >= quarantine.look_at:
            quarantine.looked(step.found, now)
        if quarantine.may_start(now, step.held + (started is not None)):
            assert started is None or now - started >= ALONE_SECONDS
            quarantine.started(now)
            started = now
        if quarantine.closed(now):
            assert quarantine.opens_at() > now
            drain = LONGEST_DRAIN_SECONDS
            longest = drain if started is None else max(drain, started + ALONE_SECONDS - now)
            assert quarantine.opens_at() - now <= longest + 1e-9
            assert not quarantine.closed(quarantine.opens_at())


@given(st.lists(st.floats(min_value=0.01, max_value=3.0), min_size=1, max_size=200))
def test_a_suspect_that_nothing_makes_way_for_costs_one_drain_at_a_time_and_starts_in_the_end(
    pauses: list[float],
) -> None:
    """Whoever is busy for ever works most of the time all the same, and the suspect is not kept waiting for ever."""
    quarantine, now = Quarantine(), NOW
    drains: list[float] = []
    closed = False
    for pause in pauses:
        now += pause
        if now >= quarantine.look_at:
            quarantine.looked(found=True, now=now)
            first = drains[0] if drains else now
            assert quarantine.may_start(now, held=1) == (now - first >= LONGEST_WAIT_SECONDS)
        if quarantine.closed(now) and not closed:
            drains.append(now)
            longest = min(LONGEST_DRAIN_SECONDS, DRAIN_SECONDS * 2 ** (len(drains) - 1))
            assert quarantine.opens_at() - now <= longest + 1e-9
        closed = quarantine.closed(now)
    for earlier, later in pairwise(drains):
        assert later - earlier >= DRAIN_SECONDS + RETRY_SECONDS - 1e-9


@pytest.mark.parametrize("handlers_take", [0.5, 2.0, 3.9, 7.9])
def test_it_makes_way_for_as_long_as_handlers_take_that_run_all_the_time(
    quarantine: Quarantine, handlers_take: float
) -> None:
    """On a busy worker nothing is left in hand only when nothing was claimed for as long as a handler takes."""
    now = closed_since = NOW
    while now - NOW < LONGEST_WAIT_SECONDS:
        if now >= quarantine.look_at:
            quarantine.looked(found=True, now=now)
        if not quarantine.closed(now):
            closed_since = now
        if quarantine.may_start(now, held=int(now - closed_since < handlers_take)):
            return
        now += 0.05
    raise AssertionError("it never came to it")
