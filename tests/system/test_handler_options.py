"""What a handler may ask for: a type for its payload, a thread, a time limit, a policy; and what it publishes."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typing_extensions import TypedDict

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    InvalidHandlerError,
    InvalidPayloadError,
    Reject,
    Retry,
    RetryPolicy,
    Snooze,
    StateError,
    SystemState,
    publish_event,
)
from tests.system.bus import Sql, delivery, finished, publish, running
from tests.system.conftest import Spawn
from tests.system.processes import Inquest
from tests.system.waiting import until
from tests.system.worker_process import outlast


class Placed(BaseModel):
    order_id: int
    note: str = "none"


@dataclass
class Paid:
    amount: float


class Shipped(TypedDict):
    where: str


async def test_a_payload_comes_as_what_the_handler_takes(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[object] = []
    router = EventRouter()

    @router.on("placed")
    async def placed(_ctx: EventContext, payload: Placed) -> None:
        seen.append(payload)

    @router.on("paid")
    async def paid(_ctx: EventContext, payload: Paid) -> None:
        seen.append(payload)

    @router.on("shipped", transactional=True)
    async def shipped(_ctx: EventContext, payload: Shipped) -> None:
        seen.append(payload)

    @router.on("either")
    async def either(_ctx: EventContext, payload: Placed | Paid) -> None:
        seen.append(payload)

    async with running(router, database):
        for event_type, payload in (
            ("placed", {"order_id": "7", "more": 1}),
            ("paid", {"amount": 1}),
            ("shipped", {"where": "here"}),
            ("either", {"amount": 2.5}),
        ):
            await finished(sql, await publish(sm, event_type, payload))
        async with sm.session() as session:
            for made in (Placed(order_id=8), Paid(3.5)):
                event_type = type(made).__name__.lower()
                await publish_event(session, event_type, made, "events")
            await session.commit()
        await finished(sql, 5, 6)
    assert seen == [
        Placed(order_id=7), Paid(1.0), {"where": "here"}, Paid(2.5), Placed(order_id=8), Paid(3.5)
    ]  # fmt: skip


async def test_a_payload_that_does_not_fit_is_dead_at_once_and_says_where(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Without its values; unless the handler's policy says that it may fit later."""
    router = EventRouter()

    @router.on("placed", transactional=True)
    async def placed(_ctx: EventContext, payload: Placed) -> None: ...

    @router.on("patient", retry=RetryPolicy(max_attempts=2, first=timedelta(0), dead_on=()))
    async def patient(_ctx: EventContext, payload: Placed) -> None: ...

    async with running(router, database):
        first = await publish(sm, "placed", {"order_id": "canary-4711"})
        second = await publish(sm, "patient", {})
        await finished(sql, first, second, status="dead")
    found = await delivery(sql, first)
    assert found["attempt"] == 1
    assert "PayloadValidationError" in found["errors"]
    assert "order_id: Input should be a valid integer" in found["errors"]
    assert "canary" not in found["errors"]
    assert (await delivery(sql, second))["attempt"] == 2


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


