"""Which deliveries and events a verb is about: what is asked for, checked before any SQL, and as conditions in SQL.

It runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple, TypedDict

from pgebus.errors import ConfigurationError, PublishError
from pgebus.groups import check_group_name
from pgebus.names import check_channel, check_key
from pgebus.patterns import MANY, ONE, check_pattern, is_pattern
from pgebus.payloads import check_run_at

__all__ = [
    "LARGEST_BATCH",
    "STATUSES",
    "Changed",
    "EventFilters",
    "Filters",
    "Selection",
    "check_event_id",
    "check_limit",
    "check_text",
]

STATUSES: Final = ("pending", "blocked", "running", "unhandled", "completed", "dead", "cancelled")
# Those whose rows are the history, which may be long; of all others there is an index of that status alone.
_HISTORY: Final = frozenset({"completed", "cancelled"})

# What one call changes, in one transaction: some tenths of a second.
LARGEST_BATCH: Final = 10_000
MAX_REASON_CHARS: Final = 1_000


class EventFilters(TypedDict, total=False):
    """What events have to be like; what is left out, or None, is anything.

    Attributes:
        event_type: Their type, or a pattern of types: `order.placed`, `order.*`, `order.#`.
        key: Their key.
        event_ids: Their ids: at most 10,000.
        created_after: Created then, or later; an aware datetime, by the database's clock. So the next.
        created_before: Created earlier.
    """

    event_type: str | None
    key: str | None
    event_ids: Collection[int] | None
    created_after: datetime | None
    created_before: datetime | None


class Filters(EventFilters, total=False):
    """What deliveries have to be like: their events, and they themselves.

    Attributes:
        channel: Their channel.
        group: Their consumer group.
        finished_after: Completed, cancelled or dead then, or since; an aware datetime. So the next.
        finished_before: Earlier.
    """

    channel: str | None
    group: str | None
    finished_after: datetime | None
    finished_before: datetime | None


class Changed(NamedTuple):
    """A delivery that was changed.

    Attributes:
        event_id: Its event.
        group: Its consumer group.
        was: Its status before; None for one that was not there.
    """

    event_id: int
    group: str
    was: str | None


@dataclass(frozen=True)
class Selection:
    """Filters that were checked.

    Attributes:
        values: Those that are given.
    """

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, filters: Mapping[str, Any], **more: object) -> Selection:
        """Return *filters*, and more, checked.

        Raises:
            ConfigurationError: If a value is none of its kind, or there is no such filter.
        """
        given = {name: value for name, value in {**filters, **more}.items() if value is not None}
        for name in given:
            if name not in _CHECKS:
                raise ConfigurationError(f"There is no filter {name!r}. Those that there are: {', '.join(_CHECKS)}.")
        return cls({name: _CHECKS[name](name, value) for name, value in given.items()})

    def refuse_everything(self, what: str) -> None:
        """Refuse to select all there is.

        Raises:
            ConfigurationError: If nothing narrows it down but the channel.
        """
        if not self.values.keys() - {"channel"}:
            raise ConfigurationError(f"Without a filter, {what} would be about all events. Say which.")

    def conditions(self, schema: str, of: str) -> list[str]:
        """Return what a row has to fulfil, as SQL.

        Args:
            schema: The quoted schema.
            of: "d" for a delivery, or "e" for an event, in the query as that.
        """
        of_delivery = f"(SELECT c.created_at FROM {schema}.events c WHERE c.id = d.event_id)"  # noqa: S608 - quoted
        created = "e.created_at" if of == "e" else of_delivery
        texts = {
            "channel": f"{of}.channel = CAST(:channel AS text)",
            "group": f"{of}.consumer_group = CAST(:group AS text)",
            "key": f"{of}.key = CAST(:key AS text)",
            "event_ids": f"{'e.id' if of == 'e' else 'd.event_id'} = ANY (CAST(:event_ids AS bigint[]))",
            "created_after": f"{created} >= CAST(:created_after AS timestamptz)",
            "created_before": f"{created} < CAST(:created_before AS timestamptz)",
            "finished_after": "d.finished_at >= CAST(:finished_after AS timestamptz)",
            "finished_before": "d.finished_at < CAST(:finished_before AS timestamptz)",
        }
        if "event_type" in self.values and is_pattern(self.values["event_type"]):
            texts["event_type"] = f"({of}.type || '.') ~ CAST(:event_type AS text)"
        else:
            texts["event_type"] = f"{of}.type = CAST(:event_type AS text)"
        return [texts[name] for name in self.values]

    def parameters(self) -> dict[str, Any]:
        """Return the values of `conditions()`."""
        event_type = self.values.get("event_type")
        if event_type is None or not is_pattern(event_type):
            return dict(self.values)
        return {**self.values, "event_type": regex_of(event_type)}

    def order(self, statuses: Collection[str]) -> str:
        """Return how deliveries of *statuses* are put in the order of their event ids, as SQL.

        Where there is an index of those that are meant alone, the primary key is hidden: to walk it would be to look
        at the whole history for them.
        """
        few = _HISTORY.isdisjoint(statuses) or not self.values.keys().isdisjoint({"finished_after", "finished_before"})
        return "(d.event_id + 0)" if few and "event_ids" not in self.values else "d.event_id"


def regex_of(pattern: str) -> str:
    r"""Return the regular expression for what *pattern* matches, in PostgreSQL, of a type with a dot behind it.

    The same as the column `regex` of the subscriptions.

    >>> regex_of("order.*")
    '^order\\.[^.]+\\.$'
    """
    words = {ONE: r"[^.]+\.", MANY: r"([^.]+\.)*"}
    return "^" + "".join(words.get(word, rf"{word}\.") for word in pattern.split(".")) + "$"


def status_condition(statuses: Collection[str]) -> str:
    """Return that a delivery has one of *statuses*, as SQL with the statuses in the text.

    A parameter would hide the partial indexes from the planner, and so would IN.
    """
    return "(" + " OR ".join(f"d.status = '{status}'" for status in STATUSES if status in statuses) + ")"


def check_statuses(value: object, among: Collection[str] = STATUSES) -> tuple[str, ...]:
    """Return one status, or several, as several; None means all of them.

    Raises:
        ConfigurationError: If it is anything else.
    """
    if value is None:
        return tuple(among)
    given = (value,) if isinstance(value, str) else value
    if isinstance(given, Collection) and given and all(isinstance(each, str) and each in among for each in given):
        return tuple(status for status in among if status in given)
    raise ConfigurationError(f"status must be one of {', '.join(among)}, or several of them.")


def check_limit(limit: object, most: int = LARGEST_BATCH) -> int:
    """Return *limit*.

    Raises:
        ConfigurationError: If it is no whole number from 1 to *most*.
    """
    if type(limit) is int and 1 <= limit <= most:
        return limit
    raise ConfigurationError(f"limit must be a whole number from 1 to {most}.")


def check_event_id(value: object, what: str = "An event id") -> int:
    """Return *value*.

    Raises:
        ConfigurationError: If it is no whole number from 0 that is a bigint.
    """
    if type(value) is int and 0 <= value < 2**63:
        return value
    raise ConfigurationError(f"{what} must be a whole number from 0 to 2**63 - 1.")


def check_text(what: str, value: object) -> str:
    """Return *value*, text for an entry of a delivery.

    Raises:
        ConfigurationError: If it is no text that PostgreSQL can store, or longer than 1,000 characters.
    """
    if isinstance(value, str) and len(value) <= MAX_REASON_CHARS and "\x00" not in value:
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            pass
        else:
            return value
    raise ConfigurationError(f"{what} must be text of at most {MAX_REASON_CHARS} characters, without NUL.")


def _checked_key(_name: str, value: object) -> str:
    try:
        return check_key(value, what="key")
    except PublishError as error:
        raise ConfigurationError(str(error)) from None


def _checked_moment(name: str, value: object) -> datetime:
    try:
        return check_run_at(value)
    except PublishError as error:
        raise ConfigurationError(str(error).replace("run_at", name)) from None


def _checked_ids(_name: str, value: object) -> list[int]:
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping)) and len(value) <= LARGEST_BATCH:
        return sorted({check_event_id(each) for each in value})
    raise ConfigurationError(f"event_ids must be a list of at most {LARGEST_BATCH} whole numbers.")


_CHECKS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "channel": lambda _name, value: check_channel(value),
    "group": lambda _name, value: check_group_name(value),
    "event_type": lambda _name, value: check_pattern(value, what="Event type"),
    "key": _checked_key,
    "event_ids": _checked_ids,
    "created_after": _checked_moment,
    "created_before": _checked_moment,
    "finished_after": _checked_moment,
    "finished_before": _checked_moment,
}
