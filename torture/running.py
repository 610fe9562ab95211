"""One run: publish and handle under faults, heal, drain, stop, compare."""

from __future__ import annotations

import asyncio
import os
import platform
import re
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import monotonic, time
from typing import Any, Final

import asyncpg
from tests.embedded import version as postgres_version

from torture.checker import check
from torture.crew import Crew
from torture.nemesis import Nemesis
from torture.plan import Fault, schedule
from torture.proxy import Proxy
from torture.publishing import Errand
from torture.reading import marks_of, per_second, quantile, rates, read_history, recovery_seconds
from torture.report import Report
from torture.server import DATABASE, Server
from torture.tables import RULES
from torture.tally import Tally
from torture.working import DATABASE_ERRORS, NOT_STARTED, Duty

WORKERS: Final = 4
PUBLISHERS: Final = 3
SLOTS: Final = WORKERS + PUBLISHERS
# Those through the first proxy and the second one; the others use the unix socket.
_WORKERS_BEHIND: Final = (1, 3)
_PUBLISHERS_BEHIND: Final = (1,)
# What is left is stuck when so long nothing was finished.
STUCK_SECONDS: Final = 40.0
# Publishers wait while more deliveries than that for each event of the run are due: most of them are to be handled
# under faults.
BACKLOG: Final = 0.3
_GAUGE_SECONDS: Final = 0.5
_DUE: Final = "SELECT count(*) FROM pgebus.deliveries WHERE status = 'pending'"
_UNFINISHED: Final = (
    "SELECT count(*) FROM pgebus.deliveries WHERE status IN ('pending', 'blocked', 'running', 'unhandled')"
)


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        events: How many events publishers get confirmed.
        seed: Decides the faults and the choices.
        seconds: In how long they are to be published.
        at_most: After how many seconds publishing ends all the same, with fewer events.
        command: What was typed.
        home: Where ledgers, logs and counters are kept.
    """

    events: int
    seed: int
    seconds: float
    at_most: float
    command: str
    home: Path


async def run(options: Options, server: Server) -> Report:
    """Do the whole run; return what it has shown."""
    report = Report(options.command, options.seed, _versions(), options.events)
    faults = schedule(options.seed, options.events)
    if server.disk.why_not is not None:
        report.excused.append("disk_errors")
        report.notes.append(f"The disk was never full: {server.disk.why_not}.")
    tally = Tally(options.home / "tally", SLOTS)
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(server.socket)) for _ in range(2)]
        duties, errands = _orders(options, server, proxies)
        crew = Crew(duties, errands, tally)
        stack.callback(crew.end)
        nemesis = Nemesis(server, crew, proxies, tally)
        async with asyncio.timeout(min(options.at_most, 10 * options.seconds) + 600):
            gauge = asyncio.create_task(_gauge(server, tally, options.events * BACKLOG), name="gauge")
            try:
                times = await _play(crew, nemesis, faults, options.events, server)
            finally:
                gauge.cancel()
        codes = await crew.stop()
        marks = {**nemesis.marks, **{name: tally.total(name) for name in ("refused", "departed", "reconnects")}}
        crew.end()
    left = {
        "workers that did not stop well": sum(code != 0 for code in codes),
        "workers that ended by themselves": crew.unexpected.total() - crew.unexpected[NOT_STARTED],
        "workers too slow to stop": crew.slow_stops,
        "alarms in the logs of workers": tally.total("alarms"),
        "deadlocks in the log of the server": server.log().count("deadlock detected"),
    }
    sql = await asyncpg.connect(server.url(), server_settings={"application_name": "torture-reader"})
    try:
        history, ways, marks["rolled_back"] = await read_history(sql, options.home, PUBLISHERS, left)
        finished = await per_second(sql)
    finally:
        await sql.close()
    (options.home / "faults.log").write_text("\n".join(nemesis.log) + "\n")
    seconds = (f"{second - times['began']:.0f} {count}" for second, count in finished.items())
    (options.home / "finished.log").write_text("\n".join(seconds) + "\n")
    marks["disk_errors"] = server.log().count("No space left on device")
    report.marks = {**marks, **marks_of(history)}
    report.events = min(options.events, tally.total("published"))
    report.planned = dict(nemesis.begun)
    report.skipped = dict(nemesis.skipped)
    report.ways = dict(ways.most_common())
    report.outcomes = dict(Counter(str(unit.outcome) for unit in history.units))
    report.counts = {
        name: len(getattr(history, name)) for name in ("business", "events", "deliveries", "effects", "starts")
    }
    report.rates = rates(finished, times["began"], times["published"])
    report.seconds = {
        "publishing under faults": round(times["published"] - times["began"], 1),
        "healing": round(times["healed"] - times["published"], 1),
        "draining": round(times["drained"] - times["healed"], 1),
    }
    first, everything = recovery_seconds(history, nemesis.held)
    report.recovery = {
        "the first of a worker's deliveries": _quantiles(first),
        "each of them": _quantiles(everything),
        "held by a killed worker": _quantiles(sorted(Counter(each.killed_at for each in nemesis.held).values())),
        "restarts of PostgreSQL took": _quantiles(sorted(nemesis.restart_seconds)),
        "graceful stops took": _quantiles(sorted(crew.stop_seconds)),
    }
    if refused := crew.unexpected.get(NOT_STARTED):
        report.notes.append(
            f"{refused:4} starts of a worker failed, because PostgreSQL was down; it was started again."
        )
    report.violations = check(history, RULES)
    return report


def _orders(options: Options, server: Server, proxies: list[Proxy]) -> tuple[list[Duty], list[Errand]]:
    direct = server.url()
    ways = [f"postgresql://{server.postgres.user}@127.0.0.1:{proxy.port}/{DATABASE}" for proxy in proxies]
    home = str(options.home)
    duties = [
        Duty(slot, SLOTS, ways[0] if slot in _WORKERS_BEHIND else direct, options.seed, home) for slot in range(WORKERS)
    ]
    begins, quota = monotonic(), -(-options.events // PUBLISHERS)
    errands = [
        Errand(
            number,
            WORKERS + number - 1,
            SLOTS,
            ways[1] if number in _PUBLISHERS_BEHIND else direct,
            options.seed,
            home,
            quota,
            begins,
            options.seconds,
            options.at_most,
        )
        for number in range(1, PUBLISHERS + 1)
    ]
    return duties, errands


async def _play(crew: Crew, nemesis: Nemesis, faults: list[Fault], events: int, server: Server) -> dict[str, float]:
    """Return when what was over, in seconds since the epoch."""
    await crew.begin()
    times = {"began": time()}
    breaking = asyncio.create_task(nemesis.run(faults, events), name="nemesis")
    try:
        await _while_working(crew.run(), breaking)
        times["published"] = time()
        nemesis.enough.set()
        keeping = asyncio.create_task(crew.keep(), name="keeper")
        await _while_working(breaking, keeping)
        await nemesis.heal()
        times["healed"] = time()
        await _drain(server)
        times["drained"] = time()
    finally:
        breaking.cancel()
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    return times


async def _gauge(server: Server, tally: Tally, limit: float) -> None:
    """Let publishers wait while too much is due, until cancelled."""
    while True:
        with suppress(*DATABASE_ERRORS):
            async with asyncio.timeout(10):
                sql = await asyncpg.connect(server.url(), server_settings={"application_name": "gauge-reader"})
            try:
                while True:
                    waiting = await sql.fetchval(_DUE, timeout=10)
                    for slot in range(WORKERS, SLOTS):
                        tally.set(slot, "wait", waiting > limit)
                    await asyncio.sleep(_GAUGE_SECONDS)
            finally:
                sql.terminate()
        await asyncio.sleep(_GAUGE_SECONDS)


async def _while_working(awaited: Any, other: asyncio.Task[Any]) -> None:
    """Wait for *awaited*, unless *other* fails meanwhile."""
    task = asyncio.ensure_future(awaited)
    await asyncio.wait([task, other], return_when=asyncio.FIRST_COMPLETED)
    if other.done() and not task.done() and (other.cancelled() or other.exception()):
        task.cancel()
        other.result()
    await task


async def _drain(server: Server) -> None:
    """Wait until nothing is left to do, or nothing is done any more."""
    sql = await asyncpg.connect(server.url(), server_settings={"application_name": "torture-drain-reader"})
    try:
        least, since = await sql.fetchval(_UNFINISHED), monotonic()
        while least and monotonic() - since < STUCK_SECONDS:
            await asyncio.sleep(0.2)
            left = await sql.fetchval(_UNFINISHED)
            if left < least:
                least, since = left, monotonic()
    finally:
        await sql.close()


def _quantiles(values: list[Any]) -> dict[str, float]:
    found = {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "most": quantile(values, 1.0)}
    return {"of": len(values), **{name: round(value, 2) for name, value in found.items() if value is not None}}


def _versions() -> dict[str, str]:
    postgres = re.search(r"\d+(\.\d+)?", postgres_version())
    return {
        "pgebus": metadata.version("pgebus"),
        "PostgreSQL": postgres.group() if postgres else "?",
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in ("SQLAlchemy", "asyncpg")},
        "cores": str(os.cpu_count()),
    }
