"""When the claim loop asks, and what it starts; the deliveries lie in memory.

Not under test is what PostgreSQL answers.
"""

from __future__ import annotations

import asyncio
import operator
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import asyncpg
import pytest

from pgebus._runtime.acknowledging import Acknowledger
from pgebus._runtime.claiming import MAX_AHEAD, MOST_SUSPECTS, Claimer, Rate
from pgebus._runtime.dispatching import Dispatcher, Following
from pgebus._runtime.leases import Fence, Holdings, Lane, Lease, Place
from pgebus._runtime.outcome import Committed, Complete, Outcome
from pgebus._runtime.presence import Presence
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.quarantine import ALONE_SECONDS, DRAIN_SECONDS, LONGEST_WAIT_SECONDS, RETRY_SECONDS
from pgebus._runtime.store import FROM_THE_BEGINNING, Store
from pgebus._runtime.supervision import Crew
from pgebus._runtime.waking import DatabaseClock, Wakeup
from pgebus.groups import Group
from pgebus.retry import RetryPolicy
from pgebus.routing import EventRouter


class Shelf(Store):
    """Deliveries in memory. Hands out what is pending, in order, and keeps a journal."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.pending: deque[tuple[int, int]] = deque()  # event id, lost
        self.unhandled: deque[int] = deque()
        self.limited = self.locked = False
        self.limits: list[int] = []
        self.taken: list[tuple[int, int]] = []  # by the last claim of those that were lost once
        self.running: dict[int, Fence] = {}
        self.lost: dict[int, int] = {}
        self.answering = asyncio.Event()
        self.answering.set()
        self.writing = asyncio.Event()
        self.writing.set()
        self.idle = False
        self.asked = 0
        self._claim_seq = 0

    def add(self, *event_ids: int, lost: int = 0) -> None:
        self.pending.extend((event_id, lost) for event_id in event_ids)

    async def claim(
        self, worker_id: int, groups: Sequence[str], limit: int, places: Mapping[Lane, Place] = FROM_THE_BEGINNING
    ) -> list[Lease]:
        self.asked += 1
        return await self._claim(worker_id, groups[0], [item for item in self.pending if item[1] == 0][:limit], limit)

    async def claim_suspect(self, worker_id: int, groups: Sequence[str]) -> list[Lease]:
        if not groups:
            return []
        return await self._claim(worker_id, groups[0], [item for item in self.pending if item[1] > 0][:1])

    async def claim_lost_once(self, worker_id: int, groups: Sequence[str], limit: int) -> list[Lease]:
        self.taken = [item for item in self.pending if item[1] == 1][:limit]
        return await self._claim(worker_id, groups[0], self.taken)

    async def suspects(self, groups: Sequence[str]) -> bool:
        return any(lost for _, lost in self.pending)

    async def _claim(
        self, worker_id: int, group: str, taken: list[tuple[int, int]], limit: int | None = None
    ) -> list[Lease]:
        leases = []
        for event_id, lost in taken:
            self.pending.remove((event_id, lost))
            self._claim_seq += 1
            fence = Fence(event_id, group, self._claim_seq, worker_id)
            self.running[event_id], self.lost[event_id] = fence, lost
            leases.append(
                Lease(
                    fence=fence,
                    type="order.placed",
                    keyed=False,
                    attempt=1 + lost,
                    lost=lost,
                    handled=(),
                    row=cast("asyncpg.Record", {"lane": 0, "due": 0}),
                )
            )
        if taken and limit is not None:
            self.limits.append(limit)
        await self.answering.wait()
        return leases

    async def complete(self, leases: Iterable[Lease]) -> set[tuple[int, str]]:
        await self.writing.wait()
        return self._finish([lease.fence for lease in leases], "completed")

    async def release(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        await self.writing.wait()
        batch = [fence for fence in fences if self.running.get(fence.event_id) == fence]
        released = self._finish(batch, "released")
        # In their old place in the line.
        self.pending = deque(sorted([*self.pending, *((f.event_id, self.lost[f.event_id]) for f in batch)]))
        return released

    async def still_held(self, fences: Iterable[Fence]) -> set[tuple[int, str]]:
        return {fence[:2] for fence in fences if self.running.get(fence.event_id) == fence}

    async def strays(self, worker_id: int) -> list[Fence]:
        return [fence for fence in self.running.values() if fence.worker_id == worker_id]

    async def unhandled_types(self, groups: Sequence[str]) -> list[tuple[str, str]]:
        return [(groups[0], "order.placed")] if self.unhandled else []

    async def adopt(self, worker_id: int, group: str, event_type: str, limit: int) -> tuple[int, list[Lease]]:
        taken = [(self.unhandled.popleft(), 0) for _ in range(min(limit, len(self.unhandled)))]
        self.pending.extend(taken)
        return len(taken), await self._claim(worker_id, group, taken)

    async def limited_groups(self, groups: Sequence[str]) -> frozenset[str]:
        return frozenset(groups if self.limited else ())

    async def claim_limited(
        self, worker_id: int, group: str, limit: int, *, suspect: bool = False
    ) -> list[Lease] | None:
        return None if self.locked else await self.claim(worker_id, [group], limit)

    async def next_due(self, groups: Sequence[str]) -> tuple[float, float | None]:
        return 5_000.0, None

    async def set_idle(self, worker_id: int, idle: bool) -> None:
        self.idle = idle

    def _finish(self, fences: list[Fence], what: str) -> set[tuple[int, str]]:
        for fence in fences:
            del self.running[fence.event_id]
            self.journal.append(f"{what} {fence.event_id}")
        return {fence[:2] for fence in fences}


class Hands(Dispatcher):
    """Handlers that begin and end in the journal; those in `held` wait to be let go, all return `outcome`."""

    outcome: Outcome = Complete()

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.held: dict[int, asyncio.Event] = {}
        self.busy: set[int] = set()
        self.most = 0

    def hold(self, *event_ids: int) -> None:
        for event_id in event_ids:
            self.held[event_id] = asyncio.Event()

    async def forgo(self, lease: Lease) -> None: ...

    async def dispatch(self, lease: Lease, following: Following | None = None) -> Outcome:
        event_id = lease.fence.event_id
        self.journal.append(f"began {event_id}")
        self.busy.add(event_id)
        self.most = max(self.most, len(self.busy))
        try:
            if event_id in self.held:
                await self.held[event_id].wait()
        finally:
            self.busy.discard(event_id)
            self.journal.append(f"ended {event_id}")
        return self.outcome


class Registry(Presence):
    """Counts the rounds, each of which begins with the question whether the worker is present."""

    rounds = 0

    async def wait(self) -> int:
        self.rounds += 1
        return await super().wait()


async def handle(_ctx: object, _payload: object) -> None:
    """Never called: the hands are busy."""


class Bench:
    """A claimer with everything around it, for a worker that is present."""

    def __init__(
        self, slots: int = 2, ahead: int = MAX_AHEAD, group: str | Group = "default", notify: str = "auto"
    ) -> None:
        self.router = EventRouter(group=group)
        self.router.on("order.placed")(handle)
        self.journal: list[str] = []
        self.store = Shelf(self.journal)
        self.hands = Hands(self.journal)
        self.holdings = Holdings()
        self.crew = Crew()
        self.clock = DatabaseClock()
        self.wakeup = Wakeup(self.clock)
        self.presence = Registry(self.departed)
        self.acknowledger = Acknowledger(self.store, self.holdings, self.settled, Pulse("acknowledge"))
        self.claimer = Claimer(
            self.store,
            self.router,
            self.hands,
            self.acknowledger,
            holdings=self.holdings,
            presence=self.presence,
            wakeup=self.wakeup,
            clock=self.clock,
            crew=self.crew,
            groups=lambda: ["default"],
            slots=slots,
            ahead=ahead,
            poll_interval=60.0,
            notify=notify,
            health=Pulse("claim"),
        )
        self.presence.new_id()
        self.presence.arrive()

    def settled(self, due_in: float | None) -> None:
        self.claimer.settled(due_in)

    def departed(self, worker_id: int) -> None:
        """What the system does when others have ended this worker."""
        self.claimer.forget(worker_id)
        self.crew.cancel()

    async def done(self, count: int) -> None:
        """Wait until *count* deliveries are completed."""
        await until(lambda: sum(entry.startswith("completed") for entry in self.journal) == count)

    @property
    def began(self) -> list[int]:
        return [int(entry.split()[1]) for entry in self.journal if entry.startswith("began")]

    @asynccontextmanager
    async def runs(self) -> AsyncIterator[None]:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self.claimer.run()),
            asyncio.create_task(self.acknowledger.run()),
        ]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            self.crew.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.crew.wait(5.0)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def until(check: Callable[[], object]) -> None:
    """Give way until *check* is true."""
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110 - what is waited for is a state, of many parts
            await asyncio.sleep(0)


async def come_to_rest() -> None:
    """Give way so often that whatever could happen without a timer has happened."""
    for _ in range(100):
        await asyncio.sleep(0)


class Time:
    """The monotonic clock of the claimer, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def standing_still(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Whatever is finished was finished in the last second, and no look comes by itself, unless the clock is moved."""
    time = Time()
    monkeypatch.setattr("pgebus._runtime.claiming.monotonic", time)
    return time


async def pass_by(bench: Bench, time: Time, seconds: float) -> None:
    """Let *seconds* go by, a tenth at a time, with a look after each."""
    end = time.now + seconds
    while time.now < end:
        time.now = min(end, time.now + 0.1)
        bench.wakeup.look()
        await come_to_rest()


async def run_ten(bench: Bench) -> None:
    """Give *bench* a history: it finishes ten in a second."""
    bench.store.add(*range(1, 11))
    async with bench.runs():
        await bench.done(10)
        await until(lambda: len(bench.holdings) == 0)


# Rate


def test_the_rate_is_that_of_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("pgebus._runtime.claiming.monotonic", lambda: now)
    rate = Rate()
    assert rate.per_second() == 0
    for _ in range(3):
        rate.finished()
        now += 0.4
    assert rate.per_second() == 2
    now += 0.5
    assert rate.per_second() == 1
    now += 10.0
    assert rate.per_second() == 0


def test_the_rate_is_capped() -> None:
    rate = Rate()
    for _ in range(MAX_AHEAD + 200):
        rate.finished()
    assert rate.per_second() == MAX_AHEAD


# Claims


async def test_what_is_pending_runs_and_is_completed(bench: Bench) -> None:
    bench.store.add(*range(1, 8))
    async with bench.runs():
        await bench.done(7)
    assert sorted(bench.began) == list(range(1, 8))
    assert len(bench.holdings) == 0
    assert bench.hands.most <= 2


async def test_a_worker_without_a_history_claims_no_more_than_its_slots(bench: Bench) -> None:
    """Whatever it holds is charged an attempt when it dies."""
    bench.store.add(*range(1, 10))
    bench.hands.hold(*range(1, 10))
    async with bench.runs():
        await until(lambda: len(bench.hands.busy) == 2)
        await come_to_rest()
        assert bench.store.limits == [2]
        assert len(bench.holdings) == 2


async def test_slow_work_is_claimed_a_slot_at_a_time(bench: Bench) -> None:
    bench.store.add(*range(1, 10))
    bench.hands.hold(*range(1, 10))
    async with bench.runs():
        await until(lambda: len(bench.hands.busy) == 2)
        bench.hands.held[1].set()
        await until(lambda: len(bench.holdings) > 2 or len(bench.began) == 3)
        await come_to_rest()
        # One was finished in the last second, so one may wait beside the two that run.
        assert len(bench.hands.busy) == 2
        assert len(bench.holdings) <= 3


async def test_fast_work_is_claimed_many_at_a_time() -> None:
    bench = Bench(slots=4)
    bench.store.add(*range(1, 1_001))
    async with bench.runs():
        await until(lambda: len(bench.began) == 1_000)
    assert len(bench.store.limits) < 40
    assert max(bench.store.limits) <= 4 + MAX_AHEAD
    assert bench.hands.most <= 4


async def test_a_worker_with_all_hands_full_asks_nothing(bench: Bench) -> None:
    bench.store.add(1, 2)
    bench.hands.hold(1, 2)
    async with bench.runs():
        await until(lambda: len(bench.hands.busy) == 2)
        await come_to_rest()
        asked = bench.store.asked
        for _ in range(20):
            bench.wakeup.look()
            await come_to_rest()
        assert bench.store.asked == asked
        bench.store.add(3)
        bench.hands.held[1].set()
        await until(lambda: 3 in bench.began)  # the looks that were asked for are not forgotten


async def test_while_more_than_two_thirds_are_left_nothing_is_asked_for(bench: Bench, standing_still: Time) -> None:
    """A fast worker claims many at a time, and not one for each slot that comes free; but no look is forgotten."""
    await run_ten(bench)
    bench.hands.hold(*range(11, 20))
    async with bench.runs():
        bench.store.add(*range(11, 20))
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 9)  # of the 12 that it would hold: 2 slots, 10 in a second
        await come_to_rest()
        asked = bench.store.asked
        bench.store.add(20)
        bench.wakeup.look()
        await come_to_rest()
        assert bench.store.asked == asked
        for held in bench.hands.held.values():
            held.set()
        await until(lambda: 18 in bench.began)


async def test_with_nothing_held_ahead_no_more_is_claimed_than_can_start(standing_still: Time) -> None:
    """With few attempts to spare a delivery must not be charged for what ran before it."""
    bench = Bench(slots=3, ahead=0)
    bench.store.add(*range(1, 101))
    bench.hands.hold(*range(1, 101))
    async with bench.runs():
        for event_id in range(1, 101):
            await until(partial(bench.hands.busy.__contains__, event_id))
            await come_to_rest()
            assert len(bench.holdings) == min(3, 101 - event_id)
            bench.hands.held[event_id].set()
        await bench.done(100)


@pytest.mark.parametrize("ahead", [0, MAX_AHEAD])
async def test_a_free_slot_is_filled_at_once_where_nothing_is_left_to_write(standing_still: Time, ahead: int) -> None:
    """The last word on such a delivery is said while its task still has the slot."""
    bench = Bench(slots=1, ahead=ahead)
    bench.hands.outcome = Committed()
    bench.store.add(*range(1, 6))
    bench.hands.hold(*range(1, 6))
    async with bench.runs():
        for event_id in range(1, 6):
            await until(partial(operator.eq, bench.hands.busy, {event_id}))
            await come_to_rest()
            bench.hands.held[event_id].set()
        await until(lambda: len(bench.holdings) == 0)


async def test_an_idle_worker_sets_its_flag_and_looks_once_more(bench: Bench) -> None:
    """Flag first, look second: in between a publisher may have committed that saw no flag."""
    async with bench.runs():
        await until(lambda: bench.store.idle)
        asked = bench.store.asked
        await until(lambda: bench.store.asked > asked)


async def test_an_idle_worker_looks_again_after_the_poll_interval(standing_still: Time) -> None:
    bench = Bench(slots=1)
    async with bench.runs():
        await until(lambda: bench.store.idle)
        await come_to_rest()
        bench.store.add(1)
        standing_still.now += 61.0
        bench.wakeup.stir()  # which is no reason to look
        await bench.done(1)


async def test_a_flag_that_was_cleared_while_all_hands_were_full_is_set_again(standing_still: Time) -> None:
    """Or nobody would wake the worker before its next look, which may be long after."""
    bench = Bench(slots=2)
    bench.hands.hold(5, 6, 7, 8)
    async with bench.runs():
        await until(lambda: bench.store.idle)
        await pass_by(bench, standing_still, 30.0)  # its next look is as far away
        for event_id in range(1, 5):
            bench.store.add(event_id)
            bench.wakeup.look()
            await bench.done(event_id)
        bench.store.add(5, 6, 7, 8)
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 4)  # it could take more, and there is no more
        standing_still.now += 1.1
        bench.wakeup.stir()
        await until(lambda: not bench.store.idle)
        asked = bench.store.asked
        for held in bench.hands.held.values():
            held.set()
        await bench.done(8)
        await until(lambda: bench.store.idle)
        await until(lambda: bench.store.asked > asked + 1)  # once more after the flag was set


@pytest.mark.parametrize("notify", ["always", "off"])
async def test_a_flag_that_is_not_to_change_does_not(standing_still: Time, notify: str) -> None:
    """A worker that always wants to be woken leaves it set when it is full, one that never does leaves it alone."""
    bench = Bench(slots=2, notify=notify)
    bench.hands.hold(1, 2)
    async with bench.runs():
        await until(lambda: bench.store.asked >= 2)
        await come_to_rest()
        assert bench.store.idle == (notify == "always")
        bench.store.add(1, 2)
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 2)
        standing_still.now += 1.1
        bench.wakeup.stir()
        await come_to_rest()
        assert bench.store.idle == (notify == "always")
        for held in bench.hands.held.values():
            held.set()
        await bench.done(2)
        bench.store.add(3)
        await pass_by(bench, standing_still, 61.0)  # the poll interval: nothing else is needed
        await bench.done(3)


async def test_what_was_put_aside_and_what_comes_in_take_turns_in_one_slot(standing_still: Time) -> None:
    bench = Bench(slots=1, ahead=0)
    bench.store.unhandled.extend(range(1, 11))
    bench.store.add(*range(101, 111))
    async with bench.runs():
        await bench.done(20)
    for first in range(0, 20, 2):
        assert sorted(event_id > 100 for event_id in bench.began[first : first + 2]) == [False, True]


async def test_a_group_that_was_locked_is_tried_again_soon(standing_still: Time) -> None:
    """Nobody says when it is free."""
    bench = Bench()
    bench.store.limited = bench.store.locked = True
    bench.store.add(1)
    async with bench.runs():
        await until(lambda: bench.store.idle)
        await come_to_rest()
        assert bench.began == []
        bench.store.locked = False
        await bench.done(1)


async def test_an_absent_worker_claims_nothing(bench: Bench) -> None:
    bench.presence.leave()
    bench.store.add(1)
    async with bench.runs():
        await come_to_rest()
        assert bench.store.asked == 0
        bench.presence.arrive()
        await until(lambda: bench.began == [1])


# Suspects


async def test_an_idle_worker_starts_a_suspect_alone(bench: Bench, standing_still: Time) -> None:
    """A worker died with it in hand: whatever ran beside it would be charged for it once more."""
    bench.store.add(1)
    bench.store.add(2, lost=1)
    bench.store.add(3, 4)
    bench.hands.hold(2)
    async with bench.runs():
        await until(lambda: 2 in bench.hands.busy)
        await pass_by(bench, standing_still, ALONE_SECONDS - 0.5)
        assert bench.began == [2]
        assert [lease.fence.event_id for lease in bench.holdings] == [2]
        assert list(bench.store.running) == [2]
        assert bench.store.asked == 0
        bench.hands.held[2].set()
        await bench.done(4)  # with its end, and not a moment later: the clock stands still
    assert bench.began == [2, 1, 3, 4]


async def test_what_has_killed_nobody_for_a_while_is_left_to_run_beside_others(
    bench: Bench, standing_still: Time
) -> None:
    bench.store.add(1, 3)
    bench.store.add(2, lost=1)
    bench.hands.hold(2)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {2})
        await pass_by(bench, standing_still, ALONE_SECONDS + 0.1)
        await bench.done(2)
        assert bench.began == [2, 1, 3]
        assert bench.hands.busy == {2}


async def test_a_busy_worker_makes_way_for_a_suspect(standing_still: Time) -> None:
    """It waits for those that run, and for their completion, which a crash would undo."""
    bench = Bench(slots=3)
    bench.store.add(1)
    bench.hands.hold(1, 2)
    async with bench.runs():
        await until(lambda: 1 in bench.hands.busy)
        await pass_by(bench, standing_still, 2.0)
        bench.store.add(2, lost=1)
        await pass_by(bench, standing_still, 1.1)  # that is how often it looks
        bench.store.add(3)
        await come_to_rest()
        assert bench.began == [1]

        bench.store.writing.clear()
        bench.hands.held[1].set()
        await until(lambda: "ended 1" in bench.journal)
        await come_to_rest()
        bench.wakeup.stir()
        await come_to_rest()
        assert bench.began == [1]  # not while the completion of 1 could still be lost

        bench.store.writing.set()
        await until(lambda: bench.hands.busy == {2})
        await come_to_rest()
        assert bench.began == [1, 2]
        bench.hands.held[2].set()
        await bench.done(3)
    assert bench.began == [1, 2, 3]


async def test_a_busy_worker_stops_for_a_suspect_for_so_long_only(standing_still: Time) -> None:
    """One that lost its worker to a restart is as innocent as any, and must not keep the others waiting."""
    bench = Bench(slots=2)
    bench.store.add(1)
    bench.hands.hold(1)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1})
        await come_to_rest()
        bench.store.add(90, lost=1)
        standing_still.now += 1.1
        bench.wakeup.look()
        await come_to_rest()  # it has seen 90
        bench.store.add(2)
        await pass_by(bench, standing_still, DRAIN_SECONDS - 0.1)
        assert bench.began == [1]
        await pass_by(bench, standing_still, 0.2)
        assert bench.began == [1, 2]
        await bench.done(1)
        for event_id in range(3, 8):  # as usual
            bench.store.add(event_id)
            bench.wakeup.look()
            await bench.done(event_id - 1)
            await pass_by(bench, standing_still, (RETRY_SECONDS - 1.0) / 5)
        assert bench.began == [1, 2, 3, 4, 5, 6, 7]


async def test_a_suspect_for_which_nothing_makes_way_starts_beside_others(bench: Bench, standing_still: Time) -> None:
    """Handlers that run for an hour would keep it waiting for an hour."""
    bench.store.add(1)
    bench.hands.hold(1, 2)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1})
        await come_to_rest()
        bench.store.add(2, lost=1)
        await pass_by(bench, standing_still, LONGEST_WAIT_SECONDS - 1.0)
        assert bench.began == [1]
        await pass_by(bench, standing_still, 3.0)
        assert bench.hands.busy == {1, 2}


async def test_a_suspect_waits_for_its_group_however_long(standing_still: Time) -> None:
    """One that runs no more than so many at once in a process doesn't run one more for its sake."""
    bench = Bench(slots=3, group=Group("default", per_process=1))
    bench.store.add(1)
    bench.hands.hold(1, 2)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1})
        await come_to_rest()
        bench.store.add(2, lost=1)
        await pass_by(bench, standing_still, LONGEST_WAIT_SECONDS + 5.0)
        assert bench.began == [1]
        bench.hands.held[1].set()
        await until(lambda: bench.hands.busy == {2})