async def test_a_plain_function_runs_in_a_thread_without_the_session(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[Any] = []
    router = EventRouter()

    @router.on("a", transactional=True)
    async def first(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        variable.set("from the task")

    @router.on("a")
    def second(ctx: EventContext, payload: Placed) -> None:
        seen.append((ctx.session, ctx.event.id == ctx.event_id, payload.order_id, variable.get()))
        seen.append(threading.current_thread() is not threading.main_thread())

    @router.on("b", retry=RetryPolicy(max_attempts=1))
    def fails(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        raise LookupError("from a thread")

    @router.on("c", retry=RetryPolicy(max_attempts=1))
    def forgets(ctx: EventContext, payload: dict[str, Any]) -> Any:
        return first(ctx, payload)

    with pytest.raises(InvalidHandlerError, match="async def"):
        router.on("d", transactional=True)(second)
    async with running(router, database):
        await finished(sql, await publish(sm, "a", {"order_id": 7}))
        dead = [await publish(sm, "b"), await publish(sm, "c")]
        await finished(sql, *dead, status="dead")
    assert seen == [(None, True, 7, "from the task"), True]
    assert "from a thread" in (await delivery(sql, dead[0]))["errors"]
    assert "returned something to be awaited" in (await delivery(sql, dead[1]))["errors"]


async def test_a_handler_has_the_time_that_it_is_given(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """What it has written in a transaction is undone, and its slot is free again."""
    await sql.execute("CREATE TABLE effects (n int)")
    router = EventRouter()
    short = {"timeout": timedelta(seconds=0.05), "retry": RetryPolicy(max_attempts=2, first=timedelta(0))}
    cancelled = 0

    @router.on("a", transactional=True, **short)  # type: ignore[arg-type]  # two kinds of values
    async def writes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO effects VALUES (1)"))
        await asyncio.Future()

    @router.on("b", **short)  # type: ignore[arg-type]  # two kinds of values
    async def waits(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        nonlocal cancelled
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async with running(router, database, n_workers=1):
        events = [await publish(sm, "a"), await publish(sm, "b")]
        await finished(sql, *events, status="dead")
    assert await sql.fetchval("SELECT count(*) FROM effects") == 0
    assert cancelled == 2
    for each in events:
        assert "TimeoutError" in (await delivery(sql, each))["errors"]


async def test_the_policy_of_the_handler_that_failed_decides(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    calls: list[str] = []
    router = EventRouter()

    @router.on("a", retry=RetryPolicy(max_attempts=9, first=timedelta(0), ceiling=timedelta(0)))
    async def patient(ctx: EventContext, _payload: dict[str, Any]) -> None:
        calls.append("patient")
        if ctx.attempt < 4:
            raise Retry(timedelta(0))

    @router.on("a", retry=RetryPolicy(max_attempts=5, first=timedelta(0), dead_on=(KeyError,)))
    async def strict(ctx: EventContext, _payload: dict[str, Any]) -> None:
        calls.append("strict")
        raise LookupError if ctx.attempt < 5 else RuntimeError

    @router.on("b", retry=RetryPolicy(dead_on=(LookupError,)))
    async def final(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        raise KeyError("a LookupError, too")

    async with running(router, database, max_attempts=2):
        first, second = await publish(sm, "a"), await publish(sm, "b")
        await finished(sql, first, second, status="dead")
    assert calls == ["patient"] * 4 + ["strict"] * 2
    found = await delivery(sql, first)
    assert (found["attempt"], found["handled"]) == (5, [f"{__name__}.{patient.__qualname__}"])
    assert (await delivery(sql, second))["attempt"] == 1


@pytest.mark.parametrize("transactional", [True, False])
async def test_what_a_handler_publishes_says_what_caused_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    router = EventRouter()

    @router.on("first", transactional=transactional)
    async def first(ctx: EventContext, _payload: dict[str, Any]) -> None:
        await ctx.publish("second", {"n": 1}, headers={"mine": True}, key="k")

    @router.on("second", transactional=transactional)
    async def second(ctx: EventContext, payload: dict[str, Any]) -> None:
        await ctx.publish("third", payload, "elsewhere")
        if ctx.attempt == 1:
            raise RuntimeError

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "x=1"}
    async with running(router, database):
        root = await publish(sm, "first", headers={**trace, "secret": 1})
        await finished(sql, root, root + 1)
    rows = await sql.fetch("SELECT type, channel, headers - 'mine' AS headers, key FROM pgebus.events ORDER BY id")
    # In a transaction the first attempt has published nothing; without one it has, and does so again.
    assert [(row["type"], row["channel"], row["key"]) for row in rows] == [
        ("first", "events", None),
        ("second", "events", "k"),
        *[("third", "elsewhere", None)] * (1 if transactional else 2),
    ]
    assert json.loads(rows[1]["headers"]) == {"correlation_id": str(root), "causation_id": str(root), **trace}
    for row in rows[2:]:
        assert json.loads(row["headers"]) == {"correlation_id": str(root), "causation_id": str(root + 1), **trace}


@dataclass
class Cash:
    kind: Literal["cash"]


@dataclass
class Card:
    kind: Literal["card"]


class Order(BaseModel):
    number: str = ""
    code: str = ""
    city: str = ""
    paid: Annotated[Cash | Card, Field(discriminator="kind")] = Field(default_factory=lambda: Cash("cash"))

    @field_validator("number")
    @classmethod
    def check_number(cls, value: str) -> str:
        raise ValueError(f"bad number {value}")

    @field_validator("code")
    @classmethod
    def check_code(cls, value: str) -> str:
        raise AssertionError(f"bad code {value}")

    @field_validator("city")
    @classmethod
    def check_city(cls, value: str) -> str:
        raise PydanticCustomError("bad_city", "no city {city}", {"city": value})


async def test_what_a_validator_writes_about_a_value_is_not_kept(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    router = EventRouter()

    @router.on("order")
    async def handle(_ctx: EventContext, payload: Order) -> None: ...

    async with running(router, database):
        values = {name: f"canary-{name}" for name in ("number", "code", "city")}
        event = await publish(sm, "order", {**values, "paid": {"kind": "canary-kind"}})
        await finished(sql, event, status="dead")
    errors = (await delivery(sql, event))["errors"]
    for said in ("number: value_error", "code: assertion_error", "city: bad_city", "paid: union_tag_invalid"):
        assert said in errors
    assert "canary" not in errors
    assert "canary" not in caplog.text


async def test_the_items_of_a_dict_are_checked_when_their_type_is_given(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    seen: list[object] = []
    router = EventRouter()

    @router.on("counted")
    async def counted(_ctx: EventContext, payload: dict[str, int]) -> None:
        seen.append(payload)

    async with running(router, database):
        await finished(sql, await publish(sm, "counted", {"a": "1"}))
        await finished(sql, await publish(sm, "counted", {"a": "many"}), status="dead")
    assert seen == [{"a": 1}]


@pytest.mark.parametrize(
    "error", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, asyncio.TimeoutError]
)
async def test_whatever_a_plain_function_raises_is_its_failure(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, error: type[BaseException]
) -> None:
    """Also what would end the event loop, or what no coroutine can raise; the slot is free again."""
    router = EventRouter()

    @router.on("a", retry=RetryPolicy(max_attempts=1))
    def fails(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        raise error("canary")

    async with running(router, database, n_workers=1):
        events = [await publish(sm, "a"), await publish(sm, "a")]
        await finished(sql, *events, status="dead")
    (entry,) = json.loads((await delivery(sql, events[0]))["errors"])
    assert entry["type"].endswith(error.__name__)
    assert "in fails" in entry["traceback"]


async def test_a_plain_function_that_publishes_by_its_context_is_told_at_once(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """It cannot await it: the event would not be published, and its delivery completed."""
    router = EventRouter()

    @router.on("a", retry=RetryPolicy(max_attempts=1))
    def publishes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        ctx.publish("b", {})  # type: ignore[unused-coroutine]  # the mistake under test

    async with running(router, database):
        event = await publish(sm, "a")
        await finished(sql, event, status="dead")
    errors = (await delivery(sql, event))["errors"]
    assert StateError.__name__ in errors
    assert "async def" in errors


def still_runs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "still runs in its thread" in each.getMessage()]


async def test_a_plain_function_that_outlasts_its_timeout_keeps_its_delivery_until_it_returns(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the delivery, and the next one of its key, would run beside it. And nobody's time is spent on waiting."""
    gate, begun = threading.Event(), list[tuple[str, int]]()
    router = EventRouter()
    limit = timedelta(seconds=0.05)

    @router.on("slow", timeout=limit, retry=RetryPolicy(max_attempts=2, first=timedelta(0)))
    def slow(ctx: EventContext, _payload: dict[str, Any]) -> None:
        begun.append(("slow", ctx.attempt))
        gate.wait(10)

    @router.on("next")
    async def next_one(ctx: EventContext, _payload: dict[str, Any]) -> None:
        begun.append(("next", ctx.attempt))

    @router.on("innocent", timeout=timedelta(seconds=5), retry=RetryPolicy(max_attempts=1))
    def innocent(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    async def warned() -> bool:
        return bool(still_runs(caplog))

    async with running(router, database, n_workers=2):
        event = await publish(sm, "slow", key="k")
        following = await publish(sm, "next", key="k")
        await until(warned)
        # In the slot that is left; the other one is taken.
        await finished(sql, *[await publish(sm, "innocent") for _ in range(20)])
        assert ((await delivery(sql, event))["status"], begun) == ("running", [("slow", 1)])
        gate.set()
        await finished(sql, event, following)
    assert begun == [("slow", 1), ("slow", 2), ("next", 1)]
    assert len(still_runs(caplog)) == 1
    (entry,) = json.loads((await delivery(sql, event))["errors"])
    assert (entry["type"], "within its timeout of 0.05 s" in entry["message"]) == ("TimeoutError", True)


async def test_the_time_of_a_plain_function_does_not_run_while_it_waits_for_a_slot(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    router = EventRouter()
    options: dict[str, Any] = {"timeout": timedelta(seconds=0.2), "retry": RetryPolicy(max_attempts=1)}

    @router.on("slow", **options)
    def slow(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        gate.wait(10)

    @router.on("innocent", **options)
    def innocent(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    async def warned() -> bool:
        return bool(still_runs(caplog))

    async with running(router, database, n_workers=1):
        hung, waiting = await publish(sm, "slow"), await publish(sm, "innocent")
        await until(warned)
        gate.set()
        await finished(sql, hung, status="dead")
        await finished(sql, waiting)


async def test_a_transaction_does_not_wait_for_a_plain_function_that_outlasts_its_timeout(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    """It is rolled back at once: its locks would be held as long as the thread runs."""
    await sql.execute("CREATE TABLE effects (n int PRIMARY KEY)")
    gate = threading.Event()
    router = EventRouter()

    @router.on("a", transactional=True)
    async def writes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("INSERT INTO effects VALUES (1)"))

    @router.on("a", timeout=timedelta(seconds=0.05), retry=RetryPolicy(max_attempts=1))
    def slow(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        gate.wait(10)

    async def warned() -> bool:
        return bool(still_runs(caplog))

    async with running(router, database, n_workers=1):
        event = await publish(sm, "a")
        await until(warned)
        await asyncio.wait_for(sql.execute("INSERT INTO effects VALUES (1)"), 5)
        assert (await delivery(sql, event))["status"] == "running"
        gate.set()
        await finished(sql, event, status="dead")


@pytest.mark.parametrize("transactional", [False, True])
async def test_what_a_plain_function_did_while_the_system_stopped_is_done(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    """It does not notice the stop, and its result counts; those after it are left to the next one.

    With a transaction everything is undone and runs again, not before it has returned.
    """
    gate, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    calls: list[str] = []
    router = EventRouter()

    @router.on("alone", transactional=transactional)
    @router.on("first", transactional=transactional)
    async def before(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    @router.on("alone", name="plain")
    @router.on("first", name="plain")
    def plain(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(started.set)
        gate.wait(10)
        calls.append("plain")

    @router.on("first", name="last")
    async def last(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        calls.append("last")

    async def cancelled() -> bool:
        return any(each.cancelling() for each in asyncio.all_tasks() if each.get_name().startswith("pgebus-event"))

    for event_type in ("alone", "first"):
        gate.clear()
        started.clear()
        calls.clear()
        async with running(router, database) as system:
            event = await publish(sm, event_type)
            await asyncio.wait_for(started.wait(), 10)
            stopping = asyncio.ensure_future(system.stop(wait_for_completion=False))
            await until(cancelled)
            assert (await delivery(sql, event))["status"] == "running"
            gate.set()
            await stopping
        found = await delivery(sql, event)
        assert calls == ["plain"]
        handled = [f"{__name__}.{before.__qualname__}", "plain"]
        if transactional:
            assert (found["status"], found["attempt"], found["handled"]) == ("pending", 0, None)
        elif event_type == "alone":
            assert found["status"] == "completed"
        else:
            assert (found["status"], found["attempt"], found["handled"]) == ("pending", 0, handled)
        await sql.execute("DELETE FROM pgebus.events")


async def test_a_plain_function_that_outlasts_a_stop_keeps_its_delivery(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may be given it while its thread runs here; and no task is left that would wait for it."""
    monkeypatch.setattr("pgebus.system._CANCELLED_SECONDS", 0.05)
    gate, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    router = EventRouter()

    @router.on("slow")
    def slow(_ctx: EventContext, _payload: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(started.set)
        gate.wait(10)

    async with running(router, database) as system:
        event = await publish(sm, "slow")
        await asyncio.wait_for(started.wait(), 10)
        await asyncio.wait_for(system.stop(wait_for_completion=False), 10)
        found = await delivery(sql, event)
        assert (found["status"], found["attempt"], found["finished_at"]) == ("running", 1, None)
        assert (system.health().state, system.health().running) == (SystemState.STOPPED, 0)
        gate.set()


async def test_a_process_ends_while_a_plain_function_runs_and_others_run_the_event_again(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, spawn: Spawn, inquest: Inquest
) -> None:
    child = spawn(outlast)
    await child.says("ready")
    event = await publish(sm, "job.endless")
    assert await child.says("inside") == [event]
    child.go()
    await child.says("stopped")
    assert await child.dies(10) == 0
    seen: list[int] = []
    router = EventRouter()

    @router.on("job.endless", name="endless")
    def endless(ctx: EventContext, _payload: dict[str, Any]) -> None:
        seen.append(ctx.attempt)

    assert (await delivery(sql, event))["status"] == "running"
    async with running(router, database, recovery_grace_seconds=0.2):
        await finished(sql, event)
    assert (seen, (await delivery(sql, event))["lost"]) == ([2], 1)


class Base(DeclarativeBase):
    """Tables of the tests."""


class Row(Base):
    __tablename__ = "rows"

    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


async def test_what_a_handler_has_left_to_be_written_is_written_in_its_time(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Another one holds the row: the flush would wait for it for ever, with the slot."""
    await sql.execute("CREATE TABLE rows (id int PRIMARY KEY, n int); INSERT INTO rows VALUES (1, 1)")
    router = EventRouter()

    @router.on("a", transactional=True, timeout=timedelta(seconds=0.1), retry=RetryPolicy(max_attempts=1))
    async def changes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        (await ctx.session.get_one(Row, 1)).n = 2

    @router.on("b", transactional=True)
    async def other(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    async with running(router, database, n_workers=1), sql.transaction():
        await sql.execute("UPDATE rows SET n = 3")
        async with sm.session() as session:  # on a connection of its own
            first: Any = await publish_event(session, "a", {}, "events")
            second: Any = await publish_event(session, "b", {}, "events")
            await session.commit()
        await finished(sql, first.id, status="dead")
        await finished(sql, second.id)
    (entry,) = json.loads((await delivery(sql, first.id))["errors"])
    assert (entry["type"], entry["handler"]) == ("TimeoutError", f"{__name__}.{changes.__qualname__}")


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_handler_whose_time_is_up_has_failed_by_that_whatever_it_makes_of_it(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    """Its query was broken off with the connection: what follows from that is not what happened. Signals count."""
    router = EventRouter()
    options: dict[str, Any] = {
        "transactional": transactional, "timeout": timedelta(seconds=0.1), "retry": RetryPolicy(max_attempts=1)
    }  # fmt: skip

    async def hang(ctx: EventContext) -> None:
        if ctx.session is None:
            await asyncio.Future()
        else:
            await ctx.session.execute(text("SELECT pg_sleep(60)"))

    @router.on("swallows", **options)
    async def swallows(ctx: EventContext, _payload: dict[str, Any]) -> None:
        try:
            await hang(ctx)
        except asyncio.CancelledError:
            return

    @router.on("fails", **options)
    async def fails(ctx: EventContext, _payload: dict[str, Any]) -> None:
        try:
            await hang(ctx)
        finally:
            raise LookupError("in its cleanup")

    @router.on("rejects", **options)
    async def rejects(ctx: EventContext, _payload: dict[str, Any]) -> None:
        try:
            await hang(ctx)
        finally:
            raise Reject("by itself")

    @router.on("snoozes", **options)
    async def snoozes(ctx: EventContext, payload: dict[str, Any]) -> None:
        if snoozed:
            return
        snoozed.append(1)
        try:
            await hang(ctx)
        finally:
            raise Snooze(timedelta(0))

    snoozed: list[int] = []
    async with running(router, database, n_workers=1):
        late = [await publish(sm, "swallows"), await publish(sm, "fails")]
        rejected, again = await publish(sm, "rejects"), await publish(sm, "snoozes")
        await finished(sql, *late, rejected, status="dead")
        await finished(sql, again)
    for event in late:
        (entry,) = json.loads((await delivery(sql, event))["errors"])
        assert (entry["type"], entry["message"]) == (
            "TimeoutError", "The handler did not return within its timeout of 0.1 s."
        )  # fmt: skip
    assert "in its cleanup" in (await delivery(sql, late[1]))["errors"]
    assert "by itself" in (await delivery(sql, rejected))["errors"]


@pytest.mark.parametrize("how", ["at commit", "swallowed"])
async def test_where_no_handler_is_to_blame_the_strictest_policy_of_all_decides(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, how: str
) -> None:
    await sql.execute(
        "CREATE TABLE parents (id int PRIMARY KEY);"
        "CREATE TABLE children (id int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)"
    )
    attempts: list[int] = []
    router = EventRouter()

    @router.on("a", transactional=True, retry=RetryPolicy(max_attempts=9, first=timedelta(0)))
    async def patient(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...

    @router.on("a", transactional=True, retry=RetryPolicy(max_attempts=2, first=timedelta(0)))
    async def strict(ctx: EventContext, _payload: dict[str, Any]) -> None:
        attempts.append(ctx.attempt)
        assert ctx.session is not None
        if how == "at commit":
            await ctx.session.execute(text("INSERT INTO children VALUES (1)"))
            return
        try:
            await ctx.session.execute(text("SELECT 1 / 0"))
        except Exception:  # noqa: BLE001 - the mistake under test
            return

    async with running(router, database, max_attempts=5):
        event = await publish(sm, "a")
        await finished(sql, event, status="dead")
    assert attempts == [1, 2]


@pytest.mark.parametrize("transactional", [False, True])
async def test_headers_that_are_no_object_are_refused_by_name(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, transactional: bool
) -> None:
    raised: list[type[BaseException]] = []
    router = EventRouter()

    @router.on("a", transactional=transactional)
    async def publishes(ctx: EventContext, _payload: dict[str, Any]) -> None:
        bad: Any
        for bad in ([1], [], "x", "", 3, 0):
            try:
                await ctx.publish("b", {}, "other", headers=bad)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at below
                raised.append(type(error))

    async with running(router, database):
        await finished(sql, await publish(sm, "a"))
    assert raised == [InvalidPayloadError] * 6


async def test_what_is_no_trace_and_no_correlation_is_not_handed_on(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """And the state of one trace is not joined to another."""
    router = EventRouter()
    other = "00-11111111111111111111111111111111-2222222222222222-01"

    @router.on("a")
    async def publishes(ctx: EventContext, payload: dict[str, Any]) -> None:
        await ctx.publish("b", {}, "other", **payload)

    good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(router, database):
        one = await publish(
            sm, "a", headers={"traceparent": {"no": "trace"}, "tracestate": "x=1", "correlation_id": None}
        )
        await finished(sql, one)
        two = await publish(
            sm, "a", {"headers": {"traceparent": other}}, headers={"traceparent": good, "tracestate": "x=1"}
        )
        await finished(sql, two)
        three = await publish(sm, "a", headers={"correlation_id": "x" * 65_000})
        await finished(sql, three)
    rows = await sql.fetch("SELECT headers FROM pgebus.events WHERE type = 'b' ORDER BY id")
    assert [json.loads(row["headers"]) for row in rows] == [
        {"correlation_id": str(one), "causation_id": str(one)},
        {"correlation_id": str(two), "causation_id": str(two), "traceparent": other},
        {"correlation_id": str(three), "causation_id": str(three)},
    ]
