"""Workers: they claim, finish in every way there is, die, and come back from the dead with what is no longer theirs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from random import Random
from typing import Final

import asyncpg
from hypothesis import strategies as st

from pgebus._runtime.leases import Fence, Lane, Lease, Place
from pgebus._runtime.outcome import Reschedule, decide
from pgebus._runtime.store import entry_of
from pgebus.retry import Reject, Retry, RetryPolicy, Snooze
from tests.model.database import CHANNEL, SLOTS
from tests.model.stage import GROUPS, TYPES, Stage, named, nth
from tests.model.steps import step
from tests.model.things import MAX_ATTEMPTS, Delivery, Worker

EFFECT: Final = "INSERT INTO effects VALUES ($1, $2, $3)"
POLICY: Final = RetryPolicy(
    max_attempts=MAX_ATTEMPTS, first=timedelta(seconds=100), ceiling=timedelta(seconds=400), dead_on=(LookupError,)
)
RAISED: Final = {
    "an error": ValueError("no"),
    "a final error": LookupError("never"),
    "Retry(0)": Retry(timedelta(0)),
    "Retry(100)": Retry(timedelta(seconds=100)),
    "Snooze(0)": Snooze(timedelta(0)),
    "Snooze(1000)": Snooze(timedelta(seconds=1000)),
    "Reject": Reject("nobody wants it"),
}


class _Longest(Random):
    """The backoff at its bound: a delay that no test could tell from a wait would make the outcome depend on speed."""

    def uniform(self, a: float, b: float) -> float:
        return b


class Working(Stage):
    """Rules: what workers do."""

    def _at_work(self) -> bool:
        return bool(self.workers)

    # -- to be, or not

    @step(
        3,
        when=lambda self: any(s not in self.workers or not self.workers[s].alive for s in SLOTS),
        groups=st.sets(st.sampled_from(GROUPS), min_size=1),
    )
    def start_worker(self, groups: set[str]) -> None:
        slot = next(s for s in SLOTS if s not in self.workers or not self.workers[s].alive)
        worker = Worker(1001 + len(self.oracle.workers), tuple(sorted(groups)))
        sql = self.database.statements
        self.say(f"worker {worker.id} starts in slot {slot}")
        register = self.database.hands.fetch(sql.register, worker.id, CHANNEL, list(worker.groups), "host", 1, "0")
        self.run(register)
        assert self.run(self.database.locks.fetchval(sql.lock, worker.id))
        self.oracle.workers[worker.id] = self.workers[slot] = worker

    @step(when=lambda self: any(w.alive for w in self.workers.values()), index=nth)
    def lose_a_lock(self, index: int) -> None:
        """Kill a worker, or cut it off: nobody can tell which. What it has open stays open."""
        worker = self.pick([w for w in self.workers.values() if w.alive], index)
        self.say(f"worker {worker.id} loses its lock")
        assert self.run(self.database.locks.fetchval(self.database.statements.unlock, worker.id))
        worker.alive = False

    @step(3, when=lambda self: any(not w.alive and not w.ended for w in self.workers.values()))
    def recover(self) -> None:
        self._recover()

    def _recover(self) -> None:
        owners = self.run(self.database.store.owners())
        gone = sorted(row["worker_id"] for row in owners if not row["alive"])
        workers = self.oracle.workers
        owning = {d.worker for d in self.in_state("running")}
        due = sorted(w.id for w in workers.values() if not w.alive and (not w.ended or w.id in owning))
        assert gone == due, f"I7 recovery: {gone} were seen without a lock, {due} are"
        if gone:
            taken = self.run(self.database.store.recover(gone))
            assert taken == sum(self.oracle.recover(workers[worker_id]) for worker_id in gone)
            self.did("deliveries were recovered", times=taken)

    # -- claiming

    @step(10, when=_at_work, index=nth, limit=st.sampled_from((1, 2, 3, 10)))
    def claim(self, index: int, limit: int) -> None:
        """Claim as a worker does, a dead one included: it may not have noticed yet."""
        self._claim(self.pick(list(self.workers.values()), index), limit)

    @step(
        4, when=lambda self: any(d.lost and d.status == "pending" for d in self.oracle.deliveries.values()), index=nth
    )
    def claim_a_suspect(self, index: int) -> None:
        if self.workers:
            self._claim(self.pick(list(self.workers.values()), index), 1, suspect=True)

    @step(
        3,
        when=lambda self: self.workers and any(d.lost == 1 for d in self.in_state("pending")),
        index=nth,
        limit=st.sampled_from((2, 10)),
    )
    def claim_what_one_worker_died_with(self, index: int, limit: int) -> None:
        worker = self.pick(list(self.workers.values()), index)
        once = [d for d in self.oracle.claimable(worker.groups, limited=False, suspect=True) if d.lost == 1]
        leases = self.run(self.database.store.claim_lost_once(worker.id, worker.groups, limit))
        self._claimed(worker, leases, once, limit)
        self.did("many of a dead worker's were claimed", times=len(leases) > 1)

    @step(
        3,
        when=lambda self: self.workers and self.in_state("pending"),
        index=nth,
        place=nth,
        limit=st.sampled_from((1, 10)),
    )
    def claim_on_from_a_place(self, index: int, place: int, limit: int) -> None:
        """Claim as in a backlog: one lane is looked at from the place of one of its deliveries on."""
        worker = self.pick(list(self.workers.values()), index)
        first = self.pick(self.in_state("pending"), place)
        assert first.due is not None
        begin = {Lane(first.group, first.priority): Place(first.due - self.database.passed, first.event_id)}
        candidates = [
            d
            for d in self.oracle.claimable(worker.groups, limited=False, suspect=False)
            if (d.group, d.priority) != (first.group, first.priority)
            or (d.due or 0, d.event_id) >= (first.due, first.event_id)
        ]
        self.say(f"from {first.name} on")
        leases = self.run(self.database.store.claim(worker.id, worker.groups, limit, begin))
        self._claimed(worker, leases, candidates, limit)

    def _claim(self, worker: Worker, limit: int, *, suspect: bool = False) -> int:
        store = self.database.store
        free = self.oracle.claimable(worker.groups, limited=False, suspect=suspect)
        if suspect:
            assert self.run(store.suspects(worker.groups)) >= bool(free)
            leases = self.run(store.claim_suspect(worker.id, worker.groups))
        else:
            leases = self.run(store.claim(worker.id, worker.groups, limit))
        self._claimed(worker, leases, free, limit)
        count = len(leases)
        for group in sorted(self.run(store.limited_groups(worker.groups))):
            count += self._claim_limited(worker, group, limit, suspect=suspect)
        return count

    def _claim_limited(self, worker: Worker, group: str, limit: int, *, suspect: bool) -> int:
        most = self.oracle.groups[group].max_running
        assert most is not None
        candidates = self.oracle.claimable([group], limited=True, suspect=suspect)
        room = max(0, most - self.oracle.running(group))
        leases = self.run(self.database.store.claim_limited(worker.id, group, limit, suspect=suspect)) or []
        self.did("a limit held something back", times=room < min(limit, len(candidates)))
        self._claimed(worker, leases, candidates, min(limit, room))
        return len(leases)

    def _claimed(self, worker: Worker, leases: Sequence[Lease], candidates: Sequence[Delivery], limit: int) -> None:
        """Check that what was claimed could be, that nothing better was left, and that nothing was left at all."""
        could = {d.place: d for d in candidates}
        taken = [could.pop(lease.fence[:2], None) for lease in leases]
        strange = [named(lease) for lease, d in zip(leases, taken, strict=True) if d is None]
        assert not strange, f"I9 I11 claim: {strange} could not be claimed"
        assert len(taken) == min(limit, len(candidates)), (
            f"I7 claim: {len(taken)} of {[d.name for d in candidates]}, limit {limit}"
        )
        for d in (d for d in taken if d is not None):
            for left in could.values():
                assert left.priority >= d.priority, f"priority: {d.name} was claimed before {left.name}"
                if (left.group, left.priority) == (d.group, d.priority):
                    assert (left.due or 0, left.event_id) > (d.due or 0, d.event_id), f"{d.name} before {left.name}"
        # In an order of our own: that of equals is the planner's, and the next steps must not depend on it.
        for lease in sorted(leases, key=lambda lease: lease.fence):
            d = self.oracle.deliveries[lease.fence[:2]]
            self.oracle.claim(d, worker.id)
            got, due = (lease.fence.claim_seq, lease.attempt, lease.lost), (d.claim_seq, d.attempt, d.lost)
            assert got == due, f"I8 claim: {d.name} has claim, attempt and losses {got}, not {due}"
            self.leases.append(lease)
            self.say(f"worker {worker.id} has {named(lease)}, attempt {d.attempt}")
        self.did("deliveries were claimed", times=len(leases))

    @step(
        4,
        when=lambda self: self.workers and self.in_state("unhandled"),
        index=nth,
        event_type=st.sampled_from(TYPES),
        limit=st.sampled_from((1, 10)),
    )
    def adopt(self, index: int, event_type: str, limit: int) -> None:
        worker = self.pick(list(self.workers.values()), index)
        types = sorted({(d.group, d.type) for d in self.in_state("unhandled") if d.group in worker.groups})
        seen = self.run(self.database.store.unhandled_types(worker.groups))
        assert sorted(seen) == types, f"I7 adopt: {seen} are unhandled"
        for group in sorted({group for group, each in types if each == event_type}):
            self._adopt(worker, group, event_type, limit)

    def _adopt(self, worker: Worker, group: str, event_type: str, limit: int) -> int:
        oracle = self.oracle
        options = oracle.groups.get(group)
        waits = options is not None and (options.paused or options.max_running is not None)
        due = [d for d in self.in_state("unhandled") if (d.group, d.type) == (group, event_type)]
        due = sorted(due, key=lambda d: d.event_id)[:limit]
        turns = {d.place: d.key is None or (d.holds_key and oracle.first(d)) for d in due}
        count, leases = self.run(self.database.store.adopt(worker.id, group, event_type, limit))
        assert count == len(due), f"I7 adopt: {count} of {[d.name for d in due]}"
        for d in due:
            d.status, d.holds_key = "pending" if turns[d.place] else "blocked", False
        started = [d for d in due if turns[d.place] and oracle.is_due(d) and not d.lost and not waits]
        begun = [lease.fence[:2] for lease in leases]
        assert begun == [d.place for d in started], f"order of a key: adopted, and running: {begun}"
        for d, lease in zip(started, leases, strict=True):
            oracle.claim(d, worker.id)
            assert lease.fence.claim_seq == d.claim_seq, f"I11 one claim: {named(lease)}"
            self.leases.append(lease)
        self.did("unhandled deliveries were adopted", times=count)
        return count

    # -- handlers in a transaction

    @step(7, when=lambda self: self.free_leases() and len(self.handling) < len(SLOTS), index=nth)
    def begin_handling_in_a_transaction(self, index: int) -> None:
        """Open the handlers' transaction, and write an effect in it; how it ends is for later steps."""
        lease = self.pick(self.free_leases(), index)
        if lease.lost and lease.attempt > MAX_ATTEMPTS:
            self._bury_for_its_losses(lease)
            return
        slot = next(s for s in SLOTS if s not in self.handling)
        self._begin(slot, lease)

    def _begin(self, slot: str, lease: Lease) -> None:
        marker = f"marker {slot} {self.oracle.steps}"
        self.say(f"a handler begins on {named(lease)}")
        self.run(self.database.handlers[slot].execute(self.database.statements.begin("READ COMMITTED", marker)))
        self.run(self.database.handlers[slot].execute(EFFECT, *lease.fence[:3]))
        self.handling[slot] = lease, marker

    @step(6, when=lambda self: self.handling, index=nth)
    def complete_in_the_transaction(self, index: int) -> None:
        self._complete(self.pick(sorted(self.handling), index))

    def _complete(self, slot: str) -> None:
        lease, marker = self.handling.pop(slot)
        delivery = self.oracle.holder(lease.fence)
        self.say(f"the completion of {named(lease)} and COMMIT")
        sql = self.database.handlers[slot]
        try:
            tag = self.run(self._ended(slot, lease, marker))
        except asyncpg.PostgresError as error:
            if delivery is not None or error.sqlstate != "PGB01":
                raise
            self.run(sql.execute("ROLLBACK"))
            self.did("a completion came too late")
            return
        assert delivery is not None, f"I6 fence: {named(lease)} was completed, and was somebody else's"
        assert tag == "COMMIT"
        self.oracle.complete(delivery)
        self.oracle.effects[lease.fence[:3]] += 1
        self.did("completed in a transaction")

    async def _ended(self, slot: str, lease: Lease, marker: str) -> str:
        return str(await self.database.handlers[slot].execute(self.database.statements.end(*lease.fence, marker)))

    @step(when=lambda self: self.handling, index=nth)
    def lose_a_transaction(self, index: int) -> None:
        """The handlers' process died, or its connection was lost: rolled back, and nobody says so."""
        slot = self.pick(sorted(self.handling), index)
        self.run(self.database.handlers[slot].execute("ROLLBACK"))
        lease, _ = self.handling.pop(slot)
        self.say(f"the transaction of {named(lease)} is lost")
        self.did("effects were rolled back")

    # -- all other outcomes

    @step(3, when=lambda self: self.free_leases(), how_many=st.sampled_from((1, 2, 10)), index=nth)
    def complete_a_batch(self, how_many: int, index: int) -> None:
        """Complete without a transaction: the leases of one worker, together with some that it has lost."""
        worker_id = self.pick(self.free_leases(), index).fence.worker_id
        mine = [lease for lease in self.free_leases() if lease.fence.worker_id == worker_id][:how_many]
        lost = [lease for lease in self.stale if lease.fence.worker_id == worker_id][:1]
        kept = self.run(self.database.store.complete([*mine, *lost]))
        assert kept == {lease.fence[:2] for lease in mine}, f"I6 fence: of {[named(x) for x in mine]}, {kept} was kept"
        for lease in mine:
            self.say(f"{named(lease)} is completed")
            self.oracle.complete(self.held(lease))
        self.did("completed in a batch", times=len(mine))

    @step(5, when=lambda self: self.free_leases(), index=nth, raised=st.sampled_from(sorted(RAISED)))
    def fail(self, index: int, raised: str) -> None:
        """A handler raises; what follows from it is decided as in a worker."""
        lease = self.pick(self.free_leases(), index)
        if lease.lost and lease.attempt > MAX_ATTEMPTS:
            self._bury_for_its_losses(lease)
        else:
            self._fail(lease, raised)

    def _fail(self, lease: Lease, raised: str) -> None:
        handled = (*lease.handled, "first")[:1]
        error = RAISED[raised]
        outcome = decide(error, handler="h", attempt=lease.attempt, policy=POLICY, handled=handled, rng=_Longest())
        self.say(f"{named(lease)}: {type(outcome).__name__}")
        delivery = self.held(lease)
        entry = entry_of(outcome.failure, attempt=lease.attempt, worker_id=lease.fence.worker_id)
        if isinstance(outcome, Reschedule):
            seconds, counted = outcome.delay.total_seconds(), outcome.counted
            written = self.database.store.reschedule(
                lease.fence, delay=seconds, give_back=0 if counted else 1, handled=handled, entry=entry
            )
            self.oracle.retry(delivery, int(seconds), counted=counted)
        else:
            written = self.database.store.bury(lease.fence, handled=handled, entry=entry)
            self.oracle.bury(delivery)
        assert lease.attempt <= MAX_ATTEMPTS, f"I8 bounded: {named(lease)} is attempt {lease.attempt}"
        delivery.handled = handled
        assert self.run(written), f"I6 fence: {named(lease)} was current, and could not fail"
        self.did(type(outcome).__name__)

    def _bury_for_its_losses(self, lease: Lease) -> None:
        """Make a delivery dead with whose attempts its workers died: nobody could do it before this claim."""
        delivery = self.held(lease)
        self.oracle.bury(delivery)
        delivery.handled = lease.handled or None
        assert self.run(self.database.store.bury(lease.fence, handled=lease.handled, entry={"type": "WorkerLost"}))
        self.did("dead of its losses")

    @step(2, when=lambda self: self.free_leases(), index=nth, how_many=st.sampled_from((1, 10)))
    def release(self, index: int, how_many: int) -> None:
        worker_id = self.pick(self.free_leases(), index).fence.worker_id
        mine = [lease for lease in self.free_leases() if lease.fence.worker_id == worker_id][:how_many]
        kept = self.run(self.database.store.release(lease.fence for lease in mine))
        assert kept == {lease.fence[:2] for lease in mine}
        for lease in mine:
            self.oracle.release(self.held(lease))

    @step(2, when=lambda self: self.free_leases(), index=nth)
    def put_aside_as_unhandled(self, index: int) -> None:
        lease = self.pick(self.free_leases(), index)
        self.say(f"nobody here knows the type of {named(lease)}")
        self.oracle.unhandle(self.held(lease))
        assert self.run(self.database.store.unhandle(lease.fence))

    @step(when=lambda self: self.workers, index=nth)
    def look_for_strays(self, index: int) -> None:
        worker = self.pick(list(self.workers.values()), index)
        strays = self.run(self.database.store.strays(worker.id))
        running = [d for d in self.in_state("running") if d.worker == worker.id]
        assert sorted(strays) == sorted(Fence(*d.place, d.claim_seq, worker.id) for d in running)
