"""Events refuse what cannot be published when an attribute is set, long before there is SQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import inspect

from pgebus.errors import (
    InvalidChannelError,
    InvalidEventTypeError,
    InvalidPayloadError,
    InvalidRunAtError,
    PayloadTooLargeError,
)
from pgebus.models import Event, metadata


def test_type_and_payload_are_enough() -> None:
    event = Event(type="order.placed", payload={"order": 7})
    assert (event.type, event.payload) == ("order.placed", {"order": 7})
    assert {"channel", "headers", "run_at", "created_at", "priority"} <= inspect(event).unloaded  # the database knows


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("type", "order..placed", InvalidEventTypeError),
        ("type", None, InvalidEventTypeError),
        ("channel", "", InvalidChannelError),
        ("channel", "ä" * 32, InvalidChannelError),
        ("channel", None, InvalidChannelError),
        ("payload", None, InvalidPayloadError),
        ("payload", [1], InvalidPayloadError),
        ("payload", {"x": float("nan")}, InvalidPayloadError),
        ("headers", "text", InvalidPayloadError),
        ("headers", {"x": "\x00"}, InvalidPayloadError),
        ("run_at", datetime(2030, 1, 1), InvalidRunAtError),  # noqa: DTZ001 - the naive one is the point
        ("run_at", "2030-01-01", InvalidRunAtError),
    ],
)
def test_a_bad_value_is_refused_in_the_constructor_and_afterwards(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        Event(**{"type": "a", "payload": {}, name: value})
    event = Event(type="a", payload={})
    with pytest.raises(error):
        setattr(event, name, value)
    assert event.type == "a"


@pytest.mark.parametrize("name", ["headers", "run_at", "key", "dedup_key", "priority"])
def test_none_means_left_out(name: str) -> None:
    assert getattr(Event(**{"type": "a", "payload": {}, name: None}), name) is None


def test_what_happens_to_the_callers_payload_changes_no_event() -> None:
    payload: dict[str, Any] = {"items": [1]}
    event = Event(type="a", payload=payload)
    payload["items"].append(float("nan"))
    assert event.payload == {"items": [1]}


def test_a_due_time_keeps_its_moment() -> None:
    run_at = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert Event(type="a", payload={}, run_at=run_at).run_at == datetime(2030, 1, 1, 10, tzinfo=UTC)


def test_the_largest_payload_is_an_attribute_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Event.max_payload_bytes == 1_048_576
    with pytest.raises(PayloadTooLargeError):
        Event(type="a", payload={"x": "y" * 1_048_576})
    monkeypatch.setattr(Event, "max_payload_bytes", 9)
    Event(type="a", payload={"x": "y"})
    with pytest.raises(PayloadTooLargeError) as caught:
        Event(type="a", payload={"x": "yy"})
    assert caught.value.limit == 9


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(TypeError):
        Event(type="a", payload={}, paylaod={})


def test_repr_shows_what_a_log_may_hold() -> None:
    event = Event(type="order.placed", payload={"card": "4711"}, headers={"token": "secret"}, channel="shop")
    assert repr(event) == "Event(id=None, type='order.placed', channel='shop')"
    assert repr(Event()) == "Event(id=None, type=None, channel=None)"


def test_names_in_the_database_do_not_depend_on_the_schema() -> None:
    """A label with the schema's name in it would be another index in every schema."""
    assert metadata.schema == "pgebus"
    names = [str(index.name) for table in metadata.tables.values() for index in table.indexes]
    names += [str(constraint.name) for table in metadata.tables.values() for constraint in table.constraints]
    assert not [name for name in names if "pgebus" in name]
    assert dict(metadata.naming_convention)["ix"] == "ix_%(table_name)s_%(column_0_name)s"
