"""What a handler's parameters stand for: their annotations as objects, and which of them are dependencies.

It looks at functions and calls none.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import suppress
from types import FunctionType, SimpleNamespace
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

from pgebus.errors import ConfigurationError, InvalidHandlerError

UNRESOLVED: Final = (NameError, SyntaxError, AttributeError, TypeError)
# The context and the payload.
_OWN_ARGUMENTS: Final = 2

if sys.version_info >= (3, 14):
    from annotationlib import Format

    # Annotations are evaluated on demand there; one that is imported for type checkers only would raise.
    signature_of = functools.partial(inspect.signature, annotation_format=Format.STRING)
else:
    signature_of = inspect.signature


def dependencies_of(function: Any, signature: inspect.Signature) -> dict[str, Any]:
    """Return what fast-depends knows as dependencies, by parameter; also of what a decorated handler wraps."""
    parameters = dict(signature.parameters)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        parameters = {**signature_of(function, follow_wrapped=True).parameters, **parameters}
    wanted = {}
    for position, (name, parameter) in enumerate(parameters.items()):
        dependency = _dependency_of(function, parameter)
        if dependency is None:
            continue
        if position < _OWN_ARGUMENTS or parameter.kind not in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            raise InvalidHandlerError(
                f"{shown(function)}: parameter {name!r} cannot be a dependency. A handler with one is "
                "'async def handler(ctx, payload, *, repo: Annotated[Repo, Depends(get_repo)])'."
            )
        wanted[name] = dependency
    return wanted


def _dependency_of(function: Any, parameter: inspect.Parameter) -> object | None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = _looked_up(function, parameter)
    hints = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    for each in (parameter.default, *hints):
        module, kind = type(each).__module__, type(each).__name__
        if module.startswith("fast_depends.") and hasattr(each, "dependency"):
            return each  # type: ignore[no-any-return]  # whatever it is
        if module == "fastapi.params" and kind in ("Depends", "Security"):
            raise InvalidHandlerError(
                f"{shown(function)}: parameter {parameter.name!r} has FastAPI's Depends, which needs a request. Write "
                "'from pgebus.depends import Depends'."
            )
    return None


def _looked_up(function: Any, parameter: inspect.Parameter) -> Any:
    """Return an annotation as an object, or None: those of a handler need not be there at run time.

    Raises:
        InvalidHandlerError: If it is not, and says that it is a dependency.
    """
    try:
        return evaluated(function, parameter.annotation)
    except UNRESOLVED as error:
        if "Depends(" not in parameter.annotation:
            return None
        raise InvalidHandlerError(
            f"{shown(function)}: the annotation of dependency {parameter.name!r} cannot be resolved ({error}). Define "
            "what it names at the top of the module, or give the dependency as the default: repo: Repo = "
            "Depends(get_repo)."
        ) from error


def evaluated(function: Any, annotation: str) -> Any:
    outer = function_of(function)
    # A decorator's wrapper has the annotations of what it wraps, which were written among other names.
    inner = function_of(inspect.unwrap(outer))
    known: dict[str, Any] = {**getattr(outer, "__globals__", {}), **getattr(inner, "__globals__", {})}
    return get_type_hints(
        SimpleNamespace(__annotations__={"it": annotation}), known, _names_around(inner), include_extras=True
    )["it"]


def _names_around(function: Any) -> dict[str, Any]:
    """Return the names of the functions around it that its own body uses, as far as they have a value by now."""
    names: dict[str, Any] = {}
    if isinstance(function, FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # assigned later: the function itself, for one
                names[name] = cell.cell_contents
    return names


def function_of(function: Any) -> Any:
    called = called_by(function)
    return getattr(called, "__func__", called)


def called_by(function: Any) -> Any:
    """Return what is called in the end: behind partials, and the method of an object."""
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    if not isinstance(called, type) and not inspect.isroutine(called):
        called = called if inspect.iscoroutinefunction(called) else type(called).__call__
    return called


def shown(function: object) -> str:
    """Return what a message calls it; never its repr, which may hold anything."""
    qualified = getattr(function, "__qualname__", None)
    return f"{qualified[:120]!r}" if isinstance(qualified, str) else f"An object of type {type(function).__name__[:80]}"


def check_middleware(function: object, shape: str) -> bool:
    """Refuse what cannot be called as *shape* says, but for its being asynchronous; return whether it is.

    Raises:
        ConfigurationError: If so.
    """
    if not callable(function) or isinstance(function, type):
        raise ConfigurationError(f"{shown(function)} is no middleware, which is '{shape}'.")
    try:
        signature_of(function, follow_wrapped=False).bind(None, None)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"Middleware {shown(function)} cannot be called with two positional arguments ({error}). It is '{shape}'."
        ) from error
    return inspect.iscoroutinefunction(called_by(function))
