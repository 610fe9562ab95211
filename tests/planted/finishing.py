"""Bugs about who has a delivery, and what finishing it means."""

from __future__ import annotations

from typing import Final

from tests.planted.bug import Bug, Edit
from tests.planted.places import MODEL, POSTGRES, SCHEMA, STATEMENTS, SYSTEM, UNIT, race

BUGS: Final = (
    Bug(
        "B1",
        "a delivery is completed by its id, without the fence",
        (
            Edit(
                STATEMENTS,
                "    WHERE d.event_id = u.event_id AND d.consumer_group = u.consumer_group"
                " AND d.claim_seq = u.claim_seq\n      AND d.worker_id = $4::bigint AND d.status = 'running'",
                "    WHERE d.event_id = u.event_id AND d.consumer_group = u.consumer_group"
                " AND u.claim_seq > 0\n      AND $4::bigint > 0 AND d.status = 'running'",
            ),
            Edit(
                SCHEMA,
                "AND d.claim_seq = p_claim_seq AND d.worker_id = p_worker_id AND d.status = 'running'",
                "AND d.status = 'running'",
            ),
            Edit(
                SCHEMA,
                " AND d.claim_seq = p_claim_seq\n      AND d.worker_id = p_worker_id AND d.status = 'running'",
                "\n      AND d.status = 'running'",
            ),
        ),
        {
            "unit": (UNIT + "test_statements.py",),
            "postgres": (POSTGRES + "test_complete.py",),
            "interleavings": (race("recover_and_late_complete"),),
            "model": (MODEL,),
            "system": (SYSTEM + "test_frozen_worker.py",),
        },
    ),
    # There is no beat on rows. A worker behind a transaction pooler beats in its own row, and is fenced by its end.
    Bug(
        "B2",
        "a worker that others have ended goes on beating",
        (
            Edit(
                STATEMENTS,
                "SET beat_at = clock_timestamp() WHERE id = $1::bigint AND ended_at IS NULL RETURNING id",
                "SET beat_at = clock_timestamp() WHERE id = $1::bigint RETURNING id",
            ),
        ),
        {
            "interleavings": (race("beat_and_recover"),),
            "system": (SYSTEM + "test_beating.py",),
        },
    ),
    Bug(
        "B3",
        "the completion is in a transaction of its own, after that of the handlers",
        (
            Edit(
                STATEMENTS,
                'f"RESET ROLE; SELECT {quote_identifier(self.schema)}.complete(',
                'f"RESET ROLE; COMMIT; BEGIN; SET LOCAL pgebus.tx = {quote_literal(marker)}; "\n'
                '            f"SELECT {quote_identifier(self.schema)}.complete(',
            ),
        ),
        {
            "interleavings": (race("recover_and_late_complete_with_effects"),),
            "model": (MODEL,),
            "system": (
                SYSTEM + "test_transactions.py::test_losing_the_lease_rolls_back_what_the_handlers_did",
                SYSTEM + "test_frozen_worker.py",
            ),
        },
    ),
    Bug(
        "B4",
        "nobody asks whether the completion found its row",
        (Edit(SCHEMA, "IF NOT FOUND THEN\n    RAISE", "IF false THEN\n    RAISE"),),
        {
            "postgres": (POSTGRES + "test_complete.py",),
            "interleavings": (race("recover_and_late_complete_with_effects"),),
            "model": (MODEL,),
            "system": (SYSTEM + "test_transactions.py::test_losing_the_lease_rolls_back_what_the_handlers_did",),
        },
    ),
    Bug(
        "B8",
        "an attempt is charged when it has failed, and not when it is claimed",
        (
            Edit(STATEMENTS, "d.claim_seq, d.attempt, d.lost", "d.claim_seq, d.attempt + 1 AS attempt, d.lost"),
            Edit(
                STATEMENTS,
                "claimed_at = clock_timestamp(), attempt = d.attempt + 1,",
                "claimed_at = clock_timestamp(),",
            ),
            Edit(
                STATEMENTS,
                "    attempt = d.attempt + CASE WHEN due.status = 'running' THEN 1 ELSE 0 END,\n",
                "",
            ),
            Edit(
                STATEMENTS,
                "attempt = greatest(d.attempt - $7::integer, 0)",
                "attempt = d.attempt + 1 - $7::integer",
            ),
            Edit(
                STATEMENTS,
                "finished_at = clock_timestamp(), handled = $6::text[],",
                "finished_at = clock_timestamp(), attempt = d.attempt + 1, handled = $6::text[],",
            ),
            Edit(
                STATEMENTS,
                "claimed_at = NULL, attempt = greatest(d.attempt - 1, 0)\n  FROM held",
                "claimed_at = NULL\n  FROM held",
            ),
            Edit(
                STATEMENTS,
                "claimed_at = NULL, attempt = greatest(d.attempt - 1, 0),\n      holds_key",
                "claimed_at = NULL,\n      holds_key",
            ),
        ),
        {
            "interleavings": (race("recover_and_recover"),),
            "model": (MODEL,),
            "system": (
                SYSTEM
                + "test_lost_workers.py::test_an_event_that_kills_its_workers_ends_dead_and_takes_no_other_with_it",
            ),
        },
    ),
    # Nothing beats on rows. Its lock shows that a worker lives, here until its stop begins.
    Bug(
        "B12",
        "a worker that stops gives its lock up before its handlers have ended",
        (
            Edit(
                "system.py",
                "            self._state = SystemState.STOPPING\n            await claimer.close",
                "            self._state = SystemState.STOPPING\n"
                "            gone = loops._tasks.pop(shown)\n            gone.cancel()\n"
                "            await asyncio.wait([gone])\n            await claimer.close",
            ),
        ),
        {
            "system": (
                SYSTEM + "test_lifecycle.py::test_whoever_stops_keeps_its_deliveries_until_its_handlers_have_ended",
            ),
        },
    ),
    Bug(
        "B15",
        "a worker is known by the name of its host",
        (
            Edit(
                "_runtime/presence.py",
                "from secrets import randbits\n",
                "from socket import gethostname\nfrom zlib import crc32\n",
            ),
            Edit("_runtime/presence.py", "randbits(62) + 1", "crc32(gethostname().encode()) + 1"),
        ),
        {
            "system": (
                SYSTEM + "test_delivery.py::test_two_systems_share_the_work_and_no_delivery_runs_twice",
                SYSTEM + "test_lost_workers.py",
            ),
        },
    ),
    # In the dispatcher, complete() refuses an aborted transaction before its COMMIT could be answered with ROLLBACK.
    Bug(
        "B17",
        "a COMMIT that was answered with ROLLBACK counts as a commit",
        (
            Edit("_guard.py", '            self.connection.exec_driver_sql("SELECT 1")\n', ""),
            Edit("_runtime/transacting.py", 'elif tag != "COMMIT":', "elif False:"),
        ),
        {
            "postgres": (POSTGRES + "test_session.py",),
            "system": (
                SYSTEM + "test_transactions.py::"
                "test_an_unsafe_commit_that_postgresql_turns_into_a_rollback_is_no_success",
            ),
        },
    ),
    Bug(
        "B18",
        "a delivery of an unknown type is completed",
        (Edit("_runtime/dispatching.py", "return Unhandle()", "return Complete()"),),
        {
            "unit": (UNIT + "test_dispatching.py",),
            "system": (
                SYSTEM + "test_delivery.py::test_a_type_whose_handler_was_removed_is_put_aside_uncounted",
                SYSTEM + "test_rolling_deploy.py",
            ),
        },
    ),
    Bug(
        "B20",
        "what was claimed beyond the free slots is dropped",
        (
            Edit(
                "_runtime/claiming.py",
                "        self._buffer.extend(leases)\n        if self._closed:",
                "        self._buffer.extend(leases[: self._slots - len(self._crew)])\n        if self._closed:",
            ),
        ),
        {
            "unit": (UNIT + "test_claiming.py",),
            "system": (SYSTEM + "test_delivery.py::test_two_systems_share_the_work_and_no_delivery_runs_twice",),
        },
    ),
)
