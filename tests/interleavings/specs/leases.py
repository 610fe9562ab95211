"""Who may finish a delivery: claims, recoveries, late answers, releases."""

from __future__ import annotations

from datetime import UTC, datetime

from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, EFFECTS_MATCH, RC, Spec
from tests.interleavings.steps import (
    BEAT,
    BURY,
    COMMIT,
    COMPLETE,
    COMPLETED,
    END,
    HANDLE,
    RELEASE,
    RETRY,
    ROLLBACK,
    claim,
    claim_lost_once,
    claim_on,
    recover,
    together,
)

CLAIM_SUSPECT = together("claim", claim(suspect=True), COMMIT)
CLAIM_ANY = together("claim", claim(), claim(suspect=True))
LATE = 101  # the id of the session that a spec names first


async def three(scene: Scene) -> None:
    await scene.group("g")
    await scene.events("a", "b", "c")


async def one_held_by_late(scene: Scene) -> None:
    """One event, claimed by the session `late`, which is taken for dead."""
    await scene.group("g")
    await scene.events("a")
    await scene.claimed("late", 1)


@race(RC)
def claim_and_claim(_level: str) -> Spec:
    """A delivery is claimed once, whoever comes first; nobody waits; no claim takes more than it asked for."""

    async def outcome(scene: Scene) -> str:
        claims = {name: scene.result(f"{name}.claim") for name in "xyz"}
        taken = " ".join(claims.values()).replace("-", "").split()
        assert len(taken) == len(set(taken)), claims
        return " ".join(f"{name}{len(got.replace('-', '').split())}" for name, got in claims.items())

    return Spec(
        setup=three,
        sessions={name: (claim(2), COMMIT) for name in "xyz"},
        outcome=outcome,
        allowed={"x2 y1 z0", "x2 y0 z1", "x1 y2 z0", "x0 y2 z1", "x1 y0 z2", "x0 y1 z2"},
        always="SELECT count(*) = 0 FROM pgebus.deliveries WHERE claim_seq > 1",
    )


@race(RC)
def claim_rolled_back_and_claim(_level: str) -> Spec:
    """A claim whose connection was lost before its commit has taken nothing, and hides nothing for longer."""

    async def outcome(scene: Scene) -> str:
        claims = {name: scene.result(f"{name}.claim") for name in ("lost", "y", "z")}
        return f"y {claims['y']}, z {claims['z']}"

    return Spec(
        setup=three,
        sessions={"lost": (claim(2), ROLLBACK), "y": (claim(3), COMMIT), "z": (claim(1), COMMIT)},
        outcome=outcome,
        allowed={"y a b c, z -", "y b c, z a", "y c, z -", "y c, z a", "y -, z a", "y -, z c", "y a b, z c"},
    )


@race(RC)
def claims_that_go_on(_level: str) -> Spec:
    """Claims from the middle of a lane and from its beginning: nothing twice, nobody waits, and what is before is left.

    What was released behind the back of a claim that goes on is there for the next one from the beginning.
    """
    due = datetime(2020, 1, 1, tzinfo=UTC)

    async def setup(scene: Scene) -> None:
        await three(scene)
        await scene.sql.execute("UPDATE pgebus.deliveries SET due_at = $1", due)
        await scene.claimed("late", 1)

    async def outcome(scene: Scene) -> str:
        claims = [scene.result(f"{name}.claim") for name in "xyz"]
        taken = " ".join(claims).replace("-", "").split()
        assert len(taken) == len(set(taken)), claims
        assert "a" not in claims[0] + claims[1]
        return ", ".join(f"{name} {got}" for name, got in zip("xyz", claims, strict=True))

    return Spec(
        setup=setup,
        sessions={
            "late": (RELEASE, COMMIT),
            "x": (claim_on(2, due, 2), COMMIT),
            "y": (claim_on(2, due, 1), COMMIT),
            "z": (together("claim", claim(1), COMMIT),),
        },
        outcome=outcome,
        allowed={
            "x b c, y -, z a",
            "x c, y b, z a",
            "x b c, y -, z -",
            "x c, y b, z -",
            "x -, y b, z c",
            "x c, y -, z b",
            "x -, y c, z b",
        },
        always="SELECT count(*) = 0 FROM pgebus.deliveries WHERE claim_seq > 2",
    )


