"""What a spec says, and how its permutations are played and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import asyncpg

from pgebus._runtime.statements import Statements
from pgebus.settings import DatabaseSettings
from tests.interleavings.parties import Step
from tests.interleavings.scene import EFFECTS, Scene
from tests.interleavings.scheduler import Schedule, interleavings, portion

RC: Final = "READ COMMITTED"
RR: Final = "REPEATABLE READ"
SERIALIZABLE: Final = "SERIALIZABLE"
ALL_LEVELS: Final = (RC, RR, SERIALIZABLE)


@dataclass(frozen=True)
class Spec:
    """A race: who does what, and everything that may come of it.

    Attributes:
        setup: What is there before, committed.
        sessions: The steps of each session.
        outcome: Tells in words how it ended.
        allowed: Every outcome that there may be; when all permutations are played, each of them has to come.
        waits: The steps that may wait for a lock, as `session.step`; each of them has to, once.
        errors: The steps that may fail, with the SQLSTATE or the error's name; each of them has to, once.
        levels: Isolation levels of sessions that publish or handle; READ COMMITTED where none is given.
        always: A query that is true at every moment, in what is committed.
        effects: Whether each completed delivery must have exactly one effect.
        drains: Whether the deliveries that are left must be claimable by a worker that comes later.
        missing: Whether a group may lack the delivery of an event.
        ordered: Whether what is left of a key must come in the order of the ids.
    """

    setup: Callable[[Scene], Awaitable[None]]
    sessions: Mapping[str, Sequence[Step]]
    outcome: Callable[[Scene], Awaitable[str]]
    allowed: frozenset[str] | set[str]
    waits: frozenset[str] | set[str] = frozenset()
    errors: frozenset[str] | set[str] = frozenset()
    levels: Mapping[str, str] = field(default_factory=dict)
    always: str = ""
    effects: bool = False
    drains: bool = True
    missing: bool = False
    ordered: bool = False

    def orders(self) -> list[tuple[str, ...]]:
        """Return all permutations."""
        return list(interleavings({name: len(steps) for name, steps in self.sessions.items()}))


@dataclass
class Report:
    """What was seen in all permutations of a spec.

    Attributes:
        played: How many.
        outcomes: How often each outcome came.
        waits: How often each step waited.
        errors: How often each step failed, and with what.
        histories: In how many different orders steps ended.
    """

    played: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    histories: set[tuple[str, ...]] = field(default_factory=set)


EFFECTS_MATCH: Final = """
SELECT NOT EXISTS (SELECT FROM pgebus.deliveries d WHERE (d.status = 'completed') <>
  ((SELECT count(*) FROM effects x WHERE x.event_id = d.event_id) = 1))"""
_ORPHANS: Final = """
SELECT NOT EXISTS (SELECT FROM pgebus.deliveries d WHERE NOT EXISTS (
  SELECT FROM pgebus.events e WHERE e.id = d.event_id))"""
_COMPLETE: Final = """
SELECT NOT EXISTS (SELECT FROM pgebus.events e CROSS JOIN pgebus.subscriptions s WHERE NOT EXISTS (
  SELECT FROM pgebus.deliveries d WHERE d.event_id = e.id AND d.consumer_group = s.consumer_group))"""
_OVER: Final = (
    "SELECT NOT EXISTS (SELECT FROM pgebus.deliveries WHERE status NOT IN ('completed', 'cancelled', 'dead'))"
)


async def play(
    spec: Spec,
    settings: DatabaseSettings,
    sql: asyncpg.Connection[asyncpg.Record],
    *,
    most: int | None = None,
    statements: Statements | None = None,
) -> Report:
    """Play the permutations of *spec*, all of them or a portion.

    Raises:
        AssertionError: At the first one that ends as it may not, with its order.
    """
    await sql.execute(EFFECTS.replace("TABLE", "TABLE IF NOT EXISTS"))
    levels = {name: spec.levels.get(name, RC) for name in spec.sessions}
    scene = Scene(settings, sql, statements or Statements("pgebus"), levels)
    report = Report()
    orders = spec.orders()
    try:
        for order in portion(orders, most):
            await _one(spec, scene, order, report)
    finally:
        await scene.close()
    if report.played == len(orders):
        assert set(report.outcomes) == spec.allowed, f"never came: {spec.allowed - set(report.outcomes)}"
        assert set(report.waits) == spec.waits, f"never waited: {spec.waits - set(report.waits)}"
        assert set(report.errors) == spec.errors, f"never failed: {spec.errors - set(report.errors)}"
    return report


async def _one(spec: Spec, scene: Scene, order: Sequence[str], report: Report) -> None:
    await scene.empty()
    await spec.setup(scene)

    async def settled() -> None:
        if spec.always:
            assert await scene.sql.fetchval(spec.always), f"not always: {spec.always}"

    schedule = Schedule([(scene.parties[name], steps) for name, steps in spec.sessions.items()], scene.blocked, settled)
    scene.trace = schedule.trace
    try:
        trace = await schedule.play(order)
        report.played += 1
        report.histories.add(tuple(trace.order))
        report.waits.update(trace.waited)
        failed = {f"{step} {failed.code}" for step, failed in trace.failed.items()}
        report.errors.update(failed)
        for step, failure in trace.failed.items():
            if f"{step} {failure.code}" not in spec.errors:
                raise AssertionError(f"{step} failed: {failure.error!r}") from failure.error
        assert trace.waited <= spec.waits, f"waited: {trace.waited - spec.waits}"
        outcome = await spec.outcome(scene)
        report.outcomes[outcome] += 1
        assert outcome in spec.allowed, f"outcome: {outcome!r}"
        await _judge(spec, scene)
    except AssertionError as error:
        raise AssertionError(f"{error}\n  permutation {order}\n  steps ended {schedule.trace.order}") from error


async def _judge(spec: Spec, scene: Scene) -> None:
    """What holds of every race: nothing is lost, nothing is left over, nothing happens twice."""
    assert await scene.sql.fetchval(_ORPHANS), "a delivery without its event"
    assert spec.missing or await scene.sql.fetchval(_COMPLETE), "a group lacks the delivery of an event"
    if spec.drains:
        drained = await scene.drain(effects=spec.effects)
        assert not spec.ordered or drained == sorted(drained), f"in another order: {drained}"
        assert await scene.sql.fetchval(_OVER), f"never handled: {await scene.rows('status')}"
    if spec.effects:
        seen = await scene.sql.fetch("SELECT event_id, by FROM effects")
        assert await scene.sql.fetchval(EFFECTS_MATCH), f"{await scene.rows('status')}; effects {seen}"
