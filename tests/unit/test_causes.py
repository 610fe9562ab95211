"""What is handed on to the events that an event causes, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from pgebus._causes import caused_by, inherit

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-00"


def test_the_first_event_of_a_chain_gives_it_its_name() -> None:
    assert caused_by(7, {}) == {"correlation_id": "7", "causation_id": "7"}
    assert caused_by(8, caused_by(7, {})) == {"correlation_id": "7", "causation_id": "8"}


def test_the_trace_goes_on_and_nothing_else_does() -> None:
    headers = {"traceparent": TRACE, "tracestate": "x=1", "secret": 1, "causation_id": "5"}
    assert caused_by(7, headers) == {
        "correlation_id": "7", "causation_id": "7", "traceparent": TRACE, "tracestate": "x=1"
    }  # fmt: skip


@pytest.mark.parametrize("bad", [None, "", 5, ["x"], {"x": 1}, "x" * 256, True])
def test_a_correlation_id_that_is_none_is_not_handed_on(bad: Any) -> None:
    """One of 64 KiB would leave no room for the headers of the next event."""
    assert caused_by(7, {"correlation_id": bad})["correlation_id"] == "7"


@pytest.mark.parametrize(
    "bad",
    [
        None, "", 5, {"not": "valid"}, TRACE[:-1], TRACE + "0", TRACE.upper(), TRACE + "\n", f" {TRACE}",
        "01" + TRACE[2:], "ff" + TRACE[2:], TRACE.replace("-", "_"),
        OTHER.replace("1", "0"), OTHER.replace("2", "0"), TRACE.replace("0af", "\N{ARABIC-INDIC DIGIT ZERO}af"),
    ],
)  # fmt: skip
def test_a_traceparent_that_is_none_is_not_handed_on_and_its_state_neither(bad: Any) -> None:
    assert caused_by(7, {"traceparent": bad, "tracestate": "x=1"}) == {"correlation_id": "7", "causation_id": "7"}


@pytest.mark.parametrize("bad", [None, "", 5, ["x=1"], "x" * 513])
def test_a_tracestate_that_is_none_is_not_handed_on(bad: Any) -> None:
    assert "tracestate" not in caused_by(7, {"traceparent": TRACE, "tracestate": bad})


def test_a_state_is_never_joined_to_another_trace() -> None:
    inherited = {"traceparent": TRACE, "tracestate": "x=1", "correlation_id": "7"}
    assert inherit(inherited, {}) == inherited
    assert inherit(inherited, {"correlation_id": "8", "n": 1}) == {**inherited, "correlation_id": "8", "n": 1}
    assert inherit(inherited, {"traceparent": OTHER}) == {"traceparent": OTHER, "correlation_id": "7"}
    own = {"traceparent": OTHER, "tracestate": "y=2"}
    assert inherit(inherited, own) == {**own, "correlation_id": "7"}
