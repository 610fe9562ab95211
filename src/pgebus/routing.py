"""Who handles what: routers collect handlers under dotted paths.

Pure bookkeeping, done when modules are imported. It runs no handler and knows no database.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from bisect import insort
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any, Final, TypeVar
from weakref import ReferenceType, ref

from pgebus.errors import (
    ConfigurationError,
    DuplicateHandlerError,
    InvalidEventTypeError,
    InvalidHandlerError,
)
from pgebus.models import Event
from pgebus.names import MAX_EVENT_TYPE_BYTES, check_event_type

DEFAULT_GROUP: Final = "default"
# As long as an event type: stable names are stored with each delivery.
MAX_HANDLER_NAME_BYTES: Final = MAX_EVENT_TYPE_BYTES

HandlerFunction = Callable[[Any, Any], Awaitable[object]]
_F = TypeVar("_F", bound=HandlerFunction)

_numbers: Final = itertools.count()
_by_number: Final = attrgetter("number")

if sys.version_info >= (3, 14):
    from annotationlib import Format

    # Annotations are evaluated on demand there; one that is imported for type checkers only would raise.
    _signature = functools.partial(inspect.signature, follow_wrapped=False, annotation_format=Format.STRING)
else:
    _signature = functools.partial(inspect.signature, follow_wrapped=False)


@dataclass(frozen=True, slots=True)
class Handler:
    """A coroutine function, and how it wants to be run.

    Attributes:
        name: The stable name: it says in the database which handlers of a delivery have succeeded. Renaming a
            function is to register another handler, unless `name=` is given.
        function: What is called with the context and the payload.
        transactional: Whether it shares the dispatcher's transaction.
        group: The consumer group it belongs to.
    """

    name: str
    function: HandlerFunction
    transactional: bool
    group: str = DEFAULT_GROUP


@dataclass(frozen=True, slots=True)
class Route:
    """A handler under its full path, as seen from the router that was asked."""

    pattern: str
    handler: Handler


@dataclass(frozen=True, slots=True)
class _Registration:
    number: int
    route: Route
    # A class of events names its full type: prefixes do not apply.
    absolute: bool = False

    def under(self, prefix: str) -> _Registration:
        if not prefix or self.absolute:
            return self
        return _Registration(self.number, Route(f"{prefix}.{self.route.pattern}", self.route.handler))


class EventRouter:
    """Collects handlers under a prefix.

    Routers nest to any depth. The full path of a handler is made of the prefixes on the way to it, joined by
    dots: the including router's own, the one given to `include_router()`, the included router's own, and so
    on down to the path given to `on()`; empty ones vanish. A router's own prefix counts also where it is the
    root. Handlers added to a router after it was included are found like those from before.

    Args:
        prefix: Dotted words, or nothing.

    Raises:
        InvalidEventTypeError: If the prefix is not dotted words.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = _checked_prefix(prefix)
        # Everything at and below this router, by full path. A registration is pushed up to whoever includes
        # us, so that a conflict is found where it is written, and a look-up never walks.
        self._table: dict[str, list[_Registration]] = {}
        self._resolved: dict[tuple[str, str], tuple[Handler, ...]] = {}
        # Downwards strong: what is pushed up passes through them, and nobody else may hold the ones between.
        self._children: list[EventRouter] = []
        # Upwards weak: a router must not keep alive every router that ever included it.
        self._parents: list[tuple[ReferenceType[EventRouter], str]] = []
        self._version = 0

    def __repr__(self) -> str:
        return f"<EventRouter prefix={self._prefix!r}: {sum(map(len, self._table.values()))} routes>"

    @property
    def version(self) -> int:
        """A number that grows whenever a route appears at or below this router."""
        return self._version

    def on(
        self, path: str | type[Event], *, transactional: bool = False, name: str | None = None
    ) -> Callable[[_F], _F]:
        """Register the decorated coroutine function for events of type *path*, under this router's prefix.

        The function is called as `handler(ctx, payload)`, and is returned unchanged, so it can be registered
        for several paths. Handlers of one event run in the order in which this process registered them.

        Args:
            path: Dotted words; together with all prefixes, the type of the events to handle. Or a subclass of Event
                that declares an event type: it stands for that very type, under whatever prefix the router is.
            transactional: True to write with `ctx.session`, in the transaction that completes the delivery.
            name: The stable name; by default `module.qualname` of the function.

        Raises:
            InvalidEventTypeError: If *path* is not dotted words, or too long with its prefixes; or a class that
                declares no event type.
            InvalidHandlerError: If the function is no coroutine function, cannot be called with two
                positional arguments, or has no name of its own and is given none.
            DuplicateHandlerError: If the path has this handler, or another of its name, already.
            ConfigurationError: If *transactional* is not a bool.
        """
        declared = _declared_type(path) if isinstance(path, type) else None
        full_path = declared or _checked_path(_joined(self._prefix, _checked_path(path)))
        if not isinstance(transactional, bool):
            raise ConfigurationError(f"transactional must be True or False, not {_type_name(transactional)}.")
        if name is not None:
            _checked_name(name)

        def register(function: _F) -> _F:
            _check_callable(function)
            handler = Handler(name or _name_of(function), function, transactional)
            self._add([_Registration(next(_numbers), Route(full_path, handler), absolute=declared is not None)])
            return function

        return register

    def include_router(self, other: EventRouter, *, prefix: str = "") -> None:
        """Make the handlers of *other* those of this router too, now and in future.

        One router may be included in several places, under different prefixes.

        Args:
            other: The router to include.
            prefix: Dotted words between this router's own prefix and that of *other*, or nothing.

        Raises:
            InvalidEventTypeError: If the prefix is not dotted words, or a full path becomes too long.
            DuplicateHandlerError: If a full path would have a handler or a name twice; nothing is included.
            ConfigurationError: If *other* is no router, is or holds this one, or is included here already
                under the same prefix.
        """
        if not isinstance(other, EventRouter):
            raise ConfigurationError(f"include_router() takes an EventRouter, not {_type_name(other)}.")
        between = _joined(self._prefix, _checked_prefix(prefix))
        if other is self or any(router is other for router, _ in self._ancestors()):
            raise ConfigurationError(
                f"{other!r} cannot be included here: it is this router, or includes it. Remove the cycle."
            )
        registrations = [each for found in other._table.values() for each in found]
        self._add(each.under(between) for each in registrations)
        if any(parent() is self and taken == between for parent, taken in other._parents):
            # With a route in it, it has just been refused as a duplicate.
            raise ConfigurationError(
                f"{other!r} is already included here under {between!r}. Remove the second include_router()."
            )
        living = [(parent, taken) for parent, taken in other._parents if parent() is not None]
        other._parents = [*living, (ref(self), between)]
        self._children.append(other)

    def routes(self) -> tuple[Route, ...]:
        """Return every route at and below this router, in the order of registration."""
        found = sorted((each for listed in self._table.values() for each in listed), key=_by_number)
        return tuple(each.route for each in found)

    def handlers_for(self, event_type: str, group: str = DEFAULT_GROUP) -> tuple[Handler, ...]:
        """Return the handlers of *group* for events of type *event_type*, in the order of registration."""
        resolved = self._resolved.get((event_type, group))
        if resolved is None:
            resolved = tuple(
                each.route.handler for each in self._matching(event_type) if each.route.handler.group == group
            )
            if resolved:  # what nobody handles is not remembered: event types come from outside
                self._resolved[event_type, group] = resolved
        return resolved

    def _matching(self, event_type: str) -> Iterable[_Registration]:
        """Return what is registered for a type: the one place that decides whether a pattern matches."""
        return self._table.get(event_type, ())

    def _ancestors(self, prefix: str = "") -> Iterator[tuple[EventRouter, str]]:
        """Yield this router and every router above it, each with what stands before our paths there."""
        yield self, prefix
        for reference, between in self._parents:
            if (parent := reference()) is not None:
                yield from parent._ancestors(_joined(between, prefix))

    def _add(self, registrations: Iterable[_Registration]) -> None:
        """Add to this router and all above it: everywhere, or nowhere with an error."""
        registrations = list(registrations)
        staged: dict[tuple[int, str], list[_Registration]] = {}
        changed: list[tuple[EventRouter, _Registration]] = []
        for router, prefix in self._ancestors():
            for registration in registrations:
                placed = registration.under(prefix)
                pattern = _checked_path(placed.route.pattern)
                beside = staged.setdefault((id(router), pattern), [])
                there = [*router._table.get(pattern, ()), *beside]
                if placed.absolute and placed in there:
                    continue  # the same one on another way, as from a router that is included twice
                for taken in there:
                    _check_no_duplicate(taken.route, placed.route)
                beside.append(placed)
                changed.append((router, placed))
        for router, placed in changed:
            insort(router._table.setdefault(placed.route.pattern, []), placed, key=_by_number)
            router._resolved.clear()
            router._version += 1


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _declared_type(cls: type[Any]) -> str:
    event_type: str | None = cls.__event_type__ if issubclass(cls, Event) else None
    if event_type is None:
        raise InvalidEventTypeError(
            f"Class {cls.__qualname__[:120]!r} declares no event type. Register the handler for a type by name, or for "
            "a class like 'class OrderPlaced(Event, event_type=\"order.placed\")'.",
            value=cls,
        )
    return event_type


