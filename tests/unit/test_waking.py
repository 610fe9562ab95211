from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus._runtime.waking import FIRST_LOOK_SECONDS, DatabaseClock, Wakeup, next_look


class Time:
    """The monotonic clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("pgebus._runtime.waking.monotonic", time)
    return time


@pytest.fixture
def clock(time: Time) -> DatabaseClock:
    """Says 5000 now."""
    clock = DatabaseClock()
    clock.read(5_000.0)
    return clock


@pytest.fixture
def wakeup(clock: DatabaseClock) -> Wakeup:
    """Nothing is asked for any more."""
    wakeup = Wakeup(clock)
    assert wakeup.take()
    return wakeup


async def waits(wakeup: Wakeup, at_most: float = 30.0) -> bool:
    """Return whether `wait()` has really to wait."""
    task = asyncio.create_task(wakeup.wait(at_most))
    for _ in range(10):
        await asyncio.sleep(0)
    if task.done():
        await task
        return False
    task.cancel()
    await asyncio.wait([task])
    return True


# next_look


def looks(poll_interval: float, until: float) -> list[float]:
    """Return when a worker looks that went idle at zero and is never woken."""
    times = [0.0]
    while times[-1] < until:
        times.append(times[-1] + next_look(times[-1], poll_interval))
    return times


@given(
    st.floats(min_value=-3.0, max_value=2.8).map(lambda exponent: 10.0**exponent),
    st.sampled_from([1.0, 5.0, 60.0, 3600.0]),
)
def test_what_nobody_announced_is_found_after_as_much_time_again(committed_at: float, poll_interval: float) -> None:
    """What is committed at t after the flag is found by 2t, and never later than the poll interval after t."""
    found_at = next(look for look in looks(poll_interval, committed_at) if look >= committed_at)
    assert found_at <= max(FIRST_LOOK_SECONDS, 2 * committed_at)
    assert found_at - committed_at <= max(FIRST_LOOK_SECONDS, poll_interval) + 1e-9


def test_looks_are_few() -> None:
    """Idle for an hour with a poll interval of 30 s: a dozen quick looks, then one each interval."""
    times = looks(30.0, 3600.0)
    assert len([look for look in times if look < 30.0]) <= 13
    assert len(times) <= 13 + 3600 / 30 + 1
    assert all(later - earlier <= 30.0 + 1e-9 for earlier, later in pairwise(times))


def test_a_poll_interval_below_the_first_look_wins() -> None:
    assert next_look(0.0, 0.001) == next_look(100.0, 0.001) == 0.001


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_there_is_always_a_pause_between_two_looks(idle_for: float) -> None:
    assert 0 < next_look(idle_for, 5.0) <= 5.0


# DatabaseClock


def test_the_clock_goes_on_from_what_was_read(clock: DatabaseClock, time: Time) -> None:
    time.now += 7.0
    assert clock.epoch() == 5_007.0
    assert clock.until(5_010.0) == 3.0
    assert clock.until(5_000.0) == 0.0


def test_a_clock_that_was_set_back_is_followed(clock: DatabaseClock) -> None:
    clock.read(4_000.0)
    assert clock.until(4_001.0) == 1.0


def test_nothing_is_far_away_before_the_clock_was_read(time: Time) -> None:
    """Looking too early costs one statement, looking too late costs the promise."""
    assert DatabaseClock().until(1e12) == 0.0


# Wakeup


def test_it_begins_with_a_look(clock: DatabaseClock) -> None:
    wakeup = Wakeup(clock)
    assert wakeup.take()
    assert not wakeup.take()


async def test_a_look_is_taken_once(wakeup: Wakeup) -> None:
    wakeup.look()
    wakeup.look()
    assert not await waits(wakeup)
    assert wakeup.take()
    assert not wakeup.take()
    assert await waits(wakeup)


async def test_stirring_wakes_without_a_look(wakeup: Wakeup) -> None:
    wakeup.stir()
    assert not await waits(wakeup)
    assert not wakeup.take()


@pytest.mark.parametrize(
    "payload",
    ["", " ", "now", "nan", "inf", "-inf", "1e400", "-1e400", "{}", "0x10", "\x00", "9" * 7000, "0", "-1", "4999.5"],
)
async def test_a_notification_without_a_later_time_means_now(wakeup: Wakeup, payload: str) -> None:
    wakeup.notified(payload)
    assert not await waits(wakeup)
    assert wakeup.take()
    assert wakeup.next_due is None


async def test_a_notification_with_a_later_time_means_then(wakeup: Wakeup, time: Time) -> None:
    wakeup.notified("5003.25")
    assert wakeup.next_due == 5_003.25
    assert not wakeup.take()
    assert await waits(wakeup)
    time.now += 3.25
    assert not await waits(wakeup)
    assert wakeup.take()
    assert wakeup.next_due is None
    assert not wakeup.take()


@given(st.text())
def test_no_notification_does_harm(payload: str) -> None:
    """Anybody who may connect can NOTIFY."""
    clock = DatabaseClock()
    clock.read(5_000.0)
    wakeup = Wakeup(clock)
    wakeup.take()
    wakeup.notified(payload)
    assert wakeup.take() or wakeup.next_due is not None


def test_a_notification_before_the_clock_was_read_means_now(time: Time) -> None:
    wakeup = Wakeup(DatabaseClock())
    wakeup.take()
    wakeup.notified("9999999999")
    assert wakeup.take()


@given(st.permutations([5_001.0, 5_002.0, 5_003.0, 5_004.0]))
def test_the_earliest_due_time_is_kept(order: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        time = Time()
        patch.setattr("pgebus._runtime.waking.monotonic", time)
        clock = DatabaseClock()
        clock.read(5_000.0)
        wakeup = Wakeup(clock)
        wakeup.take()
        for epoch in order:
            wakeup.due(epoch)
        assert wakeup.next_due == 5_001.0
        time.now += 0.5
        assert not wakeup.take()
        time.now += 0.5
        assert wakeup.take()


async def test_in_doubt_it_looks_and_asks_anew_what_is_due(wakeup: Wakeup) -> None:
    """A notification that was missed may have told of something due earlier than all that is known."""
    assert not wakeup.doubted()
    wakeup.doubt()
    assert not await waits(wakeup)
    assert wakeup.take()
    assert wakeup.doubted()
    assert not wakeup.doubted()  # once


def test_a_look_alone_is_no_doubt(wakeup: Wakeup) -> None:
    wakeup.look()
    wakeup.stir()
    wakeup.due(5_000.0)
    wakeup.notified("")
    assert not wakeup.doubted()


def test_a_doubt_outlasts_the_look_that_it_asked_for(wakeup: Wakeup) -> None:
    """That look may fail before anybody has asked."""
    wakeup.doubt()
    wakeup.take()
    wakeup.take()
    assert wakeup.doubted()


def test_a_doubt_forgets_no_due_time(wakeup: Wakeup) -> None:
    wakeup.due(5_010.0)
    wakeup.doubt()
    wakeup.take()
    assert wakeup.next_due == 5_010.0


async def test_an_earlier_due_time_wakes_who_waits_for_a_later_one(wakeup: Wakeup) -> None:
    wakeup.due(5_020.0)
    wakeup.take()
    task = asyncio.create_task(wakeup.wait(30.0))
    await asyncio.sleep(0)
    wakeup.due_in(10.0)
    async with asyncio.timeout(5):
        await task
    assert not wakeup.take()
    assert wakeup.next_due == 5_010.0


async def test_a_later_due_time_wakes_nobody(wakeup: Wakeup) -> None:
    wakeup.due(5_010.0)
    wakeup.take()
    wakeup.due(5_020.0)
    assert await waits(wakeup)
    assert wakeup.next_due == 5_010.0


async def test_waiting_ends_when_something_is_due() -> None:
    clock = DatabaseClock()
    clock.read(5_000.0)
    wakeup = Wakeup(clock)
    wakeup.take()
    wakeup.due_in(0.02)
    wakeup.take()
    async with asyncio.timeout(5):
        while not wakeup.take():  # a timer may fire a clock tick early
            await wakeup.wait(30.0)
    assert clock.epoch() >= 5_000.02


async def test_waiting_ends_after_the_time_given(wakeup: Wakeup) -> None:
    async with asyncio.timeout(5):
        await wakeup.wait(0.01)
    assert not wakeup.take()


@pytest.mark.parametrize("at_most", [0.0, -1.0, 5.0])
async def test_waiting_always_lets_others_run(wakeup: Wakeup, at_most: float) -> None:
    """A claim loop that finds its flag set each time must not starve the handlers."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for expected in range(1, 6):
        wakeup.look()
        await wakeup.wait(at_most)
        assert turns >= expected
    task.cancel()
