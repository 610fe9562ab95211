"""Every race in every order; the default lane plays a portion of each."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest

from pgebus.settings import DatabaseSettings
from tests.interleavings.scheduler import interleavings, portion
from tests.interleavings.spec import play
from tests.interleavings.specs import RACES, Race

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# How many orders of a race at one level the default lane plays.
PORTION = 4

RACES_BY_NAME = [list(levels) for _, levels in groupby(RACES, key=lambda race: race.name)]


@pytest.mark.parametrize("races", RACES_BY_NAME, ids=lambda races: races[0].name)
async def test_a_portion_of_the_orders(races: list[Race], database: DatabaseSettings, sql: Sql) -> None:
    for race in races:
        await play(race.make(race.level), database, sql, most=PORTION)


@pytest.mark.slow
@pytest.mark.parametrize("race", RACES, ids=str)
async def test_every_order(race: Race, database: DatabaseSettings, sql: Sql) -> None:
    """All of them end as they may; each outcome, wait and error that the spec names comes at least once."""
    await play(race.make(race.level), database, sql)


def test_the_documentation_says_how_many_there_are() -> None:
    orders = sum(len(race.make(race.level).orders()) for race in RACES)
    text = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    assert f"{orders:,} orders of {len(RACES_BY_NAME)} races" in text


def test_all_orders_are_played_that_keep_each_sessions_own() -> None:
    orders = list(interleavings({"a": 2, "b": 2, "c": 1}))
    assert len(orders) == len(set(orders)) == 30
    assert all(sorted(order) == ["a", "a", "b", "b", "c"] for order in orders)


def test_a_portion_is_spread_over_all_orders() -> None:
    orders = list(interleavings({"a": 3, "b": 3}))
    assert portion(orders, None) == portion(orders, 20) == orders
    assert portion(orders, 3) == [orders[0], orders[9], orders[19]]
