"""What an operator does to single deliveries, as the schema allows it: cancel, redrive, replay.

Stand-ins for functions of `pgebus.operations`: one statement each, in a transaction of its own. What comes back and has
a key waits as `blocked`, for the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.system.bus import Sql

Place = tuple[int, str]

_THESE: Final = (
    "(d.event_id, d.consumer_group) IN (SELECT u.e, u.g FROM unnest($1::bigint[], $2::text[]) u(e, g)) AND d.status"
)
_CANCEL: Final = f"""
UPDATE pgebus.deliveries d SET status = 'cancelled', worker_id = NULL, claimed_at = NULL,
  finished_at = clock_timestamp(), holds_key = false
WHERE {_THESE} IN ('pending', 'blocked', 'running', 'dead', 'unhandled') RETURNING 1"""
_AGAIN: Final = """
UPDATE pgebus.deliveries d SET status = CASE WHEN key IS NULL THEN 'pending' ELSE 'blocked' END,
  due_at = clock_timestamp(), finished_at = NULL, attempt = 0, lost = 0, round = round + 1, holds_key = false,
  errors = jsonb_path_query_array(coalesce(errors, '[]') || jsonb_build_array(
    jsonb_build_object('at', clock_timestamp(), 'type', '{verb}')), '$[last - 4 to last]'){more}
WHERE {these} {status} RETURNING 1"""
_REDRIVE: Final = _AGAIN.format(verb="Redriven", more="", these=_THESE, status="IN ('dead', 'cancelled')")
_REPLAY: Final = _AGAIN.format(verb="Replayed", more=", handled = NULL", these=_THESE, status="= 'completed'")


async def _on(sql: Sql, statement: str, places: Sequence[Place]) -> int:
    events, groups = zip(*places, strict=True)
    return len(await sql.fetch(statement, list(events), list(groups)))


async def cancel(sql: Sql, places: Sequence[Place]) -> int:
    """Cancel deliveries, running ones included; return how many were."""
    return await _on(sql, _CANCEL, places)


async def redrive(sql: Sql, places: Sequence[Place]) -> int:
    """Put dead and cancelled deliveries back; return how many were."""
    return await _on(sql, _REDRIVE, places)


async def replay(sql: Sql, places: Sequence[Place]) -> int:
    """Have completed deliveries done again, by all of their handlers; return how many were."""
    return await _on(sql, _REPLAY, places)
