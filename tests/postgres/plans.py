"""What statements cost: the buffers that they touch, by EXPLAIN ANALYZE."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import event

from pgebus import DatabaseSessionManager


def explaining(sm: DatabaseSessionManager) -> list[int]:
    """Return a list that gets, for each of our statements, the buffers that it touches: it is run twice."""
    buffers: list[int] = []

    @event.listens_for(sm.engine.sync_engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if "pgebus" not in statement:
            return
        # In a savepoint: what it changes, it changes again when it is sent in earnest.
        cursor.execute("SAVEPOINT explained", ())
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters)
        found = cursor.fetchall()[0][0]
        cursor.execute("ROLLBACK TO SAVEPOINT explained", ())
        plan = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
        buffers.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    return buffers
