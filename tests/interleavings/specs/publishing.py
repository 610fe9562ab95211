"""What is published while others claim, look, publish the same, or handle."""

from __future__ import annotations

from pgebus._runtime.maintenance import Backfiller
from tests.interleavings.parties import Party, Step
from tests.interleavings.races import race
from tests.interleavings.scene import Scene
from tests.interleavings.spec import ALL_LEVELS, EFFECTS_MATCH, RC, SERIALIZABLE, Spec
from tests.interleavings.steps import (
    COMMIT,
    COMPLETED,
    HANDLE,
    LOOK,
    ROLLBACK,
    claim,
    follow_up,
    idle,
    publish,
    together,
)


@race(*ALL_LEVELS)
def publish_and_claim(level: str) -> Spec:
    """A claim takes what was committed before it, whatever ids are still to come: none is passed over for ever."""

    async def outcome(scene: Scene) -> str:
        committed = [name for name in "pq" if scene.trace.before(f"{name}.commit", "worker.claim")]
        assert scene.result("worker.claim") == (" ".join(committed) or "-")
        return f"claimed {scene.result('worker.claim')}"

    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={"p": (publish("p"), COMMIT), "q": (publish("q"), COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"claimed -", "claimed p", "claimed q", "claimed p q"},
        levels={"p": level, "q": level},
    )


@race(*ALL_LEVELS)
def publish_rolled_back_and_claim(level: str) -> Spec:
    """What was rolled back was never there, whoever looked meanwhile."""

    async def outcome(scene: Scene) -> str:
        return f"claimed {scene.result('worker.claim')}: {await scene.rows()}"

    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={"p": (publish("p"), ROLLBACK), "q": (publish("q"), COMMIT), "worker": (claim(), COMMIT)},
        outcome=outcome,
        allowed={"claimed -: q", "claimed q: q"},
        levels={"p": level, "q": level},
    )


def _twice(level: str, p_ends: Step, q_ends: Step, *, core: bool) -> Spec:
    """Two publish with the same dedup_key."""

    async def outcome(scene: Scene) -> str:
        kept = await scene.sql.fetch("SELECT type FROM pgebus.events")
        for one, other in ("pq", "qp"):
            if str(scene.result(f"{one}.publish")).endswith("(there)"):
                assert scene.trace.before(f"{other}.commit", f"{one}.publish"), "returned what was not committed"
        return f"kept {' '.join(row['type'] for row in kept) or '-'}"

    commits = [name for name, end in (("p", p_ends), ("q", q_ends)) if end is COMMIT]
    # Above READ COMMITTED, whoever meets what was committed since its snapshot has to go again.
    refused = set() if level == RC else {f"{'pq'[name == 'p']}.publish RetryTransactionError" for name in commits}
    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={
            "p": (LOOK, publish("p", dedup_key="once", core=core), p_ends),
            "q": (LOOK, publish("q", dedup_key="once", core=core), q_ends),
        },
        outcome=outcome,
        allowed={f"kept {name}" for name in commits} or {"kept -"},
        waits={"p.publish", "q.publish"},
        errors=refused,
        levels={"p": level, "q": level},
    )


@race(*ALL_LEVELS)
def same_dedup_key_both_commit(level: str) -> Spec:
    """One event is kept; the other publisher waits, then gets that one or has to go again."""
    return _twice(level, COMMIT, COMMIT, core=False)


@race(*ALL_LEVELS)
def same_dedup_key_one_rolls_back(level: str) -> Spec:
    """Whoever waited for one that was rolled back publishes its own."""
    return _twice(level, ROLLBACK, COMMIT, core=False)


@race(*ALL_LEVELS)
def same_dedup_key_both_roll_back(level: str) -> Spec:
    """Nothing is kept, and nobody was told that it is there."""
    return _twice(level, ROLLBACK, ROLLBACK, core=False)


@race(*ALL_LEVELS)
def same_dedup_key_on_connections_both_commit(level: str) -> Spec:
    """The same where they publish on connections: INSERT … ON CONFLICT DO NOTHING."""
    return _twice(level, COMMIT, COMMIT, core=True)


@race(*ALL_LEVELS)
def same_dedup_key_on_connections_one_rolls_back(level: str) -> Spec:
    """The same, and one is rolled back."""
    return _twice(level, ROLLBACK, COMMIT, core=True)


@race(*ALL_LEVELS)
def same_dedup_key_three_times(level: str) -> Spec:
    """Three publish with the same key, and one of them is rolled back: one event is kept."""

    async def outcome(scene: Scene) -> str:
        return await scene.rows()

    refused = {f"{name}.publish RetryTransactionError" for name in "pqr"}
    return Spec(
        setup=lambda scene: scene.group("g"),
        sessions={
            "p": (publish("p", dedup_key="once"), COMMIT),
            "q": (publish("q", dedup_key="once"), COMMIT),
            "r": (publish("r", dedup_key="once"), ROLLBACK),
        },
        outcome=outcome,
        allowed={"p", "q"},
        waits={"p.publish", "q.publish", "r.publish"},
        errors=set() if level == RC else refused,
        levels=dict.fromkeys("pqr", level),
    )


