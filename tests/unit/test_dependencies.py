"""A handler may take dependencies; what cannot be one is refused, in plain words, when it is registered."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import pytest

from pgebus import EventContext, EventRouter, InvalidHandlerError
from pgebus.depends import Depends

if TYPE_CHECKING:
    from decimal import Decimal


async def given(ctx: EventContext, payload: dict[str, Any]) -> int:
    return 1


async def other(ctx: EventContext) -> int:
    return 2


Given = Annotated[int, Depends(given)]


def refused(function: Any) -> str:
    with pytest.raises(InvalidHandlerError) as caught:
        EventRouter().on("a", name="handler")(function)
    return str(caught.value)


def depending_on(dependency: Any) -> Any:
    async def handler(ctx: Any, payload: Any, it: Any = Depends(dependency)) -> None: ...  # noqa: B008 - FastAPI's older way

    return handler


def test_a_handler_without_dependencies_has_none() -> None:
    router = EventRouter()

    @router.on("a")
    async def handler(ctx: "Decimal", payload: dict[str, Any], more: "Decimal | None" = None) -> None: ...

    (registered,) = router.handlers_for("a")
    assert registered.dependencies is None
    assert registered.function is handler


def test_one_function_may_be_registered_for_paths_that_overlap() -> None:
    router = EventRouter()
    handler = depending_on(given)
    router.on("a.*", name="handler")(handler)
    router.on("a.b", name="handler")(handler)
    assert len(router.handlers_for("a.b")) == 1


def test_a_decorated_handler_has_those_of_what_it_wraps() -> None:
    async def handler(ctx: Any, payload: Any, it: Annotated[int, Depends(given)]) -> None: ...

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> None: ...

    router = EventRouter()
    router.on("a")(wrapper)
    assert router.routes()[0].handler.dependencies is not None


def test_a_method_may_have_them() -> None:
    class Mail:
        async def send(self, ctx: Any, payload: Any, it: Annotated[int, Depends(given)]) -> None: ...

    router = EventRouter()
    router.on("a")(Mail().send)
    assert router.routes()[0].handler.dependencies is not None


def test_a_parameter_that_is_none_is_refused() -> None:
    async def handler(ctx: Any, payload: Any, repo: int) -> None: ...

    assert "further parameters need Depends(), or defaults" in refused(handler)


def test_one_whose_annotation_is_not_there_is_refused() -> None:
    async def handler(ctx: Any, payload: Any, repo: "Decimal") -> None: ...

    assert "further parameters need Depends(), or defaults" in refused(handler)


def test_one_that_is_defined_in_a_function_and_named_in_text_is_refused() -> None:
    async def local() -> None: ...

    async def handler(ctx: Any, payload: Any, repo: "Annotated[int, Depends(local)]") -> None: ...

    assert "'repo' cannot be resolved" in refused(handler)


def test_one_that_is_named_in_text_is_found() -> None:
    async def handler(ctx: "Decimal", payload: Any, it: "Annotated[int, Depends(given)]", alias: "Given") -> None: ...

    router = EventRouter()
    router.on("a")(handler)
    assert router.routes()[0].handler.dependencies is not None


def test_the_first_two_are_none() -> None:
    async def handler(ctx: Any, payload: Annotated[int, Depends(given)]) -> None: ...

    assert "parameter 'payload' cannot be a dependency" in refused(handler)


def test_a_positional_only_one_is_refused() -> None:
    async def handler(ctx: Any, payload: Any, it: Annotated[int, Depends(given)], /) -> None: ...

    assert "parameter 'it' cannot be a dependency" in refused(handler)


def test_that_of_fastapi_is_refused() -> None:
    async def handler(ctx: Any, payload: Any, it: Annotated[int, fastapi.Depends(given)]) -> None: ...

    assert "from pgebus.depends import Depends" in refused(handler)


def test_what_is_no_function_is_refused() -> None:
    assert "takes a function or a class, not" in refused(depending_on(5))


def test_a_parameter_that_nobody_knows_is_refused() -> None:
    async def needing(order_id: int) -> None: ...

    async def between(it: Annotated[None, Depends(needing)]) -> None: ...

    assert "nobody can say what 'order_id'" in refused(depending_on(needing))
    assert "nobody can say what 'order_id'" in refused(depending_on(between))


def test_a_positional_only_parameter_of_a_dependency_is_refused() -> None:
    async def needing(ctx: Any, /) -> None: ...

    assert "positional-only" in refused(depending_on(needing))


def test_a_plain_generator_is_refused() -> None:
    def yielding() -> Iterator[int]:
        yield 1

    assert "Write 'async def', with the same yield" in refused(depending_on(yielding))


def test_the_name_of_the_event_stands_for_the_event() -> None:
    async def needing(ctx: Annotated[int, Depends(other)]) -> None: ...

    assert "stands for the event" in refused(depending_on(needing))


def test_a_name_that_would_bring_the_value_of_another_one_is_refused() -> None:
    """fast-depends hands down by name what was made further up."""

    async def inner(it: Annotated[int, Depends(other)]) -> None: ...

    async def clashing(it: Annotated[int, Depends(given)], below: Annotated[None, Depends(inner)]) -> None: ...

    async def defaulting(it: int = 3) -> None: ...

    async def giving(it: Annotated[int, Depends(given)], below: Annotated[None, Depends(defaulting)]) -> None: ...

    async def fine(below: Annotated[None, Depends(inner)], it: Annotated[int, Depends(given)]) -> None: ...

    assert "would be given the value of another dependency" in refused(depending_on(clashing))
    assert "would be given the value of another dependency" in refused(depending_on(giving))
    EventRouter().on("a")(depending_on(fine))


def test_without_the_library_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['fast_depends'] = None\n"
        "import pgebus\n"
        "try:\n    import pgebus.depends\n"
        "except pgebus.ConfigurationError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - our own interpreter
    assert "pip install 'pgebus[depends]'" in done.stdout
