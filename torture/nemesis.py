"""Lets go wrong what is planned, and counts what has hit."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic, time
from typing import Final, NamedTuple, TypeVar

import asyncpg

from torture.crew import Child, Crew
from torture.plan import Fault
from torture.proxy import Cut, Proxy
from torture.server import Server
from torture.tally import Tally
from torture.working import GRACE_SECONDS

_T = TypeVar("_T")
# The share of kills that wait for a handler; the others come whenever they come.
AIMED: Final = 0.7
# PostgreSQL starts, or restarts, or is frozen; the nemesis is as patient as anybody.
_DATABASE_ERRORS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)

_AIMS: Final = {
    "backend": "application_name LIKE 'torture-%' AND application_name <> 'torture-nemesis'",
    "backend-listen": "pid IN (SELECT backend_pid FROM pgebus.workers WHERE ended_at IS NULL)",
    "backend-claim": "application_name LIKE 'torture-worker-%' AND query LIKE '%SKIP LOCKED%'",
    "backend-handler": (
        "application_name LIKE 'torture-worker-%' AND xact_start IS NOT NULL"
        " AND (query LIKE '%effects%' OR query LIKE '%balances%' OR query LIKE '%pg_sleep%')"
    ),
}
_TARGETS: Final = """
SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database() AND ({}) ORDER BY pid"""
_HELD: Final = """
SELECT event_id, consumer_group, claim_seq FROM pgebus.deliveries
WHERE status = 'running' AND worker_id IN (SELECT id FROM pgebus.workers WHERE pid = $1)"""


class Held(NamedTuple):
    """A delivery that a killed worker held.

    Attributes:
        killed_at: When, in seconds since the epoch.
        event_id: The event.
        group: The group.
        claim_seq: The claim that died.
    """

    killed_at: float
    event_id: int
    group: str
    claim_seq: int


class Nemesis:
    """Breaks things.

    Args:
        server: PostgreSQL.
        crew: The processes.
        proxies: The ways of those that have one.
        tally: What workers count.

    Attributes:
        marks: What has hit, by the names of `plan.MARKS`.
        held: What killed workers held.
        begun: Faults that were tried, by kind.
        skipped: Faults that found no target.
        log: One line for each fault.
        enough: Set when nothing is published any more.
    """

    def __init__(self, server: Server, crew: Crew, proxies: Sequence[Proxy], tally: Tally) -> None:
        self.marks: Counter[str] = Counter()
        self.held: list[Held] = []
        self.begun: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.enough = asyncio.Event()
        self.log: list[str] = []
        self.restart_seconds: list[float] = []
        self._server = server
        self._crew = crew
        self._proxies = proxies
        self._tally = tally
        self._began = monotonic()
        self._long: set[asyncio.Task[None]] = set()
        self._sql: asyncpg.Connection[asyncpg.Record] | None = None
        self._up = asyncio.Lock()  # held while PostgreSQL is down on purpose
        # A server that has crashed may not come up while its disk is full, and no frozen one can be stopped.
        self._one_at_a_time = asyncio.Lock()

    async def run(self, faults: Sequence[Fault], events: int) -> None:
        """Let *faults* happen, each when its share of *events* has been published; return when all have begun.

        Ends early when nothing is published any more.
        """
        self._began = monotonic()
        for fault in faults:
            await self._until(partial(self._reached, fault.at * events))
            if self.enough.is_set():
                return
            self.begun[fault.kind] += 1
            await self._happen(fault)

    async def heal(self) -> None:
        """Wait for what still lasts, and break nothing any more."""
        await asyncio.gather(*self._long)
        for proxy in self._proxies:
            proxy.disarm()
        for proxy in self._proxies:
            self.marks["commits_cut_before"] += proxy.cuts["before"]
            self.marks["commits_cut_after"] += proxy.cuts["after"]
        if self._sql is not None:
            self._sql.terminate()

    async def _happen(self, fault: Fault) -> None:
        what = {
            "kill": self._kill,
            "kill-publisher": self._kill_publisher,
            "term": self._term,
            "zombie": self._zombie,
            "crash": self._crash,
            "pause": self._pause,
            "cut": self._cut,
            "hole": self._hole,
            "disk": self._disk,
        }.get(fault.kind)
        if what is not None:
            await self._note(fault, what(fault.roll))
        elif fault.kind.startswith("commit-"):
            how: Cut = "before" if fault.kind == "commit-before" else "after"
            proxy = _choose(self._proxies, fault.roll)
            proxy.cut_commit(how)
            self._say(fault, f"proxy {self._proxies.index(proxy)}")
        else:
            await self._note(fault, self._terminate(_AIMS[fault.kind], fault.roll))

    async def _note(self, fault: Fault, happening: Awaitable[str | None]) -> None:
        said = await happening
        if said is None:
            self.skipped[fault.kind] += 1
        self._say(fault, said or "no target")

    def _say(self, fault: Fault, what: str) -> None:
        self.log.append(f"{monotonic() - self._began:8.2f} s, {fault.at:6.1%}: {fault.kind}: {what}")

    def _lasting(self, coroutine: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await coroutine()

        task = asyncio.get_running_loop().create_task(run(), name="lasting fault")
        self._long.add(task)

    async def _until(self, holds: Callable[[], object], within: float = float("inf")) -> None:
        """Wait until something holds, or for so many seconds."""
        until = monotonic() + within
        while not holds() and monotonic() < until:
            await asyncio.sleep(0.001 if within < float("inf") else 0.01)

    def _reached(self, events: float) -> bool:
        return self.enough.is_set() or self._tally.total("published") >= events

    def _ready(self) -> list[Child]:
        return [child for child in self._victims(self._crew.workers) if child.ready]

    def _victims(self, children: Sequence[Child]) -> list[Child]:
        return [child for child in children if child.alive and not (child.frozen or child.expected)]

    async def _kill(self, roll: float) -> str | None:
        await self._until(self._ready, within=2.0)
        if not (ready := self._ready()):
            return None
        child = _choose(ready, roll)
        slot, pid = self._crew.workers.index(child), child.pid
        if roll * 1000 % 1 < AIMED:
            await self._until(lambda: self._tally.inside(slot), within=0.5)
            if child not in self._ready():
                return None
        child.kill()
        at, inside = time(), self._tally.inside(slot)
        self.marks["kills"] += 1
        self.marks["kills_inside"] += inside > 0
        rows = await self._ask(lambda sql: sql.fetch(_HELD, pid)) or []
        self.held += [Held(at, *row) for row in rows]
        return f"worker {slot}, {inside} handlers inside, {len(rows)} deliveries held"

    async def _kill_publisher(self, roll: float) -> str | None:
        running = self._victims(self._crew.publishers)
        if not running:
            return None
        child = _choose(running, roll)
        child.kill()
        self.marks["publisher_kills"] += 1
        return f"publisher {self._crew.publishers.index(child) + 1}"

    async def _term(self, roll: float) -> str | None:
        if not (ready := self._ready()):
            return None
        child = _choose(ready, roll)

        async def stop() -> None:
            self.marks["graceful"] += await self._crew.stop_one(child)

        self._lasting(stop)
        return f"worker {self._crew.workers.index(child)}"

    async def _zombie(self, roll: float) -> str | None:
        await self._until(lambda: len(self._ready()) > 1, within=2.0)
        if len(ready := self._ready()) < 2:  # somebody has to be there who takes over
            return None
        child = _choose(ready, roll)
        slot, pid = self._crew.workers.index(child), child.pid
        await self._until(lambda: self._tally.inside(slot), within=0.5)
        if child not in self._ready():
            return None
        child.frozen = True
        child.signal(signal.SIGSTOP)
        inside = self._tally.inside(slot)

        async def thaw() -> None:
            end = "SELECT pg_terminate_backend(backend_pid) FROM pgebus.workers WHERE pid = $1 AND ended_at IS NULL"
            await self._ask(lambda sql: sql.fetch(end, pid))
            await asyncio.sleep(GRACE_SECONDS + 2.5 + 3 * roll)
            child.signal(signal.SIGCONT)
            child.frozen = False
            self.marks["zombies"] += 1

        self._lasting(thaw)
        return f"worker {slot}, {inside} handlers inside"

    async def _terminate(self, aim: str, roll: float) -> str | None:
        until = monotonic() + 0.5
        while not (rows := await self._ask(lambda sql: sql.fetch(_TARGETS.format(aim)))):
            if monotonic() > until:
                return None
            await asyncio.sleep(0.01)
        pid, name = _choose(rows, roll)
        ended = await self._ask(lambda sql: sql.fetchval("SELECT pg_terminate_backend($1)", pid))
        self.marks["backends"] += bool(ended)
        return f"backend {pid} of {name}"

    async def _crash(self, _roll: float) -> str | None:
        async with self._one_at_a_time, self._up:
            inside = self._tally.all_inside()
            began = monotonic()
            await asyncio.to_thread(self._server.crash)
            took = monotonic() - began
            self.restart_seconds.append(took)
        self.marks["restarts"] += 1
        self.marks["restarts_inside"] += inside > 0
        return f"{inside} handlers inside; back after {took:.2f} s"

    async def _pause(self, roll: float) -> str | None:
        async def pause() -> None:
            async with self._one_at_a_time, self._up:
                pids = self._server.processes()
                self._server.pause(pids)
                try:
                    await asyncio.sleep(1 + 2 * roll)
                finally:
                    self._server.resume(pids)
            self.marks["pauses"] += 1

        self._lasting(pause)
        return f"for {1 + 2 * roll:.1f} s"

    async def _cut(self, roll: float) -> str | None:
        proxy = _choose(self._proxies, roll)
        links = proxy.reset()
        self.marks["cuts"] += links > 0
        self.marks["links_cut"] += links
        return f"proxy {self._proxies.index(proxy)}, {links} connections" if links else None

    async def _hole(self, roll: float) -> str | None:
        proxy = _choose(self._proxies, roll)
        links = proxy.freeze()

        async def end() -> None:
            await asyncio.sleep(4 + 8 * roll)
            proxy.reset()

        self._lasting(end)
        self.marks["holes"] += links > 0
        return f"proxy {self._proxies.index(proxy)}, {links} connections, for {4 + 8 * roll:.1f} s"

    async def _disk(self, roll: float) -> str | None:
        disk = self._server.disk
        if disk.why_not is not None:
            return None

        async def full() -> None:
            async with self._one_at_a_time:
                await asyncio.to_thread(disk.fill)
                try:
                    await asyncio.sleep(3 + 3 * roll)
                finally:
                    await asyncio.to_thread(disk.empty)
            self.marks["disk_full"] += 1

        self._lasting(full)
        return f"for {3 + 3 * roll:.1f} s"

    async def _ask(self, question: Callable[[asyncpg.Connection[asyncpg.Record]], Awaitable[_T]]) -> _T | None:
        """Ask PostgreSQL; None where it does not answer just now."""
        async with self._up:
            with suppress(*_DATABASE_ERRORS):
                async with asyncio.timeout(5):
                    if self._sql is None or self._sql.is_closed():
                        self._sql = await asyncpg.connect(
                            self._server.url(), server_settings={"application_name": "torture-nemesis"}
                        )
                    return await question(self._sql)
        return None


def _choose(targets: Sequence[_T], roll: float) -> _T:
    return targets[int(roll * len(targets)) % len(targets)]
