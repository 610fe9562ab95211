"""What is to go wrong, and when: decided by the seed, before anything runs; and how much of it has to have hit.

Pure.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import floor, sqrt
from typing import Final, NamedTuple

# For how many events the numbers below are.
SCALE: Final = 100_000
# Before and after that part of the events, nothing is broken.
QUIET: Final = 0.04


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        says: What it does.
        times: How often, for `SCALE` events; at least once.
    """

    says: str
    times: int


KINDS: Final = {
    "kill": Kind("kill -9 of a worker", 240),
    "kill-publisher": Kind("kill -9 of a publisher", 20),
    "term": Kind("SIGTERM of a worker, which stops gracefully and is replaced", 15),
    "zombie": Kind("SIGSTOP of a worker, its proof of life ended; SIGCONT when others have its deliveries", 24),
    "backend": Kind("pg_terminate_backend: whichever backend", 250),
    "backend-listen": Kind("pg_terminate_backend: a worker's LISTEN connection", 80),
    "backend-claim": Kind("pg_terminate_backend: a backend that claims", 120),
    "backend-handler": Kind("pg_terminate_backend: a backend in a handler's transaction", 190),
    "crash": Kind("pg_ctl stop -m immediate, and start", 11),
    "pause": Kind("SIGSTOP of PostgreSQL, all its processes, for a few seconds", 3),
    "cut": Kind("RST on all connections of a proxy", 100),
    "hole": Kind("all connections of a proxy are a black hole for a while, then RST", 8),
    "commit-before": Kind("RST instead of a COMMIT, which the server never gets", 40),
    "commit-after": Kind("RST instead of the answer to a COMMIT", 40),
    "disk": Kind("the disk of the database is full for a few seconds", 1),
}


class Fault(NamedTuple):
    """Something that is to go wrong.

    Attributes:
        at: After which share of the events has been published: so a slow machine has as many, and all of them under
            load.
        kind: One of `KINDS`.
        roll: From 0 to 1; chooses the target and how long it lasts.
    """

    at: float
    kind: str
    roll: float


def schedule(seed: int, events: int) -> list[Fault]:
    """Return the faults of a run, in their order.

    Those of one kind are spread: each has its own slice of the run, and falls somewhere in it.
    """
    rng = random.Random(f"faults:{seed}")
    faults = []
    for kind, (_, times) in KINDS.items():
        count = max(1, round(times * events / SCALE))
        for number in range(count):
            share = QUIET + (1 - 2 * QUIET) * (number + rng.random()) / count
            faults.append(Fault(round(share, 6), kind, rng.random()))
    return sorted(faults)


class Mark(NamedTuple):
    """Something that must have happened, or the run says nothing.

    Attributes:
        says: What it is.
        times: How often, for `SCALE` events; of fewer, less what chance may take away.
        least: And how often at least, however few the events.
    """

    says: str
    times: int
    least: int = 0


MARKS: Final = {
    "kills": Mark("workers killed with -9", 200, 1),
    "kills_inside": Mark("of these, in the middle of a handler", 100, 1),
    "recoveries": Mark("deliveries taken back from workers that were gone", 1_000, 1),
    "publisher_kills": Mark("publishers killed with -9", 10),
    "graceful": Mark("graceful restarts of a worker", 10),
    "zombies": Mark("workers frozen, replaced and thawed", 10),
    "refused": Mark("completions refused, because the delivery was another's by then", 10),
    "departed": Mark("workers that found themselves replaced, and went on as somebody new", 5),
    "restarts": Mark("crashes of PostgreSQL, recovered", 10, 1),
    "restarts_inside": Mark("of these, while handlers ran", 8),
    "backends": Mark("backends terminated", 500, 1),
    "cuts": Mark("cuts of all connections of a proxy", 80),
    "holes": Mark("black holes", 5),
    "reconnects": Mark("loops of a worker that lost their connection and made another", 300, 1),
    "unknown_committed": Mark("unknown outcomes that were commits", 10),
    "unknown_rolled_back": Mark("unknown outcomes that were none", 10),
    "commits_cut_before": Mark("COMMITs that never arrived", 20),
    "commits_cut_after": Mark("COMMITs whose answer was lost", 20),
    "retried": Mark("deliveries that took more than one attempt", 2_000, 1),
    "rejected": Mark("deliveries that their handler rejected", 1_000, 1),
    "disk_errors": Mark("statements that failed because the disk was full", 1),
    "rolled_back": Mark("events rolled back on purpose", 500, 1),
}


def missing(marks: Mapping[str, int], events: int, excused: frozenset[str] = frozenset()) -> list[str]:
    """Return a sentence for each mark that was hit too rarely; the *excused* ones could not be tried here."""
    found = []
    for name, mark in MARKS.items():
        expected = mark.times * events / SCALE
        chance = 3 * sqrt(expected) if events < SCALE else 0.0
        wanted = max(mark.least, floor(expected - chance))
        if name not in excused and marks.get(name, 0) < wanted:
            found.append(f"{mark.says}: {marks.get(name, 0)}, and at least {wanted} are needed")
    return found
