"""What the verbs have in common: how a statement is sent in the caller's transaction, and the parts of several.

Text, like the statements of the running machine, because the schema's name is the only thing that varies. Parameters
are named, so that any driver of SQLAlchemy can send them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

from pgebus._writing import table_of
from pgebus.errors import SessionStateError, SessionTypeError
from pgebus.names import quote_identifier
from pgebus.operations.selection import check_text

# How many errors a delivery keeps, newest last; what a person did is one of them.
KEPT_ERRORS: Final = 5

# What becomes of a purged event: it is never handled again. In its headers, which every claim reads anyway.
PURGED_AT: Final = "pgebus_purged_at"
NOT_PURGED: Final = f"(e.headers ->> '{PURGED_AT}') IS NULL"

# What the claims of a delivery are counted from that is made after its event was published. There may have been one
# before, of a group that keeps no history; it was counted from 0. A worker that is not done with that one would else
# hold the fence of this one as soon as it has claimed it. Below 2**30, and so with room for as many claims.
UNUSED_CLAIM_SEQ: Final = "CAST(1000000 + floor(random() * 1000000000) AS integer)"


async def schema_of(session: AsyncSession) -> str:
    """Return the quoted name of our schema, for text(); what waits in the session is flushed.

    Raises:
        SessionTypeError: If it is no AsyncSession.
    """
    if not isinstance(session, (AsyncSession, async_scoped_session)):
        raise SessionTypeError(f"An AsyncSession is needed, not a {type(session).__name__}.")
    await session.flush()
    connection = (await session.connection()).sync_connection
    assert connection is not None  # noqa: S101 - for the type checker: it was just opened
    # In text() a colon would begin a parameter.
    return quote_identifier(table_of(connection)[0]).replace(":", r"\:")


async def fetch(session: AsyncSession, sql: str, **parameters: Any) -> Sequence[Any]:
    """Run one statement in the caller's transaction, and return its rows."""
    return (await session.execute(text(sql), parameters)).all()


async def require_fresh_snapshots(session: AsyncSession, verb: str) -> None:
    """Refuse a session in which a later statement does not see what was committed since, or keeps no lock.

    Raises:
        SessionStateError: If it is in AUTOCOMMIT, or at REPEATABLE READ or above.
    """
    connection = await session.connection()
    if await connection.run_sync(lambda c: getattr(c.connection.dbapi_connection, "autocommit", False)):
        raise SessionStateError(f"{verb} takes several statements: the session must not be in AUTOCOMMIT.")
    ((level,),) = await fetch(session, "SELECT current_setting('transaction_isolation')")
    if level not in ("read committed", "read uncommitted"):
        raise SessionStateError(
            f"At {level.upper()} {verb} would not see what was committed a moment ago. Use READ COMMITTED."
        )


def entry(kind: str, *, of: str = "d") -> str:
    """Return the errors of a delivery with one more entry, as SQL: what a person did, with :by and :reason."""
    return f"""jsonb_path_query_array(coalesce({of}.errors, '[]') || jsonb_build_array(jsonb_build_object(
      'at', clock_timestamp(), 'attempt', {of}.attempt, 'worker', NULL, 'handler', NULL, 'type', '{kind}',
      'message', 'by ' || coalesce(CAST(:by AS text), session_user) || coalesce(': ' || CAST(:reason AS text), ''),
      'traceback', NULL)), '$[last - {KEPT_ERRORS - 1} to last]')"""


def told(by: str | None, reason: str | None) -> dict[str, str | None]:
    """Return what an entry says, checked.

    Raises:
        ConfigurationError: If it is no text that can be kept.
    """
    return {
        "by": None if by is None else check_text("by", by),
        "reason": None if reason is None else check_text("reason", reason),
    }


async def promote(session: AsyncSession, schema: str, keys: Iterable[tuple[str, str, str]]) -> int:
    """Let the first waiting delivery of each key in that nothing holds back; return how many.

    What the sweep of a worker does, for these keys alone, and under the same rules. What two transactions cannot see
    of each other is left to that sweep.

    Args:
        session: The caller's.
        schema: The quoted schema.
        keys: (channel, group, key).
    """
    channels, groups, names = [list(each) for each in zip(*sorted(set(keys)), strict=True)] or ([], [], [])
    if not names:
        return 0
    (row,) = await fetch(session, _PROMOTE.replace("{s}", schema), channels=channels, groups=groups, keys=names)
    return int(row[0])


async def wake(session: AsyncSession, channels: Iterable[str]) -> None:
    """Wake the sleeping workers of *channels*, at the commit."""
    told = sorted(set(channels))
    if told:
        await fetch(session, "SELECT pg_notify(c, '') FROM unnest(CAST(:channels AS text[])) c", channels=told)


_PROMOTE: Final = """
WITH k AS MATERIALIZED (
  SELECT u.channel, u.consumer_group, u.key
  FROM unnest(CAST(:channels AS text[]), CAST(:groups AS text[]), CAST(:keys AS text[])) u(channel, consumer_group, key)
), heads AS MATERIALIZED (
  SELECT b.event_id, b.consumer_group FROM k CROSS JOIN LATERAL (
    SELECT b.event_id, b.consumer_group FROM {s}.deliveries b
    WHERE b.status = 'blocked' AND b.channel = k.channel AND b.consumer_group = k.consumer_group AND b.key = k.key
    ORDER BY b.event_id LIMIT 1) b
  WHERE (SELECT p.event_id FROM {s}.deliveries p
         WHERE p.channel = k.channel AND p.consumer_group = k.consumer_group AND p.key = k.key
           AND (p.status IN ('pending', 'running') OR p.holds_key)
           AND (p.event_id < b.event_id OR p.status = 'running')
         ORDER BY p.event_id LIMIT 1) IS NULL
), free AS MATERIALIZED (
  SELECT f.place FROM (SELECT * FROM heads ORDER BY event_id, consumer_group) h CROSS JOIN LATERAL (
    SELECT d.ctid AS place FROM {s}.deliveries d
    WHERE d.event_id = h.event_id AND d.consumer_group = h.consumer_group AND d.status = 'blocked'
    ORDER BY d.event_id LIMIT 1 FOR UPDATE SKIP LOCKED) f
), done AS (
  UPDATE {s}.deliveries n SET status = 'pending' FROM free WHERE n.ctid = free.place RETURNING n.channel
), told AS MATERIALIZED (SELECT pg_notify(c.channel, '') FROM (SELECT DISTINCT channel FROM done) c)
SELECT (SELECT count(*) FROM done), (SELECT count(*) FROM told)"""


def moment(column: str) -> str:
    """Return a column as SQL, NULL where Python has no such year."""
    return f"CASE WHEN {column} > '0001-01-03' AND {column} < '9999-12-29' THEN {column} END"
