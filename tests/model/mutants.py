"""Defects that the machine has to find: each breaks one statement, or one function of the database, as a slip would.

A mutant names text of the code and what stands there instead; text that is not there any more is an error, so that no
mutant silently becomes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pgebus._runtime.statements import Statements
from tests.model.database import Database


@dataclass(frozen=True)
class Mutant:
    """A defect.

    Attributes:
        name: What is wrong.
        where: Names of statements; those with parentheses are functions of the database.
        old: Text of them.
        new: What stands there instead.
    """

    name: str
    where: tuple[str, ...]
    old: str
    new: str

    def plant(self, database: Database) -> None:
        """Break the statements of *database*."""
        for where in self.where:
            if where.endswith("()"):
                database.run(self._break_a_function(database, where[:-2]))
            else:
                sql: Any = database.statements
                setattr(sql, where, self._broken(getattr(sql, where)))

    async def _break_a_function(self, database: Database, name: str) -> None:
        text = await database.hands.fetchval(
            "SELECT pg_get_functiondef(p.oid) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = 'pgebus' AND p.proname = $1",
            name,
        )
        await database.hands.execute(self._broken(text))

    def _broken(self, text: str) -> str:
        assert self.old in text, f"{self.name}: {self.old!r} is not there"
        return text.replace(self.old, self.new)


class NoTransaction(Mutant):
    """The handlers' statements are committed one by one, and the completion after them."""

    def plant(self, database: Database) -> None:
        class Loose(Statements):
            @staticmethod
            def begin(isolation_level: str, marker: str) -> str:
                return f"SET pgebus.tx = '{marker}'"

            def end(self, *args: Any, **options: Any) -> str:
                return Statements.end(self, *args, **options).replace("COMMIT", "BEGIN; COMMIT")

        database.statements.__class__ = Loose


_CHARGE: Final = "attempt = d.attempt + 1"
CLAIMS: Final = ("claim", "claim_on", "claim_suspect", "claim_lost_once", "claim_limited", "claim_limited_suspect")
SEQ_IN_HELD: Final = " AND d.claim_seq = u.claim_seq"
WORKER_IN_HELD: Final = "d.worker_id = $4::bigint AND d.status = 'running'"

# The first one is looked for in the default lane.
MUTANTS: Final = (
    NoTransaction("the completion is outside of the handlers' transaction", (), "", ""),
    Mutant(
        "a batch is completed by id alone",
        ("complete", "complete_keyed"),
        SEQ_IN_HELD + "\n      AND " + WORKER_IN_HELD,
        " AND $4::bigint IS NOT NULL AND d.status = 'running'",
    ),
    Mutant("a batch is completed whatever its claim_seq", ("complete", "complete_keyed"), SEQ_IN_HELD, ""),
    Mutant("complete() does not ask for the claim_seq", ("complete()",), "d.claim_seq = p_claim_seq AND ", ""),
    Mutant("complete() does not ask for the worker", ("complete()",), " AND d.worker_id = p_worker_id", ""),
    Mutant(
        "complete() does not say that the lease is lost",
        ("complete()",),
        "IF NOT FOUND THEN\n    RAISE",
        "IF false THEN\n    RAISE",
    ),
    Mutant("the attempt is not charged at the claim", CLAIMS, _CHARGE, "attempt = d.attempt"),
    Mutant(
        "the claim_seq stays at a claim", CLAIMS, "claim_seq = d.claim_seq + 1", "claim_seq = greatest(d.claim_seq, 1)"
    ),
    Mutant("a claim does not ask whether it is due", CLAIMS, " AND d.due_at <= now()", ""),
    Mutant(
        "a claim does not ask for what is before in the key",
        CLAIMS,
        "(p.event_id < d.event_id OR p.status = 'running')",
        "false",
    ),
    Mutant("a claim overlooks that a group is paused", ("claim", "claim_on"), " AND g.paused_at IS NULL", ""),
    Mutant("a claim that goes on leaves one out", ("claim_on",), ") >= (lane.due_at", ") > (lane.due_at"),
    Mutant("a batch promotes nothing", ("complete_keyed",), "d.key IS NOT NULL AS promotes", "false AS promotes"),
    Mutant("complete() promotes nothing", ("complete()",), "IF v_key IS NOT NULL THEN", "IF false THEN"),
    Mutant(
        "a promotion takes the last of the key",
        ("complete()",),
        "ORDER BY b.event_id LIMIT 1",
        "ORDER BY b.event_id DESC LIMIT 1",
    ),
    Mutant("the sweep lets nothing in", ("sweep",), "LIMIT 1) IS NULL\n)", "LIMIT 1) IS NULL AND false\n)"),
    Mutant("the sweep asks for no head", ("sweep",), "p.event_id < b.event_id OR p.status = 'running'", "false"),
    Mutant("a recovery does not count the loss", ("recover",), "lost = least(d.lost + 1, 32767)", "lost = d.lost"),
    Mutant(
        "a recovery gives the attempt back",
        ("recover",),
        "worker_id = NULL,",
        "attempt = d.attempt - 1, worker_id = NULL,",
    ),
    Mutant("a recovery overlooks who is alive", ("owners",), "l.granted", "NOT l.granted"),
    Mutant("a release counts the attempt", ("release",), ", attempt = greatest(d.attempt - 1, 0)", ""),
    Mutant(
        "a retry has no fence",
        ("reschedule",),
        "f.claim_seq = $3::integer\n      AND f.worker_id = $4::bigint AND f.status = 'running'",
        "f.status = 'running' AND $3::integer + $4::bigint > 0",
    ),
    Mutant(
        "a retry forgets its delay",
        ("reschedule",),
        "make_interval(secs => $6::double precision)",
        "make_interval(secs => $6::double precision * 0)",
    ),
    Mutant(
        "a dead delivery lets its key go", ("bury",), "holds_key = d.key IS NOT NULL AND ", "holds_key = false AND "
    ),
    Mutant(
        "pruning asks nothing of other groups",
        ("lock_ripe", "delete_ripe"),
        "make_interval(secs => $4::double precision) END)",
        "make_interval(secs => $4::double precision) ELSE true END)",
    ),
    Mutant(
        "pruning takes what another group has finished too lately",
        ("lock_ripe", "delete_ripe"),
        "THEN d.finished_at < now() - make_interval(secs => u.seconds)",
        "THEN true",
    ),
    Mutant("the trigger blocks nothing", ("fan_out()",), "THEN 'blocked' ELSE", "THEN 'pending' ELSE"),
    Mutant(
        "the trigger forgets the delay",
        ("fan_out()",),
        "SELECT e.id, e.run_at, e.priority, e.channel, m.consumer_group, e.type, m.status",
        "SELECT e.id, now(), e.priority, e.channel, m.consumer_group, e.type, m.status",
    ),
    Mutant(
        "a backfill waits for nobody",
        ("in_flight",),
        "WHERE l.locktype = 'virtualxid'",
        "WHERE false AND l.locktype = 'virtualxid'",
    ),
    Mutant("a limit is one too high", ("count_running",), "SELECT count(*)", "SELECT count(*) - 1 AS count"),
    Mutant("what was unhandled comes back before its turn", ("adopt",), "NOT (d.holds_key AND", "NOT (true AND"),
)
