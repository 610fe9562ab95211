"""What should be in the tables: a dict of deliveries, and the few rules that say how one of them changes.

It knows no SQL and asks no database. It says what becomes of a delivery, seldom how: which deliveries a claim may
take, not how it finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pgebus._runtime.leases import Fence
from tests.model.things import (
    HANDLED_SECONDS,
    KEPT_ERRORS,
    SECOND,
    UNFINISHED,
    UNSEEN,
    Delivery,
    Draft,
    Event,
    Group,
    Moment,
    Pattern,
    Unit,
    View,
    Worker,
    matches,
)


class Oracle:
    """The dict, and what the steps do to it."""

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self.deliveries: dict[tuple[int, str], Delivery] = {}
        self.groups: dict[str, Group] = {}
        self.patterns: dict[tuple[str, str], Pattern] = {}
        self.workers: dict[int, Worker] = {}
        self.units: dict[str, Unit] = {}
        # How often something was completed in the transaction of its handlers, for each claim.
        self.effects: Counter[tuple[int, str, int]] = Counter()
        self.last_id = 0
        self.steps = 0
        self.now = Moment(0)
        # What has left `running` in this step with a right to; keys that may, but need not, have been let in.
        self.departed: set[tuple[int, str]] = set()
        self.may_promote: set[tuple[str, str]] = set()

    # -- questions

    def of_key(self, group: str, key: str | None) -> list[Delivery]:
        """Return the deliveries of a key that are not over, or hold it, in their order."""
        return sorted(
            (
                d
                for d in self.deliveries.values()
                if d.group == group and d.key == key and (d.leads or d.status == "blocked")
            ),
            key=lambda d: d.event_id,
        )

    def first(self, delivery: Delivery) -> bool:
        """Tell whether nothing of its key is before it, and none runs."""
        return not any(
            d is not delivery and (d.event_id < delivery.event_id or d.status == "running")
            for d in self.of_key(delivery.group, delivery.key)
        )

    def is_due(self, delivery: Delivery) -> bool:
        assert delivery.due is not None
        return delivery.due <= self.now.lo

    def catching_up(self, group: str) -> bool:
        return any(g == group and p.reaches_back and not p.backfilled for (g, _), p in self.patterns.items())

    def claimable(self, groups: Iterable[str], *, limited: bool, suspect: bool) -> list[Delivery]:
        """Return what a claim for *groups* could take."""
        open_groups = {
            g
            for g in groups
            if g in self.groups and not self.groups[g].paused and (self.groups[g].max_running is not None) == limited
        }
        return [
            d
            for d in self.deliveries.values()
            if d.status == "pending"
            and d.group in open_groups
            and (d.lost > 0) == suspect
            and self.is_due(d)
            and (d.key is None or (not self.catching_up(d.group) and self.first(d)))
        ]

    def running(self, group: str) -> int:
        return sum(d.group == group and d.status == "running" for d in self.deliveries.values())

    def holder(self, fence: Fence) -> Delivery | None:
        """Return the delivery that *fence* still gives a right to."""
        d = self.deliveries.get((fence.event_id, fence.group))
        held = d is not None and (d.status, d.claim_seq, d.worker) == ("running", fence.claim_seq, fence.worker_id)
        return d if held else None

    def handled_by_somebody(self, group: str, event_type: str, within: int = HANDLED_SECONDS) -> bool:
        return any(
            g == group and matches(pattern, event_type) and p.declared > self.now.lo - within * SECOND
            for (g, pattern), p in self.patterns.items()
        )

    def view(self) -> View:
        """Return what a transaction sees that begins now."""
        patterns: dict[str, set[str]] = {}
        for group, pattern in self.patterns:
            patterns.setdefault(group, set()).add(pattern)
        taken = {
            (d.group, d.key)
            for d in self.deliveries.values()
            if d.key is not None and (d.leads or d.status == "blocked")
        }
        return View(patterns, frozenset(taken))

    # -- publishing

    def insert(self, unit: Unit, drafts: Sequence[tuple[int, Draft]]) -> None:
        """Note the events that a transaction has inserted in one statement, and who gets them."""
        view = unit.snapshot or self.view()
        taken = set(view.taken)
        taken |= {(d.group, d.key) for d in unit.deliveries if d.key is not None and d.status != "unhandled"}
        for event_id, draft in sorted(drafts):
            self.last_id = max(self.last_id, event_id)
            unit.events.append(Event(event_id, draft, unit.began.later(unit.passed)))
            wanting = [g for g, patterns in view.patterns.items() if any(matches(p, draft.type) for p in patterns)]
            for group in wanting or ["default"]:
                status = "pending" if wanting else "unhandled"
                if draft.key is not None:
                    if wanting and (group, draft.key) in taken:
                        status = "blocked"
                    # Within one statement an unhandled event counts as well; the sweep lets the next one in.
                    taken.add((group, draft.key))
                unit.deliveries.append(self._made(unit.events[-1], group, status))

    def commit(self, unit: Unit) -> None:
        self.events |= {e.id: e for e in unit.events}
        self.deliveries |= {d.place: d for d in unit.deliveries}

    @staticmethod
    def _made(event: Event, group: str, status: str, claim_seq: int = 0) -> Delivery:
        draft = event.draft
        made = Delivery(
            event.id, group, draft.type, draft.key, draft.priority, status, event.began, draft.delay * SECOND
        )
        made.claim_seq = claim_seq
        return made

    # -- what a worker does

    def claim(self, delivery: Delivery, worker: int) -> None:
        delivery.status, delivery.worker = "running", worker
        delivery.attempt += 1
        delivery.claim_seq += 1

    def leave(self, delivery: Delivery, status: str) -> None:
        """Take a delivery out of `running`, for whoever has a right to."""
        if delivery.status == "running":
            self.departed.add(delivery.place)
        delivery.status, delivery.worker = status, None

    def complete(self, delivery: Delivery) -> None:
        self.leave(delivery, "completed")
        self.promote(delivery)

    def retry(self, delivery: Delivery, delay: int, *, counted: bool) -> None:
        self.leave(delivery, "pending")
        delivery.due_again(self.now, delay)
        if counted:
            self.complain(delivery)
        else:
            delivery.attempt = max(0, delivery.attempt - 1)

    def bury(self, delivery: Delivery) -> None:
        self.leave(delivery, "dead")
        self.complain(delivery)
        group = self.groups.get(delivery.group)
        delivery.holds_key = delivery.key is not None and group is not None and group.dead_holds_key
        if not delivery.holds_key:
            self.promote(delivery)

    def unhandle(self, delivery: Delivery) -> None:
        self.leave(delivery, "unhandled")
        delivery.attempt = max(0, delivery.attempt - 1)
        delivery.holds_key = delivery.key is not None and self.handled_by_somebody(delivery.group, delivery.type)
        if not delivery.holds_key:
            self.promote(delivery)

    def release(self, delivery: Delivery) -> None:
        self.leave(delivery, "pending")
        delivery.attempt = max(0, delivery.attempt - 1)

    def recover(self, worker: Worker) -> int:
        worker.ended = True
        taken = [d for d in self.deliveries.values() if d.worker == worker.id]
        for d in taken:
            self.leave(d, "pending")
            d.lost += 1
        return len(taken)

    @staticmethod
    def complain(delivery: Delivery) -> None:
        delivery.errors = min(KEPT_ERRORS, delivery.errors + 1)

    # -- keys

    def promote(self, delivery: Delivery) -> None:
        """Let the next of its key in."""
        if delivery.key is not None:
            waiting = [d for d in self.of_key(delivery.group, delivery.key) if d.status == "blocked"]
            for heir in waiting[:1]:
                heir.status = "pending"

    def sweep(self) -> int:
        """Let in whatever waits for nothing."""
        return self.let_in(self._waiting_keys())

    def let_in(self, keys: Iterable[tuple[str, str]]) -> int:
        """Let in the first of each of these keys, where it waits for nothing."""
        heirs = []
        for group, key in keys:
            of_key = self.of_key(group, key)
            heir = next((d for d in of_key if d.status == "blocked"), None)
            if heir and not any(d.leads and (d.event_id < heir.event_id or d.status == "running") for d in of_key):
                heirs.append(heir)
        for heir in heirs:
            heir.status = "pending"
        return len(heirs)

    def let_go(self) -> None:
        for d in self.deliveries.values():
            if d.status == "unhandled" and d.holds_key and not self.handled_by_somebody(d.group, d.type):
                d.holds_key = False

    def _waiting_keys(self) -> Iterator[tuple[str, str]]:
        yield from sorted({(d.group, d.key) for d in self.deliveries.values() if d.status == "blocked" and d.key})

    # -- a new group

    def backfill(self, group: str, pattern: str) -> None:
        """Give a pattern the events that came before it; where they wait is the database's choice, until the sweep."""
        what = self.patterns[group, pattern]
        what.backfilled = True
        for event in self.events.values():
            if event.id <= what.since or event.purged or not matches(pattern, event.type):
                continue
            status = "pending" if event.draft.key is None else "pending or blocked"
            there = self.deliveries.get((event.id, group))
            if there is None:
                self.deliveries[event.id, group] = self._made(event, group, status, UNSEEN)
                self._no_longer_unwanted(event, group)
            elif there.cancelled_in is not None and there.cancelled_in < self.groups[group].created_in:
                there.status, there.cancelled_in, there.finished = status, None, None
                there.attempt = there.lost = 0
                there.round += 1
                there.due_from, there.delay, there.due = event.began, event.draft.delay * SECOND, None

    def _no_longer_unwanted(self, event: Event, group: str) -> None:
        aside = self.deliveries.get((event.id, "default"))
        wanted = any(g == "default" and matches(p, event.type) for g, p in self.patterns)
        if group != "default" and aside is not None and aside.status == "unhandled" and not wanted:
            del self.deliveries[event.id, "default"]

    # -- what an operator does

    def cancel_with_its_group(self, delivery: Delivery) -> None:
        self.leave(delivery, "cancelled")
        delivery.holds_key, delivery.finished, delivery.cancelled_in = False, None, self.steps
        if delivery.key is not None:
            self.may_promote.add((delivery.group, delivery.key))

    def cancel(self, delivery: Delivery) -> None:
        self.leave(delivery, "cancelled")
        delivery.holds_key, delivery.finished, delivery.cancelled_in = False, None, self.steps
        self.complain(delivery)

    def redrive(self, delivery: Delivery) -> None:
        """Begin a new round; what has a key is let in later, with the others."""
        delivery.status = "pending" if delivery.key is None else "blocked"
        delivery.attempt = 0
        delivery.round += 1
        delivery.holds_key, delivery.finished, delivery.cancelled_in = False, None, None
        delivery.due_again(self.now, 0)
        self.complain(delivery)

    def replay(self, event: Event, group: str) -> None:
        """Have a group handle an event again, or for the first time."""
        there = self.deliveries.get((event.id, group))
        if there is None:
            status = "pending" if event.draft.key is None else "blocked"
            self.deliveries[event.id, group] = self._made(event, group, status, UNSEEN)
            self._no_longer_unwanted(event, group)
            return
        self.redrive(there)
        there.handled = None
        if event.began.lo + event.draft.delay * SECOND > self.now.lo:
            there.due_from, there.delay = event.began, event.draft.delay * SECOND

    def release_key(self, group: str, key: str) -> list[Delivery]:
        """Let dead and unhandled deliveries let go of a key; return them."""
        holders = [d for d in self.deliveries.values() if (d.group, d.key) == (group, key) and d.holds_key]
        for d in holders:
            d.holds_key = False
            self.complain(d)
        return holders

    def purge(self, event: Event) -> bool:
        """Empty an event, unless it is still to be handled; return whether it was."""
        of_it = [d for d in self.deliveries.values() if d.event_id == event.id]
        if any(d.status in UNFINISHED for d in of_it):
            return False
        event.purged = True
        for d in of_it:
            d.holds_key = False
            d.status = "cancelled" if d.status == "dead" else d.status
        self.let_in((d.group, d.key) for d in of_it if d.key is not None)
        return True

    def prune(self, older_than: int) -> list[int]:
        """Forget the events whose deliveries were all over for so many seconds, none of them dead."""
        cut = self.now.lo - older_than * SECOND
        of: dict[int, list[Delivery]] = {}
        for d in self.deliveries.values():
            of.setdefault(d.event_id, []).append(d)
        gone = [
            event_id
            for event_id, all_of_it in of.items()
            if all(d.status in ("completed", "cancelled") and (d.finished or 0) < cut for d in all_of_it)
        ]
        for event_id in gone:
            del self.events[event_id]
            for d in of[event_id]:
                del self.deliveries[d.place]
        return gone
