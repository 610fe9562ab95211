"""A pattern means the same to the index, to the search for overlaps, and to somebody who reads it aloud."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgebus.errors import InvalidEventTypeError
from pgebus.patterns import PatternIndex, check_pattern, is_pattern, overlap

WORDS = ["a", "b", "ab", "A", "a-b", "_1"]
word = st.sampled_from(WORDS)
event_types = st.lists(word, min_size=1, max_size=5).map(".".join)
patterns = st.lists(word | st.sampled_from(["*", "#"]), min_size=1, max_size=5).map(".".join)


def reads_as(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """The definition, word by word."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(reads_as(pattern[1:], words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and reads_as(pattern[1:], words[1:])


def oracle(pattern: str, event_type: str) -> bool:
    return reads_as(pattern.split("."), event_type.split("."))


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("order.*", ["order.placed"], ["order", "order.placed.late", "orders.placed", "x.order.placed"]),
        ("order.#", ["order", "order.placed", "order.placed.late"], ["orders", "x.order", "order-1"]),
        ("#", ["order", "order.placed.late"], []),
        ("*", ["order"], ["order.placed"]),
        ("#.failed", ["failed", "order.failed", "a.b.failed"], ["failed.order"]),
        ("order.#.late", ["order.late", "order.a.late", "order.a.b.late"], ["order", "order.late.a"]),
        ("order.*.late", ["order.a.late"], ["order.late", "order.a.b.late"]),
        ("*.#", ["a", "a.b"], []),
        ("#.#", ["a", "a.b"], []),
    ],
)
def test_what_a_pattern_matches(pattern: str, matched: list[str], others: list[str]) -> None:
    index = PatternIndex()
    index.add(pattern)
    assert [each for each in [*matched, *others] if index.find(each)] == matched


@given(st.lists(patterns, max_size=8), event_types)
def test_the_index_finds_what_the_definition_says(known: list[str], event_type: str) -> None:
    index = PatternIndex()
    for pattern in known:
        index.add(pattern)
    assert sorted(index.find(event_type)) == sorted({each for each in known if oracle(each, event_type)})


short_patterns = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=4).map(".".join)


@settings(deadline=None)
@given(short_patterns, short_patterns)
def test_patterns_overlap_when_some_type_matches_both(one: str, other: str) -> None:
    """Types as long as both together are enough: whatever is longer only repeats under '#'."""
    longest = min(len(one.split(".")) + len(other.split(".")), 6)
    words = {*one.split("."), *other.split("."), "z"} - {"*", "#"}
    types = (
        ".".join(each) for length in range(1, longest + 1) for each in itertools.product(sorted(words), repeat=length)
    )
    assert overlap(one, other) == any(oracle(one, each) and oracle(other, each) for each in types)


@pytest.mark.parametrize("path", ["order.placed", "order.*", "#", "*.#.a-b", "a." * 127 + "*"])
def test_a_good_path_is_returned(path: str) -> None:
    assert check_pattern(path) == path
    assert is_pattern(path) == ("*" in path or "#" in path)


@pytest.mark.parametrize(
    "path",
    ["", "*a", "a*", "order*", "order.#x", "**", "##", "*.", ".#", "a..#", "# ", "a.*\n", "é.*", "a*b.c", 1, None],
)  # fmt: skip
def test_a_bad_path_is_refused(path: object) -> None:
    with pytest.raises(InvalidEventTypeError):
        check_pattern(path)
