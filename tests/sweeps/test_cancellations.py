"""Each public coroutine is cancelled at each of its awaits: nothing leaks, and what is left can be used or closed."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Final, TypeVar
from unittest.mock import patch

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from pgebus import Event, EventContext, EventRouter, EventSystem
from pgebus._runtime.supervision import keep_running
from tests.sweeps.bench import Bench
from tests.sweeps.conftest import Benches
from tests.sweeps.scenarios import SCENARIOS, Scenario
from tests.sweeps.seeds import sampled
from tests.sweeps.stepping import NEVER, Steps, cancelled_at, cancelling
from tests.system.bus import running
from tests.system.faults import tasks_of_ours
from tests.system.waiting import until

_T = TypeVar("_T")

LOOPS: Final = ("claim", "listen", "acknowledge", "maintain")


def in_turns(places: dict[str, int], size: int, seed: int) -> list[tuple[str, int]]:
    """Return *size* of the numbers from 1 to what each name has, shuffled: of each name as many as of another."""
    random = Random(seed)
    shuffled = [
        [(name, number) for number in random.sample(range(1, count + 1), count)] for name, count in places.items()
    ]
    return [each for turn in itertools.zip_longest(*shuffled) for each in turn if each is not None][:size]


async def _cancel(bench: Bench, scenario: Scenario, number: int) -> int:
    """Cancel a scenario once; return how many awaits it had."""
    async with scenario(bench) as act:
        count = await cancelled_at(number, act)
    await _nothing_is_left(bench)
    # What was written beside an event is there with it, or neither is.
    orders = await bench.sql.fetch("SELECT number FROM orders ORDER BY 1")
    events = await bench.sql.fetch(
        "SELECT (payload->>'number')::bigint FROM pgebus.events WHERE payload ? 'number' ORDER BY 1"
    )
    assert [tuple(row) for row in orders] == [tuple(row) for row in events]
    return count


async def _nothing_is_left(bench: Bench) -> None:
    await bench.at_rest(None)

    async def no_tasks() -> bool:
        return not tasks_of_ours()

    await until(no_tasks)


@sampled(85)
async def test_nothing_is_left_of_a_coroutine_that_is_cancelled_at_any_await(
    benches: Benches, size: int, seed: int
) -> None:
    """No connection, transaction, lock, or task; and the same objects work, or can be closed."""
    (bench,) = await benches(1)
    await bench.sql.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'spare')")
    awaits = {name: await _cancel(bench, scenario, NEVER) for name, scenario in SCENARIOS.items()}
    for name, number in in_turns(awaits, size, seed):
        try:
            await _cancel(bench, SCENARIOS[name], number)
        except BaseException as error:
            error.add_note(f"{name}, cancelled at await {number} of {awaits[name]}")
            raise
    async with bench.system(bench.direct):
        await bench.finished(lost=1, within=60.0)


async def _in_a_transaction(ctx: EventContext) -> None:
    """Use what a handler can await."""
    session = ctx.session
    assert session is not None
    await session.execute(text("INSERT INTO effects VALUES (:id, 'cut')"), {"id": ctx.event_id})
    assert await session.scalar(select(Event.type).where(Event.id == ctx.event_id)) == "job.cut"
    assert len((await session.scalars(select(Event).where(Event.id == ctx.event_id))).all()) == 1
    assert len([row async for row in await session.stream(select(Event.id).limit(2))]) > 0
    event = await session.get_one(Event, ctx.event_id)
    await session.refresh(event)
    await session.merge(event)
    await session.run_sync(_flush)
    await ctx.publish("mail.sent", {"cause": ctx.event_id})
    session.add(Event(type="mail.sent", payload={"cause": ctx.event_id}))
    await session.flush()


def _flush(session: Session) -> None:
    session.execute(text("SELECT 1"))


async def _alone(ctx: EventContext) -> None:
    await ctx.publish("mail.sent", {"cause": ctx.event_id})


@sampled(40)
async def test_a_handler_that_is_cancelled_at_any_await_is_run_again(benches: Benches, size: int, seed: int) -> None:
    """By its own code: the attempt has failed, and nothing of it stays but what it did without a transaction."""
    (bench,) = await benches(1)
    router, place = EventRouter(), {"number": NEVER, "count": 0}

    async def act(ctx: EventContext, body: Any) -> None:
        steps = Steps(body(ctx), cancelling(place["number"] if ctx.attempt == 1 else NEVER))
        await steps
        place["count"] = steps.count

    @router.on("job.cut", transactional=True)
    async def cut(ctx: EventContext, payload: dict[str, Any]) -> None:
        await act(ctx, _in_a_transaction)

    @router.on("job.alone")
    async def alone(ctx: EventContext, payload: dict[str, Any]) -> None:
        await act(ctx, _alone)

    @router.on("mail.sent")
    async def send(ctx: EventContext, payload: dict[str, Any]) -> None:
        pass

    async def survive(system: EventSystem, event_type: str, number: int) -> int:
        place["number"] = number
        event_id = await bench.sql.fetchval(
            "INSERT INTO pgebus.events (type, payload) VALUES ($1, '{}') RETURNING id", event_type
        )

        async def done() -> bool:
            return not await bench.sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status <> 'completed'")

        await until(done)
        row = await bench.sql.fetchrow(
            "SELECT attempt, (SELECT count(*) FROM effects f WHERE f.event_id = d.event_id),"
            " (SELECT count(*) FROM pgebus.events e WHERE (e.payload->>'cause')::bigint = d.event_id)"
            " FROM pgebus.deliveries d WHERE event_id = $1",
            event_id,
        )
        assert row is not None
        attempt, effects, caused = row
        assert attempt == 1 + (number <= place["count"])
        if event_type == "job.cut":
            assert (effects, caused) == (1, 2)
        else:
            assert 1 <= caused <= attempt
        await bench.at_rest(system)
        return place["count"]

    async with running(router, bench.direct, n_workers=1) as system:
        awaits = {name: await survive(system, name, NEVER) for name in ("job.cut", "job.alone")}
        for name, number in in_turns(awaits, size, seed):
            await survive(system, name, number)


class Saboteur:
    """Does something at the n-th await of a loop of a running system, counted from when it was told so.

    Attributes:
        struck: Set when it has done it.
        counts: How often each loop was suspended since then.
    """

    def __init__(self) -> None:
        self.struck = asyncio.Event()
        self.counts: dict[str, int] = defaultdict(int)
        self._name, self._number = "", NEVER
        self._action: Any = None

    def tell(self, name: str, number: int, action: Any) -> None:
        """Call *action* at that place; what it returns is raised there."""
        self.counts.clear()
        self.struck.clear()
        self._name, self._number, self._action = name, number, action

    def strike(self, name: str) -> BaseException | None:
        self.counts[name] += 1
        if name != self._name or self.counts[name] != self._number:
            return None
        self.struck.set()
        error: BaseException | None = self._action()
        return error

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Stand in every loop of the systems that are started in the block."""

        async def kept_running(body: Any, health: Any, **options: Any) -> Any:
            def watched() -> Any:
                return Steps(body(), lambda _: self.strike(health.name))

            return await keep_running(watched, health, **options)

        with patch("pgebus.system.keep_running", kept_running):
            yield


