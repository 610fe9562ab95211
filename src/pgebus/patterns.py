"""Topic patterns: which event types `order.*` and `order.#` stand for.

Pure, and the same meaning as that of the trigger, which finds the groups of an event from `subscriptions`: `*` is
exactly one word, `#` is any number of words, also none, at any place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from pgebus.errors import InvalidEventTypeError
from pgebus.names import MAX_EVENT_TYPE_BYTES, check_event_type

ONE: Final = "*"
MANY: Final = "#"

_PATTERN: Final = re.compile(r"(?:[A-Za-z0-9_-]+|\*|#)(?:\.(?:[A-Za-z0-9_-]+|\*|#))*")


def is_pattern(path: str) -> bool:
    """Tell whether *path* may stand for several event types."""
    return ONE in path or MANY in path


def check_pattern(value: object, *, what: str = "Path") -> str:
    """Return *value* when it is an event type, or one in which `*` and `#` stand for words.

    Raises:
        InvalidEventTypeError: If it is anything else, or longer than 255 bytes.
    """
    if not isinstance(value, str) or not is_pattern(value):
        return check_event_type(value, what=what)
    if len(value) > MAX_EVENT_TYPE_BYTES:
        problem = f"{what} has {len(value)} characters; at most {MAX_EVENT_TYPE_BYTES} are allowed."
    elif _PATTERN.fullmatch(value):
        return value
    else:
        shown = repr(value) if len(value) <= 80 else f"{value[:80]!r}…"
        problem = (
            f"{what} {shown} is no pattern: '*' stands for one word and '#' for any number of words, each between "
            "dots, like 'order.*' or 'order.#'."
        )
    raise InvalidEventTypeError(problem, value=value)


def overlap(one: str, other: str) -> bool:
    """Tell whether some event type matches both patterns."""
    left, right = one.split("."), other.split(".")
    # Whether the ends from there on have a word sequence in common; filled from the back.
    common = [[False] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in range(len(left), -1, -1):
        for j in range(len(right), -1, -1):
            if i == len(left) and j == len(right):
                common[i][j] = True
            elif i < len(left) and left[i] == MANY:
                common[i][j] = common[i + 1][j] or (j < len(right) and common[i][j + 1])
            elif j < len(right) and right[j] == MANY:
                common[i][j] = common[i][j + 1] or (i < len(left) and common[i + 1][j])
            elif i < len(left) and j < len(right) and (left[i] == right[j] or ONE in (left[i], right[j])):
                common[i][j] = common[i + 1][j + 1]
    return common[0][0]


class _Node:
    """What has been read of a pattern so far."""

    __slots__ = ("any_number", "nodes", "patterns")

    def __init__(self, *, any_number: bool = False) -> None:
        self.nodes: dict[str, _Node] = {}
        self.any_number = any_number  # reached by '#': every further word leads here too
        self.patterns: list[str] = []


class PatternIndex:
    """Patterns, found by an event type that they match: a trie in which all of them are followed at once.

    The cost grows with the words of the type and the patterns that match so far, not with the number of patterns.
    """

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, pattern: str) -> None:
        """Take *pattern*, which was checked; a second time changes nothing."""
        node = self._root
        for word in pattern.split("."):
            following = node.nodes.get(word)
            if following is None:
                following = node.nodes[word] = _Node(any_number=word == MANY)
            node = following
        if not node.patterns:
            node.patterns.append(pattern)

    def find(self, event_type: str) -> list[str]:
        """Return the patterns that match *event_type*, in no particular order."""
        here = _with_none([self._root])
        for word in event_type.split("."):
            ahead: dict[int, _Node] = {}
            for node in here:
                if node.any_number:
                    ahead[id(node)] = node
                for key in (word, ONE):
                    if (following := node.nodes.get(key)) is not None:
                        ahead[id(following)] = following
            here = _with_none(ahead.values())
        return [pattern for node in here for pattern in node.patterns]


def _with_none(nodes: Iterable[_Node]) -> list[_Node]:
    """Return *nodes* and what `#` reaches from them without a word."""
    reached: dict[int, _Node] = {}
    for start in nodes:
        node: _Node | None = start
        while node is not None and id(node) not in reached:
            reached[id(node)] = node
            node = node.nodes.get(MANY)
    return list(reached.values())
