"""The LISTEN connection: wake-ups with it, order without it, and what cannot be one."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Literal

import pytest
from sqlalchemy import text

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    SessionlessConnectionError,
)
from pgebus._runtime import claiming, listening, maintenance
from pgebus._runtime.store import Line
from tests.conftest import Server
from tests.system.bus import Sql, backfilled, delivery, finished, publish, rounds, settings
from tests.system.faults import (
    EFFECTS,
    backends,
    effects,
    failed,
    healthy,
    name_of,
    no_backend_of,
    no_longer,
    record,
    tasks_of_ours,
    worker,
)
from tests.system.proxy import Proxy, TransactionPooler
from tests.system.waiting import until

# Polling finds nothing within a test's patience: whatever is handled was found in another way.
DEAF = {"poll_interval_seconds": 60.0}


class Handled:
    """A handler that notes when it was called."""

    def __init__(self) -> None:
        self.router = EventRouter()
        self.at: dict[int, float] = {}
        self.router.on("order.placed", name="note")(self.note)

    async def note(self, ctx: EventContext, payload: dict[str, Any]) -> None:
        self.at[ctx.event_id] = monotonic()

    async def wait_for(self, event_id: int, within: float = 10.0) -> float:
        """Wait until an event was handled; return when."""

        async def check() -> bool:
            return event_id in self.at

        await until(check, within)
        return self.at[event_id]


class Gate:
    """A handler that waits inside, transactional or not."""

    def __init__(self, *, transactional: bool = False) -> None:
        self.router = EventRouter()
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.cancelled = False
        self.router.on("order.placed", name="gate", transactional=transactional)(self.pass_through)

    async def pass_through(self, ctx: EventContext, payload: dict[str, Any]) -> None:
        if ctx.session is not None:
            await record(ctx, 1)
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.fixture
async def proxy(database: DatabaseSettings) -> AsyncIterator[Proxy]:
    async with Proxy(database.sqlalchemy_url()) as proxy:
        yield proxy


def listening_through(database: DatabaseSettings, url: str) -> DatabaseSettings:
    given = database.model_dump(exclude_unset=True, by_alias=True)
    return DatabaseSettings.model_validate({**given, "listen_url": url})


async def asleep(sql: Sql, workers: int = 1) -> None:
    """Wait until that many workers have nothing to do, and want to be woken."""

    async def check() -> bool:
        return bool(await sql.fetchval("SELECT count(*) = $1 FROM pgebus.workers WHERE idle", workers))

    await until(check)


async def only_worker(sql: Sql) -> dict[str, Any]:
    rows = await sql.fetch("SELECT * FROM pgebus.workers WHERE ended_at IS NULL")
    assert len(rows) == 1, rows
    return dict(rows[0])


async def test_a_sleeping_worker_is_woken_by_the_commit(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    handled = Handled()
    seconds = []
    async with worker(handled.router, database, **DEAF):
        await asleep(sql)
        for _ in range(20):
            event_id = await publish(sm, "order.placed")
            committed = monotonic()
            seconds.append(await handled.wait_for(event_id) - committed)
    # A few milliseconds on an idle machine; the bound only tells a wake-up from a poll.
    assert statistics.median(seconds) < 1.0


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_publisher_that_began_before_the_worker_slept_is_found_by_the_looks_after_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, isolation_level: str
) -> None:
    """What a publisher commits without a wake-up is found after as much time again as the worker has been idle."""
    handled = Handled()
    async with worker(handled.router, database):
        pass  # it leaves its subscription: without one, this would be an event for nobody
    async with sm.session() as session:
        await session.connection(execution_options={"isolation_level": isolation_level})
        # The trigger looks at the workers now, and sees none.
        await session.execute(
            text("INSERT INTO pgebus.events (type, payload) VALUES ('order.placed', '{\"early\": true}')")
        )
        event_id = await session.scalar(text("SELECT max(id) FROM pgebus.events"))
        async with worker(handled.router, database, **DEAF):
            began = monotonic()
            await asleep(sql)
            await session.commit()
            committed = monotonic()
            assert event_id is not None
            found = await handled.wait_for(event_id)
    assert found - committed < 1.25 * (committed - began) + 0.5


async def test_when_every_notification_is_lost_polling_finds_the_event(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    handled = Handled()
    async with worker(
        handled.router, listening_through(database, proxy.text_url()), poll_interval_seconds=0.5
    ) as system:
        await asleep(sql)
        proxy.hidden.add(b"A")
        for _ in range(3):
            event_id = await publish(sm, "order.placed")
            committed = monotonic()
            assert await handled.wait_for(event_id) - committed < 0.5 + 0.5
        assert system.health().ok


async def test_a_worker_without_its_listener_claims_nothing_and_comes_back_as_itself(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    """While others may take its deliveries back it takes none; what it runs goes on, and counts."""
    gate, handled = Gate(), Handled()
    gate.router.on("order.checked", name="note")(handled.note)
    async with worker(gate.router, listening_through(database, proxy.text_url()), **DEAF) as system:
        before = await only_worker(sql)
        first = await publish(sm, "order.placed")
        await asyncio.wait_for(gate.entered.wait(), 10)
        proxy.refusing = True
        await sql.execute("SELECT pg_terminate_backend($1)", before["backend_pid"])
        await no_longer(system)

        second = await publish(sm, "order.checked")
        gate.opened.set()
        await finished(sql, first)
        assert not gate.cancelled
        # Time enough for a claim: the completion above made the claim loop look.
        assert (await delivery(sql, second))["status"] == "pending"
        assert not system.health().present

        proxy.refusing = False
        await finished(sql, second)
        await healthy(system)
        after = await only_worker(sql)
        assert after["id"] == before["id"]
        assert after["backend_pid"] != before["backend_pid"]

        await asleep(sql)
        third = await publish(sm, "order.checked")
        committed = monotonic()
        assert await handled.wait_for(third) - committed < 1.0


async def test_a_listener_that_is_terminated_is_back_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    handled = Handled()
    async with worker(handled.router, database, **DEAF) as system:
        for _ in range(3):
            before = await only_worker(sql)
            await asleep(sql)
            await sql.execute("SELECT pg_terminate_backend($1)", before["backend_pid"])
            event_id = await publish(sm, "order.placed")
            committed = monotonic()
            assert await handled.wait_for(event_id) - committed < 3.0
            await healthy(system)
            assert (await only_worker(sql))["id"] == before["id"]


async def test_what_is_published_just_before_a_new_connection_listens_is_found(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks before it listens, and not after it, misses what comes in between."""
    monkeypatch.setattr(claiming, "next_look", lambda _idle_for, poll_interval: poll_interval)
    handled = Handled()
    async with worker(handled.router, listening_through(database, proxy.text_url()), **DEAF):
        await asleep(sql)
        held, go_on = proxy.hold_at(b"LISTEN")
        await sql.execute("SELECT pg_terminate_backend($1)", (await only_worker(sql))["backend_pid"])
        await asyncio.wait_for(held.wait(), 10)
        await rounds(sql)  # time enough for a look that comes too early
        event_id = await publish(sm, "order.placed")
        go_on.set()
        await handled.wait_for(event_id)


