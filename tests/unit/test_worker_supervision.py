"""What the supervisor of worker processes decides; the time is given."""

from __future__ import annotations

import signal
from random import Random

import pytest

from pgebus.cli.worker.supervision import (
    FIRST_PAUSE_SECONDS,
    KILL_AFTER_SECONDS,
    LONGEST_PAUSE_SECONDS,
    RELOAD_PATIENCE_SECONDS,
    WELL_AFTER_SECONDS,
    Finish,
    Send,
    Start,
    Supervisor,
)

TERM, KILL, INT = signal.SIGTERM, signal.SIGKILL, signal.SIGINT


def running(count: int, *, reloading: bool = False) -> Supervisor:
    """A supervisor of *count* processes that all run since the moment 0."""
    supervisor = Supervisor(count, Random(0), reloading=reloading)
    supervisor.ready()
    for place in range(count):
        assert Start(place) in supervisor.decide(0.0)
        supervisor.started(place, 0.0)
    assert supervisor.decide(0.0) == []
    return supervisor


def test_the_others_are_started_when_the_first_is_ready() -> None:
    supervisor = Supervisor(3, Random(0))
    assert supervisor.decide(0.0) == [Start(0)]
    supervisor.started(0, 0.0)
    assert supervisor.decide(1.0) == []
    supervisor.ready()
    assert supervisor.decide(2.0) == [Start(1), Start(2)]


@pytest.mark.parametrize("status", [1, 2])
def test_a_first_process_that_ends_with_an_error_ends_everything_with_it(status: int) -> None:
    supervisor = Supervisor(3, Random(0))
    supervisor.started(0, 0.0)
    supervisor.ended(0, status, 1.0)
    assert supervisor.decide(1.0) == [Finish(status)]


def test_a_first_process_that_is_killed_is_started_again() -> None:
    """That is nobody's mistake on the command line."""
    supervisor = Supervisor(2, Random(0))
    supervisor.started(0, 0.0)
    assert supervisor.ended(0, -KILL, 1.0)
    assert supervisor.decide(supervisor.next_look()) == [Start(0)]


@pytest.mark.parametrize("status", [-KILL, 1, 0])
def test_a_process_that_ends_by_itself_is_started_again_after_a_pause(status: int) -> None:
    supervisor = running(2)
    pause = supervisor.ended(1, status, 10.0)
    assert pause is not None
    assert FIRST_PAUSE_SECONDS / 2 <= pause <= FIRST_PAUSE_SECONDS
    assert supervisor.decide(10.0) == []
    assert supervisor.next_look() == 10.0 + pause
    assert supervisor.decide(10.0 + pause) == [Start(1)]


def test_the_pauses_double_up_to_a_ceiling_and_are_not_those_of_another_place() -> None:
    supervisor, now = running(2), 0.0
    bounds = []
    for failure in range(40):
        pause = supervisor.ended(0, 1, now)
        assert pause is not None
        bound = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**failure)
        assert bound / 2 <= pause <= bound
        bounds.append(pause)
        now += pause
        supervisor.started(0, now)
    assert bounds[-1] >= LONGEST_PAUSE_SECONDS / 2
    other = supervisor.ended(1, 1, 1.0)
    assert other is not None
    assert other <= FIRST_PAUSE_SECONDS


def test_a_process_that_was_well_for_a_while_begins_with_the_shortest_pause() -> None:
    supervisor = running(1)
    for _ in range(5):
        supervisor.ended(0, 1, 0.0)
        supervisor.started(0, 0.0)
    pause = supervisor.ended(0, 1, WELL_AFTER_SECONDS)
    assert pause is not None
    assert pause <= FIRST_PAUSE_SECONDS


def test_two_fleets_do_not_return_as_one() -> None:
    pauses = set()
    for seed in range(10):
        supervisor = Supervisor(1, Random(seed))
        supervisor.ready()
        supervisor.started(0, 0.0)
        pauses.add(supervisor.ended(0, -KILL, 0.0))
    assert len(pauses) == 10


def test_the_first_signal_is_handed_on_once_and_nothing_is_started_again() -> None:
    supervisor = running(2)
    supervisor.told(INT, 5.0)
    assert supervisor.decide(5.0) == [Send(0, TERM), Send(1, TERM)]
    assert supervisor.decide(6.0) == []
    supervisor.ended(0, 0, 7.0)
    assert supervisor.decide(7.0) == []
    supervisor.ended(1, 0, 8.0)
    assert supervisor.decide(8.0) == [Finish(0)]


