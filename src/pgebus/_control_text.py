"""Recognises transaction control in the text of one SQL statement.

A pure function over text: it splits no scripts and knows no other SQL. It need not, because the driver prepares
every statement, and PostgreSQL prepares one command at a time: what counts is how the text begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_ENDS_OR_STARTS: Final = frozenset(
    {"abort", "begin", "commit", "discard", "end", "release", "rollback", "savepoint", "start"}
)
# `transaction_timeout` is not among them: it bounds the transaction and leaves it where it is.
_SETTINGS: Final = frozenset(
    {
        "all",
        "characteristics",
        "transaction",
        "transaction_deferrable",
        "transaction_isolation",
        "transaction_read_only",
    }
)
_OWN_SETTINGS: Final = "pgebus"

# A BOM is no white space to PostgreSQL, but it is invisible: whoever wrote it meant the command behind it.
_BLANK: Final = re.compile(r"[\s\ufeff]+")
_BLANK_OR_EMPTY: Final = re.compile(r"[\s\ufeff;]+")
# To PostgreSQL a carriage return ends a line comment too (scan.l: non_newline [^\n\r]).
_LINE_COMMENT: Final = re.compile(r"--[^\n\r]*")
_COMMENT_MARK: Final = re.compile(r"/\*|\*/")
_WORD: Final = re.compile(r'[^\W\d]\w*|"[^"]*"')


def find_control(statement: str) -> str | None:
    """Return the words by which *statement* would move the transaction, or None where it is ordinary.

    Settings that belong to the transaction are control too, and so is the setting that marks it as pgebus's.

    >>> find_control("/* done */ Commit and chain")
    'COMMIT'
    >>> find_control("SET LOCAL transaction_read_only = on")
    'SET LOCAL TRANSACTION_READ_ONLY'
    >>> find_control("SELECT 'commit'") is None
    True
    """
    words = _words(statement)
    first = next(words, "")
    if first in _ENDS_OR_STARTS:
        return first.upper()
    if first == "prepare" and next(words, "") == "transaction":
        return "PREPARE TRANSACTION"
    if first in ("set", "reset"):
        return _control_setting(first, words)
    return None


def sets_marker(statement: str, parameters: object) -> bool:
    """Tell whether a call of `set_config()` in *statement* is about pgebus's own settings.

    The name may be a literal or a bind parameter: both are looked at, but only where the function is called.
    """
    lowered = statement.lower()
    return "set_config" in lowered and f"{_OWN_SETTINGS}." in lowered + repr(parameters).lower()


def _control_setting(first: str, words: Iterator[str]) -> str | None:
    seen = [first]
    for word in words:
        seen.append(word)
        name = word.strip('"')
        if name in _SETTINGS or name.split(".")[0] == _OWN_SETTINGS:
            return " ".join(seen).upper()
        if word not in ("local", "session"):
            break
    return None


def _words(statement: str) -> Iterator[str]:
    """Yield the leading words in lower case, without the comments and white space around them."""
    position = _skip(statement, 0, _BLANK_OR_EMPTY)
    while found := _WORD.match(statement, position):
        yield found[0].lower()
        position = _skip(statement, found.end(), _BLANK)


def _skip(statement: str, position: int, blank: re.Pattern[str]) -> int:
    """Return where the first word at or after *position* may start."""
    while True:
        found = blank.match(statement, position) or _LINE_COMMENT.match(statement, position)
        if found:
            position = found.end()
        elif statement.startswith("/*", position):
            position = _end_of_comment(statement, position)
        else:
            return position


def _end_of_comment(statement: str, position: int) -> int:
    """Return the end of the comment that starts at *position*; comments nest in PostgreSQL."""
    depth = 0
    for mark in _COMMENT_MARK.finditer(statement, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(statement)