async def test_what_waits_here_is_given_back_when_a_suspect_wants_to_be_alone(
    bench: Bench, standing_still: Time
) -> None:
    """It would be charged for the crash, and an idle worker elsewhere may take it at once."""
    await run_ten(bench)
    bench.hands.hold(11, 12)
    async with bench.runs():
        bench.store.add(11, 12, 13)
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 3)
        bench.store.add(99, lost=1)
        standing_still.now += 1.1
        bench.wakeup.look()
        await until(lambda: "released 13" in bench.journal)
        assert bench.hands.busy == {11, 12}


async def test_a_suspect_that_another_worker_takes_keeps_nobody_waiting(
    bench: Bench, standing_still: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def too_late(worker_id: int, groups: Sequence[str]) -> list[Lease]:
        bench.store.pending.remove((2, 2))
        return []

    monkeypatch.setattr(bench.store, "claim_suspect", too_late)
    bench.store.add(1)
    bench.store.add(2, lost=2)
    async with bench.runs():
        await bench.done(1)
    assert bench.began == [1]


async def test_what_one_worker_died_with_runs_together_and_nothing_beside_it(standing_still: Time) -> None:
    """One of them at most is to blame; so many at once as there are slots, and more where they are fast."""
    bench = Bench(slots=3)
    bench.store.add(*range(1, 7), lost=1)
    bench.hands.hold(*range(1, 7))
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1, 2, 3})
        bench.store.add(9)
        bench.wakeup.look()
        await come_to_rest()
        assert len(bench.holdings) == 3
        for event_id in (1, 2, 3):
            bench.hands.held[event_id].set()
        await bench.done(3)
        await pass_by(bench, standing_still, 2.0)
        for event_id in (4, 5, 6):
            bench.hands.held[event_id].set()
        await bench.done(7)
    assert bench.hands.most == 3
    assert sorted(bench.began) == [1, 2, 3, 4, 5, 6, 9]


