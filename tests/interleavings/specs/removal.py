"""What ends a delivery from outside: a person, the retention, a deletion, a migration."""

from __future__ import annotations

from datetime import timedelta

from pgebus import operations
from tests.interleavings.parties import Party, Step
from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, EFFECTS_MATCH, RC, Spec
from tests.interleavings.steps import (
    BURY,
    CANCEL,
    COMMIT,
    COMPLETE,
    COMPLETED,
    DELETE,
    HANDLE,
    LOCK_EVENT,
    PRUNE,
    REDRIVE,
    REPLAY,
    ROLLBACK,
    backfill_once,
    by_hand,
    claim,
    operation,
    publish,
    together,
)


async def one_held(scene: Scene) -> None:
    """One event, claimed by the session that the spec names first."""
    await scene.group("g")
    await scene.events("a")
    await scene.claimed(next(iter(scene.parties)), 1)


@race(RC)
def complete_and_cancel(_level: str) -> Spec:
    """A cancellation takes the delivery from its worker, or comes too late; neither waits for the other."""

    async def outcome(scene: Scene) -> str:
        return f"completed {scene.result('worker.complete')}, cancelled {scene.result('person.cancel')}"

    return Spec(
        setup=one_held,
        sessions={"worker": (COMPLETE, COMMIT), "person": (CANCEL, COMMIT), "other": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"completed a, cancelled 0", "completed -, cancelled 1"},
    )


@race(*ALL_LEVELS)
def complete_with_effects_and_cancel(level: str) -> Spec:
    """Cancelled while its handlers run, a delivery leaves no effect; completed first, it cannot be cancelled."""

    async def outcome(scene: Scene) -> str:
        return f"{await scene.rows('status')}, cancelled {scene.result('person.cancel')}"

    return Spec(
        setup=one_held,
        sessions={
            "worker": (HANDLE, COMPLETED, COMMIT),
            "person": (CANCEL, COMMIT),
            "other": (together("claim", claim(), COMMIT),),
        },
        outcome=outcome,
        allowed={"a completed, cancelled 0", "a cancelled, cancelled 1"},
        waits={"worker.complete"},
        errors={"worker.complete PGB01"} if level == RC else {"worker.complete PGB01", "worker.complete 40001"},
        levels={"worker": level, "person": level},
        always=EFFECTS_MATCH,
        effects=True,
    )


@race(RC)
def fail_and_redrive(_level: str) -> Spec:
    """A delivery that dies is redriven when the person can see that it is dead; then it is claimed anew."""

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status", "attempt", "round", "claim_seq")

    return Spec(
        setup=one_held,
        sessions={"worker": (BURY, COMMIT), "person": (REDRIVE, COMMIT), "other": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"a dead 1 1 1", "a pending 0 2 1", "a running 1 2 2"},
    )


@race(RC)
def redrive_and_redrive(_level: str) -> Spec:
    """Two that redrive the same delivery do it once: the second one passes over it, or finds it pending."""

    async def setup(scene: Scene) -> None:
        await one_held(scene)
        assert await scene.store.bury(scene.parties["worker"].leases[0].fence, handled=[], entry=None)

    async def outcome(scene: Scene) -> str:
        assert scene.result("p.redrive") + scene.result("q.redrive") == 1
        return await scene.rows("status", "attempt", "round", "claim_seq")

    return Spec(
        setup=setup,
        sessions={"worker": (claim(), COMMIT), "p": (REDRIVE, COMMIT), "q": (REDRIVE, COMMIT)},
        outcome=outcome,
        allowed={"a pending 0 2 1", "a running 1 2 2"},
    )


@race(RC)
def complete_and_prune(_level: str) -> Spec:
    """An event is pruned when each of its groups has committed its end before the pruning began, and once."""

    async def setup(scene: Scene) -> None:
        await scene.group("g", "done")
        await scene.events("a")
        await scene.claimed("worker", 1)
        assert len(await scene.store.complete(await scene.store.claim(1, ["done"], 1))) == 1

    async def outcome(scene: Scene) -> str:
        pruned = scene.result("x.prune") + scene.result("y.prune")
        assert pruned <= 1
        if pruned:
            name = "x" if scene.result("x.prune") else "y"
            assert scene.trace.before("worker.commit", f"{name}.prune")
        return f"pruned {pruned}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"worker": (COMPLETE, COMMIT), "x": (PRUNE, COMMIT), "y": (PRUNE, COMMIT)},
        outcome=outcome,
        allowed={"pruned 1: -", "pruned 0: a completed, a completed"},
    )


