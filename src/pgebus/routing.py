"""Who handles what: routers collect handlers under dotted paths.

Pure bookkeeping, done when modules are imported. It runs no handler and knows no database.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from operator import attrgetter
from typing import Any, Final, TypeVar
from weakref import ReferenceType, ref
from zoneinfo import ZoneInfo

from pgebus.cron import Cron, Missed, make_cron
from pgebus.errors import ConfigurationError, DuplicateHandlerError, InvalidEventTypeError
from pgebus.groups import DEFAULT_GROUP, Group, group_of
from pgebus.handlers import Handler, HandlerFunction, check_options, is_same_function, make_handler
from pgebus.middleware import HandleMiddleware, check_handle_middleware
from pgebus.models import Event
from pgebus.names import check_event_type
from pgebus.patterns import PatternIndex, check_pattern, is_pattern, overlap
from pgebus.retry import RetryPolicy

_F = TypeVar("_F", bound=HandlerFunction)
_M = TypeVar("_M", bound=HandleMiddleware)

_numbers: Final = itertools.count()
_by_number: Final = attrgetter("number")


# How many event types are remembered with their handlers.
MAX_RESOLVED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Route:
    """A handler under its full path, as seen from the router that was asked."""

    pattern: str
    handler: Handler


@dataclass(frozen=True, slots=True)
class _Registration:
    number: int
    route: Route
    # None where neither the handler nor a router around it has named one so far.
    group: Group | None = None
    # A class of events names its full type: prefixes do not apply.
    absolute: bool = False
    # The middleware of the routers on the way to it, the outermost first: lists that grow.
    layers: tuple[list[HandleMiddleware], ...] = field(default=(), compare=False)

    def under(self, prefix: str, group: Group | None, layers: tuple[list[HandleMiddleware], ...] = ()) -> _Registration:
        """Return the same, as seen from a router above."""
        pattern, handler = self.route.pattern, self.route.handler
        if prefix and not self.absolute:
            pattern = f"{prefix}.{pattern}"
        if self.group is not None:
            group = self.group
        elif group is not None:
            handler = replace(handler, group=group.name)
        if pattern == self.route.pattern and group is self.group and not layers:
            return self
        return _Registration(self.number, Route(pattern, handler), group, self.absolute, layers + self.layers)

    def called(self) -> Handler:
        """Return its handler as it is to be called."""
        return self.route.handler.behind(tuple(itertools.chain.from_iterable(self.layers)))


class EventRouter:
    """Collects handlers under a prefix.

    Routers nest to any depth. The full path of a handler is made of the prefixes on the way to it, joined by
    dots: the including router's own, the one given to `include_router()`, the included router's own, and so
    on down to the path given to `on()`; empty ones vanish. A router's own prefix counts also where it is the
    root. Handlers added to a router after it was included are found like those from before.

    The consumer group of a handler is the one given to `on()`, else that of the innermost router around it that has
    one, else `default`.

    Args:
        prefix: Dotted words, or nothing.
        group: The consumer group of the handlers here and below that are given no other: a name, or a `Group`.

    Raises:
        InvalidEventTypeError: If the prefix is not dotted words.
        ConfigurationError: If the group is no group.
    """

    def __init__(self, prefix: str = "", *, group: str | Group | None = None) -> None:
        self._prefix = _checked_prefix(prefix)
        self._group = group_of(group)
        # Everything at and below this router, by full path. A registration is pushed up to whoever includes
        # us, so that a conflict is found where it is written, and a look-up never walks.
        self._table: dict[str, list[_Registration]] = {}
        self._patterns = PatternIndex()
        # By group and name: routes with a pattern, and all of them.
        self._named: dict[tuple[str, str], tuple[list[Route], list[Route]]] = {}
        self._groups: dict[str, Group] = {}
        self._middleware: list[HandleMiddleware] = []
        self._resolved: dict[tuple[str, str], tuple[Handler, ...]] = {}
        # Downwards strong: what is pushed up passes through them, and nobody else may hold the ones between.
        self._children: list[EventRouter] = []
        # Upwards weak: a router must not keep alive every router that ever included it.
        self._parents: list[tuple[ReferenceType[EventRouter], str, Group | None]] = []
        self._version = 0

    def __repr__(self) -> str:
        return f"<EventRouter prefix={self._prefix!r}: {sum(map(len, self._table.values()))} routes>"

    @property
    def version(self) -> int:
        """A number that grows whenever a route appears at or below this router."""
        return self._version

    def on(
        self,
        path: str | type[Event],
        *,
        transactional: bool = False,
        name: str | None = None,
        group: str | Group | None = None,
        timeout: timedelta | None = None,
        retry: RetryPolicy | None = None,
    ) -> Callable[[_F], _F]:
        """Register the decorated function for events of type *path*, under this router's prefix.

        The function is called as `handler(ctx, payload)`, and with its dependencies (`pgebus.depends`), and is returned
        unchanged, so it can be registered
        for several paths. Handlers of one event run in the order in which this process registered them; one that
        is registered for several paths that match, in one group, runs once.

        The payload is a dict, unless the second parameter is annotated with a pydantic model, a dataclass, a TypedDict,
        `dict[str, int]` or another type that pydantic knows: then it is validated, and one that does not fit is a
        `PayloadValidationError` of this handler, so dead at once unless *retry* says otherwise. `dict`,
        `dict[str, Any]` and `Mapping` take it as it is. Of a decorated handler the annotation of the function that
        `functools.wraps` names counts.

        A plain function runs in a thread; its `ctx.session` is always None, and it cannot use `ctx.publish()`. It can
        be neither cancelled nor ended: its delivery waits for it.

        Args:
            path: Dotted words; together with all prefixes, the type of the events to handle. `*` stands for one word,
                `#` for any number of words, also none. Or a subclass of Event that declares an event type: it stands
                for that very type, under whatever prefix the router is.
            transactional: True to write with `ctx.session`, in the transaction that completes the delivery.
            name: The stable name; by default `module.qualname` of the function.
            group: The consumer group: a name, or a `Group`; by default that of the routers around.
            timeout: How long one call may take, with the flush of what it changed in `ctx.session`: then it is
                cancelled, and has failed with a TimeoutError whatever it makes of that, unless it raises a Retry,
                Snooze or Reject. A plain function cannot be cancelled: the attempt has failed, and the delivery, with
                its slot and its key, waits until the function returns.
            retry: What becomes of the delivery when this handler fails; by default what the settings say. Attempts
                belong to the delivery: `ctx.attempt` and *max_attempts* count its executions, whichever handler failed
                them. So the attempts of this handler may be used up by another one, and a transactional handler runs
                again, also with `max_attempts=1`, when another one of the delivery fails. For a budget of its own, give
                it a group of its own. Where no handler can be blamed (the COMMIT fails, a database error was swallowed,
                the process died), the policy with the fewest attempts decides; after a death, that of the handlers not
                yet done.

        Raises:
            InvalidEventTypeError: If *path* is neither dotted words nor a pattern, or too long with its prefixes; or a
                class that declares no event type.
            InvalidHandlerError: If the function cannot be called with two positional arguments and its dependencies, a
                dependency of it cannot be made, it is a generator, has no
                name of its own and is given none, is plain and transactional, or annotates its payload with a type that
                none can be made from, that is not fully defined yet, or that no JSON object can fit.
            DuplicateHandlerError: If the group has this handler for the path, or another of its name for a path that
                matches some of the same types.
            ConfigurationError: If another argument is of the wrong type, or *group* contradicts what was said of it.
        """
        return self._registering(
            path, transactional=transactional, name=name, group=group, timeout=timeout, retry=retry
        )

    def _registering(
        self,
        path: str | type[Event],
        *,
        transactional: bool,
        name: str | None,
        group: str | Group | None,
        timeout: timedelta | None,
        retry: RetryPolicy | None,
        cron: Cron | None = None,
    ) -> Callable[[_F], _F]:
        declared = _declared_type(path) if isinstance(path, type) else None
        full_path = declared or check_pattern(_joined(self._prefix, check_pattern(path)), what="Path")
        check_options(name, transactional, timeout, retry)
        chosen = group_of(group)

        def register(function: _F) -> _F:
            handler = make_handler(function, name=name, transactional=transactional, timeout=timeout, retry=retry)
            handler = replace(handler, cron=cron)
            if chosen is not None:
                handler = replace(handler, group=chosen.name)
            registration = _Registration(
                next(_numbers), Route(full_path, handler), chosen, absolute=declared is not None
            )
            self._add([registration])
            return function

        return register

    def every(
        self,
        cron: str,
        path: str | type[Event] | None = None,
        *,
        timezone: str | ZoneInfo = "UTC",
        missed: Missed = "latest",
        transactional: bool = False,
        name: str | None = None,
        group: str | Group | None = None,
        timeout: timedelta | None = None,
        retry: RetryPolicy | None = None,
    ) -> Callable[[_F], _F]:
        """Register the decorated function for an event that the clock publishes.

        Each time is published once, however many processes have the schedule, and by whichever of them is there: the
        event commits together with the note that it was. From there on it is an event like all others, delivered to
        everybody who has a handler for it, tried again, and kept as a dead letter. Its payload is
        `{"scheduled_at": "2026-01-31T03:00:00+00:00"}`, in UTC; its `run_at` the same. A schedule begins when it is
        first declared; one with another expression or time zone is another schedule.

        Times of day mean what Debian's cron makes of them: one that a clock change leaves out comes when the clock has
        gone forward, several that it leaves out come as one, and one that comes twice comes the first time only. If the
        minute or the hour begins with `*`, they come as often as a clock on the wall shows them: `*/30 2 * * *` does
        not come where the clock goes from 2 to 3, and four times where it goes back. `docs/guides/schedules.md` has a
        table.

        Args:
            cron: Five fields: minute, hour, day of the month, month, day of the week.
            path: The event type, as for `on()`, without wildcards; by default the name of the function.
            timezone: The time zone that *cron* is read in.
            missed: What to do about times at which no process had the schedule, be it that none ran or that it was not
                in the code: "latest" publishes the last of them, "all" each, which may be very many, a hundred in a
                transaction, and "skip" none that is more than a minute late.
            transactional: As for `on()`.
            name: As for `on()`.
            group: As for `on()`.
            timeout: As for `on()`.
            retry: As for `on()`.

        Raises:
            ConfigurationError: If *cron* is no cron expression, *timezone* no time zone, or cronsim is not installed
                (`pip install 'pgebus[cron]'`); or if the same schedule of the same event type has another *missed*.
            InvalidEventTypeError, InvalidHandlerError, DuplicateHandlerError: As `on()`.
        """
        times = make_cron(cron, timezone, missed)
        if isinstance(path, str):
            check_event_type(path, what="Path")

        def register(function: _F) -> _F:
            chosen = getattr(function, "__name__", "") if path is None else path
            registering = self._registering(
                chosen, transactional=transactional, name=name, group=group, timeout=timeout, retry=retry, cron=times
            )
            return registering(function)

        return register

    def middleware(self, function: _M) -> _M:
        """Run *function* around every handler at and below this router, also those of before; also as a decorator.

        It is called as `await function(ctx, call_next)`, once for each call of a handler, and awaits `call_next(ctx)`
        once, which calls the next middleware or the handler: that of the outermost router first, in one router that
        which was registered first. What the handler raises passes through it, Retry, Snooze and Reject as well. What
        it raises itself is a failure of that handler. It runs in the task, the transaction and the timeout of the
        handler; of a plain function the timeout is that of the function alone. A handler that several paths lead to
        runs once, behind the middleware of the path that was registered first.

        Where it has not called `call_next()`, or has called it again, the handler has failed with a `MiddlewareError`;
        where it has swallowed a cancellation, that goes on.

        Args:
            function: The middleware, a coroutine function.

        Returns:
            The same function.

        Raises:
            ConfigurationError: If it cannot be called like this, or is a middleware of this router already.
        """
        check_handle_middleware(function)
        if function in self._middleware:
            raise ConfigurationError(f"{self!r} has this middleware already. Remove the second registration.")
        self._middleware.append(function)
        for router, _, _, _ in self._ancestors():
            router._resolved.clear()
        return function

    def include_router(self, other: EventRouter, *, prefix: str = "", group: str | Group | None = None) -> None:
        """Make the handlers of *other* those of this router too, now and in future.

        One router may be included in several places, under different prefixes or in different groups.

        Args:
            other: The router to include.
            prefix: Dotted words between this router's own prefix and that of *other*, or nothing.
            group: The consumer group of the handlers of *other* that are given no other there.

        Raises:
            InvalidEventTypeError: If the prefix is not dotted words, or a full path becomes too long.
            DuplicateHandlerError: If a full path would have a handler or a name twice; nothing is included.
            ConfigurationError: If *other* is no router, is or holds this one, or is included here already
                under the same prefix and in the same group; or if a group, or what becomes of the missed times of a
                schedule, would be declared in two ways.
        """
        if not isinstance(other, EventRouter):
            raise ConfigurationError(f"include_router() takes an EventRouter, not {_type_name(other)}.")
        between, chosen = _joined(self._prefix, _checked_prefix(prefix)), group_of(group)
        if other is self or any(router is other for router, _, _, _ in self._ancestors()):
            raise ConfigurationError(
                f"{other!r} cannot be included here: it is this router, or includes it. Remove the cycle."
            )
        registrations = [each for found in other._table.values() for each in found]
        self._add(each.under(between, chosen) for each in registrations)
        if any(parent() is self and (taken, said) == (between, chosen) for parent, taken, said in other._parents):
            # With a route in it, it has just been refused as a duplicate.
            raise ConfigurationError(
                f"{other!r} is already included here under {between!r}. Remove the second include_router()."
            )
        living = [(parent, taken, said) for parent, taken, said in other._parents if parent() is not None]
        other._parents = [*living, (ref(self), between, chosen)]
        self._children.append(other)

    def routes(self) -> tuple[Route, ...]:
        """Return every route at and below this router, in the order of registration."""
        found = sorted((each for listed in self._table.values() for each in listed), key=_by_number)
        return tuple(each.route for each in found)

    def groups(self) -> tuple[Group, ...]:
        """Return the consumer groups of all routes, with all that was said of each, in the order of their names."""
        return tuple(self._groups[name] for name in sorted(self._groups))

    def forgets(self, group: str) -> bool:
        """Return whether *group* was declared with `keep_history=False`."""
        declared = self._groups.get(group)
        return declared is not None and declared.keep_history is False

    def handlers_for(self, event_type: str, group: str = DEFAULT_GROUP) -> tuple[Handler, ...]:
        """Return the handlers of *group* for events of type *event_type*, in the order of registration."""
        resolved = self._resolved.get((event_type, group))
        if resolved is None:
            # By name: a handler that several of its paths lead to runs once.
            found = {each.route.handler.name: each for each in reversed(self._matching(event_type, group))}
            resolved = tuple(each.called() for each in reversed(found.values()))
            if resolved:  # what nobody handles is not remembered: event types come from outside
                if len(self._resolved) >= MAX_RESOLVED:  # and a pattern takes any number of them
                    self._resolved.clear()
                self._resolved[event_type, group] = resolved
        return resolved

    def matching(self, event_type: str, group: str | None = None) -> list[Route]:
        """Return the routes, of *group* or of all groups, that match an event type, in the order of registration."""
        return [each.route for each in self._matching(event_type, group)]

    def _matching(self, event_type: str, group: str | None) -> list[_Registration]:
        patterns = self._patterns.find(event_type)
        if not is_pattern(event_type):
            patterns.append(event_type)
        found = sorted((each for pattern in patterns for each in self._table.get(pattern, ())), key=_by_number)
        return [each for each in found if group is None or each.route.handler.group == group]

    def _ancestors(
        self, prefix: str = "", group: Group | None = None, layers: tuple[list[HandleMiddleware], ...] = ()
    ) -> Iterator[tuple[EventRouter, str, Group | None, tuple[list[HandleMiddleware], ...]]]:
        """Yield this router and every router above it, with what stands before our paths there, and our group.

        And with the middleware of all routers from there down to us.
        """
        group = group or self._group
        layers = (self._middleware, *layers)
        yield self, prefix, group, layers
        for reference, between, chosen in self._parents:
            if (parent := reference()) is not None:
                yield from parent._ancestors(_joined(between, prefix), group or chosen, layers)

    def _add(self, registrations: Iterable[_Registration]) -> None:
        """Add to this router and all above it: everywhere, or nowhere with an error."""
        registrations = list(registrations)
        staged: dict[tuple[int, str], list[_Registration]] = {}
        named: dict[tuple[int, str, str], tuple[list[Route], list[Route]]] = {}
        groups: dict[tuple[int, str], Group] = {}
        changed: list[tuple[EventRouter, _Registration]] = []
        for router, prefix, group, layers in self._ancestors():
            for registration in registrations:
                placed = registration.under(prefix, group, layers)
                pattern, handler = check_pattern(placed.route.pattern), placed.route.handler
                beside = staged.setdefault((id(router), pattern), [])
                there = [*router._table.get(pattern, ()), *beside]
                if placed.absolute and placed in there:
                    continue  # the same one on another way, as from a router that is included twice
                for taken in there:
                    _check_no_duplicate(taken.route, placed.route)
                    _check_one_schedule(taken.route, placed.route)
                namesakes = named.setdefault((id(router), handler.group, handler.name), ([], []))
                for known in (router._named.get((handler.group, handler.name)), namesakes):
                    # Two plain types meet only where they are equal.
                    for route in known[is_pattern(pattern)] if known else ():
                        _check_no_overlap(route, placed.route)
                said = placed.group or Group(handler.group)
                before = groups.get((id(router), said.name)) or router._groups.get(said.name)
                groups[id(router), said.name] = said if before is None else before.joined_with(said)
                beside.append(placed)
                _note(namesakes, placed.route)
                changed.append((router, placed))
        for router, placed in changed:
            router._take(placed, groups)

    def _take(self, placed: _Registration, groups: dict[tuple[int, str], Group]) -> None:
        pattern, handler = placed.route.pattern, placed.route.handler
        insort(self._table.setdefault(pattern, []), placed, key=_by_number)
        if is_pattern(pattern):
            self._patterns.add(pattern)
        _note(self._named.setdefault((handler.group, handler.name), ([], [])), placed.route)
        self._groups[handler.group] = groups[id(self), handler.group]
        self._resolved.clear()
        self._version += 1


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


def _checked_prefix(prefix: object) -> str:
    return "" if isinstance(prefix, str) and not prefix else check_event_type(prefix, what="Prefix")


def _check_no_duplicate(taken: Route, new: Route) -> None:
    if taken.handler.group != new.handler.group:
        return
    if is_same_function(taken.handler.function, new.handler.function):
        problem = f"Handler {new.handler.name!r} is already registered for {new.pattern!r}."
        advice = "Remove the second registration."
    elif taken.handler.name == new.handler.name:
        problem = f"Another handler named {new.handler.name!r} is already registered for {new.pattern!r}."
        advice = "Give one of them another name with on(..., name=...)."
    else:
        return
    raise DuplicateHandlerError(f"{problem} {advice}", handler=new.handler.name, path=new.pattern)


def _check_one_schedule(taken: Route, new: Route) -> None:
    """Refuse two decisions about the missed times of what is one schedule in the database."""
    one, other = taken.handler.cron, new.handler.cron
    if one is None or other is None or one == other or replace(other, missed=one.missed) != one:
        return
    raise ConfigurationError(
        f"Events of type {new.pattern!r} are published by {other.expression!r} ({other.timezone}) for "
        f"{taken.handler.name!r} with missed={one.missed!r}, and for {new.handler.name!r} with "
        f"missed={other.missed!r}. It is one schedule: say the same of it, or register one of them with on()."
    )


def _note(namesakes: tuple[list[Route], list[Route]], route: Route) -> None:
    namesakes[True].append(route)
    if is_pattern(route.pattern):
        namesakes[False].append(route)


def _check_no_overlap(taken: Route, new: Route) -> None:
    """Refuse two handlers of one name, or one handler with two sets of options, that would meet in one delivery."""
    one, other = taken.handler, new.handler
    if taken.pattern == new.pattern or not overlap(taken.pattern, new.pattern):
        return
    if is_same_function(one.function, other.function) and replace(other, function=one.function) == one:
        return
    raise DuplicateHandlerError(
        f"A handler named {other.name!r} is registered for {taken.pattern!r} and, otherwise, for {new.pattern!r}; some "
        "event types match both. Give one of them another name with on(..., name=...), or both the same options.",
        handler=other.name,
        path=new.pattern,
    )


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