def test_a_place_that_waits_for_its_pause_does_not_hold_up_the_end() -> None:
    supervisor = running(2)
    supervisor.ended(0, 1, 5.0)
    supervisor.told(TERM, 5.1)
    assert supervisor.decide(5.1) == [Send(1, TERM)]
    supervisor.ended(1, 0, 5.2)
    assert supervisor.decide(5.2) == [Finish(0)]


@pytest.mark.parametrize(("number", "status"), [(INT, 130), (TERM, 143)])
def test_the_second_signal_is_handed_on_and_who_does_not_hear_it_is_killed(number: int, status: int) -> None:
    supervisor = running(2)
    supervisor.told(number, 5.0)
    supervisor.decide(5.0)
    supervisor.told(number, 6.0)
    assert supervisor.decide(6.0) == [Send(0, TERM), Send(1, TERM)]
    supervisor.ended(0, 143, 6.5)
    assert supervisor.next_look() == 6.0 + KILL_AFTER_SECONDS
    assert supervisor.decide(6.0 + KILL_AFTER_SECONDS) == [Send(1, KILL)]
    assert supervisor.decide(6.1 + KILL_AFTER_SECONDS) == []
    supervisor.ended(1, -KILL, 19.0)
    assert supervisor.decide(19.0) == [Finish(status)]


def test_two_signals_at_once_are_both_handed_on() -> None:
    supervisor = running(1)
    supervisor.told(TERM, 5.0)
    supervisor.told(TERM, 5.0)
    assert supervisor.decide(5.0) == [Send(0, TERM), Send(0, TERM)]


def test_the_third_signal_kills() -> None:
    supervisor = running(2)
    for moment in (5.0, 6.0, 7.0):
        supervisor.told(TERM, moment)
    assert supervisor.decide(7.0) == [Send(0, KILL), Send(1, KILL)]
    assert supervisor.decide(7.0) == []


@pytest.mark.parametrize("status", [1, -KILL, -signal.SIGSEGV])
def test_a_process_that_fails_as_it_is_stopped_makes_the_status_1(status: int) -> None:
    supervisor = running(2)
    supervisor.told(TERM, 5.0)
    supervisor.decide(5.0)
    supervisor.ended(0, status, 6.0)
    supervisor.ended(1, 0, 6.0)
    assert supervisor.decide(6.0) == [Finish(1)]


def test_a_process_that_had_not_learned_yet_to_hear_the_signal_has_stopped_all_the_same() -> None:
    supervisor = running(1)
    supervisor.told(TERM, 0.1)
    supervisor.decide(0.1)
    supervisor.ended(0, -TERM, 0.2)
    assert supervisor.decide(0.2) == [Finish(0)]


# reloading


def test_a_change_restarts_what_runs_and_what_does_not_hear_it_in_time_at_once() -> None:
    supervisor = running(1, reloading=True)
    supervisor.changed(5.0)
    assert supervisor.decide(5.0) == [Send(0, TERM)]
    assert supervisor.next_look() == 5.0 + RELOAD_PATIENCE_SECONDS
    assert supervisor.decide(5.0 + RELOAD_PATIENCE_SECONDS) == [Send(0, TERM)]
    assert supervisor.decide(5.0 + RELOAD_PATIENCE_SECONDS + KILL_AFTER_SECONDS) == [Send(0, KILL)]
    supervisor.ended(0, -KILL, 20.0)
    assert supervisor.decide(20.0) == [Start(0)]
    supervisor.started(0, 20.0)
    assert supervisor.decide(20.0) == []


def test_what_ends_by_itself_waits_for_a_change() -> None:
    supervisor = Supervisor(1, Random(0), reloading=True)
    supervisor.started(0, 0.0)
    assert supervisor.ended(0, 2, 1.0) is None
    assert supervisor.decide(1000.0) == []
    assert supervisor.next_look() == float("inf")
    supervisor.changed(2000.0)
    assert supervisor.decide(2000.0) == [Start(0)]


def test_a_change_that_came_while_it_failed_is_not_forgotten() -> None:
    supervisor = Supervisor(1, Random(0), reloading=True)
    supervisor.started(0, 0.0)
    supervisor.changed(1.0)
    assert supervisor.ended(0, 2, 1.5) == 0.0
    assert supervisor.decide(1.5) == [Start(0)]


def test_it_ends_while_it_waits_for_a_change() -> None:
    supervisor = Supervisor(1, Random(0), reloading=True)
    supervisor.started(0, 0.0)
    supervisor.ended(0, 2, 1.0)
    supervisor.told(INT, 2.0)
    assert supervisor.decide(2.0) == [Finish(0)]