async def test_fast_ones_are_taken_many_at_a_time_and_no_more_than_can_be_spared(standing_still: Time) -> None:
    bench = Bench(slots=2)
    bench.store.add(*range(1, 1 + 2 * MOST_SUSPECTS), lost=1)
    most = 0
    async with bench.runs():
        for _ in range(100):
            await pass_by(bench, standing_still, 0.1)
            most = max(most, len(bench.store.taken))
            bench.store.taken.clear()
        await bench.done(2 * MOST_SUSPECTS)
    assert 10 < most <= MOST_SUSPECTS


@pytest.mark.parametrize(("ahead", "lost"), [(0, 1), (MAX_AHEAD, 2)])
async def test_suspects_run_one_after_the_other(ahead: int, lost: int) -> None:
    """What two workers have died with; and where two attempts are all that there are."""
    bench = Bench(slots=5, ahead=ahead)
    bench.store.add(1, 2, 3, lost=lost)
    async with bench.runs():
        await bench.done(3)
    assert sorted(bench.began) == [1, 2, 3]
    assert bench.hands.most == 1
    for entry, following in zip(bench.journal, bench.journal[1:], strict=False):
        if entry.startswith("ended"):
            assert following == entry.replace("ended", "completed")


# The end of the worker's id


async def test_a_claim_that_is_answered_after_its_id_has_ended_starts_nothing(bench: Bench) -> None:
    bench.store.add(1, 2)
    bench.store.answering.clear()
    async with bench.runs():
        await until(lambda: bench.store.running)
        bench.presence.leave()
        bench.presence.depart()
        bench.presence.new_id()
        bench.store.answering.set()
        await come_to_rest()
        assert bench.journal == []  # neither run nor given back: they are somebody else's
        assert len(bench.holdings) == 0


