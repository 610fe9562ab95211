"""The tester, tested: a statement that is broken on purpose turns a race red."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import asyncpg
import pytest

from pgebus._runtime.statements import Statements
from pgebus.settings import DatabaseSettings
from tests.interleavings.spec import ALL_LEVELS, RC, RR, play
from tests.interleavings.specs import race_named

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

FENCE = "d.claim_seq = u.claim_seq\n      AND d.worker_id = $4::bigint AND d.status = 'running'"
FENCE_OF_ONE = "f.claim_seq = $3::integer\n      AND f.worker_id = $4::bigint AND f.status = 'running'"
FENCE_OF_COMPLETE = "AND d.claim_seq = p_claim_seq AND d.worker_id = p_worker_id AND d.status = 'running'"
RIPE_AT_LAST = "make_interval(secs => $4::double precision) END)"


@dataclass(frozen=True)
class Defect:
    """One thing that is done wrong.

    Attributes:
        name: What is missing.
        race: The race that has to notice.
        message: Part of what it says then.
        level: At which isolation level.
        statements: Which statements are changed, if any of them.
        function: Which function of the schema is, if any.
        old: What stands there.
        new: What stands there instead.
        sql: What else is done to the schema.
    """

    name: str
    race: str
    message: str
    level: str = RC
    statements: tuple[str, ...] = ()
    function: str = ""
    old: str = ""
    new: str = ""
    sql: str = ""

    def __str__(self) -> str:
        return self.name

    async def plant(self, sql: Sql) -> Statements:
        statements = Statements("pgebus")
        for name in self.statements:
            whole = getattr(statements, name)
            assert self.old in whole
            setattr(statements, name, whole.replace(self.old, self.new))
        if self.function:
            whole = await sql.fetchval("SELECT pg_get_functiondef($1::text::regproc)", f"pgebus.{self.function}")
            assert self.old in whole
            await sql.execute(whole.replace(self.old, self.new))
        if self.sql:
            await sql.execute(self.sql)
        return statements


CLAIMS = ("claim", "claim_on", "claim_suspect", "claim_lost_once", "claim_limited", "claim_limited_suspect")
DEFECTS = [
    Defect(
        "a batch is completed without its fence",
        "recover_and_late_complete",
        "late",
        statements=("complete",),
        old=FENCE,
        new="u.claim_seq > 0 AND $4::bigint > 0",
    ),
    Defect(
        "a batch is completed by its worker and not by its claim",
        "recover_and_late_complete",
        "permutation",
        statements=("complete",),
        old="d.claim_seq = u.claim_seq\n      AND d.worker_id = $4::bigint",
        new="u.claim_seq > 0 AND $4::bigint > 0",
    ),
    Defect(
        "complete() has no fence",
        "recover_and_late_complete_with_effects",
        "permutation",
        function="complete",
        old=FENCE_OF_COMPLETE,
    ),
    Defect(
        "complete() does not care for the status and the worker",
        "complete_with_effects_and_cancel",
        "permutation",
        function="complete",
        old="AND d.worker_id = p_worker_id AND d.status = 'running'",
    ),
    Defect(
        "a failure is written without its fence",
        "recover_and_late_fail",
        "permutation",
        statements=("reschedule",),
        old=FENCE_OF_ONE,
        new="$3::integer > 0 AND $4::bigint > 0",
    ),
    Defect(
        "a release is written without its fence",
        "release_and_recover",
        "permutation",
        statements=("release",),
        old=FENCE,
        new="u.claim_seq > 0 AND $4::bigint > 0",
    ),
    Defect("claims wait for each other", "claim_and_claim", "waited", statements=CLAIMS, old=" SKIP LOCKED"),
    Defect("claims lock nothing", "claim_and_claim", "permutation", statements=CLAIMS, old="FOR UPDATE SKIP LOCKED"),
    Defect(
        "a claim that goes on locks nothing",
        "claims_that_go_on",
        "permutation",
        statements=("claim_on",),
        old="FOR UPDATE SKIP LOCKED",
    ),
    Defect(
        "what two workers died with is claimed with the others",
        "claims_of_what_one_worker_died_with",
        "permutation",
        statements=("claim_lost_once",),
        old="d.lost = 1",
        new="d.lost > 0",
    ),
    Defect(
        "who was ended goes on beating",
        "beat_and_recover",
        "permutation",
        statements=("beat",),
        old=" AND ended_at IS NULL",
    ),
    Defect(
        "claims by key look at nothing before them",
        "let_go_and_redrive",
        "permutation",
        statements=CLAIMS,
        old="(p.event_id < d.event_id OR p.status = 'running')",
        new="false",
        sql="DROP INDEX pgebus.uq_deliveries_running_key",
    ),
    Defect(
        "batches wait for each other", "batches_that_overlap", "waited", statements=("complete",), old=" SKIP LOCKED"
    ),
    Defect(
        "dedup_key is not unique",
        "same_dedup_key_both_commit",
        "outcome",
        sql="DROP INDEX pgebus.uq_events_dedup_key",
    ),
    Defect(
        "two of a key may run",
        "claims_of_one_key",
        "not always",
        sql="DROP INDEX pgebus.uq_deliveries_running_key",
    ),
    Defect(
        "nothing sweeps",
        "sweep_and_publish",
        "never handled",
        statements=("sweep",),
        old="WHERE n.ctid = free.place",
        new="WHERE n.ctid = free.place AND false",
    ),
    Defect(
        "a completion lets nobody in",
        "complete_and_publish",
        "permutation",
        function="complete",
        old="IF v_key IS NOT NULL THEN",
        new="IF false THEN",
    ),
    Defect(
        "a limited group is not locked",
        "limited_claims",
        "not always",
        statements=("lock_group",),
        old=" FOR NO KEY UPDATE SKIP LOCKED",
    ),
    Defect(
        "a claim does not see a pause",
        "pause_and_claim",
        "permutation",
        statements=CLAIMS,
        old=" AND g.paused_at IS NULL",
    ),
    Defect(
        "pruning does not look at the other groups",
        "complete_and_prune",
        "permutation",
        statements=("lock_ripe", "delete_ripe"),
        old=RIPE_AT_LAST,
        new=RIPE_AT_LAST.replace("END", "ELSE true END"),
    ),
    Defect(
        "pruning does not look again at what it has locked",
        "replay_while_pruning",
        "outcome",
        statements=("delete_ripe",),
        old="d.event_id = u.id AND (CASE",
        new="d.event_id = u.id AND (true OR CASE",
    ),
    Defect(
        "pruning waits for who has locked a delivery",
        "prune_and_hold",
        "waited",
        statements=("delete_ripe",),
        old=" SKIP LOCKED",
    ),
    Defect(
        "a backfill does not lock the event",
        "backfill_and_delete",
        "permutation",
        statements=("backfill",),
        old=" FOR KEY SHARE SKIP LOCKED",
    ),
    Defect(
        "a backfill waits for nobody",
        "backfill_and_publish_in_flight",
        "outcome",
        RR,
        statements=("in_flight",),
        old="WHERE l.locktype = 'virtualxid' AND",
        new="WHERE false AND",
    ),
    Defect(
        "the trigger tells nobody",
        "idle_flag_and_publish",
        "permutation",
        function="fan_out",
        old="w.idle AND w.channel = q.channel",
        new="false",
    ),
]
QUICK = {"a batch is completed without its fence", "claims lock nothing", "nothing sweeps", "dedup_key is not unique"}


@pytest.mark.parametrize("defect", [each for each in DEFECTS if each.name in QUICK], ids=str)
async def test_a_planted_defect_turns_a_race_red(defect: Defect, database: DatabaseSettings, sql: Sql) -> None:
    await _notices(defect, database, sql)


@pytest.mark.slow
@pytest.mark.parametrize("defect", [each for each in DEFECTS if each.name not in QUICK], ids=str)
async def test_every_planted_defect_turns_a_race_red(defect: Defect, database: DatabaseSettings, sql: Sql) -> None:
    await _notices(defect, database, sql)


async def _notices(defect: Defect, database: DatabaseSettings, sql: Sql) -> None:
    statements = await defect.plant(sql)
    assert defect.level in ALL_LEVELS
    with pytest.raises(AssertionError, match=defect.message):
        await play(race_named(defect.race).make(defect.level), database, sql, statements=statements)
