"""The order of a key: who lets the next one in, and who finds what nobody has let in."""

from __future__ import annotations

from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, EFFECTS_MATCH, RC, SERIALIZABLE, Spec
from tests.interleavings.steps import (
    BURY,
    COMMIT,
    COMPLETE,
    COMPLETED,
    HANDLE,
    LOOK,
    SWEEP,
    UNHANDLE,
    adopt,
    by_hand,
    claim,
    publish,
    together,
)

ONE_RUNS = """SELECT NOT EXISTS (SELECT FROM pgebus.deliveries WHERE status = 'running' AND key IS NOT NULL
  GROUP BY consumer_group, key HAVING count(*) > 1)"""


async def head_is_held(scene: Scene) -> None:
    """One event of the key, claimed by `worker`."""
    await scene.group("g")
    await scene.events("a", key="k")
    await scene.claimed("worker", 1)


async def head_is_gone(scene: Scene) -> None:
    """Two events that wait for one that is completed: nobody has let the next one in."""
    await scene.group("g")
    await scene.events("a", "b", "c", key="k")
    await scene.sql.execute("UPDATE pgebus.deliveries SET status = 'completed', finished_at = now() WHERE event_id = 1")


@race(RC)
def sweep_and_sweep(_level: str) -> Spec:
    """Any number of sweeps let one in: the first of the key, or none while another sweep holds it."""

    async def outcome(scene: Scene) -> str:
        assert scene.result("x.sweep") + scene.result("y.sweep") == 1
        return await scene.rows("status")

    return Spec(
        setup=head_is_gone,
        sessions={"x": (SWEEP, COMMIT), "y": (SWEEP, COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"a completed, b pending, c blocked", "a completed, b running, c blocked"},
        ordered=True,
    )


@race(*ALL_LEVELS)
def sweep_and_publish(level: str) -> Spec:
    """A publisher that did not see its head finish leaves a delivery that waits for nothing; the next sweep finds it.

    That happens only when the two transactions overlap, or where the publisher's snapshot is older.
    """

    async def outcome(scene: Scene) -> str:
        rows = await scene.rows("status")
        if rows == "a completed, b blocked":
            saw = "publisher.publish" if level == RC else "publisher.look"
            assert scene.trace.before(saw, "worker.commit")
            assert not scene.trace.before("publisher.commit", "worker.complete")
        return rows

    return Spec(
        setup=head_is_held,
        sessions={
            "worker": (COMPLETE, COMMIT),
            "publisher": (LOOK, publish("b", key="k"), COMMIT),
            "sweeper": (SWEEP, COMMIT),
        },
        outcome=outcome,
        allowed={"a completed, b pending", "a completed, b blocked"},
        levels={"publisher": level},
    )


@race(*ALL_LEVELS)
def complete_and_publish(level: str) -> Spec:
    """A transactional completion lets the next one in, in its own transaction, with its effects.

    At SERIALIZABLE the one that looked for a head and the one that ended it cannot both be right: one has to go again.
    """

    async def outcome(scene: Scene) -> str:
        trace, rows = scene.trace, await scene.rows("status")
        if scene.result("next.claim") == "b":
            assert trace.before("worker.commit", "next.claim")
        if rows == "a completed, b blocked":
            saw = "worker.complete" if level == RC else "worker.handle"
            assert not trace.before("publisher.commit", saw), "was not let in"
        return rows

    failing = {"worker.complete 40001", "worker.commit 40001", "publisher.commit 40001"}
    return Spec(
        setup=head_is_held,
        sessions={
            "worker": (HANDLE, COMPLETED, COMMIT),
            "publisher": (publish("b", key="k"), COMMIT),
            "next": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed={"a completed, b pending", "a completed, b running"}
        | ({"a completed", "a running, b blocked"} if level == SERIALIZABLE else {"a completed, b blocked"}),
        errors=failing if level == SERIALIZABLE else set(),
        levels={"worker": level, "publisher": level},
        always=EFFECTS_MATCH,
        effects=True,
    )


@race(RC)
def three_publishers_and_claims(_level: str) -> Spec:
    """Of one key one runs; what is visible when the next is chosen comes in the order of the ids.

    Publishers that do not see each other may all take theirs for the first: they are pending, and take turns.
    """

    async def outcome(scene: Scene) -> str:
        rows = await scene.sql.fetch("SELECT status, count(*) AS n FROM pgebus.deliveries GROUP BY 1 ORDER BY 1")
        return " ".join(f"{row['n']} {row['status']}" for row in rows)

    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={
            **{name: (publish(name, key="k"), COMMIT) for name in "pq"},
            "r": (together("publish", publish("r", key="k"), COMMIT),),
            "worker": (together("claim", claim(), COMMIT), together("complete", COMPLETE, COMMIT)),
        },
        outcome=outcome,
        allowed={
            "3 pending",
            "1 blocked 2 pending",
            "2 blocked 1 pending",
            "1 completed 2 pending",
            "1 blocked 1 completed 1 pending",
            "2 blocked 1 completed",
        },
        always=ONE_RUNS,
        ordered=True,
    )


@race(RC)
def claims_of_one_key(_level: str) -> Spec:
    """An earlier event that becomes visible while a later one is being claimed does not run beside it.

    Its claim waits at the unique index for the other claim's commit, is refused there, and looks again.
    """

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status")

    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={
            "p": (publish("p", key="k"), COMMIT),
            "q": (together("publish", publish("q", key="k"), COMMIT),),
            "x": (claim(), COMMIT),
            "y": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed={
            "p pending, q pending",
            "p running, q pending",
            "p pending, q running",
            "p running, q blocked",
            "p pending, q blocked",
            "p blocked, q pending",
            "p blocked, q running",
        },
        waits={"x.claim", "y.claim"},
        always=ONE_RUNS,
        ordered=True,
    )


@race(*ALL_LEVELS)
def publishers_that_lock_first(level: str) -> Spec:
    """Two that lock the same row before they publish have an order: their ids follow their commits.

    Above READ COMMITTED the second one is refused, as it would be for any row that was changed since its snapshot.
    """

    async def setup(scene: Scene) -> None:
        await scene.sql.execute("CREATE TABLE IF NOT EXISTS orders (id int PRIMARY KEY, n int NOT NULL)")
        await scene.sql.execute("INSERT INTO orders VALUES (7, 0) ON CONFLICT DO NOTHING")
        await scene.group("g")

    async def outcome(scene: Scene) -> str:
        trace = scene.trace
        ids = {row["type"]: row["id"] for row in await scene.sql.fetch("SELECT type, id FROM pgebus.events")}
        if len(ids) == 2:
            assert (ids["p"] < ids["q"]) == trace.before("p.commit", "q.commit")
        return " ".join(sorted(ids))

    lock = by_hand("lock", "UPDATE orders SET n = n + 1 WHERE id = 7")
    return Spec(
        setup=setup,
        sessions={
            "p": (lock, publish("p", key="k"), COMMIT),
            "q": (lock, publish("q", key="k"), COMMIT),
            "worker": (together("claim", claim(), COMMIT, COMPLETE, COMMIT),),
        },
        outcome=outcome,
        allowed={"p q"} if level == RC else {"p q", "p", "q"},
        waits={"p.lock", "q.lock"},
        errors=set() if level == RC else {"p.lock 40001", "q.lock 40001"},
        levels={"p": level, "q": level},
        always=ONE_RUNS,
        ordered=True,
    )


def _bury(dead_holds_key: bool) -> Spec:
    async def setup(scene: Scene) -> None:
        await scene.group("g", dead_holds_key=dead_holds_key)
        await scene.events("a", key="k")
        await scene.claimed("worker", 1)

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status", "holds_key")

    free = {"a dead f, b pending f", "a dead f, b blocked f"}
    return Spec(
        setup=setup,
        sessions={
            "worker": (BURY, COMMIT),
            "publisher": (publish("b", key="k"), COMMIT),
            "sweeper": (SWEEP, COMMIT),
        },
        outcome=outcome,
        allowed={"a dead t, b blocked f"} if dead_holds_key else free,
        drains=not dead_holds_key,
    )


@race(RC)
def bury_and_publish(_level: str) -> Spec:
    """A dead delivery lets the next one in; what was published meanwhile is found by a sweep."""
    return _bury(dead_holds_key=False)


@race(RC)
def bury_that_holds_its_key_and_publish(_level: str) -> Spec:
    """Where dead letters hold their key, nobody gets past one: not the publisher, not the sweep."""
    return _bury(dead_holds_key=True)


@race(RC)
def unhandle_adopt_and_publish(_level: str) -> Spec:
    """What one worker puts aside and another takes up keeps its place in its key."""

    async def setup(scene: Scene) -> None:
        await head_is_held(scene)

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status", "holds_key")

    return Spec(
        setup=setup,
        sessions={
            "worker": (UNHANDLE, COMMIT),
            "other": (adopt("a"), COMMIT),
            "publisher": (publish("b", key="k"), COMMIT),
        },
        outcome=outcome,
        allowed={"a unhandled t, b blocked f", "a running f, b blocked f"},
        always=ONE_RUNS,
        drains=False,
    )


@race(RC)
def adopt_and_adopt(_level: str) -> Spec:
    """What was put aside is adopted once; the first of the key runs, the others wait."""

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", "a", key="k")
        await scene.sql.execute("UPDATE pgebus.deliveries SET status = 'unhandled', holds_key = (event_id = 1)")

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status", order="event_id")

    return Spec(
        setup=setup,
        sessions={"x": (adopt("a"), COMMIT), "y": (adopt("a"), COMMIT), "sweeper": (SWEEP, COMMIT)},
        outcome=outcome,
        allowed={"a running, a blocked"},
        always=ONE_RUNS,
        ordered=True,
    )
