"""Consumer groups: the handlers that share one delivery of each event, and what is said about them in code.

Pure declarations. The rows are written by `EventSystem.start()`; pausing and the like are an operator's doing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Final, Literal

from pgebus.errors import ConfigurationError

__all__ = ["DEFAULT_GROUP", "Group"]

DEFAULT_GROUP: Final = "default"
MAX_GROUP_BYTES: Final = 63

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_MOST_RUNNING: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Group:
    """A consumer group with more than a name; where the name is enough, a str stands for it.

    Each group gets a delivery of its own of every event that one of its handlers' patterns matches, with its own
    attempts, backoff, dead letters and transaction. What is left out is left as it is in the database.

    Attributes:
        name: Words of `A-Z a-z 0-9 _ -`, joined by dots, at most 63 bytes.
        start: Which events a group or a pattern gets that the database does not know yet: those that are published
            from now on (None or `"now"`), all that are still kept (`"beginning"`), or those created since a moment,
            an aware datetime by the database's clock. Afterwards it has no effect.
        max_running: How many deliveries of the group run at once, over all workers. An operator may change it; it is
            written when a process starts.
        per_process: How many of them run at once in one process.
        dead_holds_key: Whether a dead delivery holds back the later events of its key.
        keep_history: False has a delivery deleted when it is completed, instead of kept until its retention is over.
            What is dead, cancelled or unhandled is kept all the same. Not written to the database: a process that does
            not say it keeps what it completes.

    Raises:
        ConfigurationError: If a value cannot be used.
    """

    name: str
    start: Literal["now", "beginning"] | datetime | None = None
    max_running: int | None = None
    per_process: int | None = None
    dead_holds_key: bool | None = None
    keep_history: bool | None = None

    def __post_init__(self) -> None:
        check_group_name(self.name)
        start: object = self.start
        if isinstance(start, datetime):
            if start.utcoffset() is None:
                raise ConfigurationError(f"start {start.isoformat()} of group {self.name!r} has no time zone.")
        elif start not in (None, "now", "beginning"):
            raise ConfigurationError(
                f"start of group {self.name!r} must be 'now', 'beginning' or a datetime with a time zone."
            )
        for what in ("max_running", "per_process"):
            most: object = getattr(self, what)
            if most is not None and not (type(most) is int and 1 <= most <= _MOST_RUNNING):
                raise ConfigurationError(f"{what} of group {self.name!r} must be a whole number from 1, not {most!r}.")
        for what in ("dead_holds_key", "keep_history"):
            said: object = getattr(self, what)
            if said is not None and not isinstance(said, bool):
                raise ConfigurationError(f"{what} of group {self.name!r} must be True or False.")

    def joined_with(self, other: Group) -> Group:
        """Return one group that says what both say.

        Raises:
            ConfigurationError: If they contradict each other.
        """
        said: dict[str, object] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise ConfigurationError(
                    f"Group {self.name!r} is declared with {field.name}={mine!r} and with {field.name}={theirs!r}. "
                    "Declare it once, and use that object or the bare name elsewhere."
                )
            said[field.name] = theirs if mine is None else mine
        return Group(**said)  # type: ignore[arg-type]  # the fields of two groups


def check_group_name(value: object) -> str:
    """Return *value* when it can name a group.

    Raises:
        ConfigurationError: If it is anything but dotted words of at most 63 bytes.
    """
    if isinstance(value, str) and len(value) <= MAX_GROUP_BYTES and _NAME.fullmatch(value):
        return value
    shown = f"{value[:80]!r}" if isinstance(value, str) else f"of type {type(value).__name__[:80]}"
    raise ConfigurationError(
        f"Group {shown} is not made of words of A-Z a-z 0-9 _ - joined by single dots, at most {MAX_GROUP_BYTES} bytes."
    )


def group_of(value: object) -> Group | None:
    """Return the group that `group=` names: a Group, a name, or None for whatever the routers above say.

    Raises:
        ConfigurationError: If it is none of these.
    """
    if value is None or isinstance(value, Group):
        return value
    return Group(check_group_name(value))
