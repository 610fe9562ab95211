"""A dedup_key beside a class of the application's. Runs apart, see tests/apart.py."""

from __future__ import annotations

import pytest
from sqlalchemy import ForeignKey, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from tests.postgres.units import KINDS, Kind, Units
from tests.system.bus import Sql

from pgebus import Event
from pgebus.settings import DatabaseSettings


class Base(DeclarativeBase):
    """The application's own."""


class Line(Base):
    """One of many of an event."""

    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[int | None] = mapped_column(ForeignKey(Event.__table__.c.id))


class OrderPlaced(Event, event_type="order.placed"):
    """With a collection that every query for events joins."""

    note: Mapped[str | None]
    lines: Mapped[list[Line]] = relationship(Line, lazy="joined")


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_a_duplicate_comes_with_its_collections(database: DatabaseSettings, sql: Sql, kind: Kind) -> None:
    await sql.execute("ALTER TABLE pgebus.events ADD note text; CREATE TABLE lines (id int, event_id bigint)")
    units = Units(database)
    async with units.open(kind) as unit:
        first = await unit.publish(
            "order.placed", {}, "events", dedup_key="k", event_class=OrderPlaced, note=func.lower("ABC")
        )
        id_ = first.id
        assert (first.note, (await unit.publish("order.placed", {}, "events", dedup_key="k")).note) == ("abc", "abc")
        await unit.publish("other", {}, "events", dedup_key="other")
        await unit.end("commit")
    await sql.execute("INSERT INTO lines VALUES (1, $1), (2, $1)".replace("$1", str(id_)))
    async with units.open(kind) as unit:
        again = await unit.publish("order.placed", {}, "events", dedup_key="k")
        assert (again.id, again.duplicate, [line.id for line in again.lines]) == (id_, True, [1, 2])
        assert (await unit.publish("other", {}, "events", dedup_key="other")).duplicate
