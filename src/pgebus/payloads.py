"""What an event may carry: payloads, headers and due times that PostgreSQL stores and gives back equal.

Pure checks that copy what they accept. They never serialize for the database and never touch a session.
"""

from __future__ import annotations

import math
import re
from dataclasses import is_dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from json import JSONEncoder, dumps, loads
from typing import Any, Final, Literal

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from pgebus.errors import InvalidPayloadError, InvalidRunAtError, PayloadTooLargeError

MAX_HEADERS_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 200
# Python refuses to parse integers of more than 4,300 digits: they could not be read back.
MAX_INTEGER_DIGITS: Final = 4_000

_INTEGER_BOUND: Final = 10**MAX_INTEGER_DIGITS
_WORD_BOUND: Final = 2**64
# From here on repr() writes an exponent, PostgreSQL prints an integer, Python reads an int of other digits.
_EXPONENT_BOUND: Final = 1e16
# How many entries a payload may have, in all its containers, to be looked at quickly; and what they may be.
_PLAIN_ITEMS: Final = 100
_TEXT: Final = frozenset({str})
_PLAIN_TYPES: Final = frozenset({str, int, float, bool, type(None)})
_INFINITIES: Final = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
_LONGEST_KEY_SHOWN: Final = 40
_LONGEST_PATH_SHOWN: Final = 300
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STORABLE: Final = "only str, int, float, bool, None, dict, list and tuple can be stored. Convert it first."

_encode: Final = JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode

_What = Literal["Payload", "Headers"]
_Step = str | int