@race(RC)
def claims_of_what_one_worker_died_with(_level: str) -> Spec:
    """Several of them at a time, and none twice; what two workers died with is taken alone, by the other statement."""

    async def setup(scene: Scene) -> None:
        await three(scene)
        await scene.events("d")
        await scene.sql.execute("UPDATE pgebus.deliveries SET lost = CASE type WHEN 'd' THEN 2 ELSE 1 END")

    async def outcome(scene: Scene) -> str:
        claims = {name: scene.result(f"{name}.claim").replace("-", "").split() for name in "xyz"}
        taken = [one for each in claims.values() for one in each]
        assert len(taken) == len(set(taken)), claims
        assert "d" not in claims["x"] + claims["y"]
        return " ".join(f"{name}{len(got)}" for name, got in claims.items())

    return Spec(
        setup=setup,
        sessions={
            "x": (claim_lost_once(2), COMMIT),
            "y": (claim_lost_once(2), COMMIT),
            "z": (claim(suspect=True), COMMIT),
        },
        outcome=outcome,
        allowed={"x2 y1 z1", "x2 y0 z1", "x1 y2 z1", "x0 y2 z1"},
        always="SELECT count(*) = 0 FROM pgebus.deliveries WHERE claim_seq > 1",
    )


@race(RC)
def beat_and_recover(_level: str) -> Spec:
    """A worker whose beat comes first keeps what it has; one that was ended before beats in vain."""

    async def setup(scene: Scene) -> None:
        await one_held_by_late(scene)
        await scene.sql.execute(
            "INSERT INTO pgebus.workers (id, channel, groups, beat_at, host, pid, version)"
            " VALUES ($1, 'events', '{g}', now() - interval '1 minute', 'host', 1, '0')",
            LATE,
        )

    async def outcome(scene: Scene) -> str:
        beats, recovered = scene.result("late.beat"), scene.result("other.recover")
        return f"beats {beats}, recovered {recovered}: {await scene.rows('status', 'attempt', 'lost')}"

    return Spec(
        setup=setup,
        sessions={
            "late": (BEAT, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (claim(suspect=True), COMMIT),
        },
        outcome=outcome,
        allowed={
            "beats True, recovered 0: a running 1 0",
            "beats False, recovered 1: a pending 1 1",
            "beats False, recovered 1: a running 2 1",
        },
        waits={"late.beat", "other.recover"},
        drains=False,  # whoever beats is alive, and nobody takes its deliveries
    )


@race(RC)
def claim_and_recover(_level: str) -> Spec:
    """What a dead worker held is claimed by one other, after it was recovered."""

    async def outcome(scene: Scene) -> str:
        claims = [scene.result(f"{name}.claim") for name in ("x", "y")]
        assert claims.count("a") <= 1
        return f"{await scene.rows('status', 'attempt', 'lost')}; recovered {scene.result('other.recover')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (),
            "other": (recover(LATE), COMMIT),
            "x": (claim(suspect=True), COMMIT),
            "y": (claim(suspect=True), COMMIT),
        },
        outcome=outcome,
        allowed={"a pending 1 1; recovered 1", "a running 2 1; recovered 1"},
    )


@race(RC)
def recover_and_recover(_level: str) -> Spec:
    """Two that take a worker for dead recover its leases once: `lost` counts it once."""

    async def outcome(scene: Scene) -> str:
        assert {scene.result("x.recover"), scene.result("y.recover")} <= {0, 1}
        return f"{await scene.rows('status', 'attempt', 'lost')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (),
            "x": (recover(LATE), COMMIT),
            "y": (recover(LATE), COMMIT),
            "z": (claim(suspect=True), COMMIT),
        },
        outcome=outcome,
        allowed={"a pending 1 1", "a running 2 1"},
    )


@race(RC)
def recover_and_late_complete(_level: str) -> Spec:
    """A batched completion that comes late completes nothing that was given to another."""

    async def outcome(scene: Scene) -> str:
        late, following = scene.result("late.complete"), scene.result("next.complete")
        assert [late, following].count("a") <= 1
        return f"late {late}, next {following}: {await scene.rows('status', 'claim_seq')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (COMPLETE, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (claim(suspect=True), COMMIT, COMPLETE, COMMIT),
        },
        outcome=outcome,
        allowed={
            "late a, next -: a completed 1",
            "late -, next a: a completed 2",
            "late -, next -: a pending 1",
        },
    )


