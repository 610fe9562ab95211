"""Time, maintenance, and what operators do to groups."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize

from pgebus import Group as GroupDeclaration
from pgebus import operations
from pgebus.errors import StateError
from tests.model.stage import GROUPS, Stage, nth
from tests.model.steps import step
from tests.model.things import LATELY_SECONDS, SECOND, Group, Pattern

# What an example can do without, and still have its events handled.
OPTIONAL = (
    *("adopt", "cancel", "complete_a_batch", "declare", "fail", "let_time_pass", "limit", "lose_a_lock", "pause"),
    *("prune", "publish_in_a_transaction", "purge_payload", "put_aside_as_unhandled", "release", "release_key"),
    *("remove_group", "replay", "roll_a_publisher_back"),
)
groups = st.sampled_from(GROUPS)
patterns = st.sampled_from(("order.placed", "order.paid", "order.placed", "order.*", "#", "mail.#"))
options: dict[str, Any] = {
    "start": st.sampled_from(("beginning", "now")),
    "max_running": st.sampled_from((None, None, 1, 2)),
    "dead_holds_key": st.sampled_from((None, False, True)),
}


class Operating(Stage):
    """Rules: everything that is neither a publisher nor a worker."""

    @step(4, seconds=st.sampled_from((100, 1000)))
    def let_time_pass(self, seconds: int) -> None:
        inserted = {who: [e.id for e in unit.events] for who, unit in self.oracle.units.items()}
        self.run(self.database.let_pass(seconds, inserted))
        for unit in self.oracle.units.values():
            unit.passed += seconds * SECOND

    # -- maintenance

    @step(3)
    def sweep(self) -> None:
        self._sweep()

    def _sweep(self) -> int:
        self.run(self.database.store.let_go())
        self.oracle.let_go()
        promoted, _ = self.run(self.database.store.sweep(("", "", ""), 100))
        due = self.oracle.sweep()
        assert promoted == due, f"keys: the sweep let {promoted} in, not {due}"
        self.did("let in by the sweep", times=promoted)
        return promoted

    @step(4, when=lambda self: any(not p.backfilled for p in self.oracle.patterns.values()))
    def go_on_backfilling(self) -> None:
        self._backfill()

    def _backfill(self) -> None:
        open_now: set[object] = {*self.oracle.units.values(), *(marker for _, marker in self.handling.values())}
        self.run(self.backfiller.round())
        for (group, pattern), what in sorted(self.oracle.patterns.items()):
            if what.backfilled:
                continue
            what.waits_for = open_now if what.waits_for is None else what.waits_for & open_now
            if not what.waits_for:
                before = len(self.oracle.deliveries)
                self.oracle.backfill(group, pattern)
                self.did("made by a backfill", times=len(self.oracle.deliveries) - before)
            else:
                self.did("a backfill waits for a publisher")

    # -- groups

    @initialize(without=st.sets(st.sampled_from(OPTIONAL), max_size=6), dead_holds_key=st.booleans())
    def begin_with_two_groups(self, without: set[str], dead_holds_key: bool) -> None:
        self.left_out = frozenset(without)
        with self.watched():
            self._declare("billing", "order.*", "now", None, dead_holds_key, configure=False)
            self._declare("default", "#", "now", None, None, configure=False)
            self.look()

    @step(2, group=groups, pattern=patterns, configure=st.booleans(), **options)
    def declare(
        self,
        group: str,
        pattern: str,
        start: Any,
        max_running: int | None,
        dead_holds_key: bool | None,
        configure: bool,
    ) -> None:
        self._declare(group, pattern, start, max_running, dead_holds_key, configure=configure)

    def _declare(
        self, group: str, pattern: str, start: Any, most: int | None, holds: bool | None, *, configure: bool
    ) -> None:
        declared = GroupDeclaration(group, start=start, max_running=most, dead_holds_key=holds)
        store, oracle = self.database.store, self.oracle
        assert self.run(store.declare_groups([declared], configure=configure))
        self.run(store.subscribe([(group, pattern, start)]))
        there = oracle.groups.get(group)
        if there is None:
            there = oracle.groups[group] = Group(oracle.steps, most, bool(holds))
        if configure:
            there.max_running = there.max_running if most is None else most
            there.dead_holds_key = there.dead_holds_key if holds is None else holds
            if holds is False:
                for d in oracle.deliveries.values():
                    d.holds_key = d.holds_key and not (d.group == group and d.status == "dead")
        known = oracle.patterns.get((group, pattern))
        if known is None:
            since = 0 if start == "beginning" else oracle.last_id
            oracle.patterns[group, pattern] = Pattern(since, start == "beginning", oracle.now.lo)
        elif known.declared < oracle.now.lo - 60 * SECOND:
            known.declared = oracle.now.lo

    @step(when=lambda self: self._groups(paused=False), index=nth)
    def pause(self, index: int) -> None:
        self._pause(self.pick(self._groups(paused=False), index), operations.pause_group)

    @step(3, when=lambda self: self._groups(paused=True), index=nth)
    def resume(self, index: int) -> None:
        self._pause(self.pick(self._groups(paused=True), index), operations.resume_group)

    def _groups(self, *, paused: bool) -> list[str]:
        return sorted(name for name, group in self.oracle.groups.items() if group.paused == paused)

    def _pause(self, name: str, verb: Any) -> None:
        self.say(f"{verb.__name__} {name}")
        assert self.run(self.in_a_session(verb, name))
        self.oracle.groups[name].paused = verb is operations.pause_group

    @step(when=lambda self: self.oracle.groups, index=nth, most=st.sampled_from((None, 1, 2)))
    def limit(self, index: int, most: int | None) -> None:
        name = self.pick(sorted(self.oracle.groups), index)
        group = self.oracle.groups[name]
        changed = self.run(self.in_a_session(operations.limit_group, name, most))
        assert changed == (group.max_running != most)
        group.max_running = most

    @step(when=lambda self: self.oracle.groups, index=nth)
    def remove_group(self, index: int) -> None:
        name = self.pick(sorted(self.oracle.groups), index)
        oracle = self.oracle
        alive = [w for w in oracle.workers.values() if w.alive]
        since = oracle.now.lo - LATELY_SECONDS * SECOND
        lately = any(g == name and p.declared > since for (g, _), p in oracle.patterns.items())
        refused = any(name in w.groups for w in alive) or (lately and bool(alive))
        self.say(f"remove {name}{', which is refused' if refused else ''}")
        try:
            count = self.run(self.in_a_session(operations.remove_group, name))
        except StateError:
            assert refused, f"{name} could not be removed"
            return
        assert not refused, f"{name} was removed, and is served"
        cancelled = [
            d for d in oracle.deliveries.values() if d.group == name and d.status not in ("completed", "cancelled")
        ]
        assert count == len(cancelled)
        for d in cancelled:
            oracle.cancel_with_its_group(d)
        del oracle.groups[name]
        oracle.patterns = {key: p for key, p in oracle.patterns.items() if key[0] != name}
        self.did("cancelled with its group", times=count)
