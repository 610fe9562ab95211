"""Routers find what a naive walk of the tree finds, and refuse at registration what could not run."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import random
import timeit
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus.errors import (
    ConfigurationError,
    DuplicateHandlerError,
    InvalidEventTypeError,
    InvalidHandlerError,
)
from pgebus.groups import Group
from pgebus.routing import EventRouter

if TYPE_CHECKING:
    from somewhere_else import Context  # type: ignore[import-not-found]  # an annotation that cannot be resolved


async def handle(ctx: Any, payload: Any) -> None: ...


async def other(ctx: Any, payload: Any) -> None: ...


def fresh() -> Callable[[Any, Any], Awaitable[None]]:
    async def handler(ctx: Any, payload: Any) -> None: ...

    return handler


def patterns(router: EventRouter) -> list[str]:
    return [route.pattern for route in router.routes()]


def names(router: EventRouter, event_type: str) -> list[str]:
    return [handler.name for handler in router.handlers_for(event_type)]


def test_the_decorator_returns_the_function_unchanged() -> None:
    router = EventRouter()
    function = fresh()
    assert router.on("order.placed")(function) is function
    [handler] = router.handlers_for("order.placed")
    assert handler.function is function
    assert handler.name == f"{__name__}.fresh.<locals>.handler"
    assert (handler.transactional, handler.group) == (False, "default")


def test_options_of_a_handler_are_kept() -> None:
    router = EventRouter()
    router.on("order.placed", transactional=True, name="stable")(handle)
    [handler] = router.handlers_for("order.placed")
    assert (handler.name, handler.transactional) == ("stable", True)
    assert router.handlers_for("order.placed", "default") == (handler,)
    assert router.handlers_for("order.placed", "mail") == ()


@pytest.mark.parametrize(
    ("root", "between", "child", "full"),
    [
        ("", "", "", "placed"),
        ("shop", "", "", "shop.placed"),
        ("", "v1", "", "v1.placed"),
        ("", "", "order", "order.placed"),
        ("shop", "v1", "order", "shop.v1.order.placed"),
        ("shop.eu", "v1.beta", "order.online", "shop.eu.v1.beta.order.online.placed"),
    ],
)
def test_prefixes_are_joined_from_the_outside_in(root: str, between: str, child: str, full: str) -> None:
    outer, inner = EventRouter(root), EventRouter(prefix=child)
    inner.on("placed")(handle)
    outer.include_router(inner, prefix=between)
    assert patterns(outer) == [full]
    assert len(outer.handlers_for(full)) == 1
    assert outer.handlers_for(f"{full}.more") == outer.handlers_for("placed.") == ()


def test_the_own_prefix_of_the_root_counts() -> None:
    router = EventRouter("shop")
    router.on("order.placed")(handle)
    assert patterns(router) == ["shop.order.placed"]


def test_routers_nest_to_any_depth() -> None:
    innermost = router = EventRouter("r0")
    for level in range(1, 20):
        outer = EventRouter(f"r{level}")
        outer.include_router(router)
        router = outer
    innermost.on("e")(handle)
    assert patterns(router) == [".".join(f"r{level}" for level in reversed(range(20))) + ".e"]


def test_a_route_added_after_the_inclusion_is_found() -> None:
    root, middle, leaf = EventRouter(), EventRouter("m"), EventRouter("l")
    root.include_router(middle)
    middle.include_router(leaf)
    assert root.handlers_for("m.l.e") == ()
    before = root.version
    leaf.on("e")(handle)
    assert root.version > before
    assert len(root.handlers_for("m.l.e")) == 1
    leaf.on("e")(other)
    assert len(root.handlers_for("m.l.e")) == 2


def test_a_router_included_later_is_found_from_the_root() -> None:
    root, middle, leaf = EventRouter(), EventRouter("m"), EventRouter("l")
    leaf.on("e")(handle)
    root.include_router(middle)
    before = root.version
    middle.include_router(leaf)
    assert root.version > before
    assert patterns(root) == ["m.l.e"]


def test_what_changes_nothing_keeps_the_version() -> None:
    router = EventRouter()
    router.on("e")(handle)
    before = router.version
    with pytest.raises(DuplicateHandlerError):
        router.on("e")(handle)
    router.handlers_for("e")
    router.routes()
    assert router.version == before


def test_handlers_of_one_event_run_in_the_order_of_registration() -> None:
    first, root, second = EventRouter(), EventRouter(), EventRouter()
    root.on("e", name="1")(fresh())
    second.on("e", name="2")(fresh())
    first.on("e", name="3")(fresh())
    root.include_router(first)
    root.include_router(second)
    second.on("e", name="4")(fresh())
    root.on("e", name="5")(fresh())
    assert names(root, "e") == ["1", "2", "3", "4", "5"]
    assert [route.handler.name for route in root.routes()] == ["1", "2", "3", "4", "5"]


def test_one_router_may_be_included_under_two_prefixes() -> None:
    root, child = EventRouter(), EventRouter("c")
    child.on("e")(handle)
    root.include_router(child, prefix="a")
    root.include_router(child, prefix="b")
    assert patterns(root) == ["a.c.e", "b.c.e"]
    child.on("f")(handle)
    assert sorted(patterns(root)) == ["a.c.e", "a.c.f", "b.c.e", "b.c.f"]


def test_one_handler_may_handle_several_events() -> None:
    router = EventRouter()
    router.on("a")(router.on("b")(handle))
    assert sorted(patterns(router)) == ["a", "b"]


@pytest.mark.parametrize("again", [{}, {"name": "another"}, {"transactional": True}])
def test_the_same_handler_twice_for_one_path_is_refused(again: dict[str, Any]) -> None:
    router = EventRouter("shop")
    router.on("order.placed", name="mine")(handle)
    with pytest.raises(DuplicateHandlerError) as caught:
        router.on("order.placed", **again)(handle)
    assert caught.value.path == "shop.order.placed"
    assert len(router.routes()) == 1


def test_two_handlers_of_one_name_for_one_path_are_refused() -> None:
    router = EventRouter()
    router.on("order.placed", name="mine")(handle)
    with pytest.raises(DuplicateHandlerError) as caught:
        router.on("order.placed", name="mine")(other)
    assert (caught.value.handler, caught.value.path) == ("mine", "order.placed")
    router.on("order.paid", name="mine")(other)
    assert len(router.routes()) == 2


def test_a_duplicate_by_inclusion_leaves_the_tree_unchanged() -> None:
    top, root, child = EventRouter(), EventRouter(), EventRouter()
    top.include_router(root)
    root.on("a.e")(handle)
    child.on("d")(handle)
    child.on("e")(handle)
    before = (root.version, top.version)
    with pytest.raises(DuplicateHandlerError) as caught:
        root.include_router(child, prefix="a")
    assert caught.value.path == "a.e"
    assert patterns(root) == patterns(top) == ["a.e"]
    assert (root.version, top.version) == before
    child.on("f")(handle)
    assert patterns(root) == ["a.e"]


def test_a_duplicate_that_shows_only_further_up_is_refused_where_it_is_written() -> None:
    root, child = EventRouter(), EventRouter()
    root.on("a.e")(handle)
    root.include_router(child, prefix="a")
    with pytest.raises(DuplicateHandlerError) as caught:
        child.on("e")(handle)
    assert caught.value.path == "a.e"
    assert child.routes() == ()
    assert patterns(root) == ["a.e"]


def test_a_route_that_would_meet_itself_on_two_ways_up_is_refused() -> None:
    root, left, right, leaf = EventRouter(), EventRouter(), EventRouter(), EventRouter()
    root.include_router(left)
    root.include_router(right)
    left.include_router(leaf)
    right.include_router(leaf)
    with pytest.raises(DuplicateHandlerError):
        leaf.on("e")(handle)
    assert [router.routes() for router in (root, left, right, leaf)] == [()] * 4


def test_the_same_inclusion_twice_is_refused() -> None:
    root, child = EventRouter("r"), EventRouter()
    root.include_router(child, prefix="a")
    with pytest.raises(ConfigurationError, match="already included"):
        root.include_router(child, prefix="a")
    child.on("e")(handle)
    with pytest.raises(DuplicateHandlerError):
        root.include_router(child, prefix="a")
    assert patterns(root) == ["r.a.e"]


def test_a_cycle_is_refused() -> None:
    a, b, c = EventRouter("a"), EventRouter("b"), EventRouter("c")
    a.include_router(b)
    b.include_router(c)
    for inner, outer in ((a, a), (b, a), (c, a), (c, b)):
        with pytest.raises(ConfigurationError, match="cycle"):
            inner.include_router(outer, prefix="x")
    a.include_router(c, prefix="x")  # two ways down to one router are no cycle


@pytest.mark.parametrize("what", [None, "router", EventRouter, 1])
def test_only_routers_are_included(what: Any) -> None:
    with pytest.raises(ConfigurationError):
        EventRouter().include_router(what)


NO_NAMES: list[Any] = [
    " ", ".", "a..b", ".a", "a.", "a b", "a" * 256, "é", "\U0001f600" * 16, "a\x00", "a\n", "a\x1b", "\ud800",
    "e\u0301", "\u202ea", "a\u200bb", "'; DROP", "%s", "{0.__class__}", ":bind", "\\", "(a+)+$", b"a", 1, None, ["a"],
    "a*", "#a", "a.**", "a.#b", ">",
]  # fmt: skip


@pytest.mark.parametrize("name", ["", *NO_NAMES], ids=ascii)
def test_a_path_is_a_dotted_name_or_a_pattern(name: Any) -> None:
    router = EventRouter()
    with pytest.raises(InvalidEventTypeError):
        router.on(name)
    assert router.routes() == ()


@pytest.mark.parametrize("name", [*NO_NAMES, "*", "#", "a.*"], ids=ascii)
def test_a_prefix_is_a_dotted_name_or_nothing(name: Any) -> None:
    with pytest.raises(InvalidEventTypeError):
        EventRouter(name)
    with pytest.raises(InvalidEventTypeError):
        EventRouter().include_router(EventRouter(), prefix=name)


def test_a_pattern_is_found_by_the_types_that_it_matches() -> None:
    root, shop = EventRouter("eu"), EventRouter("shop")
    shop.on("order.*", name="one")(fresh())
    shop.on("order.placed", name="two")(fresh())
    root.include_router(shop, prefix="v1")
    shop.on("#", name="three")(fresh())
    shop.on("*.placed", name="four")(fresh())
    assert names(root, "eu.v1.shop.order.placed") == ["one", "two", "three", "four"]
    assert names(root, "eu.v1.shop.order.paid") == ["one", "three"]
    assert names(root, "eu.v1.shop") == ["three"]
    assert names(root, "eu.v1") == names(root, "shop.order.placed") == []
    assert names(root, "eu.v1.shop.order.*") == names(root, "eu.v1.shop.order.x")  # never a type, but harmless


def test_a_handler_that_several_of_its_paths_lead_to_runs_once() -> None:
    router = EventRouter()
    router.on("order.#", name="first")(other)
    router.on("order.*")(router.on("order.placed")(handle))
    router.on("order.placed", group="billing")(handle)
    assert [each.function for each in router.handlers_for("order.placed")] == [other, handle]
    assert [each.function for each in router.handlers_for("order.placed", "billing")] == [handle]
    assert [route.pattern for route in router.matching("order.placed")] == [
        "order.#", "order.placed", "order.*", "order.placed"
    ]  # fmt: skip


@pytest.mark.parametrize("second", ["order.*", "#", "*.placed", "order.#", "order.placed.#"])
def test_two_handlers_of_one_name_that_could_meet_are_refused(second: str) -> None:
    router = EventRouter()
    router.on("order.placed", name="mine")(handle)
    with pytest.raises(DuplicateHandlerError, match="match both"):
        router.on(second, name="mine")(other)
    with pytest.raises(DuplicateHandlerError, match="same options"):
        router.on(second, name="mine", transactional=True)(handle)
    router.on(second, name="mine", group="elsewhere")(other)
    router.on("order.*.late", name="mine")(other)
    assert len(router.routes()) == 3


# Groups


def groups_of(router: EventRouter) -> dict[str, str]:
    return {route.pattern: route.handler.group for route in router.routes()}


def test_a_handler_is_in_the_group_that_is_named_nearest_to_it() -> None:
    root, billing, plain = EventRouter(), EventRouter("billing", group="billing"), EventRouter("plain")
    root.on("a")(handle)
    root.on("b", group="own")(handle)
    billing.on("a")(handle)
    billing.on("b", group="own")(handle)
    plain.on("a")(handle)
    billing.include_router(plain)
    root.include_router(billing, group="never")
    root.include_router(plain, prefix="x", group="between")
    plain.on("late")(handle)
    assert groups_of(root) == {
        "a": "default", "b": "own", "billing.a": "billing", "billing.b": "own", "billing.plain.a": "billing",
        "billing.plain.late": "billing", "x.plain.a": "between", "x.plain.late": "between",
    }  # fmt: skip
    assert groups_of(plain) == {"plain.a": "default", "plain.late": "default"}
    assert [group.name for group in root.groups()] == ["between", "billing", "default", "own"]


def test_one_router_may_serve_two_groups() -> None:
    root, child = EventRouter(), EventRouter()
    child.on("e")(handle)
    root.include_router(child, group="one")
    root.include_router(child, group="two")
    with pytest.raises(ConfigurationError):
        root.include_router(child, group="two")
    assert [handler.group for group in ("one", "two") for handler in root.handlers_for("e", group)] == ["one", "two"]


def test_a_group_is_declared_once() -> None:
    router = EventRouter(group=Group("g", max_running=2))
    router.on("a")(handle)
    router.on("b", group="g")(handle)
    router.on("c", group=Group("g", start="beginning"))(handle)
    assert router.groups() == (Group("g", max_running=2, start="beginning"),)
    with pytest.raises(ConfigurationError, match="max_running=2 and with max_running=3"):
        router.on("d", group=Group("g", max_running=3))(handle)
    outer = EventRouter()
    outer.on("x", group=Group("g", start="now"))(handle)
    with pytest.raises(ConfigurationError, match="start"):
        outer.include_router(router)
    assert len(router.routes()) == 3
    assert len(outer.routes()) == 1


@pytest.mark.parametrize("group", ["", " ", "a b", "a..b", "a.*", "é", "g" * 64, 1, b"g", object()])
def test_what_is_no_group_is_refused(group: Any) -> None:
    for call in (
        lambda: EventRouter(group=group),
        lambda: EventRouter().on("e", group=group),
        lambda: EventRouter().include_router(EventRouter(), group=group),
        lambda: Group(group),
    ):
        with pytest.raises(ConfigurationError):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"start": "soon"}, {"start": 1}, {"start": datetime(2030, 1, 1)},  # noqa: DTZ001 - that is what is refused
        {"max_running": 0}, {"max_running": True},
        {"max_running": 1.5}, {"max_running": 2**31}, {"dead_holds_key": 1}, {"dead_holds_key": "yes"},
        {"keep_history": 0}, {"keep_history": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_no_group_can_have_are_refused(options: Any) -> None:
    with pytest.raises(ConfigurationError):
        Group("g", **options)


def test_a_group_forgets_only_where_it_was_said_so() -> None:
    router, below = EventRouter(), EventRouter()
    router.on("a", group=Group("forgets", keep_history=False))(handle)
    router.on("a", group=Group("keeps", keep_history=True))(handle)
    router.on("a", group="silent")(handle)
    below.on("b", group="late")(handle)
    assert [name for name in ("forgets", "keeps", "silent", "late", "unknown") if router.forgets(name)] == ["forgets"]
    below.on("c", group=Group("late", keep_history=False))(handle)
    router.include_router(below)
    assert router.forgets("late")
    with pytest.raises(ConfigurationError, match="keep_history"):
        router.on("d", group=Group("late", keep_history=True))(handle)


def test_a_full_path_has_a_limit_too() -> None:
    root, child = EventRouter("r" * 200), EventRouter()
    with pytest.raises(InvalidEventTypeError):
        root.on("p" * 55)
    child.on("p" * 55)(handle)
    with pytest.raises(InvalidEventTypeError):
        root.include_router(child)
    assert root.routes() == ()
    late = EventRouter()
    root.include_router(late)
    with pytest.raises(InvalidEventTypeError):
        late.on("p" * 55)(handle)
    assert late.routes() == ()
    late.on("p" * 54)(handle)
    assert len(patterns(root)[0]) == 255


class Service:
    async def method(self, ctx: Any, payload: Any) -> None: ...

    @classmethod
    async def of_class(cls, ctx: Any, payload: Any) -> None: ...

    @staticmethod
    async def static(ctx: Any, payload: Any) -> None: ...

    async def __call__(self, ctx: Any, payload: Any) -> None: ...


class Plain:
    def __call__(self, ctx: Any, payload: Any) -> None: ...


async def extra(service: Any, ctx: Any, payload: Any, *, retries: int = 3) -> None: ...


async def varied(*args: Any, **kwargs: Any) -> None: ...


async def defaulted(ctx: Any, payload: Any, more: int = 1, *, keyword: int = 2) -> None: ...


async def unresolved(ctx: Context, payload: dict[str, Any]) -> None: ...


@functools.wraps(extra)
async def injecting(ctx: Any, payload: Any) -> None:
    """A decorator's wrapper: what it wraps takes more than it is called with."""


