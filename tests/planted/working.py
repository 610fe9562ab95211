"""Bugs about everything else: looking for work, time, order, errors, loops, pruning."""

from __future__ import annotations

from typing import Final

from tests.planted.bug import Bug, Edit
from tests.planted.places import CANCELLED, MODEL, POSTGRES, SCHEMA, STATEMENTS, SYSTEM, UNIT, race

BUGS: Final = (
    Bug(
        "B5",
        "without a notification nobody looks: there is no poll",
        (
            Edit(
                "_runtime/claiming.py",
                "self._look_at = monotonic() + next_look(monotonic() - self._flag_changed, self._poll_interval)",
                "self._look_at = monotonic() + 3_600.0",
            ),
        ),
        {
            "unit": (UNIT + "test_claiming.py",),
            "system": (
                SYSTEM + "test_listener.py::test_when_every_notification_is_lost_polling_finds_the_event",
                SYSTEM + "test_listener.py::test_a_publisher_that_saw_no_flag_is_found_after_as_much_time_again",
            ),
        },
    ),
    Bug(
        "B6",
        "after a reconnect everything due is looked for before LISTEN, and not after it",
        (
            Edit(
                "_runtime/listening.py",
                "await self._take_lock(raw)\n                    await raw.add_listener(self._channel",
                "await self._take_lock(raw)\n                    self._presence.arrive()\n"
                "                    self._wakeup.doubt()\n                    await raw.add_listener(self._channel",
            ),
            Edit(
                "_runtime/listening.py",
                "                self._presence.arrive()\n                self._health.well()\n"
                "                # Only now: what was notified between two connections was notified to nobody.\n"
                "                self._wakeup.doubt()\n",
                "                self._health.well()\n",
            ),
        ),
        {
            "system": (
                SYSTEM + "test_listener.py::test_what_is_published_just_before_a_new_connection_listens_is_found",
            ),
        },
    ),
    Bug(
        "B7",
        "a loop that fails on a bug is run again, like one that the database has failed",
        (Edit("_runtime/supervision.py", "except DATABASE_ERRORS as error:", "except Exception as error:"),),
        {
            "unit": (UNIT + "test_supervision.py",),
            "system": (SYSTEM + "test_lifecycle.py::test_a_bug_in_a_loop_ends_the_system_loudly",),
        },
    ),
    # Nothing ends by time. Due times are compared with the database's clock, here with the client's.
    Bug(
        "B9",
        "due times are compared with the clock of the client",
        (
            Edit("_runtime/waking.py", "import asyncio\n", "import asyncio\nimport time\n"),
            Edit(
                "_runtime/waking.py", "self._offset = epoch - monotonic()", "self._offset = time.time() - monotonic()"
            ),
        ),
        {
            "unit": (UNIT + "test_waking.py",),
            "system": (SYSTEM + "test_clocks.py",),
        },
    ),
    # Sorting is the second net: as long as locked rows are passed over, batches in any order wait for nobody.
    Bug(
        "B10",
        "batches lock their rows in any order, and wait for each other",
        (
            Edit("_runtime/store.py", "fences = sorted(fences)", "fences = list(fences)"),
            Edit(
                STATEMENTS,
                "AND d.worker_id = $4::bigint AND d.status = 'running'\n"
                "    ORDER BY d.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) h",
                "AND d.worker_id = $4::bigint AND d.status = 'running'\n    ORDER BY d.event_id LIMIT 1 FOR UPDATE) h",
            ),
        ),
        {
            "interleavings": (race("batches_that_overlap"),),
            "system": (
                SYSTEM
                + "test_attacks.py::test_a_locked_running_delivery_does_not_hold_up_the_acknowledgement_of_others",
            ),
        },
    ),
    # No plan was found that claims more than the limit because of it: rows are joined by their place. In the trigger it
    # is one of two nets, and the bug takes away both.
    Bug(
        "B11",
        "what is to be done once is no materialized CTE: who wants an event, what is claimed, and what is completed",
        (
            Edit(
                STATEMENTS,
                "), due AS MATERIALIZED (\n  SELECT d.place",
                "), due AS NOT MATERIALIZED (\n  SELECT d.place",
            ),
            Edit(STATEMENTS, 'f"""held AS MATERIALIZED (', 'f"""held AS NOT MATERIALIZED ('),
            Edit(SCHEMA, "SET enable_nestloop = off SET enable_seqscan = off", "SET enable_seqscan = off"),
            Edit(SCHEMA, "BEGIN\n  WITH wanted AS MATERIALIZED (", "BEGIN\n  WITH wanted AS NOT MATERIALIZED ("),
            Edit(SCHEMA, "THEN\n    WITH wanted AS MATERIALIZED (", "THEN\n    WITH wanted AS NOT MATERIALIZED ("),
        ),
        {
            "unit": (UNIT + "test_statements.py",),
            "postgres": (POSTGRES + "test_fan_out.py",),
        },
    ),
    Bug(
        "B13",
        "the text of an error is stored as it is",
        (
            Edit(
                "_runtime/outcome.py",
                'return text.replace("\\x00", "\\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")',
                "return text",
            ),
        ),
        {
            "unit": (UNIT + "test_outcome.py",),
            "system": (SYSTEM + "test_delivery.py::test_an_error_of_any_shape_is_recorded",),
        },
    ),
    Bug(
        "B14",
        "when a handler is cancelled, its connection goes back with the transaction open",
        (
            Edit(
                "_runtime/transacting.py",
                "    if not raw.is_in_transaction():\n        return\n    try:",
                "    task = asyncio.current_task()\n"
                "    if not raw.is_in_transaction() or (task is not None and task.cancelling()):\n"
                "        return\n    try:",
            ),
        ),
        {
            "sweeps": (CANCELLED,),
            "system": (
                SYSTEM + "test_frozen_worker.py::"
                "test_a_thawed_worker_cancels_what_was_given_to_another_and_returns_as_somebody_new",
                SYSTEM + "test_listener.py::test_a_worker_cut_off_longer_than_the_grace_gives_its_deliveries_up",
            ),
        },
    ),
    Bug(
        "B16",
        "an event is pruned though another group has not finished it",
        (
            Edit(
                "operations/pruning.py",
                "< now() - make_interval(secs => {kept.unhandled}) END)",
                "< now() - make_interval(secs => {kept.unhandled}) ELSE true END)",
            ),
        ),
        {
            "interleavings": (race("complete_and_prune"),),
            "model": (MODEL,),
        },
    ),
    # The trigger notifies in the transaction of the INSERT; this does it before, in another one.
    Bug(
        "B19",
        "the notification is sent before the event is inserted, in a transaction of its own",
        (
            Edit(SCHEMA, "PERFORM pg_notify(q.channel, q.due) FROM (", "PERFORM q.due FROM ("),
            Edit(
                "_writing.py",
                "    try:\n        session.add_all(events)\n",
                "    with session.get_bind().engine.connect() as other:  # type: ignore[union-attr]\n"
                "        for channel in {event.channel for event in events}:\n"
                "            other.exec_driver_sql(f\"SELECT pg_notify('{channel}', '')\")\n"
                "        other.commit()\n"
                "    try:\n        session.add_all(events)\n",
            ),
        ),
        {
            "postgres": (POSTGRES + "test_fan_out.py",),
            "interleavings": (race("idle_flag_and_publish"),),
            "system": (SYSTEM + "test_listener.py::test_a_sleeping_worker_is_woken_by_the_commit",),
        },
    ),
)