class _FlawError(Exception):
    """What is wrong; every container on the way up adds the step that leads into it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[tuple[_Step, int]] = []


class _RoomExhaustedError(Exception):
    """The encoded value is certainly over the limit."""


def check_payload(value: object, *, limit: int) -> dict[str, Any]:
    """Return a copy of *value* when it is a JSON object that PostgreSQL stores and gives back equal.

    The copy shares nothing with *value*, so what happens to *value* later changes no event. What is read back
    compares equal (`==`) to what was given, with these differences of kind:

    - a tuple is stored as a JSON array and comes back as a list;
    - a float beyond plus or minus 1e16 is stored as the integer that it is, and comes back as an int;
    - `-0.0` comes back as `0.0`: PostgreSQL's numeric has no negative zero;
    - of a subclass of `str`, `int`, `float`, `dict`, `list` or `tuple` only the built-in content is kept.

    Args:
        value: A dict with text keys and values of type str, int, float, bool, None, dict, list or tuple; or an
            instance of a pydantic model or a dataclass, which pydantic makes such a dict of.
        limit: The largest size allowed: bytes of the compact JSON in UTF-8.

    Raises:
        InvalidPayloadError: If it is no such dict: another type of key or value, NaN or Infinity, U+0000 or a
            lone surrogate in a text, an integer of more than 4,000 digits, more than 200 levels, or itself
            inside. `path` says where; the message holds no values.
        PayloadTooLargeError: If it is larger than *limit*.
    """
    return _checked(_dumped(value), "Payload", limit)[0]


def check_payload_text(value: object, *, limit: int) -> str:
    """Return the JSON text of *value*, where `check_payload()` would return a copy; with the same errors."""
    return _checked(_dumped(value), "Payload", limit, copied=False)[1]


@lru_cache(maxsize=256)
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _dumped(value: object) -> object:
    """Return what pydantic makes of a model or a dataclass, so that it can make it again; anything else as it is."""
    if type(value) is dict:
        return value
    try:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json", by_alias=True, round_trip=True)
        if is_dataclass(value) and not isinstance(value, type):
            return _adapter(type(value)).dump_python(value, mode="json", by_alias=True, round_trip=True)
    except (PydanticUserError, PydanticSerializationError) as error:
        raise InvalidPayloadError(f"Payload of type {_type_name(value)} cannot be made JSON by pydantic.") from error
    return value


def check_headers(value: object) -> dict[str, Any]:
    """Return a copy of *value* when it can be an event's headers: the rules of a payload, at most 64 KiB.

    Raises:
        InvalidPayloadError: If it breaks a rule of `check_payload()`.
        PayloadTooLargeError: If it is larger than 64 KiB.
    """
    return _checked(value, "Headers", MAX_HEADERS_BYTES)[0]


def check_run_at(value: object) -> datetime:
    """Return the moment that *value* names, in UTC.

    Args:
        value: An aware datetime, in any time zone; the past means at once.

    Raises:
        InvalidRunAtError: If it is no datetime, has no time zone, has one that gives no offset, or is not inside
            the years 1 to 9999 when it is converted to UTC.
    """
    if not isinstance(value, datetime):
        raise InvalidRunAtError(
            f"run_at must be a datetime with a time zone, not {_type_name(value)}. "
            "Use datetime.now(timezone.utc) + timedelta(...)."
        )
    if value.tzinfo is None:
        raise InvalidRunAtError(
            f"run_at {value.isoformat()} has no time zone, so it names no moment. "
            "Use datetime.now(timezone.utc) or value.astimezone()."
        )
    try:
        offset = value.utcoffset()
        if not isinstance(offset, timedelta):
            raise TypeError("utcoffset() returned no timedelta")
        moment = (value.replace(tzinfo=None, fold=0) - offset).replace(tzinfo=UTC)
        # asyncpg sends these two as minus infinity and infinity, which are no moments.
        if moment in _INFINITIES:
            raise OverflowError
    except OverflowError:
        raise InvalidRunAtError(
            "run_at is outside the years 1 to 9999 when it is converted to UTC. Use a moment inside them."
        ) from None
    except Exception as error:  # a time zone is foreign code: it may raise anything
        raise InvalidRunAtError(
            f"run_at has a time zone of type {_type_name(value.tzinfo)} that gives no offset from UTC. "
            "Use timezone.utc or a ZoneInfo."
        ) from error
    # Of a subclass of datetime only the moment is kept: a driver should meet no foreign methods.
    return datetime(
        moment.year,
        moment.month,
        moment.day,
        moment.hour,
        moment.minute,
        moment.second,
        moment.microsecond,
        UTC,
    )


def _checked(value: object, what: _What, limit: int, *, copied: bool = True) -> tuple[dict[str, Any], str]:
    if not isinstance(value, dict):
        raise InvalidPayloadError(
            f"{what} must be a dict, a pydantic model or a dataclass, not {_type_name(value)}. Convert it first, for "
            "example with dict(...)."
        )
    if type(value) is dict and (plain := _plain(value)) is not None and len(plain) * 4 <= limit:
        return loads(plain) if copied else value, plain
    room = [limit]
    try:
        copy = _copied_object(value, 1, room)
    except _FlawError as flaw:
        raise _invalid(what, flaw) from None
    except _RoomExhaustedError:
        raise _too_large(what, limit - room[0], limit) from None
    try:
        text = _encode(copy)
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(what, _unstorable_text(copy) or _FlawError("is not UTF-8.")) from None
    except ValueError:  # the interpreter's own limit of digits has been lowered
        reason = "holds an integer of more digits than this interpreter converts. Send it as text."
        raise _invalid(what, _FlawError(reason)) from None
    # A backslash before u0000 may itself be escaped, so only a search can tell.
    if "\\u0000" in text and (found := _unstorable_text(copy)):
        raise _invalid(what, found)
    if size > limit:
        raise _too_large(what, size, limit)
    return copy, text


def _plain(value: dict[Any, Any]) -> str | None:
    """Return the JSON of *value* when it is small and all of it is plain; None says that a closer look is needed.

    Most payloads are, and the closer look takes three times as long.
    """
    containers: list[Any] = [value]
    left = _PLAIN_ITEMS
    for container in containers:  # which grows meanwhile
        left -= len(container)
        if left < 0:
            return None
        items = container
        if type(container) is dict:
            if not _TEXT.issuperset(map(type, container)):
                return None
            items = container.values()
        if not _PLAIN_TYPES.issuperset(map(type, items)):
            for item in items:
                kind = type(item)
                if kind is dict or kind is list:
                    containers.append(item)
                elif kind not in _PLAIN_TYPES:
                    return None
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except ValueError:
        return None
    # The second may be a float that PostgreSQL prints as an integer, the third an integer that is too long.
    return None if "\\u0000" in text or "e+" in text or len(text) >= MAX_INTEGER_DIGITS else text


def _copied_object(source: dict[Any, Any], depth: int, room: list[int]) -> dict[str, Any]:
    _enter(len(source), depth, room)
    copy: dict[str, Any] = {}
    characters = 0
    step: _Step | None = None
    try:
        # dict.items: a subclass may claim to hold something else each time it is asked.
        for key, item in dict.items(source):
            if type(key) is not str:
                step = None
                key = _plain_key(key, copy)
            step = key
            characters += len(key)
            if type(item) is str:
                characters += len(item)
                copy[key] = item
            else:
                copy[key] = _copied(item, depth, room)
    except _FlawError as flaw:
        if step is not None:
            flaw.steps.append((step, id(source)))
        raise
    _take(characters, room)
    return copy


def _copied_array(source: list[Any] | tuple[Any, ...], depth: int, room: list[int]) -> list[Any]:
    _enter(len(source), depth, room)
    copy: list[Any] = []
    characters = 0
    try:
        items = list.__iter__(source) if isinstance(source, list) else tuple.__iter__(source)
        for item in items:
            if type(item) is str:
                characters += len(item)
                copy.append(item)
            else:
                copy.append(_copied(item, depth, room))
    except _FlawError as flaw:
        flaw.steps.append((len(copy), id(source)))
        raise
    _take(characters, room)
    return copy


def _copied(value: object, depth: int, room: list[int]) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, int):
        return _plain_integer(value, room)
    if isinstance(value, float):
        return _plain_float(value)
    if isinstance(value, dict):
        return _copied_object(value, depth + 1, room)
    if isinstance(value, (list, tuple)):
        return _copied_array(value, depth + 1, room)
    if isinstance(value, str):
        _take(len(value), room)
        return str.__str__(value)
    raise _FlawError(f"is of type {_type_name(value)}; {_STORABLE}")


def _plain_integer(value: int, room: list[int]) -> int:
    value = int.__int__(value)
    if not -_WORD_BOUND < value < _WORD_BOUND:
        if not -_INTEGER_BOUND < value < _INTEGER_BOUND:
            raise _FlawError(f"is an integer of more than {MAX_INTEGER_DIGITS:,} digits. Send it as text.")
        _take(value.bit_length() // 4, room)
    return value


def _plain_float(value: float) -> float | int:
    value = float.__float__(value)
    if -_EXPONENT_BOUND < value < _EXPONENT_BOUND:
        return value
    if not math.isfinite(value):
        raise _FlawError("is NaN or Infinity, which JSON does not have. Send None or text.")
    return int(value)


def _plain_key(key: object, taken: dict[str, Any]) -> str:
    if not isinstance(key, str):
        raise _FlawError(f"has a key of type {_type_name(key)}; keys must be text. Convert it first.")
    plain = str.__str__(key)
    if plain in taken:
        raise _FlawError("has two keys with the same text; one would replace the other.")
    return plain


def _enter(items: int, depth: int, room: list[int]) -> None:
    """Count a container before it is walked: shared references may unfold to more than fits in memory."""
    if depth > MAX_DEPTH:
        raise _FlawError(f"is nested deeper than {MAX_DEPTH} levels. Flatten it.")
    _take(items, room)


def _take(characters: int, room: list[int]) -> None:
    room[0] -= characters
    if room[0] < 0:
        raise _RoomExhaustedError


def _unstorable_text(value: object) -> _FlawError | None:
    """Return the first text that PostgreSQL refuses, as a flaw with its path."""
    try:
        _search_unstorable_text(value)
    except _FlawError as flaw:
        return flaw
    return None


def _search_unstorable_text(value: object) -> None:
    if isinstance(value, str):
        if reason := _text_problem(value):
            raise _FlawError(f"is {reason}")
    elif isinstance(value, (dict, list)):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(step, str) and (reason := _text_problem(step)):
                raise _FlawError(f"has a key that is {reason}")
            try:
                _search_unstorable_text(item)
            except _FlawError as flaw:
                flaw.steps.append((step, id(value)))
                raise


def _text_problem(text: str) -> str:
    if "\x00" in text:
        return "text with U+0000, which PostgreSQL cannot store. Remove it, or send base64."
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text with a lone surrogate, which UTF-8 does not have. Replace it, or send base64."
    return ""


def _invalid(what: _What, flaw: _FlawError) -> InvalidPayloadError:
    steps = flaw.steps[::-1]
    reason = flaw.reason
    seen: set[int] = set()
    for depth, (_, container) in enumerate(steps):
        if container in seen:
            steps, reason = (
                steps[:depth],
                "contains itself. Send the keys of the object instead of the object.",
            )
            break
        seen.add(container)
    path = "$" + "".join(_shown_step(step) for step, _ in steps)
    if len(path) > _LONGEST_PATH_SHOWN:
        half = _LONGEST_PATH_SHOWN // 2
        path = f"{path[:half]}…{path[-half:]}"
    return InvalidPayloadError(f"{what} {path} {reason}", path=path)


def _shown_step(step: _Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    shown = step if len(step) <= _LONGEST_KEY_SHOWN else f"{step[:_LONGEST_KEY_SHOWN]}…"
    return f".{step}" if shown is step and _PLAIN_KEY.fullmatch(step) else f"[{dumps(shown)}]"


def _too_large(what: _What, size: int, limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"{what} has at least {size:,} bytes as JSON; at most {limit:,} are allowed. "
        "Store the data elsewhere and publish a reference to it.",
        size=size,
        limit=limit,
    )


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
