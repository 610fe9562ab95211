from __future__ import annotations

import pytest
from tests.schema_names import MORE, ODD, REFUSED

from pgebus.database import make_engine
from pgebus.errors import InvalidChannelError, InvalidEventTypeError, InvalidSchemaError
from pgebus.names import check_channel, check_event_type, check_schema, quote_identifier, quote_literal
from pgebus.settings import DatabaseSettings


@pytest.mark.parametrize("good", ["a", "order.placed", "Order-2.PLACED_now", "0", "-", "a." * 127 + "a"])
def test_dotted_words_are_event_types(good: str) -> None:
    assert check_event_type(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        "", " ", ".", "a.", ".a", "a..b", "a b", "a\n", "\n", "a\x00", "é", "order.*", "#", ">", "a/b", "\ud800",
        "\u202ea",
        "a\u200b", "'; DROP TABLE events", "%s", "{0.__class__}", ":bind", "\\", "x" * 256, "a" * 10_000,
        None, 1, 1.5, b"order.placed", True, ["order.placed"],
    ],
)  # fmt: skip
def test_anything_else_is_no_event_type(bad: object) -> None:
    with pytest.raises(InvalidEventTypeError) as caught:
        check_event_type(bad)
    assert caught.value.value == bad
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("good", ["events", "Größe", 'we"ird', "a b", "x" * 63, "é" * 31, "'; --"])
def test_up_to_63_bytes_are_a_channel(good: str) -> None:
    assert check_channel(good) == good


@pytest.mark.parametrize("bad", ["", "x" * 64, "é" * 32, "a\x00", "\ud800", None, 7, b"events"])
def test_what_postgresql_would_cut_or_refuse_is_no_channel(bad: object) -> None:
    with pytest.raises(InvalidChannelError):
        check_channel(bad)


@pytest.mark.parametrize("good", ODD + MORE)
def test_nearly_any_name_of_up_to_63_bytes_is_a_schema(good: str) -> None:
    assert check_schema(good) == good


@pytest.mark.parametrize("bad", [*REFUSED, None, 1, b"pgebus", ["pgebus"]])
def test_a_name_that_would_not_arrive_as_it_is_is_no_schema(bad: object) -> None:
    with pytest.raises(InvalidSchemaError) as caught:
        check_schema(bad)
    assert caught.value.value == bad
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("bad", ["pg_mine", "ä" * 32, "tab\tbed"])
def test_settings_that_were_changed_unchecked_make_no_engine(bad: str) -> None:
    """PostgreSQL would cut a name that is too long, without an error."""
    settings = DatabaseSettings().model_copy(update={"schema_name": bad})
    with pytest.raises(InvalidSchemaError):
        make_engine(settings)


def test_quoting_doubles_what_it_must() -> None:
    assert quote_identifier('we"ird') == '"we""ird"'
    assert quote_literal("it's") == "'it''s'"
    assert quote_literal("a\\'b") == " E'a\\\\''b'"