def _checked_path(path: object, what: str = "Path") -> str:
    if isinstance(path, str) and ("*" in path or "#" in path):
        raise InvalidEventTypeError(
            f"{what} {path[:80]!r}: patterns with '*' or '#' are not supported yet. "
            "Register the handler for each event type by name.",
            value=path,
        )
    return check_event_type(path, what=what)


def _checked_prefix(prefix: object) -> str:
    return "" if isinstance(prefix, str) and not prefix else _checked_path(prefix, "Prefix")


def _check_no_duplicate(taken: Route, new: Route) -> None:
    if taken.handler.group != new.handler.group:
        return
    if _is_same(taken.handler.function, new.handler.function):
        problem = f"Handler {new.handler.name!r} is already registered for {new.pattern!r}."
        advice = "Remove the second registration."
    elif taken.handler.name == new.handler.name:
        problem = f"Another handler named {new.handler.name!r} is already registered for {new.pattern!r}."
        advice = "Give one of them another name with on(..., name=...)."
    else:
        return
    raise DuplicateHandlerError(f"{problem} {advice}", handler=new.handler.name, path=new.pattern)


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, MethodType) and isinstance(other, MethodType):  # made anew by each attribute access
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


def _check_callable(function: object) -> None:
    """Refuse what cannot be awaited as `function(ctx, payload)`."""
    problem = _problem_with(function)
    if problem is not None:
        raise InvalidHandlerError(f"{_shown(function)} {problem}. A handler is 'async def handler(ctx, payload)'.")
    try:
        # The annotations of a handler need not resolve, and what a decorator hides is the decorator's affair.
        _signature(function).bind(None, None)  # type: ignore[arg-type]  # _problem_with() made sure it is callable
    except TypeError as error:
        raise InvalidHandlerError(
            f"{_shown(function)} cannot be called with two positional arguments ({error}). "
            "A handler is 'async def handler(ctx, payload)'; further parameters need defaults."
        ) from error
    except ValueError as error:
        raise InvalidHandlerError(f"{_shown(function)} has no signature that can be checked.") from error


