"""Who acts with a fence that is not, or no longer, right: nothing may come of it."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Final

import asyncpg
from hypothesis import strategies as st

from pgebus._runtime.leases import Lease
from tests.model.stage import Stage, named, nth
from tests.model.steps import step
from tests.model.working import EFFECT

VERBS: Final = ("complete", "release", "reschedule", "bury", "unhandle", "complete in a transaction")


class Zombies(Stage):
    """Rules: old fences, and forged ones."""

    @step(3, when=lambda self: self.stale, index=nth, verb=st.sampled_from(VERBS))
    def act_with_an_old_fence(self, index: int, verb: str) -> None:
        self._refused(self.pick(self.stale, index), verb)

    @step(
        when=lambda self: self.leases,
        index=nth,
        verb=st.sampled_from(VERBS),
        forged=st.sampled_from(("older claim", "another worker")),
    )
    def act_with_a_forged_fence(self, index: int, verb: str, forged: str) -> None:
        lease = self.pick(self.leases, index)
        fence = lease.fence
        fence = (
            fence._replace(claim_seq=fence.claim_seq - 1)
            if forged == "older claim"
            else fence._replace(worker_id=fence.worker_id + 1)
        )
        self._refused(replace(lease, fence=fence), verb)

    def _refused(self, lease: Lease, verb: str) -> None:
        self.say(f"{verb} with the wrong fence: {named(lease)}")
        if verb == "complete in a transaction":
            self._refused_in_a_transaction(lease)
        else:
            assert not self.run(self._written(lease, verb)), f"I6 fence: {verb} with {named(lease)} was accepted"
        self.did("a wrong fence was refused")

    def _written(self, lease: Lease, verb: str) -> Coroutine[Any, Any, object]:
        store, fence = self.database.store, lease.fence
        match verb:
            case "complete":
                return store.complete([lease])
            case "release":
                return store.release([fence])
            case "reschedule":
                return store.reschedule(fence, delay=0, give_back=0, handled=(), entry=None)
            case "bury":
                return store.bury(fence, handled=(), entry={"type": "Zombie"})
            case _:
                return store.unhandle(fence)

    def _refused_in_a_transaction(self, lease: Lease) -> None:
        sql, statements = self.database.hands, self.database.statements

        async def all_of_it() -> str:
            await sql.execute(statements.begin("READ COMMITTED", "zombie"))
            await sql.execute(EFFECT, *lease.fence[:3])
            try:
                return await sql.execute(statements.end(*lease.fence, "zombie"))
            except asyncpg.PostgresError as error:
                await sql.execute("ROLLBACK")
                return str(error.sqlstate)

        answer = self.run(all_of_it())
        assert answer == "PGB01", f"I6 fence: the completion of {named(lease)} was answered {answer}"
