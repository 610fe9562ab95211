"""What a person does with keys and payloads, while others are at work: release_key(), purge_payload(), replay()."""

from __future__ import annotations

from typing import Final

from pgebus import operations
from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, RC, Spec
from tests.interleavings.specs.keys import ONE_RUNS
from tests.interleavings.steps import (
    CANCEL,
    COMMIT,
    COMPLETE,
    REDRIVE,
    RELEASE_KEY,
    claim,
    operation,
    publish,
    together,
)

PURGE: Final = operation("purge", operations.purge_payload, event_ids=[1])
REPLAY: Final = operation("replay", operations.replay, "g", event_ids=[1])
# An event that was emptied is never handled again.
NEVER_EMPTY: Final = """SELECT NOT EXISTS (SELECT FROM pgebus.deliveries d JOIN pgebus.events e ON e.id = d.event_id
  WHERE e.headers ? 'pgebus_purged_at' AND d.status NOT IN ('completed', 'cancelled'))"""


async def dead_head(scene: Scene) -> None:
    """Two events of a key; the first one is dead, and holds it."""
    await scene.group("g", dead_holds_key=True)
    await scene.events("a", "b", key="k")
    (lease,) = await scene.store.claim(1, ["g"], 1)
    assert await scene.store.bury(lease.fence, handled=[], entry=None)


async def one_dead(scene: Scene) -> None:
    await scene.group("g")
    await scene.events("a")
    (lease,) = await scene.store.claim(1, ["g"], 1)
    assert await scene.store.bury(lease.fence, handled=[], entry=None)


@race(RC)
def let_go_and_redrive(_level: str) -> Spec:
    """One lets go of the key, the other one puts its head back: never do two of the key run."""

    async def outcome(scene: Scene) -> str:
        return f"let go {scene.result('p.let_go')}: {await scene.rows('status')}"

    return Spec(
        setup=dead_head,
        sessions={
            "p": (RELEASE_KEY, COMMIT),
            "q": (REDRIVE, COMMIT),
            "worker": (together("claim", claim(), COMMIT), together("claim", claim(), COMMIT)),
        },
        outcome=outcome,
        allowed={
            "let go 1: a running, b pending",
            "let go 1: a pending, b running",
            "let go 1: a blocked, b running",
            "let go 1: a dead, b running",
            "let go 1: a dead, b pending",
            "let go 1: a pending, b pending",
            "let go 0: a running, b blocked",
            "let go 0: a pending, b blocked",
        },
        always=ONE_RUNS,
    )


@race(*ALL_LEVELS)
def let_go_and_publish(level: str) -> Spec:
    """What is published while the key is let go waits behind the one that waited before."""

    async def outcome(scene: Scene) -> str:
        assert scene.result("person.let_go") == 1
        return await scene.rows("status")

    return Spec(
        setup=dead_head,
        sessions={
            "person": (RELEASE_KEY, COMMIT),
            "publisher": (publish("c", key="k"), COMMIT),
            "worker": (together("claim", claim(), COMMIT),),
        },
        outcome=outcome,
        allowed={"a dead, b running, c blocked", "a dead, b pending, c blocked"},
        levels={"publisher": level},
        always=ONE_RUNS,
        ordered=True,
    )


@race(RC)
def cancel_and_claim_of_a_key(_level: str) -> Spec:
    """Whoever cancels the head of a key lets the next one in, at the commit, or leaves it to the worker that has it."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "b", key="k")
        await scene.claimed("worker", 1)

    async def outcome(scene: Scene) -> str:
        return f"completed {scene.result('worker.complete')}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={
            "worker": (COMPLETE, COMMIT),
            "person": (CANCEL, COMMIT),
            "other": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed={
            "completed a: a completed, b running",
            "completed a: a completed, b pending",
            "completed -: a cancelled, b running",
            "completed -: a cancelled, b pending",
        },
        always=ONE_RUNS,
        ordered=True,
    )


@race(RC)
def purge_and_redrive(_level: str) -> Spec:
    """A dead letter is emptied, or put back, whoever locks it first: nobody handles an empty payload, or waits."""

    async def outcome(scene: Scene) -> str:
        emptied = len(scene.result("p.purge").event_ids)
        return f"emptied {emptied}, redriven {scene.result('q.redrive')}: {await scene.rows('status')}"

    return Spec(
        setup=one_dead,
        sessions={"p": (PURGE, COMMIT), "q": (REDRIVE, COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={
            "emptied 1, redriven 0: a cancelled",
            "emptied 0, redriven 1: a running",
            "emptied 0, redriven 1: a pending",
        },
        always=NEVER_EMPTY,
    )


@race(RC)
def purge_and_replay(_level: str) -> Spec:
    """The same with what is completed: what is replayed is not emptied, and what is emptied is not replayed."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a")
        assert len(await scene.store.complete(await scene.store.claim(1, ["g"], 1))) == 1

    async def outcome(scene: Scene) -> str:
        emptied = len(scene.result("p.purge").event_ids)
        return f"emptied {emptied}, replayed {scene.result('q.replay')}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"p": (PURGE, COMMIT), "q": (REPLAY, COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={
            "emptied 1, replayed 0: a completed",
            "emptied 0, replayed 1: a running",
            "emptied 0, replayed 1: a pending",
        },
        always=NEVER_EMPTY,
    )
