from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pgebus._runtime.pulse import Pulse
from pgebus._runtime.supervision import Crew, Loops, Pause, cancel, is_dismissed, keep_running, spawn

DATABASE_FAILURES = [
    asyncpg.AdminShutdownError("x"),
    asyncpg.TooManyConnectionsError("x"),
    asyncpg.InterfaceError("x"),
    asyncpg.InternalClientError("x"),
    DBAPIError("SELECT 1", None, Exception("x")),
    PoolTimeoutError("x"),
    ConnectionRefusedError("x"),
    TimeoutError("x"),
    EOFError("x"),
]


class Body:
    """A loop that fails with each of *errors* in turn and then runs for ever."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.runs = 0
        self.well = asyncio.Event()

    async def __call__(self) -> NoReturn:
        self.runs += 1
        if self.errors:
            raise self.errors.pop(0)
        self.well.set()
        await asyncio.Future()
        raise AssertionError("nobody ends that future")


def is_proven(*, proven: bool = True) -> asyncio.Event:
    event = asyncio.Event()
    if proven:
        event.set()
    return event


async def for_ever() -> NoReturn:
    await asyncio.Future()
    raise AssertionError("nobody ends that future")


async def fail(error: BaseException) -> NoReturn:
    raise error


async def soon(what: Awaitable[Any]) -> Any:
    """Wait for *what*, which takes no time but turns of the event loop."""
    async with asyncio.timeout(5):
        return await what


# keep_running


@pytest.mark.parametrize("error", DATABASE_FAILURES, ids=lambda error: type(error).__name__)
async def test_a_loop_that_the_database_failed_begins_again(error: Exception) -> None:
    body, health = Body(error), Pulse("claim")
    task = asyncio.create_task(keep_running(body, health, proven=is_proven(), longest_pause=0.0))
    await soon(body.well.wait())
    assert body.runs == 2
    assert health.failures == 1
    assert not health.ok  # the body says when it is well again
    assert health.last_error is not None
    assert health.last_error.startswith(f"{type(error).__name__}: ")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("error", [ValueError("x"), AssertionError("x"), KeyError("x"), RuntimeError("x")], ids=repr)
async def test_a_loop_that_failed_on_anything_else_is_not_run_again(error: Exception) -> None:
    body, health = Body(error), Pulse("claim")
    with pytest.raises(type(error)):
        await soon(keep_running(body, health, proven=is_proven()))
    assert body.runs == 1


async def test_a_system_that_runs_never_gives_up_on_the_database() -> None:
    body, health = Body(*[ConnectionRefusedError() for _ in range(50)]), Pulse("claim")
    task = asyncio.create_task(keep_running(body, health, proven=is_proven(), longest_pause=0.0))
    await soon(body.well.wait())
    assert health.failures == 50
    task.cancel()


async def test_a_system_that_has_never_run_gives_up_after_three_failures() -> None:
    body, health = Body(*[ConnectionRefusedError(str(number)) for number in range(5)]), Pulse("claim")
    with pytest.raises(ConnectionRefusedError, match="2"):
        await soon(keep_running(body, health, proven=is_proven(proven=False), longest_pause=0.0))
    assert body.runs == 3


async def test_a_system_that_has_never_run_survives_two_failures() -> None:
    body = Body(ConnectionRefusedError(), ConnectionRefusedError())
    task = asyncio.create_task(keep_running(body, Pulse("claim"), proven=is_proven(proven=False), longest_pause=0.0))
    await soon(body.well.wait())
    task.cancel()


async def test_pauses_grow_and_begin_anew_after_a_long_time_without_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = 0.0
    give_way = asyncio.sleep

    async def note(delay: float) -> None:
        slept.append(delay)
        await give_way(0)

    monkeypatch.setattr("pgebus._runtime.supervision.asyncio.sleep", note)
    monkeypatch.setattr("pgebus._runtime.supervision.monotonic", lambda: now)
    well = asyncio.Event()

    runs = 0

    async def body() -> NoReturn:
        nonlocal now, runs
        runs += 1
        if runs == 5:
            now += 11.0  # this run has lasted
        if runs == 7:
            well.set()
            await for_ever()
        raise ConnectionResetError

    task = asyncio.create_task(keep_running(body, Pulse("claim"), proven=is_proven(), longest_pause=5.0))
    await soon(well.wait())
    task.cancel()
    first, *grown, anew, second = slept
    assert first == anew == 0.0
    assert 0.025 <= grown[0] <= 0.05 <= grown[1] <= 0.1 <= grown[2] <= 0.2
    assert 0.025 <= second <= 0.05


async def test_each_failure_is_logged_with_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    body = Body(ConnectionRefusedError("port 5432"))
    with caplog.at_level(logging.WARNING, "pgebus"):
        task = asyncio.create_task(keep_running(body, Pulse("listen"), proven=is_proven(), longest_pause=0.0))
        await soon(body.well.wait())
    task.cancel()
    [record] = caplog.records
    assert record.__dict__["pgebus_loop"] == "listen"
    assert "ConnectionRefusedError: port 5432" in record.getMessage()


def test_a_loop_is_well_when_it_says_so() -> None:
    health = Pulse("claim", ok=False, failures=3, last_error="x")
    health.well()
    assert (health.ok, health.failures, health.last_error) == (True, 3, "x")
    assert health.well_at is not None


# Pause


@given(st.floats(min_value=0.0, max_value=60.0), st.integers(1, 60))
def test_a_pause_lies_in_the_upper_half_of_its_bound(ceiling: float, failures: int) -> None:
    pause = Pause(ceiling)
    drawn = [pause.next() for _ in range(failures)]
    assert drawn[0] == 0.0
    for number, delay in enumerate(drawn[1:]):
        bound = min(ceiling, 0.05 * 2**number)
        assert bound / 2 <= delay <= bound


def test_no_number_of_failures_is_too_large_for_a_pause() -> None:
    pause = Pause(5.0)
    assert all(pause.next() <= 5.0 for _ in range(2_000))
    pause.reset()
    assert pause.next() == 0.0
    assert pause.next() <= 0.05


# spawn, cancel


async def test_cancelling_says_whether_the_task_has_ended() -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    task = spawn(stubborn(), "stubborn")
    await asyncio.sleep(0)
    assert not await cancel(task, 0.01)
    release.set()
    assert await cancel(task, 5.0)
    assert task.get_name() == "stubborn"


# Loops


async def test_a_loop_that_fails_is_heard_by_whoever_waits() -> None:
    loops, error = Loops(), ValueError("x")
    loops.start("well", for_ever())
    loops.start("broken", fail(error))
    with pytest.raises(ValueError, match="x") as caught:
        await soon(loops.until(asyncio.Event().wait()))
    assert caught.value is error
    assert loops.alive("well")
    assert not loops.alive("broken")
    assert not loops.alive("never started")
    await loops.end()


async def test_a_loop_that_failed_before_is_heard_at_the_next_wait() -> None:
    loops = Loops()
    loops.start("broken", fail(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        await soon(loops.until(asyncio.Event().wait()))
    reached = is_proven()
    with pytest.raises(ValueError, match="x"):
        await soon(loops.until(reached.wait()))
    await loops.end()


async def test_a_failure_comes_before_what_was_waited_for() -> None:
    """Both at once: a start that has become ready and is broken is broken."""
    loops, reached = Loops(), asyncio.Event()

    async def break_it() -> NoReturn:
        reached.set()
        raise ValueError("x")

    loops.start("broken", break_it())
    with pytest.raises(ValueError, match="x"):
        await soon(loops.until(reached.wait()))
    await loops.end()


async def test_the_first_of_several_waits_is_enough() -> None:
    loops, never = Loops(), asyncio.Event()
    loops.start("well", for_ever())
    cancelled = asyncio.Event()

    async def patient() -> None:
        try:
            await never.wait()
        finally:
            cancelled.set()

    await soon(loops.until(patient(), is_proven().wait()))
    await soon(cancelled.wait())
    await loops.end()


async def test_a_loop_that_returns_is_a_bug() -> None:
    loops = Loops()

    async def returns() -> None:
        return

    body: Callable[[], Coroutine[Any, Any, Any]] = returns
    loops.start("done", body())
    with pytest.raises(AssertionError, match="pgebus-done"):
        await soon(loops.until(asyncio.Event().wait()))
    await loops.end()


async def test_at_the_end_every_loop_has_ended() -> None:
    loops = Loops()
    ended: list[str] = []

    async def body(name: str) -> NoReturn:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    loops.start("one", body("one"))
    loops.start("other", body("other"))
    loops.start("broken", fail(ValueError("heard before")))
    await asyncio.sleep(0)
    await soon(loops.end())
    assert sorted(ended) == ["one", "other"]
    assert not any(loops.alive(name) for name in ("one", "other", "broken"))


async def test_there_need_be_no_loop_at_all() -> None:
    loops = Loops()
    await soon(loops.until(is_proven().wait()))
    await soon(loops.end())


# Crew


async def test_a_crew_counts_those_that_run() -> None:
    crew, go = Crew(), asyncio.Event()

    async def work() -> None:
        await go.wait()

    tasks = [crew.start(work(), f"work-{number}") for number in range(3)]
    assert len(crew) == 3
    assert all(crew.includes(task) for task in tasks)
    assert not crew.includes(asyncio.current_task())
    assert not crew.includes(None)
    assert not await crew.wait(0.01)
    go.set()
    assert await soon(crew.wait(5.0))
    assert len(crew) == 0
    assert not crew.includes(tasks[0])


async def test_an_empty_crew_keeps_nobody_waiting() -> None:
    assert await soon(Crew().wait(60.0))


async def test_a_crew_without_patience_answers_at_once() -> None:
    crew = Crew()
    task = crew.start(for_ever(), "work")
    assert not await soon(crew.wait(0.0))
    crew.cancel()
    assert await soon(crew.wait(5.0))
    assert task.cancelled()


async def test_a_task_that_raises_is_reported_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    crew = Crew()
    crew.start(fail(ValueError("a bug")), "work")
    assert await soon(crew.wait(5.0))
    [record] = caplog.records
    assert record.levelno == logging.CRITICAL
    assert record.exc_info is not None


async def test_whom_the_crew_cancels_is_dismissed() -> None:
    crew = Crew()
    seen: list[bool] = []

    async def work() -> None:
        try:
            await for_ever()
        finally:
            seen.append(is_dismissed(asyncio.current_task()))

    tasks = [crew.start(work(), f"work-{number}") for number in range(2)]
    await asyncio.sleep(0)
    assert not any(is_dismissed(task) for task in tasks)
    crew.cancel()
    assert all(is_dismissed(task) for task in tasks)
    assert await soon(crew.wait(5.0))
    assert seen == [True, True]


async def test_who_cancels_himself_is_not_dismissed() -> None:
    """A handler's own code may cancel the task that it runs in; nobody has asked it to end."""
    crew = Crew()
    seen: list[bool] = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(0)
        finally:
            seen.append(is_dismissed(task))

    task = crew.start(work(), "work")
    assert await soon(crew.wait(5.0))
    assert task.cancelled()
    assert seen == [False]


async def test_who_had_ended_before_is_not_dismissed() -> None:
    crew, go = Crew(), is_proven()

    async def work() -> None:
        await go.wait()

    task = crew.start(work(), "work")
    assert await soon(crew.wait(5.0))
    crew.cancel()
    assert not is_dismissed(task)


def test_no_task_at_all_is_not_dismissed() -> None:
    assert not is_dismissed(None)
