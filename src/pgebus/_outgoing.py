"""What every event passes before it is written: the publish middleware of this process.

It writes nothing. Without a middleware nothing of it is called, but for one look whether there is any.
"""

from __future__ import annotations

import inspect as python
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Insert, event, inspect
from sqlalchemy.orm import Mapper

from pgebus._parameters import check_middleware, shown
from pgebus.errors import ConfigurationError, InvalidEventTypeError, MiddlewareError
from pgebus.inheritance import family
from pgebus.models import Event, check_class

__all__ = ["add_publish_middleware", "remove_publish_middleware"]

PublishMiddleware: TypeAlias = Callable[[Event, Callable[[Event], None]], None]
_M = TypeVar("_M", bound=PublishMiddleware)

_SHAPE: Final = "def middleware(event, call_next)"
# In the info of an event that has passed, so that it does so once.
_PASSED: Final = "pgebus.passed"
# The execution option of our own INSERTs of events that have passed.
INSERTED_BY_US: Final = {"pgebus_passed": True}

_chain: list[PublishMiddleware] = []
# How many events the flush that runs on a connection may insert.
_announced: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()


def add_publish_middleware(function: _M) -> _M:
    """Have every event that this process publishes pass *function* before it is written; also as a decorator.

    It is called as `function(event, call_next)`, and may set columns of the event: headers, key, payload, its own. It
    calls `call_next(event)` once; when that returns, the event has passed all middleware that was added later, and is
    as it will be written. It is written after that, by whatever publishes it, together with others. What the middleware
    raises, publishing raises. It is a plain function in asynchronous code too: a flush cannot await.

    Each event passes once, by whatever way it is published: `publish_event()` and the like, `session.add()`,
    rows, `ctx.publish()`, `EventPublisher`, schedules. A statement like `insert(Event)` makes no Event, and is refused
    with a `MiddlewareError` as long as there is a middleware; SQL text is not seen.

    With `session.add()` it is called in the flush: it can change nothing but columns of this event, and send nothing.

    Args:
        function: The middleware; the first that is added is the outermost.

    Returns:
        The same function.

    Raises:
        ConfigurationError: If it cannot be called like this, is `async def`, or has been added already.
    """
    if check_middleware(function, _SHAPE):
        raise ConfigurationError(
            f"Publish middleware {shown(function)} is 'async def'. It is called in a flush, which cannot await: write "
            f"'{_SHAPE}'."
        )
    if function in _chain:
        raise ConfigurationError(f"Publish middleware {shown(function)} has been added already.")
    if not _chain:
        event.listen(Event, "before_insert", _pass_in_a_flush, propagate=True)
        event.listen(Engine, "before_execute", _refuse_statement)
    _chain.append(function)
    return function


def remove_publish_middleware(function: PublishMiddleware) -> None:
    """Take back what `add_publish_middleware()` was given; for tests.

    Raises:
        ConfigurationError: If it is not there.
    """
    if function not in _chain:
        raise ConfigurationError(f"Publish middleware {shown(function)} has not been added.")
    _chain.remove(function)
    if not _chain:
        event.remove(Event, "before_insert", _pass_in_a_flush)
        event.remove(Engine, "before_execute", _refuse_statement)


def has_middleware() -> bool:
    """Return whether there is any."""
    return bool(_chain)


def let_pass(events: Sequence[Event]) -> None:
    """Call the middleware for those of *events* that have not passed it yet.

    Raises:
        MiddlewareError: If one has not called the next one, or not exactly once.
        PublishError, InvalidEventTypeError: If it leaves an event that cannot be published.
        Exception: What the middleware raises; the note names the index where there are several.
    """
    if not _chain:
        return
    for index, each in enumerate(events):
        try:
            _let_pass(each)
        except Exception as error:
            if len(events) > 1:
                error.add_note(f"That is events[{index}].")
            raise


def mark_passed(events: Sequence[Event]) -> None:
    """Note that *events*, made of rows, stand for such that have passed."""
    for each in events:
        inspect(each).info[_PASSED] = True


def _let_pass(passing: Event) -> None:
    info: dict[Any, Any] = inspect(passing).info
    if _PASSED in info:
        return
    _step(passing, tuple(_chain), 0)
    if passing.type is None:
        raise InvalidEventTypeError("An event without a type: a publish middleware has removed it.", value=None)
    check_class(passing)
    for name in ("headers", "payload"):  # a dict that was changed in place was not checked
        if passing.__dict__.get(name) is not None:
            setattr(passing, name, passing.__dict__[name])
    info[_PASSED] = True


def _step(passing: Event, chain: tuple[PublishMiddleware, ...], index: int) -> None:
    if index == len(chain):
        return
    middleware, called = chain[index], 0

    def call_next(given: Event) -> None:
        nonlocal called
        called += 1
        if called > 1:
            raise MiddlewareError(
                f"Publish middleware {shown(middleware)} called call_next() again. It is called once."
            )
        if given is not passing:
            raise MiddlewareError(
                f"Publish middleware {shown(middleware)} called call_next() with another object than the event that it "
                "was given. Change the event instead."
            )
        _step(passing, chain, index + 1)

    called_as: Callable[..., object] = middleware  # which a wrapper may make a coroutine function after all
    returned = called_as(passing, call_next)
    if python.iscoroutine(returned):
        returned.close()
        raise MiddlewareError(f"Publish middleware {shown(middleware)} returned a coroutine, which nobody awaits.")
    if not called:
        raise MiddlewareError(
            f"Publish middleware {shown(middleware)} returned without call_next(event). Raise an error to refuse an "
            "event: one that was not written must not look published."
        )


def _pass_in_a_flush(_mapper: Mapper[Event], connection: Connection, target: Event) -> None:
    """Let what was added to a session pass; after the others of ours, which say what has caused it."""
    _let_pass(target)
    _announced[connection] = _announced.get(connection, 0) + 1


def _refuse_statement(
    connection: Connection, statement: object, several: Sequence[object], _one: object, options: Any
) -> None:
    """Refuse an INSERT of events that were not seen by a middleware."""
    if not isinstance(statement, Insert) or INSERTED_BY_US.keys() <= options.keys():
        return
    table = family.table
    if (statement.table.name, getattr(statement.table, "schema", None)) != (table.name, table.schema):
        return
    rows, announced = len(several) or 1, _announced.get(connection, 0)
    if rows > announced:
        raise MiddlewareError(
            "This statement inserts events that no publish middleware would see. Use publish_events(), which takes "
            "rows as well, or add Event objects to the session."
        )
    _announced[connection] = announced - rows
