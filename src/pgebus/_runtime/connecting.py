"""The engines of one worker, and what their connections are set to.

Opens no connection by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from pgebus._runtime.requirements import CLAIM_DEFAULTS
from pgebus._runtime.store import ANSWER_SECONDS
from pgebus.database import dispose, make_engine
from pgebus.settings import Settings


def beats(settings: Settings) -> bool:
    """Return whether the worker shows that it lives by a beat, and listens to nothing."""
    return settings.event_system.liveness == "beat"


def pooled(settings: Settings) -> bool:
    """Return whether the worker's connections are taken to go through a transaction pooler."""
    return beats(settings) or settings.database.listen_url is not None


@asynccontextmanager
async def open_engines(settings: Settings) -> AsyncIterator[tuple[AsyncEngine, AsyncEngine, AsyncEngine]]:
    """Make the engines: for our own statements, for handlers, for the LISTEN connection.

    Apart from each other, so that handlers can never starve the machine that serves them.
    """
    database = settings.database
    autocommit: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
    if beats(settings):
        # What is prepared on one server connection would be executed on another, which does not know it.
        unprepared = {"statement_cache_size": 0, "prepared_statement_cache_size": 0, **database.connect_args}
        database = database.model_copy(update={"connect_args": unprepared})
    control = make_engine(database, pool_size=5 if beats(settings) else 4, max_overflow=0, **autocommit)
    if not pooled(settings):
        # Nobody else uses these sessions: through a pooler, a SET would reach strangers.
        event.listen(control.sync_engine, "connect", _claim_as_designed)
        event.listen(control.sync_engine, "connect", _give_up_in_time)
    handlers = make_engine(database, pool_size=settings.event_system.n_workers, max_overflow=0)
    listen = make_engine(database, url=database.listen_sqlalchemy_url(), poolclass=NullPool, **autocommit)
    async with AsyncExitStack() as stack:  # goes on to the next one when one of them fails
        for engine in (control, handlers, listen):
            stack.push_async_callback(dispose, engine)
        yield control, handlers, listen


def _claim_as_designed(dbapi_connection: Any, _record: object) -> None:
    """Undo defaults of the role or the database under which a claim would not be what it has to be.

    And these connections wait for work: they are not to be ended for it.
    """
    for setting, accepted, right in (
        *CLAIM_DEFAULTS,
        ("idle_session_timeout", ("0", None), "0"),  # None: before PostgreSQL 14 there is none
    ):

        async def mend(
            driver: Any, setting: str = setting, accepted: tuple[str | None, ...] = accepted, right: str = right
        ) -> None:
            if await driver.fetchval("SELECT current_setting($1, true)", setting) not in accepted:
                await driver.execute(f"SET {setting} = '{right}'")

        dbapi_connection.run_async(mend)


# A prepared statement keeps the plan that it got when it was new, and the tables may have been empty then: a scan that
# was cheap would read all that has come since, until the next autovacuum. Every statement of ours has an index.
PLANNER: Final = "SET enable_seqscan = off; SET enable_bitmapscan = off"
# Our tables are named with their schema, and all else in our statements is PostgreSQL's own, whatever search path the
# role or the database has: nobody may lead us to functions or operators of his.
SEARCH_PATH: Final = "SET search_path = pg_catalog, pg_temp"


def _give_up_in_time(dbapi_connection: Any, _record: object) -> None:
    """Let the server end a statement shortly before we would hang up on it.

    A backend that waits for a lock does not notice that its client has gone: each attempt would leave one behind.
    """
    milliseconds = int(ANSWER_SECONDS * 800)
    dbapi_connection.run_async(
        lambda driver: driver.execute(
            # The second, because a worker that freezes in a transaction of a limited group would keep it locked.
            f"{PLANNER}; {SEARCH_PATH}; SET statement_timeout = {milliseconds}; "
            f"SET idle_in_transaction_session_timeout = {milliseconds}"
        )
    )
