"""The public API as applications use it: checked by the type checker, never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, assert_type

from sqlalchemy import MetaData, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventContext,
    EventRouter,
    EventSystem,
    EventSystemSettings,
    Group,
    GuardedSession,
    Reject,
    Retry,
    RetryPolicy,
    Settings,
    Snooze,
    SystemHealth,
    SystemState,
    add_publish_middleware,
    metadata,
    operations,
    publish_event,
    publish_events,
    remove_publish_middleware,
)
from pgebus.depends import Depends, provider


class Base(DeclarativeBase):
    """The application's own."""


class Order(Base):
    """A table of the application."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


assert_type(metadata, MetaData)

# Settings: dicts, sections, and what the environment says.
Settings()
settings = Settings(
    database={"host": "localhost", "port": 5432, "user": "app", "password": "secret", "schema": "pgebus"},
    event_system={"channel": "events", "n_workers": 5},
)
Settings(database=DatabaseSettings(host=["one", "two"]), event_system=EventSystemSettings(retention_seconds=None))
assert_type(settings.database, DatabaseSettings)
assert_type(settings.event_system, EventSystemSettings)
assert_type(settings.event_system.channel, str)
assert_type(settings.event_system.retention_seconds, float | None)
assert_type(settings.database.schema_name, str)
Settings(channel="events")  # type: ignore[call-arg]  # a section is missing

# Routers and handlers.
router = EventRouter()
shop = EventRouter(prefix="shop")
router.include_router(shop)
router.include_router(shop, prefix="eu")


@router.on("order.placed", transactional=True, name="reserve")
async def reserve(ctx: EventContext, payload: dict[str, Any]) -> None:
    """A transactional handler."""
    assert_type(ctx.event, Event)
    assert_type(ctx.event_id, int)
    assert_type(ctx.attempt, int)
    assert_type(ctx.claim_seq, int)
    assert_type(ctx.group, str)
    assert_type(ctx.session, GuardedSession | None)
    await ctx.session.flush()  # type: ignore[union-attr]  # None unless a handler of the event is transactional
    assert ctx.session is not None
    order = await ctx.session.get(Order, payload["order_id"])
    assert_type(order, Order | None)
    assert_type(await ctx.session.get_one(Order, 1), Order)
    assert_type((await ctx.session.scalars(select(Order))).all(), Sequence[Order])
    await ctx.session.execute(text("SELECT 1"))
    ctx.session.add(Order(id=1, total=2))
    assert_type(await ctx.session.run_sync(count), int)
    assert_type(ctx.session.unsafe, AsyncSession)
    await ctx.session.commit()  # type: ignore[attr-defined]  # the dispatcher's
    await ctx.session.rollback()  # type: ignore[attr-defined]  # the dispatcher's
    ctx.session.begin_nested()  # type: ignore[attr-defined]  # a part cannot be undone alone
    assert_type(await publish_event(ctx.session, "stock.reserved", payload, "events"), Event)


def count(session: Session) -> int:
    """Work on the synchronous session."""
    return len(session.new)


@router.on("demo.hello")
@router.on("demo.goodbye")
async def untyped_payload(ctx: EventContext, payload: Any) -> str:
    """What a handler returns is ignored; the decorator returns the function unchanged."""
    match payload:
        case {"delay": int(seconds)}:
            raise Retry(timedelta(seconds=seconds))
        case {"wait": True}:
            raise Retry
        case {"later": True}:
            raise Snooze(timedelta(hours=1))
        case _:
            raise Reject("nothing can help")


class Mailer:
    """Handlers may be methods of an object."""

    async def send(self, ctx: EventContext, payload: dict[str, Any]) -> None:
        """Handle."""


router.on("mail.wanted", name="send")(Mailer().send)


@router.on("demo.sync", group="slow", timeout=timedelta(seconds=3), retry=RetryPolicy(dead_on=(ValueError,)))
def not_async(ctx: EventContext, payload: dict[str, Any]) -> None:
    """Runs in a thread."""


@router.on("demo.#", group=Group("billing", start="beginning", max_running=3))
async def publishing(ctx: EventContext, payload: Order) -> None:
    """Takes a type of its own, and publishes."""
    assert_type(await ctx.publish("a.b", {}), Event)
    ctx.publish("a.b", {})  # type: ignore[unused-coroutine]  # it is to be awaited


class Repo:
    """What handlers depend on."""


async def get_repo(ctx: EventContext, payload: Any) -> Repo:
    """Make one."""
    return Repo()


@router.on("repo.wanted")
async def depending(ctx: EventContext, payload: Order, repo: Annotated[Repo, Depends(get_repo)]) -> None:
    """Takes a dependency."""
    assert_type(repo, Repo)


@router.on("repo.wanted", name="by_default")
def depending_by_default(ctx: EventContext, payload: Order, *, repo: Repo = Depends(get_repo)) -> None:  # noqa: B008 - FastAPI's older way
    """Takes a dependency, in a thread."""


@router.on("too.few")  # type: ignore[type-var]  # what about the payload?
async def too_few(ctx: EventContext) -> None:
    """Not a handler."""


provider.override(get_repo, Repo)


# Middleware.
@router.middleware
async def around(ctx: EventContext, call_next: Callable[[EventContext], Awaitable[None]]) -> None:
    """Around handlers."""
    await call_next(ctx)


@add_publish_middleware
def stamp(event: Event, call_next: Callable[[Event], None]) -> None:
    """What events pass."""
    call_next(event)


remove_publish_middleware(stamp)
add_publish_middleware(around)  # type: ignore[type-var]  # nobody awaits there
router.middleware(stamp)  # type: ignore[type-var]  # it is awaited


async def call_again(ctx: EventContext) -> None:
    """The decorated function is still what it was."""
    assert_type(await untyped_payload(ctx, {}), str)
    assert_type(await reserve(ctx, {}), None)


# Publishing.
async def publish(run_at: datetime, scoped: async_scoped_session[AsyncSession], sync: Session) -> None:
    """Every session that can publish, and those that cannot."""
    async with DatabaseSessionManager(settings.database) as manager:
        assert_type(manager.engine, AsyncEngine)
        async with manager.session() as session:
            assert_type(session, AsyncSession)
            event = await publish_event(session, "order.placed", {"order_id": 7}, "events", run_at)
            assert_type(event, Event)
            assert_type(event.id, int)
            assert_type(event.payload, dict[str, Any])
            assert_type(event.run_at, datetime)
            await publish_event(
                session,
                event_type="order.placed",
                payload={},
                channel=settings.event_system.channel,
                run_at=None,
                headers={"tenant": "one"},
            )
            events = (Event(type="order.placed", payload={"n": n}) for n in range(3))
            assert_type(await publish_events(session, events), list[Event])
            session.add(Event(type="order.placed"))
            await session.commit()
    await publish_event(scoped, "order.placed", {}, "events")
    sync.add(Event(type="order.placed"))
    await publish_event(sync, "order.placed", {}, "events")  # type: ignore[arg-type]  # add() publishes there
    await publish_event(session, "order.placed", [1], "events")  # type: ignore[arg-type]  # no JSON object
    await publish_event(session, "order.placed", {}, "events", "now")  # type: ignore[arg-type]  # no datetime
    await publish_event(session, "order.placed", {})  # type: ignore[call-arg]  # which channel?


# Running.
async def run() -> None:
    """Every way to run a system."""
    system = EventSystem(router=router, settings=settings)
    assert_type(await system.start(), None)
    assert_type(await system.stop(wait_for_completion=False, timeout=5), None)
    async with EventSystem(router, settings) as entered:
        assert_type(entered, EventSystem)
        health = entered.health()
        assert_type(health, SystemHealth)
        assert_type(health.ok, bool)
        assert_type(health.state, SystemState)
        assert_type(
            [(loop.name, loop.ok, loop.last_error) for loop in health.loops], list[tuple[str, bool, str | None]]
        )
    assert_type(await EventSystem(router, settings).run(), None)
    system.serve("mail", "billing")
    assert_type(await system.wait(), None)
    assert_type(system.settings, Settings)
    assert_type(RetryPolicy(max_attempts=3).delay(1), timedelta)


# Operating.
async def operate(session: AsyncSession) -> None:
    """What a person does, with filters that are keywords."""
    redriven = await operations.redrive(session, group="mail", event_type="order.*", limit=10)
    assert_type(redriven, list[operations.Changed])
    assert_type([(each.event_id, each.group, each.was) for each in redriven], list[tuple[int, str, str | None]])
    await operations.cancel(session, status="running", event_ids=[each.event_id for each in redriven])
    assert_type(await operations.prune(session, timedelta(days=7)), int)
    assert_type((await operations.purge_payload(session, key="customer-7")).event_ids, tuple[int, ...])
    assert_type(await operations.status(session), list[operations.GroupStatus])
    traced = await operations.trace(session, 7, limit=10)
    assert_type(traced.events if traced else (), tuple[operations.TracedEvent, ...])
    shown = await operations.show_event(session, 7)
    assert_type(shown.deliveries if shown else (), tuple[operations.DeliveryState, ...])
    await operations.redrive(session, grup="mail")  # type: ignore[call-arg]  # misspelt
    await operations.replay(session, "mail", group="mail")  # type: ignore[misc]  # said twice
    await operations.purge_payload(session, group="mail")  # type: ignore[call-arg]  # an event has no group
