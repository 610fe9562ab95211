"""The twenty planted bugs: mistakes that queues on PostgreSQL have been made with, as they would look in this one.

Where pgebus has no such thing as the mistake names, a comment says what it was translated to.
"""

from __future__ import annotations

from typing import Final

from tests.planted import finishing, working
from tests.planted.bug import Bug


def _number(bug: Bug) -> int:
    return int(bug.name.removeprefix("B"))


BUGS: Final = tuple(sorted((*finishing.BUGS, *working.BUGS), key=_number))