async def _episode(bench: Bench, *, broken: bool) -> None:
    """Give all loops something to do; where connections are *broken*, also to connect."""
    if broken:
        await bench.sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )
    await bench.publish(order_placed=1, mail_sent=2, order_refused=1)


@sampled(40)
async def test_a_loop_that_fails_at_any_await_comes_back(benches: Benches, size: int, seed: int) -> None:
    """It is started again by its supervision, and the same system goes on delivering."""
    (bench,) = await benches(1)
    saboteur = Saboteur()
    with saboteur.at_work():
        async with bench.system(bench.direct) as system:
            await _episode(bench, broken=False)
            await bench.finished()
            places = dict[str, int]()
            for broken in (False, True):
                saboteur.tell("", NEVER, None)
                await _episode(bench, broken=broken)
                await bench.finished()
                await bench.at_rest(system)
                places |= {f"{name}, {broken}": saboteur.counts[name] for name in LOOPS}
            struck = 0
            for place, number in in_turns(places, size, seed):
                name, connects = place.split(", ")
                saboteur.tell(name, number, lambda: ConnectionResetError("planted"))
                await _episode(bench, broken=connects == "True")
                try:
                    await bench.finished()
                    # What only failed to wait says that it is well when it has had something to do.
                    await bench.publish(order_placed=1, mail_sent=1)
                    await bench.finished()
                    await bench.at_rest(system)
                except BaseException as error:
                    error.add_note(f"{place}: failed at await {number}")
                    raise
                struck += saboteur.struck.is_set()
            assert struck >= min(size, sum(places.values())) * 0.7


@sampled(12)
async def test_a_system_that_is_stopped_at_any_await_of_its_loops_leaves_nothing(
    benches: Benches, size: int, seed: int
) -> None:
    """Each loop is cancelled where it is, and what the system held goes back, uncounted as lost."""
    (bench,) = await benches(1)
    saboteur = Saboteur()

    async def stop_at(name: str, number: int) -> None:
        stopping = list[asyncio.Task[None]]()
        system = bench.system(bench.direct)

        def stop() -> None:
            stopping.append(asyncio.ensure_future(system.stop(wait_for_completion=False)))

        saboteur.tell(name, number, stop)
        await bench.publish(order_placed=3, mail_sent=3)
        await system.start()
        try:
            await asyncio.wait_for(saboteur.struck.wait(), 0.5)
        except TimeoutError:
            stop()
        await asyncio.wait_for(asyncio.gather(*stopping), 10)
        await _nothing_is_left(bench)

    with saboteur.at_work():
        saboteur.tell("", NEVER, None)
        async with bench.system(bench.direct):
            await bench.publish(order_placed=3, mail_sent=3)
            await bench.finished()
        places = {name: saboteur.counts[name] for name in LOOPS}
        for name, number in in_turns(places, size, seed):
            try:
                await stop_at(name, number)
            except BaseException as error:
                error.add_note(f"{name}, stopped at await {number}")
                raise
    async with bench.system(bench.direct):
        await bench.finished()
