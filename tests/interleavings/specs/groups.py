"""What a person does to a group while workers claim and others publish."""

from __future__ import annotations

from pgebus.operations import limit_group, pause_group, remove_group, resume_group
from tests.interleavings.parties import Party, Step
from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, RC, Spec
from tests.interleavings.steps import (
    COMMIT,
    COMPLETE,
    claim,
    claim_limited,
    operation,
    publish,
    together,
)

AT_MOST_TWO = "SELECT count(*) <= 2 FROM pgebus.deliveries WHERE status = 'running'"
OF_THE_GROUP = """
SELECT string_agg(type || ' ' || status, ', ' ORDER BY type) FROM pgebus.deliveries WHERE consumer_group = 'g'"""
PAUSE = operation("pause", pause_group, "g")
RESUME = operation("resume", resume_group, "g")
REMOVE = operation("remove", remove_group, "g")


async def limited(scene: Scene) -> None:
    """A group that may run two, four events, one of which `worker` runs already."""
    await scene.group("g", max_running=2)
    await scene.events("a", "b", "c", "d")
    leases = await scene.store.claim_limited(scene.parties["worker"].worker_id, "g", 1)
    assert leases is not None
    scene.parties["worker"].leases = leases


async def how_many_run(scene: Scene) -> str:
    rows = await scene.rows("status")
    return f"{rows.count('running')} run, {rows.count('completed')} completed"


@race(RC)
def limited_claims(_level: str) -> Spec:
    """Workers that claim for a limited group take turns: never more than the limit run, in what is committed."""
    return Spec(
        setup=limited,
        sessions={
            "worker": (together("complete", COMPLETE, COMMIT),),
            **{name: (claim_limited(), COMMIT) for name in "xyz"},
        },
        outcome=how_many_run,
        allowed={"1 run, 1 completed", "2 run, 1 completed"},
        always=AT_MOST_TWO,
    )


@race(RC)
def limited_claims_statement_by_statement(_level: str) -> Spec:
    """The three statements of such a claim, each by itself: the lock makes the count true until the commit."""

    async def lock(party: Party) -> bool:
        return bool(await party.line.fetch(party.statements.lock_group, "events", "g"))

    async def count(party: Party) -> int:
        return int(await party.line.value(party.statements.count_running, "events", "g"))

    async def take(party: Party) -> int:
        got_lock, running = counted[party.name]
        if not got_lock or running >= 2:
            return 0
        sql = party.statements.claim_limited
        return len(await party.line.fetch(sql, party.worker_id, "events", ["g"], 2 - running))

    async def locked(party: Party) -> bool:
        counted[party.name] = (await lock(party), 0)
        return counted[party.name][0]

    async def seen(party: Party) -> int:
        counted[party.name] = (counted[party.name][0], await count(party))
        return counted[party.name][1]

    counted: dict[str, tuple[bool, int]] = {}
    steps = (Step("lock", locked), Step("count", seen), Step("claim", take), COMMIT)
    return Spec(
        setup=limited,
        sessions={"worker": (together("complete", COMPLETE, COMMIT),), "x": steps, "y": steps},
        outcome=how_many_run,
        allowed={"1 run, 1 completed", "2 run, 1 completed"},
        always=AT_MOST_TWO,
    )


@race(RC)
def limit_and_claims(_level: str) -> Spec:
    """A limit that is set while others claim holds for every claim that begins after its commit."""

    async def setup(scene: Scene) -> None:
        await scene.group("g", max_running=4)
        await scene.events("a", "b", "c", "d")

    async def outcome(scene: Scene) -> str:
        for name in "xy":
            if scene.trace.before("person.commit", f"{name}.claim") and not scene.trace.before("x.claim", "y.claim"):
                assert scene.result(f"{name}.claim") in ("locked", "-", "a")
        return f"{(await scene.rows('status')).count('running')} run"

    return Spec(
        setup=setup,
        sessions={
            "person": (operation("limit", limit_group, "g", 1), COMMIT),
            "x": (claim_limited(2), COMMIT),
            "y": (claim_limited(2), COMMIT),
        },
        outcome=outcome,
        allowed={"0 run", "1 run", "2 run", "4 run"},
        waits={"person.limit"},
    )


