"""The loop that publishes by the clock: each time once in the whole cluster.

Every process that has the schedule tries; the row of the schedule decides, in the transaction that publishes. So a
process that dies publishes nothing, and another one does. The clock is the database's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import islice, takewhile
from typing import Final, NamedTuple, NoReturn

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus._runtime.pulse import Pulse
from pgebus._runtime.store import ANSWER_SECONDS
from pgebus._runtime.supervision import DATABASE_ERRORS
from pgebus.cron import CATCH_UP_BATCH, Cron
from pgebus.models import Schedule
from pgebus.publishing import publish_event
from pgebus.routing import EventRouter

logger = logging.getLogger(__name__)

# How often the schedules are looked up again: they may be declared late, and others move them on.
LOOK_SECONDS: Final = 30.0
# Between two looks, whatever the reason for the second: others have published, the clock of the database has gone back,
# or a row is not changed although it is there.
LEAST_SECONDS: Final = 0.1
# After that, what the application has refused to publish is tried again.
REFUSED_SECONDS: Final = 5.0
# The clock of the database is a little behind our idea of it: a look too early costs another one.
_EARLY_SECONDS: Final = 0.002
# So many missed times are counted for the log, and no more.
_COUNTED: Final = 1000


class _Key(NamedTuple):
    type: str
    cron: str
    timezone: str


class RefusedError(Exception):
    """The application's own code, such as a publish middleware, refused an event: no reason to end the worker."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Scheduler:
    """Publishes what is due by the clock.

    Args:
        session: Makes a session whose transactions are READ COMMITTED; each is used for one transaction.
        router: Its handlers say what is scheduled.
        channel: Where it is published.
        health: Told when a look worked.
    """

    def __init__(
        self, session: Callable[[], AsyncSession], router: EventRouter, channel: str, *, health: Pulse
    ) -> None:
        self._session = session
        self._router = router
        self._channel = channel
        self._health = health
        # Schedules of which more was missed than one transaction makes up for.
        self._far_behind: set[_Key] = set()

    async def run(self) -> NoReturn:
        """Publish, until cancelled."""
        while True:
            try:
                pause = await self.look()
            except RefusedError as refused:
                self._health.failed(refused.error)
                pause = REFUSED_SECONDS
            else:
                self._health.well()
            await asyncio.sleep(pause)

    async def look(self) -> float:
        """Publish what is due; return the seconds until there may be more.

        Raises:
            DBAPIError, OSError, TimeoutError: If the database fails; the other schedules were tried all the same.
            RefusedError: If the application's code does, which runs where an event is published. So here.
        """
        crons = self._crons()
        if not crons:
            return LOOK_SECONDS
        now, reached = await self._declare(crons)
        pause = LOOK_SECONDS
        failed: list[BaseException] = []
        refused: list[Exception] = []
        for key, last in reached.items():
            ticks, until = crons[key].due(last, now)
            if until is None:
                coming = next(crons[key].after(max(last, now)), None)
                pause = min(pause, LOOK_SECONDS if coming is None else (coming - now).total_seconds())
                self._far_behind.discard(key)
                continue
            pause = 0.0
            self._tell_how_far_behind(key, crons[key], last, now)
            try:
                await self._publish(key, last, ticks, until)
            except DATABASE_ERRORS as error:
                logger.warning("Events of type %r that the clock has come to were not published yet.", key.type)
                failed.append(error)
            except Exception as error:
                logger.exception(
                    "Events of type %r that the clock has come to were not published: what the application does with "
                    "an event on its way has failed.",
                    key.type,
                )
                refused.append(error)
        if failed:
            raise failed[0]
        if refused:
            raise RefusedError(refused[0])
        return max(LEAST_SECONDS, pause + _EARLY_SECONDS)

    def _tell_how_far_behind(self, key: _Key, cron: Cron, last: datetime, now: datetime) -> None:
        """Say once that very many events will come, before the first of them: nobody may have expected it."""
        if cron.missed != "all" or key in self._far_behind:
            return
        missed = sum(1 for _ in islice(takewhile(lambda tick: tick <= now, cron.after(last)), _COUNTED + 1))
        if missed <= CATCH_UP_BATCH:
            return
        self._far_behind.add(key)
        logger.warning(
            "By schedule %r (%s), %s events of type %r were not published since %s, and are now, %d in a transaction.",
            key.cron,
            key.timezone,
            f"more than {_COUNTED}" if missed > _COUNTED else missed,
            key.type,
            f"{last:%Y-%m-%d %H:%M:%S %Z}",
            CATCH_UP_BATCH,
        )

    def _crons(self) -> dict[_Key, Cron]:
        scheduled = [(route.pattern, route.handler.cron) for route in self._router.routes()]
        return {_Key(path, cron.expression, cron.timezone): cron for path, cron in scheduled if cron is not None}

    async def _declare(self, crons: dict[_Key, Cron]) -> tuple[datetime, dict[_Key, datetime]]:
        """Say that we have these schedules; return the database's clock, and how far each of them has come."""
        new = insert(Schedule).values([{"channel": self._channel, **key._asdict()} for key in sorted(crons)])
        renewed = new.on_conflict_do_update(
            index_elements=["channel", "type", "cron", "timezone"],
            set_={"declared_at": func.now()},
            where=Schedule.declared_at < func.now() - timedelta(seconds=LOOK_SECONDS),
        )
        look = select(Schedule.type, Schedule.cron, Schedule.timezone, Schedule.last_at, func.clock_timestamp()).where(
            Schedule.channel == self._channel,
            tuple_(Schedule.type, Schedule.cron, Schedule.timezone).in_([tuple(key) for key in crons]),
        )
        async with asyncio.timeout(ANSWER_SECONDS), self._session() as session, session.begin():
            await session.execute(renewed)
            rows = (await session.execute(look)).all()
        return rows[0][4], {_Key(*row[:3]): row[3] for row in rows}

    async def _publish(self, key: _Key, last: datetime, ticks: list[datetime], until: datetime) -> None:
        """Publish *ticks*, unless somebody else has moved the schedule on since *last*; both commit together."""
        moved_on = (
            update(Schedule)
            .where(
                Schedule.channel == self._channel,
                Schedule.type == key.type,
                Schedule.cron == key.cron,
                Schedule.timezone == key.timezone,
                Schedule.last_at == last,
                func.clock_timestamp() >= until,
            )
            .values(last_at=until)
            .returning(Schedule.last_at)
            .execution_options(synchronize_session=False)
        )
        async with asyncio.timeout(ANSWER_SECONDS), self._session() as session, session.begin():
            if (await session.execute(moved_on)).one_or_none() is None:
                return
            for tick in ticks:
                payload = {"scheduled_at": tick.isoformat()}
                await publish_event(session, key.type, payload, self._channel, run_at=tick)
        if len(ticks) > 1:
            logger.info(
                "%d events of type %r were published that the clock came to up to %s.", len(ticks), key.type, until
            )
