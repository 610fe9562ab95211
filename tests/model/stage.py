"""What all rules share: the database, the oracle, the leases that workers hold, and the look after every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pgebus._runtime.leases import Lease
from pgebus._runtime.maintenance import Backfiller
from tests.model.database import SLOTS, Database, Look
from tests.model.invariants import check
from tests.model.oracle import Oracle
from tests.model.steps import Taken, sensible_steps
from tests.model.things import Delivery, Moment, Worker

T = TypeVar("T")

TYPES: Final = ("order.placed", "order.paid", "mail.sent")
GROUPS: Final = ("billing", "mail", "default")
# More deliveries than that make every step dearer, and nothing likelier.
ENOUGH: Final = 40

slots: Final = st.sampled_from(SLOTS)
# Chooses one of what is there; what is there is not known when the step is drawn.
nth: Final = st.integers(0, 11)


class Stage(RuleBasedStateMachine):
    """The state machine without its rules.

    Attributes:
        database: Of the run.
        seen: What has happened in the run: how often which step did what it is there for.
        first_failure: After how many looks the first example of the run failed; 0 when none has.
    """

    database: ClassVar[Database]
    seen: ClassVar[Counter[str]]
    first_failure: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.oracle = Oracle()
        self.workers: dict[str, Worker] = {}
        self.leases: list[Lease] = []
        self.stale: list[Lease] = []
        # The handlers' transactions that are open, by the connection.
        self.handling: dict[str, tuple[Lease, str]] = {}
        # Steps that an example does without, so that what depends on their absence is seen too.
        self.left_out: frozenset[str] = frozenset()
        self.failed = False
        self.run(self.database.clear())
        self.before: Look = self.run(self.database.look())
        self.oracle.now = Moment(self.before.clock)
        self.backfiller = Backfiller(self.database.store, lambda: None)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.database.run(work)

    async def in_a_session(self, verb: Callable[..., Awaitable[T]], *args: object, **options: Any) -> T:
        """Do what a person does by `pgebus.operations`, and commit."""
        async with self.database.sessions.session() as session:
            answer = await verb(session, *args, **options)
            await session.commit()
            return answer

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note that the example has failed when the block does: then nothing is drained at its end."""
        try:
            yield
        except BaseException:
            self.failed = True
            type(self).first_failure = self.first_failure or self.seen["steps"]
            raise

    def did(self, what: str, *, times: int = 1) -> None:
        """Count what happened: a run in which something never does has shown nothing of it."""
        self.seen[what] += times

    @rule(step=sensible_steps())
    def then(self, step: Taken) -> None:
        """Take a step."""
        self.seen[step.name] += 1
        with self.watched():
            getattr(self, step.name)(**step.arguments)
            self.look()

    def look(self) -> None:
        """Close the step: compare, and forget what was only of this step."""
        self.seen["steps"] += 1
        after = self.database.run(self.database.look())
        self.oracle.now.hi = after.clock
        check(self.before, after, self.oracle)
        self.before = after
        self.oracle.now = Moment(after.clock)
        self.oracle.departed.clear()
        self.oracle.may_promote.clear()
        self.oracle.steps += 1
        self._sort_leases()

    def _sort_leases(self) -> None:
        held = [lease for lease in self.leases if self.oracle.holder(lease.fence)]
        lost = [lease for lease in self.leases if not self.oracle.holder(lease.fence)]
        self.leases, self.stale = held, (self.stale + lost)[-12:]

    # -- choosing

    def pick(self, of: Sequence[T], index: int) -> T:
        return of[index % len(of)]

    def free_leases(self) -> list[Lease]:
        """Return the leases that no open transaction is working on."""
        busy = {lease.fence for lease, _ in self.handling.values()}
        return [lease for lease in self.leases if lease.fence not in busy]

    def in_state(self, *statuses: str) -> list[Delivery]:
        return [d for d in self.oracle.deliveries.values() if d.status in statuses]

    def held(self, lease: Lease) -> Delivery:
        holder = self.oracle.holder(lease.fence)
        assert holder is not None
        return holder

    @staticmethod
    def say(what: str) -> None:
        """Tell the story of a failing example."""
        note(f"    -- {what}")


def named(lease: Lease) -> str:
    """Return how a story calls a lease."""
    fence = lease.fence
    return f"#{fence.event_id}/{fence.group} (claim {fence.claim_seq} of worker {fence.worker_id})"
