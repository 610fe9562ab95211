"""A group that keeps no history: nothing is left of what it has completed, and it gets no event twice."""

from __future__ import annotations

from pgebus._runtime.maintenance import Backfiller
from pgebus._runtime.store import Backfill
from tests.interleavings.parties import Party, Step
from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, RC, Spec
from tests.interleavings.steps import COMMIT, HANDLE, LOOK, claim, publish, together

_HANDLED = "SELECT string_agg(n::text, ' ' ORDER BY id) FROM (SELECT e.id, (SELECT count(*) FROM effects x" \
           " WHERE x.event_id = e.id) AS n FROM pgebus.events e) e"  # fmt: skip


async def _forget(party: Party) -> None:
    """Complete what it holds, in a batch; what its handlers did was not in that transaction."""
    for lease in party.leases:
        await (await party.line.driver()).execute(
            f"INSERT INTO effects (event_id, by) VALUES ({lease.fence.event_id}, '{party.name}')"
        )
    if party.leases:
        assert len(await party.store.forget(party.leases)) == len(party.leases)


async def _end(party: Party) -> None:
    """Complete in the handlers' transaction."""
    await party.complete(party.leases[0], forget=True)


async def _declare(party: Party) -> None:
    await party.at_once.subscribe([("g", "#", "beginning")])


FORGET = Step("forget", _forget)
DECLARE = Step("declare", _declare)


async def _finish(scene: Scene, backfiller: Backfiller) -> str:
    """Let workers go on until nothing is left; return how often each event was handled, and what is kept of them."""
    for _ in range(50):
        await backfiller.round()
        leases = await scene.store.claim(999, ["g"], 100)
        for lease in leases:
            await scene.sql.execute("INSERT INTO effects VALUES ($1, 'later')", lease.fence.event_id)
        if leases:
            assert len(await scene.store.forget(leases)) == len(leases)
        elif not await scene.store.backfills():
            break
    else:
        raise AssertionError("never done")
    kept = await scene.sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE status = 'completed'")
    return f"handled {await scene.sql.fetchval(_HANDLED)}; {'some are' if kept else 'nothing is'} kept"


def _widening(level: str, *, transactional: bool) -> Spec:
    """The group has every event of its one pattern, and gets another one that goes back over all of them."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.sql.execute("UPDATE pgebus.subscriptions SET pattern = 'a'")
        await scene.events("a", "b")  # nobody wants the second one yet
        await scene.claimed("worker", 1)
        backfillers[:] = [Backfiller(scene.parties["maintainer"].at_once, lambda: None)]

    async def make_up(_party: Party) -> None:
        await backfillers[0].round()

    async def outcome(scene: Scene) -> str:
        return await _finish(scene, backfillers[0])

    backfillers: list[Backfiller] = []
    round_ = Step("round", make_up)
    end = together("end", Step("complete", _end), COMMIT)
    return Spec(
        setup=setup,
        sessions={
            "worker": (HANDLE, end) if transactional else (FORGET, COMMIT),
            "publisher": (LOOK, together("publish", publish("a"), COMMIT)),
            "starter": (DECLARE,),
            "maintainer": (round_, round_),
        },
        outcome=outcome,
        allowed={"handled 1 1 1; nothing is kept", "handled 1 1 1; some are kept"},
        levels={"worker": level, "publisher": level},
        missing=True,
    )


@race(*ALL_LEVELS)
def backfill_and_completion_that_deletes(level: str) -> Spec:
    """Whenever the new pattern comes, and however old the snapshots of the others are, each event is handled once."""
    return _widening(level, transactional=True)


@race(RC)
def backfill_and_batch_that_deletes(level: str) -> Spec:
    """The same for what is completed in a batch."""
    return _widening(level, transactional=False)


@race(RC)
def backfill_and_slow_backfill(_level: str) -> Spec:
    """A worker that does not know that a pattern is done repeats nothing; while it is at it, nobody says that it is."""

    async def setup(scene: Scene) -> None:
        await scene.events("a")
        await scene.group("g")
        await scene.sql.execute("UPDATE pgebus.subscriptions SET backfilled_at = NULL, start_at = '-infinity'")
        backfillers[:] = [Backfiller(scene.parties["quick"].at_once, lambda: None)]
        known[:] = await scene.store.backfills()

    async def make(party: Party) -> str:
        done = await party.at_once.backfill(known[0], 0, 100, 100)
        return "too late" if done is None else f"made {done[0]}"

    async def say_so(party: Party) -> None:
        await party.at_once.backfilled(known[0])

    async def repeat(party: Party) -> str:
        done = await party.store.backfill(known[0], 0, 100, 100)
        return "too late" if done is None else f"made {done[0]}"

    async def outcome(scene: Scene) -> str:
        how_often, _, _ = (await _finish(scene, backfillers[0])).partition(";")
        return f"{scene.result('slow.backfill')}, {how_often}"

    backfillers: list[Backfiller] = []
    known: list[Backfill] = []
    return Spec(
        setup=setup,
        sessions={
            "slow": (Step("backfill", repeat), COMMIT),
            "quick": (Step("backfill", make), Step("done", say_so)),
            "worker": (together("work", claim(), FORGET, COMMIT),),
        },
        outcome=outcome,
        allowed={"made 1, handled 1", "made 0, handled 1", "too late, handled 1"},
        waits={"quick.done", "quick.backfill"},
        missing=True,
    )