@pytest.mark.parametrize(
    "function",
    [
        handle, fresh(), Service().method, Service.of_class, Service.static, varied, defaulted, unresolved, injecting,
    ],
    ids=lambda function: function.__qualname__,
)  # fmt: skip
def test_coroutine_functions_with_a_name_are_accepted(function: Any) -> None:
    router = EventRouter()
    assert router.on("e")(function) is function
    assert names(router, "e") == [f"{function.__module__}.{function.__qualname__}"]


@pytest.mark.parametrize(
    "function",
    [Service(), functools.partial(extra, 1), functools.partial(functools.partial(extra, 1), retries=1), AsyncMock()],
    ids=lambda function: type(function).__name__,
)  # fmt: skip
def test_what_has_no_name_of_its_own_needs_one(function: Any) -> None:
    router = EventRouter()
    with pytest.raises(InvalidHandlerError, match="name="):
        router.on("e")(function)
    router.on("e", name="mine")(function)
    assert names(router, "e") == ["mine"]


def test_the_same_bound_method_twice_is_a_duplicate_and_two_instances_need_names() -> None:
    router, service = EventRouter(), Service()
    router.on("e", name="one")(service.method)
    with pytest.raises(DuplicateHandlerError, match="second registration"):
        router.on("e", name="two")(service.method)
    router.on("e", name="two")(Service().method)
    assert names(router, "e") == ["one", "two"]


