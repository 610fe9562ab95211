"""What an error means for the transaction that it happened in.

Pure: reads SQLSTATEs, decides nothing.
"""

from __future__ import annotations

from typing import Final

import asyncpg
from sqlalchemy.exc import DBAPIError

# Raised by the function `complete`.
LEASE_LOST: Final = "PGB01"
TRANSACTION_ENDED: Final = "PGB02"

IN_FAILED_TRANSACTION: Final = "25P02"
READ_ONLY: Final = "25006"

# The same transaction can simply be run again: serialization failure, deadlock, and a plan that a migration made stale.
REPLAYABLE: Final = frozenset({"40001", "40P01", "0A000"})


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of *error*, or of what it was raised from; None when PostgreSQL has no part in it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None)
        if isinstance(found, str):
            return found
        error = error.__cause__
    return None


def is_replayable(error: BaseException) -> bool:
    """Return whether running the transaction again at once is likely to work.

    0A000 is "feature not supported" in general; only the driver's stale plan is meant.
    """
    state = sqlstate(error)
    if state == "0A000":
        return "cached statement" in str(error) or "cached plan" in str(error)
    return state in REPLAYABLE


def is_refusal(error: BaseException) -> bool:
    """Return whether PostgreSQL will say the same again: the data is wrong (22) or breaks a constraint (23)."""
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(("22", "23"))


def is_disconnect(error: BaseException) -> bool:
    """Return whether the connection is gone, so that nobody knows what became of the last statement."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or is_disconnect_state(sqlstate(error))
    if isinstance(error, asyncpg.PostgresError):
        return is_disconnect_state(error.sqlstate)
    return isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, EOFError))


def is_disconnect_state(state: str | None) -> bool:
    """Return whether *state* says that the session has ended, or that it leads to a server that can't be written."""
    return state is not None and (state.startswith(("08", "57P")) or state == READ_ONLY)