@race(RC)
def replay_and_prune(_level: str) -> Spec:
    """Whoever puts a finished delivery back locks its event first, as the backfill does: then pruning passes over it.

    Without that lock, pruning would wait for the person's commit, and then delete what is pending again.
    """

    async def setup(scene: Scene) -> None:
        await one_held(scene)
        assert len(await scene.store.complete(scene.parties["person"].leases)) == 1

    async def outcome(scene: Scene) -> str:
        replayed, pruned = scene.result("person.replay"), scene.result("maintainer.prune")
        return f"replayed {replayed}, pruned {pruned}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"person": (LOCK_EVENT, REPLAY, COMMIT), "maintainer": (PRUNE, COMMIT)},
        outcome=outcome,
        allowed={"replayed 1, pruned 0: a pending", "replayed 0, pruned 1: -"},
        waits={"person.lock"},
    )


# Pruning calls this instead of PostgreSQL's own, and waits in it with a snapshot that it has taken already.
_PAUSE = """
CREATE SCHEMA IF NOT EXISTS pause;
CREATE OR REPLACE FUNCTION pause.make_interval(secs double precision) RETURNS interval LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock_shared(7);
  RETURN pg_catalog.make_interval(secs => secs);
END $$"""
_PAUSING = "SET search_path = pause, pg_catalog"
_HOLD = by_hand("hold", "SELECT pg_advisory_xact_lock(7)")


async def _remove(party: Party) -> int:
    """What a worker's pruning does with what it has found."""
    raw = await party.line.driver()
    await raw.execute(_PAUSING)
    return await party.store.remove({1: 0.0}, dead=None, unhandled=None)


async def _prune_by_hand(party: Party) -> int:
    await (await party.session.connection()).exec_driver_sql(_PAUSING)
    return await operations.prune(party.session, timedelta(0))


async def _replay(party: Party) -> int:
    return len(await operations.replay(party.session, "g"))


async def _revive(party: Party) -> int:
    """A group that was removed and is there again gets back what was cancelled."""
    made, _, _ = await backfill_once(party.store)
    return made


def _while_pruning(prune: Step, put_back: Step, status: str) -> Spec:
    async def setup(scene: Scene) -> None:
        await scene.sql.execute(_PAUSE)
        await scene.group("g")
        await scene.events("a")
        if status == "gone":
            await scene.sql.execute("DELETE FROM pgebus.deliveries")
        else:
            await scene.sql.execute(
                "UPDATE pgebus.deliveries SET status = $1, finished_at = now() - interval '1 hour'", status
            )
        await scene.sql.execute("UPDATE pgebus.subscriptions SET backfilled_at = NULL")

    async def outcome(scene: Scene) -> str:
        put_back, pruned = scene.result("person.put back"), scene.result("maintainer.prune")
        return f"put back {put_back}, pruned {pruned}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"gate": (_HOLD, COMMIT), "maintainer": (prune, COMMIT), "person": (put_back, COMMIT)},
        outcome=outcome,
        allowed={"put back 1, pruned 0: a pending", "put back 0, pruned 1: -"},
        waits={"maintainer.prune", "gate.hold"},
    )


@race(RC)
def replay_while_pruning(_level: str) -> Spec:
    """What was replayed after a worker's pruning took its snapshot, and before it locked the event, is kept."""
    return _while_pruning(Step("prune", _remove), Step("put back", _replay), "completed")


@race(RC)
def replay_while_a_bare_event_is_pruned(_level: str) -> Spec:
    """The same for an event that no delivery was left of."""
    return _while_pruning(Step("prune", _remove), Step("put back", _replay), "gone")


@race(RC)
def revive_while_pruning(_level: str) -> Spec:
    """The same for what a backfill puts back."""
    return _while_pruning(Step("prune", _remove), Step("put back", _revive), "cancelled")


@race(RC)
def replay_while_a_person_prunes(_level: str) -> Spec:
    """The same where a person prunes."""
    return _while_pruning(Step("prune", _prune_by_hand), Step("put back", _replay), "completed")


@race(RC)
def prune_and_hold(_level: str) -> Spec:
    """Pruning waits for nobody who has locked a finished delivery, and takes the events beside it."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "b")
        await scene.sql.execute("UPDATE pgebus.deliveries SET status = 'completed', finished_at = now()")

    async def outcome(scene: Scene) -> str:
        return f"pruned {scene.result('x.prune')}: {await scene.rows('status')}"

    lock = by_hand("lock", "SELECT FROM pgebus.deliveries WHERE event_id = 1 FOR UPDATE SKIP LOCKED")
    by_person = operation("prune", operations.prune, timedelta(0))
    return Spec(
        setup=setup,
        sessions={"person": (lock, COMMIT), "x": (PRUNE, COMMIT), "y": (by_person, ROLLBACK)},
        outcome=outcome,
        allowed={"pruned 2: -", "pruned 1: a completed", "pruned 0: a completed, b completed"},
    )


@race(RC)
def complete_and_delete(_level: str) -> Spec:
    """A deleted event takes its delivery along: the batch completes what is left, and waits for nobody."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "b")
        await scene.claimed("worker", 2)

    async def outcome(scene: Scene) -> str:
        return f"completed {scene.result('worker.complete')}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"worker": (COMPLETE, COMMIT), "person": (DELETE, COMMIT), "other": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"completed a b: b completed", "completed b: b completed"},
        waits={"person.delete"},
    )


