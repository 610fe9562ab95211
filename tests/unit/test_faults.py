from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pgebus._runtime.faults import is_disconnect, is_disconnect_state, is_refusal, is_replayable, sqlstate

STALE_PLAN = "cached statement plan is invalid due to a database schema or configuration change"
CHANGED_PLAN = "cached plan must not change result type"


# Not typed in SQLAlchemy.
dialect_error_of: Any = AsyncAdapt_asyncpg_dbapi.Error


def wrapped(error: Exception, *, invalidated: bool = False) -> DBAPIError:
    """Return *error* as it comes out of SQLAlchemy: in an error of the dialect, and that in one of SQLAlchemy."""
    dialect_error = dialect_error_of(str(error))
    dialect_error.sqlstate = getattr(error, "sqlstate", None)
    dialect_error.__cause__ = error
    outer = DBAPIError("SELECT 1", None, dialect_error, connection_invalidated=invalidated)
    outer.__cause__ = dialect_error
    return outer


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


# sqlstate


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, None),
        (asyncpg.SerializationError("x"), "40001"),
        (asyncpg.UniqueViolationError("x"), "23505"),
        (wrapped(asyncpg.DeadlockDetectedError("x")), "40P01"),
        (caused(ValueError("mine"), asyncpg.SerializationError("x")), "40001"),
        (caused(ValueError("mine"), wrapped(asyncpg.SerializationError("x"))), "40001"),
        (caused(ValueError("a"), caused(KeyError("b"), asyncpg.SerializationError("x"))), "40001"),
        (ValueError("mine"), None),
        (asyncpg.InterfaceError("x"), None),
        (ConnectionResetError(), None),
        (wrapped(asyncpg.InterfaceError("x")), None),
    ],
)
def test_the_state_is_found_where_it_is(error: BaseException | None, state: str | None) -> None:
    assert sqlstate(error) == state


def test_the_state_is_found_below_a_dialect_that_did_not_copy_it() -> None:
    inner = dialect_error_of("x")
    outer = DBAPIError("SELECT 1", None, inner)
    outer.__cause__ = caused(inner, asyncpg.SerializationError("x"))
    assert sqlstate(outer) == "40001"


def test_the_outermost_state_counts() -> None:
    """A handler that caught one database error and then met another has failed with the latter."""
    assert sqlstate(caused(asyncpg.UniqueViolationError("x"), asyncpg.SerializationError("y"))) == "23505"


def test_what_merely_happened_before_is_no_cause() -> None:
    error = ValueError("mine")
    error.__context__ = asyncpg.SerializationError("x")
    assert sqlstate(error) is None


def test_causes_in_a_circle_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert sqlstate(one) is None


def test_a_state_that_is_no_text_is_not_one_of_ours() -> None:
    class ForeignError(Exception):
        sqlstate = 40001

    assert sqlstate(ForeignError()) is None
    assert sqlstate(caused(ForeignError(), asyncpg.DeadlockDetectedError("x"))) == "40P01"


# is_replayable


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped, lambda error: caused(ValueError(str(error)), error)])
@pytest.mark.parametrize(
    ("error", "replayable"),
    [
        (asyncpg.SerializationError("x"), True),
        (asyncpg.DeadlockDetectedError("x"), True),
        (asyncpg.InvalidCachedStatementError(STALE_PLAN), True),
        (asyncpg.FeatureNotSupportedError(CHANGED_PLAN), True),
        (asyncpg.FeatureNotSupportedError("cross-database references are not implemented"), False),
        (asyncpg.UniqueViolationError("cached plan"), False),
        (asyncpg.InFailedSQLTransactionError("x"), False),
        (asyncpg.ConnectionDoesNotExistError("x"), False),
        (asyncpg.AdminShutdownError("x"), False),
        (ConnectionResetError("cached plan"), False),
        (asyncpg.InterfaceError("cached plan"), False),
    ],
)
def test_only_conflicts_and_stale_plans_are_worth_the_same_again(
    error: Exception, wrap: Callable[[Exception], BaseException], replayable: bool
) -> None:
    assert is_replayable(wrap(error)) is replayable


# is_refusal


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (asyncpg.UntranslatableCharacterError("x"), True),
        (asyncpg.CharacterNotInRepertoireError("x"), True),
        (asyncpg.DataError("invalid input for query argument $1"), True),
        (asyncpg.NumericValueOutOfRangeError("x"), True),
        (asyncpg.InvalidTextRepresentationError("x"), True),
        (asyncpg.CheckViolationError("x"), True),
        (asyncpg.ForeignKeyViolationError("x"), True),
        (asyncpg.UniqueViolationError("x"), True),
        (asyncpg.SerializationError("x"), False),
        (asyncpg.DeadlockDetectedError("x"), False),
        (asyncpg.QueryCanceledError("x"), False),
        (asyncpg.TooManyConnectionsError("x"), False),
        (asyncpg.DiskFullError("x"), False),
        (asyncpg.InsufficientPrivilegeError("x"), False),
        (asyncpg.UndefinedTableError("x"), False),
        (asyncpg.ReadOnlySQLTransactionError("x"), False),
        (asyncpg.AdminShutdownError("x"), False),
        (asyncpg.ConnectionDoesNotExistError("x"), False),
        (asyncpg.PostgresError("no state"), False),
        (asyncpg.InterfaceError("22000"), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
        (ValueError("x"), False),
    ],
)
def test_only_wrong_data_is_refused_the_same_way_every_time(error: BaseException, refused: bool) -> None:
    assert is_refusal(error) is refused
    if refused:
        assert not is_disconnect(error)


# is_disconnect


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (asyncpg.ConnectionDoesNotExistError("closed in the middle of operation"), True),
        (asyncpg.ConnectionFailureError("x"), True),
        (asyncpg.AdminShutdownError("x"), True),
        (asyncpg.CrashShutdownError("x"), True),
        (asyncpg.CannotConnectNowError("x"), True),
        (asyncpg.ReadOnlySQLTransactionError("x"), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.InternalClientError("x"), True),
        (ConnectionResetError(), True),
        (OSError("no route"), True),
        (TimeoutError(), True),
        (EOFError(), True),
        (wrapped(asyncpg.AdminShutdownError("x")), True),
        (wrapped(asyncpg.InterfaceError("connection is closed"), invalidated=True), True),
        (asyncpg.SerializationError("x"), False),
        (asyncpg.QueryCanceledError("x"), False),
        (asyncpg.TooManyConnectionsError("x"), False),
        (asyncpg.UniqueViolationError("x"), False),
        (wrapped(asyncpg.UniqueViolationError("x")), False),
        (PoolTimeoutError("no connection came free: the pool has one, and we are still connected"), False),
        (ValueError("x"), False),
    ],
)
def test_what_leaves_the_last_statement_in_the_dark(error: BaseException, lost: bool) -> None:
    assert is_disconnect(error) is lost


@pytest.mark.parametrize("state", ["08000", "08003", "08006", "57P01", "57P02", "57P03", "57P05", "25006"])
def test_states_of_a_lost_session(state: str) -> None:
    assert is_disconnect_state(state)


@pytest.mark.parametrize("state", [None, "", "57014", "40001", "53300", "25P02", "0A000", "PGB01", "PGB02"])
def test_states_of_a_session_that_lives(state: str | None) -> None:
    assert not is_disconnect_state(state)
