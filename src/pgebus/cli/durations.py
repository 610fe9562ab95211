"""How long something took, in a few characters."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

__all__ = ["duration"]

_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


def duration(length: timedelta) -> str:
    """Return *length* as a person would say it; what is negative, by clocks that differ, is nothing.

    >>> [duration(timedelta(seconds=each)) for each in (0.0004, 0.0352, 2.345, 125, 9000, 250000)]
    ['0 ms', '35 ms', '2.3 s', '2 min 5 s', '2 h 30 min', '2 d 21 h']
    """
    seconds = max(0.0, length.total_seconds())
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, below, its_name in _UNITS:
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {its_name}" if rest else "")
    raise AssertionError("a minute is the smallest of them")