@race(*ALL_LEVELS)
def complete_with_effects_and_delete(level: str) -> Spec:
    """Deleted while its handlers run, an event leaves no effect; completed first, the deletion waits for it."""

    async def outcome(scene: Scene) -> str:
        effects = await scene.sql.fetchval("SELECT count(*) FROM effects")
        return f"{await scene.rows('status')}, {effects} effect(s)"

    failing = {"worker.complete PGB01"}
    if level != RC:
        failing |= {"worker.complete 40001", "person.delete 40001"}
    return Spec(
        setup=one_held,
        sessions={
            "worker": (HANDLE, COMPLETED, COMMIT),
            "person": (DELETE, COMMIT),
            "other": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed={"-, 0 effect(s)", "-, 1 effect(s)"} | (set() if level == RC else {"a completed, 1 effect(s)"}),
        waits={"person.delete", "worker.complete"},
        errors=failing,
        levels={"worker": level, "person": level},
    )


@race(RC)
def backfill_and_delete(_level: str) -> Spec:
    """Two backfills and a deletion: never a delivery without its event. What somebody has locked is looked at again.

    The backfills wait for each other's commit, in the order of the ids: so there is no deadlock.
    """

    async def setup(scene: Scene) -> None:
        await scene.events("a", "b")  # nobody wants them yet
        await scene.group("new")
        await scene.sql.execute("UPDATE pgebus.subscriptions SET backfilled_at = NULL, start_at = '-infinity'")

    async def backfill(party: Party) -> str:
        made, _, missed = await backfill_once(party.store)
        return f"made {made}, missed {missed}"

    async def outcome(scene: Scene) -> str:
        # The next round makes up for what was missed.
        await backfill_once(scene.store)
        await scene.store.backfilled((await scene.store.backfills())[0])
        return f"{scene.result('maintainer.backfill')}: {await scene.rows('consumer_group', 'status')}"

    return Spec(
        setup=setup,
        sessions={
            "maintainer": (Step("backfill", backfill), COMMIT),
            "person": (DELETE, COMMIT),
            "other": (Step("backfill", backfill), COMMIT),
        },
        outcome=outcome,
        allowed={
            "made 2, missed None: b new pending",
            "made 1, missed 1: b new pending",
            "made 1, missed None: b new pending",
            "made 0, missed 1: b new pending",
            "made 0, missed None: b new pending",
        },
        waits={"person.delete", "maintainer.backfill", "other.backfill"},
    )


@race(RC)
def migration_and_claim(_level: str) -> Spec:
    """A migration that changes a table waits for the statements in progress; then the others wait for it, and go on."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "b")
        await scene.claimed("worker", 1)

    async def outcome(scene: Scene) -> str:
        assert scene.result("worker.complete") == "a"
        assert scene.result("other.claim") == "b"
        return await scene.rows("status")

    lock = by_hand("lock", "SELECT pg_advisory_xact_lock(hashtextextended('pgebus.migrations pgebus', 0))")
    alter = by_hand("alter", "ALTER TABLE pgebus.deliveries ALTER COLUMN priority SET DEFAULT 0")
    return Spec(
        setup=setup,
        sessions={
            "migration": (lock, alter, COMMIT),
            "worker": (COMPLETE, COMMIT),
            "other": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed={"a completed, b running"},
        waits={"migration.alter", "worker.complete", "other.claim"},
    )


@race(*ALL_LEVELS)
def publish_and_delete(level: str) -> Spec:
    """An event that is deleted as soon as it is there leaves no delivery, whoever had claimed it meanwhile."""

    async def outcome(scene: Scene) -> str:
        deleted = scene.result("person.delete")
        return f"deleted {getattr(deleted, 'code', deleted)}: {await scene.rows('status')}"

    # Above READ COMMITTED a deletion that meets the claim of a worker fails, and leaves everything as it was.
    failed = set() if level == RC else {"deleted 40001: a running"}
    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={"publisher": (publish("a"), COMMIT), "person": (DELETE, COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"deleted 0: a pending", "deleted 0: a running", "deleted 1: -", *failed},
        waits={"person.delete"},
        errors=set() if level == RC else {"person.delete 40001"},
        levels={"publisher": level, "person": level},
    )
