"""How much of a sweep is done: a sample, another one each day, or everything.

The seed is in the name of the test; `PGEBUS_SWEEP_SEED` sets it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Final

import pytest

SEED: Final = int(os.environ.get("PGEBUS_SWEEP_SEED") or datetime.now(UTC).date().toordinal())
ALL: Final = 1_000_000


def sampled(size: int) -> pytest.MarkDecorator:
    """Parametrize a sweep: a sample of *size* in the default lane, everything in the slow one."""
    return pytest.mark.parametrize(
        ("size", "seed"),
        [
            pytest.param(size, SEED, id=f"{size} with seed {SEED}"),
            pytest.param(ALL, SEED, id="all", marks=pytest.mark.slow),
        ],
    )
