"""The allow-list is complete, and its methods are those of AsyncSession."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from pgebus.session import FORBIDDEN, GuardedSession

OF_OUR_OWN = {"attach", "unsafe"}
# New in SQLAlchemy 2.1; in 2.0 they are only ours.
SINCE_2_1 = {"delete_all", "merge_all"}


def _public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


ALLOWED = _public(GuardedSession) - OF_OUR_OWN


def test_every_name_of_the_session_is_allowed_or_explained() -> None:
    """A release of SQLAlchemy that adds a name makes this fail: decide which of the two it is."""
    instance = {"sync_session"}  # set by the constructor
    assert (_public(AsyncSession) | instance) - ALLOWED - FORBIDDEN.keys() == set()


def test_nothing_is_both() -> None:
    assert not ALLOWED & FORBIDDEN.keys()


def test_nothing_allowed_is_unknown_to_sqlalchemy() -> None:
    assert ALLOWED - _public(AsyncSession) - SINCE_2_1 == set()


def _parameters(of: type, name: str) -> list[tuple[str, object]]:
    """Names and kinds, without what is private: `_warn` of add(), and `**kw`, which only carries private ones."""

    def public() -> Iterator[tuple[str, object]]:
        for parameter in inspect.signature(getattr(of, name)).parameters.values():
            if parameter.name.startswith("_"):
                continue
            if parameter.kind is parameter.VAR_KEYWORD and name != "run_sync":
                continue
            yield parameter.name, parameter.kind

    return list(public())


@pytest.mark.parametrize("name", sorted(name for name in ALLOWED if callable(getattr(GuardedSession, name))))
def test_a_method_takes_what_the_session_takes(name: str) -> None:
    if name in SINCE_2_1 and not hasattr(AsyncSession, name):
        pytest.skip("not in this SQLAlchemy")
    assert _parameters(GuardedSession, name) == _parameters(AsyncSession, name)
    ours, theirs = getattr(GuardedSession, name), getattr(AsyncSession, name)
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)


def test_the_explanations_are_sentences() -> None:
    for reason in FORBIDDEN.values():
        assert reason.endswith(".")
        assert reason[0].islower()