@race(*ALL_LEVELS)
def recover_and_late_complete_with_effects(level: str) -> Spec:
    """A late transactional completion rolls back its effects, or it comes first: each effect is there once.

    At READ COMMITTED it finds no row (PGB01); above, PostgreSQL says that it cannot be serialized.
    """

    async def outcome(scene: Scene) -> str:
        by = await scene.sql.fetch("SELECT by FROM effects")
        return f"{await scene.rows('status', 'claim_seq')}, effects by {' '.join(row['by'] for row in by) or '-'}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (HANDLE, COMPLETED, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (CLAIM_SUSPECT, together("handle", HANDLE, COMPLETED), COMMIT),
        },
        outcome=outcome,
        allowed={
            "a completed 1, effects by late",
            "a completed 2, effects by next",
            "a pending 1, effects by -",
        },
        waits={"late.complete"},
        errors={"late.complete PGB01"} if level == RC else {"late.complete PGB01", "late.complete 40001"},
        levels={"late": level, "next": level},
        always=EFFECTS_MATCH,
        effects=True,
    )


@race(RC)
def recover_and_late_fail(_level: str) -> Spec:
    """A failure that comes late counts nothing, and reschedules nothing that was given to another."""

    async def outcome(scene: Scene) -> str:
        held = scene.result("late.retry")
        return f"{'held' if held else 'lost'}: {await scene.rows('status', 'attempt', 'lost')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (RETRY, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (CLAIM_ANY, COMMIT),
        },
        outcome=outcome,
        allowed={
            "held: a pending 1 0",
            "held: a running 2 0",
            "lost: a pending 1 1",
            "lost: a running 2 1",
        },
    )


@race(RC)
def recover_and_late_bury(_level: str) -> Spec:
    """A worker that was given up buries nothing."""

    async def outcome(scene: Scene) -> str:
        held = scene.result("late.bury")
        return f"{'held' if held else 'lost'}: {await scene.rows('status', 'attempt', 'lost')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (BURY, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (claim(suspect=True), COMMIT),
        },
        outcome=outcome,
        allowed={"held: a dead 1 0", "lost: a pending 1 1", "lost: a running 2 1"},
    )


@race(RC)
def release_and_recover(_level: str) -> Spec:
    """A stop gives back uncounted, a death counted; never both."""

    async def outcome(scene: Scene) -> str:
        return f"released {scene.result('late.release')}: {await scene.rows('status', 'attempt', 'lost')}"

    return Spec(
        setup=one_held_by_late,
        sessions={
            "late": (RELEASE, COMMIT),
            "other": (recover(LATE), COMMIT),
            "next": (CLAIM_ANY, COMMIT),
        },
        outcome=outcome,
        allowed={
            "released a: a pending 0 0",
            "released a: a running 1 0",
            "released -: a pending 1 1",
            "released -: a running 2 1",
        },
    )


@race(RC)
def batches_that_overlap(_level: str) -> Spec:
    """A batch completed, recovered and released at once: each delivery has one outcome, and nobody waits."""

    async def setup(scene: Scene) -> None:
        await three(scene)
        scene.parties["again"].leases = await scene.claimed("late", 3)

    async def outcome(scene: Scene) -> str:
        done = [scene.result("late.complete"), scene.result("again.release"), scene.result("other.recover")]
        assert [bool(one and one != "-") for one in done].count(True) == 1, done
        return await scene.rows("status", "attempt", "lost")

    return Spec(
        setup=setup,
        sessions={
            "late": (COMPLETE, COMMIT),
            "again": (RELEASE, COMMIT),
            "other": (recover(LATE), COMMIT),
        },
        outcome=outcome,
        allowed={
            "a completed 1 0, b completed 1 0, c completed 1 0",
            "a pending 0 0, b pending 0 0, c pending 0 0",
            "a pending 1 1, b pending 1 1, c pending 1 1",
        },
    )


@race(RC)
def batch_and_its_end_in_one_transaction(_level: str) -> Spec:
    """A batch that is sent again, because its answer was lost, overlaps with itself and with a transactional one."""

    async def setup(scene: Scene) -> None:
        await three(scene)
        leases = await scene.claimed("late", 3)
        scene.parties["again"].leases = leases[::-1]
        scene.parties["handler"].leases = leases[1:2]

    async def outcome(scene: Scene) -> str:
        return await scene.rows("status")

    return Spec(
        setup=setup,
        sessions={"late": (COMPLETE, COMMIT), "again": (COMPLETE, COMMIT), "handler": (HANDLE, END)},
        outcome=outcome,
        allowed={"a completed, b completed, c completed"},
        waits={"handler.end"},
        errors={"handler.end PGB01"},
    )
