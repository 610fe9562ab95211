"""What a person does to single deliveries and events, by the functions of `pgebus.operations`."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import strategies as st

from pgebus import operations
from pgebus._runtime.pruning import BEGINNING
from tests.model.stage import Stage, nth
from tests.model.steps import step
from tests.model.things import Delivery, Event, matches

_CANCELLABLE = ("pending", "blocked", "running", "unhandled", "dead")
_FINISHED = ("completed", "dead", "cancelled")


class Verbs(Stage):
    """Rules: verbs."""

    @step(when=lambda self: self.in_state(*_CANCELLABLE), index=nth)
    def cancel(self, index: int) -> None:
        d = self.pick(self.in_state(*_CANCELLABLE), index)
        self.say(f"cancel {d.name}, which is {d.status}")
        done = self.run(self.in_a_session(operations.cancel, event_ids=[d.event_id], group=d.group))
        assert done == [(*d.place, d.status)]
        self.did("a running delivery was cancelled", times=d.status == "running")
        self.oracle.cancel(d)
        self._let_in([d])

    @step(when=lambda self: self.in_state("dead"), how_many=st.sampled_from((1, 10)))
    def redrive(self, how_many: int) -> None:
        """By the group of the first one, in batches as a person does it."""
        group = self.in_state("dead")[0].group
        dead = sorted((d for d in self.in_state("dead") if d.group == group), key=lambda d: d.event_id)[:how_many]
        self.say(f"redrive {', '.join(d.name for d in dead)}")
        done = self.run(self.in_a_session(operations.redrive, group=group, limit=how_many))
        assert done == [(*d.place, "dead") for d in dead]
        for d in dead:
            self.oracle.redrive(d)
        self._let_in(dead)
        self.did("redriven", times=len(dead))

    def _replayable(self) -> list[tuple[Event, str]]:
        """Return what groups that there are have finished, or have never got."""
        oracle = self.oracle
        found: list[tuple[Event, str]] = []
        for event in oracle.events.values():
            for group in sorted(oracle.groups):
                there = oracle.deliveries.get((event.id, group))
                wanted = any(g == group and matches(p, event.type) for g, p in oracle.patterns)
                if not event.purged and (wanted if there is None else there.status in _FINISHED):
                    found.append((event, group))
        return found

    @step(when=lambda self: self._replayable(), index=nth)
    def replay(self, index: int) -> None:
        event, group = self.pick(self._replayable(), index)
        there = self.oracle.deliveries.get((event.id, group))
        self.say(f"replay #{event.id}/{group}, which {'was not there' if there is None else f'is {there.status}'}")
        done = self.run(self.in_a_session(operations.replay, group, event_ids=[event.id]))
        assert done == [(event.id, group, there and there.status)]
        self.oracle.replay(event, group)
        self._let_in([self.oracle.deliveries[event.id, group]])
        self.did("replayed" if there else "replayed for the first time")

    @step(when=lambda self: any(d.holds_key for d in self.oracle.deliveries.values()), index=nth)
    def release_key(self, index: int) -> None:
        holder = self.pick([d for d in self.oracle.deliveries.values() if d.holds_key], index)
        self.say(f"release the key {holder.key!r} of {holder.group}")
        assert holder.key is not None
        done = self.run(self.in_a_session(operations.release_key, holder.group, holder.key))
        freed = self.oracle.release_key(holder.group, holder.key)
        assert done == sorted((*d.place, d.status) for d in freed)
        self._let_in([holder])
        self.did("a key was released")

    @step(when=lambda self: self.oracle.events, index=nth)
    def purge_payload(self, index: int) -> None:
        event = self.pick([each for each in self.oracle.events.values() if not each.purged] or [None], index)
        if event is None:
            return
        done = self.run(self.in_a_session(operations.purge_payload, event_ids=[event.id]))
        purged = self.oracle.purge(event)
        self.say(f"purge #{event.id}{'' if purged else ', which is not finished'}")
        assert (done.event_ids, done.unfinished) == (((event.id,), ()) if purged else ((), (event.id,)))
        self.did("events were emptied", times=purged)

    @step(older_than=st.sampled_from((50, 150, 950)), by_a_worker=st.booleans())
    def prune(self, older_than: int, by_a_worker: bool) -> None:
        if by_a_worker:
            store = self.database.store
            rows = self.run(store.finished(older_than, BEGINNING, 1000))
            kept = {row["event_id"]: float(older_than) for row in rows}
            pruned = self.run(store.remove(kept, dead=None, unhandled=None))
        else:
            pruned = self.run(self.in_a_session(operations.prune, timedelta(seconds=older_than), limit=1000))
        gone = self.oracle.prune(older_than)
        assert pruned == len(gone), f"I1 no loss: {pruned} events were pruned, not {gone}"
        self.did("events were pruned", times=pruned)

    def _let_in(self, changed: list[Delivery]) -> None:
        self.oracle.let_in(sorted({(d.group, d.key) for d in changed if d.key is not None}))
