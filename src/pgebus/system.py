"""The running system: puts the parts together, starts and stops them.

Decides nothing about events; creates no tables; installs no signal handlers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from functools import partial
from inspect import iscoroutinefunction
from random import SystemRandom
from types import TracebackType
from typing import Final, NoReturn, Self

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgebus._guard import guard_engine
from pgebus._runtime.acknowledging import Acknowledger
from pgebus._runtime.beating import BEAT_ANSWER_SECONDS, Beater
from pgebus._runtime.claiming import ATTEMPTS_TO_SPARE, MAX_AHEAD, Claimer
from pgebus._runtime.connecting import beats, open_engines, pooled
from pgebus._runtime.dispatching import Dispatcher
from pgebus._runtime.fitness import complaints, require_visible
from pgebus._runtime.leases import Holdings
from pgebus._runtime.listening import Listener
from pgebus._runtime.maintenance import Maintenance
from pgebus._runtime.presence import Presence
from pgebus._runtime.pulse import Pulse, report
from pgebus._runtime.requirements import require_defaults, require_schema, require_triggers
from pgebus._runtime.retention import Retention
from pgebus._runtime.scheduling import Scheduler
from pgebus._runtime.statements import Statements
from pgebus._runtime.store import Line, Store
from pgebus._runtime.supervision import DATABASE_ERRORS, Crew, Loops, cancel, keep_running, spawn
from pgebus._runtime.threads import Threads
from pgebus._runtime.transacting import Transactions
from pgebus._runtime.waking import DatabaseClock, Wakeup
from pgebus._version import __version__
from pgebus.database import to_the_end
from pgebus.errors import ConfigurationError, StateError
from pgebus.groups import DEFAULT_GROUP, check_group_name
from pgebus.health import SystemHealth, SystemState
from pgebus.retry import RetryPolicy
from pgebus.routing import EventRouter
from pgebus.settings import Settings

logger = logging.getLogger(__name__)

# After the handlers were cancelled: how long they may take to clean up, and how long the last writes may take.
_CANCELLED_SECONDS: Final = 5.0
_LAST_WRITES_SECONDS: Final = 10.0


class EventSystem:
    """One worker: claims the events of a channel and runs their handlers.

    It has one life: start it, stop it, make another one. It owns its connections: `n_workers` for handlers, three for
    its own statements, four with schedules, and one that listens or beats. Belongs to one event loop. Any number of
    processes may share the tables.

    Args:
        router: The handlers; routes that are added later are found as well.
        settings: The database and how to run.
        redact: Takes secrets out of the message and the traceback of an error before they are stored in
            `deliveries.errors`, and before the message is logged. Called in the event loop with text of at most 65,536
            characters. When it raises, or returns no text, nothing of the error but its type is kept.

    Raises:
        ConfigurationError: If the settings name a group that no handler is in.
    """

    def __init__(self, router: EventRouter, settings: Settings, *, redact: Callable[[str], str] | None = None) -> None:
        if not isinstance(router, EventRouter):
            raise TypeError(f"router must be an EventRouter, not {type(router).__name__}.")
        if not isinstance(settings, Settings):
            raise TypeError(f"settings must be Settings, not {type(settings).__name__}.")
        given: object = redact
        if given is not None and (not callable(given) or iscoroutinefunction(given)):
            raise TypeError("redact must be a plain function that takes a text and returns one.")
        _check_groups("The settings name", settings.event_system.groups or (), router)
        self._router = router
        self._settings = settings
        self._redact = redact
        self._state = SystemState.NEW
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._impatient = asyncio.Event()
        self._patience: float = settings.event_system.shutdown_timeout_seconds
        self._crew = Crew()
        self._holdings = Holdings()
        self._threads = Threads()
        self._clock = DatabaseClock()
        self._wakeup = Wakeup(self._clock)
        self._presence = Presence(self._departed)
        self._claimer: Claimer | None = None
        self._lines: dict[str, Line] = {}
        shown = "beat" if beats(settings) else "listen"
        self._loops = {name: Pulse(name) for name in (shown, "claim", "acknowledge", "maintain", "schedule")}

    @property
    def router(self) -> EventRouter:
        """The handlers."""
        return self._router

    @property
    def settings(self) -> Settings:
        """The database and how to run."""
        return self._settings

    def serve(self, *groups: str) -> None:
        """Serve these consumer groups, instead of those that the settings name; to be said before the start.

        Raises:
            ConfigurationError: If it is none, or one that no handler is in.
            StateError: If it was started before.
        """
        if self._state is not SystemState.NEW:
            raise self._cannot_start()
        if not groups:
            raise ConfigurationError("serve() names no group. Leave it out to serve all of them.")
        named = tuple(dict.fromkeys(check_group_name(name) for name in groups))
        _check_groups("You name", named, self._router)
        options = self._settings.event_system.model_copy(update={"groups": named})
        self._settings = self._settings.model_copy(update={"event_system": options})

    async def start(self) -> None:
        """Start in the background; return when events are being handled.

        Raises:
            SchemaMismatchError: If the tables are missing, or those of another release; none are ever made here.
            SessionlessConnectionError: If the LISTEN connection goes through a transaction pooler.
            ConfigurationError: If the role's defaults do not fit, behind a transaction pooler.
            StateError: If it was started before.
            OSError, sqlalchemy.exc.DBAPIError: If the database cannot be reached now. Later losses are repaired.
        """
        if self._state is not SystemState.NEW:
            raise self._cannot_start()
        self._state = SystemState.STARTING
        task = self._task = spawn(self._live(), "pgebus-system")
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if await cancel(task, _CANCELLED_SECONDS + _LAST_WRITES_SECONDS):
                self._task = None
            raise
        finally:
            ready.cancel()
        if task.done():
            self._task = None
            task.result()
            return
        task.add_done_callback(_report)

    async def stop(self, wait_for_completion: bool = True, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - a budget for handlers, not a deadline for this call
        """Claim nothing more, let the handlers finish, and end.

        Handlers that still run after *timeout* are cancelled; their deliveries, and those that had not started, are
        given back without counting the attempt. Harmless when repeated, or when nothing was started. Called by a
        handler it only asks: the handler that waits for the end would be waited for. A plain function does not notice:
        if it has not returned five seconds after the others were cancelled, its delivery stays claimed and is recovered
        by others, counted as lost; the process can end.

        Args:
            wait_for_completion: False cancels the handlers at once.
            timeout: Seconds to wait for handlers.

        Raises:
            ValueError: If *timeout* is negative or not a number.
            BaseException: What ended the system before, if something did.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout must be zero or more seconds, got {timeout!r}.")
        if self._state is SystemState.NEW:
            self._state = SystemState.STOPPED
        self._patience = timeout if wait_for_completion else 0.0
        self._stop_asked.set()
        if self._patience == 0:
            self._impatient.set()  # an earlier stop() may be waiting for handlers; this one doesn't
        task, current = self._task, asyncio.current_task()
        if task is None or self._crew.includes(current):
            return
        await asyncio.wait([task])
        if self._task is task:
            self._task = None
            if not task.cancelled():
                task.result()

    async def wait(self) -> None:
        """Wait until the system that was started has ended: by `stop()`, or because it failed. Ends nothing itself.

        Raises:
            BaseException: What ended it, if it was no `stop()`.
        """
        if (task := self._task) is not None:
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def run(self) -> None:
        """Run until `stop()` is called, or until the task is cancelled, which cancels the handlers at once.

        Raises:
            BaseException: As `start()`; and whatever a loop raised that was no database error.
        """
        if self._state is not SystemState.NEW:
            raise self._cannot_start()
        self._state = SystemState.STARTING
        await self._live()

    async def _live(self) -> None:
        try:
            async with open_engines(self._settings) as (control, handlers, listen):
                lines = Line(control), Line(control), Line(control)
                # The third one is the maintenance's, whose long statements keep nobody from claiming.
                self._lines = {"claim": lines[0], "acknowledge": lines[1]}
                pulse = Line(control, within=BEAT_ANSWER_SECONDS)  # connects only where it is used
                try:
                    await self._run(*lines, pulse if beats(self._settings) else listen, control, handlers)
                finally:
                    for line in (*lines, pulse):
                        await line.close()
        finally:
            self._state = SystemState.STOPPED
            logger.info("The event system has ended.")

    def health(self) -> SystemHealth:
        """Return how the system is doing, and why it is not ready, in plain words.

        Cheap, and never raises: it asks nobody. Also from another thread. When the database cannot be used, or the
        listener is deaf, it says so within ten seconds, and again when that is over.
        """
        return report(
            self._state,
            self._loops.values(),
            present=self._presence.here,
            waiting_since={name: line.waiting_since for name, line in self._lines.items()},
            running=len(self._crew),
            held=len(self._holdings),
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(timeout=self._settings.event_system.shutdown_timeout_seconds)

    def _shown_alive(self, by: Line | AsyncEngine, other: Line, statements: Statements) -> Listener | Beater:
        """Return the loop by which others see that this worker lives."""
        options = self._settings.event_system
        if isinstance(by, AsyncEngine):
            return Listener(
                by,
                other,
                statements,
                channel=options.channel,
                groups=self._served,
                presence=self._presence,
                wakeup=self._wakeup,
                health=self._loops["listen"],
                version=__version__,
            )
        return Beater(
            by,
            statements,
            channel=options.channel,
            groups=self._served,
            presence=self._presence,
            wakeup=self._wakeup,
            health=self._loops["beat"],
            version=__version__,
        )

    async def _run(
        self,
        claims: Line,
        writes: Line,
        rounds: Line,
        shown_by: Line | AsyncEngine,
        control: AsyncEngine,
        handlers: AsyncEngine,
    ) -> None:
        options = self._settings.event_system
        statements = Statements(self._settings.database.schema_name)
        await require_schema(rounds, statements)
        await require_visible(rounds, statements)
        await require_triggers(rounds, statements)
        if pooled(self._settings):
            await require_defaults(rounds, statements)

        acknowledger = Acknowledger(
            Store(writes, statements, options.channel),
            self._holdings,
            self._settled,
            self._loops["acknowledge"],
            forgets=self._router.forgets,
        )
        rng = SystemRandom()
        transactions = Transactions(
            guard_engine(handlers),
            statements,
            isolation_level=options.isolation_level,
            rng=rng,
            forgets=self._router.forgets,
        )
        dispatcher = Dispatcher(
            self._router,
            transactions,
            policy=RetryPolicy(
                max_attempts=options.max_attempts,
                first=timedelta(seconds=options.backoff_first_seconds),
                ceiling=timedelta(seconds=options.backoff_ceiling_seconds),
            ),
            rng=rng,
            threads=self._threads,
            redact=self._redact,
            own=partial(AsyncSession, handlers.execution_options(isolation_level="READ COMMITTED")),
        )
        claimer = self._claimer = Claimer(
            Store(claims, statements, options.channel),
            self._router,
            dispatcher,
            acknowledger,
            holdings=self._holdings,
            presence=self._presence,
            wakeup=self._wakeup,
            clock=self._clock,
            crew=self._crew,
            groups=self._served,
            slots=options.n_workers,
            ahead=MAX_AHEAD if options.max_attempts >= ATTEMPTS_TO_SPARE else 0,
            poll_interval=options.poll_interval_seconds,
            notify="off" if beats(self._settings) else options.notify,
            health=self._loops["claim"],
        )
        maintenance = Maintenance(
            Store(rounds, statements, options.channel),
            self._router,
            self._presence,
            self._served,
            grace=options.recovery_grace_seconds,
            retention=Retention(
                options.retention_seconds,
                options.retention,
                options.dead_retention_seconds,
                options.unhandled_retention_seconds,
            ),
            look=self._wakeup.look,
            learned=claimer.learn,
            complaints=partial(complaints, rounds, statements),
            health=self._loops["maintain"],
        )
        scheduler = Scheduler(
            partial(AsyncSession, control.execution_options(isolation_level="READ COMMITTED")),
            self._router,
            options.channel,
            health=self._loops["schedule"],
        )
        # Before anything is claimed: from now on the trigger knows who wants what.
        await maintenance.subscribe()

        shown = "beat" if beats(self._settings) else "listen"
        bodies: dict[str, tuple[Callable[[], Awaitable[NoReturn]], float]] = {
            shown: (self._shown_alive(shown_by, rounds, statements).run, 1.0),
            "acknowledge": (acknowledger.run, 5.0),
            "claim": (claimer.run, 5.0),
            "maintain": (maintenance.run, 5.0),
            "schedule": (scheduler.run, 5.0),
        }
        loops = Loops()
        try:
            for name, (body, pause) in bodies.items():
                loops.start(name, keep_running(body, self._loops[name], proven=self._ready, longest_pause=pause))
            await loops.until(self._presence.wait(), self._stop_asked.wait())
            self._state = SystemState.RUNNING
            self._ready.set()
            self._announce()
            await loops.until(self._stop_asked.wait())
            self._state = SystemState.STOPPING
            await claimer.close(_LAST_WRITES_SECONDS)
            await loops.until(self._crew.wait(self._patience), self._impatient.wait())
        finally:
            # Also when this task was cancelled or a loop has failed: what is held goes back to the others. The lock is
            # kept until that is done, or they would take it themselves and count it as lost.
            self._state = SystemState.STOPPING
            try:
                await self._wind_down(claimer, acknowledger, rounds, statements, writing=loops.alive("acknowledge"))
            finally:
                self._threads.close()
                try:
                    await loops.end()
                finally:
                    await to_the_end(transactions.close())

    async def _wind_down(
        self,
        claimer: Claimer,
        acknowledger: Acknowledger,
        line: Line,
        statements: Statements,
        *,
        writing: bool,
    ) -> None:
        """Cancel what still runs, give back what is held, sign off; all of it within a bounded time."""
        await claimer.close(_LAST_WRITES_SECONDS)
        self._crew.cancel()
        if not await self._crew.wait(_CANCELLED_SECONDS):
            logger.error(
                "%d handlers did not end when they were cancelled. Their deliveries stay claimed until this process "
                "has ended, and count as lost then.",
                len(self._crew),
            )
        if writing and not await acknowledger.drained(_LAST_WRITES_SECONDS):
            logger.warning("The last outcomes could not be written; those deliveries will be recovered, and run again.")
        if self._presence.worker_id is not None:
            try:
                await self._sign_off(line, statements, self._presence.worker_id)
            except DATABASE_ERRORS as error:
                logger.warning("The worker could not sign off (%s); others will notice that it is gone.", error)

    async def _sign_off(self, line: Line, statements: Statements, worker_id: int) -> None:
        async with asyncio.timeout(_LAST_WRITES_SECONDS):
            try:
                await line.fetch(statements.sign_off, worker_id)
            except DATABASE_ERRORS:  # the line may have died unnoticed, while it had nothing to do
                await line.fetch(statements.sign_off, worker_id)

    def _served(self) -> list[str]:
        """Return the groups that this process serves."""
        named = self._settings.event_system.groups
        return list(named or (group.name for group in self._router.groups())) or [DEFAULT_GROUP]

    def _announce(self) -> None:
        database, options = self._settings.database, self._settings.event_system
        patterns = sorted({route.pattern for route in self._router.routes()})
        logger.info(
            "Handling channel %r, %d at once, in schema %r as worker %d: %s",
            options.channel,
            options.n_workers,
            database.schema_name,
            self._presence.worker_id or 0,
            ", ".join(patterns) or "no event type at all",
        )
        if not patterns:
            logger.warning("The router has no handlers: every event on channel %r is put aside.", options.channel)

    def _settled(self, due_in: float | None) -> None:
        if self._claimer is not None:
            self._claimer.settled(due_in)

    def _departed(self, worker_id: int) -> None:
        """Others have ended this worker and own its deliveries now: whatever runs for them is in vain."""
        if self._claimer is not None:
            self._claimer.forget(worker_id)
        self._crew.cancel()

    def _cannot_start(self) -> StateError:
        if self._state in (SystemState.STARTING, SystemState.RUNNING):
            return StateError("EventSystem is already running.")
        return StateError("EventSystem has been stopped and cannot be started again. Create a new one.")


def _check_groups(who: str, groups: Iterable[str], router: EventRouter) -> None:
    if unknown := set(groups) - {group.name for group in router.groups()}:
        raise ConfigurationError(
            f"{who} groups that no handler is in: {', '.join(sorted(unknown))}. Register their handlers first, or name "
            "others."
        )


def _report(task: asyncio.Task[None]) -> None:
    """Say at once what nobody may hear before `stop()`."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("The event system has failed and handles nothing any more.", exc_info=error)
