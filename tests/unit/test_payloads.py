"""What an event may carry is decided without a database, names the place, and never shows a value."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import tracemalloc
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, Json, computed_field

from pgebus.errors import InvalidPayloadError, InvalidRunAtError, PayloadTooLargeError, PublishError
from pgebus.payloads import MAX_HEADERS_BYTES, check_headers, check_payload, check_run_at

LIMIT = 1_048_576
SECRET = "hunter2"
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001 - bad on purpose
END = datetime.max.replace(tzinfo=UTC)
START = datetime.min.replace(tzinfo=UTC)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


class Lying(dict[str, Any]):
    def items(self) -> Any:
        return {"lie": 1}.items()

    def __iter__(self) -> Iterator[str]:
        return iter(["lie"])

    def __len__(self) -> int:
        return 0


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Order:
    id: int = 1


class Model(BaseModel):
    id: int = 1


class Hostile:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(SECRET)

    def __repr__(self) -> str:
        raise RuntimeError(SECRET)


def nested(levels: int) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for _ in range(levels - 1):
        payload = {"d": payload}
    return payload


def itself() -> dict[str, Any]:
    payload: dict[str, Any] = {"a": {}}
    payload["a"]["self"] = [payload]
    return payload


def unfolding() -> dict[str, Any]:
    shared: list[Any] = ["x"]
    for _ in range(100):
        shared = [shared, shared]
    return {"bomb": shared}


def numbers() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "value",
    [
        None, [], [1], "{}", b'{"a": 1}', 1, 1.5, True, (), set(), numbers(), Hostile(),
        MappingProxyType({"a": 1}), UserDict(a=1), Colour.RED, object(), dict,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_payload_is_a_dict(value: object) -> None:
    with pytest.raises(InvalidPayloadError) as caught:
        check_payload(value, limit=LIMIT)
    assert caught.value.path == "$"
    assert isinstance(caught.value, PublishError)
    assert isinstance(caught.value, ValueError)


NUL, SURROGATE = f"{SECRET}\x00", f"{SECRET}\ud800"
BAD_VALUES: list[Any] = [
    NUL, SURROGATE, "\udfff", float("nan"), float("inf"), float("-inf"), 10**4000, -(10**4000), 10**5000,
    Decimal("NaN"), Decimal("0.1"), Fraction(1, 3), 1j, NAIVE, datetime.now(UTC),
    date(2026, 1, 1), time(1), timedelta(1), UUID(int=1), Colour.RED, b"x", bytearray(b"x"), memoryview(b"x"),
    {1}, frozenset(), range(3), Path(SECRET), object(), Hostile(), Order(), Model(), numbers(), print, int,
    Ellipsis, MappingProxyType({}), UserDict(), {1: 1}, {None: 1}, {True: 1}, {1.5: 1}, {(1,): 1}, {b"a": 1},
    {NUL: 1}, {SURROGATE: 1}, {"a": 1, Word("a"): 2}, {1: "a", "1": "b"}, nested(200), itself(),
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("check", [lambda value: check_payload(value, limit=LIMIT), check_headers])
def test_a_value_that_json_or_postgresql_cannot_hold_is_refused_with_its_path(check: Any, value: object) -> None:
    with pytest.raises(InvalidPayloadError) as caught:
        check({"fine": 1, "items": [0, 1, {"price": value}]})
    assert caught.value.path.startswith("$.items[2].price")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"items": [1, 2, {"price": float("nan")}]}, "$.items[2].price"),
        ({"a": {"b": ({"c": object()},)}}, "$.a.b[0].c"),
        ({"two words": {"": {'q"': 1j}}}, '$["two words"][""]["q\\""]'),
        ({"a": {1: 2}}, "$.a"),
        ({"a": [{"x\x00": 2}]}, "$.a[0]"),
        ({"é": object()}, '$["\\u00e9"]'),
        ({"k" * 41: object()}, '$["' + "k" * 40 + '\\u2026"]'),
        (itself(), "$.a.self[0]"),
    ],
)
def test_the_path_reads_like_json_path(payload: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidPayloadError) as caught:
        check_payload(payload, limit=LIMIT)
    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_long_path_is_cut_in_the_middle() -> None:
    with pytest.raises(InvalidPayloadError) as caught:
        check_payload(nested(201), limit=LIMIT)
    assert len(caught.value.path) <= 301


def test_a_payload_that_holds_itself_is_told_apart_from_a_deep_one() -> None:
    with pytest.raises(InvalidPayloadError, match="contains itself"):
        check_payload(itself(), limit=LIMIT)
    with pytest.raises(InvalidPayloadError, match="deeper than 200"):
        check_payload(nested(201), limit=LIMIT)
    with pytest.raises(InvalidPayloadError, match="deeper than 200"):
        check_payload(nested(100_000), limit=LIMIT)
    assert check_payload(nested(200), limit=LIMIT) == nested(200)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"": ""},
        {"a": None, "b": True, "c": -1, "d": 2.5, "e": "é\U0001f600", "f": [], "g": {}},
        {"control": "".join(map(chr, range(1, 32))) + "\x7f\u2028\ufeff"},
        {"escape": "\\u0000", "\\u0000": "\\ud800"},
        {"-0.0": -0.0, "least": 5e-324, "most": sys.float_info.max, "2^53+1": 2**53 + 1, "2^63": 2**63},
        {"digits": 10**4000 - 1, "negative": 1 - 10**4000},
        {"nfc": "\u00e9", "nfd": "e\u0301", "rtl": "\u202e", "__proto__": 1, "__class__": "os.system"},
        {str(i): i for i in range(50_000)},
        defaultdict(int, a=1),
        OrderedDict(a=1),
    ],
    ids=lambda payload: next(iter(payload), "empty"),
)
def test_what_json_can_hold_is_returned_equal(payload: dict[str, Any]) -> None:
    copy = check_payload(payload, limit=LIMIT)
    assert copy == payload
    assert type(copy) is dict
    assert json.loads(json.dumps(copy)) == payload


def test_tuples_become_lists() -> None:
    assert check_payload({"a": (1, (2,)), "p": Point(1, 2)}, limit=LIMIT) == {"a": [1, [2]], "p": [1, 2]}


def test_of_a_subclass_the_builtin_content_counts() -> None:
    payload = {Word("key"): Word("value"), "level": Level.HIGH, "dict": Lying(truth=1)}
    copy = check_payload(payload, limit=LIMIT)
    assert copy == {"key": "value", "level": 3, "dict": {"truth": 1}}
    assert [type(key) for key in copy] == [str, str, str]
    assert [type(value) for value in copy.values()] == [str, int, dict]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_equal_after_its_way_through_a_decimal_number(value: float) -> None:
    """PostgreSQL keeps numbers as decimals and prints them without an exponent."""
    encoded = json.dumps(check_payload({"f": value}, limit=LIMIT)["f"])
    assert json.loads(format(Decimal(encoded), "f")) == value


def test_the_copy_shares_nothing_with_what_was_given() -> None:
    payload: dict[str, Any] = {"list": [{"a": 1}], "dict": {"b": [2]}}
    copy = check_payload(payload, limit=LIMIT)
    payload["list"][0]["a"] = payload["dict"]["b"] = "changed"
    assert copy == {"list": [{"a": 1}], "dict": {"b": [2]}}


def test_the_limit_counts_bytes_of_compact_utf8_json() -> None:
    payload = {"a": "é", "b": [1, 2]}
    size = len('{"a":"é","b":[1,2]}'.encode())
    assert check_payload(payload, limit=size) == payload
    with pytest.raises(PayloadTooLargeError) as caught:
        check_payload(payload, limit=size - 1)
    assert (caught.value.size, caught.value.limit) == (size, size - 1)


@pytest.mark.parametrize(
    "payload",
    [
        unfolding(),
        {"a": ["x" * 1_000_000] * 100},
        {"a": [{"x": "x" * 1_000_000}] * 100},
        {"a": [10**3999] * 20_000},
    ],
    ids=["lists", "texts", "objects", "integers"],
)
def test_shared_references_that_unfold_to_too_much_are_refused_before_they_do(payload: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLargeError):
            check_payload(payload, limit=100_000)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_headers_may_have_64_kib() -> None:
    fitting = {"a": "x" * (MAX_HEADERS_BYTES - len('{"a":""}'))}
    assert check_headers(fitting) == fitting
    with pytest.raises(PayloadTooLargeError, match="Headers"):
        check_headers({"a": fitting["a"] + "x"})
    assert check_headers({"crlf": "a\r\nb", "event_id": 1}) == {"crlf": "a\r\nb", "event_id": 1}


def test_a_lowered_digit_limit_of_the_interpreter_is_a_typed_error() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        with pytest.raises(InvalidPayloadError):
            check_payload({"a": 10**700}, limit=LIMIT)
    finally:
        sys.set_int_max_str_digits(before)


class Zone(tzinfo):
    """A time zone that answers with whatever it was given, and raises exceptions."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def utcoffset(self, _: datetime | None) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def dst(self, _: datetime | None) -> timedelta | None:
        return None

    def tzname(self, _: datetime | None) -> str | None:
        return None


