"""What a handler takes is found out, and what cannot be is refused, when it is registered."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel, ConfigDict, Field, JsonValue, RootModel, TypeAdapter
from tests.unit import wrappers

from pgebus import EventContext, EventRouter, InvalidHandlerError


class Placed(BaseModel):
    order_id: int


class Deferred(BaseModel):
    model_config = ConfigDict(defer_build=True)
    order_id: int


class Many(RootModel[list[Placed]]):
    """What is stored as a JSON array."""


class Counts(RootModel[dict[str, int]]):
    """What is stored as a JSON object."""


class Pair(NamedTuple):
    order_id: int


@dataclass
class Unfinished:
    order: Nowhere  # type: ignore[name-defined]  # noqa: F821 - the mistake under test


class UnfinishedModel(BaseModel):
    order: Nowhere  # type: ignore[name-defined]  # noqa: F821 - the mistake under test


def adapter_of(function: Any) -> TypeAdapter[Any] | None:
    router = EventRouter()
    router.on("e", name="handler")(function)
    return router.routes()[0].handler.payload


def taking(annotation: Any) -> Any:
    async def handler(ctx: Any, payload: Any) -> None: ...

    handler.__annotations__["payload"] = annotation
    return handler


async def plain(ctx: EventContext, payload: Placed) -> None: ...


async def dependent(service: int, ctx: EventContext, payload: Placed) -> None: ...


class Service:
    @wrappers.starred
    async def method(self, ctx: EventContext, payload: Placed) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        wrappers.named(plain), wrappers.renamed(plain), wrappers.starred(plain), wrappers.giving(dependent),
        wrappers.starred(wrappers.named(plain)), functools.partial(dependent, 7), Service().method,
    ],
)  # fmt: skip
def test_a_decorated_handler_takes_what_it_says(function: Any) -> None:
    """Its annotations were written among the names of its own module, not of the decorator's."""
    adapter = adapter_of(function)
    assert adapter is not None
    assert adapter.validate_json('{"order_id": "7"}') == Placed(order_id=7)


def test_it_is_the_wrapper_that_must_be_callable_with_two() -> None:
    with pytest.raises(InvalidHandlerError, match="two positional"):
        adapter_of(dependent)


@pytest.mark.parametrize("annotation", [Unfinished, UnfinishedModel, Placed | UnfinishedModel, dict[str, Unfinished]])
def test_a_type_that_is_not_fully_defined_is_refused(annotation: Any) -> None:
    """It would fail for every event, and be tried again as if it could get better."""
    with pytest.raises(InvalidHandlerError, match="not fully defined"):
        adapter_of(taking(annotation))


def test_a_type_that_is_built_late_on_purpose_is_built_now() -> None:
    adapter = adapter_of(taking(Deferred))
    assert adapter is not None
    assert adapter.validate_json('{"order_id": 7}') == Deferred(order_id=7)


@pytest.mark.parametrize(
    "annotation",
    [
        int, str, bool, None, datetime, list[Placed], tuple[int, ...], set[int], Literal["a"],
        int | None, int | list[Placed], Annotated[int, Field(gt=1)], Many, bytes,
    ],
    ids=str,
)  # fmt: skip
def test_a_type_that_no_json_object_fits_is_refused(annotation: Any) -> None:
    with pytest.raises(InvalidHandlerError, match="JSON object"):
        adapter_of(taking(annotation))


@pytest.mark.parametrize(
    "annotation",
    [
        Placed, Placed | int, Placed | None, Annotated[Placed, "x"], Counts, Pair, JsonValue, dict[str, int],
        Mapping[str, int], dict[str, Placed], dict[int, Any],
    ],
    ids=str,
)  # fmt: skip
def test_a_type_that_an_object_may_fit_is_validated(annotation: Any) -> None:
    assert adapter_of(taking(annotation)) is not None


@pytest.mark.parametrize(
    "annotation",
    [dict, dict[str, Any], dict[str, object], Mapping, Mapping[str, Any], MutableMapping[str, Any], Any, object],
    ids=str,
)
def test_a_type_that_says_nothing_of_what_is_in_it_takes_the_dict(annotation: Any) -> None:
    assert adapter_of(taking(annotation)) is None


def test_a_handler_may_use_names_around_it_that_have_no_value_yet() -> None:
    """Its own name has none while it is decorated."""

    class Local(BaseModel):
        n: int

    router = EventRouter()

    @router.on("e")
    async def handler(ctx: EventContext, payload: Local) -> None:
        uses = [handler, Local, later]
        assert uses

    later = 1
    adapter = router.routes()[0].handler.payload
    assert adapter is not None
    assert adapter.validate_json('{"n": 1}') == Local(n=1)


def test_a_handler_with_a_validated_payload_may_have_paths_that_overlap() -> None:
    """The type is the function's own, so both registrations have the same options."""

    async def handler(ctx: EventContext, payload: Placed) -> None: ...

    router = EventRouter()
    router.on("order.*")(handler)
    router.on("order.placed")(handler)
    assert [each.function for each in router.handlers_for("order.placed")] == [handler]