@pytest.mark.usefixtures("impatient")
async def test_a_worker_cut_off_longer_than_the_grace_gives_its_deliveries_up(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    """The delivery is finished by another worker; the first one's handler is cancelled when it learns of it."""
    await sql.execute(EFFECTS)
    gate, other = Gate(transactional=True), Gate(transactional=True)
    other.opened.set()
    patience = {"recovery_grace_seconds": 0.5, **DEAF}
    async with worker(gate.router, listening_through(database, proxy.text_url()), **patience) as cut_off:
        ended = (await only_worker(sql))["id"]
        event_id = await publish(sm, "order.placed")
        await asyncio.wait_for(gate.entered.wait(), 10)
        async with worker(other.router, database, **patience) as rescuer:
            # The rescuer must have seen the lock held: a server that has just started is given more time.
            await rounds_of(rescuer, sql, 2)
            proxy.refusing = True
            proxy.reset()
            await finished(sql, event_id)
            assert not gate.cancelled
            assert await sql.fetchval("SELECT ended_at IS NOT NULL FROM pgebus.workers WHERE id = $1", ended)
        proxy.refusing = False

        async def told() -> bool:
            return gate.cancelled

        await until(told)
        await healthy(cut_off)
        assert (await only_worker(sql))["id"] != ended
        assert (await effects(sql))[1] == 1
        row = await delivery(sql, event_id)
        assert (row["status"], row["attempt"], row["claim_seq"], row["lost"]) == ("completed", 2, 2, 1)
        # The new one works.
        gate.opened.set()
        again = await publish(sm, "order.placed")
        await finished(sql, again)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look for dead ones more often than every second."""
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.1)


async def rounds_of(system: EventSystem, sql: Sql, rounds: int) -> None:
    """Wait until a worker has looked for dead ones that often."""
    line = system._loops["maintain"]  # the original: health() returns a copy
    for _ in range(rounds):
        line.ok = False

        async def looked() -> bool:
            return line.ok

        await until(looked)


@pytest.mark.usefixtures("impatient")
async def test_a_listener_that_is_back_within_the_grace_loses_nothing(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    gate, other = Gate(), Gate()
    async with (
        worker(
            gate.router, listening_through(database, proxy.text_url()), recovery_grace_seconds=30.0, **DEAF
        ) as first,
    ):
        before = await only_worker(sql)
        event_id = await publish(sm, "order.placed")
        await asyncio.wait_for(gate.entered.wait(), 10)
        async with worker(other.router, database, recovery_grace_seconds=30.0, **DEAF) as rescuer:
            proxy.refusing = True
            proxy.reset()
            await rounds_of(rescuer, sql, 2)
            proxy.refusing = False
            await healthy(first)
            await rounds_of(rescuer, sql, 1)
            gate.opened.set()
            await finished(sql, event_id)
        assert not gate.cancelled
        assert not other.entered.is_set()
        assert (await only_worker(sql))["id"] == before["id"]
        row = await delivery(sql, event_id)
        assert (row["attempt"], row["claim_seq"], row["lost"]) == (1, 1, 0)


async def test_a_half_open_listener_is_noticed_and_its_ghost_ended(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy
) -> None:
    """The server goes on to hold the lock for a client that is gone: the worker ends its own former backend."""
    handled = Handled()
    async with worker(handled.router, listening_through(database, proxy.text_url()), **DEAF) as system:
        before = await only_worker(sql)
        await asleep(sql)
        proxy.freeze()
        began = monotonic()
        noticed = await failed(system, "listen")
        assert noticed <= listening.BEAT_SECONDS + listening.ANSWER_SECONDS + 1.0
        event_id = await publish(sm, "order.placed")
        await handled.wait_for(event_id, within=5.0)
        assert monotonic() - began < 15.0
        await healthy(system)
        after = await only_worker(sql)
        assert after["id"] == before["id"]
        assert not await sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", before["backend_pid"])


Hole = Literal["swallowed notifications", "transaction pooler", "another database", "another migrated database"]


@pytest.mark.parametrize(
    "hole", ["swallowed notifications", "transaction pooler", "another database", "another migrated database"]
)
async def test_a_listen_connection_that_keeps_no_session_is_refused(
    database: DatabaseSettings,
    empty_database: DatabaseSettings,
    server: Server,
    template: str,
    sql: Sql,
    proxy: Proxy,
    hole: Hole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "ANSWER_SECONDS", 0.5)
    url = database.sqlalchemy_url()
    other = empty_database.sqlalchemy_url()
    if hole == "another migrated database":
        await server.execute(
            f'DROP DATABASE "{other.database}"', f'CREATE DATABASE "{other.database}" TEMPLATE "{template}"'
        )
    proxy.hidden.add(b"A")
    async with TransactionPooler(url) as pooler:
        listen_url = {
            "swallowed notifications": proxy.text_url(),
            "transaction pooler": pooler.text_url(),
        }.get(hole, other.render_as_string(hide_password=False))
        refused = listening_through(database, listen_url).model_copy(update={"application_name": "refused"})
        system = EventSystem(Handled().router, settings(refused))
        with pytest.raises(SessionlessConnectionError, match="listen_url"):
            await system.start()
        assert not tasks_of_ours()
    await no_backend_of(database, "refused")
    await no_backend_of(empty_database, "refused")


async def test_a_connection_that_is_lost_while_it_is_proved_is_made_again_and_not_called_a_pooler(
    database: DatabaseSettings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the connection its lock is gone, which looks like a pooler's session; only the connection can tell."""
    asked: list[int] = []
    ask = Line.value

    async def cut_off_first(line: Line, statement: str, *args: Any) -> Any:
        if "pg_locks" in statement and not asked:
            pid = args[1]
            asked.append(pid)
            await sql.execute("SELECT pg_terminate_backend($1)", pid)
            await until(lambda: sql.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid))
        return await ask(line, statement, *args)

    monkeypatch.setattr(Line, "value", cut_off_first)
    async with worker(Handled().router, database) as system:
        assert system.health().ok
    assert asked