class NotATime(datetime):
    """As pandas.NaT: a datetime by type, with nothing in it."""

    def utcoffset(self) -> Any:
        return self


BAD_MOMENTS: list[Any] = [
    None, 0, 1.5, float("nan"), float("inf"), "2026-01-01T00:00:00Z", "infinity", b"", True, date(2026, 1, 1),
    time(1), timedelta(1), NAIVE, END.replace(tzinfo=None), START.replace(tzinfo=None), object(), Hostile(),
    START.replace(tzinfo=timezone(timedelta(hours=14))),
    END.replace(tzinfo=timezone(timedelta(hours=-12))), START, END,
    datetime(2026, 1, 1, tzinfo=Zone(None)), datetime(2026, 1, 1, tzinfo=Zone(RuntimeError(SECRET))),
    datetime(2026, 1, 1, tzinfo=Zone(3600)), datetime(2026, 1, 1, tzinfo=Zone(timedelta(days=2))),
    datetime(2026, 1, 1, tzinfo=Zone(OverflowError())), NotATime(2026, 1, 1, tzinfo=UTC),
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_MOMENTS, ids=lambda value: type(value).__name__)
def test_what_names_no_moment_is_refused(value: object) -> None:
    with pytest.raises(InvalidRunAtError) as caught:
        check_run_at(value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 1, tzinfo=UTC),
        START + timedelta(microseconds=1),
        END - timedelta(microseconds=1),
        datetime(2026, 3, 29, 2, 30, tzinfo=ZoneInfo("UTC")),
        datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=45, seconds=1))),
        datetime(2026, 11, 1, 1, 30, tzinfo=timezone(timedelta(hours=-5)), fold=1),
    ],
)
def test_an_aware_moment_is_returned_in_utc(value: datetime) -> None:
    moment = check_run_at(value)
    assert moment == value
    assert moment.tzinfo is UTC
    assert type(moment) is datetime


