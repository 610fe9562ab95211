"""Each conversation with the server is cut at every message: nothing is lost, doubled, half applied, or stuck."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from random import Random
from typing import NamedTuple, TypeAlias

from tests.sweeps.bench import Bench
from tests.sweeps.conftest import Benches
from tests.sweeps.conversations import (
    NETWORK,
    WORKER,
    Conversation,
    cuts,
    long_lived,
    messages_of,
    survive,
)
from tests.sweeps.cutting import ENDS_AND_BEGINS, Cut, CuttingProxy, How, Origin
from tests.sweeps.lives import (
    START_ROLES,
    STOP_ROLES,
    messages_of_a_start,
    messages_of_a_stop,
    survive_a_start,
    survive_a_stop,
)
from tests.sweeps.publishers import WAYS, Publishing, Way, publishing
from tests.sweeps.seeds import sampled
from tests.sweeps.victim import survive_a_kill


class Planned(NamedTuple):
    """One cut, and what it is made in."""

    name: str
    cut: Cut
    run: Callable[[Bench], Awaitable[str | None]]
    message: str = ""

    @property
    def kind(self) -> tuple[str, ...]:
        """That of which every sample has one."""
        if self.message == ENDS_AND_BEGINS and self.cut.origin == "client":
            return self.message, self.cut.how, self.cut.when
        return self.name, self.cut.how


Tally: TypeAlias = "Counter[tuple[str, How, str | None]]"


def sample(planned: Iterable[Planned], size: int, seed: int) -> deque[Planned]:
    """Return *size* of them in a random order: at least one of each kind, the rest as it comes."""
    shuffled = list(planned)
    Random(seed).shuffle(shuffled)
    seen = set[tuple[str, ...]]()
    first, rest = list[Planned](), list[Planned]()
    for each in shuffled:
        (rest if each.kind in seen else first).append(each)
        seen.add(each.kind)
    return deque([*first, *rest][:size])


async def run_all(planned: deque[Planned], stands: Sequence[Bench]) -> Tally:
    """Make all cuts, one at a time on each bench; return how often each message was cut."""
    tally: Tally = Counter()

    async def work(stand: Bench) -> None:
        while planned:
            each = planned.popleft()
            try:
                tally[each.name, each.cut.how, await each.run(stand)] += 1
            except BaseException as error:
                error.add_note(f"in {each.name!r}, at {each.cut}")
                raise

    async with asyncio.TaskGroup() as group:
        for stand in stands:
            group.create_task(work(stand))
    return tally


def check_not_vacuous(tally: Tally, count: int, hows: Sequence[How], *, missed: float = 0.05) -> None:
    """Make sure that nearly all cuts were made, and some of each kind in each conversation.

    Args:
        tally: What was made.
        count: How many there should be.
        hows: The kinds.
        missed: What part of them may not have come about: there were fewer messages than when they were counted.
    """
    assert tally.total() == count
    never = {key: times for key, times in tally.items() if key[2] is None}
    assert sum(never.values()) <= count * missed, never
    made = {(name, how) for name, how, message in tally if message is not None}
    assert made >= {(name, how) for name, _, _ in tally for how in hows} - {(name, how) for name, how, _ in never}
    assert {how for _, how in made} == set(hows)


def _of_workers(
    run: Callable[[Bench, Conversation, Cut], Awaitable[str | None]],
    messages: Mapping[Conversation, dict[Origin, list[str]]],
    hows: tuple[How, ...],
) -> list[Planned]:
    def planned(conversation: Conversation, cut: Cut) -> Planned:
        name = messages[conversation][cut.origin][cut.number - 1]
        return Planned(conversation.name, cut, lambda stand: run(stand, conversation, cut), name)

    return [planned(each, cut) for each in WORKER for cut in cuts(each.role, messages[each], hows)]


@sampled(170)
async def test_a_worker_survives_a_cut_at_any_message(benches: Benches, size: int, seed: int) -> None:
    """One system outlives them all, whatever it was just saying, and whatever it was just told."""
    stands = await benches(6)
    async with asyncio.TaskGroup() as group:
        ready = [asyncio.Event() for _ in stands]
        over = asyncio.Event()
        systems = {}

        async def live(stand: Bench, begun: asyncio.Event) -> None:
            async with long_lived(stand) as systems[stand.proxy]:
                begun.set()
                await over.wait()

        for stand, begun in zip(stands, ready, strict=True):
            group.create_task(live(stand, begun))
        await asyncio.gather(*(begun.wait() for begun in ready))

        async def run(stand: Bench, conversation: Conversation, cut: Cut) -> str | None:
            return await survive(stand, systems[stand.proxy], conversation, cut)

        planned = _of_workers(run, {each: await messages_of(stands[0], each) for each in WORKER}, NETWORK)
        chosen = sample(planned, size, seed)
        count = len(chosen)
        tally = await run_all(chosen, stands)
        over.set()
    check_not_vacuous(tally, count, NETWORK)
    assert {how for _, how, message in tally if message == ENDS_AND_BEGINS} == set(NETWORK)


@sampled(12)
async def test_another_worker_takes_over_from_one_that_was_killed_at_any_message(
    benches: Benches, size: int, seed: int
) -> None:
    stands = await benches(3)
    async with long_lived(stands[0]):
        messages = {each: await messages_of(stands[0], each) for each in WORKER}
    planned = _of_workers(survive_a_kill, messages, ("SIGKILL",))
    chosen = sample(planned, size, seed)
    count = len(chosen)
    check_not_vacuous(await run_all(chosen, stands), count, ("SIGKILL",))


@sampled(24)
async def test_a_start_and_a_stop_survive_a_cut_at_any_message(benches: Benches, size: int, seed: int) -> None:
    """A start fails with the driver's error and leaves nothing behind, or succeeds; a stop ends in time."""
    stands = await benches(4)
    planned = [
        Planned(f"start, {role}", cut, partial(survive_a_start, cut=cut))
        for role in START_ROLES
        for cut in cuts(role, await messages_of_a_start(stands[0], role))
    ]
    planned += [
        Planned(f"stop, {role}", cut, partial(survive_a_stop, cut=cut))
        for role in STOP_ROLES
        for cut in cuts(role, await messages_of_a_stop(stands[0], role))
    ]
    chosen = sample(planned, size, seed)
    count = len(chosen)
    # What is said only once a second, or not if there is nothing to say, is not said in each of them.
    check_not_vacuous(await run_all(chosen, stands), count, NETWORK, missed=0.4)


