"""How outcomes are written down; the deliveries lie in memory.

Not under test is what PostgreSQL makes of the statements.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import asyncpg
import pytest

from pgebus._runtime.acknowledging import Acknowledger
from pgebus._runtime.leases import Fence, Holdings, Lease
from pgebus._runtime.outcome import (
    Committed,
    Complete,
    DeadLetter,
    Failure,
    Lost,
    Outcome,
    Release,
    Reschedule,
    Unhandle,
)
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.store import Store
from pgebus._runtime.supervision import keep_running

FAILURE = Failure("shop.pay", "ValueError", "Müll")


def retry(failure: Failure | None = FAILURE, *, seconds: float = 5.0) -> Reschedule:
    return Reschedule(timedelta(seconds=seconds), counted=True, failure=failure)


class Ledger(Store):
    """Takes down what is written.

    Attributes:
        tried: Each write on one delivery, with the message of its failure, and each batch.
        written: What PostgreSQL has confirmed, in order.
        locked: Event ids whose rows somebody else has locked.
        gone: Event ids whose lease is somebody else's.
        errors: Asked before each write on an event; what it returns is raised.
    """

    def __init__(self) -> None:
        self.tried: list[tuple[int, str | None]] = []
        self.written: list[tuple[str, int]] = []
        self.locked: set[int] = set()
        self.gone: set[int] = set()
        self.errors: Callable[[int, str | None], BaseException | None] = lambda event_id, message: None

    async def complete(self, leases: Iterable[Lease]) -> set[tuple[int, str]]:
        return self._write_batch("complete", [lease.fence for lease in leases])

    async def forget(self, leases: Iterable[Lease]) -> set[tuple[int, str]]:
        return self._write_batch("forget", [lease.fence for lease in leases])

    async def release(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        return self._write_batch("release", list(fences))

    async def still_held(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        return {fence[:2] for fence in fences if fence.event_id not in self.gone}

    async def reschedule(
        self, fence: Fence, *, delay: float, give_back: int, handled: Sequence[str], entry: dict[str, Any] | None
    ) -> bool:
        return self._write_one("reschedule", fence, entry)

    async def bury(self, fence: Fence, *, handled: Sequence[str], entry: dict[str, Any] | None) -> bool:
        return self._write_one("bury", fence, entry)

    async def unhandle(self, fence: Fence) -> bool:
        return self._write_one("unhandle", fence, None)

    def _write_one(self, verb: str, fence: Fence, entry: dict[str, Any] | None) -> bool:
        message = None if entry is None else entry["message"]
        self._try(fence.event_id, message)
        if fence.event_id in self.locked | self.gone:
            return False
        self.written.append((verb, fence.event_id))
        return True

    def _write_batch(self, verb: str, fences: list[Fence]) -> set[tuple[int, str]]:
        for fence in fences:
            self._try(fence.event_id, None)
        kept = [fence for fence in fences if fence.event_id not in self.locked | self.gone]
        self.written += [(verb, fence.event_id) for fence in kept]
        return {fence[:2] for fence in kept}

    def _try(self, event_id: int, message: str | None) -> None:
        self.tried.append((event_id, message))
        if (error := self.errors(event_id, message)) is not None:
            raise error


class Desk:
    """An acknowledger with everything around it; it starts again after each failure."""

    def __init__(self) -> None:
        self.store = Ledger()
        self.holdings = Holdings()
        self.settled: list[float | None] = []
        self.health = Pulse("acknowledge")
        self.acknowledger = Acknowledger(
            self.store, self.holdings, self.settled.append, self.health, forgets="brief".__eq__
        )

    def put(self, event_id: int, outcome: Outcome, *, keyed: bool = False, group: str = "default") -> Lease:
        lease = Lease(
            fence=Fence(event_id, group, 1, 77),
            type="order.placed",
            keyed=keyed,
            attempt=1,
            lost=0,
            handled=(),
            row=cast("asyncpg.Record", {}),
        )
        self.holdings.add([lease])
        self.acknowledger.put(lease, outcome)
        return lease

    @property
    def held(self) -> set[int]:
        return {lease.fence.event_id for lease in self.holdings}

    @asynccontextmanager
    async def runs(self) -> AsyncIterator[None]:
        proven = asyncio.Event()
        proven.set()
        task = asyncio.create_task(
            keep_running(self.acknowledger.run, self.health, proven=proven, longest_pause=0.0), name="acknowledge"
        )
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run_dry(self) -> None:
        """Run until everything is written."""
        async with self.runs():
            assert await self.acknowledger.drained(5.0)


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def until(check: Callable[[], object]) -> None:
    """Give way until *check* is true."""
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110 - what is waited for is a state, of many parts
            await asyncio.sleep(0)


def ours(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return what the acknowledger said on *level*."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "pgebus._runtime.acknowledging" and record.levelno == level
    ]


# What is written


async def test_every_outcome_is_written_by_its_own_verb(desk: Desk) -> None:
    desk.put(1, Complete())
    desk.put(2, Release())
    desk.put(3, retry())
    desk.put(4, DeadLetter(FAILURE))
    desk.put(5, Unhandle())
    await desk.run_dry()
    assert desk.store.written == [("complete", 1), ("release", 2), ("reschedule", 3), ("bury", 4), ("unhandle", 5)]
    assert desk.held == set()


@pytest.mark.parametrize("outcome", [Committed(), Lost()])
async def test_where_nothing_is_to_be_written_the_lease_is_dropped_at_once(desk: Desk, outcome: Outcome) -> None:
    desk.put(1, outcome)
    assert desk.held == set()
    assert desk.settled == [None]
    assert await desk.acknowledger.drained(0.0)


async def test_a_lease_that_is_lost_is_dropped_with_a_warning(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.store.gone = {1, 2}
    desk.put(1, Complete())
    desk.put(2, retry())
    desk.put(3, Complete())
    await desk.run_dry()
    assert desk.store.written == [("complete", 3)]
    assert desk.held == set()
    assert ["lost" in text for text in ours(caplog, logging.WARNING)] == [True, True]


# What PostgreSQL refuses


def refuse(desk: Desk, refused: Callable[[int, str | None], bool]) -> None:
    def errors(event_id: int, message: str | None) -> BaseException | None:
        return asyncpg.UntranslatableCharacterError("no such character: Müll") if refused(event_id, message) else None

    desk.store.errors = errors


async def test_what_is_refused_is_said_in_ascii(desk: Desk) -> None:
    """The database may have an encoding that has not the characters of the message."""
    refuse(desk, lambda event_id, message: not (message or "").isascii())
    desk.put(1, retry())
    await desk.run_dry()
    assert desk.store.tried == [(1, "Müll"), (1, "Müll"), (1, "M?ll")]
    assert desk.store.written == [("reschedule", 1)]


@pytest.mark.parametrize("outcome", [retry(), DeadLetter(FAILURE)])
async def test_what_is_refused_again_and_again_is_dropped_with_an_error(
    desk: Desk, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing may hang for ever; what is not held any more is found running in our name, and given back."""
    refuse(desk, lambda event_id, message: True)
    desk.put(1, outcome)
    await desk.run_dry()
    assert desk.store.tried == [(1, "Müll"), (1, "Müll"), (1, "M?ll"), (1, "M?ll")]
    assert desk.store.written == []
    assert desk.held == set()
    [text] = ours(caplog, logging.ERROR)
    assert "event 1 " in text
    assert "UntranslatableCharacterError" in text
    assert "Müll" not in text  # what a refused message says may be a secret


