"""The grammar of names: event types, prefixes, channels, schemas.

Pure checks, shared by publishing, routing and the settings. The database holds the same rules as CHECK constraints;
these here only say it earlier, and better.
"""

from __future__ import annotations

import re
from typing import Final

from pgebus.errors import (
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidKeyError,
    InvalidPriorityError,
    InvalidSchemaError,
)

MAX_EVENT_TYPE_BYTES: Final = 255
MAX_KEY_BYTES: Final = 255
LOWEST_PRIORITY: Final = 9
# NAMEDATALEN - 1: PostgreSQL cuts longer identifiers without an error, so two channels could become one.
MAX_IDENTIFIER_BYTES: Final = 63

_EVENT_TYPE: Final = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
# What PostgreSQL would take for the name of a schema and something on the way to it, or from it, would not.
_NO_SCHEMA: Final = (
    # In offline mode Alembic writes blanks for a tab; text files change the ends of lines; and SQLAlchemy leaves a
    # name unquoted that is a word but for a newline at its end.
    (re.compile(r"[\x00-\x1f\x7f-\x9f]"), "a control character does not come through Alembic and text files unharmed"),
    (re.compile(r"\$pgebus\$"), "'$pgebus$' quotes the bodies of our functions"),
    (
        re.compile(r"__\[|__EXECMANY_TOKEN__|%\(\w+\)s"),
        "SQLAlchemy would fill in a part of it as a placeholder",
    ),
    (
        re.compile(r"\A(?:collation|concurrently|lateral|system_user|tablesample)\Z"),
        "it is a word of SQL that SQLAlchemy does not quote",
    ),
    (re.compile(r"\Apg_"), "PostgreSQL keeps names that begin with 'pg_' to itself"),
    (re.compile(r"\Ainformation_schema\Z"), "it belongs to PostgreSQL, and pg_dump leaves out what is in it"),
)


def check_event_type(value: object, *, what: str = "Event type") -> str:
    """Return *value* when it is dotted words of `A-Za-z0-9_-`, at most 255 bytes.

    Args:
        value: The candidate; anything at all.
        what: How the message names it, for example "Prefix".

    Raises:
        InvalidEventTypeError: If it is anything else.
    """
    if isinstance(value, str) and len(value) <= MAX_EVENT_TYPE_BYTES and _EVENT_TYPE.fullmatch(value):
        return value
    if isinstance(value, str) and len(value) > MAX_EVENT_TYPE_BYTES:
        problem = f"{what} has {len(value)} characters; at most {MAX_EVENT_TYPE_BYTES} are allowed."
    else:
        shown = _shown(value)
        problem = f"{what} {shown} is not made of words of A-Z a-z 0-9 _ - joined by single dots, like 'order.placed'."
    raise InvalidEventTypeError(problem, value=value)


def check_channel(value: object) -> str:
    """Return *value* when it can be a channel: text of 1 to 63 bytes in UTF-8, without NUL.

    Raises:
        InvalidChannelError: If it is anything else.
    """
    size = _utf8_size(value)
    if size is None:
        raise InvalidChannelError(f"Channel {_shown(value)} is not text that PostgreSQL can store.", value=value)
    if not 1 <= size <= MAX_IDENTIFIER_BYTES:
        raise InvalidChannelError(
            f"Channel {_shown(value)} has {size} bytes in UTF-8; 1 to {MAX_IDENTIFIER_BYTES} are allowed.",
            value=value,
        )
    assert isinstance(value, str)  # noqa: S101 - for the type checker: _utf8_size() measures nothing else
    return value


def check_key(value: object, *, what: str) -> str:
    """Return *value* when it can be a key: text of 1 to 255 bytes in UTF-8, without NUL.

    Raises:
        InvalidKeyError: If it is anything else.
    """
    size = _utf8_size(value)
    if size is None or not isinstance(value, str):
        raise InvalidKeyError(f"{what} {_shown(value)} is not text that PostgreSQL can store.")
    if not 1 <= size <= MAX_KEY_BYTES:
        raise InvalidKeyError(f"{what} {_shown(value)} has {size} bytes in UTF-8; 1 to {MAX_KEY_BYTES} are allowed.")
    return value


def check_priority(value: object) -> int:
    """Return *value* when it is a whole number from 0, handled first, to 9.

    Raises:
        InvalidPriorityError: If it is anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LOWEST_PRIORITY:
        return int(value)
    # Not every int can be printed, and no priority of another type is ours to print.
    shown = f"{value} " if isinstance(value, int) and abs(value) < 2**63 else ""
    raise InvalidPriorityError(f"Priority {shown}is no whole number from 0, handled first, to {LOWEST_PRIORITY}.")


def check_schema(value: object) -> str:
    """Return *value* when it can name a schema of ours; it is always quoted, so case and punctuation are kept.

    Raises:
        InvalidSchemaError: If it is no text of 1 to 63 bytes, or a name that PostgreSQL, SQLAlchemy or Alembic would
            refuse or change; the message says which and why.
    """
    size = _utf8_size(value)
    if size is None or not isinstance(value, str):
        raise InvalidSchemaError(f"Schema {_shown(value)} is not text that PostgreSQL can store.", value=value)
    if not 1 <= size <= MAX_IDENTIFIER_BYTES:
        raise InvalidSchemaError(
            f"Schema {_shown(value)} has {size} bytes in UTF-8; 1 to {MAX_IDENTIFIER_BYTES} are allowed.",
            value=value,
        )
    for pattern, reason in _NO_SCHEMA:
        if pattern.search(value):
            raise InvalidSchemaError(f"Schema {value!r}: {reason}. Choose another name.", value=value)
    return value


def quote_identifier(name: str) -> str:
    """Return *name* as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Return *text* as an SQL string literal, right whatever `standard_conforming_strings` says."""
    quoted = "'" + text.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in text else quoted


def _utf8_size(value: object) -> int | None:
    if not isinstance(value, str) or "\x00" in value:
        return None
    try:
        return len(value.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return None


def _shown(value: object) -> str:
    """Return a short repr: a name is never long, and a value of another type is none of ours to print."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    return repr(value) if len(value) <= 80 else f"{value[:80]!r}…"
