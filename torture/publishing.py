"""A publisher process: transactions of every kind, and a ledger of what it knows of them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    Event,
    EventPublisher,
    publish_event,
    publish_event_sync,
    publish_events,
)
from torture.history import Outcome
from torture.ledger import Ledger, read_file
from torture.tables import KEYS, type_of
from torture.tally import Tally

Pipe: TypeAlias = "Connection[str, str]"

# Each publisher has numbers of its own.
NUMBERS: Final = 10**9
PATIENCE_SECONDS: Final = 8.0
_BULK: Final = (100, 200)
_BUSINESS: Final = text(
    "INSERT INTO business (number, publisher)"
    " SELECT g, CAST(:publisher AS int) FROM generate_series(CAST(:a AS bigint), CAST(:b AS bigint)) g"
)
_LOCK: Final = text("SELECT key FROM things WHERE key = :key FOR UPDATE")
_PLAIN: Final = text(
    "INSERT INTO pgebus.events (type, channel, payload) "
    "VALUES (:type, 'events', jsonb_build_object('number', CAST(:number AS bigint)))"
)

logger = logging.getLogger(__name__)


class Way(NamedTuple):
    """A way to publish.

    Attributes:
        share: Of a thousand transactions, how many are like that.
        least: Events in one transaction, at least.
        most: And at most.
    """

    share: int
    least: int = 1
    most: int = 1


WAYS: Final = {
    "call": Way(370),
    "add": Way(150, 1, 4),
    "keyed": Way(200, 1, 3),
    "delayed": Way(60),
    "rollback": Way(50, 1, 3),
    "bulk": Way(40, *_BULK),
    "alone": Way(50),
    "sync": Way(40),
    "plain": Way(40),
}


@dataclass(frozen=True)
class Errand:
    """What a publisher is told.

    Attributes:
        number: Which publisher it is; from 1.
        slot: Its place in the tally.
        slots: How many there are.
        url: How it reaches PostgreSQL.
        seed: Of its choices.
        home: Where its ledger is.
        quota: How many events it has to get confirmed, over all its lives.
        begins: The monotonic clock when the first publisher began.
        seconds: In how long it is to be done.
        at_most: When it stops all the same, in seconds after that.
    """

    number: int
    slot: int
    slots: int
    url: str
    seed: int
    home: str
    quota: int
    begins: float
    seconds: float
    at_most: float

    @property
    def ledger(self) -> Path:
        """Where its ledger is."""
        return Path(self.home) / f"ledger-{self.number}"


def publish(pipe: Pipe, errand: Errand) -> None:
    """Publish until the quota is met; killed, it is to be started again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    logging.basicConfig(filename=Path(errand.home) / f"publisher-{errand.number}.log", format="%(asctime)s %(message)s")
    asyncio.run(_publish(pipe, errand))
    sys.exit(0)


async def _publish(pipe: Pipe, errand: Errand) -> None:
    asyncio.get_running_loop().add_reader(pipe.fileno(), lambda: os._exit(1))  # the parent is gone
    written = [unit for unit, _ in read_file(errand.ledger)]
    last = max((unit.last for unit in written), default=errand.number * NUMBERS)
    done = sum(unit.last - unit.first + 1 for unit in written if unit.outcome is Outcome.OK)
    settings = DatabaseSettings.model_validate(
        {
            "url": errand.url,
            "application_name": f"torture-publisher-{errand.number}",
            "pool_size": 2,
            "connect_timeout_seconds": 5.0,
        }
    )
    tally = Tally(Path(errand.home) / "tally", errand.slots)
    sm = DatabaseSessionManager(settings)
    alone = EventPublisher(settings, connections=1)
    with Ledger(errand.ledger) as ledger:
        publisher = _Publisher(errand, sm, alone, ledger, random.Random(f"{errand.seed}:{errand.number}:{last}"))
        while done < errand.quota and monotonic() - errand.begins < errand.at_most:
            tally.set(errand.slot, "published", done)
            ahead = errand.begins + errand.seconds * done / errand.quota - monotonic()
            if ahead > 0:
                await asyncio.sleep(ahead)
            if tally.get(errand.slot, "wait"):
                await asyncio.sleep(0.05)
                continue
            size, outcome = await publisher.one(last + 1)
            last += size
            if outcome is Outcome.OK:
                done += size
    tally.set(errand.slot, "published", done)
    await alone.close()
    await sm.close()


