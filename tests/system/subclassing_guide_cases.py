"""The guide for subclasses runs, from its first block to its last. Runs apart, see tests/apart.py."""

from __future__ import annotations

import ast
import inspect
import re
from textwrap import dedent
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgebus
from pgebus import DatabaseSessionManager, DatabaseSettings, EventRouter
from tests.apart import ROOT
from tests.system.bus import Sql, running
from tests.system.waiting import until

GUIDE = ROOT / "docs" / "guides" / "subclassing.md"
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Base(DeclarativeBase):
    """The application's own."""


class Order(Base):
    """A table of the application."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    total: Mapped[int]


async def test_the_guide_runs(database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql) -> None:
    async with sm.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await sql.execute(
        "INSERT INTO orders VALUES (7, 100);"
        "ALTER TABLE pgebus.events ADD tenant_id integer, ADD order_id integer, ADD amount numeric"
    )
    router = EventRouter()
    names: dict[str, Any] = {name: getattr(pgebus, name) for name in pgebus.__all__}
    names |= {"__name__": __name__, "Any": Any, "Order": Order, "publisher_sm": sm, "router": router}
    blocks = [dedent(match[2]) for match in _BLOCK.finditer(GUIDE.read_text(encoding="utf-8"))]
    assert len(blocks) == 6
    for block in blocks:
        code = compile(block, GUIDE.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        result = eval(code, names)  # noqa: S307 - our own documentation
        if inspect.isawaitable(result):
            await result
    types = await sql.fetch("SELECT type, order_id, tenant_id FROM pgebus.events ORDER BY id")
    assert [tuple(row) for row in types] == [
        ("order.placed", 7, 1),
        ("order.placed", 7, None),
        ("shop.opened", None, 1),
        ("order.placed", 7, None),
        ("order.placed", 7, None),
    ]
    async with running(router, database):
        await until(lambda: sql.fetchval("SELECT count(*) = 4 FROM pgebus.deliveries WHERE status = 'completed'"))
    assert await sql.fetchval("SELECT total FROM orders") == 104
