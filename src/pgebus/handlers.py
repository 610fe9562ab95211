"""What a handler is: a function, its stable name, and how it wants to be run.

It looks at functions and calls none.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, Final, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from pgebus.cron import Cron
from pgebus.errors import ConfigurationError, InvalidHandlerError
from pgebus.groups import DEFAULT_GROUP
from pgebus.names import MAX_EVENT_TYPE_BYTES
from pgebus.retry import MAX_DELAY, RetryPolicy

# As long as an event type: stable names are stored with each delivery.
MAX_HANDLER_NAME_BYTES: Final = MAX_EVENT_TYPE_BYTES

HandlerFunction = Callable[[Any, Any], object]

# Annotations for which the payload is passed as it is, unless they say more of what is in it.
_TAKES_THE_DICT: Final = (Any, object, dict, Mapping, MutableMapping)
_SAYS_NOTHING: Final = (Any, object)
# What pydantic makes of types that no JSON object is ever valid for. What is not named here may be.
_NO_OBJECTS: Final = frozenset(
    {
        "bool", "bytes", "callable", "complex", "date", "datetime", "decimal", "enum", "float", "frozenset",
        "generator", "int", "is-instance", "is-subclass", "json", "list", "literal", "multi-host-url", "none", "set",
        "str", "time", "timedelta", "tuple", "url", "uuid",
    }
)  # fmt: skip
# And what looks for one inside.
_WRAPPERS: Final = frozenset({"default", "definitions", "function-after", "nullable"})

if sys.version_info >= (3, 14):
    from annotationlib import Format

    # Annotations are evaluated on demand there; one that is imported for type checkers only would raise.
    _signature = functools.partial(inspect.signature, annotation_format=Format.STRING)
else:
    _signature = inspect.signature


@dataclass(frozen=True, slots=True)
class Handler:
    """A function, and how it wants to be run.

    Attributes:
        name: The stable name: it says in the database which handlers of a delivery have succeeded. Renaming a
            function is to register another handler, unless `name=` is given.
        function: What is called with the context and the payload.
        transactional: Whether it shares the dispatcher's transaction.
        group: The consumer group it belongs to.
        timeout: How long one call may take; None is without end.
        retry: Decides about its failures; None leaves it to the settings.
        payload: Makes its second argument from the payload; None passes the dict.
        threaded: Whether it is a plain function, which runs in a thread.
        cron: When the clock publishes an event for it; None is never.
    """

    name: str
    function: HandlerFunction
    transactional: bool
    group: str = DEFAULT_GROUP
    timeout: timedelta | None = None
    retry: RetryPolicy | None = None
    # Follows from the function; two adapters of one type are not equal.
    payload: TypeAdapter[Any] | None = field(default=None, compare=False)
    threaded: bool = False
    cron: Cron | None = None


def make_handler(
    function: object,
    *,
    name: str | None,
    transactional: bool,
    timeout: timedelta | None,
    retry: RetryPolicy | None,
) -> Handler:
    """Return *function* as a handler, without its group.

    Raises:
        InvalidHandlerError: If it cannot be called with two positional arguments, is a generator, has no name of its
            own and is given none, or its second parameter has an annotation that no payload can be made from; or if it
            is a plain function and transactional.
    """
    threaded = _check_callable(function)
    if threaded and transactional:
        raise InvalidHandlerError(
            f"{_shown(function)} is a plain function, which runs in a thread, and a transaction belongs to one task: "
            "write 'async def' for a transactional handler."
        )
    return Handler(
        name or _name_of(function),
        function,  # type: ignore[arg-type]  # it was just checked
        transactional,
        timeout=timeout,
        retry=retry,
        payload=_payload_adapter(function),
        threaded=threaded,
    )


def check_options(name: object, transactional: object, timeout: object, retry: object) -> None:
    """Refuse options that no handler can have.

    Raises:
        InvalidHandlerError: If *name* is not printable text of 1 to 255 bytes.
        ConfigurationError: If another one is of the wrong type or out of range.
    """
    if not isinstance(transactional, bool):
        raise ConfigurationError(f"transactional must be True or False, not {_type_name(transactional)}.")
    if timeout is not None and (not isinstance(timeout, timedelta) or not timedelta(0) < timeout <= MAX_DELAY):
        raise ConfigurationError(f"timeout must be a timedelta above zero, not {timeout!r}.")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise ConfigurationError(f"retry must be a RetryPolicy, not {_type_name(retry)}.")
    if name is not None:
        _checked_name(name)


def is_same_function(one: object, other: object) -> bool:
    """Tell whether two registrations are of one function."""
    if isinstance(one, MethodType) and isinstance(other, MethodType):  # made anew by each attribute access
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


def _check_callable(function: object) -> bool:
    """Refuse what cannot be called as `function(ctx, payload)`; tell whether it needs a thread."""
    problem, threaded = _problem_with(function)
    if problem is not None:
        raise InvalidHandlerError(f"{_shown(function)} {problem}. A handler is 'async def handler(ctx, payload)'.")
    try:
        # The annotations of a handler need not resolve, and what a decorator hides is the decorator's affair.
        _signature(function, follow_wrapped=False).bind(None, None)  # type: ignore[arg-type]  # _problem_with() made sure it is callable
    except TypeError as error:
        raise InvalidHandlerError(
            f"{_shown(function)} cannot be called with two positional arguments ({error}). "
            "A handler is 'async def handler(ctx, payload)'; further parameters need defaults."
        ) from error
    except ValueError as error:
        raise InvalidHandlerError(
            f"{_shown(function)} has no signature that can be checked. A handler is 'async def handler(ctx, payload)'."
        ) from error
    return threaded


def _problem_with(function: object) -> tuple[str | None, bool]:
    """Return what is wrong with it, and whether it is a plain function."""
    if inspect.iscoroutine(function):
        function.close()  # it will never be awaited, and would warn about that
        return "is a coroutine, not a function: register the function itself, without calling it", False
    if isinstance(function, type):
        return "is a class: register an instance with a __call__, or a method", False
    if not callable(function):
        return "is not callable", False
    called = _called(function)
    if inspect.iscoroutinefunction(called):
        return None, False
    if isinstance(called, type):
        return "makes an object and does nothing with it: register a function", False
    if inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        return "is a generator, which would never run: use await instead of yield", False
    if inspect.iscoroutinefunction(inspect.unwrap(called)):
        return "wraps a coroutine function in a plain one: make the wrapper 'async def' too", False
    return None, True


def _called(function: Any) -> Any:
    """Return what is called in the end: behind partials, and the method of an object."""
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    if not isinstance(called, type) and not inspect.isroutine(called):
        called = called if inspect.iscoroutinefunction(called) else type(called).__call__
    return called


def _payload_adapter(function: Any) -> TypeAdapter[Any] | None:
    """Return what makes the second argument of *function*, or None where it takes the dict."""
    annotation = _payload_annotation(function)
    if annotation is inspect.Parameter.empty:
        return None
    wanted = _resolved(function, annotation)
    if _takes_the_dict(wanted):
        return None
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(wanted)
        # Looking at it makes pydantic resolve what it has put off, which may fail.
        fits = _may_fit_an_object(adapter.core_schema)
    except (PydanticUserError, TypeError) as error:
        raise InvalidHandlerError(
            f"{_shown(function)} takes a payload of a type that none can be made from: {_first_line(error)}. Annotate "
            "it with dict, a pydantic model, a dataclass or a TypedDict, and define all of it above the handler."
        ) from error
    if not fits:
        raise InvalidHandlerError(
            f"{_shown(function)} takes a payload of type {inspect.formatannotation(wanted)[:80]}, which none will ever "
            "fit: a payload is a JSON object. Annotate it with dict, a pydantic model, a dataclass or a TypedDict."
        )
    return adapter


def _payload_annotation(function: Any) -> Any:
    """Return the annotation of the second argument: of what is called, else of what that wraps."""
    annotation = inspect.Parameter.empty
    for follow_wrapped in (False, True):
        parameters = [
            each
            for each in _signature(function, follow_wrapped=follow_wrapped).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD, each.VAR_POSITIONAL)
        ]
        # With *args, the payload is one of them.
        if annotation is inspect.Parameter.empty and len(parameters) > 1:
            annotation = parameters[1].annotation
    return annotation


def _takes_the_dict(wanted: Any) -> bool:
    if (get_origin(wanted) or wanted) not in _TAKES_THE_DICT:
        return False
    *key, value = get_args(wanted) or (Any,)
    return value in _SAYS_NOTHING and all(each in (str, *_SAYS_NOTHING) for each in key)


def _may_fit_an_object(schema: Any) -> bool:
    """Tell whether a JSON object can be valid for *schema*, where that is easily told."""
    kind = schema["type"]
    if kind in _WRAPPERS or (kind == "model" and schema.get("root_model")):
        return _may_fit_an_object(schema["schema"])
    if kind == "union":
        choices = (each[0] if isinstance(each, tuple) else each for each in schema["choices"])
        return any(map(_may_fit_an_object, choices))
    return kind not in _NO_OBJECTS


def _resolved(function: Any, annotation: Any) -> Any:
    """Return the annotation as an object; the others of the function need not be there at run time."""
    if not isinstance(annotation, str):
        return annotation
    outer = _function_of(function)
    # A decorator's wrapper has the annotations of what it wraps, which were written among other names.
    inner = _function_of(inspect.unwrap(outer))
    known: dict[str, Any] = {**getattr(outer, "__globals__", {}), **getattr(inner, "__globals__", {})}
    try:
        hints = get_type_hints(
            SimpleNamespace(__annotations__={"payload": annotation}), known, _names_around(inner), include_extras=True
        )
    except (NameError, SyntaxError, AttributeError, TypeError) as error:
        raise InvalidHandlerError(
            f"{_shown(function)}: the annotation {annotation[:80]!r} of its payload cannot be resolved ({error}). "
            "Import the type at run time, at the top of the module; or annotate with dict to get the dict."
        ) from error
    return hints["payload"]


def _names_around(function: Any) -> dict[str, Any]:
    """Return the names of the functions around it that its own body uses, as far as they have a value by now."""
    names: dict[str, Any] = {}
    if isinstance(function, FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # assigned later: the function itself, for one
                names[name] = cell.cell_contents
    return names


def _function_of(function: Any) -> Any:
    called = _called(function)
    return getattr(called, "__func__", called)


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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