@race(*ALL_LEVELS)
def handler_and_publisher(level: str) -> Spec:
    """A handler that publishes with a key, beside another publisher of that key: both are in, or one goes again.

    What the handler has published is there exactly when its effect is.
    """

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.events("a", key="k")
        await scene.claimed("handler", 1)

    async def outcome(scene: Scene) -> str:
        rows = await scene.rows("status")
        assert (", b " in rows) == ("a completed" in rows)
        return rows

    failing = {"handler.complete 40001", "handler.commit 40001", "publisher.commit 40001"}
    both = {
        "a completed, b pending, c blocked",
        "a completed, b running, c blocked",
        "a completed, b blocked, c pending",
        "a completed, b blocked, c running",
    }
    again = {"a completed, b pending", "a completed, b running", "a running, c blocked"}
    return Spec(
        setup=setup,
        sessions={
            "handler": (HANDLE, follow_up("b", key="k"), COMPLETED, COMMIT),
            "publisher": (publish("c", key="k"), COMMIT),
            "worker": (claim(), COMMIT),
        },
        outcome=outcome,
        allowed=both | again if level == SERIALIZABLE else both,
        errors=failing if level == SERIALIZABLE else set(),
        levels={"handler": level, "publisher": level},
        always=EFFECTS_MATCH,
        effects=True,
    )


@race(*ALL_LEVELS)
def idle_flag_and_publish(level: str) -> Spec:
    """A worker that sets its flag, commits, and then looks: it finds what was published, or is told.

    Only who read the flag before that commit, and committed after the look, is left to the next look. By doubling, that
    comes after as much time again as the worker has been idle: `next_look()`.
    """

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.sql.execute(
            "INSERT INTO pgebus.workers (id, channel) VALUES ($1, 'events')", scene.parties["worker"].worker_id
        )
        await scene.heard()

    async def outcome(scene: Scene) -> str:
        trace, heard = scene.trace, await scene.heard()
        how = []
        for name in "pq":
            if name in str(scene.result("worker.look")):
                how.append(f"{name} found")
            elif trace.before("worker.commit", f"{name}.publish"):
                assert heard
                how.append(f"{name} told")
            else:
                assert trace.before(f"{name}.publish", "worker.commit")
                assert trace.before("worker.look", f"{name}.commit")
                how.append(f"{name} left")
        assert len(heard) <= sum("told" in each or "found" in each for each in how)
        return ", ".join(how)

    return Spec(
        setup=setup,
        sessions={
            "worker": (idle(True), COMMIT, together("look", claim(), COMMIT)),
            "p": (publish("p"), COMMIT),
            "q": (publish("q"), COMMIT),
        },
        outcome=outcome,
        allowed={f"p {p}, q {q}" for p in ("found", "told", "left") for q in ("found", "told", "left")},
        levels={"p": level, "q": level},
    )


def _backfill(level: str, start: str) -> Spec:
    async def declare(party: Party) -> None:
        await party.at_once.subscribe([("new", "#", start)])

    async def make_up(party: Party) -> None:
        await backfillers[0].round()

    async def setup(scene: Scene) -> None:
        await scene.group("g")
        await scene.sql.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'new')")
        await scene.events("a")
        backfillers[:] = [Backfiller(scene.parties["maintainer"].at_once, lambda: None)]

    async def outcome(scene: Scene) -> str:
        for _ in range(50):
            if await scene.sql.fetchval("SELECT bool_and(backfilled_at IS NOT NULL) FROM pgebus.subscriptions"):
                break
            await backfillers[0].round()
        else:
            raise AssertionError("never backfilled")
        got: str = await scene.sql.fetchval(
            "SELECT coalesce(string_agg(type, ' ' ORDER BY type), '-') FROM pgebus.deliveries"
            " WHERE consumer_group = 'new'"
        )
        if start == "now" and "b" not in got:
            assert not scene.trace.before("starter.declare", "publisher.publish"), "published after, and not got"
        return f"new got {got}"

    backfillers: list[Backfiller] = []
    round_ = Step("round", make_up)
    return Spec(
        setup=setup,
        sessions={
            "publisher": (LOOK, publish("b"), COMMIT),
            "starter": (Step("declare", declare),),
            "maintainer": (round_, round_, round_),
        },
        outcome=outcome,
        allowed={"new got a b"} if start == "beginning" else {"new got b", "new got -"},
        levels={"publisher": level},
        missing=start == "now",
    )


@race(*ALL_LEVELS)
def backfill_and_publish_in_flight(level: str) -> Spec:
    """A group that reaches back gets every event once, also of a publisher that never saw its subscription."""
    return _backfill(level, "beginning")


@race(*ALL_LEVELS)
def new_group_and_publish_in_flight(level: str) -> Spec:
    """A group that begins now gets all that is inserted after its declaration, whenever that began or commits."""
    return _backfill(level, "now")