async def test_everything_the_listener_opened_is_closed_by_a_stop(
    database: DatabaseSettings, sql: Sql, proxy: Proxy
) -> None:
    async with worker(Handled().router, listening_through(database, proxy.text_url())) as system:
        assert len(await backends(sql, name_of(system))) >= 1
        assert len(proxy) == 1

    async def closed() -> bool:
        return len(proxy) == 0

    await until(closed)


async def test_a_connection_that_goes_deaf_while_it_is_made_is_given_up(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement is waited for without end, not even those that the driver and SQLAlchemy send by themselves."""
    monkeypatch.setattr(listening, "ANSWER_SECONDS", 0.3)
    handled = Handled()
    deaf = proxy.cut_at(b"pg_catalog.version()", "freeze")
    async with worker(handled.router, listening_through(database, proxy.text_url()), **DEAF) as system:
        assert deaf.is_set()
        assert system.health().ok
        event_id = await publish(sm, "order.placed")
        await handled.wait_for(event_id)
        proxy.reset()  # for the server the silent connection is still there
        await healthy(system)


async def test_a_publisher_that_saw_no_flag_is_found_after_as_much_time_again(
    database: DatabaseSettings, sql: Sql, another: Sql
) -> None:
    """Its snapshot is older than the flag, so it notifies nobody; the looks of an idle worker are close at first."""
    handled: asyncio.Queue[float] = asyncio.Queue()
    router = EventRouter()

    @router.on("late")
    async def handle(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        handled.put_nowait(monotonic())

    async with EventSystem(router, settings(database)):
        await backfilled(sql)  # the snapshot is to know the subscription, and nothing is to be made up for
    heard: list[object] = []
    await sql.add_listener("events", lambda *_: heard.append(1))
    async with another.transaction(isolation="repeatable_read"):
        await another.fetchval("SELECT count(*) FROM pgebus.workers")  # the snapshot
        system = EventSystem(router, settings(database))  # which polls every 30 seconds
        await system.start()
        await until(lambda: sql.fetchval("SELECT bool_or(idle) FROM pgebus.workers"))
        idle_since = monotonic()
        await rounds(sql)  # it has looked once more since
        heard.clear()
        await another.execute("INSERT INTO pgebus.events (type) VALUES ('late')")
    committed = monotonic()
    async with asyncio.timeout(10):
        began = await handled.get()
    await system.stop()
    assert not heard
    assert began - committed <= (committed - idle_since) * 2 + 2.0