def plain(ctx: Any, payload: Any) -> None: ...


def generator(ctx: Any, payload: Any) -> Iterator[int]:
    yield 1


async def async_generator(ctx: Any, payload: Any) -> AsyncIterator[int]:
    yield 1


async def nothing() -> None: ...


async def one(ctx: Any) -> None: ...


async def three(ctx: Any, payload: Any, more: Any) -> None: ...


async def keyword_only(ctx: Any, *, payload: Any) -> None: ...


async def keyword_needed(ctx: Any, payload: Any, *, needed: Any) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        generator, async_generator, Service, functools.partial(generator), functools.partial(handle, 1),
        functools.lru_cache(handle), None, 1, "handle", object(), int, asyncio, nothing, one, three,
        keyword_only, keyword_needed, Service.method, functools.partial(Service), EventRouter(),
    ],
    ids=lambda function: getattr(function, "__name__", type(function).__name__),
)  # fmt: skip
def test_what_cannot_be_awaited_with_two_arguments_is_refused(function: Any) -> None:
    router = EventRouter()
    with pytest.raises(InvalidHandlerError) as caught:
        router.on("e", name="mine")(function)
    assert isinstance(caught.value, TypeError)
    assert "async def" in str(caught.value)
    assert router.routes() == ()


def test_a_coroutine_is_refused_and_does_not_warn_that_nobody_awaited_it() -> None:
    coroutine: Any = handle(None, None)
    with pytest.raises(InvalidHandlerError, match="without calling it"):
        EventRouter().on("e")(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.mark.parametrize("name", ["", "a\x00", "a\n", "\ud800", "x" * 256, "é" * 128, 1, b"a", True])
def test_a_stable_name_is_short_printable_text(name: Any) -> None:
    with pytest.raises(InvalidHandlerError):
        EventRouter().on("e", name=name)


@pytest.mark.parametrize("transactional", [1, 0, None, "yes"])
def test_transactional_is_a_bool(transactional: Any) -> None:
    with pytest.raises(ConfigurationError):
        EventRouter().on("e", transactional=transactional)


def test_a_router_does_not_keep_its_parents_alive() -> None:
    child, parent = EventRouter(), EventRouter()
    parent.include_router(child)
    gone = weakref.ref(parent)
    del parent
    gc.collect()
    assert gone() is None
    child.on("e")(handle)
    assert patterns(child) == ["e"]


class Oracle:
    """The same tree, without tables: it walks whenever it is asked."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.paths: list[tuple[int, str, str]] = []
        self.children: list[tuple[str, Oracle]] = []

    def walk(self) -> list[tuple[int, str, str]]:
        found = list(self.paths)
        for between, child in self.children:
            found += [(number, f"{between}.{path}".strip("."), name) for number, path, name in child.walk()]
        return sorted((n, f"{self.prefix}.{path}".strip("."), name) for n, path, name in found)


@given(st.integers(0, 2**32))
def test_a_random_tree_is_resolved_like_a_naive_walk(seed: int) -> None:
    rng = random.Random(seed)
    words = ["", "a", "b", "a.b"]
    pairs: list[tuple[EventRouter, Oracle]] = []
    for _ in range(5):
        prefix = rng.choice(words)
        pairs.append((EventRouter(prefix), Oracle(prefix)))
    for step in range(25):
        index = rng.randrange(len(pairs))
        router, oracle = pairs[index]
        if rng.random() < 0.3 and index:
            above, oracle_above = pairs[rng.randrange(index)]
            between = rng.choice(words)
            oracle_above.children.append((between, oracle))
            if all(unique(root.walk()) for _, root in pairs) and not_twice(oracle_above):
                above.include_router(router, prefix=between)
            else:
                with pytest.raises(ConfigurationError):
                    above.include_router(router, prefix=between)
                oracle_above.children.pop()
        else:
            path, name = rng.choice(["a", "b", "a.b"]), f"h{rng.randrange(4)}"
            oracle.paths.append((step, path, name))
            if all(unique(root.walk()) for _, root in pairs):
                router.on(path, name=name)(fresh())
            else:
                with pytest.raises(DuplicateHandlerError):
                    router.on(path, name=name)(fresh())
                oracle.paths.pop()
        for found, expected in pairs:
            walked = expected.walk()
            for path in {path for _, path, _ in walked} | {"a.a"}:
                assert names(found, path) == [name for _, full, name in walked if full == path]
    for found, expected in pairs:
        routes = [(route.pattern, route.handler.name) for route in found.routes()]
        assert sorted(routes) == sorted((path, name) for _, path, name in expected.walk())


def unique(walked: list[tuple[int, str, str]]) -> bool:
    full = [(path, name) for _, path, name in walked]
    return len(full) == len(set(full))


def not_twice(oracle: Oracle) -> bool:
    edges = [(between, id(child)) for between, child in oracle.children]
    return len(edges) == len(set(edges))


def test_only_so_many_types_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from outside, and a pattern takes any number of them."""
    monkeypatch.setattr("pgebus.routing.MAX_RESOLVED", 3)
    router = EventRouter()
    router.on("order.#", name="all")(handle)
    router.on("order.n7", name="seven")(other)
    for _ in range(2):
        for n in range(10):
            assert names(router, f"order.n{n}") == (["all", "seven"] if n == 7 else ["all"])
            assert 1 <= len(router._resolved) <= 3


def test_ten_thousand_routes_are_looked_up_like_one() -> None:
    root, child = EventRouter("shop"), EventRouter()
    root.include_router(child)
    for i in range(10_000):
        child.on(f"event.n{i}")(handle)
    assert len(root.routes()) == 10_000
    looked_up = min(timeit.repeat(lambda: root.handlers_for("shop.event.n9999"), number=1_000, repeat=5)) / 1_000
    assert looked_up < 50e-6
