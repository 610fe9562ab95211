"""Plays steps in every order that keeps each session's own.

The idea is that of PostgreSQL's isolation tester (src/test/isolation): a step has ended, or its backend is seen waiting
for a lock that another session of the permutation holds; then the others go on. Nothing waits for a time to pass.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.interleavings.parties import FailedStep, Party, Step

# How long a step is watched before PostgreSQL is asked whether it waits: saves questions, decides nothing.
_GLANCE_SECONDS: Final = 0.004
# Only a defect of a spec or of the library lets everybody wait for nobody.
_STUCK_SECONDS: Final = 10.0


def interleavings(steps: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield all orders of so many steps of each session; the steps of one session stay in order.

    >>> ["".join(order) for order in interleavings({"a": 2, "b": 1})]
    ['aab', 'aba', 'baa']
    """
    if not any(steps.values()):
        yield ()
    for name, left in steps.items():
        if left:
            for rest in interleavings({**steps, name: left - 1}):
                yield (name, *rest)


def portion(orders: Sequence[tuple[str, ...]], most: int | None) -> list[tuple[str, ...]]:
    """Return at most so many of them, spread evenly, the first and the last included."""
    if most is None or len(orders) <= most:
        return list(orders)
    return [orders[index * (len(orders) - 1) // (most - 1)] for index in range(most)]


@dataclass
class Trace:
    """What happened in one permutation.

    Attributes:
        results: What each step returned, by `session.step`.
        order: The steps in the order in which they ended.
        waited: Those that were seen waiting for a lock.
        failed: Those that raised.
    """

    results: dict[str, object] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    waited: set[str] = field(default_factory=set)
    failed: dict[str, FailedStep] = field(default_factory=dict)

    def before(self, one: str, other: str) -> bool:
        """Return whether step *one* had ended before *other* did; False where it never did."""
        return one in self.order and other in self.order and self.order.index(one) < self.order.index(other)


class _Lane:
    """The steps of one session in one permutation."""

    def __init__(self, party: Party, steps: Sequence[Step]) -> None:
        self.party = party
        self.left = deque(steps)
        self.called = 0  # how many steps the permutation has come to and that were not begun
        self.name = ""
        self.current: asyncio.Future[object] | None = None
        self.waits = False

    def begin(self) -> None:
        step = self.left.popleft()
        self.called -= 1
        self.name = f"{self.party.name}.{step.name}"
        self.current = self.party.start(step)

    def end(self, trace: Trace) -> None:
        assert self.current is not None
        result = self.current.result()
        self.current, self.waits = None, False
        trace.results[self.name] = result
        trace.order.append(self.name)
        if isinstance(result, FailedStep):  # its transaction was rolled back, and the rest of it makes no sense
            trace.failed[self.name] = result
            self.left.clear()


class Schedule:
    """One permutation.

    Args:
        sessions: Who does what, in order.
        blocked: Asks whether any backend of the first set waits for one of the second.
        settled: Called whenever everybody has ended his step or waits.
    """

    def __init__(
        self,
        sessions: Sequence[tuple[Party, Sequence[Step]]],
        blocked: Callable[[set[int], set[int]], Awaitable[bool]],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._lanes = {party.name: _Lane(party, steps) for party, steps in sessions}
        self._blocked = blocked
        self._settled = settled
        self.trace = Trace()

    async def play(self, order: Sequence[str]) -> Trace:
        """Take the steps in *order*; one whose session still waits is taken as soon as that has gone on."""
        for name in order:
            self._lanes[name].called += 1
            await self._settle()
        while waiting := [lane for lane in self._lanes.values() if lane.current is not None]:
            # A deadlock, which PostgreSQL is about to end.
            futures = [lane.current for lane in waiting if lane.current is not None]
            done, _ = await asyncio.wait(futures, timeout=_STUCK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise AssertionError(f"nobody goes on: {[lane.name for lane in waiting]} wait; before: {self.trace}")
            await self._settle()
        return self.trace

    async def _settle(self) -> None:
        """Go on until each session has ended its steps so far, or waits for another one."""
        moved = True
        while moved:
            moved = False
            for lane in self._lanes.values():
                if lane.current is None and lane.called and lane.left:
                    lane.begin()
                if lane.current is not None and await self._ended(lane):
                    lane.end(self.trace)
                    moved = True
        await self._settled()

    async def _ended(self, lane: _Lane) -> bool:
        """Return True when the step has ended, False when it waits for somebody who does nothing now, or waits too."""
        current = lane.current
        assert current is not None
        while not current.done():
            if not lane.waits:
                await asyncio.wait([current], timeout=_GLANCE_SECONDS)
                if current.done():
                    break
            # Two that go on at once, freed by one commit, may meet for a moment; that is no waiting.
            resting = [one for one in self._lanes.values() if one is not lane and (one.current is None or one.waits)]
            if await self._blocked(lane.party.pids, {pid for one in resting for pid in one.party.pids}):
                if current.done():  # between the two looks
                    break
                lane.waits = True
                self.trace.waited.add(lane.name)
                return False
            lane.waits = False
        return True
