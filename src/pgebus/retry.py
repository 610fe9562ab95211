"""When a delivery is tried again: the policy, the delay, and the signals that a handler may raise.

Pure; it looks at no clock and waits for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Final

from pgebus.errors import ConfigurationError, PayloadValidationError

__all__ = ["MAX_DELAY", "Reject", "Retry", "RetryPolicy", "Signal", "Snooze", "retry_delay"]

MAX_DELAY: Final = timedelta(days=3650)
_MAX_ATTEMPTS: Final = 1000
_RNG: Final = Random()  # noqa: S311 - it spreads retries, it hides nothing


@dataclass(frozen=True)
class RetryPolicy:
    """How often a delivery is tried, and how far apart.

    Attributes:
        max_attempts: Executions of the delivery, counted from 1, after which it is dead; 1 to 1000. All handlers of a
            delivery share its attempts: those that another one has failed count as well.
        first: Largest delay after the first failure.
        ceiling: Largest delay of all, not less than *first*.
        dead_on: Exceptions after which no further attempt is made, like a `Reject`; without an entry for it, a payload
            that does not fit its handler's type is tried again like everything else. A `Retry` or `Snooze` goes before
            it, even where `Exception` is one of them.

    Raises:
        ConfigurationError: If a value is out of range, or they contradict each other.
    """

    max_attempts: int = 10
    first: timedelta = timedelta(seconds=1)
    ceiling: timedelta = timedelta(minutes=15)
    dead_on: tuple[type[Exception], ...] = (PayloadValidationError,)

    def __post_init__(self) -> None:
        attempts: object = self.max_attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= _MAX_ATTEMPTS:
            raise ConfigurationError(
                f"max_attempts {attempts!r} is not usable. Give a whole number from 1 to {_MAX_ATTEMPTS}."
            )
        _check_delay(self.first, "first")
        _check_delay(self.ceiling, "ceiling")
        if self.ceiling < self.first:
            raise ConfigurationError(f"ceiling {self.ceiling!r} is less than first {self.first!r}. Raise the ceiling.")
        final: object = self.dead_on
        if not isinstance(final, tuple) or not all(
            isinstance(each, type) and issubclass(each, Exception) for each in final
        ):
            raise ConfigurationError("dead_on is no tuple of exception classes. Give one, like (ValueError,).")

    def delay(self, attempt: int, *, rng: Random = _RNG) -> timedelta:
        """Return how long to wait after attempt number *attempt* has failed; see `retry_delay`."""
        return retry_delay(attempt, first=self.first, ceiling=self.ceiling, rng=rng)


def retry_delay(attempt: int, *, first: timedelta, ceiling: timedelta, rng: Random = _RNG) -> timedelta:
    """Return the pause between the failure of attempt number *attempt* and the next one.

    Exponential backoff with full jitter: the pause is drawn evenly from zero to a bound, and the bound
    doubles from *first* with every failure until it meets *ceiling*::

        bound = min(ceiling, first * 2 ** (attempt - 1))

    Deliveries that failed together, because something they share was down, so come back spread out.

    Args:
        attempt: The attempt that failed, counted from 1.
        first: The bound after the first failure.
        ceiling: The bound that is never passed.
        rng: Where the randomness comes from; a test gives a seeded one.

    Raises:
        ConfigurationError: If *attempt* is less than 1.

    Source:
        M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    >>> retry_delay(3, first=timedelta(seconds=1), ceiling=timedelta(minutes=15), rng=Random(0))
    datetime.timedelta(seconds=3, microseconds=377687)
    """
    if attempt < 1:
        raise ConfigurationError(f"Attempt {attempt!r} cannot have failed: attempts count from 1.")
    # ldexp() and 2.0 ** n overflow past 1023; min() drops any bound that large in any case.
    bound = min(ceiling.total_seconds(), math.ldexp(first.total_seconds(), min(attempt - 1, 512)))
    return timedelta(seconds=rng.uniform(0, bound))


class Signal(Exception):  # noqa: N818 - a wish, no error
    """What a handler raises to decide about its delivery; its transaction is rolled back."""


class Retry(Signal):
    """Raise it to fail this attempt, and to choose the pause yourself.

    Attributes:
        delay: The pause, counted by the database's clock; None for the usual backoff.

    Raises:
        ConfigurationError: If *delay* is no timedelta, negative or over ten years.
    """

    def __init__(self, delay: timedelta | None = None) -> None:
        super().__init__(delay)
        self.delay = None if delay is None else _check_delay(delay, "delay")


class Snooze(Signal):
    """Raise it to be called again later; the attempt is not counted.

    Attributes:
        delay: The pause, counted by the database's clock.

    Raises:
        ConfigurationError: If *delay* is no timedelta, negative or over ten years.
    """

    def __init__(self, delay: timedelta) -> None:
        super().__init__(delay)
        self.delay = _check_delay(delay, "delay")


class Reject(Signal):
    """Raise it when no further attempt can help: the delivery is dead at once.

    Attributes:
        reason: Kept with the delivery, for the people who look at it.

    Raises:
        ConfigurationError: If *reason* is no text.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if not isinstance(reason, str):
            raise ConfigurationError(f"reason of type {type(reason).__name__} is no text. Give a str.")
        self.reason = reason


def _check_delay(value: object, what: str) -> timedelta:
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{what} of type {type(value).__name__} is no pause. Give a timedelta.")
    if not timedelta(0) <= value <= MAX_DELAY:
        raise ConfigurationError(f"{what} {value!r} is not usable. Give a timedelta from 0 to {MAX_DELAY.days} days.")
    return value