def test_the_fold_tells_the_second_of_two_equal_clock_times() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    first = datetime(2026, 10, 25, 2, 30, tzinfo=berlin)
    assert check_run_at(first.replace(fold=1)) - check_run_at(first) == timedelta(hours=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_every_json_object_is_returned_equal_or_holds_a_nul(payload: dict[str, Any]) -> None:
    try:
        assert check_payload(payload, limit=LIMIT) == payload
    except InvalidPayloadError:
        assert "\\u0000" in json.dumps(payload)


class Ordered(BaseModel, extra="forbid"):
    order_id: int = Field(alias="orderId")
    codes: Json[list[int]]

    @computed_field  # type: ignore[prop-decorator]  # as pydantic wants it
    @property
    def twice(self) -> int:
        return 2 * self.order_id


def test_a_model_that_is_published_can_be_made_again_from_its_payload() -> None:
    order = Ordered.model_validate({"orderId": 7, "codes": "[1, 2]"})
    assert Ordered.model_validate(check_payload(order, limit=1_000)) == order


def test_a_model_or_a_dataclass_is_stored_as_pydantic_writes_it() -> None:
    class Placed(BaseModel):
        at: datetime
        amount: Decimal
        lines: list[Order]

    when = datetime(2030, 1, 1, tzinfo=UTC)
    assert check_payload(Placed(at=when, amount=Decimal("1.50"), lines=[Order(7)]), limit=1_000) == {
        "at": "2030-01-01T00:00:00Z", "amount": "1.50", "lines": [{"id": 7}]
    }  # fmt: skip
    assert check_payload(Order(3), limit=1_000) == {"id": 3}


def test_a_model_that_cannot_be_json_is_refused() -> None:
    class Odd(BaseModel, arbitrary_types_allowed=True):
        what: object

    @dataclasses.dataclass
    class Odder:
        what: Hostile

    for value in (Odd(what=object()), Odder(Hostile()), Odd(what="\x00")):
        with pytest.raises(InvalidPayloadError):
            check_payload(value, limit=1_000)