@race(RC)
def pause_and_claim(_level: str) -> Spec:
    """A claim that begins after the pause was committed takes nothing; nobody waits for the person."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "b")

    async def outcome(scene: Scene) -> str:
        for name in "xy":
            if scene.trace.before("person.commit", f"{name}.claim"):
                assert scene.result(f"{name}.claim") == "-"
        return f"{(await scene.rows('status')).count('running')} run"

    return Spec(
        setup=setup,
        sessions={"person": (PAUSE, COMMIT), "x": (claim(1), COMMIT), "y": (claim(1), COMMIT)},
        outcome=outcome,
        allowed={"0 run", "1 run", "2 run"},
        drains=False,
    )


@race(RC)
def pause_of_a_limited_group_and_claim(_level: str) -> Spec:
    """The same for a limited group: the person waits for a claim in progress, no claim waits for the person."""

    async def setup(scene: Scene) -> None:
        await scene.group("g", max_running=2)
        await scene.events("a", "b")

    async def outcome(scene: Scene) -> str:
        for name in "xy":
            if scene.trace.before("person.commit", f"{name}.claim"):
                assert scene.result(f"{name}.claim") == "locked"
        return f"{(await scene.rows('status')).count('running')} run"

    return Spec(
        setup=setup,
        sessions={"person": (PAUSE, COMMIT), "x": (claim_limited(1), COMMIT), "y": (claim_limited(1), COMMIT)},
        outcome=outcome,
        allowed={"0 run", "1 run", "2 run"},
        waits={"person.pause"},
        always=AT_MOST_TWO,
        drains=False,
    )


@race(RC)
def resume_and_claim(_level: str) -> Spec:
    """What waited for the group to be resumed is claimed after it, and sleepers are told at that commit."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a")
        await scene.sql.execute("UPDATE pgebus.consumer_groups SET paused_at = now()")
        await scene.heard()

    async def outcome(scene: Scene) -> str:
        assert await scene.heard() == [""]
        if scene.result("worker.claim") == "a":
            assert scene.trace.before("person.commit", "worker.claim")
        return await scene.rows("status")

    return Spec(
        setup=setup,
        sessions={"person": (RESUME, COMMIT), "other": (PAUSE, COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"a pending", "a running"},
        drains=False,
    )


@race(*ALL_LEVELS)
def remove_group_publish_and_claim(level: str) -> Spec:
    """A group that is removed is claimed from no more; what a publisher had under way may be left, and pending.

    Declared again, the group gets it; `list_groups()` shows it until then.
    """

    async def setup(scene: Scene) -> None:
        await scene.group("g", "other")
        await scene.events("a")

    async def outcome(scene: Scene) -> str:
        trace = scene.trace
        if trace.before("person.commit", "worker.claim"):
            assert scene.result("worker.claim") == "-"
        if trace.before("person.commit", "publisher.publish"):
            assert scene.result("worker.claim") in ("a", "-")
            assert await scene.sql.fetchval(OF_THE_GROUP) == "a cancelled"
        return str(await scene.sql.fetchval(OF_THE_GROUP))

    return Spec(
        setup=setup,
        sessions={
            "person": (REMOVE, COMMIT),
            "publisher": (publish("b"), COMMIT),
            "worker": (claim(1), COMMIT),
        },
        outcome=outcome,
        allowed={"a cancelled", "a cancelled, b cancelled", "a cancelled, b pending", "a cancelled, b running"},
        waits={"person.remove"},
        levels={"publisher": level},
        drains=False,
    )


@race(RC)
def remove_group_and_complete(_level: str) -> Spec:
    """The removal takes a running delivery from its worker, or finds it completed; the worker waits for nobody."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a")
        await scene.claimed("worker", 1)

    async def outcome(scene: Scene) -> str:
        completed, cancelled = scene.result("worker.complete"), scene.result("person.remove")
        return f"completed {completed}, cancelled {cancelled}: {await scene.rows('status')}"

    return Spec(
        setup=setup,
        sessions={"person": (REMOVE, COMMIT), "worker": (COMPLETE, COMMIT), "other": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"completed a, cancelled 0: a completed", "completed -, cancelled 1: a cancelled"},
        waits={"person.remove"},
    )
