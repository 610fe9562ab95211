"""The rules for defining subclasses of Event; they are run apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import apart

from pgebus import Event
from pgebus.inheritance import ANY, family

CASES = Path(__file__).with_name("inheritance_cases.py")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return apart.outcomes(CASES)


@pytest.mark.parametrize("name", apart.cases(CASES))
def test_apart(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_no_other_test_sees_those_classes(outcomes: dict[str, str]) -> None:
    """One subclass would change the table of every test that comes later."""
    assert outcomes
    assert list(family.classes) == [ANY]
    assert set(Event.__table__.columns.keys()) == family.own_columns


def test_an_event_without_subclasses_is_an_event() -> None:
    assert family.class_of("order.placed") is Event
    assert Event(type="order.placed").type == "order.placed"
