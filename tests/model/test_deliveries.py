"""Deliveries, in random steps on a real PostgreSQL, against a dict; and the proof that defects are found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from pgebus._runtime import maintenance
from pgebus.settings import DatabaseSettings
from tests.model.database import Database
from tests.model.machine import Deliveries
from tests.model.mutants import MUTANTS, Mutant

STEPS_OF_AN_EXAMPLE: Final = 100
# In the default lane, and in the long one.
STEPS: Final = 25_000
MANY_STEPS: Final = int(os.environ.get("PGEBUS_MODEL_STEPS", "100000"))
SEED: Final = int(os.environ.get("PGEBUS_MODEL_SEED", "1"))
# Whether a failing example is made as short as possible; without it, only that there is one is known, and soon.
SHRINK: Final = os.environ.get("PGEBUS_MODEL_SHRINK", "1") != "0"
# How many steps a mutant may survive.
STEPS_TO_FIND: Final = 15_000
# What must have happened, or the run has shown less than it seems to.
HAPPENS: Final = (
    "a backfill waits for a publisher",
    "a dedup_key was used again",
    "a key was released",
    "a limit held something back",
    "a transaction was open over other steps",
    "a wrong fence was refused",
    "cancelled with its group",
    "completed in a batch",
    "completed in a transaction",
    "DeadLetter",
    "deliveries were claimed",
    "deliveries were recovered",
    "effects were rolled back",
    "events were emptied",
    "events were pruned",
    "events were rolled back",
    "let in by the sweep",
    "made by a backfill",
    "many of a dead worker's were claimed",
    "redriven",
    "replayed",
    "replayed for the first time",
    "Reschedule",
    "unhandled deliveries were adopted",
)
# In a long run also what takes several steps that come seldom.
HAPPENS_SELDOM: Final = ("a completion came too late", "a running delivery was cancelled", "dead of its losses")


@pytest.fixture
def machine(database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Deliveries]]:
    """The machine, on a database of its own."""
    # A backfill pauses after half a second of work; what a step does must not depend on the speed of the computer.
    monkeypatch.setattr(maintenance, "BACKFILL_SECONDS", 3600)
    opened = Database(database)
    yield type("Machine", (Deliveries,), {"database": opened, "seen": Counter()})
    opened.close()


def explore(machine: type[Deliveries], steps: int, seed_: int, *, shrink: bool = SHRINK) -> None:
    """Take *steps* steps, in examples of a hundred; the same ones for the same seed."""
    run_state_machine_as_test(
        seed(seed_)(machine),
        settings=settings(
            max_examples=max(1, steps // STEPS_OF_AN_EXAMPLE),
            stateful_step_count=STEPS_OF_AN_EXAMPLE,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def check_that_it_was_no_idle_run(machine: type[Deliveries], steps: int, happens: Sequence[str] = HAPPENS) -> None:
    missing = [what for what in happens if not machine.seen[what]]
    assert not missing, f"none of this has happened: {missing}"
    assert machine.seen["steps"] >= steps


def test_deliveries_do_what_the_model_says(machine: type[Deliveries]) -> None:
    """After each of some thousand random steps, the tables hold what they should, and every example can be drained."""
    explore(machine, STEPS, 0)
    check_that_it_was_no_idle_run(machine, STEPS)


@pytest.mark.slow
def test_deliveries_do_what_the_model_says_for_long(machine: type[Deliveries]) -> None:
    """The same with another seed, and as many steps as PGEBUS_MODEL_STEPS says."""
    explore(machine, MANY_STEPS, SEED)
    check_that_it_was_no_idle_run(machine, MANY_STEPS, (*HAPPENS, *HAPPENS_SELDOM))


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=() if m is MUTANTS[0] else pytest.mark.slow) for m in MUTANTS],
)
def test_a_defect_is_found(machine: type[Deliveries], mutant: Mutant) -> None:
    """A model that finds no planted defect would find no other one."""
    mutant.plant(machine.database)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        explore(machine, STEPS_TO_FIND, 0, shrink=False)
    assert machine.first_failure