class _Publisher:
    def __init__(
        self,
        errand: Errand,
        sm: DatabaseSessionManager,
        alone: EventPublisher,
        ledger: Ledger,
        rng: random.Random,
    ) -> None:
        self._errand = errand
        self._sm = sm
        self._alone = alone
        self._ledger = ledger
        self._rng = rng
        url = errand.url.replace("postgresql://", "postgresql+psycopg://", 1)
        self._engine = create_engine(
            url,
            connect_args={"connect_timeout": 5, "application_name": f"torture-publisher-{errand.number}"},
            pool_pre_ping=True,
        )

    async def one(self, first: int) -> tuple[int, Outcome]:
        """Do one transaction, with numbers from *first* on; return how many, and what became of it."""
        (name,) = self._rng.choices(list(WAYS), [way.share for way in WAYS.values()])
        size = self._rng.randint(WAYS[name].least, WAYS[name].most)
        last = first + size - 1
        self._ledger.begins(first, last, name, business=name != "alone")
        match name:
            case "alone":
                outcome = await self._by_itself(first)
            case "sync":
                outcome = self._sync(first)
            case _:
                do = getattr(self, f"_{name}")
                outcome = await self._transaction(lambda session: do(session, first, last), first, last, name)
        self._ledger.ended(first, outcome)
        if outcome is not Outcome.OK and name != "rollback":
            await asyncio.sleep(self._rng.uniform(0.05, 0.3))
        return size, outcome

    async def _transaction(
        self, do: Callable[[AsyncSession], Awaitable[None]], first: int, last: int, name: str
    ) -> Outcome:
        outcome = Outcome.FAILED
        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self._sm.session() as session:
                await session.execute(_BUSINESS, {"publisher": self._errand.number, "a": first, "b": last})
                await do(session)
                if name == "rollback":
                    await session.rollback()
                    return Outcome.FAILED
                outcome = Outcome.UNKNOWN
                await session.commit()
                outcome = Outcome.OK
        except Exception as error:
            if ours(error):
                raise
            logger.warning("%s %d: %s: %s", name, first, type(error).__name__, str(error)[:200])
            if outcome is Outcome.UNKNOWN and refused(error):
                outcome = Outcome.FAILED
        return outcome

    async def _call(self, session: AsyncSession, first: int, _last: int) -> None:
        await publish_event(session, type_of(first), {"number": first}, "events")

    async def _add(self, session: AsyncSession, first: int, last: int) -> None:
        session.add_all(
            Event(type=type_of(number), channel="events", payload={"number": number})
            for number in range(first, last + 1)
        )

    async def _keyed(self, session: AsyncSession, first: int, last: int) -> None:
        key = f"thing:{self._rng.randrange(KEYS)}"
        # The lock that both of two publishers take: without it, there is no order between their transactions.
        await session.execute(_LOCK, {"key": key})
        for number in range(first, last + 1):
            await publish_event(session, "stock.moved", {"number": number}, "events", key=key)

    async def _delayed(self, session: AsyncSession, first: int, _last: int) -> None:
        run_at = datetime.now(UTC) + timedelta(seconds=self._rng.uniform(0.5, 3.0))
        await publish_event(session, type_of(first), {"number": first}, "events", run_at)

    async def _rollback(self, session: AsyncSession, first: int, last: int) -> None:
        await self._add(session, first, last)
        await session.flush()

    async def _bulk(self, session: AsyncSession, first: int, last: int) -> None:
        rows: list[dict[str, Any]] = [
            {"type": type_of(number), "channel": "events", "payload": {"number": number}}
            for number in range(first, last + 1)
        ]
        await publish_events(await session.connection(), rows)

    async def _plain(self, session: AsyncSession, first: int, _last: int) -> None:
        await session.execute(_PLAIN, {"type": type_of(first), "number": first})

    async def _by_itself(self, number: int) -> Outcome:
        """Publish until it is known to be there: the dedup_key makes that harmless."""
        while True:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._alone.publish(type_of(number), {"number": number}, dedup_key=f"number {number}")
            except Exception as error:
                if ours(error):
                    raise
                logger.warning("alone %d: %s: %s", number, type(error).__name__, str(error)[:200])
                await asyncio.sleep(self._rng.uniform(0.05, 0.3))
            else:
                return Outcome.OK

    def _sync(self, number: int) -> Outcome:
        outcome = Outcome.FAILED
        try:
            with Session(self._engine) as session:
                session.execute(_BUSINESS, {"publisher": self._errand.number, "a": number, "b": number})
                publish_event_sync(session, type_of(number), {"number": number}, "events")
                outcome = Outcome.UNKNOWN
                session.commit()
                outcome = Outcome.OK
        except Exception as error:
            if ours(error):
                raise
            logger.warning("sync %d: %s: %s", number, type(error).__name__, str(error)[:200])
            if outcome is Outcome.UNKNOWN and refused(error):
                outcome = Outcome.FAILED
        return outcome


def ours(error: BaseException) -> bool:
    """Return whether it is no fault of the nemesis, but a mistake of this program: it would never go away."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return (isinstance(state, str) and state.startswith("42")) or isinstance(error, (TypeError, AttributeError))


def refused(error: BaseException) -> bool:
    """Return whether PostgreSQL has said that it did not commit, and lived on to say so."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    state = getattr(error.orig, "sqlstate", None)
    return isinstance(state, str) and not state.startswith(("08", "57P", "XX"))
