"""Publishers: transactions that stay open over other steps, and end well or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hypothesis import strategies as st

from tests.model.database import INSERT, PUBLISHERS
from tests.model.stage import ENOUGH, TYPES, Stage
from tests.model.steps import step
from tests.model.things import Draft, Unit
from tests.system.bus import Sql

drafts: Final = st.lists(
    st.builds(
        Draft,
        type=st.sampled_from(TYPES),
        key=st.sampled_from((None, "k", "k", "l")),
        delay=st.sampled_from((0, 0, 0, 100, 1000)),
        priority=st.sampled_from((0, 0, 5, 9)),
        dedup_key=st.sampled_from((None, None, None, "x", "y")),
    ),
    min_size=1,
    max_size=3,
)


class Publishing(Stage):
    """Rules: publish, commit, roll back."""

    def _room(self) -> bool:
        return len(self.oracle.deliveries) + sum(len(u.deliveries) for u in self.oracle.units.values()) < ENOUGH

    @step(4, when=_room, events=drafts)
    def publish_and_commit(self, events: list[Draft]) -> None:
        unit = Unit(self.oracle.now, None)
        self._insert(self.database.hands, unit, self._without_waiting(None, events))
        self.oracle.commit(unit)

    @step(5, when=_room, who=st.sampled_from(PUBLISHERS), repeatable_read=st.booleans(), events=drafts)
    def publish_in_a_transaction(self, who: str, repeatable_read: bool, events: list[Draft]) -> None:
        sql = self.database.publishers[who]
        unit = self.oracle.units.get(who)
        if unit is None:
            level = "REPEATABLE READ" if repeatable_read else "READ COMMITTED"
            self.run(sql.execute(f"BEGIN ISOLATION LEVEL {level}"))
            unit = Unit(self.oracle.now, self.oracle.view() if repeatable_read else None)
            self.oracle.units[who] = unit
        self._insert(sql, unit, self._without_waiting(unit, events))

    @step(4, when=lambda self: self.oracle.units, which=st.integers(0, 2))
    def commit_a_publisher(self, which: int) -> None:
        who = self.pick(sorted(self.oracle.units), which)
        self.say(f"{who} commits")
        self.run(self.database.publishers[who].execute("COMMIT"))
        unit = self.oracle.units.pop(who)
        self.oracle.commit(unit)
        self.did("a transaction was open over other steps", times=unit.began is not self.oracle.now)

    @step(when=lambda self: self.oracle.units, which=st.integers(0, 2))
    def roll_a_publisher_back(self, which: int) -> None:
        who = self.pick(sorted(self.oracle.units), which)
        self.say(f"{who} rolls back")
        self.run(self.database.publishers[who].execute("ROLLBACK"))
        self.did("events were rolled back", times=len(self.oracle.units.pop(who).events))

    def _without_waiting(self, unit: Unit | None, events: Sequence[Draft]) -> list[Draft]:
        """Take away dedup keys for which the publisher would have to wait, or that its snapshot may not see."""
        busy = {e.draft.dedup_key for u in self.oracle.units.values() if u is not unit for e in u.events}
        careful = unit is not None and unit.snapshot is not None
        return [e._replace(dedup_key=None) if careful or e.dedup_key in busy else e for e in events]

    def _insert(self, sql: Sql, unit: Unit, events: Sequence[Draft]) -> None:
        columns = [list(column) for column in zip(*events, strict=True)]
        rows = self.run(sql.fetch(INSERT, *columns))
        used = {e.draft.dedup_key for e in (*self.oracle.events.values(), *unit.events)} - {None}
        new = []
        for n, draft in enumerate(events):
            if draft.dedup_key is None or draft.dedup_key not in used:
                used.add(draft.dedup_key)
                new.append(n)
        used.discard(None)
        assert sorted(row["n"] for row in rows) == new, f"dedup: of {events}, {rows} were inserted"
        self.did("a dedup_key was used again", times=len(events) - len(new))
        self.oracle.insert(unit, [(row["id"], events[row["n"]]) for row in rows])
        self.say(", ".join(f"#{e.id} {e.type}" for e in unit.events[len(unit.events) - len(rows) :]) or "nothing new")
