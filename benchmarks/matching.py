"""What patterns cost: in Python with a thousand routes, in the database with a hundred patterns.

`python -m benchmarks.matching`, on an embedded PostgreSQL. Medians; the ratios are what to compare.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import timeit
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final

import asyncpg

from pgebus import DatabaseSettings, EventRouter
from pgebus.embedded import EmbeddedPostgres
from pgebus.migrations import upgrade

ROUTES: Final = 1_000
PATTERNS: Final = 100
PUBLISHED: Final = 3_000
WORDS: Final = ("order", "payment", "stock", "placed", "failed", "late", "eu", "us")


async def _handle(_ctx: Any, _payload: Any) -> None: ...


def some_patterns(count: int) -> list[str]:
    """Return patterns of which a few match what is published here: `order.placed.eu`."""
    rng = random.Random(7)  # noqa: S311 - the same each time
    found: dict[str, None] = {}
    while len(found) < count:
        words = [rng.choice([*WORDS, f"w{rng.randrange(200)}", "*", "#"]) for _ in range(rng.randint(2, 4))]
        found[".".join(words)] = None
    return list(found)


def in_python() -> tuple[float, float]:
    """Return seconds for a type that was asked for before, and for one that was not."""
    router = EventRouter()
    for number, pattern in enumerate(some_patterns(ROUTES // 2)):
        router.on(pattern, name=f"pattern {number}")(_handle)
    for number in range(ROUTES // 2):
        router.on(f"order.n{number}", name=f"exact {number}")(_handle)
    assert router.handlers_for("order.placed.eu")
    again = min(timeit.repeat(lambda: router.handlers_for("order.placed.eu"), number=1_000, repeat=9)) / 1_000
    first = min(timeit.repeat(lambda: router.matching("order.placed.eu"), number=100, repeat=9)) / 100
    return again, first


async def per_publish(connection: asyncpg.Connection[asyncpg.Record]) -> float:
    """Return the seconds of one INSERT of one event, committed, without anybody who sleeps."""
    insert = await connection.prepare("INSERT INTO pgebus.events (type) VALUES ('order.placed.eu')")
    times = []
    for _ in range(PUBLISHED):
        began = perf_counter()
        await insert.fetch()
        times.append(perf_counter() - began)
    return statistics.median(times)


async def in_the_database(settings: DatabaseSettings) -> tuple[float, float]:
    """Return the seconds of a publish with one pattern, and with a hundred that do not match."""
    connection = await asyncpg.connect(settings.sqlalchemy_url().set(drivername="postgresql").render_as_string())
    subscribe: Callable[[str], Awaitable[object]] = lambda pattern: connection.execute(  # noqa: E731
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'g', $1)", pattern
    )
    await connection.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'g')")
    await subscribe("order.#")
    one: list[float] = []
    many: list[float] = []
    others = [pattern for pattern in some_patterns(PATTERNS + 1) if pattern != "order.#"][: PATTERNS - 1]
    for _ in range(3):  # in turn, so that the machine's mood counts for both
        await connection.execute("DELETE FROM pgebus.subscriptions WHERE pattern <> 'order.#'")
        one.append(await per_publish(connection))
        for pattern in others:
            await subscribe(pattern)
        many.append(await per_publish(connection))
    await connection.close()
    return statistics.median(one), statistics.median(many)


def main() -> None:
    """Measure, and print."""
    again, first = in_python()
    print(f"Python, {ROUTES} routes, half of them patterns: {first * 1e6:.1f} µs for a type that is new, ", end="")
    print(f"{again * 1e6:.2f} µs afterwards")
    with EmbeddedPostgres({"fsync": "off"}) as postgres:
        settings = DatabaseSettings.model_validate({"url": postgres.url()})
        upgrade(settings)
        one, many = asyncio.run(in_the_database(settings))
    print(f"Database, a publish of one event: {one * 1e6:.0f} µs with 1 pattern, {many * 1e6:.0f} µs with {PATTERNS}")
    print(f"That is {(many - one) * 1e6:.0f} µs more, and {many / one:.2f} times as much")


if __name__ == "__main__":
    main()
