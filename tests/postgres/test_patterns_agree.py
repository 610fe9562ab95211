"""A pattern means the same to the router, to the trigger, and to somebody who reads it aloud."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from tests.postgres.plain_sql import Sql
from tests.unit.test_patterns import oracle

from pgebus import EventContext, EventRouter

WORDS = ["a", "b", "a-b", "_1"]


async def handle(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("seed", range(3))
async def test_router_trigger_and_definition_agree(sql: Sql, seed: int) -> None:
    """On every pattern of up to two words, and on random longer ones, with random prefixes."""
    rng = random.Random(seed)
    parts = [*WORDS[:2], "*", "#"]
    patterns = {".".join(each) for n in (1, 2) for each in itertools.product(parts, repeat=n)}
    patterns |= {".".join(rng.choices([*WORDS, "*", "#"], k=rng.randint(3, 6))) for _ in range(100)}
    types = {".".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(80)} | {"a", "b", "a.b", "b.a", "a.b.a"}
    router, groups = EventRouter(), {}
    for number, pattern in enumerate(sorted(patterns)):
        groups[f"g{number}"] = pattern
        prefix, _, rest = pattern.partition(".")
        inner = EventRouter(prefix) if rest and prefix not in "*#" and rng.random() < 0.5 else EventRouter()
        inner.on(rest if inner._prefix else pattern, group=f"g{number}")(handle)
        router.include_router(inner, prefix="")
    await sql.execute("INSERT INTO pgebus.consumer_groups SELECT 'events', unnest($1::text[])", list(groups))
    await sql.execute(
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern)"
        " SELECT 'events', u.* FROM unnest($1::text[], $2::text[]) u",
        list(groups),
        list(groups.values()),
    )
    await sql.execute("INSERT INTO pgebus.events (type) SELECT unnest($1::text[])", sorted(types))
    rows = await sql.fetch(
        "SELECT type, array_agg(consumer_group::text) AS groups FROM pgebus.deliveries"
        " WHERE status = 'pending' GROUP BY 1"
    )
    by_trigger = {row["type"]: set(row["groups"]) for row in rows}
    for each in types:
        expected = {group for group, pattern in groups.items() if oracle(pattern, each)}
        assert by_trigger.get(each, set()) == expected, each
        assert {route.handler.group for route in router.matching(each)} == expected, each
