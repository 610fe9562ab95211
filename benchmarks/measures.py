"""The measures: each returns a table, in which every figure is a median of several runs in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.peers import PGEBUS, RAW, SQLALCHEMY, Contender
from benchmarks.running import Arena, median, percentile


@dataclass
class Table:
    """What a measure has found: rows of figures, by name.

    Attributes:
        title: What was measured.
        columns: The names of the figures.
        rows: For each row its name and its figures; None where there is none.
        note: What one has to know to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, tuple[float | None, ...]]] = field(default_factory=list)
    note: str = ""

    def figure(self, row: str, column: str) -> float | None:
        """Return one figure."""
        found = dict(self.rows).get(row)
        return None if found is None else found[self.columns.index(column)]


@dataclass(frozen=True)
class Plan:
    """How much is measured: contenders, runs, and what the sizes are multiplied by."""

    contenders: tuple[Contender, ...]
    runs: int = 3
    scale: float = 1.0

    def size(self, events: int) -> int:
        """Return how many events to measure instead of *events*."""
        return max(200, int(events * self.scale))


def _in_turn(plan: Plan, names: list[str], once: Callable[[str], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Measure each of *names*, one after the other, several times; return the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(plan.runs):
        for name in names:
            found[name].append(once(name))
    return {name: {key: median([run[key] for run in runs]) for key in runs[0]} for name, runs in found.items()}


def _drained(arena: Arena, contender: Contender, dsn: str, events: int, **options: Any) -> dict[str, float]:
    """Drain, with fresh statistics, which some need; make sure that everything was handled exactly once."""
    arena.sql(dsn, "ANALYZE", "SELECT 1")
    result = arena.run(contender, "drain", dsn, events=events, **options)
    handled = result["distinct"]
    if result["calls"] != handled or handled < events or (handled > events and not options.get("first_of_many")):
        raise AssertionError(f"{contender.name} handled {handled} of {events} in {result['calls']} calls")
    return {"rate": handled / result["seconds"], "cpu": result["cpu"] * 10_000 / events, "peak": result["peak"]}


def drain(arena: Arena, plan: Plan) -> Table:
    """Events with handlers that do nothing: claimed and completed durably, by one process."""
    events = plan.size(20_000)
    by_name = {each.name: each for each in (*plan.contenders, RAW)}

    def once(name: str) -> dict[str, float]:
        contender = by_name[name]
        size = min(events, 5_000) if name == "procrastinate" else events  # it would take minutes
        with arena.database(contender) as dsn:
            arena.run(contender, "fill", dsn, events=size)
            return _drained(arena, contender, dsn, size)

    found = _in_turn(plan, list(by_name), once)
    table = Table(drain.__doc__ or "", ("drain /s", "CPU s per 10,000"))
    table.rows = [(name, (each["rate"], each["cpu"])) for name, each in found.items()]
    return table


def history(arena: Arena, plan: Plan) -> Table:
    """The drain of a group that keeps what it has completed, and of one that does not."""
    events = plan.size(40_000)

    def once(name: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            # Nothing is deleted as long as a pattern is new.
            arena.sql(dsn, "UPDATE pgebus.subscriptions SET backfilled_at = now()", "SELECT 1")
            arena.run(PGEBUS, "fill", dsn, events=events)
            before = arena.sql(dsn, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
            result = _drained(arena, PGEBUS, dsn, events, keep_history=name == "kept")
            written = arena.sql(dsn, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn") - before
            if (left := arena.sql(dsn, "SELECT count(*) FROM pgebus.deliveries")) != (events if name == "kept" else 0):
                raise AssertionError(f"{left} deliveries of {events} are left")
        return {**result, "wal": float(written) / events}

    found = _in_turn(plan, ["kept", "deleted"], once)
    table = Table(history.__doc__ or "", ("drain /s", "CPU s per 10,000", "WAL bytes per event"))
    table.rows = [(name, (each["rate"], each["cpu"], each["wal"])) for name, each in found.items()]
    return table


def transactional(arena: Arena, plan: Plan) -> Table:
    """Each event in a transaction of its own, with one UPDATE: ten at once, by one process."""
    events = plan.size(5_000)
    by_name = {each.name: each for each in (PGEBUS, SQLALCHEMY, RAW)}

    def once(name: str) -> dict[str, float]:
        with arena.database(by_name[name], business=True) as dsn:
            arena.run(RAW, "fill", dsn, events=events)
            result = _drained(arena, by_name[name], dsn, events, transactional=True)
            if (changed := arena.sql(dsn, "SELECT sum(value) FROM business")) != events:
                raise AssertionError(f"{name} changed {changed} of {events}")
            return result

    found = _in_turn(plan, list(by_name), once)
    table = Table(transactional.__doc__ or "", ("drain /s", "CPU s per 10,000"))
    table.rows = [(name, (each["rate"], each["cpu"])) for name, each in found.items()]
    return table


def publish(arena: Arena, plan: Plan) -> Table:
    """One event in each transaction, and many at once."""
    events = plan.size(4_000)
    by_name = {each.name: each for each in (*plan.contenders, RAW)}

    def once(name: str) -> dict[str, float]:
        contender = by_name[name]
        with arena.database(contender) as dsn:
            one = arena.run(contender, "publish", dsn, events=events // 2, connections=1)
            ten = arena.run(contender, "publish", dsn, events=events, connections=10)
            many = plan.size(5_000 if name in ("procrastinate", "oban") else 40_000)
            bulk = arena.run(contender, "fill", dsn, events=many)
        return {
            "one": events // 2 / one["seconds"],
            "ten": events / ten["seconds"],
            "bulk": many / bulk["seconds"],
        }

    found = _in_turn(plan, list(by_name), once)
    table = Table(publish.__doc__ or "", ("1 connection /s", "10 connections /s", "bulk /s"))
    table.rows = [(name, (each["one"], each["ten"], each["bulk"])) for name, each in found.items()]
    return table


def inside(arena: Arena, plan: Plan) -> Table:
    """Microseconds of one publish inside an open transaction of an AsyncSession, and of the same row otherwise."""
    events = plan.size(2_000)
    names = {"publish_event()": "publish", "session.add() and flush()": "add", "a Core INSERT": "insert"}

    def once(_: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            return {
                key: seconds * 1e6 / events for key, seconds in arena.run(PGEBUS, "inside", dsn, events=events).items()
            }

    found = _in_turn(plan, ["all"], once)["all"]
    table = Table(inside.__doc__ or "", ("µs", "of a Core INSERT's"))
    table.rows = [(name, (found[key], found[key] / found["insert"])) for name, key in names.items()]
    table.note = "publish_event() and add() return the row's defaults, which this Core INSERT does not ask for."
    return table


def notify(arena: Arena, plan: Plan) -> Table:
    """The same INSERT on ten connections, by when it notifies."""
    events = plan.size(8_000)
    body = "SELECT prosrc FROM pg_proc WHERE proname = 'fan_out'"
    condition = "WHERE EXISTS (SELECT FROM pgebus.workers w WHERE w.idle AND w.channel = q.channel)"
    ways = {"as it is, nobody sleeps": condition, "never": "WHERE false", "always": ""}

    def once(name: str) -> dict[str, float]:
        with arena.database(RAW) as dsn:
            changed = arena.sql(dsn, body).replace(condition, ways[name])
            settings = "SET search_path = pg_catalog, pg_temp SET enable_nestloop = off SET enable_seqscan = off"
            arena.sql(
                dsn,
                "CREATE OR REPLACE FUNCTION pgebus.fan_out() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
                f"{settings} AS $f$ {changed} $f$",
                "UPDATE pgebus.workers SET idle = false",
                "SELECT 1",
            )
            return {"rate": events / arena.run(RAW, "publish", dsn, events=events, connections=10)["seconds"]}

    found = _in_turn(plan, list(ways), once)
    table = Table(notify.__doc__ or "", ("10 connections /s",))
    table.rows = [(name, (each["rate"],)) for name, each in found.items()]
    return table


def latency(arena: Arena, plan: Plan) -> Table:
    """Milliseconds from the commit to the start of the handler, at 50 events a second."""
    events = plan.size(500)
    by_name = {each.name: each for each in (*plan.contenders, RAW)}

    def once(name: str) -> dict[str, float]:
        contender = by_name[name]
        with arena.database(contender) as dsn:
            listening = arena.start(contender, "listen", dsn, events=events)
            assert listening.stdout is not None
            if listening.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not get ready")
            time.sleep(1.0)
            committed = arena.run(contender, "trickle", dsn, events=events, per_second=50)["committed"]
            result = arena.result(listening)
        if result["calls"] != events:
            raise AssertionError(f"{name} handled {events} events in {result['calls']} calls")
        waits = [1_000 * (began - committed[number]) for number, began in result["began"].items()]
        return {"p50": percentile(waits, 0.5), "p99": percentile(waits, 0.99)}

    found = _in_turn(plan, list(by_name), once)
    table = Table(latency.__doc__ or "", ("p50 ms", "p99 ms"))
    table.note = "Counted from the moment when the publisher knows of its commit: a handler may have begun before."
    table.rows = [(name, (each["p50"], each["p99"])) for name, each in found.items()]
    return table


def _fill_with(state: str, events: int) -> list[str]:
    insert = (
        "INSERT INTO pgebus.events (type, priority, run_at, payload)"
        " SELECT {}, {}, {}, jsonb_build_object('n', n) FROM generate_series(1, {}) n"
    )
    known, later = "'order.placed'", "now() + interval '1 day'"
    finished = "UPDATE pgebus.deliveries SET status = 'completed', finished_at = now(), claim_seq = 1, attempt = 1"
    return {
        "an empty table": [],
        "finished": [insert.format(known, 0, "now()", events), finished],
        "for tomorrow": [insert.format(known, 0, later, events)],
        "for tomorrow, at all priorities": [insert.format(known, "n % 10", later, events)],
        "unhandled": [insert.format("'nobody.knows'", 0, "now()", events // 10)],
        "pending": [insert.format(known, 0, "now()", events)],
    }[state]


def scale(arena: Arena, plan: Plan) -> Table:
    """The drain of 20,000 by what else is in the tables: a million, or a hundred thousand unhandled."""
    events, million = plan.size(20_000), plan.size(1_000_000)
    states = ["an empty table", "finished", "for tomorrow", "for tomorrow, at all priorities", "unhandled", "pending"]

    def once(state: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            if statements := _fill_with(state, million):
                arena.sql(dsn, *statements, "SELECT 1")
                arena.sql(dsn, "VACUUM ANALYZE pgebus.deliveries", "VACUUM ANALYZE pgebus.events", "SELECT 1")
            if state == "pending":
                return _drained(arena, PGEBUS, dsn, events, first_of_many=True)
            arena.run(PGEBUS, "fill", dsn, events=events)
            return _drained(arena, PGEBUS, dsn, events)

    found = _in_turn(plan, states, once)
    empty = found["an empty table"]["rate"]
    table = Table(scale.__doc__ or "", ("drain /s", "of an empty table's"))
    table.rows = [(name, (each["rate"], each["rate"] / empty)) for name, each in found.items()]
    return table


def again(arena: Arena, plan: Plan) -> Table:
    """Ten drains one after another on one table, and ten with a transaction held open for all the time."""
    events = plan.size(20_000)

    def once(name: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            rates = []
            held = arena.start(RAW, "hold", dsn) if name == "a transaction is open" else None
            for _ in range(10):
                arena.run(PGEBUS, "fill", dsn, events=events)
                rates.append(_drained(arena, PGEBUS, dsn, events)["rate"])
            if held is not None:
                held.kill()
                held.wait()
        return {"first": median(rates[:2]), "last": median(rates[-2:])}

    found = _in_turn(plan, ["nothing is open", "a transaction is open"], once)
    table = Table(again.__doc__ or "", ("first two /s", "last two /s", "ratio"))
    table.rows = [(name, (each["first"], each["last"], each["last"] / each["first"])) for name, each in found.items()]
    return table


def pinned(arena: Arena, plan: Plan) -> Table:
    """A transaction held open for ten minutes, while 2,000 events a second are published and drained; measured once."""
    events, every, rounds = plan.size(20_000), 10.0, max(4, int(60 * plan.scale))
    with arena.database(PGEBUS) as dsn:
        rates = []
        held = arena.start(RAW, "hold", dsn)
        began = time.monotonic()
        for number in range(rounds):
            arena.run(PGEBUS, "fill", dsn, events=events)
            rates.append(_drained(arena, PGEBUS, dsn, events)["rate"])
            time.sleep(max(0.0, began + every * (number + 1) - time.monotonic()))
        held.kill()
        held.wait()
    table = Table(pinned.__doc__ or "", ("drain /s", "of the first two"))
    steps = {f"minute {minute}": rates[minute * 6 - 2 : minute * 6] for minute in range(1, rounds // 6 + 1)}
    table.rows = [
        (name, (median(each), median(each) / median(rates[:2])))
        for name, each in {"the first two": rates[:2], **steps}.items()
    ]
    return table


def payloads(arena: Arena, plan: Plan) -> Table:
    """Write-ahead log per delivery, claim and completion, by the size of the payload."""
    events = plan.size(2_000)

    def once(name: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            arena.run(PGEBUS, "fill", dsn, events=events, extra_bytes=int(name))
            arena.sql(dsn, "CHECKPOINT", "SELECT 1")
            before = arena.sql(dsn, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
            rate = _drained(arena, PGEBUS, dsn, events)["rate"]
            written = arena.sql(dsn, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn") - before
        return {"wal": float(written) / events, "rate": rate}

    found = _in_turn(plan, ["0", "50000"], once)
    table = Table(payloads.__doc__ or "", ("WAL bytes", "drain /s"))
    table.rows = [(f"{int(name) + 100:,} bytes", (each["wal"], each["rate"])) for name, each in found.items()]
    return table


def processes(arena: Arena, plan: Plan) -> Table:
    """Several worker processes on one table."""
    events = plan.size(40_000)

    def once(name: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            arena.run(PGEBUS, "fill", dsn, events=events)
            workers = [arena.start(PGEBUS, "share", dsn, events=events) for _ in range(int(name))]
            results = [arena.result(worker) for worker in workers]
            left = arena.sql(dsn, "SELECT count(*) FROM pgebus.deliveries WHERE status <> 'completed' OR attempt <> 1")
        handled = sum(result["calls"] for result in results)
        if handled != events or left:
            raise AssertionError(f"{handled} calls for {events} events, {left} not completed")
        seconds = max(result["ended"] for result in results) - min(result["began"] for result in results)
        return {"rate": events / seconds}

    found = _in_turn(plan, ["1", "2", "4"], once)
    table = Table(processes.__doc__ or "", ("drain /s",))
    table.rows = [
        (f"{name} processes" if name != "1" else "1 process", (each["rate"],)) for name, each in found.items()
    ]
    return table


def memory(arena: Arena, plan: Plan) -> Table:
    """The most memory of a worker by how much it drains."""
    sizes = [plan.size(20_000), plan.size(1_000_000)]

    def once(name: str) -> dict[str, float]:
        with arena.database(PGEBUS) as dsn:
            arena.run(PGEBUS, "fill", dsn, events=int(name), batch=5_000)
            return _drained(arena, PGEBUS, dsn, int(name))

    found = _in_turn(Plan(plan.contenders, 1, plan.scale), [str(size) for size in sizes], once)
    table = Table(memory.__doc__ or "", ("peak MiB", "drain /s"))
    table.rows = [(f"{int(name):,} events", (each["peak"], each["rate"])) for name, each in found.items()]
    table.note = "What the benchmark itself remembers of each event, to find what was lost or doubled, is in it."
    return table


MEASURES: Final[dict[str, Callable[[Arena, Plan], Table]]] = {
    each.__name__: each
    for each in (
        drain,
        history,
        transactional,
        publish,
        inside,
        notify,
        latency,
        scale,
        again,
        pinned,
        payloads,
        processes,
        memory,
    )
}
