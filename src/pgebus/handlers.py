"""What a handler is: a function, its stable name, and how it wants to be run.

It looks at functions and calls none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Final, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from pgebus._parameters import UNRESOLVED, called_by, dependencies_of, evaluated, shown, signature_of
from pgebus.cron import Cron
from pgebus.errors import ConfigurationError, InvalidHandlerError
from pgebus.groups import DEFAULT_GROUP
from pgebus.middleware import Around, HandleMiddleware
from pgebus.names import MAX_EVENT_TYPE_BYTES
from pgebus.retry import MAX_DELAY, RetryPolicy

if TYPE_CHECKING:
    from pgebus.depends import Dependencies

# As long as an event type: stable names are stored with each delivery.
MAX_HANDLER_NAME_BYTES: Final = MAX_EVENT_TYPE_BYTES

# The others are dependencies, or have defaults.
HandlerFunction = Callable[Concatenate[Any, Any, ...], object]

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
        dependencies: What it takes besides; None is nothing.
        around: What a plain function with middleware or dependencies is called through; for a coroutine function
            `function` goes through it by itself.
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
    dependencies: Dependencies | None = field(default=None, compare=False)
    around: Around | None = field(default=None, compare=False)

    def behind(self, middleware: tuple[HandleMiddleware, ...]) -> Handler:
        """Return it as it is to be called: through *middleware* and with its dependencies, where there are any."""
        if not middleware and self.dependencies is None:
            return self
        around = Around(middleware, self.dependencies)
        if self.threaded:
            return replace(self, around=around)
        function: Any = self.function
        return replace(self, function=around.wrap(function), around=around)


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
        InvalidHandlerError: If it cannot be called with two positional arguments and dependencies, is a generator, has
            no name of its own and is given none, or its second parameter has an annotation that no payload can be made
            from; or if it is a plain function and transactional; or if a dependency cannot be made.
        ConfigurationError: If it has dependencies, and fast-depends is not installed.
    """
    threaded, dependencies = _check_callable(function)
    if threaded and transactional:
        raise InvalidHandlerError(
            f"{shown(function)} is a plain function, which runs in a thread, and a transaction belongs to one task: "
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
        dependencies=dependencies,
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


def _check_callable(function: object) -> tuple[bool, Dependencies | None]:
    """Refuse what cannot be called as `function(ctx, payload)`; tell whether it needs a thread, and what else."""
    problem, threaded = _problem_with(function)
    if problem is not None:
        raise InvalidHandlerError(f"{shown(function)} {problem}. A handler is 'async def handler(ctx, payload)'.")
    try:
        # The annotations of a handler need not resolve, and what a decorator hides is the decorator's affair.
        signature = signature_of(function, follow_wrapped=False)  # type: ignore[arg-type]  # _problem_with() made sure it is callable
        wanted = dependencies_of(function, signature)
        signature.bind(None, None, **{name: None for name in wanted if name in signature.parameters})
    except TypeError as error:
        raise InvalidHandlerError(
            f"{shown(function)} cannot be called with two positional arguments ({error}). "
            "A handler is 'async def handler(ctx, payload)'; further parameters need Depends(), or defaults."
        ) from error
    except ValueError as error:
        raise InvalidHandlerError(
            f"{shown(function)} has no signature that can be checked. A handler is 'async def handler(ctx, payload)'."
        ) from error
    return threaded, _dependencies(function, wanted)


def _dependencies(function: object, wanted: dict[str, Any]) -> Dependencies | None:
    if not wanted:
        return None
    from pgebus.depends import Dependencies

    return Dependencies(shown(function), wanted)


def _problem_with(function: object) -> tuple[str | None, bool]:
    """Return what is wrong with it, and whether it is a plain function."""
    if inspect.iscoroutine(function):
        function.close()  # it will never be awaited, and would warn about that
        return "is a coroutine, not a function: register the function itself, without calling it", False
    if isinstance(function, type):
        return "is a class: register an instance with a __call__, or a method", False
    if not callable(function):
        return "is not callable", False
    called = called_by(function)
    if inspect.iscoroutinefunction(called):
        return None, False
    if isinstance(called, type):
        return "makes an object and does nothing with it: register a function", False
    if inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        return "is a generator, which would never run: use await instead of yield", False
    if inspect.iscoroutinefunction(inspect.unwrap(called)):
        return "wraps a coroutine function in a plain one: make the wrapper 'async def' too", False
    return None, True


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
            f"{shown(function)} takes a payload of a type that none can be made from: {_first_line(error)}. Annotate "
            "it with dict, a pydantic model, a dataclass or a TypedDict, and define all of it above the handler."
        ) from error
    if not fits:
        raise InvalidHandlerError(
            f"{shown(function)} takes a payload of type {inspect.formatannotation(wanted)[:80]}, which none will ever "
            "fit: a payload is a JSON object. Annotate it with dict, a pydantic model, a dataclass or a TypedDict."
        )
    return adapter


def _payload_annotation(function: Any) -> Any:
    """Return the annotation of the second argument: of what is called, else of what that wraps."""
    annotation = inspect.Parameter.empty
    for follow_wrapped in (False, True):
        parameters = [
            each
            for each in signature_of(function, follow_wrapped=follow_wrapped).parameters.values()
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
    try:
        return evaluated(function, annotation)
    except UNRESOLVED as error:
        raise InvalidHandlerError(
            f"{shown(function)}: the annotation {annotation[:80]!r} of its payload cannot be resolved ({error}). "
            "Import the type at run time, at the top of the module; or annotate with dict to get the dict."
        ) from error


def _name_of(function: object) -> str:
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(qualified, str) or not isinstance(module, str):
        raise InvalidHandlerError(f"{shown(function)} has no name of its own. Give it one: on(..., name=...).")
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _type_name(value: object) -> str:
    return type(value).__name__[:80]
