from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from pgebus.operations.selection import regex_of
from pgebus.patterns import PatternIndex

words = st.sampled_from(["a", "b", "order", "a-b", "_"])


@given(st.lists(words | st.sampled_from(["*", "#"]), min_size=1, max_size=5), st.lists(words, min_size=1, max_size=5))
def test_a_pattern_selects_what_it_would_subscribe_to(pattern: list[str], event_type: list[str]) -> None:
    index = PatternIndex()
    index.add(".".join(pattern))
    found = bool(index.find(".".join(event_type)))
    assert bool(re.search(regex_of(".".join(pattern)), ".".join(event_type) + ".")) == found
