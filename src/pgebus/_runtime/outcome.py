"""What becomes of a delivery after its handlers: a decision, and nothing but the decision.

Pure: no clock, no database. Writing an outcome down is the acknowledger's work.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any, Final, TypeAlias

from pgebus.retry import Reject, Retry, RetryPolicy, Signal, Snooze, retry_delay

# What is stored of one error. Errors come from anywhere, are of any size, and the row has to stay narrow.
MAX_MESSAGE_CHARS: Final = 1_024
MAX_TRACEBACK_CHARS: Final = 6_144
# What an application's redactor is given of it: enough that no secret is cut in two where it would still be stored.
_REDACTED_CHARS: Final = 65_536
# No DETAIL is shorter, and a word that is would be found everywhere.
_SHORTEST_DETAIL: Final = 8

# Takes secrets out of the text of an error.
Redact: TypeAlias = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Failure:
    """One entry of `deliveries.errors`: which handler failed, and how."""

    handler: str | None
    type: str
    message: str
    traceback: str | None = None

    def in_ascii(self) -> Failure:
        """Return the same, with every other character replaced."""

        def plain(text: str | None) -> str | None:
            return None if text is None else text.encode("ascii", "replace").decode()

        return Failure(plain(self.handler), plain(self.type) or "", plain(self.message) or "", plain(self.traceback))

    def entry(self, *, attempt: int, worker_id: int) -> dict[str, Any]:
        """Return the entry as JSON; the database adds the time."""
        return {
            "attempt": attempt,
            "worker": str(worker_id),
            "handler": self.handler,
            "type": self.type,
            "message": self.message,
            "traceback": self.traceback,
        }


@dataclass(frozen=True, slots=True)
class Complete:
    """All handlers returned; the completion is still to be written."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The completion was committed together with the handlers' effects."""


@dataclass(frozen=True, slots=True)
class Reschedule:
    """Pending again after *delay*; *handled* names the handlers that need not run again."""

    delay: timedelta
    counted: bool
    failure: Failure | None = None
    handled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Kept as dead: its attempts are used up, or a handler rejected it."""

    failure: Failure
    handled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Release:
    """Given back at once, the attempt not counted."""


@dataclass(frozen=True, slots=True)
class Unhandle:
    """No handler here knows the type; the attempt not counted."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Somebody else owns it now; nothing to write."""


Outcome = Complete | Committed | Reschedule | DeadLetter | Release | Unhandle | Lost


def decide(
    error: BaseException,
    *,
    handler: str | None,
    attempt: int,
    policy: RetryPolicy,
    handled: tuple[str, ...] = (),
    rng: Random,
    redact: Redact | None = None,
) -> Reschedule | DeadLetter:
    """Return what becomes of a delivery whose *handler* raised *error* in attempt number *attempt*.

    `Snooze` is never counted. `Reject` is final, and so is what the policy calls so, signals apart: the handler that
    raises one knows more than its policy. `Retry` and every other exception are tried again until the policy's attempts
    are used up.
    """
    if isinstance(error, Snooze):
        return Reschedule(error.delay, counted=False, handled=handled)
    failure = describe(error, handler, redact)
    final = isinstance(error, Reject if isinstance(error, Signal) else policy.dead_on)
    if final or attempt >= policy.max_attempts:
        return DeadLetter(failure, handled)
    if isinstance(error, Retry) and error.delay is not None:
        return Reschedule(error.delay, counted=True, failure=failure, handled=handled)
    delay = retry_delay(attempt, first=policy.first, ceiling=policy.ceiling, rng=rng)
    return Reschedule(delay, counted=True, failure=failure, handled=handled)


def describe(error: BaseException, handler: str | None, redact: Redact | None = None) -> Failure:
    """Return what is kept of *error*: its type, message and traceback, redacted, cleaned and capped.

    An exception is user code: its `__str__` may raise, return megabytes, or hold what PostgreSQL can't store.
    """
    kind = type(error)
    details = _details(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 - whatever a stranger's __str__ raises, the failure must be recorded
        message = f"<str() of the error raised {type(broken).__name__}>"
    try:
        trace = "".join(traceback.format_exception(error, limit=-20))
    except Exception as broken:  # noqa: BLE001 - as above: a traceback is a courtesy, the record is not
        trace = f"<formatting the traceback raised {type(broken).__name__}>"
    return Failure(
        handler=handler,
        type=clean(name, MAX_MESSAGE_CHARS),
        message=clean(_redacted(_without(details, message), redact), MAX_MESSAGE_CHARS),
        # The end of a traceback says what happened.
        traceback=clean(_redacted(_without(details, trace), redact, keep_end=True), MAX_TRACEBACK_CHARS, keep_end=True),
    )


def _details(error: BaseException) -> list[str]:
    """Return what PostgreSQL has said as DETAIL in *error* and in what led to it: it may quote a row, a payload too."""
    found: list[str] = []
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        if (each := chain.pop()) is None or id(each) in seen:
            continue
        seen.add(id(each))
        chain += [each.__cause__, each.__context__, *(each.exceptions if isinstance(each, BaseExceptionGroup) else ())]
        with contextlib.suppress(Exception):  # they may be any class's attributes
            # asyncpg, and psycopg, which a handler may use for itself.
            detail = getattr(each, "detail", None) or getattr(getattr(each, "diag", None), "message_detail", None)
            if isinstance(detail, str) and getattr(each, "sqlstate", None) is not None:
                found.append(detail)
    return found


def _without(details: list[str], text: str) -> str:
    for detail in details:
        # Also line by line: the traceback of a group of errors is indented.
        for part in (detail, *detail.splitlines()):
            if len(part) >= _SHORTEST_DETAIL:
                text = text.replace(part, "…")
    return text


def _redacted(text: str, redact: Redact | None, *, keep_end: bool = False) -> str:
    """Return *text* as the application lets it be seen; nothing of it where its redactor fails."""
    if redact is None:
        return text
    try:
        shown: object = redact(clean(text, _REDACTED_CHARS, keep_end=keep_end))
    except Exception as broken:  # noqa: BLE001 - as above: a stranger's function must not spoil the record
        return f"<the redactor raised {type(broken).__name__}>"
    return shown if isinstance(shown, str) else f"<the redactor returned {type(shown).__name__}>"


def clean(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Return *text* as PostgreSQL can store it, at most *limit* characters: no NUL, no lone surrogates."""
    if len(text) > limit:
        text = "…" + text[len(text) - limit + 1 :] if keep_end else text[: limit - 1] + "…"
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