async def test_a_suspect_that_is_answered_after_its_id_has_ended_is_not_started(bench: Bench) -> None:
    bench.store.add(1, lost=1)
    bench.store.answering.clear()
    async with bench.runs():
        await until(lambda: bench.store.running)
        bench.presence.leave()
        bench.presence.depart()
        bench.presence.new_id()
        bench.store.answering.set()
        await come_to_rest()
        assert bench.journal == []
        assert len(bench.holdings) == 0


async def test_what_waits_is_forgotten_with_the_id(bench: Bench, standing_still: Time) -> None:
    """Others own it; to give it back would take it away from them."""
    await run_ten(bench)
    bench.journal.clear()
    bench.hands.hold(11, 12)
    async with bench.runs():
        bench.store.add(11, 12, 13)
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 3 and bench.hands.busy == {11, 12})
        bench.presence.leave()
        bench.presence.depart()
        await until(lambda: len(bench.holdings) == 0)
        await come_to_rest()
    assert sorted(bench.journal) == ["began 11", "began 12", "ended 11", "ended 12"]


async def test_a_new_id_is_not_forgotten_with_the_old_one(bench: Bench) -> None:
    bench.store.add(1)
    bench.hands.hold(1)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1})
        bench.claimer.forget(12345)
        assert len(bench.holdings) == 1
        bench.hands.held[1].set()
        await until(lambda: "completed 1" in bench.journal)


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_delivery_that_is_cancelled_before_its_first_step_is_not_held_for_ever(bench: Bench, lost: int) -> None:
    """A task that is cancelled before it has begun runs none of its code, not even a `finally`."""
    start = bench.crew.start

    def start_and_cancel(coroutine: Any, name: str) -> asyncio.Task[None]:
        task = start(coroutine, name)
        task.cancel()
        bench.crew.start = start  # type: ignore[method-assign]  # only the first one
        return task

    bench.crew.start = start_and_cancel  # type: ignore[method-assign]  # the moment can't be met from outside
    bench.store.add(1, lost=lost)
    async with bench.runs():
        await bench.done(1)
    assert bench.journal == ["released 1", "began 1", "ended 1", "completed 1"]
    assert len(bench.holdings) == 0


