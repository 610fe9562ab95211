"""Where bugs are put, and where the tests are that are asked."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = "_runtime/statements.py"
SCHEMA: Final = "migrations/versions/0001_first_schema.py"

UNIT: Final = "tests/unit/"
POSTGRES: Final = "tests/postgres/"
SYSTEM: Final = "tests/system/"
MODEL: Final = "tests/model/test_deliveries.py::test_deliveries_do_what_the_model_says"
CANCELLED: Final = "tests/sweeps/test_cancellations.py::test_a_handler_that_is_cancelled_at_any_await_is_run_again"


def race(name: str, level: str = "read-committed") -> str:
    """Return the test that plays all orders of a race."""
    return f"tests/interleavings/test_interleavings.py::test_every_order[{name}-{level}]"
