from __future__ import annotations

import copy
import doctest
import pickle
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus import retry
from pgebus.errors import ConfigurationError
from pgebus.retry import MAX_DELAY, Reject, Retry, RetryPolicy, Signal, Snooze, retry_delay

delays = st.timedeltas(min_value=timedelta(0), max_value=MAX_DELAY)
attempts = st.integers(min_value=1, max_value=10**6)


class Largest(Random):
    """Always draws the end of the range, so that a test sees the bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


def bound(attempt: int, first: timedelta, ceiling: timedelta) -> timedelta:
    return retry_delay(attempt, first=first, ceiling=ceiling, rng=Largest())


def test_the_bounds_double_up_to_the_ceiling() -> None:
    bounds = [bound(attempt, timedelta(seconds=1), timedelta(minutes=15)).total_seconds() for attempt in range(1, 13)]
    assert bounds == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]


@given(attempts, delays, delays, st.randoms(use_true_random=False))
def test_a_delay_lies_between_zero_and_its_bound(attempt: int, one: timedelta, other: timedelta, rng: Random) -> None:
    first, ceiling = sorted([one, other])
    delay = retry_delay(attempt, first=first, ceiling=ceiling, rng=rng)
    assert timedelta(0) <= delay <= bound(attempt, first, ceiling) <= ceiling


@given(attempts, delays, delays)
def test_the_bound_never_shrinks(attempt: int, one: timedelta, other: timedelta) -> None:
    first, ceiling = sorted([one, other])
    assert first <= bound(attempt, first, ceiling) <= bound(attempt + 1, first, ceiling)


@pytest.mark.parametrize("attempt", [1024, 1025, 10**6, 2**63, 10**30])
def test_no_attempt_is_too_late_for_a_delay(attempt: int) -> None:
    assert bound(attempt, timedelta(microseconds=1), MAX_DELAY) == MAX_DELAY
    assert bound(attempt, timedelta(0), MAX_DELAY) == timedelta(0)


def test_full_jitter_spreads_over_the_whole_range() -> None:
    rng = Random(1)
    drawn = [retry_delay(1, first=timedelta(seconds=1), ceiling=timedelta(seconds=1), rng=rng) for _ in range(2000)]
    assert min(drawn) < timedelta(milliseconds=10)
    assert max(drawn) > timedelta(milliseconds=990)
    assert abs(sum(drawn, timedelta()) / len(drawn) - timedelta(milliseconds=500)) < timedelta(milliseconds=25)


@pytest.mark.parametrize("attempt", [0, -1, -(10**9)])
def test_attempts_count_from_one(attempt: int) -> None:
    with pytest.raises(ConfigurationError):
        retry_delay(attempt, first=timedelta(seconds=1), ceiling=timedelta(seconds=1))


def test_the_examples_of_the_docstrings_are_true() -> None:
    assert doctest.testmod(retry) == doctest.TestResults(failed=0, attempted=1)


def test_a_policy_draws_by_its_own_values() -> None:
    policy = RetryPolicy(first=timedelta(seconds=3), ceiling=timedelta(seconds=5))
    assert policy.delay(1, rng=Largest()) == timedelta(seconds=3)
    assert policy.delay(2, rng=Largest()) == timedelta(seconds=5)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_attempts": 0}, {"max_attempts": -1}, {"max_attempts": 1001}, {"max_attempts": 2**63},
        {"max_attempts": True}, {"max_attempts": 1.5}, {"max_attempts": float("nan")}, {"max_attempts": "5"},
        {"max_attempts": None},
        {"first": timedelta(microseconds=-1)}, {"first": 1}, {"first": 1.5}, {"first": None}, {"first": "1"},
        {"first": MAX_DELAY + timedelta(microseconds=1)}, {"first": timedelta.max},
        {"ceiling": timedelta(seconds=-1)}, {"ceiling": float("inf")}, {"ceiling": timedelta.max},
        {"first": timedelta(hours=1)}, {"ceiling": timedelta(milliseconds=999)},
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RetryPolicy(**bad)


@pytest.mark.parametrize("signal", [Retry, Snooze])
@pytest.mark.parametrize(
    "bad",
    [
        -timedelta(microseconds=1), timedelta.min, timedelta.max, MAX_DELAY + timedelta(microseconds=1),
        1, 1.5, float("nan"), float("inf"), True, "5", b"5", [],
    ],
)  # fmt: skip
def test_a_signal_takes_a_pause_of_zero_to_ten_years(signal: Any, bad: object) -> None:
    with pytest.raises(ConfigurationError):
        signal(bad)


@pytest.mark.parametrize("good", [timedelta(0), timedelta(microseconds=1), MAX_DELAY])
def test_a_signal_keeps_its_pause(good: timedelta) -> None:
    assert Retry(good).delay == Retry(delay=good).delay == Snooze(good).delay == good


def test_only_retry_may_leave_the_pause_open() -> None:
    assert Retry().delay is None
    with pytest.raises(ConfigurationError):
        Snooze(None)  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize("bad", [None, 1, b"x", ValueError("x")])
def test_a_reason_is_text(bad: Any) -> None:
    with pytest.raises(ConfigurationError):
        Reject(bad)


@pytest.mark.parametrize("signal", [Retry(), Retry(timedelta(1)), Snooze(timedelta(1)), Reject("gone")])
def test_a_signal_survives_copy_and_pickle(signal: Signal) -> None:
    for twin in (copy.copy(signal), pickle.loads(pickle.dumps(signal))):  # noqa: S301 - our own bytes
        assert type(twin) is type(signal)
        assert vars(twin) == vars(signal)
