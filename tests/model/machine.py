"""All rules together, and the end of every example: heal, drain, and count."""

from __future__ import annotations

from typing import Final

from tests.model.database import SLOTS
from tests.model.operating import Operating
from tests.model.publishing import Publishing
from tests.model.stage import GROUPS
from tests.model.things import UNFINISHED, Worker
from tests.model.verbs import Verbs
from tests.model.working import Working
from tests.model.zombies import Zombies

# Each round finishes at least one delivery of each key that moves; more than that is no progress.
MOST_ROUNDS: Final = 60


class Deliveries(Publishing, Working, Zombies, Operating, Verbs):
    """The machine."""

    def teardown(self) -> None:
        """Heal everything, let everybody do their work, and see that nothing is left and everything was done once."""
        if not self.failed:
            with self.watched():
                self._finish()

    def _finish(self) -> None:
        self._heal()
        for _ in range(MOST_ROUNDS):
            if not self._drain_a_round():
                break
        left = [d for d in self.oracle.deliveries.values() if d.status in UNFINISHED]
        assert not left, f"I1 no loss: {[(d.name, d.status) for d in left]} did not come to an end"
        for event in self.oracle.events:
            assert any(place[0] == event for place in self.oracle.deliveries), f"I1 no loss: nobody got #{event}"

    def _heal(self) -> None:
        for who in sorted(self.oracle.units):
            self.run(self.database.publishers[who].execute("COMMIT"))
            self.oracle.commit(self.oracle.units.pop(who))
        for slot in sorted(self.handling):
            self._complete(slot)
        self.look()
        for worker in self.oracle.workers.values():
            if worker.alive:
                self.run(self.database.locks.fetchval(self.database.statements.unlock, worker.id))
                worker.alive = False
        self._recover()
        self.look()
        for group in GROUPS:
            # A group that was removed may have deliveries of publishers that were under way.
            self._declare(group, "never.published", "now", None, False, configure=True)
        self.run(self.database.hands.execute("UPDATE pgebus.consumer_groups SET paused_at = NULL, max_running = NULL"))
        for options in self.oracle.groups.values():
            options.paused, options.max_running = False, None
        for _ in range(2):
            self._backfill()
            self.look()
        self.workers.clear()
        self.start_worker(set(GROUPS))
        self.let_time_pass(100_000)
        self.look()

    def _drain_a_round(self) -> bool:
        """Do what a worker and its maintenance do in a round; return whether there was anything."""
        worker: Worker = next(iter(self.workers.values()))
        done = self._sweep()
        self.look()
        for group, event_type in sorted(self.run(self.database.store.unhandled_types(worker.groups))):
            done += self._adopt(worker, group, event_type, 100)
            self.look()
        done += self._claim(worker, 100)
        self.look()
        done += self._claim(worker, 1, suspect=True)
        self.look()
        if self.leases:
            self._begin(SLOTS[0], self.leases[0])
            self._complete(SLOTS[0])
            self.look()
        if rest := list(self.leases):
            kept = self.run(self.database.store.complete(rest))
            assert len(kept) == len(rest), f"I6 fence: of {len(rest)}, {len(kept)} were completed"
            for lease in rest:
                self.oracle.complete(self.held(lease))
            self.look()
        return done > 0
