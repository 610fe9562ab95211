"""Steps: methods of the machine, how often each is wanted, and when it makes sense.

One rule of Hypothesis draws them all. With a rule for each of them Hypothesis would leave out half of them in most
examples, and an example in which nobody publishes, claims or completes shows little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, TypeVar

from hypothesis import strategies as st

F = TypeVar("F", bound=Callable[..., None])
_MARK: Final = "_step"
_known: dict[type[object], tuple[Step, ...]] = {}


@dataclass(frozen=True)
class Step:
    """One kind of step.

    Attributes:
        name: That of its method.
        weight: How often it comes, among those that make sense.
        when: Whether it makes sense for a machine.
        arguments: What it is called with.
    """

    name: str
    weight: int
    when: Callable[[Any], object]
    arguments: st.SearchStrategy[dict[str, Any]]


class Taken:
    """A step with its arguments; its `repr()` is what a failing example shows."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.arguments = arguments

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def step(weight: int = 1, when: Callable[[Any], object] = lambda machine: True, **arguments: Any) -> Callable[[F], F]:
    """Make a method a step; *arguments* are strategies."""

    def mark(method: F) -> F:
        setattr(method, _MARK, Step(method.__name__, weight, when, st.fixed_dictionaries(arguments)))
        return method

    return mark


def steps_of(machine: type[object]) -> tuple[Step, ...]:
    """Return the steps of a class, those that come often first: Hypothesis likes small numbers."""
    if machine not in _known:
        methods = (getattr(machine, name) for name in sorted(dir(machine)))
        steps = [getattr(method, _MARK) for method in methods if hasattr(method, _MARK)]
        _known[machine] = tuple(sorted(steps, key=lambda each: -each.weight))
    return _known[machine]


@st.composite
def sensible_steps(draw: st.DrawFn) -> Taken:
    """Draw a step that makes sense now, and its arguments."""
    machine = draw(st.runner())
    sensible = [each for each in steps_of(type(machine)) if each.name not in machine.left_out and each.when(machine)]
    sums = list(accumulate(each.weight for each in sensible))
    drawn = draw(st.integers(1, sums[-1]))
    chosen = next(each for each, upper in zip(sensible, sums, strict=True) if drawn <= upper)
    return Taken(chosen.name, draw(chosen.arguments))
