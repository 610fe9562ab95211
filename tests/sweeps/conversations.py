"""The conversations whose connections are cut at every message, and how one of them is cut, healed and checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from pgebus import EventSystem
from tests.sweeps.bench import Bench
from tests.sweeps.cutting import Armed, Cut, How, Origin, When

NETWORK: Final[tuple[How, ...]] = ("RST", "FIN", "black hole")
_PAUSE: Final = 0.3
NEVER: Final = 1_000_000


@dataclass(frozen=True)
class Conversation:
    """What a worker says to the server when there is something to do.

    Attributes:
        name: Of what it is about.
        role: The connections that it is held on.
        events: How many of each type are published for it.
        broken: Connections that are broken before, so that the conversation begins with a new one.
    """

    name: str
    role: str
    events: dict[str, int] = field(hash=False)
    broken: str | None = None
    at_least: int = 0
    """So many messages come by themselves, sooner or later."""

    async def provoke(self, bench: Bench, cut: Cut) -> Armed:
        """Arm *cut*, and give the worker something to do."""
        armed = bench.proxy.arm(cut, only_new=self.broken is not None)
        if self.broken is not None:
            bench.proxy.reset(self.broken)
        await bench.publish(**self.events)
        return armed


WORKER: Final = (
    Conversation("claim", "claims", {"mail_sent": 1, "order_placed": 1}, at_least=20),
    Conversation("dispatch", "handlers", {"order_placed": 4}),
    Conversation("fail", "handlers", {"order_refused": 2, "order_placed": 1}),
    Conversation("complete a batch", "writes", {"mail_sent": 4}),
    Conversation("write a failure", "writes", {"order_refused": 2}),
    Conversation("maintain", "rounds", {"mail_sent": 1}, at_least=20),
    Conversation("listen", "listen", {"mail_sent": 1}, broken="listen"),
    Conversation("connect and dispatch", "handlers", {"order_placed": 2}, broken="handlers"),
    Conversation("connect and claim", "control", {"mail_sent": 1, "order_placed": 1}, broken="claims"),
)


@asynccontextmanager
async def long_lived(bench: Bench) -> AsyncIterator[EventSystem]:
    """Run the system that has to survive all cuts."""
    async with bench.system() as system:
        # Each line has said what it is for, and the statements of the first events are prepared.
        await bench.publish(order_placed=2, mail_sent=1, order_refused=1)
        await bench.finished()
        yield system


async def messages_of(bench: Bench, conversation: Conversation) -> dict[Origin, list[str]]:
    """Return the names of the messages of a conversation that nobody disturbs."""
    nowhere = Cut(conversation.role, "client", NEVER, "before", "RST")
    armed = await conversation.provoke(bench, nowhere)
    await bench.finished()
    bench.proxy.heal()
    more = conversation.at_least
    return {origin: names + [""] * (more - len(names)) for origin, names in armed.trace.items()}


def cuts(role: str, messages: dict[Origin, list[str]], hows: tuple[How, ...] = NETWORK) -> list[Cut]:
    """Return every cut of a conversation: each message of the client before and after, each of the server before it.

    After a message of the server is before the next one of somebody, except after the last.
    """
    kinds: list[tuple[Origin, When]] = [("client", "before"), ("client", "after"), ("server", "before")]
    places = [(origin, number, when) for origin, when in kinds for number in range(1, len(messages[origin]) + 1)]
    places += [("server", len(messages["server"]), "after")]
    return [Cut(role, origin, number, when, how) for origin, number, when in places for how in hows]


async def survive(bench: Bench, system: EventSystem, conversation: Conversation, cut: Cut) -> str | None:
    """Cut once, heal, run to quiescence, and check; return the message that was cut, None if it never came."""
    armed = await conversation.provoke(bench, cut)
    happened = await soon(bench, conversation, armed.happened)
    if happened and cut.how == "black hole":
        assert await soon(bench, conversation, armed.deserted), "nobody noticed that the connection is deaf"
    bench.proxy.heal()
    await bench.publish(order_placed=1, mail_sent=1)
    try:
        await bench.finished()
        await bench.at_rest(system)
    except AssertionError as error:
        error.add_note(_state_of(system))
        raise
    return armed.message if happened else None


def _state_of(system: EventSystem) -> str:
    """Say what the system itself thinks, for whoever has to find out why it does not go on."""
    claimer = system._claimer
    assert claimer is not None
    tasks = [task.get_name() for task in system._crew._tasks]
    waiting = claimer._acknowledger._waiting
    pool = claimer._store._line._engine.sync_engine.pool.status()
    return f"{tasks=}, {waiting=}, {pool=}, buffer={claimer._buffer}, {system.health()}"


async def soon(bench: Bench, conversation: Conversation, flag: asyncio.Event) -> bool:
    """Wait for *flag*, with more to do from time to time; return whether it came."""
    for _ in range(25):
        try:
            await asyncio.wait_for(flag.wait(), _PAUSE)
        except TimeoutError:
            await bench.publish(**conversation.events)
        else:
            return True
    return False