# Closing


async def test_a_closed_claimer_claims_nothing_more_and_never_spins(bench: Bench) -> None:
    async with bench.runs():
        await until(lambda: bench.store.idle)
        await bench.claimer.close(5.0)
        bench.store.add(1)
        bench.wakeup.look()
        await come_to_rest()
        rounds, asked = bench.presence.rounds, bench.store.asked
        for _ in range(5):
            bench.wakeup.look()
            await come_to_rest()
        assert bench.presence.rounds == rounds
        assert bench.store.asked == asked
        assert bench.began == []


async def test_closing_gives_back_what_waits_and_leaves_what_runs() -> None:
    bench = Bench(slots=1)
    bench.store.add(1, 2, 3)
    bench.hands.hold(2)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {2} and len(bench.holdings) == 2)
        await bench.claimer.close(5.0)
        await until(lambda: "released 3" in bench.journal)
        assert bench.hands.busy == {2}
        bench.hands.held[2].set()
        await until(lambda: "completed 2" in bench.journal)
        await come_to_rest()
    assert bench.began == [1, 2]


async def test_nothing_is_started_while_closing_waits_for_an_answer(bench: Bench, standing_still: Time) -> None:
    await run_ten(bench)
    bench.hands.hold(11, 12)
    async with bench.runs():
        bench.store.add(11, 12, 13)
        bench.wakeup.look()
        await until(lambda: len(bench.holdings) == 3)
        await come_to_rest()
        bench.store.answering.clear()
        bench.store.add(14)
        bench.wakeup.look()
        await until(lambda: 14 in bench.store.running)
        closing = asyncio.create_task(bench.claimer.close(5.0))
        await come_to_rest()
        bench.hands.held[11].set()
        await until(lambda: "completed 11" in bench.journal)
        await come_to_rest()
        assert 13 not in bench.began
        bench.store.answering.set()
        await closing
        await until(lambda: {"released 13", "released 14"} <= set(bench.journal))
        bench.hands.held[12].set()
        await until(lambda: len(bench.holdings) == 0)
    assert bench.began[10:] == [11, 12]