def _problem_with(function: object) -> str | None:
    if inspect.iscoroutine(function):
        function.close()  # it will never be awaited, and would warn about that
        return "is a coroutine, not a function: register the function itself, without calling it"
    if isinstance(function, type):
        return "is a class: register an instance with an async __call__, or a method"
    if not callable(function):
        return "is not callable"
    called: object = function
    while isinstance(called, functools.partial):
        called = called.func
    if not isinstance(called, type) and not inspect.isroutine(called):
        called = called if inspect.iscoroutinefunction(called) else type(called).__call__
    if inspect.iscoroutinefunction(called):
        return None
    if inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        return "is a generator, which would never run: use await instead of yield"
    return "is not a coroutine function: write 'async def' instead of 'def' or lambda"


def _name_of(function: object) -> str:
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(qualified, str) or not isinstance(module, str):
        raise InvalidHandlerError(f"{_shown(function)} has no name of its own. Give it one: on(..., name=...).")
    if qualified.endswith("<lambda>"):
        raise InvalidHandlerError("A lambda has no stable name. Give it one: on(..., name=...).")
    return _checked_name(f"{module}.{qualified}")


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidHandlerError(f"The name of a handler is text, not {_type_name(name)}.")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_HANDLER_NAME_BYTES or not name.isprintable():
        raise InvalidHandlerError(
            f"The name of a handler is printable text of 1 to {MAX_HANDLER_NAME_BYTES} bytes in UTF-8; "
            f"{name[:80]!r} is not. Give it another: on(..., name=...)."
        )
    return name


def _shown(function: object) -> str:
    """Return what a message calls it; never its repr, which may hold anything."""
    qualified = getattr(function, "__qualname__", None)
    return f"{qualified[:120]!r}" if isinstance(qualified, str) else f"An object of type {_type_name(function)}"


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
