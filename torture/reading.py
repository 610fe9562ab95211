"""Reads what happened out of the database, the ledgers and the files; and measures what can be measured afterwards."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import asyncpg

from torture.history import DeliveryRow, EventRow, History, Outcome, Run, Unit
from torture.ledger import read_file
from torture.nemesis import Held

_EVENTS: Final = """
SELECT id, coalesce((payload->>'number')::bigint, 0), type, key, extract(epoch FROM run_at)::float8
FROM pgebus.events"""
_DELIVERIES: Final = """
SELECT event_id, consumer_group, status, attempt, claim_seq, lost::int FROM pgebus.deliveries"""
_RUNS: Final = """
SELECT position, event_id, consumer_group, handler, claim_seq, extract(epoch FROM at)::float8 FROM {}"""
_BACKENDS: Final = """
SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'torture-%' AND application_name NOT LIKE '%reader'"""
_LOCKS: Final = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
_PER_SECOND: Final = """
SELECT floor(extract(epoch FROM finished_at))::bigint, count(*) FROM pgebus.deliveries WHERE finished_at IS NOT NULL
GROUP BY 1 ORDER BY 1"""


async def read_history(
    sql: asyncpg.Connection[asyncpg.Record], home: Path, publishers: int, left: dict[str, int]
) -> tuple[History, Counter[str], int]:
    """Return the history, the transactions by their way to publish, and how many events were rolled back on purpose."""
    ledgers = [read_file(home / f"ledger-{number}") for number in range(1, publishers + 1)]
    ways = Counter(way for ledger in ledgers for _, way in ledger)
    on_purpose = sum(_size(unit) for ledger in ledgers for unit, way in ledger if way == "rollback")
    journal = home / "audit"
    starts = [Run(*row) for row in await sql.fetch(_RUNS.format("starts"))]
    if journal.exists():
        starts += read_journal(journal.read_text().splitlines(keepends=True))
    history = History(
        units=[unit for ledger in ledgers for unit, _ in ledger],
        business=[row[0] for row in await sql.fetch("SELECT number FROM business")],
        events=[EventRow(*row) for row in await sql.fetch(_EVENTS)],
        deliveries=[DeliveryRow(*row) for row in await sql.fetch(_DELIVERIES)],
        effects=[Run(*row) for row in await sql.fetch(_RUNS.format("effects"))],
        starts=starts,
        balances={row[0]: row[1] for row in await sql.fetch("SELECT account, amount FROM balances")},
        left={"backends": await sql.fetchval(_BACKENDS), "advisory locks": await sql.fetchval(_LOCKS), **left},
    )
    return history, ways, on_purpose


def read_journal(lines: Iterable[str]) -> list[Run]:
    """Return what plain functions have written into their file; a line that a SIGKILL has cut is none."""
    runs = []
    for position, line in enumerate(lines):
        words = line.split()
        if line.endswith("\n") and len(words) == 2:
            runs.append(Run(position, int(words[0]), "audit", "note", int(words[1])))
    return runs


def marks_of(history: History) -> dict[str, int]:
    """Return the marks that only the history shows."""
    there = {event.number for event in history.events}
    unknown = [unit for unit in history.units if unit.outcome is Outcome.UNKNOWN]
    return {
        "recoveries": sum(row.lost for row in history.deliveries),
        "retried": sum(row.attempt > 1 for row in history.deliveries),
        "rejected": sum(row.status == "dead" for row in history.deliveries),
        "unknown_committed": sum(unit.first in there for unit in unknown),
        "unknown_rolled_back": sum(unit.first not in there for unit in unknown),
    }


def _size(unit: Unit) -> int:
    return unit.last - unit.first + 1


def recovery_seconds(history: History, held: Sequence[Held]) -> tuple[list[float], list[float]]:
    """Return, sorted, the seconds from each SIGKILL to its first rerun, and to the rerun of each delivery that it hit.

    A rerun is the first run under a later claim that has left a trace: an attempt that was rolled back leaves none.
    """
    runs: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    wanted = {(each.event_id, each.group) for each in held}
    for run in (*history.effects, *history.starts):
        if (run.event_id, run.group) in wanted and run.at != float("inf"):
            runs[run.event_id, run.group].append((run.claim_seq, run.at))
    everything: list[float] = []
    first: dict[float, float] = {}
    for each in held:
        later = [at for seq, at in runs[each.event_id, each.group] if seq > each.claim_seq]
        if later:
            seconds = min(later) - each.killed_at
            everything.append(seconds)
            first[each.killed_at] = min(first.get(each.killed_at, seconds), seconds)
    return sorted(first.values()), sorted(everything)


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value that *share* of the sorted *values* do not exceed; None of none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


async def per_second(sql: asyncpg.Connection[asyncpg.Record]) -> dict[int, int]:
    """Return how many deliveries were finished in each second since the epoch."""
    return {row[0]: row[1] for row in await sql.fetch(_PER_SECOND)}


def rates(finished: dict[int, int], begins: float, ends: float) -> dict[str, Any]:
    """Return what was finished from *begins* to *ends*, in seconds since the epoch."""
    within = [finished.get(second, 0) for second in range(int(begins), int(ends) + 1)]
    ordered = sorted(within)
    return {
        "all": sum(within),
        "of": sum(finished.values()),
        "mean": round(sum(within) / max(1.0, ends - begins), 1),
        "median": ordered[len(ordered) // 2],
        "best": ordered[-1],
        "seconds without any": bisect_right(ordered, 0),
    }
