"""The checker of the torture, proved first: each violation is reported, and an honest history has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torture.checker import RULES, check
from torture.history import DeliveryRow, EventRow, History, Outcome, Promise, Rules, Run, Unit

RULES_HERE = Rules(
    promises={
        "order.placed": (
            Promise("billing", effects=("bill", "reserve")),
            Promise("mail", starts=("send",)),
        ),
        "stock.moved": (Promise("billing", effects=("move",)),),
        "order.refused": (Promise("billing", status="dead"),),
        "order.billed": (),
    },
    accounts=10,
    bumping=frozenset({"reserve", "move"}),
    follow_up=("order.billed", "order.placed", "billing"),
    max_attempts=5,
)

HONEST = History(
    units=[
        Unit(1, 2, Outcome.OK),
        Unit(3, 3, Outcome.FAILED),
        Unit(4, 4, Outcome.UNKNOWN),
        Unit(5, 5, Outcome.UNKNOWN),
        Unit(6, 6, Outcome.OK, business=False),
        Unit(7, 8, Outcome.OK),
    ],
    business=[1, 2, 4, 7, 8],
    events=[
        EventRow(101, 1, "order.placed", run_at=50.0),
        EventRow(102, 2, "order.refused"),
        EventRow(104, 4, "order.placed"),
        EventRow(106, 6, "stock.moved"),
        EventRow(107, 7, "stock.moved", "k"),
        EventRow(108, 8, "stock.moved", "k"),
        EventRow(201, -1, "order.billed"),
        EventRow(204, -4, "order.billed"),
    ],
    deliveries=[
        DeliveryRow(101, "billing", "completed", attempt=2, claim_seq=3),
        DeliveryRow(101, "mail", "completed", claim_seq=2),
        DeliveryRow(102, "billing", "dead"),
        DeliveryRow(104, "billing", "completed"),
        DeliveryRow(104, "mail", "completed"),
        DeliveryRow(106, "billing", "completed"),
        DeliveryRow(107, "billing", "completed"),
        DeliveryRow(108, "billing", "completed"),
    ],
    effects=[
        Run(1, 101, "billing", "bill", 3, at=50.0),
        Run(2, 101, "billing", "reserve", 3, at=51.0),
        Run(3, 104, "billing", "bill"),
        Run(4, 104, "billing", "reserve"),
        Run(5, 106, "billing", "move"),
        Run(6, 107, "billing", "move"),
        Run(7, 108, "billing", "move"),
    ],
    # At least once: a second start is no violation.
    starts=[Run(1, 101, "mail", "send", 1), Run(2, 101, "mail", "send", 2), Run(3, 104, "mail", "send")],
    balances={1: 1, 4: 1, 6: 1, 7: 1, 8: 1, 9: 0},
    left={"backends": 0},
)


def without(rows: Any, **wanted: Any) -> list[Any]:
    """Return *rows* without the one that has these values."""
    kept = [row for row in rows if any(getattr(row, name) != value for name, value in wanted.items())]
    assert len(kept) == len(rows) - 1
    return kept


def changed(rows: Any, changes: dict[str, Any], **wanted: Any) -> list[Any]:
    """Return *rows* with *changes* in the one that has these values."""
    kept = without(rows, **wanted)
    (row,) = (row for row in rows if row not in kept)
    return [*kept, row._replace(**changes)]


def rules_broken(**parts: Any) -> set[str]:
    return {violation.rule for violation in check(replace(HONEST, **parts), RULES_HERE)}


def test_an_honest_history_has_no_violation() -> None:
    assert check(HONEST, RULES_HERE) == []


H = HONEST
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("an acknowledged event is gone", "lost", {"events": without(H.events, number=6)}),
    ("an acknowledged business row is gone", "half", {"business": [1, 4, 7, 8]}),
    ("an acknowledged transaction is gone", "lost", {"units": [*H.units, Unit(9, 9, Outcome.OK)]}),
    ("an event has no delivery for a group", "lost", {"deliveries": without(H.deliveries, event_id=104, group="mail")}),
    (
        "a completed delivery has no effect",
        "lost",
        {"effects": without(H.effects, event_id=106), "balances": {**H.balances, 6: 0}},
    ),
    ("a completed delivery never started", "lost", {"starts": without(H.starts, event_id=104)}),
    ("an event is there twice", "doubled", {"events": [*H.events, EventRow(999, 6, "order.billed")]}),
    ("a business row is there twice", "doubled", {"business": [*H.business, 1]}),
    (
        "an effect is there twice, its balance too",
        "doubled",
        {"effects": [*H.effects, Run(9, 106, "billing", "move")], "balances": {**H.balances, 6: 2}},
    ),
    ("a delivery is there twice", "doubled", {"deliveries": [*H.deliveries, H.deliveries[0]]}),
    ("a handler's event is there twice", "doubled", {"events": [*H.events, EventRow(205, -1, "order.billed")]}),
    ("a failed transaction has left its event", "ghost", {"events": [*H.events, EventRow(103, 3, "order.billed")]}),
    ("a failed transaction has left its business row", "ghost", {"business": [*H.business, 3]}),
    ("an event that nobody published", "ghost", {"events": [*H.events, EventRow(999, 77, "order.billed")]}),
    ("a business row that nobody wrote", "ghost", {"business": [*H.business, 77]}),
    ("a delivery without its event", "ghost", {"deliveries": [*H.deliveries, DeliveryRow(999, "mail", "completed")]}),
    (
        "a delivery that nobody wants",
        "ghost",
        {"deliveries": [*H.deliveries, DeliveryRow(106, "mail", "completed")]},
    ),
    ("an effect of no delivery", "ghost", {"effects": [*H.effects, Run(9, 201, "billing", "bill")]}),
    ("a start of no delivery", "ghost", {"starts": [*H.starts, Run(9, 201, "mail", "send")]}),
    ("an effect of a dead delivery", "ghost", {"effects": [*H.effects, Run(9, 102, "billing", "bill")]}),
    ("an effect of a handler of somebody else", "ghost", {"effects": [*H.effects, Run(9, 106, "billing", "bill")]}),
    (
        "a handler's event of a delivery that owes none",
        "ghost",
        {"events": [*H.events, EventRow(9, -6, "order.billed")]},
    ),
    ("a start of a handler of somebody else", "ghost", {"starts": [*H.starts, Run(9, 106, "billing", "send")]}),
    (
        "a handler's event of a delivery that is not completed",
        "ghost",
        {"deliveries": changed(H.deliveries, {"status": "dead"}, event_id=104, group="billing")},
    ),
    ("unknown: an event without its business row", "half", {"business": [1, 2, 7, 8]}),
    ("unknown: a business row without its event", "half", {"business": [*H.business, 5]}),
    (
        "half of a batch",
        "half",
        {"events": without(H.events, number=2), "business": [1, 4, 7, 8]},
    ),
    ("an effect of one handler, of two", "half", {"effects": without(H.effects, event_id=104, handler="bill")}),
    ("a balance that was bumped once more", "half", {"balances": {**H.balances, 6: 2}}),
    ("a balance that was not bumped", "half", {"balances": {**H.balances, 6: 0}}),
    ("a balance that nobody may have bumped", "half", {"balances": {**H.balances, 9: 1}}),
    ("a handler's event is missing", "half", {"events": without(H.events, number=-4)}),
    *(
        (f"a delivery is {status}", "stuck", {"deliveries": changed(H.deliveries, {"status": status}, event_id=106)})
        for status in ("pending", "running", "blocked", "unhandled")
    ),
    ("a delivery is dead", "dead", {"deliveries": changed(H.deliveries, {"status": "dead"}, event_id=106)}),
    (
        "a rejected one is completed",
        "dead",
        {"deliveries": changed(H.deliveries, {"status": "completed"}, event_id=102)},
    ),
    ("an effect of an earlier claim", "fence", {"effects": changed(H.effects, {"claim_seq": 2}, position=1)}),
    ("a start of a claim that never was", "fence", {"starts": changed(H.starts, {"claim_seq": 9}, position=3)}),
    ("an effect before its time", "early", {"effects": changed(H.effects, {"at": 49.9}, position=1)}),
    ("a start before its time", "early", {"starts": changed(H.starts, {"at": 49.9}, position=1)}),
    (
        "two effects of a key in the wrong order",
        "order",
        {"effects": changed(H.effects, {"position": 8}, event_id=107)},
    ),
    ("too many attempts", "bounded", {"deliveries": changed(H.deliveries, {"attempt": 6}, event_id=106)}),
    ("a backend is left", "leak", {"left": {"backends": 1}}),
]


@pytest.mark.parametrize(("rule", "parts"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_a_violation_is_reported(rule: str, parts: dict[str, Any]) -> None:
    assert rule in rules_broken(**parts)


def test_every_rule_has_a_case() -> None:
    assert {rule for _, rule, _ in CASES} == set(RULES)


def test_starts_of_a_key_in_the_wrong_order_are_reported_and_repetitions_are_not() -> None:
    rules = replace(RULES_HERE, promises={"stock.moved": (Promise("mail", starts=("count",)),)}, follow_up=None)
    history = History(
        units=[Unit(1, 2, Outcome.OK)],
        business=[1, 2],
        events=[EventRow(1, 1, "stock.moved", "k"), EventRow(2, 2, "stock.moved", "k")],
        deliveries=[DeliveryRow(1, "mail", "completed"), DeliveryRow(2, "mail", "completed")],
        starts=[Run(1, 1, "mail", "count"), Run(2, 2, "mail", "count"), Run(3, 1, "mail", "count")],
    )
    assert check(history, rules) == []
    wrong = replace(history, starts=[Run(1, 2, "mail", "count"), Run(2, 1, "mail", "count")])
    assert {violation.rule for violation in check(wrong, rules)} == {"order"}