async def test_a_suspect_whose_claim_is_answered_while_closing_is_given_back(bench: Bench) -> None:
    bench.store.add(1, lost=1)
    bench.store.answering.clear()
    async with bench.runs():
        await until(lambda: bench.store.running)
        closing = asyncio.create_task(bench.claimer.close(5.0))
        await come_to_rest()
        bench.store.answering.set()
        await closing
        await until(lambda: "released 1" in bench.journal)
        await come_to_rest()
    assert bench.began == []
    assert len(bench.holdings) == 0


async def test_a_claim_in_progress_is_given_back_when_its_answer_comes(bench: Bench) -> None:
    bench.store.add(1, 2)
    bench.store.answering.clear()
    async with bench.runs():
        await until(lambda: bench.store.running)
        closing = asyncio.create_task(bench.claimer.close(5.0))
        await come_to_rest()
        assert not closing.done()
        bench.store.answering.set()
        await closing
        await until(lambda: not bench.store.running)
        await come_to_rest()
    assert bench.began == []
    assert len(bench.holdings) == 0


async def test_closing_does_not_wait_for_ever_for_an_answer(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.store.add(1, 2)
    bench.store.answering.clear()
    async with bench.runs():
        await until(lambda: bench.store.running)
        await bench.claimer.close(0.01)
        assert "not answered in time" in caplog.text
        bench.store.answering.set()  # later than anybody waits
        await until(lambda: not bench.store.running)
    assert bench.began == []


# Leases that nobody here knows of


async def test_a_claim_whose_answer_was_lost_is_given_back_and_runs(bench: Bench) -> None:
    bench.store.add(1)
    worker_id = bench.presence.worker_id
    assert worker_id is not None
    await bench.store.claim(worker_id, ["default"], 5)  # nobody took the answer
    async with bench.runs():
        await until(lambda: "completed 1" in bench.journal)
    assert bench.journal == ["released 1", "began 1", "ended 1", "completed 1"]


async def test_what_runs_here_is_no_stray(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.store.add(1)
    bench.hands.hold(1)
    monkeypatch.setattr("pgebus._runtime.claiming.STRAYS_SECONDS", 0.0)
    async with bench.runs():
        await until(lambda: bench.hands.busy == {1})
        for _ in range(5):
            bench.wakeup.look()
            await come_to_rest()
        assert bench.journal == ["began 1"]


async def test_nothing_is_held_ahead_where_a_handler_has_no_attempts_to_spare(standing_still: Time) -> None:
    """What is held when the process dies is charged an attempt, begun or not; also for a handler registered late."""
    bench = Bench()
    await run_ten(bench)
    bench.router.on("a", retry=RetryPolicy(max_attempts=1))(handle)
    bench.claimer.learn()
    bench.hands.hold(11, 12)
    bench.store.add(*range(11, 20))
    async with bench.runs():
        await until(lambda: len(bench.began) == 12)
        await come_to_rest()
        assert len(bench.holdings) == 2
        for held in bench.hands.held.values():
            held.set()


async def test_a_suspect_of_a_busy_group_starts_though_another_group_is_busy_as_well(standing_still: Time) -> None:
    """It takes the next slot of its group once it has waited long enough, before what has killed nobody."""
    bench = Bench(slots=3, ahead=0, group=Group("default", per_process=1))
    worker_id = bench.presence.worker_id
    assert worker_id is not None
    bench.store.add(5_000)
    bench.holdings.add(await bench.store.claim(worker_id, ["other"], 1))  # it runs for hours
    bench.store.add(*range(1, 100))
    bench.hands.hold(*range(1, 100), 999)
    async with bench.runs():
        await until(lambda: bench.hands.busy)
        bench.store.add(999, lost=1)
        for _ in range(30):  # 6.5 s each: far longer than LONGEST_WAIT_SECONDS together
            (runs,) = bench.hands.busy
            await pass_by(bench, standing_still, 6.5)
            bench.hands.held[runs].set()
            await until(partial(lambda event_id: event_id not in bench.hands.busy, runs))
            while not bench.hands.busy:
                await pass_by(bench, standing_still, 0.1)
            if 999 in bench.began:
                return
    raise AssertionError("It has not started.")
