"""Dependencies of handlers, in FastAPI's manner: `Depends`, and the provider that tests override.

They are read and made by fast-depends (the extra `depends`); nothing else in pgebus imports this module before a
handler has a dependency. Payloads are not validated here.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from pgebus._parameters import shown
from pgebus.errors import ConfigurationError, InvalidHandlerError

try:
    from fast_depends import Depends, Provider
    from fast_depends.core import build_call_model
    from fast_depends.dependencies import Dependant
except ImportError as missing:
    raise ConfigurationError(
        "Dependencies of handlers need the library fast-depends. Install it: pip install 'pgebus[depends]'."
    ) from missing

if TYPE_CHECKING:
    from fast_depends.core import CallModel

    from pgebus.context import EventContext

__all__ = ["Depends", "provider"]

# What every dependency may take by these names.
_GIVEN: Final = ("ctx", "payload")

# Replaces dependencies in tests: `provider.override(get_repo, make_fake_repo)`, and `provider.clear()` afterwards. One
# for each process, and not that of other users of fast-depends.
provider: Final = Provider()


class Dependencies:
    """What one handler takes besides the context and the payload.

    Args:
        handler: What a message calls the handler.
        wanted: The dependencies by parameter.

    Raises:
        InvalidHandlerError: If one cannot be made.
    """

    def __init__(self, handler: str, wanted: Mapping[str, Dependant]) -> None:
        self._handler = handler
        self._keys = {name: self._added(dependency) for name, dependency in wanted.items()}

    async def call(
        self, ctx: EventContext, payload: object, innermost: Callable[[Mapping[str, Any]], Awaitable[object]]
    ) -> None:
        """Make all of them, call *innermost* with them by name, and close those that yield.

        What *innermost* raises is raised, also when a dependency swallows it.
        """
        error: BaseException | None = None
        made: dict[Callable[..., Any], Any] = {}
        arguments: dict[str, Any] = {"ctx": ctx, "payload": payload}
        async with AsyncExitStack() as stack:
            given = {
                name: await provider.get_dependant(key).asolve(
                    stack=stack, cache_dependencies=made, nested=True, **arguments
                )
                for name, key in self._keys.items()
            }
            try:
                await innermost(given)
            except BaseException as raised:
                error = raised
                raise
        if error is not None:
            raise error

    def _added(self, dependency: Dependant) -> Any:
        function = dependency.dependency
        if not callable(function):
            raise InvalidHandlerError(f"{self._handler}: Depends() takes a function or a class, not {shown(function)}.")
        try:
            model = build_call_model(
                function, dependency_provider=provider, use_cache=dependency.use_cache, serializer_cls=None
            )
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise InvalidHandlerError(
                f"{self._handler}: dependency {shown(function)}, or one below it, cannot be read: {error}"
            ) from error
        self._check(model, {})
        return provider.add_dependant(model)

    def _check(self, model: CallModel, above: Mapping[str, Any]) -> None:
        """Refuse a dependency that could not be called, or would be given another one's value.

        Args:
            model: The dependency.
            above: What fast-depends hands down to it by name.
        """
        function = shown(model.call)
        if inspect.isgeneratorfunction(model.call):
            raise InvalidHandlerError(
                f"{self._handler}: dependency {function} is a plain generator, which would not be closed when the "
                "handler is cancelled. Write 'async def', with the same yield."
            )
        for parameter in model.params:
            name = parameter.field_name
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise InvalidHandlerError(
                    f"{self._handler}: parameter {name!r} of dependency {function} is positional-only, and "
                    "dependencies are called by name."
                )
            if above.get(name) is not None:
                raise self._clash(name, function)
            if name not in _GIVEN and parameter.default_value is ...:
                raise InvalidHandlerError(
                    f"{self._handler}: nobody can say what {name!r} of dependency {function} is. Its parameters are "
                    "ctx, payload, dependencies of its own, or have a default."
                )
        known = dict(above)
        for name, key in model.dependencies.items():
            if name in _GIVEN:
                raise InvalidHandlerError(
                    f"{self._handler}: parameter {name!r} of dependency {function} stands for the event, not for "
                    "another dependency. Give it another name."
                )
            if known.get(name, key) is not key:
                raise self._clash(name, function)
            self._check(provider.dependencies[key], known)
            known[name] = key

    def _clash(self, name: str, function: str) -> InvalidHandlerError:
        return InvalidHandlerError(
            f"{self._handler}: parameter {name!r} of dependency {function} would be given the value of another "
            "dependency, which is called the same further up. Give one of them another name."
        )