async def test_what_is_refused_holds_nobody_up(desk: Desk) -> None:
    refuse(desk, lambda event_id, message: event_id == 1)
    desk.put(1, retry())
    desk.put(2, retry())
    desk.put(3, Complete())
    desk.put(4, DeadLetter(FAILURE))
    await desk.run_dry()
    assert [event_id for event_id, _ in desk.store.tried] == [1, 2, 3, 4, 1, 1, 1]
    assert desk.store.written == [("reschedule", 2), ("complete", 3), ("bury", 4)]


async def test_two_that_are_refused_are_counted_apart(desk: Desk) -> None:
    refuse(desk, lambda event_id, message: event_id == 1 or not (message or "").isascii())
    desk.put(1, retry())
    desk.put(2, retry())
    await desk.run_dry()
    assert desk.store.written == [("reschedule", 2)]
    assert [event_id for event_id, _ in desk.store.tried].count(1) == 4
    assert [event_id for event_id, _ in desk.store.tried].count(2) == 3


async def test_a_refusal_leaves_a_lease_that_is_lost_afterwards_worth_a_warning(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """After a refusal it is certain that nothing was written, so what is lost was not taken by our own write."""
    refuse(desk, lambda event_id, message: not (message or "").isascii())
    desk.store.gone = {1}
    desk.put(1, retry())
    await desk.run_dry()
    assert len(ours(caplog, logging.WARNING)) == 1


# What may work the next time


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.SerializationError("x"),
        asyncpg.DeadlockDetectedError("x"),
        asyncpg.QueryCanceledError("x"),
        asyncpg.TooManyConnectionsError("x"),
        asyncpg.DiskFullError("x"),
        asyncpg.InsufficientPrivilegeError("x"),
        asyncpg.UndefinedTableError("x"),
        asyncpg.ReadOnlySQLTransactionError("x"),
        asyncpg.AdminShutdownError("x"),
        asyncpg.ConnectionDoesNotExistError("x"),
        asyncpg.InterfaceError("x"),
        ConnectionResetError("x"),
        TimeoutError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("outcome", [retry(), DeadLetter(FAILURE), Complete(), Release(), Unhandle()])
async def test_an_outcome_outlasts_any_number_of_passing_errors(
    desk: Desk, error: BaseException, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing decided is forgotten, and nothing is made plainer, because a database was away for a while."""
    failures = iter([error] * 25)
    desk.store.errors = lambda event_id, message: next(failures, None)
    lease = desk.put(1, outcome)
    async with desk.runs():
        await until(lambda: len(desk.store.tried) == 20)
        assert lease.fence in desk.holdings
        assert not await desk.acknowledger.drained(0.0)
        assert await desk.acknowledger.drained(5.0)
    assert [event_id for _, event_id in desk.store.written] == [1]
    assert len(desk.store.tried) == 26
    assert len(set(desk.store.tried)) == 1
    assert ours(caplog, logging.ERROR) == []


async def test_after_a_lost_answer_a_lease_that_is_gone_is_no_surprise(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """It was most likely finished by our own write, whose answer was lost."""
    failures = iter([asyncpg.ConnectionDoesNotExistError("x")])
    desk.store.errors = lambda event_id, message: next(failures, None)
    desk.store.gone = {1}
    desk.put(1, Complete())
    await desk.run_dry()
    assert desk.held == set()
    assert ours(caplog, logging.WARNING) == []


# Rows that somebody else has locked


@pytest.mark.parametrize("outcome", [Complete(), Release(), retry(), DeadLetter(FAILURE), Unhandle()])
async def test_a_locked_row_holds_up_nobody_and_is_tried_again(
    desk: Desk, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgebus._runtime.acknowledging.LOCKED_SECONDS", 0.001)
    desk.store.locked = {2}
    for event_id in (1, 2, 3):
        desk.put(event_id, outcome)
    async with desk.runs():
        await until(lambda: len(desk.store.written) == 2)
        await until(lambda: len(desk.store.tried) > 10)
        assert desk.held == {2}
        assert not await desk.acknowledger.drained(0.0)
        desk.store.locked.clear()
        assert await desk.acknowledger.drained(5.0)
    assert [event_id for _, event_id in desk.store.written] == [1, 3, 2]
    assert desk.held == set()
    assert ours(caplog, logging.WARNING) == []


async def test_what_comes_in_is_not_kept_waiting_by_a_locked_row(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgebus._runtime.acknowledging.LOCKED_SECONDS", 3600.0)
    desk.store.locked = {1}
    desk.put(1, Complete())
    async with desk.runs():
        await until(lambda: desk.store.tried)
        for event_id in range(2, 6):
            desk.put(event_id, retry() if event_id % 2 else Complete())
            await until(lambda: desk.held == {1})
    assert [event_id for _, event_id in desk.store.written] == [2, 3, 4, 5]


async def test_what_is_not_written_yet_settles_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delivery is due again so and so long after the write, not after the decision."""
    monkeypatch.setattr("pgebus._runtime.acknowledging.LOCKED_SECONDS", 0.001)
    desk.store.locked = {1}
    desk.put(1, retry(seconds=7.0))
    async with desk.runs():
        await until(lambda: len(desk.store.tried) > 3)
        assert desk.settled == []
        desk.store.locked.clear()
        assert await desk.acknowledger.drained(5.0)
    assert desk.settled == [7.0]


async def test_a_locked_row_is_not_forgotten_when_the_next_write_fails(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgebus._runtime.acknowledging.LOCKED_SECONDS", 0.001)
    desk.store.locked = {1}
    desk.put(1, Complete())
    failures = iter([asyncpg.ConnectionDoesNotExistError("x"), asyncpg.SerializationError("x")])
    desk.store.errors = lambda event_id, message: next(failures, None) if event_id == 2 else None
    desk.put(2, retry())
    async with desk.runs():
        await until(lambda: desk.held == {1})
        desk.store.locked.clear()
        assert await desk.acknowledger.drained(5.0)
    assert sorted(desk.store.written) == [("complete", 1), ("reschedule", 2)]


@pytest.mark.parametrize("outcome", [Complete(), retry()])
async def test_a_row_that_was_locked_by_whoever_took_it_away_is_lost(
    desk: Desk, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgebus._runtime.acknowledging.LOCKED_SECONDS", 0.001)
    desk.store.locked = {1}
    desk.put(1, outcome)
    async with desk.runs():
        await until(lambda: len(desk.store.tried) > 3)
        desk.store.gone = {1}
        assert await desk.acknowledger.drained(5.0)
    assert desk.store.written == []
    assert desk.held == set()
    assert len(ours(caplog, logging.WARNING)) == 1


async def test_what_keeps_no_history_is_written_apart_from_what_does() -> None:
    desk = Desk()
    for event_id in range(1, 7):
        desk.put(event_id, Release() if event_id > 4 else Complete(), group="brief" if event_id % 2 else "default")
    async with desk.runs():
        assert await desk.acknowledger.drained(5.0)
    assert desk.store.written == [
        ("forget", 1), ("forget", 3), ("complete", 2), ("complete", 4), ("release", 5), ("release", 6),
    ]  # fmt: skip
    assert desk.held == set()