@sampled(94)
async def test_a_publisher_knows_what_it_can_know_at_any_message(benches: Benches, size: int, seed: int) -> None:
    """Its order and its event are there, or neither; what it called ok is there, and what has failed is not."""
    async with AsyncExitStack() as stack:
        ledgers = {stand.proxy: await stack.enter_async_context(publishing(stand)) for stand in await benches(3)}
        first = next(iter(ledgers.values()))
        planned = [
            Planned(way, cut, partial(_cut_a_publish, ledgers, way, cut))
            for way in WAYS
            for cut in cuts("publisher", await first.messages_of(way))
        ]
        chosen = sample(planned, size, seed)
        count = len(chosen)
        check_not_vacuous(await run_all(chosen, [ledger.bench for ledger in ledgers.values()]), count, NETWORK)
        unknown = Counter[bool]()
        for ledger in ledgers.values():
            async with ledger.bench.system(ledger.bench.direct):
                await ledger.bench.finished()
            unknown.update((await ledger.check()).values())
        # A COMMIT of which nobody knows went both ways, or nothing was tested.
        assert min(unknown[True], unknown[False]) >= count // 100 + 1, unknown


async def _cut_a_publish(ledgers: dict[CuttingProxy, Publishing], way: Way, cut: Cut, stand: Bench) -> str | None:
    return await ledgers[stand.proxy].cut(way, cut)
