"""Which retention counts: the most specific of one worker's, and the longest of all workers'."""

from __future__ import annotations

import pytest

from pgebus._runtime.retention import Keeping, Retention

DAY = 86_400.0


@pytest.mark.parametrize(
    ("patterns", "event_type", "winner"),
    [
        ({"#": 1.0, "audit.#": 2.0}, "audit.login", 2.0),
        ({"audit.#": 1.0, "audit.*": 2.0}, "audit.login", 2.0),
        ({"audit.*": 1.0, "audit.login": 2.0}, "audit.login", 2.0),
        ({"*.login": 1.0, "audit.#": 2.0}, "audit.login", 2.0),
        ({"audit.#": 1.0, "audit.#.login": 2.0}, "audit.a.login", 2.0),
        ({"#.login": 2.0, "#": 1.0}, "login", 2.0),
        ({"audit.#": 1.0, "audit": 2.0}, "audit", 2.0),
        # of two that are as specific, the longer one
        ({"#.a.#": 1.0, "#.b.#": 2.0}, "a.b", 2.0),
        ({"#.a.#": None, "#.b.#": 2.0}, "a.b", None),
        ({"audit.#": 1.0}, "order.placed", 7.0),
        ({"audit.#": None}, "audit.login", None),
    ],
)
def test_the_most_specific_pattern_counts(
    patterns: dict[str, float | None], event_type: str, winner: float | None
) -> None:
    for ordered in (patterns, dict(reversed(patterns.items()))):
        assert Keeping([Retention(7.0, ordered)]).of(event_type) == winner


def test_of_several_workers_the_longest_counts() -> None:
    keeping = Keeping([Retention(7.0, {"audit.#": 1.0}, 5.0, None), Retention(3.0, {"order.#": None}, 6.0, 9.0)])
    assert keeping.of("audit.login") == 3.0
    assert keeping.of("order.placed") is None
    assert keeping.of("mail.sent") == 7.0
    assert keeping.dead == 6.0
    assert keeping.unhandled is None
    assert keeping.terms == [1.0, 3.0, 7.0]


def test_types_that_are_made_up_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgebus._runtime.retention._REMEMBERED", 3)
    keeping = Keeping([Retention(7.0, {"audit.*": DAY})])
    assert [keeping.of(f"audit.{n}") for n in range(10)] == [DAY] * 10
    assert len(keeping._known) <= 3


def test_what_no_release_before_knew_is_written_only_where_it_matters() -> None:
    assert "forgets" not in Retention(DAY).to_json()
    assert Keeping([Retention(DAY), Retention(DAY, forgets=True)]).forgets
    assert not Keeping([Retention(DAY), Retention(DAY)]).forgets


@pytest.mark.parametrize(
    "retention",
    [
        Retention(),
        Retention(DAY, forgets=True),
        Retention(7 * DAY, {"audit.#": 365 * DAY, "noise.*": 0.0, "law.#": None}, None, 365 * DAY),
    ],
)
def test_what_is_written_down_is_read_again(retention: Retention) -> None:
    assert Retention.from_json(retention.to_json()) == retention


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "[]",
        '{"patterns": 1}',
        '{"default": 1, "patterns": {}, "dead": true, "unhandled": null}',
        '{"default": "7 days", "patterns": {}, "dead": null, "unhandled": null}',
        '{"default": -1, "patterns": {}, "dead": null, "unhandled": null}',
        '{"default": 1, "patterns": {}, "dead": null, "unhandled": null, "cancelled": 3}',
        '{"default": 1, "patterns": {}, "dead": null, "unhandled": null, "forgets": 1}',
    ],
)
def test_what_another_release_may_have_written_is_not_guessed_at(text: str) -> None:
    with pytest.raises(ValueError, match="no retention"):
        Retention.from_json(text)
